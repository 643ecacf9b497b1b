"""A checkpoint is whole or absent, whatever happens while it is written; a damaged one is never loaded."""

import errno
import json
import os
from types import SimpleNamespace

import pytest
import torch
from tests.training import checkpoints

from coatnet.errors import UserError
from coatnet.training import checkpoint as module
from coatnet.training.checkpoint import (
    CorruptCheckpoint,
    latest_checkpoint,
    load_checkpoint,
    published,
    remove_old_checkpoints,
)


def tensors_at(step):
    return {"weight": torch.arange(12.0).reshape(3, 4) + step, "count": torch.tensor(step)}


def save(folder, step):
    return checkpoints.save(folder, f"step-{step:09d}", tensors_at(step), {"step": step})


def test_a_checkpoint_equals_itself_after_a_round_trip(tmp_path):
    loaded = load_checkpoint(save(tmp_path, 7))
    assert loaded.state == {"step": 7}
    torch.testing.assert_close(dict(loaded.tensors), tensors_at(7), rtol=0, atol=0)


def test_channels_last_tensors_keep_their_values(tmp_path):
    weight = torch.randn(4, 3, 2, 2).to(memory_format=torch.channels_last)
    path = checkpoints.save(tmp_path, "step-000000001", {"weight": weight}, {})
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
def test_a_damaged_checkpoint_is_skipped_with_a_warning(damage, tmp_path):
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


def test_retention_keeps_the_last_two_and_the_best_and_removes_leftovers(tmp_path):
    for step in (1, 2, 10):
        save(tmp_path, step)
    checkpoints.save(tmp_path, "best", tensors_at(1), {"step": 1})
    (tmp_path / "step-000000003.tmp-0a1b2c3d").mkdir()
    (tmp_path / ".tmp-0a1b2c3d-step-000000003").mkdir()
    (tmp_path / ".trash-0a1b2c3d").mkdir()
    remove_old_checkpoints(tmp_path, keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["best", "step-000000002", "step-000000010"]


def test_a_run_that_began_again_before_damaged_checkpoints_keeps_its_own(tmp_path):
    for step in (200, 300):
        (save(tmp_path, step) / "state.json").write_text("damaged")
    for step in (50, 100, 150):
        save(tmp_path, step)
        remove_old_checkpoints(tmp_path, keep=2, step=step)
    kept = ["step-000000100", "step-000000150", "step-000000200", "step-000000300"]
    assert sorted(path.name for path in tmp_path.iterdir()) == kept
    save(tmp_path, 350)
    remove_old_checkpoints(tmp_path, keep=2, step=350)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-000000300", "step-000000350"]


@pytest.mark.parametrize("call", ["save_file", "_fingerprint", "fsync_path", "os.rename"])
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


def test_a_full_disk_is_reported_with_needed_and_free_space(tmp_path, monkeypatch):
    monkeypatch.setattr(module.shutil, "disk_usage", lambda _: SimpleNamespace(free=10))
    with pytest.raises(UserError, match=r"disk full, it needs 0\.1 MB and has 0\.0 MB"):
        save(tmp_path, 1)
    assert published(tmp_path) == []


DAMAGED_JSON = {
    "deep": "[" * 100_000,
    "deep objects": '{"a":' * 50_000 + "1" + "}" * 50_000,
    "list": "[]",
    "object": "{}",
    "number": "1" * 5_000,
    "text": '"state"',
    "cut": '{"format": 1, "files": {"state.json": [12',
    "empty": "",
    "zeros": "\0" * 4096,
    "no files": '{"format": 1, "files": []}',
    "other types": '{"format": 1, "files": {"state.json": "x", "tensors.safetensors": [1]}}',
    "other format": '{"format": [1], "files": {}}',
    "many files": '{"format": 1, "files": {' + ", ".join(f'"{n}": [1, 1]' for n in range(30_000)) + "}}",
    "not finite": '{"position": {"step": 3, "seconds": NaN}, "bad_images": {}}',
    "wrong counter": '{"position": {"step": "3", "seconds": 1.0}, "bad_images": {}}',
    "wrong images": '{"position": {"step": 3, "seconds": 1.0}, "bad_images": [1]}',
    "no position": '{"bad_images": {}}',
}


@pytest.mark.parametrize("name", ["manifest.json", "state.json"])
@pytest.mark.parametrize("damage", DAMAGED_JSON)
def test_a_checkpoint_with_damaged_json_is_skipped_for_the_one_before(damage, name, tmp_path):
    state = {"position": {"step": 1, "seconds": 2.5, "best": -1.0}, "bad_images": {"a": "cut"}}
    for step in (1, 2):
        checkpoints.save(tmp_path, f"step-{step:09d}", tensors_at(step), state)
    last = tmp_path / "step-000000002"
    (last / name).write_text(DAMAGED_JSON[damage])
    if name == "state.json":  # as if it had been written so
        manifest = json.loads((last / "manifest.json").read_text())
        manifest["files"]["state.json"] = module._fingerprint(last / "state.json")
        (last / "manifest.json").write_text(json.dumps(manifest))
    warnings = []
    found = latest_checkpoint(tmp_path, warnings.append, state_has=("position", "bad_images"))
    assert found is not None and found.path.name == "step-000000001" and found.state == state
    assert len(warnings) == 1 and "is damaged and is skipped" in warnings[0] and len(warnings[0]) < 600
    module.milestones(published(tmp_path), hours=1e-9)


def test_advice_about_space_is_for_full_disks_alone(tmp_path):
    assert "free some space" in str(module.checkpoint_error(tmp_path, OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))))
    assert "free some space" not in str(module.checkpoint_error(tmp_path, OSError(errno.EIO, os.strerror(errno.EIO))))


def test_the_reason_is_a_line_of_bounded_length() -> None:
    reason = str(CorruptCheckpoint("the manifest names " + "x" * 100_000 + "\nforged\x1b[1m"))
    assert len(reason) < 2_000 and not {"\n", "\x1b"} & set(reason)
