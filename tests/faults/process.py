"""A process that trains, has something done to it at a given moment, and notes how it ended.

    python process.py PLAN.json

The plan: `recipe` (YAML), `out`, `notes` (a folder), and `events`, each with the moment, the step (1 is the first), the
process it happens to, and what to do. Everything is done from inside, but for real: signals are sent, files are moved,
disks are filled.
"""

import errno
import json
import multiprocessing
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch

from coatnet.cli.main import main
from coatnet.evaluation.metrics import Metrics
from coatnet.model.network import CoAtNet
from coatnet.training import async_checkpoint
from coatnet.training.trainer import Trainer

RANK = int(os.environ.get("RANK", "0"))
FIRST_LIFE = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0"


class Plan:
    """What is to happen, and when."""

    def __init__(self, path: str) -> None:
        values = json.loads(Path(path).read_text())
        self.recipe, self.out, self.notes = values["recipe"], Path(values["out"]), Path(values["notes"])
        self.events = [event for event in values["events"] if event.get("rank", 0) == RANK and FIRST_LIFE]
        self.step = 0
        self.images = torch.empty(0)

    def reach(self, moment: str) -> None:
        """Do what is planned for this moment of this step, once."""
        for event in [event for event in self.events if (event["moment"], event["step"]) == (moment, self.step)]:
            self.events.remove(event)
            self.note("sent", time.time())
            getattr(self, event["do"])(**event.get("with", {}))

    def note(self, name: str, value: object) -> None:
        (self.notes / f"{name}-{RANK}.json").write_text(json.dumps(value))

    def send(self, name: str, to: str = "self") -> None:
        os.kill(os.getpid() if to == "self" else os.getppid(), getattr(signal, name))
        time.sleep(0.02)

    def slow_save_with(self, name: str) -> None:
        """A second signal in the save that a first one caused."""
        os.kill(os.getpid(), getattr(signal, name))
        time.sleep(0.5)

    def spoil_image(self) -> None:
        self.images[3, 0, 2, 2] = float("nan")

    def exhaust_memory(self) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")

    def limit_files(self, num_bytes: int) -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, resource.RLIM_INFINITY))

    def free_files(self) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))

    def fill_disk(self) -> None:
        with (self.out / "filler").open("wb", buffering=0) as file:
            try:
                while True:
                    file.write(bytes(1 << 16))
            except OSError as error:
                assert error.errno == errno.ENOSPC

    def empty_disk(self) -> None:
        (self.out / "filler").unlink()

    def remount(self, how: str) -> None:
        """Read-only by a second mount over the first, in which the run may have files open for writing.

        The mount is made read-only elsewhere and copied with its flags: a remount in place is refused as busy when a
        checkpoint is being written at that moment.
        """
        place, view = str(self.out.parent), f"{self.out.parent}-read-only"
        if how == "ro":
            Path(view).mkdir()
            subprocess.run(["mount", "--bind", place, view], check=True)
            subprocess.run(["mount", "-o", "remount,bind,ro", view], check=True)
            subprocess.run(["mount", "--bind", view, place], check=True)
        else:
            for mounted in (place, view):
                subprocess.run(["umount", "-l", mounted], check=True)

    def break_fsync(self) -> None:
        def fail(_: int) -> None:
            raise OSError(errno.EIO, os.strerror(errno.EIO))

        self._fsync, os.fsync = os.fsync, fail

    def mend_fsync(self) -> None:
        os.fsync = self._fsync

    def block(self, names: list[str]) -> None:
        """Put folders where the run writes files."""
        for name in names:
            (self.out / name).unlink(missing_ok=True)
            (self.out / name).mkdir()

    def remove_run(self) -> None:
        shutil.rmtree(self.out, ignore_errors=True)  # a checkpoint may be on its way

    def turn_clock(self, hours: float) -> None:
        real = time.time
        time.time = lambda: real() + 3600 * hours

    def kill_worker(self) -> None:
        os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)


def around(owner: object, name: str, moment: str, plan: Plan) -> None:
    """Have the plan know when that function is called."""
    original = getattr(owner, name)

    def known(*arguments, **named):
        plan.reach(moment)
        return original(*arguments, **named)

    setattr(owner, name, known)


def follow(plan: Plan) -> None:
    """Have the plan know every moment of every step."""
    original = Trainer.step

    def step(self, images, labels, *rest):
        plan.step, plan.images = self.state.step + 1, images
        plan.reach("step")
        return original(self, images, labels, *rest)

    Trainer.step = step
    around(CoAtNet, "forward_features", "forward", plan)
    around(torch.Tensor, "backward", "backward", plan)
    around(Metrics, "update", "evaluation", plan)
    around(async_checkpoint.CheckpointWriter, "start", "save", plan)
    around(async_checkpoint, "write_part", "writing", plan)


def run() -> int:
    plan = Plan(sys.argv[1])
    follow(plan)
    torch.set_num_threads(1)
    code: int | str | None = 1
    try:
        code = main(["train", "--config", plan.recipe, "--out", str(plan.out)])
    except SystemExit as end:
        code = end.code
    except KeyboardInterrupt:
        code = 130
    plan.note("exit", {"code": code, "time": time.time()})
    return int(code or 0)


if __name__ == "__main__":
    sys.exit(run())
