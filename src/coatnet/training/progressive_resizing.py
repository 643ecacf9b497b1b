"""Progressive resizing: small images at the start of a training, full size at its end.

Howard 2018 (fast.ai's DAWNBench entry); the three parts and their names are those of MosaicML Composer.
"""

import numpy as np

from coatnet.errors import UserError
from coatnet.system.validated import FractionBelowOne, PositiveFraction, validated

COST_POINTS = 64  # of the sum that stands for an integral; its error is below a hundredth


@validated
class ProgressiveResizing:
    """How the size of the images grows over the run: it stays, then grows linearly, then is `resolution`.

    Relative biases are resampled to the smaller maps in each step, as in appendix A.1 of the paper, so the network has
    its final shape from the start. Statistics of BatchNorm become those of full size within some 30 steps of the last
    part.
    """

    initial_scale: PositiveFraction = 1.0
    """Side of the images at the start, as a fraction of `resolution`; by default 1, which resizes nothing."""
    delay_fraction: FractionBelowOne = 0.5
    """Fraction of the run with images of that side, before they grow."""
    finetune_fraction: PositiveFraction = 0.2
    """Fraction of the run at its end with images of `resolution`."""

    def __post_init__(self) -> None:
        if self.delay_fraction + self.finetune_fraction > 1:
            raise UserError(
                f"delay_fraction and finetune_fraction must be at most 1 together, got {self.delay_fraction:g} and "
                f"{self.finetune_fraction:g}"
            )

    def scale_at(self, progress: float) -> float:
        """Side of the images as a fraction of the full one, at `progress` 0 (the start of the run) to 1 (its end)."""
        end = 1 - self.finetune_fraction
        if progress >= end:
            return 1.0
        if progress <= self.delay_fraction:  # which may be the end as well
            return self.initial_scale
        grown = (progress - self.delay_fraction) / (end - self.delay_fraction)
        return self.initial_scale + (1 - self.initial_scale) * grown

    def resolution_at(self, progress: float, resolution: int, multiple: int) -> int:
        """Side of the images in pixels: `resolution`, or a smaller multiple of `multiple`."""
        scale = self.scale_at(progress)
        return min(resolution, max(1, round(scale * resolution / multiple)) * multiple) if scale < 1 else resolution

    def cost_after(self, progress: float) -> float:
        """Mean number of pixels of the images from `progress` to the end, as a fraction of those of full size."""
        if self.initial_scale == 1:
            return 1.0
        points = np.linspace(min(progress, 1.0), 1.0, COST_POINTS)
        return float(np.mean([self.scale_at(point) ** 2 for point in points]))
