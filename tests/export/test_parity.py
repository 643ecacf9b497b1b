"""An export that says something else than its bundle is an error with figures, and nothing of it stays."""

import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from coatnet.bundle import Bundle
from coatnet.cli.main import main
from coatnet.errors import UserError
from coatnet.export import onnx as writer
from coatnet.export.parity import Parity, Reference, check_batches, compare, open_check_images, require_parity
from coatnet.export.quantization import Quantization
from coatnet.export.signature import Signature, run_with_torch


def run_of(bundle: Bundle, change: Callable[[NDArray], NDArray], *, logits: bool = False) -> tuple:
    """A comparison of the bundle with itself, changed."""
    signature = Signature(logits=logits)
    name, images = open_check_images(bundle, None)
    compute = run_with_torch(signature.module(bundle).eval())

    def run(given: NDArray) -> NDArray:
        found = compute(given)
        rows = change(found[:, :10])
        return np.column_stack([rows, found[: len(rows), 10:]]) if rows.shape[1] == 10 else rows

    return bundle, signature, run, name, images[:8]


@pytest.mark.parametrize("logits", [False, True])
def test_the_network_itself_passes(clothes: Bundle, logits: bool) -> None:
    parity = compare(*run_of(clothes, lambda rows: rows, logits=logits))
    require_parity(parity)
    assert parity.novelty_difference == (None if logits else 0.0)
    assert parity.agreement == 1.0 and parity.num_images == 8 and parity.data == "fashion-mnist-small"
    assert all(each.export > 0 and each.torch > 0 for each in parity.latency)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda rows: np.roll(rows, 1, axis=1), "differs from the bundle"),
        (lambda rows: rows + 0.01, "differs from the bundle"),
        (lambda rows: rows * np.float32("nan"), "finite"),
        (lambda rows: rows[:1], "for a batch of 2 it gives (1, 10), not (2, 10)"),
        (lambda rows: rows[:, :9], "finite"),
    ],
    ids=["classes turned", "shifted", "nan", "only one", "a class less"],
)
def test_a_wrong_answer_is_an_error(clothes: Bundle, change: Callable[[NDArray], NDArray], said: str) -> None:
    with pytest.raises(UserError) as error:
        require_parity(compare(*run_of(clothes, change)))
    assert said in str(error.value) and "nothing was written" in str(error.value) and "\n" not in str(error.value)


def test_a_wrong_novelty_or_file_is_an_error() -> None:
    parity = Parity("data", 3, (1, 2), 0.0, 0.0, 1.0, 1.0, (), {"CMYK": 0.0}, 0.0)
    require_parity(parity)
    for wrong, said in (
        ({"novelty_difference": 0.5}, "by 0.5 in a novelty"),
        ({"novelty_difference": float("nan")}, "in a novelty"),
        ({"files": {"RGB": 0.0, "CMYK": 0.5}}, "for a file that is CMYK by 0.5 in a probability"),
    ):
        with pytest.raises(UserError, match=said):
            require_parity(replace(parity, **wrong))


def test_logits_that_are_shifted_are_found_though_their_softmax_is_the_same(clothes: Bundle) -> None:
    parity = compare(*run_of(clothes, lambda rows: rows + 0.5, logits=True))
    assert parity.probability_difference < 1e-5 and parity.logit_difference == pytest.approx(0.5, rel=1e-3)
    with pytest.raises(UserError, match="in a logit"):
        require_parity(parity)


@pytest.mark.slow
def test_a_damaged_export_is_refused_and_nothing_is_left(
    clothes_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write = writer.write

    def write_damaged(bundle, signature, metadata, folder) -> None:
        write(bundle, signature, metadata, folder)
        model = onnx.load(folder / "model.onnx")
        largest = max(model.graph.initializer, key=lambda each: len(each.raw_data))
        largest.raw_data = bytes(len(largest.raw_data))
        onnx.save(model, folder / "model.onnx")

    monkeypatch.setattr(writer, "write", write_damaged)
    assert main(["export", str(clothes_bundle), "--format", "onnx", "--out", str(tmp_path / "out")]) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.count("\n") == 1 and "differs from the bundle" in printed.err
    assert list(tmp_path.iterdir()) == []


def test_own_images_are_checked_with(clothes: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number, size in enumerate([(30, 40), (50, 20), (64, 64), (33, 31)] * 30):
        folder = tmp_path / "ab"[number % 2]  # a dataset has classes, though they need not be the model's
        folder.mkdir(exist_ok=True)
        noise = np.random.default_rng(number).integers(0, 255, (*size, 3), dtype=np.uint8)
        Image.fromarray(noise).save(folder / f"{number}.png")
    (tmp_path / "a" / "bad.png").write_bytes(b"no image")
    name, images = open_check_images(clothes, str(tmp_path))
    assert name == tmp_path.name and len(images) > 8
    assert all(image.shape[0] == 3 for image in images)
    monkeypatch.setattr("coatnet.export.parity.MAX_CHECKED_BYTES", 1000)  # photographs, as it were
    assert len(open_check_images(clothes, str(tmp_path))[1]) <= 8
    reference = Reference(clothes, Signature())
    assert reference.given(images[0][None]).shape == (1, *images[0].shape[1:], 3)


def test_images_to_check_with_are_bounded_in_bytes_though_the_first_is_small(
    clothes: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, side in [("train/a/0", 8), ("train/b/0", 8), ("val/a/0", 8), *((f"val/b/{k}", 100) for k in range(30))]:
        path = tmp_path / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (side, side)).save(path)
    monkeypatch.setattr("coatnet.export.parity.MAX_CHECKED_BYTES", 300_000)
    images = open_check_images(clothes, str(tmp_path))[1]
    assert len(images) >= 8 and sum(image.nbytes for image in images) <= 300_000 + 3 * 100 * 100


def test_batches_are_not_held_together(clothes: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    held, most = set[int](), 0

    def tracked(images: list[Tensor]) -> Iterator[Tensor]:
        nonlocal most
        for number, batch in enumerate(check_batches(images)):
            held.add(number)
            weakref.finalize(batch, held.discard, number)
            most = max(most, len(held))
            yield batch

    bundle, signature, run, name, images = run_of(clothes, lambda rows: rows)
    monkeypatch.setattr("coatnet.export.parity.check_batches", tracked)
    assert compare(bundle, signature, run, name, images * 4).num_images == 32  # twelve batches
    assert most <= 5  # three that are timed, this one and the one before


def test_the_keys_of_parity_json_stay() -> None:
    parity = Parity("data", 3, (1, 2), 0.0, 0.0, 0.0, 1.0, ())
    assert list(parity.to_dict()) == [
        "data",
        "num_images",
        "batch_sizes",
        "probability_difference",
        "logit_difference",
        "logit_limit",
        "agreement",
        "latency",
        "files",
    ]
    quantization = Quantization("data", 1, 2, "top1", 0.5, (0.4, 0.6), 0.5, (0.4, 0.6), 1.0, 4, 1, ())
    assert list(quantization.to_dict())[:3] == ["data", "num_calibrating", "num_images"]
