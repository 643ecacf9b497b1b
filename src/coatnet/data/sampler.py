"""Which image comes at which position of an endless run, and which random numbers belong to it.

Both are pure functions of integers, so a run's state is one integer: nothing to save, nothing to replay.
Permutation: a Feistel network over Z_a x Z_b with cycle walking (Black and Rogaway 2002, "Ciphers with
Arbitrary Finite Domains"). Hash: the finaliser of splitmix64 (Steele, Lea and Flood 2014).
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
    """One entry a position: the image, and how often the run has shown that image before."""

    indices: Indices
    epochs: Indices


class EpochSampler:
    """Every epoch visits each of `size` images once, in an order of its own, in constant memory."""

    def __init__(self, size: int, seed: int) -> None:
        if size < 1:
            raise UserError(f"an order needs at least one image, got {size}")
        self.size = size
        self.seed = seed

    def indices(self, positions: ArrayLike) -> Indices:
        """Positions (B,) of the endless run, `epoch * size + k`, to image numbers (B,)."""
        return self.sample(positions).indices

    def sample(self, positions: ArrayLike) -> Samples:
        epochs, offsets = np.divmod(np.asarray(positions, dtype=np.int64), self.size)
        keys = hash_words(self.seed, epochs)
        return Samples(_permute(offsets, np.full_like(offsets, self.size), keys), epochs)


class BalancedSampler:
    """Every K positions show each of the K classes once; within a class, all images before any repeats."""

    def __init__(self, labels: ArrayLike, seed: int) -> None:
        labels = np.asarray(labels)
        if labels.ndim != 1:
            raise UserError("balanced sampling needs one label an image, got a multi-label dataset: use weights")
        self.seed = seed
        self.members = np.argsort(labels, kind="stable")
        _, self.starts, self.sizes = np.unique(labels[self.members], return_index=True, return_counts=True)
        self.classes = EpochSampler(len(self.sizes), seed)

    def indices(self, positions: ArrayLike) -> Indices:
        """Positions (B,) of the endless run to image numbers (B,)."""
        return self.sample(positions).indices

    def sample(self, positions: ArrayLike) -> Samples:
        chosen, turns = self.classes.sample(positions)
        sizes = self.sizes[chosen]
        epochs, offsets = np.divmod(turns, sizes)
        keys = hash_words(self.seed, chosen + 1, epochs)
        return Samples(self.members[self.starts[chosen] + _permute(offsets, sizes, keys)], epochs)


def hash_words(seed: int, *counters: ArrayLike) -> Words:
    """Mix a seed with integer counters, broadcast against each other, into one 64-bit word each."""
    word = _finalise(np.array([seed & 0xFFFFFFFFFFFFFFFF], dtype=np.uint64) + _GOLDEN)
    for counter in counters:
        word = _finalise((word + _GOLDEN) ^ _finalise(np.atleast_1d(counter).astype(np.uint64) + _GOLDEN))
    return word


def expand_words(words: Words, count: int) -> Words:
    """Words (B,) to words (B, count): each row is the splitmix64 stream that its word seeds."""
    steps = np.arange(1, count + 1, dtype=np.uint64) * _GOLDEN
    return _finalise(words[:, None] + steps)


def uniform(words: Words) -> NDArray[np.float64]:
    """Words to numbers in [0, 1), from their 53 upper bits."""
    return (words >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _finalise(word: Words) -> Words:
    word = (word ^ (word >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    word = (word ^ (word >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return word ^ (word >> np.uint64(31))


def _permute(offsets: Indices, sizes: Indices, keys: Words) -> Indices:
    """A permutation of range(size) for each key, applied elementwise to (B,) offsets."""
    rows = np.ceil(np.sqrt(sizes)).astype(np.int64)
    columns = -(-sizes // rows)  # rows * columns is at least size and hardly more, so few positions walk on
    result = offsets.copy()
    walking = np.arange(len(offsets))
    while len(walking):
        moved = _feistel(result[walking], rows[walking], columns[walking], keys[walking])
        result[walking] = moved
        walking = walking[moved >= sizes[walking]]
    return result


def _feistel(values: Indices, rows: Indices, columns: Indices, keys: Words) -> Indices:
    """A permutation of range(rows * columns) for each key."""
    row, column = np.divmod(values, columns)
    for step, key in enumerate(expand_words(keys, _ROUNDS).T):
        if step % 2:
            column = (column + _below(key, row, columns)) % columns
        else:
            row = (row + _below(key, column, rows)) % rows
    return row * columns + column


def _below(keys: Words, values: Indices, limits: Indices) -> Indices:
    return (_finalise(keys ^ _finalise(values.astype(np.uint64) + _GOLDEN)) % limits.astype(np.uint64)).astype(np.int64)
