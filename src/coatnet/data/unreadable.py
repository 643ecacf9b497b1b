"""Images that could not be used: counted, named, and too many of them end the run."""

from collections.abc import Mapping

from coatnet.errors import UserError

_LISTED = 20


class BadImages:
    """One entry an image, however often it was met. One is always allowed, unless the budget is 0."""

    def __init__(self, num_images: int, budget: float = 0.001) -> None:
        """`budget` is a fraction of the `num_images` of all datasets that are read."""
        if not 0 <= budget <= 1:
            raise UserError(f"the budget for bad images must be a fraction from 0 to 1, got {budget!r}")
        self.budget = budget
        self.num_images = num_images
        self._records: dict[str, str] = {}

    @property
    def records(self) -> Mapping[str, str]:
        """The reason for each name."""
        return self._records

    @property
    def allowed(self) -> int:
        return max(1, int(self.budget * self.num_images)) if self.budget else 0

    def add(self, name: str, reason: str) -> None:
        self._records.setdefault(name, reason)

    def raise_if_over(self) -> None:
        num_bad = len(self._records)
        if num_bad > self.allowed:
            listed = "; ".join(f"{name} ({reason})" for name, reason in list(self._records.items())[:_LISTED])
            more = f"; and {num_bad - _LISTED} more" if num_bad > _LISTED else ""
            raise UserError(
                f"{num_bad} of {self.num_images:,} images cannot be used, {self.allowed} may be "
                f"(bad_image_budget {self.budget:g}; raise it, or remove them): {listed}{more}"
            )
