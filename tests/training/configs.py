"""Configurations for tests that need no data."""

from coatnet.training.config import Recipe, TrainingConfig
from coatnet.training.defaults import DataFacts, resolve_for

SMALL_COLOR_IMAGES = DataFacts(num_images=1000, side=32, shorter_side=32, largest_side=32)


def config_of(**asked) -> TrainingConfig:
    return resolve_for(Recipe(data="digits", **asked), SMALL_COLOR_IMAGES)
