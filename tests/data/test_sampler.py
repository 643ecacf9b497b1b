"""Sampling is a permutation in every epoch, and a pure function of the position."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coatnet.data.sampler import BalancedSampler, EpochSampler, expand_words, hash_words, uniform
from coatnet.errors import UserError


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 7, 16, 17, 100, 1000, 1797, 10_000])
def test_every_epoch_visits_every_image_once(size):
    order = EpochSampler(size, seed=5)
    for epoch in (0, 1, 7, 10**6):
        indices = order.indices(epoch * size + np.arange(size))
        assert np.array_equal(np.sort(indices), np.arange(size))


@settings(max_examples=60, deadline=None)
@given(
    size=st.integers(1, 2**33),
    seed=st.integers(0, 2**64 - 1),
    start=st.integers(0, 2**40),
    ranks=st.integers(1, 8),
    data=st.data(),
)
def test_the_sequence_does_not_depend_on_ranks_or_start(size, seed, start, ranks, data):
    count = min(size, 512)
    start -= start % size  # at the beginning of an epoch, so that no index can come twice
    positions = start + np.arange(count)
    whole = EpochSampler(size, seed).indices(positions)
    assert len(np.unique(whole)) == count
    assert whole.min() >= 0 and whole.max() < size
    shares = [EpochSampler(size, seed).indices(positions[rank::ranks]) for rank in range(ranks)]
    assert sorted(np.concatenate(shares)) == sorted(whole)
    done = data.draw(st.integers(0, count))
    assert np.array_equal(EpochSampler(size, seed).indices(positions[done:]), whole[done:])


def test_epochs_and_seeds_have_different_orders():
    first, second = (EpochSampler(1000, 0).indices(epoch * 1000 + np.arange(1000)) for epoch in (0, 1))
    assert (first == second).sum() < 10
    assert (first == EpochSampler(1000, 1).indices(np.arange(1000))).sum() < 10


@pytest.mark.parametrize("size", [3, 4])
def test_all_permutations_of_a_few_images_are_about_equally_frequent(size):
    orders = np.array([EpochSampler(size, seed).indices(np.arange(size)) for seed in range(4800)])
    _, counts = np.unique(orders, axis=0, return_counts=True)
    expected = 4800 / len(counts)
    assert len(counts) == {3: 6, 4: 24}[size]
    chi_square = ((counts - expected) ** 2 / expected).sum()
    assert chi_square < {3: 20.5, 4: 49.7}[size]  # the 0.1 % points for 5 and 23 degrees of freedom


def test_every_position_is_equally_likely_to_hold_every_image():
    size, seeds = 50, 2000
    orders = np.array([EpochSampler(size, seed).indices(np.arange(size)) for seed in range(seeds)])
    counts = np.array([np.bincount(column, minlength=size) for column in orders.T])
    chi_square = ((counts - seeds / size) ** 2 / (seeds / size)).sum()
    assert abs(chi_square - 49 * 49) < 5 * np.sqrt(2 * 49 * 49)


def test_sampling_from_billions_of_images_takes_no_memory_and_no_time():
    indices = EpochSampler(3 * 10**9, 0).indices(np.arange(10**12, 10**12 + 4096))
    assert len(np.unique(indices)) == 4096


def test_balanced_sampling_has_every_class_once_in_every_k_positions():
    labels = np.array([2] * 90 + [0] * 9 + [5] * 1)
    order = BalancedSampler(labels, seed=3)
    shown = labels[order.indices(np.arange(300))].reshape(-1, 3)
    assert (np.sort(shown, axis=1) == [0, 2, 5]).all()


def test_balanced_sampling_has_every_image_of_a_class_before_any_repeats():
    labels = np.array([0] * 5 + [1] * 7)
    indices, epochs = BalancedSampler(labels, seed=3).sample(np.arange(2 * 35))
    for label, size in ((0, 5), (1, 7)):
        of_class = labels[indices] == label
        rounds = indices[of_class].reshape(-1, size)
        assert (np.sort(rounds, axis=1) == np.flatnonzero(labels == label)).all()
        assert (epochs[of_class].reshape(-1, size) == np.arange(35 // size)[:, None]).all()


def test_balanced_sampling_refuses_several_labels_per_image():
    with pytest.raises(UserError, match="one label per image"):
        BalancedSampler(np.zeros((4, 3)), seed=0)


def test_random_words_of_an_image_do_not_depend_on_its_batch():
    whole = expand_words(hash_words(1, 2, np.arange(100)), 3)
    assert np.array_equal(expand_words(hash_words(1, 2, np.arange(40, 60)), 3), whole[40:60])
    assert np.array_equal(expand_words(hash_words(1, np.full(100, 2), np.arange(100)), 5)[:, :3], whole)


def test_random_words_differ_between_seeds_epochs_and_images():
    words = [expand_words(hash_words(seed, epoch, np.arange(50)), 4) for seed in range(4) for epoch in range(4)]
    assert len(np.unique(np.concatenate(words))) == 4 * 4 * 50 * 4


def test_words_are_the_published_splitmix64_stream():
    # The reference program of Vigna, seeded with 1234567.
    assert expand_words(np.array([1234567], np.uint64), 3)[0].tolist() == [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
    ]


def test_uniform_numbers_have_the_moments_of_the_uniform_distribution():
    numbers = uniform(hash_words(9, np.arange(100_000)))
    assert numbers.min() >= 0 and numbers.max() < 1
    assert numbers.mean() == pytest.approx(1 / 2, abs=0.005)
    assert numbers.var() == pytest.approx(1 / 12, abs=0.002)


def test_sampling_from_no_images_is_refused():
    with pytest.raises(UserError, match="at least one image"):
        EpochSampler(0, seed=0)
