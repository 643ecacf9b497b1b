"""Weights for other programs are the network's own, with all that is needed to use them."""

import json
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from safetensors import safe_open

import coatnet
from coatnet.bundle import Bundle, load
from coatnet.cli.main import main
from coatnet.data.transforms import Preprocessing

FORMATS = ("timm", "safetensors")


@pytest.fixture(scope="module")
def timm_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    model = coatnet.create_model("test_coatnet", num_classes=3, resolution=64)
    model.train()(torch.randn(4, 3, 64, 64))
    folder = tmp_path_factory.mktemp("timm") / "bundle"
    return Bundle(model.eval(), ("a", "b", "c"), Preprocessing(resolution=64)).save(folder)


def test_safetensors_hold_the_network_and_say_which(clothes_bundle: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert main(["export", str(clothes_bundle), "--format", "safetensors", "--out", str(out)]) == 0
    bundle = load(clothes_bundle)
    with safe_open(out / "model.safetensors", "pt") as file:
        told = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    assert tensors.keys() == bundle.model.state_dict().keys()
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in bundle.model.state_dict().items())
    again = coatnet.create_model(**json.loads(told["model_args"])).eval()
    again.load_state_dict(tensors)
    images = torch.randn(3, bundle.preprocessing.channels, 16, 16)
    with torch.no_grad():
        torch.testing.assert_close(again(images), bundle.model(images))
    assert told["format"] == "pt"  # or libraries of others refuse it
    assert json.loads(told["classes"]) == list(bundle.classes)
    assert json.loads(told["input"])["name"] == "images" and json.loads(told["output"])["name"] == "logits"


@pytest.mark.filterwarnings("default")  # timm's
def test_timm_opens_what_is_written_for_it(timm_folder: Path, tmp_path: Path, capsys) -> None:
    out = tmp_path / "out"
    assert main(["export", str(timm_folder), "--format", "timm", "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert f"folder = Path({str(out)!r})" in printed
    assert 'timm.create_model(f"local-dir:{folder}", pretrained=True)' in printed
    theirs, images = timm.create_model(f"local-dir:{out}", pretrained=True).eval(), torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        np.testing.assert_allclose(theirs(images), load(timm_folder).model(images), rtol=1e-4, atol=1e-5)
    assert json.loads((out / "parity.json").read_text())["agreement"] == 1.0
    assert load(out).classes == ("a", "b", "c")
