"""timm's folders and files of weights: read exactly, written for timm, damaged and hostile ones refused."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
from PIL import Image
from timm.data import ImageNetInfo, create_transform, resolve_model_data_config
from timm.models import save_for_hf

import coatnet
from coatnet.bundle import Bundle
from coatnet.bundle.timm.folders import write_timm_folder
from coatnet.cli.main import main
from coatnet.data.transforms import EvaluationTransform, Preprocessing
from coatnet.errors import UserError

NAMES = ["ant", "bee", "cat", "dog", "eel"]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What timm itself writes for the hub."""
    torch.manual_seed(0)
    model = timm.create_model("test_coatnet", num_classes=5, img_size=96).eval()
    folder = tmp_path_factory.mktemp("timm") / "test_coatnet"
    save_for_hf(model, str(folder), model_config={"label_names": NAMES}, safe_serialization=True)
    return folder


@pytest.fixture
def copied(written: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(written, tmp_path / "copied"))


def change(folder: Path, **changes: object) -> Path:
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_a_folder_of_timm_gives_the_logits_classes_and_preprocessing_of_timm(written: Path) -> None:
    theirs = timm.create_model(f"local-dir:{written}", pretrained=True).eval()
    bundle = coatnet.load(written)
    images = torch.randn(4, 3, 96, 96)
    with torch.no_grad():
        torch.testing.assert_close(bundle.model(images), theirs(images), rtol=1e-4, atol=1e-5)
    assert bundle.classes == tuple(NAMES) and not bundle.model.training
    seen = resolve_model_data_config(theirs)
    assert (bundle.preprocessing.resolution, bundle.preprocessing.crop_fraction) == (96, seen["crop_pct"])
    assert (bundle.preprocessing.mean, bundle.preprocessing.std) == (tuple(seen["mean"]), tuple(seen["std"]))


def test_a_model_of_images_that_are_not_square_is_refused(written: Path, tmp_path: Path) -> None:
    bundle = coatnet.load(written)
    seen = replace(bundle.preprocessing, resolution=(64, 96))
    with pytest.raises(UserError, match="timm's CoAtNets see square images, and this model sees 64 x 96"):
        write_timm_folder(bundle.model, bundle.classes, seen, tmp_path)
    assert not list(tmp_path.glob("config.json"))


@pytest.mark.parametrize(("mode", "fraction"), [("center", 0.95), ("center", 0.9), ("squash", 1.0)])
def test_preprocessing_equals_that_of_timm(mode: str, fraction: float) -> None:
    noise = torch.randint(0, 256, (12, 16, 3), dtype=torch.uint8).numpy()
    image = Image.fromarray(noise).resize((400, 300), Image.Resampling.BICUBIC)
    seen = Preprocessing(resolution=96, crop=mode, crop_fraction=fraction)
    transform = create_transform(
        (3, 96, 96), interpolation="bicubic", mean=(0.5,) * 3, std=(0.5,) * 3, crop_pct=fraction, crop_mode=mode
    )
    ours, theirs = EvaluationTransform(seen)(np.asarray(image)), transform(image)
    assert (ours - theirs).abs().mean() < 0.01


def test_a_folder_written_for_timm_gives_the_same_logits_in_timm(written: Path, tmp_path: Path, capsys) -> None:
    bundle = coatnet.load(written)
    bundle.save(tmp_path / "bundle")
    assert main(["export", str(tmp_path / "bundle"), "--format", "timm", "--out", str(tmp_path / "out")]) == 0
    assert "local-dir:" in capsys.readouterr().out
    theirs = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval()
    images = torch.randn(4, 3, 96, 96)
    with torch.no_grad():
        torch.testing.assert_close(theirs(images), bundle.model(images), rtol=1e-4, atol=1e-5)
    again = coatnet.load(tmp_path / "out")
    state = again.model.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in bundle.model.state_dict().items())
    assert (again.classes, again.preprocessing) == (bundle.classes, bundle.preprocessing)


def test_a_bundle_stores_a_network_of_timm(written: Path, tmp_path: Path) -> None:
    bundle = coatnet.load(written)
    bundle.save(tmp_path / "bundle")
    again, images = coatnet.load(tmp_path / "bundle"), torch.randn(2, 3, 96, 96)
    with torch.no_grad():
        assert torch.equal(again.model(images), bundle.model(images))


def test_a_file_of_weights_needs_its_architecture(copied: Path) -> None:
    with pytest.raises(UserError, match="does not say what network"):
        coatnet.load(copied / "model.safetensors")
    with pytest.raises(UserError, match="did you mean 'test_coatnet'"):
        coatnet.load(copied / "model.safetensors", architecture="tests_coatnet")


def test_a_file_of_weights_gets_its_preprocessing_from_the_tag(tmp_path: Path) -> None:
    model = timm.create_model("coatnet_bn_0_rw_224", num_classes=3).eval()
    safetensors.torch.save_file(model.state_dict(), tmp_path / "weights.safetensors")
    bundle = coatnet.load(tmp_path / "weights.safetensors", architecture="coatnet_bn_0_rw_224.sw_in1k")
    assert bundle.preprocessing.mean == (0.485, 0.456, 0.406)
    assert bundle.classes == ("class 0", "class 1", "class 2")
    images = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        torch.testing.assert_close(bundle.model(images), model(images), rtol=1e-4, atol=1e-5)


def test_imagenet_classes_are_words(tmp_path: Path) -> None:
    model = timm.create_model("test_coatnet")
    save_for_hf(model, str(tmp_path / "1k"), safe_serialization=True)
    classes = coatnet.load(tmp_path / "1k").classes
    assert classes[0] == "tench" and classes[985] == "daisy" and len(set(classes)) == 1000
    for name, description in zip(classes, ImageNetInfo("imagenet-1k").label_descriptions(), strict=True):
        assert description.startswith(name.partition(" (")[0])  # "crane (bird)" is one of two cranes
    safetensors.torch.save_file(
        timm.create_model("test_coatnet", num_classes=11821).state_dict(), tmp_path / "12k.safetensors"
    )
    assert coatnet.load(tmp_path / "12k.safetensors", architecture="test_coatnet").classes[0] == "n00005787"


def test_a_pickle_is_refused_unless_asked_for(written: Path, tmp_path: Path) -> None:
    folder = tmp_path / "pickled"
    shutil.copytree(written, folder)
    torch.save(safetensors.torch.load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match="allow_pickle=True"):
        coatnet.load(folder)
    pickled, safe = (
        load.model.state_dict() for load in (coatnet.load(folder, allow_pickle=True), coatnet.load(written))
    )
    assert pickled.keys() == safe.keys() and all(torch.equal(pickled[name], value) for name, value in safe.items())


def test_a_pickle_that_runs_code_does_not_run(copied: Path, tmp_path: Path) -> None:
    class Hostile:
        def __reduce__(self):
            return Path.touch, (tmp_path / "executed",)

    (copied / "model.safetensors").unlink()
    torch.save({"stem.conv1.weight": Hostile()}, copied / "pytorch_model.bin")
    with pytest.raises(UserError, match="not a file of tensors"):
        coatnet.load(copied, allow_pickle=True)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architecture": "coatnet_9_rw_224"}, "architecture 'coatnet_9_rw_224' is not a CoAtNet of timm"),
        ({"architecture": "resnet50"}, "not a CoAtNet of timm"),
        ({"architecture": 7}, "architecture is 7"),
        ({"num_classes": 6}, "head.fc.weight is F32"),
        ({"num_classes": 10**12}, "num_classes is 10"),
        ({"label_names": ["ant"] * 5}, "names a class twice"),
        ({"label_names": ["ant"]}, "label_names is not a list of 5 names"),
        ({"model_args": {"img_size": 10**9}}, "img_size is 10"),
        ({"model_args": {"img_size": 128}}, "relative_position_bias_table is F32"),
        ({"model_args": {"transformer_cfg": {}}}, "model_args has 'transformer_cfg'"),
        ({"pretrained_cfg": {"input_size": [3, 96, 96]}}, "crop_pct is missing"),
    ],
)
def test_a_wrong_config_is_refused(copied: Path, changes: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message) as refused:
        coatnet.load(change(copied, **changes))
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda state: state.pop("norm.weight"), "norm.weight is missing"),
        (lambda state: state.update(extra=torch.zeros(2)), "extra is not part of"),
        (lambda state: state.update({"norm.bias": torch.zeros(7)}), "norm.bias is F32 \\[7\\]"),
        (lambda state: state["norm.bias"].fill_(float("nan")), "norm.bias holds NaN"),
    ],
)
def test_weights_that_do_not_fit_are_refused(copied: Path, damage, message: str) -> None:
    state = safetensors.torch.load_file(copied / "model.safetensors")
    damage(state)
    safetensors.torch.save_file(state, copied / "model.safetensors")
    with pytest.raises(UserError, match=message):
        coatnet.load(copied)


def test_a_file_cut_short_is_refused(copied: Path) -> None:
    path = copied / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UserError, match="cut short"):
        coatnet.load(copied)


def test_half_precision_is_read_as_single(copied: Path) -> None:
    state = safetensors.torch.load_file(copied / "model.safetensors")
    halves = {name: each.half() if each.is_floating_point() else each for name, each in state.items()}
    safetensors.torch.save_file(halves, copied / "model.safetensors")
    bundle = coatnet.load(copied)
    assert torch.equal(bundle.model.head.norm.weight, halves["norm.weight"].float())


def test_a_variant_of_the_paper_is_not_written_for_timm(tmp_path: Path, capsys) -> None:
    model = coatnet.create_model("coatnet-femto-64", num_classes=2, resolution=28).eval()
    Bundle(model, ("ant", "bee"), Preprocessing(resolution=28)).save(tmp_path / "bundle")
    code = main(["export", str(tmp_path / "bundle"), "--format", "timm", "--out", str(tmp_path / "out")])
    assert code == 2 and "timm has no such network" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
