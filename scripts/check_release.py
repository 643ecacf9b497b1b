"""Build wheel and sdist, check what they hold, and predict with the wheel alone: `make release-check`.

The wheel is installed into an empty environment with nothing but the dependencies that it declares, in the versions of
constraints.txt. A bundle that the development environment trains must get the same prediction in both.
"""

import json
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
WORK = ROOT / "build" / "release"
SDIST_HOLDS = ("pyproject.toml", "README.md", "CHANGELOG.md", "LICENSE", "Makefile", "constraints.txt", "PKG-INFO")
SDIST_HOLDS += ("constraints-oldest.txt", "docs/design.md", "examples/own_loop.py", "tests/conftest.py")


def run(*command: str | Path) -> str:
    """The standard output of a command that must succeed, away from the source tree."""
    surroundings = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(command, cwd=WORK, env=surroundings, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        sys.exit(f"exit code {done.returncode}: {' '.join(map(str, command))}")
    return done.stdout


def source_files() -> set[str]:
    """What belongs into a wheel: all of src/coatnet, save what Python left there."""
    files = (path for path in (ROOT / "src" / "coatnet").rglob("*") if path.is_file())
    return {path.relative_to(ROOT / "src").as_posix() for path in files if path.parent.name != "__pycache__"}


def check_contents(wheel: Path, sdist: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        metadata = archive.read(next(name for name in names if name.endswith("/METADATA"))).decode()
    held = {name for name in names if ".dist-info/" not in name}
    assert held == source_files(), f"the wheel and src/coatnet differ by {sorted(held ^ source_files())}"
    assert "coatnet/py.typed" in held
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names), "the wheel has no licence"
    assert (
        "\nLicense-Expression: Apache-2.0\n" in metadata and "\nDescription-Content-Type: text/markdown\n" in metadata
    )
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    missing = {f"src/{name}" for name in source_files()}.union(SDIST_HOLDS) - names
    assert not missing, f"the sdist lacks {sorted(missing)}"


def main() -> None:
    shutil.rmtree(WORK, ignore_errors=True)
    WORK.mkdir(parents=True)
    run(sys.executable, "-m", "build", "--outdir", WORK / "dist", ROOT)
    (wheel,), (sdist,) = (WORK / "dist").glob("*.whl"), (WORK / "dist").glob("*.tar.gz")
    check_contents(wheel, sdist)
    print(f"{wheel.name}, {sdist.name}: built, and complete")

    run(sys.executable, "-m", "venv", WORK / "venv")
    python = WORK / "venv" / "bin" / "python"
    pip = (python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check")
    run(*pip, wheel, "-c", ROOT / "constraints.txt")
    home = run(python, "-c", "import coatnet; print(coatnet.__file__)").strip()
    assert Path(home).is_relative_to(WORK / "venv"), f"coatnet was imported from {home}"
    print("the wheel alone: installed")

    development = Path(sys.executable).parent / "coatnet"
    alone = python.parent / "coatnet"
    version = run(alone, "--version").strip()
    assert version.split()[-1] == wheel.name.split("-")[1], f"{wheel.name} says that it is {version}"
    (row,) = json.loads(run(alone, "models", "coatnet-0", "--json"))
    assert row["name"] == "coatnet-0" and 24e6 < row["parameters"] < 26e6
    run(development, "train", "--data", "digits", "--epochs", "1", "--out", WORK / "digits")
    predict = ("predict", WORK / "digits" / "bundle", ROOT / "examples" / "images", "--engine", "torch", "--json")
    ours, theirs = run(development, *predict), run(alone, *predict)
    assert ours == theirs and ours.count("\n") == 3, f"in the development environment:\n{ours}alone:\n{theirs}"
    print(f"the wheel alone: {version}, models and predict answer as in the development environment")


if __name__ == "__main__":
    main()
