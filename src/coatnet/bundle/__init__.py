"""Trained models as folders: weights, class names, preprocessing and record; also timm's folders and the hub."""

from coatnet.bundle.bundle import Bundle as Bundle
from coatnet.bundle.bundle import load as load

__all__ = ["Bundle", "load"]
