"""A shuffle in two levels for images that lie in shards: blocks of neighbours, and the images of many blocks.

The blocks of an epoch come in a random order, a window of them at a time, and the images of a window come in a
random order: a reader needs the blocks of one window only, each of them once, and reads each block as one piece.
Like `coatnet.data.sampler.EpochSampler` it is a pure function of (seed, epoch, position) in constant memory.
"""

import numpy as np
from numpy.typing import ArrayLike

from coatnet.data.sampler import EpochSampler, Indices, Samples, hash_words

# chosen: 128 blocks a window. Neighbours in the order then share a block in 1 of 128 cases.
BLOCKS_PER_WINDOW = 128


class BlockSampler(EpochSampler):
    """Every epoch visits each of `size` images once; `block_size` images that lie side by side are a block."""

    def __init__(self, size: int, seed: int, block_size: int, blocks_per_window: int = BLOCKS_PER_WINDOW) -> None:
        super().__init__(size, seed)
        self.block_size = min(block_size, size)
        num_blocks = -(-size // self.block_size)
        self._blocks = EpochSampler(num_blocks, seed)
        self._per_window = min(blocks_per_window, num_blocks)
        self._num_windows = -(-num_blocks // self._per_window)
        # The last window of an epoch may have fewer blocks, and the last block fewer images.
        last = num_blocks - (self._num_windows - 1) * self._per_window
        own_seed = int(hash_words(seed, 1)[0])
        self._inside = EpochSampler(self._per_window * self.block_size, own_seed)
        self._inside_last = EpochSampler(last * self.block_size, own_seed)

    def sample(self, positions: ArrayLike) -> Samples:
        epochs, places = np.divmod(np.asarray(positions, dtype=np.int64), self.size)
        indices = self._shuffle(epochs, places)
        # The last block is filled up with images that are not there. Cycle walking, as in `EpochSampler`: whoever lands
        # on one of them goes on from there, which keeps every image's turn unique.
        while len(beyond := np.flatnonzero(indices >= self.size)):
            indices[beyond] = self._shuffle(epochs[beyond], indices[beyond])
        return Samples(indices, epochs)

    def _shuffle(self, epochs: Indices, places: Indices) -> Indices:
        """A permutation of range(num_blocks * block_size) for each epoch."""
        windows, offsets = np.divmod(places, self._inside.size)
        turns = epochs * self._num_windows + windows
        inside = np.empty_like(places)
        is_last = windows == self._num_windows - 1
        for part, order in ((~is_last, self._inside), (is_last, self._inside_last)):
            inside[part] = order.indices(turns[part] * order.size + offsets[part])
        slots, rest = np.divmod(inside, self.block_size)
        blocks = self._blocks.indices(epochs * self._blocks.size + windows * self._per_window + slots)
        return blocks * self.block_size + rest
