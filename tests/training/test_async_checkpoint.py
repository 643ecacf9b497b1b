"""Asynchronous checkpoints: a copy of the step at which they start, one at a time, whole or absent."""

import json
import threading

import pytest
import torch
from rich.console import Console
from tests.training import checkpoints
from tests.training.trainers import trainer_for

import coatnet
from coatnet.errors import UserError
from coatnet.training import async_checkpoint as module
from coatnet.training.async_checkpoint import CheckpointWriter
from coatnet.training.checkpoint import load_checkpoint, published, remove_old_checkpoints
from coatnet.training.distributed.processes import SINGLE_PROCESS


@pytest.fixture
def gate(monkeypatch):
    """Writing waits for this to be set."""
    event, write_part = threading.Event(), module.write_part

    def wait_and_write(path, tensors):
        event.wait(10)
        return write_part(path, tensors)

    monkeypatch.setattr(module, "write_part", wait_and_write)
    yield event
    event.set()


def writer_to(folder):
    return CheckpointWriter(folder, SINGLE_PROCESS, keep=2)


def test_a_checkpoint_holds_the_tensors_of_the_step_at_which_it_was_started(gate, tmp_path):
    writer, weight = writer_to(tmp_path), torch.arange(6.0)
    writer.start("step-000000001", {"weight": weight}, {"step": 1})
    weight += 100  # training goes on
    assert writer.busy and not writer.written and published(tmp_path) == []
    gate.set()
    writer.finish()
    assert not writer.busy and writer.last == ("step-000000001", {"step": 1})
    found = load_checkpoint(tmp_path / "step-000000001")
    assert torch.equal(found.tensors["weight"], torch.arange(6.0)) and found.state == {"step": 1}


def test_a_written_part_is_not_published_before_finish(tmp_path):
    writer = writer_to(tmp_path)
    writer.start("step-000000001", {"weight": torch.zeros(3)}, {})
    while not writer.written:
        pass
    assert published(tmp_path) == [] and len(list(tmp_path.glob("*.tmp-*"))) == 1
    writer.finish()
    assert [path.name for path in tmp_path.iterdir()] == ["step-000000001"]


def test_a_part_that_cannot_be_written_keeps_the_checkpoint_before_and_is_reported(monkeypatch, tmp_path):
    writer, warnings = writer_to(tmp_path), []
    writer.start("step-000000001", {"weight": torch.zeros(3)}, {})
    writer.finish()

    def fail(path, tensors):
        path.write_bytes(b"half of it")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "write_part", fail)
    writer.start("step-000000002", {"weight": torch.zeros(3)}, {})
    writer.finish_or_warn(warnings.append)
    assert "step-000000002 was not written" in warnings[0] and "No space left on device" in warnings[0]
    assert [path.name for path in tmp_path.iterdir()] == ["step-000000001"]
    writer.start("step-000000003", {"weight": torch.zeros(3)}, {})
    with pytest.raises(UserError, match="No space left"):
        writer.finish()


def test_a_folder_that_cannot_be_made_is_reported_at_once(tmp_path):
    (tmp_path / "checkpoints").write_text("a file is in the way")
    with pytest.raises(UserError, match="was not written"):
        writer_to(tmp_path / "checkpoints").start("step-000000001", {"weight": torch.zeros(3)}, {})


def test_a_checkpoint_in_parts_is_read_as_one(tmp_path):
    """As processes write it: rows one after the other, the last ones shorter; what all have is in the first part."""
    whole = {"weight": torch.arange(20.0).reshape(5, 4), "count": torch.tensor(7)}
    path = checkpoints.save(tmp_path, "step-000000001", whole, {})
    (path / "tensors.safetensors").unlink()
    files = {}
    for part, (rows, rest) in enumerate(
        zip(whole["weight"].split(2), ({"count": whole["count"]}, {}, {}), strict=True)
    ):
        name = module.part_name(part, 3)
        files[name] = module.write_part(path / name, {"weight": rows, **rest})
    manifest = json.loads((path / "manifest.json").read_text())
    files["state.json"] = manifest["files"]["state.json"]
    (path / "manifest.json").write_text(json.dumps({**manifest, "files": files}))
    found = load_checkpoint(path).tensors
    torch.testing.assert_close(dict(found), whole, rtol=0, atol=0)
    for first in range(5):
        for count in range(6 - first):
            assert torch.equal(found.read("weight", (first, count)), whole["weight"][first : first + count])


def test_retention_keeps_the_first_of_every_so_many_hours(tmp_path):
    hours = [0.1, 0.9, 2.1, 2.5, 3.9, 4.2, 6.5, 6.6, 6.7]
    for step, hour in enumerate(hours):
        checkpoints.save(tmp_path, f"step-{step:09d}", {}, {"position": {"seconds": 3600 * hour}})
        remove_old_checkpoints(tmp_path, keep=2, keep_every_hours=2)
    kept = [hours[int(path.name.removeprefix("step-"))] for path in published(tmp_path)]
    assert kept == [2.1, 4.2, 6.5, 6.6, 6.7]


@pytest.mark.parametrize(("values", "kept"), [({"keep_checkpoints": 3}, 3), ({"keep_checkpoints": 1}, 1)])
def test_a_run_keeps_as_many_checkpoints_as_its_recipe_says(tmp_path, values, kept):
    recipe = coatnet.Recipe(
        data="digits", model="coatnet-femto-16", epochs=0.2, checkpoint_every_minutes=1e-4, num_workers=0, **values
    )
    coatnet.train(recipe, tmp_path / "run", console=Console(quiet=True))
    assert len(published(tmp_path / "run" / "checkpoints")) == kept


def test_a_trainer_keeps_checkpoints_for_the_hours_of_its_recipe():
    recipe = coatnet.Recipe(data="digits", model="coatnet-femto-16", keep_every_hours=2.0)
    assert trainer_for(recipe).writer.keep_every_hours == 2
