"""A bad image is replaced or left out and named; too many of them end the run."""

import pickle

import numpy as np
import pytest
import torch
from tests.data.loaders import SMALL, evaluate, train

from coatnet.data.decode import BadImage
from coatnet.data.loader import BadImages, read_image
from coatnet.data.sampler import EpochSampler, hash_words
from coatnet.data.transforms import Augmentation, TrainingTransform
from coatnet.errors import UserError


def test_a_bad_image_is_replaced_by_the_next_good_one_counted_once_and_named(files):
    good = train(files, num_steps=6)
    for name in ("a/3.png", "a/4.png"):
        (files.root / name).write_bytes(b"")
    bad_images = BadImages(24, budget=0.1)
    batches = train(files, num_steps=6, bad_images=bad_images)
    assert {name.rsplit("/", 1)[1] for name in bad_images.records} == {"3.png", "4.png"}
    assert set(bad_images.records.values()) == {"empty: the file has 0 bytes"}

    indices = EpochSampler(24, 7).indices(np.arange(48))
    images, before = (torch.cat([images for images, _ in run]) for run in (batches, good))
    for position, index in enumerate(indices):
        if index not in (3, 4):
            assert torch.equal(images[position], before[position])
    fifth, _ = read_image(files, 5)
    for position in np.flatnonzero(np.isin(indices, (3, 4))):
        seed = int(hash_words(7, position // 24, indices[position])[0])
        assert torch.equal(images[position], TrainingTransform(SMALL, Augmentation("shift"))(fifth, seed))


def test_evaluation_leaves_a_bad_image_out(files):
    (files.root / "a/3.png").unlink()
    bad_images = BadImages(24)
    indices = torch.cat([indices for _, _, indices in evaluate(files, bad_images=bad_images)])
    assert indices.tolist() == [index for index in range(24) if index != 3]
    assert list(bad_images.records) == [files.describe(3)]


def test_a_batch_of_bad_images_only_is_not_evaluated(files):
    for index in range(10, 20):
        files.path(index).unlink()
    batches = evaluate(files, bad_images=BadImages(24, budget=0.5))
    assert [len(images) for images, _, _ in batches] == [10, 4]


@pytest.mark.parametrize(("budget", "allowed"), [(0.001, 1), (0.0, 0), (0.1, 2), (1.0, 24)])
def test_the_budget_is_a_fraction_of_the_images_and_one_is_always_allowed(files, budget, allowed):
    bad_images = BadImages(len(files), budget)
    assert bad_images.allowed == allowed


def test_more_bad_images_than_the_budget_end_the_run_with_the_list(files):
    for index in (3, 4):
        files.path(index).write_bytes(b"<html>")
    with pytest.raises(UserError, match="2 of 24 images cannot be used, 1 may be") as caught:
        train(files, num_steps=6, bad_images=BadImages(24, 0.001))
    assert files.describe(3) in str(caught.value) and files.describe(4) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_with_a_budget_of_0_the_first_bad_image_ends_the_run(files):
    files.path(3).write_bytes(b"<html>")
    with pytest.raises(UserError, match="1 of 24 images cannot be used, 0 may be"):
        evaluate(files, bad_images=BadImages(24, 0.0))


def test_images_that_are_all_bad_end_the_run_even_within_the_budget(files):
    for index in range(24):
        files.path(index).unlink()
    with pytest.raises(UserError, match="in a row cannot be used"):
        train(files, bad_images=BadImages(24, 1.0))


def test_an_impossible_budget_is_refused():
    with pytest.raises(UserError, match="budget"):
        BadImages(24, 1.5)


def test_bad_images_can_be_pickled():
    error = pickle.loads(pickle.dumps(BadImage("some.jpg", "truncated: by half")))
    assert (error.name, error.reason, error.code) == ("some.jpg", "truncated: by half", "truncated")
