"""The split by hash is stratified and stable; summaries describe what is there."""

import unicodedata

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from coatnet.data.datasets import ArrayDataset, FileDataset
from coatnet.data.near_duplicates import groups_to_keep_together, keep_copies_together
from coatnet.data.open import open_dataset
from coatnet.data.splits import SplitRule, Splits, choose_training, choose_validation, summarize
from coatnet.errors import UserError

NAMES = [f"class{number % 4}/{number}.jpg" for number in range(4000)]
LABELS = np.arange(4000) % 4


def test_about_the_asked_fraction_of_each_class_is_held_out():
    held_out = choose_validation(NAMES, LABELS, 0.1)
    for label in range(4):
        assert held_out[label == LABELS].mean() == pytest.approx(0.1, abs=0.03)


def test_added_images_move_no_old_ones():
    before = choose_validation(NAMES[:3000], LABELS[:3000], 0.1)
    after = choose_validation(NAMES, LABELS, 0.1)
    assert np.array_equal(after[:3000], before)


def test_the_order_of_the_names_does_not_matter():
    order = np.random.default_rng(0).permutation(4000)
    shuffled = choose_validation([NAMES[index] for index in order], LABELS[order], 0.2)
    assert np.array_equal(shuffled, choose_validation(NAMES, LABELS, 0.2)[order])


@given(st.lists(st.text(max_size=8), unique=True, max_size=40), st.data(), st.floats(0.01, 0.99))
def test_every_class_of_two_or_more_is_on_both_sides(names, data, fraction):
    labels = np.array([data.draw(st.integers(0, 5)) for _ in names], dtype=np.int64)
    held_out = choose_validation(names, labels, fraction)
    for label in np.unique(labels):
        members = held_out[labels == label]
        assert not members.all()
        assert members.any() == (len(members) > 1)


def test_the_split_ignores_how_accents_are_encoded():
    names = [f"é/ü{number}.jpg" for number in range(100)]
    decomposed = [unicodedata.normalize("NFD", name) for name in names]
    labels = np.zeros(100, dtype=np.int64)
    assert names != decomposed
    assert np.array_equal(choose_validation(names, labels, 0.3), choose_validation(decomposed, labels, 0.3))


def arrays(shape: tuple[int, ...], labels: np.ndarray) -> ArrayDataset:
    images = np.random.default_rng(0).integers(0, 256, (len(labels), *shape), dtype=np.uint8)
    return ArrayDataset("some", [f"class{number}" for number in range(3)], images, labels)


def test_summary_of_arrays():
    summary = summarize(arrays((8, 6), np.arange(30) % 3))
    assert (summary.median, summary.uniform, summary.gray, summary.num_sampled) == ((8, 6), True, True, 30)
    assert not summarize(arrays((8, 6, 3), np.arange(30) % 3)).gray


def test_summary_of_files_samples_200_and_skips_bad_ones(tmp_path, encode):
    sizes = [(10 + number % 5, 20) for number in range(300)]
    for number, size in enumerate(sizes):
        (tmp_path / f"{number}.png").write_bytes(encode(np.full((*size, 3), 9, np.uint8)) if number else b"")
    dataset = FileDataset("some", "abc", tmp_path, [f"{number}.png" for number in range(300)], np.arange(300) % 3)
    summary = summarize(dataset)
    assert (summary.num_sampled, summary.median, summary.gray) == (199, (12, 20), True)
    assert (summary.smallest, summary.largest) == ((10, 20), (14, 20))


def test_summary_of_unreadable_files_is_refused_with_a_reason(tmp_path):
    with pytest.raises(UserError, match=r"some: none of 2 sampled images can be used, the last one .*unreadable"):
        summarize(FileDataset("some", "ab", tmp_path, ["a.jpg", "b.jpg"], np.array([0, 1])))


def test_description_says_images_classes_sizes_balance_and_split():
    splits = Splits("some", arrays((8, 6), np.arange(30) % 3), arrays((8, 6), np.arange(6) % 3), ("mind the gap",))
    assert splits.describe().splitlines() == [
        "some: 36 images, 3 classes, one label per image",
        "  split    30 for training, 6 for validation",
        "  images   6 x 8 pixels, gray",
        "  classes  class0, class1, class2",
        "  balance  10 training images in every class",
        "  note     mind the gap",
    ]
    assert str(splits) == splits.describe()
    assert splits.native_resolution == 6


def test_description_names_the_smallest_and_largest_class():
    splits = Splits("some", arrays((8, 6, 3), np.array([0] * 9 + [1] * 4 + [2])), arrays((8, 6, 3), np.arange(6) % 3))
    assert "1 (class2) to 9 (class0) training images a class" in splits.describe()
    assert "color" in splits.describe()


def test_counts_of_several_labels_are_sums():
    labels = np.array([[1, 0, 1], [0, 0, 1]])
    dataset = ArrayDataset("some", "abc", np.zeros((2, 4, 4), np.uint8), labels)
    assert dataset.multilabel
    assert dataset.class_counts.tolist() == [1, 0, 2]


def held_out_names(splits: Splits) -> list[str]:
    return [splits.validation.describe(index) for index in range(len(splits.validation))]


def all_names(splits: Splits) -> set[str]:
    parts = (splits.training, splits.validation, *([splits.test] if splits.test is not None else []))
    names = [part.describe(index) for part in parts for index in range(len(part))]
    assert len(names) == len(set(names))
    return set(names)


def test_each_image_is_held_out_in_one_of_the_folds():
    whole = open_dataset("digits")
    folds = [open_dataset("digits", rule=SplitRule(fold=f"{number}/4")) for number in range(1, 5)]
    assert sorted(name for splits in folds for name in held_out_names(splits)) == sorted(all_names(whole))
    for splits in folds:
        counts = np.bincount(splits.validation.labels)
        assert all_names(splits) == all_names(whole) and counts.max() - counts.min() <= 3
        row = {splits.training.describe(index): index for index in range(len(splits.training))}
        for index in (0, 5):
            if (name := whole.training.describe(index)) in row:
                assert np.array_equal(splits.training.images[row[name]], whole.training.images[index])


def test_what_is_kept_together_follows_its_first_image_and_moves_no_other():
    before = open_dataset("digits")
    inside, outside = held_out_names(before)[:2], before.training.describe(0)
    after = open_dataset("digits", rule=SplitRule(kept_together=[[outside, inside[0]], ["digits[no such]", inside[1]]]))
    assert set(held_out_names(after)) == set(held_out_names(before)) - {inside[0]}
    assert open_dataset("digits", rule=SplitRule(kept_together=())).notes == before.notes
    folds = [
        open_dataset("digits", rule=SplitRule(fold=f"{k}/3", kept_together=[[outside, *inside]])) for k in (1, 2, 3)
    ]
    assert [len({outside, *inside} & set(held_out_names(splits))) for splits in folds].count(3) == 1


def test_a_test_split_takes_its_part_of_both_sides():
    before, after = open_dataset("digits"), open_dataset("digits", rule=SplitRule(test_fraction=0.2))
    assert all_names(after) == all_names(before) and 300 < len(after.test) < 420
    assert set(held_out_names(after)) <= set(held_out_names(before)) and len(after.validation) > 120
    assert np.bincount(after.test.labels).min() > 20
    assert "for the test at the end" in after.describe()


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (SplitRule(fold="6/5"), "fold '6/5' is not valid"),
        (SplitRule(fold="one"), "fold 'one' is not valid"),
        (SplitRule(test_fraction=0.95), "test_fraction must be 0 or more and leave images"),
    ],
)
def test_rules_that_cannot_be_are_one_line(rule, message):
    with pytest.raises(UserError, match=message):
        open_dataset("digits", rule=rule)


def test_a_split_of_ones_own_is_not_divided_anew(make_folder):
    root = make_folder({"train/a": 3, "train/b": 3, "val/a": 2, "val/b": 2})
    with pytest.raises(UserError, match="is divided already, which fold would change"):
        open_dataset(root, rule=SplitRule(fold="1/2"))
    assert len(open_dataset(root, rule=SplitRule(fold="1/2"), evaluation=True).validation) == 4


def test_copies_of_one_label_are_groups_and_whole_classes_are_not(make_folder):
    root = make_folder({"a": 8, "b": 8, "c": 2})
    (root / "c/1.png").write_bytes((root / "c/0.png").read_bytes())  # all of its class
    for number in range(6):
        (root / f"a/copy{number}.png").write_bytes((root / "a/3.png").read_bytes())
    (root / "b/other.png").write_bytes((root / "a/3.png").read_bytes())  # another label
    (root / "b/broken.png").write_bytes(b"")
    splits = open_dataset(root, validation_fraction=0.3)
    copies = {"a/3.png", *(f"a/copy{number}.png" for number in range(6))}
    assert {frozenset(group) for group in groups_to_keep_together(splits)} == {frozenset(copies)}
    assert 0 < len(copies & set(held_out_names(splits))) < 7
    after, groups = keep_copies_together(splits, SplitRule(0.3), print)
    assert all_names(after) == all_names(open_dataset(root, rule=SplitRule(0.3, kept_together=groups)))
    assert len(copies & set(held_out_names(after))) in (0, 7) and all_names(after) == all_names(splits)


def test_copies_stay_together_where_keeping_others_together_would_part_them(make_folder):
    root = make_folder({"a": 12, "b": 12})
    splits = open_dataset(root, validation_fraction=0.2)
    held_out = sorted(name for name in held_out_names(splits) if name.startswith("a/"))
    learned = sorted(name for name in all_names(splits) if name.startswith("a/") and name not in held_out)
    # Each held-out image of a class is a copy of one to learn from, and those that are left are copies of each other.
    rest = iter(learned[len(held_out) :])
    pairs = [*zip(held_out, learned, strict=False), *zip(rest, rest, strict=False)]
    for one, other in pairs:
        (root / one).write_bytes((root / other).read_bytes())
    splits = open_dataset(root, validation_fraction=0.2)
    divided, groups = keep_copies_together(splits, SplitRule(0.2), print)
    out = set(held_out_names(divided))
    assert all(len({name in out for name in pair}) == 1 for pair in pairs) and any(n.startswith("a/") for n in out)
    assert out == set(held_out_names(open_dataset(root, rule=SplitRule(0.2, kept_together=groups))))


def test_a_beginning_of_the_training_images_has_as_many_of_each_class_and_is_in_every_longer_one():
    orders = [choose_training(LABELS[:400], seed) for seed in (0, 0, 1)]
    assert np.array_equal(orders[0], orders[1]) and not np.array_equal(orders[0], orders[2])
    assert sorted(orders[0]) == list(range(400))
    for size in (4, 40, 200, 400):
        assert set(np.bincount(LABELS[orders[0][:size]])) == {size // 4}


def test_a_part_of_the_training_images_leaves_the_held_out_ones_and_no_class_empty():
    whole = open_dataset("digits")
    part = open_dataset("digits", rule=SplitRule(training_images=50, seed=3))
    assert (len(part.training), set(part.training.class_counts)) == (50, {5})
    assert set(part.training.identity()) < set(whole.training.identity())
    assert list(part.validation.identity()) == list(whole.validation.identity())
    with pytest.raises(UserError, match="training_images is 9, which leaves 1 class without any: give 10 or more"):
        open_dataset("digits", rule=SplitRule(training_images=9))
    with pytest.raises(UserError, match="training_images is 5,000, but digits has 1,607 to learn from"):
        open_dataset("digits", rule=SplitRule(training_images=5000))
