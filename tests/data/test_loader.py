"""Batches are a pure function of the step, whatever the workers."""

import gc
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
import torch
from tests.data.loaders import SMALL, evaluate, train

import coatnet.data
from coatnet.data.datasets import ArrayDataset, FileDataset
from coatnet.data.loader import BadImages, evaluation_batches, read_image, require_readable, training_batches
from coatnet.data.open import open_dataset
from coatnet.data.transforms import Augmentation, EvaluationTransform, Preprocessing
from coatnet.errors import UserError


@pytest.fixture
def arrays() -> ArrayDataset:
    images = np.random.default_rng(0).integers(0, 256, (50, 12, 12), dtype=np.uint8)
    return ArrayDataset("some", ("a", "b", "c"), images, np.arange(50) % 3)


def assert_same(batches, others) -> None:
    assert len(batches) == len(others)
    for batch, other in zip(batches, others, strict=True):
        assert all(torch.equal(one, another) for one, another in zip(batch, other, strict=True))


@pytest.mark.parametrize("kind", ["files", "arrays"])
def test_resumed_batches_equal_uninterrupted_batches(kind, request):
    dataset = request.getfixturevalue(kind)
    assert_same(train(dataset, first_step=4, num_steps=6), train(dataset, num_steps=10)[4:])


@pytest.mark.parametrize("augmentation", [Augmentation("shift"), Augmentation("crop", rand_augment_layers=2)])
def test_two_workers_give_the_same_batches_as_none(files, augmentation):
    (files.root / "a/3.png").write_bytes(b"not an image")
    alone, shared = BadImages(24), BadImages(24)
    expected = train(files, augmentation=augmentation, bad_images=alone)
    assert_same(train(files, augmentation=augmentation, num_workers=2, bad_images=shared), expected)
    assert dict(shared.records) == dict(alone.records) != {}
    assert not multiprocessing.active_children()


def test_evaluation_with_workers_equals_evaluation_without_workers(files):
    assert_same(evaluate(files, num_workers=2), evaluate(files))


def test_images_are_channels_last_and_labels_int64(files, arrays):
    for dataset, workers in ((files, 0), (files, 1), (arrays, 0)):
        for images, labels, *_ in train(dataset, num_steps=2, num_workers=workers) + evaluate(dataset):
            assert images.shape[1:] == (3, 12, 12) and images.dtype == torch.float32
            assert images.is_contiguous(memory_format=torch.channels_last)
            assert labels.dtype == torch.int64 and len(labels) == len(images)


def test_an_epoch_shows_every_image_once(arrays):
    labels = torch.cat([labels for _, labels in train(arrays, num_steps=5, batch_size=10)])
    assert torch.bincount(labels).tolist() == np.bincount(arrays.labels).tolist()


@pytest.mark.parametrize("batch_size", [1, 5, 50])
def test_the_same_images_come_whatever_the_batch_size(arrays, batch_size):
    images = torch.cat([images for images, _ in train(arrays, num_steps=50 // batch_size, batch_size=batch_size)])
    assert torch.equal(images, torch.cat([images for images, _ in train(arrays, num_steps=2, batch_size=25)]))


def test_arrays_and_files_of_the_same_pixels_give_the_same_batches(arrays, tmp_path, encode):
    for index, image in enumerate(arrays.images):
        (tmp_path / f"{index}.png").write_bytes(encode(image))
    files = FileDataset("some", arrays.classes, tmp_path, [f"{index}.png" for index in range(50)], arrays.labels)
    for (images, labels), (others, other_labels) in zip(train(files), train(arrays), strict=True):
        torch.testing.assert_close(images, others)
        assert torch.equal(labels, other_labels)


@pytest.mark.parametrize(("batch_size", "sizes"), [(10, [10, 10, 4]), (24, [24]), (100, [24])])
def test_evaluation_visits_every_image_once_in_order_and_keeps_the_rest(files, batch_size, sizes):
    batches = evaluate(files, batch_size=batch_size)
    assert [len(images) for images, _, _ in batches] == sizes
    assert torch.equal(torch.cat([indices for _, _, indices in batches]), torch.arange(24))
    assert torch.cat([labels for _, labels, _ in batches]).tolist() == files.labels.tolist()
    image, _ = read_image(files, 13)
    images = torch.cat([images for images, _, _ in batches])
    assert torch.equal(images[13], EvaluationTransform(SMALL)(image))


def test_balanced_batches_hold_every_class_equally(files):
    labels = torch.cat([labels for _, labels in train(files, num_steps=6, balanced=True)])
    assert torch.bincount(labels).tolist() == [24, 24]


def test_an_image_that_is_repeated_in_balanced_batches_is_augmented_differently(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (9, 12, 12), dtype=np.uint8)
    dataset = ArrayDataset("some", ("a", "b"), pixels, np.array([0] * 8 + [1]))
    images, labels = train(dataset, num_steps=1, batch_size=16, balanced=True)[0]
    assert len(torch.unique(images[labels == 1], dim=0)) > 4


def test_alternating_flips_follow_the_epochs_of_each_image(files):
    """24 images, 8 a batch: batches 0 to 2 are the first epoch. In the same order both would be mirror images."""
    still = {"placement": "none", "flip_rate": 0.0}
    batches = train(files, num_steps=6, augmentation=Augmentation(**still, flip="alternating"))
    plain = train(files, num_steps=6, augmentation=Augmentation(**still))
    sides = {}
    for (images, _), (unchanged, _) in zip(batches, plain, strict=True):
        for image, before in zip(images, unchanged, strict=True):
            mirrored = torch.equal(image, before.flip(-1))
            assert mirrored != torch.equal(image, before)
            sides.setdefault(before.numpy().tobytes(), []).append(mirrored)
    assert len(sides) == 24
    assert all(first != second for first, second in sides.values())
    assert 0 < sum(first for first, _ in sides.values()) < 24
    assert_same(
        train(files, first_step=4, num_steps=2, augmentation=Augmentation(**still, flip="alternating")), batches[4:]
    )


def test_a_worker_that_is_killed_ends_the_run_in_one_line(files):
    batches = training_batches(
        files, preprocessing=SMALL, augmentation=Augmentation("shift"), batch_size=4, seed=0,
        first_step=0, num_steps=10_000, num_workers=1, bad_images=BadImages(24),
    )  # fmt: skip
    next(batches)
    (worker,) = multiprocessing.active_children()
    os.kill(worker.pid, signal.SIGKILL)
    with pytest.raises(UserError, match="a worker process stopped") as caught:
        list(batches)
    assert "\n" not in str(caught.value)


@pytest.mark.slow
def test_a_script_without_a_main_guard_runs_once(files, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(f"""
import numpy as np
from pathlib import Path
from coatnet.data.loader import BadImages
from coatnet.data.datasets import FileDataset
from coatnet.data.loader import evaluation_batches
from coatnet.data.transforms import Preprocessing
print("once")
paths = [f"a/{{number}}.png" for number in range(16)]
dataset = FileDataset("some", "ab", Path({str(files.root)!r}), paths, np.zeros(16, int))
batches = evaluation_batches(
    dataset, preprocessing=Preprocessing(12), batch_size=4, num_workers=1, bad_images=BadImages(24)
)
print(sum(len(images) for images, _, _ in batches))
""")
    source = Path(coatnet.data.__file__).parents[2]
    ran = subprocess.run(
        [sys.executable, "-W", "error", script], env={**os.environ, "PYTHONPATH": str(source)},
        capture_output=True, text=True, timeout=200,
    )  # fmt: skip
    assert (ran.stdout, ran.stderr) == ("once\n16\n", "")


def test_several_labels_come_as_rows(arrays):
    matrix = np.eye(3, dtype=np.uint8)[arrays.labels]
    dataset = ArrayDataset("some", arrays.classes, arrays.images, matrix)
    (_, labels), (_, numbers) = train(dataset, num_steps=1)[0], train(arrays, num_steps=1)[0]
    assert torch.equal(labels.argmax(1), numbers)
    with pytest.raises(UserError, match="one label per image"):
        train(dataset, balanced=True)


def test_datasets_can_be_pickled(files, arrays):
    for dataset in (files, arrays):
        copy = pickle.loads(pickle.dumps(dataset))
        assert len(copy) == len(dataset) and copy.describe(3) == dataset.describe(3)
        assert np.array_equal(copy.labels, dataset.labels)


def test_small_images_flow_faster_than_a_model_takes_them():
    splits = open_dataset("fashion-mnist-small")
    preprocessing = Preprocessing(28, crop_fraction=1.0, mean=(0.3,), std=(0.3,))
    batches = training_batches(
        splits.training, preprocessing=preprocessing, augmentation=Augmentation("shift"), batch_size=128,
        seed=0, first_step=0, num_steps=80, num_workers=0, bad_images=BadImages(24),
    )  # fmt: skip
    next(batches)
    started = time.thread_time()
    images = sum(len(images) for images, _ in batches)
    assert images / (time.thread_time() - started) > 10_000  # 47,000 on a core of a shared machine


def test_a_batch_size_of_zero_is_refused(arrays):
    with pytest.raises(UserError, match="batch_size"):
        train(arrays, batch_size=0)


class Minimal:
    """The members that a dataset must have, and no more."""

    def __init__(self, dataset: FileDataset) -> None:
        self.name, self.classes, self.multilabel = dataset.name, dataset.classes, dataset.multilabel
        self.labels, self.read, self.describe = dataset.labels, dataset.read, dataset.describe

    def __len__(self) -> int:
        return len(self.labels)


def test_a_class_that_does_not_inherit_from_dataset_gives_the_same_batches(files):
    assert_same(train(Minimal(files), num_workers=1), train(files))
    assert_same(evaluate(Minimal(files)), evaluate(files))


class Watched(Minimal):
    """Tells when each of its images has been read."""

    def __init__(self, dataset: FileDataset) -> None:
        super().__init__(dataset)
        self.has_read = [threading.Event() for _ in range(len(dataset))]

        def read(index):
            self.has_read[index].set()
            return dataset.read(index)

        self.read = read


@pytest.mark.parametrize("make", [evaluation_batches, training_batches])
def test_without_workers_the_next_batch_is_made_while_one_is_used(files, make):
    dataset, options = Watched(files), {}
    if make is training_batches:
        options = {"augmentation": Augmentation("shift"), "seed": 7, "first_step": 0, "num_steps": 3}
    options |= {"preprocessing": SMALL, "batch_size": 8, "num_workers": 0, "bad_images": BadImages(24)}
    with closing(make(dataset, **options)) as batches:
        next(batches)
        deadline = time.monotonic() + 60
        while sum(each.is_set() for each in dataset.has_read) < 16 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert sum(each.is_set() for each in dataset.has_read) == 16  # and no third
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("decode")]


def test_the_garbage_collector_may_close_abandoned_batches_in_their_own_thread(files, monkeypatch):
    dataset, abandoned, collected, failures = Minimal(files), threading.Event(), threading.Event(), []

    def read(index):
        if index >= 8:
            assert abandoned.wait(60)
            gc.collect()
            collected.set()
        return files.read(index)

    dataset.read = read
    monkeypatch.setattr(sys, "unraisablehook", failures.append)
    batches = evaluation_batches(dataset, preprocessing=SMALL, batch_size=8, num_workers=0, bad_images=BadImages(24))
    next(batches)
    cycle = [batches]
    cycle.append(cycle)
    del batches, cycle
    abandoned.set()
    assert collected.wait(60)
    assert not failures


@pytest.mark.slow
def test_a_read_that_hangs_does_not_keep_an_interrupted_program(files):
    script = f"""
import os, signal, threading, time
from pathlib import Path
from tests.data.loaders import SMALL
from coatnet.data.datasets import FileDataset
from coatnet.data.loader import BadImages, evaluation_batches
import numpy as np
dataset = FileDataset("some", ("a",), Path({str(files.root)!r}), ["a/0.png", "a/1.png"], np.zeros(2, dtype=np.int64))
read = dataset.read
dataset.read = lambda index: time.sleep(600) if index else read(index)
batches = evaluation_batches(dataset, preprocessing=SMALL, batch_size=1, num_workers=0, bad_images=BadImages(2))
next(batches)
threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT)).start()
next(batches)
"""
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert ended.stderr.rstrip().endswith("KeyboardInterrupt")


def test_what_is_wrong_with_a_batch_is_raised_when_its_turn_comes(files):
    (files.root / "a/9.png").write_bytes(b"not an image")
    with closing(
        evaluation_batches(files, preprocessing=SMALL, batch_size=8, num_workers=0, bad_images=BadImages(24, 0.0))
    ) as batches:
        next(batches)
        with pytest.raises(UserError, match="cannot be used"):
            next(batches)


def test_random_numbers_that_are_drawn_meanwhile_change_no_batch(files):
    crop = Augmentation("crop", rand_augment_layers=2)
    expected, ended = train(files, augmentation=crop, num_workers=2), threading.Event()

    def draw() -> None:
        while not ended.is_set():
            torch.default_generator.manual_seed(1)
            torch.rand(9)

    thread = threading.Thread(target=draw)
    thread.start()
    try:
        assert_same(train(files, augmentation=crop), expected)
    finally:
        ended.set()
        thread.join()


def test_no_image_for_a_purpose_is_one_line(arrays):
    with pytest.raises(UserError, match="some: no image is left for validation: give more images"):
        require_readable(ArrayDataset("some", ("a",), arrays.images[:0], arrays.labels[:0]), "validation")
