"""Images decoded once and kept for the whole training: reduced pixels in one file, which worker processes map.

What an image becomes is a pure function of the image, the preprocessing and the augmentation (`Reduction`), wherever it
is kept. An image for which there is no room, or that cannot be read, is decoded and reduced anew each time, so the
images of a training do not depend on the memory of the machine. The file has no name, or belongs to the cache folder:
nothing is left behind when a process dies.
"""

import contextlib
import hashlib
import math
import mmap
import operator
import os
import shutil
import tempfile
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from multiprocessing import reduction as handles
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import PIL
import torch
from numpy.typing import NDArray

from coatnet.data.channels import with_scale
from coatnet.data.datasets import Dataset, evenly_spaced
from coatnet.data.decode import BadImage, image_size
from coatnet.data.loader import read_image, to_image
from coatnet.data.sampler import EpochSampler
from coatnet.data.transforms import (
    Augmentation,
    Image,
    Preprocessing,
    as_images,
    match_channels,
    resize,
    resize_with_margin,
)
from coatnet.data.worker_processes import SHARED_MEMORY
from coatnet.errors import UserError
from coatnet.system.cache import cached_folder
from coatnet.system.hardware import available_memory, num_cores
from coatnet.system.progress import ProgressBar

SHARE_OF_MEMORY = 1 / 4  # chosen: of what is available; auto keeps images in so much
SHARE_OF_DISK = 1 / 2  # chosen: of the free room of the file system that holds the file
SAMPLED_IMAGES = 200  # chosen: enough for their mean size
KEPT_ON_DISK = 8  # chosen: training and held-out images of four data sets or sizes
FORMAT = 2  # of what is on the disk
_KIND, _PIXELS, _TABLE = "decoded-images", "pixels.bin", "table.npy"


@dataclass(frozen=True)
class Reduction:
    """What is kept of an image: no more pixels than training or evaluation looks at, and never more than it has.

    Args:
        preprocessing: what the model sees; a gray model keeps one channel.
        smallest_part: least area of a random crop, as a fraction of the image; None if images are always resized as for
            evaluation, of which the result is then kept, with the margin that its center crop cuts off.
    """

    preprocessing: Preprocessing
    smallest_part: float | None = None

    @classmethod
    def for_training(cls, preprocessing: Preprocessing, augmentation: Augmentation) -> "Reduction":
        """What training with this augmentation looks at."""
        return cls(preprocessing, augmentation.crop_scale[0] if augmentation.placement == "crop" else None)

    @property
    def side(self) -> int:
        """The shorter side that is kept, in pixels: the smallest crop of a square image then has `resolution` pixels.

        So no crop is enlarged that would not have been, but for those that are longer than high, or higher than long.
        """
        if self.smallest_part is None:
            return self.preprocessing.resized_side
        return math.ceil(self.preprocessing.side / math.sqrt(self.smallest_part))

    @property
    def dtype(self) -> np.dtype:
        """Of what is kept: levels in single precision where the preprocessing has a scale."""
        return np.dtype(np.uint8 if self.preprocessing.scale is None else np.float32)

    def __call__(self, image: Image) -> NDArray:
        """An image, a uint8 tensor (3 or 1, H, W) or array (H, W) or (H, W, 3), or levels float32 (C, H, W), to an
        array (H', W', C) of the same type."""
        pixels = match_channels(as_images(image)[None], self.preprocessing)
        height, width = pixels.shape[-2:]
        if min(height, width) > self.side:
            if self.smallest_part is None:
                if all(map(operator.ge, (height, width), self.preprocessing.resized_size)):
                    pixels = resize_with_margin(pixels, self.preprocessing)
            else:
                shorter = min(height, width)
                size = (round(self.side * height / shorter), round(self.side * width / shorter))
                pixels = resize(pixels, size, self.preprocessing.interpolation)
        if pixels.shape[1] < self.preprocessing.channels:  # a gray array, for a model of colors
            pixels = pixels.expand(-1, self.preprocessing.channels, -1, -1)
        return np.ascontiguousarray(pixels[0].movedim(0, -1).numpy())

    def bytes_of(self, height: int, width: int) -> int:
        """About what an image of this size takes."""
        scale = min(1.0, self.side / max(1, min(height, width)))
        values = math.ceil(height * scale) * math.ceil(width * scale) * self.preprocessing.channels
        return values * self.dtype.itemsize


class Address(NamedTuple):
    """Where another process of this machine finds the pixels."""

    process: int
    descriptor: int
    table: NDArray[np.int64]


class CachedDataset(Dataset):
    """The images of another dataset, reduced, of which most are read from one file instead of being decoded.

    Args:
        source: the images, by the same numbers.
        reduction: what is kept of an image.
        descriptor: of the open file of the pixels, one after the other, which `close` closes; None without any.
        table: offset in the file, height and width of each image (N, 3); the offset of one that is not kept is -1.
    """

    in_memory = False  # images differ in size

    def __init__(self, source: Dataset, reduction: Reduction, descriptor: int | None, table: NDArray[np.int64]) -> None:
        self.source, self.reduction, self.table = source, reduction, table
        self.name, self.classes, self.multilabel = source.name, source.classes, source.multilabel
        self.thread_safe, self.scale = source.thread_safe, reduction.preprocessing.scale
        self._descriptor, self._map = descriptor, None
        if descriptor is not None and os.fstat(descriptor).st_size:
            self._map = mmap.mmap(descriptor, 0, access=mmap.ACCESS_READ)

    def __reduce__(self) -> Any:
        # A worker process inherits the open file: it may have no name, or lose it meanwhile.
        handle = None if self._descriptor is None else handles.DupFd(self._descriptor)
        return _in_worker, (self.source, self.reduction, handle, self.table)

    def __len__(self) -> int:
        return len(self.source)

    @property
    def labels(self) -> NDArray:  # pyrefly: ignore[bad-override]  # those of shards are read when first used
        """The labels of the source."""
        return self.source.labels

    @property
    def kept(self) -> NDArray[np.bool_]:
        """Which images are in the file (N,)."""
        return self.table[:, 0] >= 0

    @property
    def num_bytes(self) -> int:
        """Bytes of the pixels that are kept."""
        return 0 if self._map is None else len(self._map)

    def read(self, index: int) -> tuple[Any, NDArray]:
        """The reduced pixels, (H, W, 3) or (H, W), or levels, a tensor (C, H, W), and the label.

        Raises BadImage as the source does.
        """
        offset, height, width = self.table[index].tolist()
        if offset < 0 or self._map is None:
            image, label = read_image(self.source, index)
            return _as_read(self.reduction(image)), label
        shape = (height, width, self.reduction.preprocessing.channels)
        pixels = np.frombuffer(self._map, self.reduction.dtype, math.prod(shape), offset).reshape(shape)
        return _as_read(pixels), self.source.label(index)

    def describe(self, index: int) -> str:
        return self.source.describe(index)

    def label(self, index: int) -> NDArray:
        return self.source.label(index)

    @property
    def class_counts(self) -> NDArray[np.int64]:
        return self.source.class_counts

    def sampler(self, seed: int) -> EpochSampler:
        return self.source.sampler(seed)

    def address(self) -> Address:
        """For `attach`, in another process of this machine."""
        return Address(os.getpid(), -1 if self._descriptor is None else self._descriptor, self.table)

    def close(self) -> None:
        """Let the file go; images are then decoded."""
        if self._descriptor is not None:
            os.close(self._descriptor)
        self._descriptor = self._map = None


def _as_read(pixels: NDArray) -> NDArray | torch.Tensor:
    if pixels.dtype == np.float32:
        return as_images(pixels)
    return pixels[..., 0] if pixels.shape[-1] == 1 else pixels


def _in_worker(source: Dataset, reduction: Reduction, handle: Any, table: NDArray[np.int64]) -> CachedDataset:
    return CachedDataset(source, reduction, None if handle is None else handle.detach(), table)


def attach(source: Dataset, reduction: Reduction, address: Address) -> CachedDataset:
    """The images that another process of this machine keeps, where the system lets this one open its file.

    Elsewhere every image is decoded.
    """
    source = with_scale(source, reduction.preprocessing.scale)
    try:
        descriptor = os.open(f"/proc/{address.process}/fd/{address.descriptor}", os.O_RDONLY)
    except OSError:
        return CachedDataset(source, reduction, None, np.full_like(address.table, -1))
    return CachedDataset(source, reduction, descriptor, address.table)


def keep_images(
    source: Dataset,
    reduction: Reduction,
    where: Literal["memory", "disk"],
    *,
    indices: Sequence[int] | None = None,
    shown: bool = True,
) -> CachedDataset:
    """Decode and reduce images, by all cores, and keep them.

    Args:
        source: the images.
        reduction: what is kept of each.
        where: `memory` for the life of this process, as many as there is room for; `disk` for later runs too, named by
            names, sizes and times of the files and by the reduction.
        indices: those to keep in memory, by default all.
        shown: whether a progress bar is shown.

    Raises:
        UserError: the disk has no room for them, or the data is damaged.
    """
    source = with_scale(source, reduction.preprocessing.scale)
    if where == "disk":
        folder = cached_folder(
            _KIND,
            fingerprint(source, reduction),
            lambda staged: _write(staged, source, reduction, shown),
            most=KEPT_ON_DISK,
        )
        table = np.load(folder / _TABLE, allow_pickle=False)
        return CachedDataset(source, reduction, os.open(folder / _PIXELS, os.O_RDONLY), table)
    place, room = memory_room(2 * SHARE_OF_MEMORY)
    if place is None:
        return CachedDataset(source, reduction, None, np.full((len(source), 3), -1, dtype=np.int64))
    with tempfile.TemporaryFile(dir=place, buffering=0) as file:  # without a name
        every = range(len(source)) if indices is None else indices
        table, _ = _fill(file.fileno(), source, reduction, every, room, shown)
        return CachedDataset(source, reduction, os.dup(file.fileno()), table)


def memory_room(share: float = SHARE_OF_MEMORY) -> tuple[str | None, int]:
    """The folder for a file in memory, None if there is none, and the bytes it may have: a share of the memory.

    It is the shared memory if half of its room is enough, else that or the folder for temporary files, of which the
    system keeps what is read in memory; half of the room of that which has more.
    """
    places = [SHARED_MEMORY]
    with contextlib.suppress(OSError):
        places.append(tempfile.gettempdir())
    free = {place: shutil.disk_usage(place).free for place in places if os.access(place, os.W_OK)}
    if not free:
        return None, 0
    memory = int(share * available_memory())
    rooms = {place: min(memory, int(SHARE_OF_DISK * room)) for place, room in free.items()}
    place = max(rooms, key=lambda place: (rooms[place], place == SHARED_MEMORY))
    return place, rooms[place]


def fingerprint(source: Dataset, reduction: Reduction) -> str:
    """A name for the reduced images: 32 hex digits of all that they depend on, the program's versions included."""
    versions = f"{FORMAT} torch {torch.__version__} Pillow {PIL.__version__} {reduction} {len(source)}\n"
    digest = hashlib.sha256(versions.encode())
    for part in source.identity():
        digest.update(part)
    for part in source.state():
        digest.update(part)
    return digest.hexdigest()[:32]


def _write(folder: Path, source: Dataset, reduction: Reduction, shown: bool) -> None:
    room = int(SHARE_OF_DISK * shutil.disk_usage(folder).free)
    if _expected_bytes(source, reduction) <= room:
        with open(folder / _PIXELS, "wb", buffering=0) as file:
            table, all_fit = _fill(file.fileno(), source, reduction, range(len(source)), room, shown)
        if all_fit:
            np.save(folder / _TABLE, table)
            return
    raise UserError(
        f"cache disk: the decoded images need more than {room / 1e9:.1f} GB, half of the free room of "
        f"{folder.parent}: free some, name another folder by COATNET_CACHE_DIR, or take cache none"
    )


def _expected_bytes(source: Dataset, reduction: Reduction) -> int:
    """About what all images take, by the headers of some, evenly spread."""
    indices, num_bytes = evenly_spaced(len(source), SAMPLED_IMAGES), 0
    for index in indices:
        with contextlib.suppress(BadImage):
            image, _ = source.read(index)
            size = image_size(image, source.describe(index)) if isinstance(image, bytes) else image.shape[:2]
            num_bytes += reduction.bytes_of(*size)
    return len(source) * num_bytes // max(1, len(indices))


def _fill(
    file: int, source: Dataset, reduction: Reduction, indices: Sequence[int], room: int, shown: bool
) -> tuple[NDArray[np.int64], bool]:
    """Write reduced images into a file, up to `room` bytes; the table of `CachedDataset`, and whether all had room."""
    table = np.full((len(source), 3), -1, dtype=np.int64)
    reading = contextlib.nullcontext() if source.thread_safe else threading.Lock()
    placing, end, full = threading.Lock(), 0, False

    def keep(index: int) -> None:
        nonlocal end, full
        if full:
            return
        try:
            with reading:
                encoded, _ = source.read(index)
            image = to_image(source, index, encoded)
        except BadImage:
            return  # it is read again where it is needed, and counted there
        pixels = reduction(image)
        with placing:
            offset, end = end, end + pixels.nbytes
        if end > room or not _written(file, pixels, offset):
            full = True
            return
        table[index] = (offset, *pixels.shape[:2])

    threads = ThreadPoolExecutor(num_cores(), "decoding")
    try:
        with ProgressBar("decoding images once", len(indices), "images", shown=shown) as bar:
            for _ in threads.map(keep, indices):
                bar.advance()
    finally:
        threads.shutdown(cancel_futures=True)
    return table, not full


def _written(file: int, pixels: NDArray, offset: int) -> bool:
    """Whether the pixels are in the file from `offset` on; not if the disk or the memory is full."""
    left = pixels.data.cast("B")
    try:
        while left:
            count = os.pwrite(file, left, offset)
            left, offset = left[count:], offset + count
    except OSError:
        return False
    return True
