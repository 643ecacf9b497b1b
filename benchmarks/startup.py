"""Seconds until the command line answers, and what `import coatnet` adds to `import torch`.

    python benchmarks/startup.py

Whole processes, alternately, medians of nine after one that is not counted.
"""

import os
import subprocess
import sys
from functools import partial

from rounds import alternate, spread, timed

ROUNDS = 9
# An installed package comes with its byte code; where Python may not write it, every import would compile our sources.
ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
COMMANDS = {
    "coatnet --help": ["-m", "coatnet", "--help"],
    "import torch": ["-c", "import torch"],
    "import torch, and every public name of coatnet": ["-c", "import torch; from coatnet import *"],
}


def main() -> None:
    run = partial(subprocess.run, check=True, stdout=subprocess.DEVNULL, env=ENVIRONMENT)
    works = {name: timed(partial(run, [sys.executable, *command])) for name, command in COMMANDS.items()}
    seconds = alternate(works, ROUNDS, warming=1)
    for name, taken in seconds.items():
        print(f"{spread(taken, '6.2f', ' s ')}  {name}")
    _, torch_alone, both = seconds.values()
    added = [with_us - without for without, with_us in zip(torch_alone, both, strict=True)]
    print(f"{spread(added, '6.2f', ' s ')}  what coatnet adds, pairwise")


if __name__ == "__main__":
    main()
