"""Named recipes and changes of them; `resolve` fills in what they leave open and keeps what is given."""

import math
from pathlib import Path

import numpy as np
import pytest
import yaml

from coatnet.data.datasets import ArrayDataset
from coatnet.data.splits import Splits
from coatnet.errors import UserError
from coatnet.training.config import Recipe, TrainingConfig
from coatnet.training.defaults import (
    DataFacts,
    default_epochs,
    default_learning_rate,
    num_steps,
    open_splits,
    resolve,
    resolve_for,
)
from coatnet.training.recipes import RECIPES, named_recipe

ROOT = Path(__file__).resolve().parents[2]


def splits_of(side=28, channels=1, number=60, name="pictures", num_classes=3):
    shape = (number, side, side) if channels == 1 else (number, side, side, channels)
    images = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    labels = np.arange(number) % num_classes
    classes = [f"class {k}" for k in range(num_classes)]
    return Splits(name, *(ArrayDataset(name, classes, images, labels) for _ in range(2)))


def test_the_largest_models_of_a_column_have_their_own_values():
    fitted = resolve(named_recipe("imagenet-1k", {"data": "x", "model": "coatnet-3"}), splits_of(32, 3))
    assert fitted.stochastic_depth == 0.7
    by_model = RECIPES["imagenet-1k-384"].by_model["coatnet-3"]
    assert by_model["augmentation"] == {"rand_augment_magnitude": 20}
    fitted = resolve(named_recipe("jft", {"data": "x", "model": "coatnet-5"}), splits_of(32, 3))
    assert (fitted.stochastic_depth, fitted.optimizer.learning_rate) == (0.0, 5e-4)


def test_a_fitted_recipe_leaves_nothing_open_and_fits_to_itself():
    splits = splits_of()
    fitted = resolve(Recipe(data="digits"), splits)
    assert None not in fitted.to_dict().values()
    assert resolve(Recipe.from_dict(fitted.to_dict()), splits) == fitted
    assert TrainingConfig.from_dict(fitted.to_dict()) == fitted


def test_small_images_keep_their_size_and_color_and_are_shifted():
    fitted = resolve(Recipe(data="digits"), splits_of(28, 1))
    preprocessing, augmentation = fitted.preprocessing, fitted.augmentation
    assert (preprocessing.resolution, preprocessing.channels, preprocessing.crop_fraction) == (28, 1, 1.0)
    assert preprocessing.mean == pytest.approx((0.5,), abs=0.02)
    assert preprocessing.std == pytest.approx((3**-0.5 / 2,), abs=0.02)
    assert (augmentation.placement, augmentation.shift) == ("shift", 1)


def test_trivial_augment_takes_the_place_of_rand_augment():
    photographs = DataFacts(1_000, side=500, shorter_side=375, largest_side=500)
    asked = {"data": "x", "augmentation": {"trivial_augment": True}}
    assert resolve_for(named_recipe("scratch", asked), photographs).augmentation.rand_augment_layers == 0
    asked["augmentation"]["rand_augment_layers"] = 1
    with pytest.raises(UserError, match="trivial_augment takes the place of RandAugment"):
        resolve_for(named_recipe("scratch", asked), photographs)


@pytest.mark.parametrize(
    ("name", "side", "channels", "flip_rate"),
    [
        ("letters", 28, 1, 0.0),
        ("fashion-mnist", 28, 1, 0.0),
        ("fashion-mnist", 32, 3, 0.5),
        ("photos", 200, 3, 0.5),
        ("x-rays", 200, 1, 0.5),
    ],
)
def test_only_small_gray_images_are_not_mirrored_whatever_their_name(name, side, channels, flip_rate):
    fitted = resolve(Recipe(data="digits"), splits_of(side, channels, name=name))
    assert fitted.augmentation.flip_rate == flip_rate


def test_the_recipe_fashion_mnist_is_the_stored_one_of_the_published_result():
    stored = yaml.safe_load((ROOT / "docs" / "results" / "fashion-mnist" / "recipe.yaml").read_text())
    # 60,000 gray garments of 28 pixels are what fashion-mnist is; their brightness is in the file.
    (mean,), (std,) = stored["preprocessing"]["mean"], stored["preprocessing"]["std"]
    garments = DataFacts(60_000, side=28, shorter_side=28, largest_side=28, gray=True, mean=mean, std=std)
    given = ("data", "model", "variations", "batch_size", "evaluate_every", "max_minutes", "validation_fraction")
    asked = {name: stored[name] for name in given}
    asked |= {"schedule": {"decay": "linear"}, "augmentation": {"flip": "alternating", "erasing_rate": 0.5}}
    # Some 19 epochs fitted into the minutes by the first steps, of which a twentieth are the warm-up.
    fitted = 20 * stored["schedule"]["warmup_steps"] * stored["batch_size"] / 60_000
    config = resolve_for(named_recipe("fashion-mnist", asked), garments, epochs_that_fit=fitted)
    assert 19 < fitted < 20 and config == TrainingConfig.from_dict(stored)


def test_untrained_weights_learn_by_muon_at_four_times_the_rate_of_adamw():
    splits = splits_of(28, 1)
    muon, adamw = (
        resolve(Recipe(data="digits", optimizer=asked), splits).optimizer for asked in ({}, {"algorithm": "adamw"})
    )
    assert (muon.algorithm, adamw.algorithm) == ("muon", "adamw")
    assert muon.learning_rate == pytest.approx(4 * adamw.learning_rate, abs=4e-6)
    assert resolve(Recipe(data="digits", optimizer={"learning_rate": 0.02}), splits).optimizer.learning_rate == 0.02


def test_a_recipe_of_release_0_1_goes_on_with_adamw(tmp_path):
    rates = "learning_rate: 0.01, weight_decay: 0.05, betas: [0.9, 0.999], grad_clip_norm: 1.0"
    (tmp_path / "stored.yaml").write_text(f"data: digits\noptimizer: {{{rates}, layer_decay: 1.0}}")
    assert Recipe.from_yaml(tmp_path / "stored.yaml").optimizer["algorithm"] == "adamw"
    for own in ("learning_rate: 0.01", "layer_decay: 0.9"):
        (tmp_path / "own.yaml").write_text(f"data: digits\noptimizer: {{{own}}}")
        assert "algorithm" not in Recipe.from_yaml(tmp_path / "own.yaml").optimizer


def test_photographs_are_cropped():
    fitted = resolve(Recipe(data="digits"), splits_of(240, 3))
    assert fitted.preprocessing.resolution == 128
    assert fitted.augmentation.placement == "crop"
    assert fitted.augmentation.rand_augment_layers == 2


def test_what_is_given_is_kept():
    given = {"data": "digits", "epochs": 3, "resolution": 20, "optimizer": {"learning_rate": 0.5}}
    given |= {"augmentation": {"shift": 7}, "preprocessing": {"mean": [0.25], "std": [0.125]}}
    fitted = resolve(Recipe.from_dict(given), splits_of())
    optimizer, augmentation, preprocessing = fitted.optimizer, fitted.augmentation, fitted.preprocessing
    assert (fitted.epochs, optimizer.learning_rate, augmentation.shift) == (3, 0.5, 7)
    assert (preprocessing.resolution, preprocessing.mean, augmentation.placement) == (20, (0.25,), "shift")


def test_several_labels_an_image_mean_the_sigmoid_loss_without_smoothing():
    splits = splits_of()
    labels = np.eye(3, dtype=np.uint8)[splits.training.labels]
    training = ArrayDataset("tags", splits.classes, splits.training.images, labels)
    fitted = resolve(Recipe(data="digits"), Splits("tags", training, training))
    assert (fitted.loss, fitted.mixing.label_smoothing) == ("sigmoid", 0.0)


def test_contradictions_are_refused():
    with pytest.raises(UserError, match="channels is 3, but preprocessing has 1"):
        resolve(Recipe(data="digits", channels=3, preprocessing={"mean": [0.5], "std": [0.5]}), splits_of())
    with pytest.raises(UserError, match="starts from a bundle"):
        resolve(named_recipe("imagenet-1k-384", {"data": "digits"}), splits_of())
    with pytest.raises(UserError, match=r"scratsh.*did you mean 'scratch'"):
        named_recipe("scratsh")


def test_many_small_images_are_erased_in_part_and_few_are_not():
    rates = [
        resolve(Recipe(data="digits"), splits_of(8, number=number)).augmentation.erasing_rate
        for number in (60, 19_999, 20_000)
    ]
    assert rates == [0.0, 0.0, 0.5]
    few_epochs = resolve(Recipe(data="digits", epochs=24), splits_of(8, number=20_000))
    assert few_epochs.augmentation.erasing_rate == 0.0, "an untrained network underfits in few epochs"


def test_fewer_images_are_seen_more_often_but_fewer_steps_are_made():
    numbers = (100, 1_600, 10_000, 60_000, 1_281_167)
    epochs = [default_epochs(number, 64, finetune=False) for number in numbers]
    assert epochs == sorted(epochs, reverse=True)
    steps = [num_steps(e, n, 64) for e, n in zip(epochs, numbers, strict=True)]
    assert steps == sorted(steps)


def test_fine_tuning_takes_a_third_of_the_epochs_but_enough_steps():
    assert default_epochs(60_000, 64, finetune=True) == 10
    assert default_epochs(1_600, 32, finetune=True) == 33
    assert num_steps(default_epochs(100, 16, finetune=True), 100, 16) == 300
    assert default_epochs(20, 16, finetune=True) == default_epochs(20, 16, finetune=False) == 100


def test_the_rate_to_fine_tune_falls_with_the_width_of_what_has_learned():
    assert default_learning_rate(128) == default_learning_rate(128, 128) == 2e-3
    assert default_learning_rate(128, 1024) == 2.5e-4
    assert default_learning_rate(32, 1024) == 1.25e-4


def test_changes_reach_into_the_parts_of_a_named_recipe():
    recipe = named_recipe("imagenet-1k", {"mixing": {"mixup_alpha": 0.2}, "epochs": 10})
    assert recipe.epochs == 10
    assert recipe.mixing == {"mixup_alpha": 0.2, "cutmix_alpha": 0.0, "label_smoothing": 0.1}


def test_photographs_are_seen_smaller_where_very_few_epochs_fit():
    facts = DataFacts(num_images=2_000, side=300, shorter_side=200, largest_side=400)
    few = resolve_for(Recipe(data="x"), facts, epochs_that_fit=5)
    assert few.preprocessing.resolution == 96
    assert few.schedule.warmup_steps == num_steps(5 * (128 / 96) ** 2, 2_000, few.batch_size) // 20
    for asked in ({"resolution": 128}, {"epochs": 5.0}):  # epochs that are asked for take as long as they take
        fit = 5 if "resolution" in asked else math.inf
        assert resolve_for(Recipe(data="x", **asked), facts, epochs_that_fit=fit).preprocessing.resolution == 128
    small = DataFacts(num_images=2_000, side=28, shorter_side=28, largest_side=28)
    large = DataFacts(num_images=50_000, side=500, shorter_side=400, largest_side=500)
    sides = [resolve_for(Recipe(data="x"), each, epochs_that_fit=1).preprocessing.resolution for each in (small, large)]
    assert sides == [28, 224]


@pytest.mark.parametrize(
    ("epochs", "layers", "mixup", "least", "depth"), [(13, 0, 0.0, 0.6, 0.0), (60, 2, 0.2, 0.35, 0.1)]
)
def test_photographs_vary_less_where_few_epochs_fit(epochs, layers, mixup, least, depth):
    facts = DataFacts(num_images=2_000, side=300, shorter_side=200, largest_side=400)
    for config in (
        resolve_for(Recipe(data="x"), facts, epochs_that_fit=epochs),
        resolve_for(Recipe(data="x", epochs=epochs), facts),
    ):
        assert config.augmentation.rand_augment_layers == layers and config.mixing.mixup_alpha == mixup
        assert config.augmentation.crop_scale == (least, 1.0) and config.stochastic_depth == depth
        assert config.schedule.warmup_steps == num_steps(epochs, 2_000, config.batch_size) // 20
    assert resolve_for(Recipe(data="x"), facts, epochs_that_fit=epochs).preprocessing.resolution == 128
    asked = Recipe(data="x", epochs=13, augmentation={"rand_augment_layers": 1}, mixing={"mixup_alpha": 0.3})
    kept = resolve_for(asked, facts)
    assert kept.augmentation.rand_augment_layers == 1 and kept.mixing.mixup_alpha == 0.3


def test_a_held_out_fraction_that_a_split_leaves_unused_is_told():
    said: list[str] = []
    open_splits(Recipe(data="fashion-mnist-small", validation_fraction=0.3), said.append)
    open_splits(Recipe(data="fashion-mnist-small"), said.append)
    open_splits(Recipe(data="digits", validation_fraction=0.3), said.append)
    assert said == ["note: validation_fraction is not used, since fashion-mnist-small is divided already"]
