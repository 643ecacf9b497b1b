"""Seconds until the command line answers, and what `import coatnet` adds to `import torch`.

    python benchmarks/startup.py

Whole processes, alternately, medians of nine after one that is not counted.
"""

import os
import statistics
import subprocess
import sys
import time

ROUNDS = 9
# An installed package comes with its byte code; where Python may not write it, every import would compile our sources.
ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
COMMANDS = {
    "coatnet --help": ["-m", "coatnet", "--help"],
    "import torch": ["-c", "import torch"],
    "import torch, and every public name of coatnet": ["-c", "import torch; from coatnet import *"],
}


def main() -> None:
    seconds: dict[str, list[float]] = {name: [] for name in COMMANDS}
    for index in range(ROUNDS + 1):
        for name, command in COMMANDS.items():
            began = time.perf_counter()
            subprocess.run([sys.executable, *command], check=True, stdout=subprocess.DEVNULL, env=ENVIRONMENT)
            if index:
                seconds[name].append(time.perf_counter() - began)
    for name, taken in seconds.items():
        print(f"{statistics.median(taken):6.2f} s  ({min(taken):.2f} to {max(taken):.2f})  {name}")
    _, torch_alone, both = seconds.values()
    added = [with_us - without for without, with_us in zip(torch_alone, both, strict=True)]
    print(f"{statistics.median(added):6.2f} s  ({min(added):.2f} to {max(added):.2f})  what coatnet adds, pairwise")


if __name__ == "__main__":
    main()
