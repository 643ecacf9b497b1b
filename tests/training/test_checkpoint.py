"""A checkpoint is whole or absent, whatever happens while it is written; a damaged one is never loaded."""

import json
import os
from types import SimpleNamespace

import pytest
import torch

from coatnet.errors import UserError
from coatnet.training import checkpoint as module
from coatnet.training.checkpoint import (
    Checkpoint,
    CorruptCheckpoint,
    latest_checkpoint,
    load_checkpoint,
    published,
    retain,
    save_checkpoint,
)


def sample(step):
    return Checkpoint({"weight": torch.arange(12.0).reshape(3, 4) + step, "count": torch.tensor(step)}, {"step": step})


def save(folder, step):
    return save_checkpoint(folder, f"step-{step:09d}", sample(step))


def test_a_checkpoint_equals_itself_after_a_round_trip(tmp_path):
    loaded = load_checkpoint(save(tmp_path, 7))
    assert loaded.state == {"step": 7}
    torch.testing.assert_close(loaded.tensors, sample(7).tensors, rtol=0, atol=0)


def test_channels_last_tensors_keep_their_values(tmp_path):
    weight = torch.randn(4, 3, 2, 2).to(memory_format=torch.channels_last)
    path = save_checkpoint(tmp_path, "step-000000001", Checkpoint({"weight": weight}, {}))
    assert torch.equal(load_checkpoint(path).tensors["weight"], weight)


def damage_nothing_there(path):
    (path / "tensors.safetensors").unlink()


def damage_cut(path):
    file = path / "tensors.safetensors"
    file.write_bytes(file.read_bytes()[:-5])


def damage_flipped_byte(path):
    file = path / "tensors.safetensors"
    content = bytearray(file.read_bytes())
    content[-3] ^= 1
    file.write_bytes(content)


def damage_state(path):
    (path / "state.json").write_text('{"step": 8}')


def damage_manifest(path):
    (path / "manifest.json").unlink()


def damage_future_format(path):
    manifest = json.loads((path / "manifest.json").read_text())
    (path / "manifest.json").write_text(json.dumps({**manifest, "format": 99}))


def damage_unreadable_manifest(path):
    (path / "manifest.json").write_text("[1]")


@pytest.mark.parametrize("damage", [value for name, value in globals().items() if name.startswith("damage_")])
def test_a_damaged_checkpoint_is_skipped_loudly_for_the_one_before(damage, tmp_path):
    save(tmp_path, 1)
    damage(save(tmp_path, 2))
    with pytest.raises(CorruptCheckpoint):
        load_checkpoint(tmp_path / "step-000000002")
    lines = []
    found = latest_checkpoint(tmp_path, lines.append)
    assert found is not None and found.state == {"step": 1}
    assert len(lines) == 1 and "step-000000002 is damaged" in lines[0]


def test_no_checkpoint_is_none(tmp_path):
    assert latest_checkpoint(tmp_path / "nowhere", pytest.fail) is None


def test_retention_keeps_the_last_two_the_best_and_no_leftovers(tmp_path):
    for step in (1, 2, 10):
        save(tmp_path, step)
    save_checkpoint(tmp_path, "best", sample(1))
    (tmp_path / "step-000000003.tmp-0a1b2c3d").mkdir()
    (tmp_path / ".trash-0a1b2c3d").mkdir()
    retain(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["best", "step-000000002", "step-000000010"]


@pytest.mark.parametrize("call", ["save_file", "_fingerprint", "flush", "os.rename"])
def test_a_save_that_fails_leaves_the_earlier_checkpoint_and_nothing_else(call, tmp_path, monkeypatch):
    save(tmp_path, 1)

    def fail(*_, **__):
        raise OSError(28, "No space left on device")

    target, name = (os, "rename") if call == "os.rename" else (module, call)
    monkeypatch.setattr(target, name, fail)
    with pytest.raises(UserError, match="No space left on device"):
        save(tmp_path, 2)
    monkeypatch.undo()
    assert [path.name for path in tmp_path.iterdir()] == ["step-000000001"]
    load_checkpoint(tmp_path / "step-000000001")


def test_a_full_disk_is_told_with_what_is_needed_and_what_is_there(tmp_path, monkeypatch):
    monkeypatch.setattr(module.shutil, "disk_usage", lambda _: SimpleNamespace(free=10))
    with pytest.raises(UserError, match=r"disk full, it needs 0\.1 MB and has 0\.0 MB"):
        save(tmp_path, 1)
    assert published(tmp_path) == []
