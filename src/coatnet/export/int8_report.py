"""What int8 costs and what it gives, for programs and for people."""

from dataclasses import asdict, dataclass
from typing import Any

from coatnet.evaluation.intervals import Interval


@dataclass(frozen=True)
class Speed:
    """Median milliseconds a batch, measured in turns; `default` is the fp32 model in OpenVINO's own choice."""

    batch_size: int
    fp32: float
    default: float
    int8: float


@dataclass(frozen=True)
class Quantisation:
    """What int8 costs and what it gives.

    `figure` is top1, or mean_average_precision for several labels, on `num_images` held-out images of `data`; its
    intervals are at 95 %. `agreement` is the share of these with the same likeliest class. Bytes are those of weights.
    """

    data: str
    num_calibrating: int
    num_images: int
    figure: str
    before: float
    before_interval: Interval
    after: float
    after_interval: Interval
    agreement: float
    bytes_before: int
    bytes_after: int
    speed: tuple[Speed, ...]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def to_markdown(self) -> str:
        """A section for people."""
        rows = (("fp32", self.before, self.before_interval, self.bytes_before),)
        rows += (("int8", self.after, self.after_interval, self.bytes_after),)
        lines = [
            "# int8",
            "",
            f"Calibrated on {self.num_calibrating:,} images of {self.data}, measured on {self.num_images:,} "
            f"others; the same likeliest class for {100 * self.agreement:.1f} %.",
            "",
            f"| | {self.figure}, % | 95 % interval | weights, MB |",
            "|---|---:|---|---:|",
            *(
                f"| {name} | {100 * value:.2f} | {100 * low:.1f} to {100 * high:.1f} | {size / 1e6:.2f} |"
                for name, value, (low, high), size in rows
            ),
            "",
            "| batch | fp32, ms | fp32 model as OpenVINO runs it by default, ms | int8, ms |",
            "|---:|---:|---:|---:|",
            *(f"| {each.batch_size} | {each.fp32:.2f} | {each.default:.2f} | {each.int8:.2f} |" for each in self.speed),
        ]
        return "\n".join(lines) + "\n"
