"""Where a run stands: all that a resumption needs beside tensors."""

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Position:
    """After `step` optimizer steps in `seconds`. Sums are since the last log; `measured` is the step of the last
    evaluation, `best` the best score of all; `left_out` counts the steps whose loss was not finite."""

    step: int = 0
    seconds: float = 0.0
    loss_sum: float = 0.0
    norm_sum: float = 0.0
    since_log: int = 0
    best: float = -1.0
    evaluations_since_best: int = 0
    measured: int = 0
    left_out: int = 0

    def after_step(self, outcome: tuple[float, float] | None, seconds: float) -> "Position":
        """One optimizer step further, of that loss and gradient norm; None if it was left out."""
        if outcome is None:
            return replace(self, step=self.step + 1, seconds=self.seconds + seconds, left_out=self.left_out + 1)
        loss, norm = outcome
        return replace(
            self,
            step=self.step + 1,
            seconds=self.seconds + seconds,
            loss_sum=self.loss_sum + loss,
            norm_sum=self.norm_sum + norm,
            since_log=self.since_log + 1,
        )

    def after_log(self) -> "Position":
        """The sums begin anew."""
        return replace(self, loss_sum=0.0, norm_sum=0.0, since_log=0)

    def after_evaluation(self, score: float, seconds: float) -> "Position":
        """One evaluation later."""
        return replace(
            self,
            seconds=self.seconds + seconds,
            best=max(score, self.best),
            evaluations_since_best=0 if score > self.best else self.evaluations_since_best + 1,
            measured=self.step,
        )
