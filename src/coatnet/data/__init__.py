"""What goes in: datasets, decoding, transforms, mixing, sample order and loading."""

from typing import TYPE_CHECKING

from coatnet.lazy_exports import lazy_exports

if TYPE_CHECKING:
    from coatnet.data.transforms import EvaluationTransform as EvaluationTransform
    from coatnet.data.transforms import Preprocessing as Preprocessing

__all__, __getattr__, __dir__ = lazy_exports(
    __name__,
    {
        "EvaluationTransform": "coatnet.data.transforms",
        "Preprocessing": "coatnet.data.transforms",
    },
)
