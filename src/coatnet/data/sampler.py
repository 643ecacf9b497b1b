"""The order of training images and their random numbers, as pure functions of integers.

Position p of an endless sequence of epochs gives the index of an image, so the state of a run is one integer: nothing
is saved and nothing replayed. Permutation: a Feistel network over Z_a x Z_b with cycle walking (Black and Rogaway 2002,
"Ciphers with Arbitrary Finite Domains"). Hash: the finalizer of splitmix64 (Steele, Lea and Flood 2014).
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from coatnet.errors import UserError

Words = NDArray[np.uint64]
Indices = NDArray[np.int64]

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
# chosen: six rounds. Four suffice for large sets; six keep sets of a few images uniform, as a test holds.
_ROUNDS = 6


class Samples(NamedTuple):
    """For each position (B,): the index of the image, and how often it was shown before."""

    indices: Indices
    epochs: Indices


class EpochSampler:
    """Samples every image once per epoch, in a new order each epoch, in constant memory.

    Args:
        size: the number of images, N.
        seed: of the orders of all epochs.

    Raises:
        UserError: there are no images.
    """

    def __init__(self, size: int, seed: int) -> None:
        if size < 1:
            raise UserError(f"sampling needs at least one image, got {size}")
        self.size = size
        self.seed = seed

    def indices(self, positions: ArrayLike) -> Indices:
        """The indices (B,) of the images at positions (B,), `epoch * size + k`."""
        return self.sample(positions).indices

    def sample(self, positions: ArrayLike) -> Samples:
        """The indices and epochs (B,) of the images at positions (B,)."""
        epochs, offsets = np.divmod(np.asarray(positions, dtype=np.int64), self.size)
        keys = hash_words(self.seed, epochs)
        return Samples(_permute(offsets, np.full_like(offsets, self.size), keys), epochs)


class BalancedSampler:
    """Samples each of the K classes once in every K positions; within a class, all images before any repeats.

    Args:
        labels: class indices (N,).
        seed: of all orders.

    Raises:
        UserError: the labels are multi-label.
    """

    def __init__(self, labels: ArrayLike, seed: int) -> None:
        labels = np.asarray(labels)
        if labels.ndim != 1:
            raise UserError("balanced sampling needs one label per image, got a multi-label dataset: use weights")
        self.seed = seed
        self.members = np.argsort(labels, kind="stable")
        _, self.starts, self.sizes = np.unique(labels[self.members], return_index=True, return_counts=True)
        self.classes = EpochSampler(len(self.sizes), seed)

    def indices(self, positions: ArrayLike) -> Indices:
        """The indices (B,) of the images at positions (B,)."""
        return self.sample(positions).indices

    def sample(self, positions: ArrayLike) -> Samples:
        """The indices of the images at positions (B,), and how often each was shown before."""
        chosen, turns = self.classes.sample(positions)
        sizes = self.sizes[chosen]
        epochs, offsets = np.divmod(turns, sizes)
        keys = hash_words(self.seed, chosen + 1, epochs)
        return Samples(self.members[self.starts[chosen] + _permute(offsets, sizes, keys)], epochs)


Sampler = EpochSampler | BalancedSampler


def hash_words(seed: int, *counters: ArrayLike) -> Words:
    """Mix a seed with integer counters, broadcast against each other, into one 64-bit word each."""
    word = _finalize(np.array([seed & 0xFFFFFFFFFFFFFFFF], dtype=np.uint64) + _GOLDEN)
    for counter in counters:
        word = _finalize((word + _GOLDEN) ^ _finalize(np.atleast_1d(counter).astype(np.uint64) + _GOLDEN))
    return word


def expand_words(words: Words, count: int) -> Words:
    """Words (B,) to words (B, count): row i is the splitmix64 stream with seed `words[i]`."""
    steps = np.arange(1, count + 1, dtype=np.uint64) * _GOLDEN
    return _finalize(words[:, None] + steps)


def uniform(words: Words) -> NDArray[np.float64]:
    """Words to float64 in [0, 1), from their upper 53 bits."""
    return (words >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _finalize(word: Words) -> Words:
    word = (word ^ (word >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    word = (word ^ (word >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return word ^ (word >> np.uint64(31))


def _permute(offsets: Indices, sizes: Indices, keys: Words) -> Indices:
    """Apply to each offset (B,) the permutation of range(size) of its key."""
    rows = np.ceil(np.sqrt(sizes)).astype(np.int64)
    columns = -(-sizes // rows)  # rows * columns is at least size and hardly more, so few positions need another step
    result = offsets.copy()
    walking = np.arange(len(offsets))
    while len(walking):
        moved = _feistel(result[walking], rows[walking], columns[walking], keys[walking])
        result[walking] = moved
        walking = walking[moved >= sizes[walking]]
    return result


def _feistel(values: Indices, rows: Indices, columns: Indices, keys: Words) -> Indices:
    """Apply to each value (B,) the permutation of range(rows * columns) of its key."""
    row, column = np.divmod(values, columns)
    for step, key in enumerate(expand_words(keys, _ROUNDS).T):
        if step % 2:
            column = (column + _below(key, row, columns)) % columns
        else:
            row = (row + _below(key, column, rows)) % rows
    return row * columns + column


def _below(keys: Words, values: Indices, limits: Indices) -> Indices:
    return (_finalize(keys ^ _finalize(values.astype(np.uint64) + _GOLDEN)) % limits.astype(np.uint64)).astype(np.int64)
