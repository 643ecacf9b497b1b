"""int8 keeps what the model has learned, says what it costs, and is refused where it costs too much."""

import json
from pathlib import Path

import numpy as np
import openvino
import pytest
import torch
from PIL import Image

from coatnet.bundle import Bundle, load
from coatnet.cli.main import main
from coatnet.data.builtin import open_fashion_mnist_small
from coatnet.evaluation.evaluate import evaluate

pytestmark = pytest.mark.nightly  # a minute: NNCF, and several conversions

INT8 = ["--format", "openvino", "--int8", "--calibration", "fashion-mnist-small"]


@pytest.fixture(scope="module")
def small(clothes_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("int8") / "out"
    assert main(["export", str(clothes_bundle), *INT8, "--out", str(out)]) == 0
    return out


@pytest.fixture(scope="module")
def probabilities(small: Path) -> np.ndarray:
    """Of all 2,000 validation images, (2000, 10)."""
    # Where there is bf16, OpenVINO would resize in it too, and the figures are those of exact pixels.
    model = openvino.compile_model(small / "model.xml", "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    clothes = open_fashion_mnist_small().validation.images
    given = np.repeat(clothes[..., None], 3, axis=-1)
    return np.concatenate([model({"images": part})["probabilities"] for part in np.split(given, 40)])


def test_accuracy_stays_within_a_point(clothes: Bundle, small: Path, probabilities: np.ndarray) -> None:
    before = evaluate(clothes, "fashion-mnist-small").figures["top1"]
    labels = open_fashion_mnist_small().validation.labels
    after = (probabilities.argmax(1) == labels).mean()
    told = json.loads((small / "parity.json").read_text())["int8"]
    assert before > 0.5 and after > before - 0.01
    assert told["num_images"] == 2000 and told["num_calibrating"] == 300 and told["figure"] == "top1"
    assert told["before"] == pytest.approx(before, abs=0.002) and told["after"] == pytest.approx(after, abs=0.002)
    assert told["before_interval"][0] < told["before"] < told["before_interval"][1]


def test_surer_answers_are_righter_ones(probabilities: np.ndarray) -> None:
    right = probabilities.argmax(1) == open_fashion_mnist_small().validation.labels
    quarters = np.array_split(right[np.argsort(probabilities.max(1))], 4)
    shares = [quarter.mean() for quarter in quarters]
    assert shares == sorted(shares) and shares[-1] > shares[0] + 0.2


def test_depthwise_weights_have_a_scale_a_channel(small: Path) -> None:
    model = openvino.Core().read_model(small / "model.xml")
    depthwise = [each for each in model.get_ordered_ops() if each.get_type_name() == "GroupConvolution"]
    assert depthwise
    for each in depthwise:
        integers, scales = [], []
        waiting = [each.input_value(1).get_node()]
        while waiting:
            node = waiting.pop()
            if node.get_type_name() == "Constant":
                (integers if str(node.get_element_type()) == "<Type: 'int8_t'>" else scales).append(node)
            waiting += [source.get_node() for source in node.input_values()]
        (weights,) = integers
        channels = each.get_output_partial_shape(0)[1].get_length()
        assert max(int(np.prod(scale.shape)) for scale in scales) == channels
        levels = np.unique(weights.data.reshape(channels, -1), axis=1)
        assert all(len(np.unique(row)) > 2 for row in levels)  # of 9 weights; collapsed ones would be all but one 0


def test_it_is_smaller_and_its_speed_is_told(small: Path) -> None:
    told = json.loads((small / "parity.json").read_text())["int8"]
    assert told["bytes_after"] == (small / "model.bin").stat().st_size < 0.5 * told["bytes_before"]
    assert [each["batch_size"] for each in told["speed"]] == [1, 16]
    assert all(each[key] > 0 for each in told["speed"] for key in ("fp32", "default", "int8"))
    assert "| int8 | " in (small / "parity.md").read_text()


def test_what_costs_too_much_is_refused_with_figures(
    clothes_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import nncf

    def spoil(model: openvino.Model, *_: object, **__: object) -> openvino.Model:
        """A quantiser that takes the last bias for the whole answer."""
        from openvino import opset13

        output = model.outputs[0].get_node().input_value(0)
        turned = opset13.subtract(opset13.constant(np.float32(1)), output)
        return openvino.Model([turned], model.get_parameters())

    monkeypatch.setattr(nncf, "quantize_with_accuracy_control", spoil)
    assert main(["export", str(clothes_bundle), *INT8, "--out", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert said.startswith("coatnet: error: int8 costs too much, and nothing was written: top1 falls from ")
    assert "on 2,000 images of fashion-mnist-small, by more than 1 points" in said and said.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_the_bare_network_can_be_int8_too(clothes_bundle: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert main(["export", str(clothes_bundle), *INT8, "--logits", "--out", str(out)]) == 0
    bundle = load(clothes_bundle)
    images = torch.randn(3, bundle.preprocessing.channels, 16, 16)
    assert openvino.compile_model(out / "model.xml")({"images": images.numpy()})["logits"].shape == (3, 10)
    assert json.loads((out / "parity.json").read_text())["int8"]["after"] > 0.5


def test_several_labels_are_held_by_their_mean_average_precision(tmp_path: Path) -> None:
    clothes = open_fashion_mnist_small()
    kinds = {"Sneaker": "shoe", "Sandal": "shoe", "Ankle boot": "shoe", "Bag": "bag"}
    rows = ["path,label"]
    some = zip(clothes.training.images[::7], clothes.training.labels[::7], strict=True)  # they lie class by class
    for index, (pixels, label) in enumerate(some):
        Image.fromarray(pixels).save(tmp_path / f"{index}.png")
        name = clothes.classes[label]
        rows.append(f"{index}.png,{name};{kinds.get(name, 'garment')}")
    table = tmp_path / "labels.csv"
    table.write_text("\n".join(rows))
    quick = ["--model", "coatnet-femto-16", "--resolution", "16", "--epochs", "6", "--num_workers", "0"]
    assert main(["train", "--data", str(table), "--out", str(tmp_path / "run"), *quick]) == 0
    bundle = tmp_path / "run" / "bundle"
    before = evaluate(load(bundle), str(table)).figures["mean_average_precision"]
    out = tmp_path / "out"
    taken = ["--format", "openvino", "--int8", "--calibration", str(table), "--out", str(out)]
    assert main(["export", str(bundle), *taken]) == 0
    told = json.loads((out / "parity.json").read_text())["int8"]
    assert told["figure"] == "mean_average_precision" and told["before"] == pytest.approx(before, abs=0.005)
    assert 0.4 < told["before"] < 1 and told["after"] > told["before"] - 0.01
    assert told["before_interval"][0] <= told["before"] <= told["before_interval"][1]
    model = openvino.compile_model(out / "model.xml")
    (shoe,) = np.flatnonzero(clothes.training.labels == clothes.classes.index("Sneaker"))[:1]
    given = np.repeat(clothes.training.images[shoe][None, ..., None], 3, axis=-1)
    (probabilities,) = model({"images": given})["probabilities"]
    likely = {load(bundle).classes[each] for each in np.argsort(probabilities)[-2:]}
    assert "shoe" in likely and probabilities.sum() > 1.1  # each class on its own
