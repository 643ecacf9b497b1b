"""IDX files, the format of MNIST (LeCun's page of it): a magic number, the sizes, then bytes."""

import gzip
import zlib
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from coatnet.errors import UserError

_UNSIGNED_BYTES = 0x08


def read_idx(path: Path) -> NDArray[np.uint8]:
    """An array of unsigned bytes, from a plain or gzipped file."""
    try:
        data = path.read_bytes()
        if data[:2] == b"\x1f\x8b":
            data = gzip.decompress(data)
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path}: not a readable IDX file ({error}); fetch it again") from error

    if len(data) < 4 or data[:2] != b"\0\0" or data[2] != _UNSIGNED_BYTES or not 1 <= data[3] <= 4:
        raise UserError(f"{path}: not an IDX file of bytes; it would begin with 00 00 08, got {data[:4].hex(' ')!r}")
    num_axes = data[3]
    header = 4 + 4 * num_axes
    shape = tuple(int.from_bytes(data[4 + 4 * axis : 8 + 4 * axis], "big") for axis in range(num_axes))
    if len(data) - header != int(np.prod(shape, dtype=object)):
        raise UserError(f"{path}: {len(data) - header:,} bytes where its header says {shape}; fetch it again")
    return np.frombuffer(data, dtype=np.uint8, offset=header).reshape(shape)


def find_idx(folder: Path, stem: str) -> Path | None:
    """The file in `folder` whose name begins with `stem`, such as `train-images`, gzipped or not."""
    return next(iter(sorted(folder.glob(f"{stem}*ubyte*"))), None)
