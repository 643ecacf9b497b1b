"""A disk that refuses costs checkpoints, not the training; what was saved before stays."""

import os
import subprocess
from dataclasses import replace

import pytest
import torch
from tests.faults.running import LAST_STEP, RECIPE, event, last_checkpoint, last_step, leftovers, run

from coatnet.bundle import load

needs_mounts = pytest.mark.skipif(os.geteuid() != 0, reason="mounting needs root")


@pytest.fixture
def disk(tmp_path):
    """A disk of 48 MB of its own."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=48m", "tmpfs", str(place)], capture_output=True)
    if mounted.returncode:
        pytest.skip("this system lets no one mount")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    ended = run(folder)
    assert ended.code == 0, ended.output
    return ended.out


def assert_completed(ended, whole):
    assert ended.code == 0, ended.output
    assert "training goes on" in ended.output
    assert last_step(ended.out) == LAST_STEP and leftovers(ended.out) == []
    torch.testing.assert_close(last_checkpoint(ended.out).tensors, last_checkpoint(whole).tensors, rtol=0, atol=0)


@needs_mounts
@pytest.mark.fault(
    "B7", "the disk full from step 4 to 7 (tmpfs of 48 MB)", "a warning with the space needed; training goes on"
)
def test_a_full_disk_is_reported_and_the_run_completes(disk, whole, tmp_path):
    ended = run(tmp_path, event("step", 4, "fill_disk"), event("step", 7, "empty_disk"), out=disk / "run")
    assert_completed(ended, whole)
    assert "disk full, it needs" in ended.output or "No space left on device" in ended.output


@needs_mounts
@pytest.mark.fault("B7", "the disk full to the end", "one line, exit 2; the last whole checkpoint stays, resumable")
def test_a_disk_that_stays_full_ends_the_run_with_what_was_saved(disk, tmp_path):
    ended = run(tmp_path, event("step", 5, "fill_disk"), out=disk / "run")
    assert ended.code != 0 and "Traceback" not in ended.output
    assert 1 <= last_step(ended.out) < LAST_STEP
    (ended.out / "filler").unlink()
    again = run(tmp_path, out=disk / "run")
    assert again.code == 0, again.output


def hidden(out):
    return [path.name for path in out.iterdir() if path.name.startswith(".")]


@pytest.mark.fault("B17", "metrics.jsonl a folder from step 5 on", "one warning; report and bundle are there")
def test_a_log_that_cannot_be_written_costs_nothing_else(tmp_path):
    ended = run(tmp_path, event("step", 5, "block", names=["metrics.jsonl"]))
    assert ended.code == 0 and ended.output.count("metrics.jsonl cannot be written") == 1, ended.output
    assert (ended.out / "bundle/model.safetensors").exists() and (ended.out / "report.json").exists()
    assert hidden(ended.out) == []


@pytest.mark.fault(
    "B17", "{blocked} a folder at the end", "one line, exit 2, the bundle whole; then the same command completes"
)
@pytest.mark.parametrize("blocked", ["report.md", "report.json", "calibration.png"])
def test_a_report_that_cannot_be_written_does_not_cost_the_bundle(tmp_path, blocked):
    ended = run(tmp_path, event("step", 9, "block", names=[blocked]))
    assert ended.code == 2 and "the same command writes the report" in ended.output, ended.output
    assert "Traceback" not in ended.output and load(ended.out).classes and hidden(ended.out) == []
    (ended.out / blocked).rmdir()
    again = run(tmp_path)
    assert again.code == 0 and (ended.out / "report.json").is_file() and (ended.out / blocked).is_file(), again.output


@pytest.mark.fault("B17", "files limited to 100 kB from step 9 to the end (EFBIG)", "one line; resumes and completes")
def test_a_limit_on_file_sizes_at_the_end_leaves_what_the_same_command_completes(tmp_path):
    ended = run(tmp_path, event("step", 9, "limit_files", num_bytes=100_000))
    assert ended.code == 2 and "Traceback" not in ended.output, ended.output
    assert hidden(ended.out) == [] and leftovers(ended.out) == []
    again = run(tmp_path)
    assert again.code == 0 and (ended.out / "report.json").is_file(), again.output


@pytest.mark.fault(
    "B7", "files limited to 300 kB from step 4 to 7 (EFBIG)", "a warning; training goes on, nothing is left over"
)
def test_a_limit_on_file_sizes_is_reported_and_the_run_completes(whole, tmp_path):
    limited = event("step", 4, "limit_files", num_bytes=300_000)
    ended = run(tmp_path, limited, event("step", 7, "free_files"))
    assert_completed(ended, whole)


@pytest.mark.fault(
    "B7", "fsync fails from step 4 to 7 (EIO)", "a warning; training goes on, nothing half-written gets a name"
)
def test_a_disk_with_errors_is_reported_and_the_run_completes(whole, tmp_path):
    ended = run(tmp_path, event("step", 4, "break_fsync"), event("step", 7, "mend_fsync"))
    assert_completed(ended, whole)
    assert "Input/output error" in ended.output


@needs_mounts
@pytest.mark.fault("B7", "the disk read-only from step 4 to 7", "a warning; training goes on")
def test_a_disk_that_becomes_read_only_is_reported_and_the_run_completes(disk, tmp_path):
    ended = run(
        tmp_path,
        event("step", 4, "remount", how="ro"),
        event("step", 7, "remount", how="rw"),
        out=disk / "run",
    )
    assert ended.code == 0, ended.output
    assert "Read-only file system" in ended.output and "training goes on" in ended.output
    assert last_step(ended.out) == LAST_STEP


@needs_mounts
@pytest.mark.fault("B7", "a read-only folder from the start", "one line, exit 2, before any training")
def test_a_read_only_folder_is_reported_before_the_training(disk, tmp_path):
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    ended = run(tmp_path, out=disk / "run")
    assert ended.code == 2 and "cannot be written (Read-only file system)" in ended.output
    assert "Traceback" not in ended.output


@needs_mounts
@pytest.mark.fault("B7", "two processes, the disk full from step 4 to 7", "one warning; both go on and complete")
@pytest.mark.timeout(150)
def test_a_full_disk_does_not_stop_two_processes(disk, tmp_path):
    recipe = replace(RECIPE, parallelism="fsdp")
    events = (event("step", 4, "fill_disk"), event("step", 7, "empty_disk"))
    ended = run(tmp_path, *events, recipe=recipe, out=disk / "run", processes=2)
    assert ended.code == 0, ended.output
    assert "training goes on" in ended.output
    assert last_step(ended.out) == LAST_STEP and leftovers(ended.out) == []
