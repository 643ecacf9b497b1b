"""Uploads, with the real huggingface_hub and a server on loopback; every call is a new process."""

from pathlib import Path

import pytest

ANA, BEN = {"HF_TOKEN": "hf_ana"}, {"HF_TOKEN": "hf_ben"}


def test_an_upload_downloads_with_the_same_bytes(hub, client, model):
    (model / "notes.txt").write_text("stays here")
    assert client("upload", str(model), "ana/cats", environment=ANA) == f"{hub.endpoint}/ana/cats"
    repository = hub.repositories["ana/cats"]
    held = repository.files(repository.branches["main"])
    assert {name: path.read_bytes() for name, path in held.items()} == {
        name: (model / name).read_bytes() for name in ("README.md", "config.json", "model.safetensors")
    }
    assert len(list(repository.folder.iterdir())) == 1, "one commit"
    folder = Path(client("download", "ana/cats"))
    for name in ("config.json", "model.safetensors"):
        assert (folder / name).read_bytes() == (model / name).read_bytes()


def test_a_second_upload_sends_only_changed_files(hub, client, model):
    client("upload", str(model), "ana/cats", environment=ANA)
    hub.log.clear()
    (model / "README.md").write_text("---\nlibrary_name: coatnet\n---\n\nbetter\n")
    client("upload", str(model), "ana/cats", environment=ANA, message="A better card")
    assert not [line for line in hub.log if line.startswith("PUT")]
    repository = hub.repositories["ana/cats"]
    assert repository.files(repository.branches["main"])["README.md"].read_text().endswith("better\n")
    assert len(list(repository.folder.iterdir())) == 2


def test_a_model_without_a_calibration_removes_that_of_the_one_before(hub, client, model):
    (model / "calibration.safetensors").write_bytes(b"of the first")
    client("upload", str(model), "ana/cats", environment=ANA)
    repository = hub.repositories["ana/cats"]
    assert "calibration.safetensors" in repository.files(repository.branches["main"])
    (model / "calibration.safetensors").unlink()
    client("upload", str(model), "ana/cats", environment=ANA)
    assert sorted(repository.files(repository.branches["main"])) == ["README.md", "config.json", "model.safetensors"]


def test_a_new_branch_leaves_the_others_unchanged(hub, client, model):
    main = hub.add("ana/cats", model)
    (model / "config.json").write_text("{}")
    page = client("upload", str(model), "ana/cats", branch="bigger", environment=ANA)
    assert page == f"{hub.endpoint}/ana/cats/tree/bigger"
    assert hub.repositories["ana/cats"].branches["main"] == main
    assert (Path(client("download", "ana/cats", revision="bigger")) / "config.json").read_text() == "{}"


def test_private_means_private(hub, client, refused, model):
    client("upload", str(model), "ana/secret", private=True, environment=ANA)
    assert hub.repositories["ana/secret"].private
    client("upload", str(model), "ana/secret", private=True, environment=ANA)
    commit = hub.add("ana/open", model)
    (model / "config.json").write_text("{}")
    line = refused("upload", str(model), "ana/open", private=True, environment=ANA)
    assert "ana/open exists and is public; make it private at" in line
    assert hub.repositories["ana/open"].branches == {"main": commit}


def test_a_missing_write_permission_is_reported(hub, refused, model):
    line = refused("upload", str(model), "ana/cats")
    assert "pushing to ana/cats needs a token that may write; log in with `hf auth login` or set HF_TOKEN" in line
    line = refused("upload", str(model), "ana/cats", environment=BEN)
    assert "the token may not write to ana/cats: You don't have the rights" in line
    hub.add("ana/cats", model)
    assert "the token may not write to ana/cats" in refused("upload", str(model), "ana/cats", environment=BEN)
    line = refused("upload", str(model), "ana/cats", environment={"HF_TOKEN": "hf_wrong"})
    assert "the token may not write to ana/cats: Invalid credentials" in line


@pytest.mark.parametrize("missing", ["config.json", "README.md", "model.safetensors"])
def test_a_folder_that_is_no_bundle_makes_no_repository(missing, hub, refused, model):
    (model / missing).unlink()
    line = refused("upload", str(model), "ana/cats", environment=ANA)
    assert f"is not a bundle: it has no {missing}" in line
    assert not hub.log and not hub.repositories


def test_a_hub_out_of_reach_is_one_line(hub, refused, model):
    line = refused("upload", str(model), "ana/cats", environment={**ANA, "HF_HUB_OFFLINE": "1"})
    assert "HF_HUB_OFFLINE" in line
    hub.stop()
    line = refused("upload", str(model), "ana/cats", environment=ANA)
    assert f"the exchange with {hub.endpoint} failed" in line
