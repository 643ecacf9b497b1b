"""The inference loop: batches in order, shared among processes, with the mode of the model restored."""

from pathlib import Path

import numpy as np
import pytest
import torch

from coatnet.data.datasets import ArrayDataset, FileDataset
from coatnet.data.loader import BadImages
from coatnet.data.transforms import EvaluationTransform, Preprocessing
from coatnet.inference.logits import infer, workers_for
from coatnet.model.network import CoAtNet, create_model

PREPROCESSING = Preprocessing(resolution=8, mean=(0.5,), std=(0.5,))
DATASET = ArrayDataset(
    "noise",
    ("a", "b", "c"),
    np.random.default_rng(0).integers(0, 255, (11, 8, 8), dtype=np.uint8),
    np.arange(11) % 3,
)


@pytest.fixture(scope="module")
def model() -> CoAtNet:
    torch.manual_seed(0)
    return create_model("coatnet-femto-16", num_classes=3, in_channels=1, resolution=8).eval()


def test_batches_equal_the_model_in_order(model: CoAtNet) -> None:
    batches = list(infer(model, DATASET, preprocessing=PREPROCESSING, batch_size=4, bad_images=BadImages(11)))
    assert [len(batch.outputs) for batch in batches] == [4, 4, 3]
    assert torch.cat([batch.indices for batch in batches]).tolist() == list(range(11))
    assert torch.cat([batch.labels for batch in batches]).tolist() == DATASET.labels.tolist()
    transform = EvaluationTransform(PREPROCESSING)
    images = torch.stack([transform(DATASET.read(index)[0]) for index in range(11)])
    with torch.inference_mode():
        torch.testing.assert_close(torch.cat([batch.outputs for batch in batches]), model(images))


def test_processes_share_the_batches(model: CoAtNet) -> None:
    shares = [
        list(
            infer(
                model,
                DATASET,
                preprocessing=PREPROCESSING,
                batch_size=2,
                bad_images=BadImages(11),
                first=rank,
                every=4,
            )
        )
        for rank in range(4)
    ]
    assert [[int(batch.indices[0]) for batch in share] for share in shares] == [[0, 8], [2, 10], [4], [6]]


def test_the_mode_is_restored_when_the_generator_is_closed(model: CoAtNet) -> None:
    model.train()
    try:
        batches = infer(model, DATASET, preprocessing=PREPROCESSING, batch_size=4, bad_images=BadImages(11))
        assert model.training
        next(batches)
        assert not model.training
        batches.close()
        assert model.training
    finally:
        model.eval()


def test_bf16_is_close_to_fp32_and_returned_as_float32(model: CoAtNet) -> None:
    (exact,), (rounded,) = (
        list(infer(model, DATASET, preprocessing=PREPROCESSING, batch_size=11, bad_images=BadImages(11), bf16=bf16))
        for bf16 in (False, True)
    )
    assert exact.outputs.dtype == rounded.outputs.dtype == torch.float32
    assert not exact.outputs.equal(rounded.outputs)
    torch.testing.assert_close(exact.outputs, rounded.outputs, atol=0.05, rtol=0.05)


def test_only_large_datasets_are_read_by_workers() -> None:
    many = FileDataset("many", ("a",), Path(), [str(number) for number in range(2001)], np.zeros(2001))
    assert workers_for(DATASET, None) == 0 and workers_for(many, None) is None
    assert workers_for(DATASET, 3) == workers_for(many, 3) == 3
