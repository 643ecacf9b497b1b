"""Raises runs in forked children and kills each child with `kill -9` at a random moment, until a run is complete.

    python nursery.py FOLDER NUMBER

Prints, as JSON, what every kill met: the moment, the last step in the log, the step of the checkpoint left whole.
"""

import io
import json
import os
import random
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch
import torch._dynamo  # every optimizer imports it, for two seconds: not in each child anew
from rich.console import Console
from tests.faults.running import RECIPE

from coatnet.training.checkpoint import latest_checkpoint, load_checkpoint, published
from coatnet.training.run import train

BRIEF = replace(RECIPE, epochs=1.6, evaluate_every=0.4)  # 81 steps
MOMENTS = ("any", "any", "staged", "complete but for its name", "removing")


def child(out: Path) -> int:
    """A process of its own that trains."""
    pid = os.fork()
    if pid:
        return pid
    try:
        train(BRIEF, out, console=Console(file=io.StringIO(), force_terminal=False))
    finally:
        os._exit(0)


def reached(moment: str, folder: Path) -> bool:
    """Whether the checkpoints are just in that state."""
    pattern = {"staged": "*.tmp-*", "complete but for its name": "*.tmp-*/manifest.json", "removing": ".trash-*"}
    return any(True for _ in folder.glob(pattern[moment]))


def kill(pid: int, moment: str, folder: Path) -> bool:
    """Kill the child at that moment; whether it still lived."""
    limit = time.monotonic() + 20
    if moment == "any":
        time.sleep(random.uniform(0.02, 1.5))
    else:
        time.sleep(random.uniform(0.3, 0.9))
        while not reached(moment, folder) and os.waitpid(pid, os.WNOHANG) == (0, 0) and time.monotonic() < limit:
            pass
    try:
        os.kill(pid, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
    except (ProcessLookupError, ChildProcessError):
        return False
    return os.WIFSIGNALED(status)


def logged(out: Path) -> int:
    """The last step whose line in the log is whole."""
    steps = [0]
    if (out / "metrics.jsonl").exists():
        for line in (out / "metrics.jsonl").read_text().splitlines():
            try:
                steps.append(json.loads(line)["step"])
            except ValueError:
                continue
    return steps[-1]


def raise_run(out: Path) -> list[dict]:
    """One run to its end, through as many deaths as it takes; what each met."""
    met = []
    while not (out / "bundle").exists():
        moment = random.choice(MOMENTS) if (out / "checkpoints").exists() else "any"
        if not kill(child(out), moment, out / "checkpoints"):
            continue
        damaged: list[str] = []
        whole = latest_checkpoint(out / "checkpoints", damaged.append)
        step = whole.state["position"]["step"] if whole else 0
        met.append({"moment": moment, "logged": logged(out), "saved": step, "damaged": damaged})
    return met


def main(folder: Path, number: int) -> None:
    random.seed(7)
    torch.set_num_threads(1)
    os.waitpid(child(folder / "whole"), 0)
    expected = load_checkpoint(published(folder / "whole" / "checkpoints")[-1]).tensors
    met: list[dict] = []
    same = []
    while len(met) < number:
        out = folder / f"run-{len(same)}"
        met += raise_run(out)
        found = load_checkpoint(published(out / "checkpoints")[-1]).tensors
        same.append(all(torch.equal(value, found[name]) for name, value in expected.items()))
        met[-1]["left"] = sorted(path.name for path in (out / "checkpoints").iterdir())
    print(json.dumps({"met": met, "same": same}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
