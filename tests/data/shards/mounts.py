"""Programs with a file system of their own, which not every system lets a user mount."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import coatnet

APART = ["unshare", "--user", "--map-root-user", "--mount"]


def run_with_mount(place: Path, program: str, size: str = "1m") -> subprocess.CompletedProcess[str]:
    """Run a Python program for which `place`, its argument, is an empty file system in memory of that size.

    Skips the test where none can be mounted.
    """
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(place)]
    try:
        subprocess.run([*APART, *mount], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("no file system can be mounted here")
    environment = {**os.environ, "PYTHONPATH": str(Path(coatnet.__file__).parents[1])}
    script = '"$@" && exec "$PROGRAM" -c "$CODE" "$PLACE"'
    return subprocess.run(
        [*APART, "sh", "-c", script, "sh", *mount],
        env=environment | {"PROGRAM": sys.executable, "CODE": program, "PLACE": str(place)},
        capture_output=True,
        text=True,
        timeout=120,
    )
