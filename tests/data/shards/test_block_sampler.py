"""Block sampling is a permutation in every epoch, a pure function, and reads one window of blocks at a time."""

import time
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coatnet.data.shards.dataset import BlockSampler
from coatnet.errors import UserError


def epoch_of(order: BlockSampler, epoch: int) -> np.ndarray:
    return order.indices(epoch * order.size + np.arange(order.size))


@pytest.mark.parametrize("size", [1, 2, 7, 64, 65, 1000, 1001])
@pytest.mark.parametrize(("block_size", "blocks_per_window"), [(1, 1), (8, 4), (16, 3), (5, 1000), (2000, 2)])
def test_every_epoch_visits_every_image_once(size, block_size, blocks_per_window):
    order = BlockSampler(size, 5, block_size, blocks_per_window)
    for epoch in (0, 1, 10**6):
        assert np.array_equal(np.sort(epoch_of(order, epoch)), np.arange(size))


@settings(max_examples=60, deadline=None)
@given(
    size=st.integers(1, 2**33),
    seed=st.integers(0, 2**64 - 1),
    block_size=st.integers(1, 5000),
    window=st.integers(1, 300),
    epoch=st.integers(0, 2**20),
    ranks=st.integers(1, 8),
    data=st.data(),
)
def test_the_sequence_does_not_depend_on_ranks_or_start(size, seed, block_size, window, epoch, ranks, data):
    count = min(size, 256)
    positions = epoch * size + data.draw(st.integers(0, size - count)) + np.arange(count)
    whole = BlockSampler(size, seed, block_size, window).indices(positions)
    assert len(np.unique(whole)) == count
    assert whole.min() >= 0 and whole.max() < size
    shares = [BlockSampler(size, seed, block_size, window).indices(positions[rank::ranks]) for rank in range(ranks)]
    assert sorted(np.concatenate(shares)) == sorted(whole)
    done = data.draw(st.integers(0, count))
    assert np.array_equal(BlockSampler(size, seed, block_size, window).indices(positions[done:]), whole[done:])


def test_epochs_are_counted():
    order = BlockSampler(10, 0, 3, 2)
    assert order.sample(np.arange(30)).epochs.tolist() == [0] * 10 + [1] * 10 + [2] * 10


def test_a_window_reads_its_own_blocks_only_and_each_once():
    order = BlockSampler(64 * 50, 3, block_size=50, blocks_per_window=8)
    windows = (epoch_of(order, 4) // 50).reshape(8, 8 * 50)
    blocks = [set(window.tolist()) for window in windows]
    assert all(len(each) == 8 for each in blocks)
    assert len(set.union(*blocks)) == 64


def test_a_short_last_block_moves_few_images_to_other_windows():
    size, block_size, per_window = 64 * 50 - 20, 50, 8
    blocks = epoch_of(BlockSampler(size, 3, block_size, per_window), 0) // block_size
    windows = np.arange(size) // (block_size * per_window)
    home = np.array([np.bincount(windows[blocks == block]).argmax() for block in range(64)])
    assert (home[blocks] != windows).sum() <= 20
    assert np.bincount(home).max() == per_window


def test_neighbors_share_a_block_as_often_as_by_chance():
    indices = BlockSampler(10**6, 1, block_size=136).indices(np.arange(200_000))
    shared = (indices[1:] // 136 == indices[:-1] // 136).mean()
    assert shared == pytest.approx(1 / 128, rel=0.1)


def test_a_batch_has_images_of_many_shards():
    # 250 shards of 4,000 images; a shard is 29 blocks. A batch of 256 from 128 blocks shows about 86 shards.
    shards = BlockSampler(10**6, 1, block_size=136).indices(np.arange(256 * 100)) // 4000
    assert np.mean([len(np.unique(batch)) for batch in shards.reshape(100, 256)]) > 70


def test_epochs_and_seeds_have_different_orders_and_windows():
    first, second = (epoch_of(BlockSampler(10_000, 0, 20, 16), epoch) for epoch in (0, 1))
    other = epoch_of(BlockSampler(10_000, 1, 20, 16), 0)
    assert (first == second).sum() < 20 and (first == other).sum() < 20
    # The blocks of a window meet other blocks in the next epoch.
    company = [set((order[:320] // 20).tolist()) for order in (first, second)]
    assert len(company[0] & company[1]) <= 6


@pytest.mark.parametrize("position", [0, 5, 11])
def test_every_image_is_equally_likely_at_a_position(position):
    counts = np.bincount([BlockSampler(12, seed, 3, 2).indices([position])[0] for seed in range(2400)], minlength=12)
    assert ((counts - 200) ** 2 / 200).sum() < 31.3  # the 99.9 % point of chi-square with 11 degrees of freedom


def test_few_images_are_shuffled_completely():
    order = BlockSampler(100, 0, block_size=500)
    assert np.array_equal(np.sort(epoch_of(order, 0)), np.arange(100))
    assert (np.diff(epoch_of(order, 0)) == 1).sum() < 10


def test_sampling_from_billions_of_images_takes_no_memory_and_no_time():
    order = BlockSampler(3 * 10**9, 0, 136)
    positions = 10**12 + np.arange(1024)
    order.indices(positions)
    tracemalloc.start()
    began = time.thread_time()
    indices = order.indices(positions)
    seconds = time.thread_time() - began
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(np.unique(indices)) == 1024
    assert peak < 1_000_000
    assert seconds < 0.03  # 1 ms without tracing on a core of a shared machine


def test_sampling_from_no_images_is_refused():
    with pytest.raises(UserError, match="at least one image"):
        BlockSampler(0, 0, 10)
