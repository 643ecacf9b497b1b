"""A finished model in a folder: weights, class names, preprocessing, record; timm's folders and the hub."""

from coatnet.bundle.bundle import Bundle as Bundle
from coatnet.bundle.bundle import load as load

__all__ = ["Bundle", "load"]
