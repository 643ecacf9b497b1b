"""Evaluation equals torchvision; training is a pure function of image and seed, alone or in a batch."""

import math
import pickle

import numpy as np
import pytest
import torch
from torchvision.transforms import v2
from torchvision.transforms.v2.functional._geometry import _do_native_uint8_resize_on_cpu

from coatnet.data import augmentation as augment
from coatnet.data import transforms
from coatnet.data.sampler import hash_words
from coatnet.data.transforms import (
    Augmentation,
    EvaluationTransform,
    Preprocessing,
    TrainingTransform,
    as_images,
    match_channels,
    normalize,
    resize,
    resize_and_crop,
)
from coatnet.errors import UserError

GRAY = Preprocessing(resolution=28, crop_fraction=1.0, mean=(0.3,), std=(0.4,))
SEEDS = hash_words(0, np.arange(16))


def noise(*shape: int) -> torch.Tensor:
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("size", [(37, 50), (333, 250), (100, 80), (224, 224), (28, 28)])
def test_center_equals_torchvision_resize_then_center_crop(interpolation, size):
    if not _do_native_uint8_resize_on_cpu(v2.InterpolationMode(interpolation)):
        pytest.skip("this torchvision resizes uint8 in float32 on this processor (before 0.22 with AVX-512)")
    image = noise(3, *size)
    reference = v2.Compose([v2.Resize(64, v2.InterpolationMode(interpolation)), v2.CenterCrop(56)])
    preprocessing = Preprocessing(resolution=56, interpolation=interpolation)
    assert torch.equal(resize_and_crop(image[None], preprocessing)[0], reference(image))


def test_squash_equals_torchvision_resize_to_a_square_then_center_crop():
    image = noise(3, 50, 90)
    reference = v2.Compose([v2.Resize((64, 64), v2.InterpolationMode.BICUBIC), v2.CenterCrop(56)])
    assert torch.equal(resize_and_crop(image[None], Preprocessing(resolution=56, crop="squash"))[0], reference(image))


def test_images_are_normalized_by_mean_and_std():
    image = noise(3, 8, 8)
    preprocessing = Preprocessing(8, crop_fraction=1.0, mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6))
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (preprocessing.mean, preprocessing.std))
    expected = (image / 255 - mean) / std
    torch.testing.assert_close(EvaluationTransform(preprocessing)(image), expected)


@pytest.mark.parametrize(
    "preprocessing",
    [
        Preprocessing(8),
        Preprocessing(8, mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6)),
        Preprocessing(8, mean=(0.3,), std=(0.4,)),
    ],
    ids=["equal", "by channel", "gray"],
)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("num_channels", [1, 3])
def test_normalizing_equals_the_formula_to_the_bit(preprocessing, memory_format, num_channels):
    channels = min(num_channels, preprocessing.channels)
    images = noise(5, channels, 9, 7).contiguous(memory_format=memory_format)
    mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (preprocessing.mean, preprocessing.std))
    expected = (images.float() * (1 / 255) - mean) / std
    assert torch.equal(normalize(images, preprocessing), expected)
    given = torch.empty(6, 9, 7, preprocessing.channels).movedim(-1, 1)
    assert normalize(images, preprocessing, given[1:]).data_ptr() == given[1:].data_ptr()
    assert torch.equal(given[1:], expected)


@pytest.mark.parametrize("placement", ["crop", "shift", "none"])
def test_results_do_not_depend_on_the_memory_format(placement):
    images, augmentation = noise(2, 3, 50, 40), Augmentation(placement, rand_augment_layers=1, erasing_rate=0.5)
    lasting = images.contiguous(memory_format=torch.channels_last)
    training, evaluation = TrainingTransform(Preprocessing(32), augmentation), EvaluationTransform(Preprocessing(32))
    assert torch.equal(training.batch(images, SEEDS[:2]), training.batch(lasting, SEEDS[:2]))
    assert torch.equal(evaluation.batch(images), evaluation.batch(lasting))


def test_a_small_image_of_the_right_size_only_changes_its_scale():
    array = noise(28, 28).numpy()
    expected = (torch.from_numpy(array)[None] / 255 - 0.3) / 0.4
    torch.testing.assert_close(EvaluationTransform(GRAY)(array), expected)


def test_color_is_averaged_for_a_gray_model():
    image = noise(3, 28, 28)
    expected = (image.float().mean(0, keepdim=True).round() / 255 - 0.3) / 0.4
    torch.testing.assert_close(EvaluationTransform(GRAY)(image), expected)


def test_gray_is_repeated_for_a_color_model():
    preprocessing = Preprocessing(resolution=28, crop_fraction=1.0)
    array = noise(28, 28).numpy()
    color = np.repeat(array[..., None], 3, axis=-1)
    image = EvaluationTransform(preprocessing)(array)
    assert image.shape == (3, 28, 28)
    assert torch.equal(image, EvaluationTransform(preprocessing)(color))


def test_images_are_channels_last():
    pixels = noise(2, 3, 40, 40)
    preprocessing = Preprocessing(resolution=32)
    for images in (
        EvaluationTransform(preprocessing).batch(pixels),
        TrainingTransform(preprocessing, Augmentation()).batch(pixels, SEEDS[:2]),
    ):
        assert images.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("size", [(1, 1), (1, 5000), (5000, 1), (3, 4000)])
def test_thin_images_take_little_memory(size, monkeypatch):
    image = noise(3, *size)
    preprocessing = Preprocessing(resolution=64)

    def bounded(images, to, interpolation):
        assert max(to) <= 64 * 8
        return resize(images, to, interpolation)

    monkeypatch.setattr(transforms, "resize", bounded)
    assert EvaluationTransform(preprocessing)(image).shape == (3, 64, 64)
    assert TrainingTransform(preprocessing, Augmentation())(image, 3).shape == (3, 64, 64)


@pytest.mark.parametrize(
    "augmentation",
    [
        Augmentation("shift", shift=3),
        Augmentation("none", erasing_rate=0.5),
        Augmentation("crop", rand_augment_layers=2, erasing_rate=0.3),
    ],
    ids=["shift", "none", "crop"],
)
def test_an_image_alone_equals_the_image_in_a_batch(augmentation):
    images = noise(16, 3, 28, 28)
    transform = TrainingTransform(Preprocessing(resolution=28, crop_fraction=1.0), augmentation)
    together = transform.batch(images, SEEDS)
    for pixels, seed, image in zip(images, SEEDS, together, strict=True):
        assert torch.equal(transform(pixels, int(seed)), image)


@pytest.mark.parametrize("what", ["flip", "rand_augment", "trivial_augment", "erasing"])
def test_training_images_are_varied_as_asked(what):
    images, gray = noise(16, 3, 28, 28), [128, 128, 128]  # the mean, which fills uncovered pixels
    plain = Preprocessing(28, crop_fraction=1.0)
    asked, expected = {
        "flip": ({"flip_rate": 1.0}, lambda: normalize(images.flip(-1), plain)),
        "rand_augment": (
            {"rand_augment_layers": 2, "rand_augment_magnitude": 20},
            lambda: normalize(augment.rand_augment(images, SEEDS, layers=2, magnitude=20, fill=gray), plain),
        ),
        "trivial_augment": (
            {"trivial_augment": True},
            lambda: normalize(augment.trivial_augment(images, SEEDS, fill=gray), plain),
        ),
        "erasing": ({"erasing_rate": 0.7}, lambda: augment.erase_(normalize(images, plain), SEEDS, 0.7)),
    }[what]
    found = TrainingTransform(plain, Augmentation("none", **{"flip_rate": 0.0, **asked})).batch(images, SEEDS)
    assert torch.equal(found, expected()) and not torch.equal(found, normalize(images, plain))


def test_training_leaves_the_global_random_state_alone():
    transform = TrainingTransform(Preprocessing(32), Augmentation(rand_augment_layers=2, erasing_rate=1.0))
    before = torch.get_rng_state()
    transform(noise(3, 40, 40), 7)
    assert torch.equal(torch.get_rng_state(), before)


def test_training_ignores_the_global_random_state():
    transform = TrainingTransform(Preprocessing(32), Augmentation(rand_augment_layers=2, erasing_rate=1.0))
    image = noise(3, 40, 40)
    first = transform(image, 7)
    torch.rand(5)
    assert torch.equal(transform(image, 7), first)
    assert not torch.equal(transform(image, 8), first)


def test_transforms_can_be_pickled():
    transform = TrainingTransform(Preprocessing(32), Augmentation(rand_augment_layers=1))
    image = noise(3, 40, 40)
    assert torch.equal(pickle.loads(pickle.dumps(transform))(image, 1), transform(image, 1))


def test_shift_equals_padding_with_black_and_cutting_out():
    images = noise(16, 1, 10, 12)
    shifted = augment.shift(images, SEEDS, 2)
    seen = set()
    for image, result in zip(images, shifted, strict=True):
        padded = torch.nn.functional.pad(image, (2, 2, 2, 2))
        cuts = {(y, x): padded[:, y : y + 10, x : x + 12] for y in range(5) for x in range(5)}
        seen |= {place for place, cut in cuts.items() if torch.equal(cut, result)}
    assert len(seen) > 8  # 16 draws from 25 places


def test_flip_mirrors_the_given_fraction():
    images = noise(1, 1, 4, 6).repeat(4000, 1, 1, 1)
    seeds = hash_words(3, np.arange(4000))
    flipped = augment.flip(images, seeds, 0.3)
    mirrored = (flipped == images.flip(-1)).flatten(1).all(1)
    unchanged = (flipped == images).flatten(1).all(1)
    assert (mirrored ^ unchanged).all()
    assert mirrored.float().mean() == pytest.approx(0.3, abs=0.03)
    assert torch.equal(augment.flip(images, seeds, 0.0), images)
    assert torch.equal(augment.flip(images, seeds, 1.0), images.flip(-1))


def test_crop_boxes_lie_inside_and_have_the_given_area_and_ratio():
    boxes = augment.crop_boxes((200, 300), hash_words(0, np.arange(500)), scale=(0.2, 0.6), ratio=(0.5, 2.0))
    for top, left, height, width in boxes:
        assert 0 <= top <= 200 - height and 0 <= left <= 300 - width
        assert 0.19 < height * width / 60_000 < 0.61
        assert 0.48 < width / height < 2.1
    assert len(set(boxes)) == 500


def test_a_crop_that_cannot_have_the_ratio_takes_the_center():
    assert augment.crop_boxes((10, 1000), SEEDS[:1], scale=(1.0, 1.0), ratio=(1.0, 1.0)) == [(0, 495, 10, 10)]
    assert augment.crop_boxes((1000, 10), SEEDS[:1], scale=(1.0, 1.0), ratio=(1.0, 1.0)) == [(495, 0, 10, 10)]


def test_crop_of_everything_equals_resize():
    pixels = noise(3, 40, 40)
    whole = Augmentation("crop", crop_scale=(1.0, 1.0), crop_ratio=(1.0, 1.0), flip_rate=0.0)
    image = TrainingTransform(Preprocessing(resolution=24), whole)(pixels, 5)
    expected = resize(pixels[None], (24, 24), "bicubic")[0] / 255 * 2 - 1
    torch.testing.assert_close(image, expected, atol=1e-6, rtol=0)


def test_rand_augment_equals_torchvision_under_the_same_seed():
    images = noise(3, 3, 20, 20)
    ours = augment.rand_augment(images, SEEDS[:3], layers=2, magnitude=15, fill=[127, 127, 127])
    reference = v2.RandAugment(num_ops=2, magnitude=15, num_magnitude_bins=31, fill=[127, 127, 127])
    words = augment.expand_words(SEEDS[:3] ^ augment._RAND_AUGMENT, 1)[:, 0]
    for image, word, result in zip(images, words, ours, strict=True):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int(word))
            assert torch.equal(reference(image), result)


def test_trivial_augment_equals_torchvision_under_the_same_seed():
    images = noise(3, 3, 20, 20)
    ours = augment.trivial_augment(images, SEEDS[:3], fill=[127, 127, 127])
    reference = v2.TrivialAugmentWide(fill=[127, 127, 127])
    words = augment.expand_words(SEEDS[:3] ^ augment._TRIVIAL_AUGMENT, 1)[:, 0]
    for image, word, result in zip(images, words, ours, strict=True):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int(word))
            assert torch.equal(reference(image), result)


def test_trivial_augment_draws_each_of_its_operations():
    """The identity is one of 14 operations; with the least of 31 strengths, most of the others leave an image alone."""
    image = noise(1, 3, 8, 8)
    changed = augment.trivial_augment(image.expand(600, -1, -1, -1), hash_words(1, np.arange(600)), fill=[0, 0, 0])
    results, counts = torch.unique(changed, dim=0, return_counts=True)
    assert 0.07 < counts.max().item() / 600 < 0.25
    assert len(results) > 200


def test_only_one_of_the_two_augments_is_taken():
    with pytest.raises(UserError, match="trivial_augment takes the place of RandAugment, but rand_augment_layers is 2"):
        Augmentation(trivial_augment=True, rand_augment_layers=2)


def test_alternating_flips_show_both_sides_in_any_two_epochs():
    indices = np.arange(4000)
    sides = np.stack([augment.alternate(7, np.full(4000, epoch), indices) for epoch in range(6)])
    assert (sides[1:] != sides[:-1]).all()
    assert abs(sides[0].mean() - 0.5) < 4 * 0.5 / math.sqrt(4000)
    neighbors = (sides[0, 1:] == sides[0, :-1]).mean()
    assert abs(neighbors - 0.5) < 4 * 0.5 / math.sqrt(4000)
    assert not np.array_equal(sides[0], augment.alternate(8, np.zeros(4000, int), indices))
    assert np.array_equal(augment.alternate(7, np.array([3, 0]), np.array([9, 2])), [sides[3, 9], sides[0, 2]])


def test_erasing_sets_one_box_to_the_mean():
    erased = augment.erase_(torch.ones(200, 3, 20, 30), hash_words(2, np.arange(200)), 0.5)
    zeros = (erased == 0).all(1)
    hit = zeros.flatten(1).any(1)
    assert hit.float().mean() == pytest.approx(0.5, abs=0.12)
    for mask in zeros[hit]:
        rows, columns = mask.any(1).nonzero(), mask.any(0).nonzero()
        box = mask[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
        assert box.all()
        assert 0.01 < mask.float().mean() < 0.4


def test_arrays_become_channels_first():
    color = noise(5, 4, 3).numpy()
    assert np.array_equal(as_images(color).permute(1, 2, 0), color)
    assert as_images(noise(7, 5, 4).numpy()).shape == (7, 1, 5, 4)
    assert as_images(noise(7, 5, 4, 3).numpy()).shape == (7, 3, 5, 4)


def test_matching_channels_rounds_to_the_nearest_gray():
    image = torch.tensor([10, 20, 31], dtype=torch.uint8).view(1, 3, 1, 1)
    assert match_channels(image, GRAY).item() == 20


def test_lists_become_tuples_so_that_values_from_json_are_equal():
    assert Preprocessing(mean=[0.5, 0.5, 0.5], std=[0.5, 0.5, 0.5]) == Preprocessing()
    assert Augmentation(crop_scale=[0.08, 1.0]) == Augmentation()


@pytest.mark.parametrize(
    ("kind", "field", "value"),
    [
        (Preprocessing, "resolution", 0),
        (Preprocessing, "crop", "middle"),
        (Preprocessing, "crop_fraction", 0.0),
        (Preprocessing, "crop_fraction", math.nan),
        (Preprocessing, "interpolation", "nearest"),
        (Preprocessing, "mean", (0.5, 0.5)),
        (Preprocessing, "mean", (math.nan,)),
        (Preprocessing, "std", (0.5,)),
        (Preprocessing, "std", (0.5, 0.5, 0.0)),
        (Augmentation, "placement", "zoom"),
        (Augmentation, "crop_scale", (0.0, 1.0)),
        (Augmentation, "crop_scale", (0.5, 0.2)),
        (Augmentation, "crop_ratio", (2.0, 1.0)),
        (Augmentation, "shift", -1),
        (Augmentation, "flip_rate", 1.5),
        (Augmentation, "flip_rate", math.nan),
        (Augmentation, "rand_augment_layers", -1),
        (Augmentation, "rand_augment_magnitude", 31),
        (Augmentation, "erasing_rate", -0.1),
    ],
)
def test_impossible_values_are_refused_by_name(kind, field, value):
    with pytest.raises(UserError, match=field):
        kind(**{field: value})
