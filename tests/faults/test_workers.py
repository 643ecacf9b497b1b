"""Worker processes that raise, die or hang, and a shared memory too small for them: one line, nothing lost."""

import os
import shutil
import time
from dataclasses import replace

import pytest
from PIL import Image
from tests.data.loaders import train
from tests.faults.running import RECIPE, event, last_step, run

from coatnet.data import worker_processes
from coatnet.data.folder import open_folder
from coatnet.data.loader import BadImages
from coatnet.errors import UserError

ON_FILES = replace(RECIPE, num_workers=2, evaluate_every=1000, epochs=2.5, batch_size=16)


@pytest.fixture
def images(tmp_path):
    """64 images of two classes."""
    root = tmp_path / "pictures"
    for index in range(64):
        path = root / "ab"[index % 2] / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (16, 16), (3 * index, 255 - 3 * index, 0)).save(path)
    return root


class Raising:
    """A dataset of which one image is a mistake of ours."""

    def __init__(self, dataset):
        self.dataset = dataset

    def __getattr__(self, name):
        if name == "dataset":
            raise AttributeError(name)
        return getattr(self.dataset, name)

    def __len__(self):
        return len(self.dataset)

    def read(self, index):
        if index == 7:
            raise ZeroDivisionError("a mistake of ours")
        return self.dataset.read(index)


class Hanging(Raising):
    """A dataset whose file system does not answer."""

    def read(self, index):
        time.sleep(100)


@pytest.mark.fault("B1", "a worker raises", "the error, its traceback and the image's number")
def test_an_error_in_a_worker_names_the_image(images):
    dataset = Raising(open_folder(images, 0.1).training)
    with pytest.raises(ZeroDivisionError, match=r"(?s)a mistake of ours.*while reading image 7 of"):
        train(dataset, num_steps=20, num_workers=2, bad_images=BadImages(64))


@pytest.mark.fault(
    "B1", "a worker is killed", "one line, exit 2, the last checkpoint whole; the same command completes"
)
def test_a_killed_worker_ends_the_run_in_one_line(images, tmp_path):
    recipe = replace(ON_FILES, data=str(images))
    ended = run(tmp_path, event("step", 4, "kill_worker"), recipe=recipe)
    assert ended.code == 2, ended.output
    assert "a worker process stopped, perhaps for lack of memory" in ended.output and "Traceback" not in ended.output
    assert last_step(ended.out) >= 1
    assert run(tmp_path, recipe=recipe).code == 0


@pytest.mark.fault("B1", "a worker hangs (a file system does not answer)", "one line that names the image")
def test_a_hanging_worker_ends_the_run_after_a_timeout(images, monkeypatch):
    monkeypatch.setattr(worker_processes, "BATCH_TIMEOUT_SECONDS", 3.0)
    dataset = Hanging(open_folder(images, 0.1).training)
    with pytest.raises(UserError, match=r"no batch for 3 s: a worker process hangs.*\.png"):
        train(dataset, num_workers=2)


@pytest.mark.fault("B1", "SIGTERM to torchrun while workers read (it goes to the workers too)", "saved, exit 143")
@pytest.mark.timeout(120)
def test_a_signal_to_the_whole_group_does_not_end_the_workers_first(images, tmp_path):
    recipe = replace(ON_FILES, data=str(images), epochs=25)
    injected = event("forward", 4, "send", name="SIGTERM", to="parent")
    ended = run(tmp_path, injected, recipe=recipe, processes=2)
    assert ended.codes == [143, 143], ended.output
    assert ended.seconds_to_end < 10 and last_step(ended.out) >= 4


@pytest.mark.fault("B2", "/dev/shm of 1 MB", "one line with the remedy, exit 2, instead of SIGBUS")
@pytest.mark.skipif(os.geteuid() != 0 or not shutil.which("unshare"), reason="mounting needs root and unshare")
def test_too_little_shared_memory_is_reported_before_the_training(images, tmp_path):
    recipe = replace(ON_FILES, data=str(images), resolution=160)
    small = 'mount -t tmpfs -o size=1m tmpfs /dev/shm && exec "$@"'
    ended = run(tmp_path, recipe=recipe, prefix=("unshare", "--mount", "sh", "-c", small, "sh"))
    if "mount:" in ended.output or "unshare:" in ended.output:
        pytest.skip("this system lets no one mount")
    assert ended.code == 2 and "/dev/shm has room for 1 MB" in ended.output and "--shm-size" in ended.output
