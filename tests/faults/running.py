"""Runs with faults, and what they left."""

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.training import launching

from coatnet.training.checkpoint import Checkpoint, load_checkpoint, published
from coatnet.training.config import Recipe

PROGRAM = Path(__file__).parent / "process.py"
# A checkpoint after every step, an evaluation after every fourth, ten steps.
RECIPE = Recipe(
    data="digits",
    model="coatnet-femto-16",
    epochs=0.199,
    batch_size=32,
    evaluate_every=0.079,
    stochastic_depth=0.3,
    ema_decay=0.9,
    mixing={"mixup_alpha": 0.8},
    checkpoint_every_minutes=1e-9,
)
LAST_STEP = 10


@dataclass
class Ended:
    """How a run ended: of the whole, and of each process by its rank."""

    code: int
    output: str
    out: Path
    notes: Path

    def noted(self, name: str, rank: int) -> Any:
        return json.loads((self.notes / f"{name}-{rank}.json").read_text())

    @property
    def codes(self) -> list[int]:
        """Exit codes of the processes that lived to note them."""
        return [self.noted("exit", int(path.stem[-1]))["code"] for path in sorted(self.notes.glob("exit-*"))]

    @property
    def seconds_to_end(self) -> float:
        """From the first signal to the end of the last process."""
        sent = min(json.loads(path.read_text()) for path in self.notes.glob("sent-*"))
        return max(json.loads(path.read_text())["time"] for path in self.notes.glob("exit-*")) - sent


def event(moment: str, step: int, do: str, rank: int = 0, **arguments: Any) -> dict:
    return {"moment": moment, "step": step, "do": do, "rank": rank, "with": arguments}


def run(
    folder: Path,
    *events: dict,
    recipe: Recipe = RECIPE,
    out: Path | None = None,
    processes: int = 1,
    prefix: tuple[str, ...] = (),
    **given: Any,
) -> Ended:
    """A run in real processes: one, or several under torchrun."""
    number = len(list(folder.glob("notes-*")))
    notes, out = folder / f"notes-{number}", out or folder / "run"
    notes.mkdir()
    (notes / "recipe.yaml").write_text(recipe.to_yaml())
    plan = {"recipe": str(notes / "recipe.yaml"), "out": str(out), "notes": str(notes), "events": list(events)}
    (notes / "plan.json").write_text(json.dumps(plan))
    program = [str(PROGRAM), str(notes / "plan.json")]
    if processes > 1:
        code, output = launching.run(program, processes=processes, **given)
        return Ended(code, output, out, notes)
    ended = subprocess.run(
        [*prefix, sys.executable, *program],
        env=launching.environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=given.get("seconds", 100),
    )
    return Ended(ended.returncode, ended.stdout, out, notes)


def log(out: Path) -> list[dict]:
    """The log, without what the clock says."""
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in record.items() if k not in ("seconds", "images_per_second")} for record in records]


def last_checkpoint(out: Path) -> Checkpoint:
    """Whole, or it raises."""
    return load_checkpoint(published(out / "checkpoints")[-1])


def last_step(out: Path) -> int:
    return last_checkpoint(out).state["position"]["step"]


def leftovers(out: Path) -> list[str]:
    """What no checkpoint folder should hold once nothing is on its way."""
    return [
        path.name
        for path in (out / "checkpoints").iterdir()
        if not path.name.startswith("step-0") or ".tmp" in path.name
    ]
