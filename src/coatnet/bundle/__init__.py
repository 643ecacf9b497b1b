"""Trained models as folders: weights, class names, preprocessing and record; also timm's folders and the hub."""

from typing import TYPE_CHECKING

from coatnet.public_names import lazy_exports

if TYPE_CHECKING:
    from coatnet.bundle.bundle import Bundle as Bundle
    from coatnet.bundle.bundle import load as load

# Uploads and downloads need no torch.
__all__, __getattr__, __dir__ = lazy_exports(
    __name__, {"Bundle": "coatnet.bundle.bundle", "load": "coatnet.bundle.bundle"}
)
