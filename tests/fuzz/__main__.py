"""`make fuzz`: hostile inputs for every reader, FUZZ_SECONDS long (60; an hour is 3600), from Hypothesis.

Each fault is kept in tests/fuzz/found as TARGET-HASH, which `make test` reads again from then on. Exit code 1 if there
was any. `python -m tests.fuzz TARGET ...` fuzzes some targets alone.

The inputs follow from FUZZ_SEED (0): every run reads the same ones in the same order, as far as its time lets it, so a
commit passes or fails for what it changes. A longer run goes on from there; FUZZ_SEED=random, or any other number,
reads new inputs.
"""

import hashlib
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

FOUND = Path(__file__).with_name("found")
STARTING = 120  # seconds that a child may take for its imports
HANGING = 60  # seconds after which a child that does not react is killed


def main(names: list[str]) -> int:
    """Fuzz in child processes, one after the other: a fault ends one."""
    seconds = float(os.environ.get("FUZZ_SECONDS", "60"))
    given = os.environ.get("FUZZ_SEED", "0")
    number = random.SystemRandom().randrange(10**9) if given == "random" else int(given)
    end, faults, counts = time.monotonic() + seconds, [], Counter()
    print(f"FUZZ_SEED={number}", flush=True)
    while (left := end - time.monotonic()) > 0:
        with tempfile.TemporaryDirectory() as folder:
            state = Path(folder)
            command = [sys.executable, "-m", "tests.fuzz.child", folder, str(left), str(number), *names]
            with (state / "log").open("wb") as log:
                child = subprocess.Popen(command, stdout=log, stderr=log)
                code = wait(child, state)
            if (state / "counts.json").exists():
                counts.update(json.loads((state / "counts.json").read_text()))
            if code:
                if not (state / "input").exists():
                    print((state / "log").read_text(errors="replace")[-3_000:])
                    return 1
                faults.append(keep(state, code))
                print(faults[-1], flush=True)
        number += 1_000
    for name, count in counts.items():
        print(f"{name:20} {count:8,} inputs")
    for fault in faults:  # once more, since the end of a log is what is read
        print(fault[-1_500:])
    print(f"{sum(counts.values()):,} inputs of {len(counts)} readers, {len(faults)} faults")
    return 1 if faults else 0


def wait(child: subprocess.Popen, state: Path) -> int:
    """The exit code of a child, which is killed if it hangs."""
    started = time.time()
    while child.poll() is None:
        current = state / "input"
        since = current.stat().st_mtime if current.exists() else started + STARTING
        if time.time() - since > HANGING:
            child.kill()
        time.sleep(0.1)
    return child.returncode


def keep(state: Path, code: int) -> str:
    """Keep the input at which a child ended; returns what happened."""
    name, content = (state / "name").read_text(), (state / "input").read_bytes()
    path = FOUND / f"{name}-{hashlib.sha256(content).hexdigest()[:12]}"
    FOUND.mkdir(exist_ok=True)
    path.write_bytes(content)
    why = (state / "why").read_text() if code == 3 else f"the process ended with {code} (a signal, memory or time)"
    return f"\n{path}: {len(content):,} bytes\n{why}"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
