"""Batch prediction resumes after a kill or a signal: no image twice, none left out."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from coatnet.cli.main import main

parquet = pytest.importorskip("pyarrow.parquet")
KILLED_PREDICTIONS = Path(__file__).with_name("killed_predictions.py")
ENVIRONMENT = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}


def run_killed(bundle: Path, images: Path, folder: Path, *how: str) -> dict:
    """The result that killed_predictions.py prints."""
    command = [sys.executable, str(KILLED_PREDICTIONS), str(bundle), str(images), str(folder), *how]
    run = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


@pytest.mark.nightly
@pytest.mark.skipif(sys.platform != "linux", reason="forks")
def test_resumes_after_a_kill_before_any_write(bundle: Path, images: Path, tmp_path: Path) -> None:
    found = run_killed(bundle, images, tmp_path, "every")
    assert found["same"] and found["rows"] == 151 and found["left"] == []
    assert found["killed"] == found["files"] - 1 >= 15  # plan, three parts and the file: three steps each


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="forks")
@pytest.mark.parametrize("kills", [8, pytest.param(150, marks=pytest.mark.nightly)])
def test_resumes_after_random_kills_with_any_number_of_processes(
    bundle: Path, images: Path, tmp_path: Path, kills: int
) -> None:
    found = run_killed(bundle, images, tmp_path, "random", str(kills))
    assert found["same"] and found["rows"] == 151 and found["left"] == [] and found["killed"] >= kills


def command(bundle: Path, *sources: Path, out: Path) -> list[str]:
    return ["predict", str(bundle), *map(str, sources), "--out", str(out), "--engine", "torch"]


@pytest.fixture
def many(images: Path, tmp_path: Path) -> Callable[[int], Path]:
    """`many(n)` is a manifest of n rows, of one image."""
    (tmp_path / "0.png").write_bytes((images / "0.png").read_bytes())

    def many(num_rows: int) -> Path:
        path = tmp_path / f"{num_rows}.csv"
        path.write_text("path,label\n" + "".join(f"0.png,{number}\n" for number in range(num_rows)))
        return path

    return many


@pytest.mark.slow
def test_torchrun_shares_the_parts_among_processes(bundle: Path, many: Callable[[int], Path], tmp_path: Path) -> None:
    both, alone, source = tmp_path / "both.parquet", tmp_path / "alone.parquet", many(300)
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "coatnet"]
    arguments = [sys.executable, *torchrun, *command(bundle, source, out=both)]
    run = subprocess.run(arguments, capture_output=True, text=True, env=ENVIRONMENT)
    assert run.returncode == 0, run.stderr
    assert "300 images" in run.stdout
    assert main(command(bundle, source, out=alone)) == 0
    assert parquet.read_table(both).equals(parquet.read_table(alone))
    assert parquet.read_table(both)["label"].to_pylist() == [str(number) for number in range(300)]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="needs signals")
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_stops_it_and_the_same_command_resumes(
    bundle: Path, many: Callable[[int], Path], tmp_path: Path, number: signal.Signals, code: int
) -> None:
    out, staged = tmp_path / "out.parquet", tmp_path / ".out.parquet.parts"
    arguments = [sys.executable, "-m", "coatnet", *command(bundle, many(20_000), out=out)]  # seconds of work
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        deadline = time.monotonic() + 60
        while not list(staged.glob("part-*")):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.01)
        process.send_signal(number)
        said = process.communicate()[1]
    assert process.returncode == code
    assert said == f"coatnet: {out}: stopped; the same command resumes\n"
    kept = {path: path.stat().st_mtime_ns for path in staged.glob("part-*")}
    assert kept and not out.exists()
    again = subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    with again:
        while len(found := {path: path.stat().st_mtime_ns for path in staged.glob("part-*")}) <= len(kept):
            assert again.poll() is None
            time.sleep(0.01)
        again.send_signal(number)
        again.communicate()
    assert again.returncode == code and kept.items() <= found.items()  # what was there is not computed again


def test_a_damaged_part_is_computed_again(
    bundle: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = tmp_path / ".out.parquet.parts" / "part-000001.parquet"
    found.parent.mkdir()
    found.write_bytes(b"PAR1 and then nothing")
    arguments = command(bundle, images / "cat", images / "bee", out=tmp_path / "out.parquet")
    assert main(arguments) == 2
    assert "part-000001.parquet was damaged and is removed" in capsys.readouterr().err
    assert main(arguments) == 1  # two bad images
    assert parquet.read_metadata(tmp_path / "out.parquet").num_rows == 101


@pytest.mark.skipif(sys.platform == "win32", reason="needs locks")
def test_a_second_process_with_the_same_work_is_refused(
    bundle: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from coatnet.system.files import file_lock

    staged = tmp_path / ".out.parquet.parts"
    staged.mkdir()
    with file_lock(staged / "process-0"):
        assert main(command(bundle, images, out=tmp_path / "out.parquet")) == 2
    assert "another process is predicting" in capsys.readouterr().err


@pytest.mark.nightly
def test_memory_does_not_grow_with_the_images(bundle: Path, many: Callable[[int], Path], tmp_path: Path) -> None:
    measure = "import resource, sys; from coatnet.cli.main import main; code = main(sys.argv[1:])"
    measure += "; print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024); sys.exit(code)"
    peaks = {}
    for num_images in (2_000, 20_000):
        arguments = command(bundle, many(num_images), out=tmp_path / f"{num_images}.parquet")
        run = subprocess.run([sys.executable, "-c", measure, *arguments], capture_output=True, text=True)
        assert run.returncode == 0, run.stderr
        peaks[num_images] = float(run.stdout.split()[-1])
    assert peaks[20_000] < peaks[2_000] + 30, peaks
