"""Downloads, with the real huggingface_hub and a server on loopback; every call is a new process."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from tests.bundle.hub_repository import sha256

ANA, BEN = {"HF_TOKEN": "hf_ana"}, {"HF_TOKEN": "hf_ben"}
OFFLINE = {"HF_HUB_OFFLINE": "1"}
WEIGHTS, CALIBRATION = "model.safetensors", "calibration.safetensors"


def contents(folder: Path | str) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


@pytest.fixture
def large(model: Path) -> Path:
    """A model of 24 MiB: huggingface_hub writes a download in pieces of 10 MiB, and resumes between them."""
    (model / WEIGHTS).write_bytes(os.urandom(1 << 20) * 24)
    return model


def test_a_download_is_the_two_files_and_the_second_needs_no_network(hub, client, model):
    hub.add("timm/tiny.in1k", model)
    folder = client("download", "timm/tiny.in1k")
    assert contents(folder) == {name: (model / name).read_bytes() for name in ("config.json", WEIGHTS)}
    hub.log.clear()
    assert client("download", "timm/tiny.in1k") == folder
    assert not [line for line in hub.log if "GET /timm" in line]
    hub.stop()
    assert client("download", "timm/tiny.in1k") == folder
    assert client("download", "timm/tiny.in1k", environment=OFFLINE) == folder


def test_a_revision_pins_what_is_downloaded(hub, client, refused, model):
    first = hub.add("ana/cats", model)
    old = contents(model)
    (model / WEIGHTS).write_bytes(b"new")
    second = hub.add("ana/cats", model)
    branch = hub.add("ana/cats", model, "other")
    assert contents(client("download", "ana/cats"))[WEIGHTS] == b"new"
    folders = {revision: Path(client("download", "ana/cats", revision=revision)) for revision in (first, "other")}
    assert contents(folders[first])[WEIGHTS] == old[WEIGHTS]
    assert (folders[first].name, folders["other"].name) == (first, branch) != (second, second)
    assert client("download", "ana/cats", revision=first, environment=OFFLINE) == str(folders[first])
    line = refused("download", "ana/cats", revision="nowhere")
    assert line == "UserError: ana/cats has no revision 'nowhere'; give a branch, a tag or a full commit hash"
    line = refused("download", "ana/cats", revision="nowhere", environment=OFFLINE)
    assert "ana/cats at revision nowhere is not in" in line and line.endswith(f"{CALIBRATION} --revision nowhere`")


def test_damage_in_the_cache_is_detected_and_the_advice_repairs_it(hub, client, refused, model):
    hub.add("ana/cats", model)
    folder = Path(client("download", "ana/cats"))
    blob = (folder / WEIGHTS).resolve()
    whole = blob.read_bytes()
    blob.write_bytes(whole[:-1] + b"?")
    for environment in ({}, OFFLINE):
        line = refused("download", "ana/cats", environment=environment)
        assert sha256(whole) in line and sha256(blob.read_bytes()) in line and WEIGHTS in line
        assert f"delete {blob} and try again" in line
    blob.unlink()
    assert contents(client("download", "ana/cats"))[WEIGHTS] == whole


def test_damage_of_a_calibration_in_the_cache_is_detected(hub, client, refused, model):
    (model / CALIBRATION).write_bytes((model / WEIGHTS).read_bytes()[::-1])
    hub.add("ana/cats", model)
    folder = Path(client("download", "ana/cats"))
    (folder / CALIBRATION).resolve().write_bytes(b"?")
    for environment in ({}, OFFLINE):
        assert f"ana/cats: {CALIBRATION} is damaged" in refused("download", "ana/cats", environment=environment)


def test_a_file_with_another_checksum_than_announced_is_refused(hub, refused, model):
    hub.add("ana/cats", model)
    hub.faults.wrong_sha256 = True
    assert f"the hub's is {'0' * 64}" in refused("download", "ana/cats")


def test_without_symbolic_links_the_checksum_comes_from_the_hub(hub, client, refused, model):
    hub.add("ana/cats", model)
    folder = Path(client("download", "ana/cats", environment={"HF_HUB_DISABLE_SYMLINKS": "1"}))
    assert not (folder / WEIGHTS).is_symlink()
    (folder / WEIGHTS).write_bytes(b"?")
    assert sha256((model / WEIGHTS).read_bytes()) in refused("download", "ana/cats")


def test_a_shared_blob_is_checked_against_its_sha256_not_its_name(hub, client, refused, model):
    hub.add("ana/cats", model)
    folder = Path(client("download", "ana/cats"))
    blob = (folder / WEIGHTS).resolve()
    stored = blob.parents[2] / "blobs" / "ab" / ("ab" * 32)
    stored.parent.mkdir(parents=True)
    blob.rename(stored)
    blob.symlink_to(os.path.relpath(stored, blob.parent))
    assert client("download", "ana/cats") == str(folder)
    stored.write_bytes(b"?")
    assert f"delete {stored} and" in refused("download", "ana/cats")


def test_a_broken_download_is_resumed(hub, client, large):
    hub.add("ana/cats", large)
    hub.faults.cut_after = 15 << 20
    assert contents(client("download", "ana/cats"))[WEIGHTS] == (large / WEIGHTS).read_bytes()
    assert [line for line in hub.log if line.endswith(f"{WEIGHTS} bytes={10 << 20}-")]


def test_an_incomplete_download_is_refused(hub, client, refused, model):
    hub.add("ana/cats", model)
    hub.faults.missing = 7
    assert "the exchange with" in (line := refused("download", "ana/cats")) and "try again" in line
    assert "not in the cache" in refused("download", "ana/cats", environment=OFFLINE)
    assert contents(client("download", "ana/cats"))[WEIGHTS] == (model / WEIGHTS).read_bytes()


def test_a_process_killed_during_a_download_leaves_no_valid_cache_entry(hub, start_client, client, refused, large):
    hub.add("ana/cats", large)
    hub.faults.hold_after = 15 << 20
    process = start_client("download", "ana/cats")
    assert hub.faults.held.wait(60)
    process.kill()
    process.communicate()
    hub.faults.release.set()
    assert "not in the cache" in refused("download", "ana/cats", environment=OFFLINE)
    assert contents(client("download", "ana/cats"))[WEIGHTS] == (large / WEIGHTS).read_bytes()


def test_a_pickle_is_downloaded_only_when_asked_for(hub, client, refused, model):
    (model / WEIGHTS).rename(model / "pytorch_model.bin")
    hub.add("ana/old", model)
    line = refused("download", "ana/old")
    assert "has no model.safetensors, only pytorch_model.bin: a pickle" in line and "allow_pickle=True" in line
    assert not [line for line in hub.log if "/resolve/" in line]
    folder = client("download", "ana/old", allow_pickle=True)
    assert contents(folder).keys() == {"config.json", "pytorch_model.bin"}
    assert client("download", "ana/old", allow_pickle=True, environment=OFFLINE) == folder
    for environment in ({}, OFFLINE):
        assert "a pickle" in refused("download", "ana/old", environment=environment)


def test_safetensors_are_preferred_if_a_pickle_is_allowed(hub, client, model):
    shutil.copy(model / WEIGHTS, model / "pytorch_model.bin")
    hub.add("ana/both", model)
    assert contents(client("download", "ana/both", allow_pickle=True)).keys() == {"config.json", WEIGHTS}


@pytest.mark.parametrize("missing", ["config.json", WEIGHTS])
def test_a_repository_without_one_of_the_files_is_refused(missing, hub, refused, model):
    (model / missing).unlink()
    hub.add("ana/half", model)
    assert f"ana/half has no {missing}" in refused("download", "ana/half")


def test_unknown_private_and_gated_models_have_different_messages(hub, client, refused, model):
    hub.add("ana/secret", model, private=True)
    hub.add("ana/gated", model, gated=True)
    line = refused("download", "timm/coatnet_o")
    assert line.startswith(f"UnknownRepository: {hub.endpoint} has no model 'timm/coatnet_o', or it is private (log in")
    assert "or it is private (your token does not open it)" in refused("download", "ana/secret", environment=BEN)
    assert Path(client("download", "ana/secret", environment=ANA)).is_dir()
    line = refused("download", "ana/gated", environment=BEN)
    assert line.startswith("UserError: ana/gated is gated (your") and f"ask for access at {hub.endpoint}/ana/g" in line
    hub.repositories["ana/gated"].granted.add("ben")
    assert Path(client("download", "ana/gated", environment=BEN)).is_dir()
    assert "the token is not accepted" in refused("download", "ana/gated", environment={"HF_TOKEN": "hf_wrong"})


@pytest.mark.parametrize("listing", [[], {"id": "ana/cats", "siblings": [5]}], ids=["list", "file that is none"])
def test_a_listing_of_other_types_is_one_line(hub, refused, listing):
    hub.faults.listing = listing
    assert f"ana/cats: the exchange with {hub.endpoint} failed: " in refused("download", "ana/cats")


def test_offline_the_message_says_where_the_cache_is_and_how_to_fill_it(hub, client, refused, model, tmp_path):
    hub.add("ana/cats", model)
    place = f"ana/cats is not in the cache at {tmp_path / 'home' / 'hub'}, and"
    line = refused("download", "ana/cats", environment=OFFLINE)
    advised = f"`hf download ana/cats config.json {WEIGHTS} {CALIBRATION}`"
    assert f"{place} HF_HUB_OFFLINE is set; once online, run {advised}" in line
    hub.faults.status = 503
    assert f"{place} {hub.endpoint} answers 503; once" in refused("download", "ana/cats")
    hub.faults.status = None
    hub.stop()
    assert f"{place} {hub.endpoint} cannot be reached (" in refused("download", "ana/cats")
    hub.start()
    advice = [str(Path(sys.executable).with_name("hf")), *line.partition("`hf ")[2].partition("`")[0].split()]
    environment = hub.environment(tmp_path / "home")
    subprocess.run(advice, env=environment, check=True, capture_output=True)
    assert contents(client("download", "ana/cats", environment=OFFLINE)).keys() == {"config.json", WEIGHTS}


@pytest.mark.parametrize("name", ["a/b/c", "ana/ cats", "../etc"])
def test_a_malformed_name_says_what_a_name_is(name, refused):
    assert f"{name!r} is not the name of a model on the hub; write owner/name" in refused("download", name)


def test_without_huggingface_hub_the_extra_is_named(hub, tmp_path):
    code = "import sys; sys.modules['huggingface_hub'] = None; from coatnet.bundle.hub import download; download('a/b')"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.stderr.strip().endswith(
        "UserError: the Hugging Face hub needs huggingface_hub: pip install 'coatnet[hub]'"
    )
