"""The paper's recipes hold its Table 10; `fit_to` fills in the rest and keeps what is given."""

import numpy as np
import pytest

import coatnet
from coatnet.data.datasets import ArrayDataset
from coatnet.data.splits import Splits
from coatnet.errors import UserError
from coatnet.training.fitting import fit_epochs, fit_learning_rate, fit_to, steps_of
from coatnet.training.recipe import Recipe, parts
from coatnet.training.recipes import RECIPES, named

COLUMNS = ("epochs", "batch_size", "learning_rate", "minimum_learning_rate", "decay", "warmup_steps")
COLUMNS += ("weight_decay", "grad_clip_norm", "ema_decay", "loss", "label_smoothing", "mixup_alpha")
COLUMNS += ("rand_augment",)
# paper: Table 10; the 15,500 steps are its 5 epochs of 12.7 M pictures in batches of 4,096.
TABLE_10 = {
    "imagenet-1k": (300, 4096, 1e-3, 1e-5, "cosine", 10_000, 0.05, 1.0, 0.0, "softmax", 0.1, 0.8, (2, 15)),
    "imagenet-1k-384": (30, 512, 5e-5, 5e-5, "constant", 0, 1e-8, 1.0, 0.9999, "softmax", 0.1, 0.8, (2, 15)),
    "imagenet-21k": (90, 4096, 1e-3, 1e-5, "linear", 15_500, 0.01, 1.0, 0.0, "sigmoid", 1e-4, 0.0, None),
    "imagenet-21k-to-1k-384": (
        30,
        1024,
        5e-5,
        5e-5,
        "constant",
        0,
        1e-8,
        1.0,
        0.9999,
        "softmax",
        0.1,
        0.0,
        None,
    ),
    "imagenet-21k-randaugment": (
        90,
        4096,
        1e-3,
        1e-5,
        "linear",
        15_500,
        0.01,
        1.0,
        0.0,
        "sigmoid",
        1e-4,
        0.0,
        (2, 5),
    ),
    "imagenet-21k-randaugment-to-1k-384": (
        30,
        1024,
        5e-5,
        5e-5,
        "constant",
        0,
        1e-8,
        1.0,
        0.9999,
        "softmax",
        0.1,
        0.0,
        (2, 5),
    ),
    "jft": (14, 4096, 1e-3, 1e-5, "linear", 20_000, 0.01, 1.0, 0.0, "sigmoid", 1e-4, 0.0, (2, 5)),
    "jft-to-1k-512": (30, 512, 5e-5, 5e-5, "constant", 0, 1e-8, 1.0, 0.9999, "softmax", 0.1, 0.0, (2, 5)),
}
# paper: the same at 512 pixels, and for 150 epochs (PT-RA-E150 of Table 14); "jft-to-1k-384" is in Table 5.
SAME_BUT = {
    "imagenet-1k-512": ("imagenet-1k-384", {"resolution": 512, "model": "coatnet-2"}),
    "imagenet-21k-to-1k-512": ("imagenet-21k-to-1k-384", {"resolution": 512}),
    "imagenet-21k-randaugment-150": ("imagenet-21k-randaugment", {"epochs": 150}),
    "imagenet-21k-randaugment-to-1k-512": ("imagenet-21k-randaugment-to-1k-384", {"resolution": 512}),
    "imagenet-21k-randaugment-150-to-1k-384": ("imagenet-21k-randaugment-to-1k-384", {}),
    "imagenet-21k-randaugment-150-to-1k-512": ("imagenet-21k-randaugment-to-1k-384", {"resolution": 512}),
    "jft-to-1k-384": ("jft-to-1k-512", {"resolution": 384}),
}
SILENT = {"jft-3b", "jft-3b-to-1k-512"}
DEPTHS = {
    "imagenet-21k-randaugment": {4: 0.7},
    "imagenet-21k-randaugment-to-1k-384": {4: 0.7},
    "imagenet-1k": {0: 0.2, 1: 0.3, 2: 0.5, 3: 0.7},
    "imagenet-1k-384": {0: 0.2, 1: 0.3, 2: 0.5, 3: 0.7},
    "imagenet-21k": {2: 0.3, 3: 0.5, 4: 0.7},
    "imagenet-21k-to-1k-384": {2: 0.3, 3: 0.5, 4: 0.7},
    "jft": {3: 0.0, 4: 0.1, 5: 0.0},
    "jft-to-1k-512": {3: 0.1, 4: 0.3, 5: 0.2},
}


def splits_of(side=28, channels=1, number=60, name="pictures", num_classes=3):
    shape = (number, side, side) if channels == 1 else (number, side, side, channels)
    pictures = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    labels = np.arange(number) % num_classes
    classes = [f"class {k}" for k in range(num_classes)]
    return Splits(name, *(ArrayDataset(name, classes, pictures, labels) for _ in range(2)))


@pytest.mark.parametrize("name", TABLE_10)
def test_recipes_hold_the_numbers_of_table_10(name):
    recipe = RECIPES[name].recipe
    optimizer, schedule, augmentation, mixing, _ = parts(recipe)
    layers, magnitude = augmentation.rand_augment_layers, augmentation.rand_augment_magnitude
    values = {**vars(recipe), **vars(optimizer), **vars(schedule), **vars(augmentation), **vars(mixing)}
    values["rand_augment"] = (layers, magnitude) if layers else None
    assert {key: values[key] for key in COLUMNS} == dict(zip(COLUMNS, TABLE_10[name], strict=True))


@pytest.mark.parametrize("name", SAME_BUT)
def test_the_other_recipes_of_the_paper_differ_in_one_thing(name):
    like, but = SAME_BUT[name]
    assert vars(RECIPES[name].recipe) == {**vars(RECIPES[like].recipe), "name": name, **but}
    assert RECIPES[name].by_model == RECIPES[like].by_model


def test_every_recipe_is_held_to_the_table_or_says_that_the_paper_is_silent():
    assert set(RECIPES) - {"scratch", "finetune"} == {*TABLE_10, *SAME_BUT, *SILENT}
    assert {name for name, row in RECIPES.items() if row.silent} == SILENT
    assert set(RECIPES["jft-3b"].by_model) == {"coatnet-6", "coatnet-7"}


@pytest.mark.parametrize(
    ("name", "thousands"),
    [
        ("imagenet-1k", 93.8),
        ("imagenet-1k-384", 75.1),
        ("imagenet-21k", 279),
        ("imagenet-21k-to-1k-384", 37.5),
        ("jft", 1025),
        ("jft-to-1k-512", 75.1),
    ],
)
def test_step_counts_are_epochs_of_the_papers_data(name, thousands):
    assert RECIPES[name].steps == pytest.approx(1000 * thousands, rel=2e-3)
    assert RECIPES["scratch"].steps is None


def test_the_epochs_on_jft_3b_are_the_core_days_of_the_paper():
    operations = {"coatnet-5": 6 * 142.18e9, "coatnet-6": 6 * 265.20e9, "coatnet-7": 6 * 457.87e9}
    # paper: Table 5, TPUv3-core-days; coatnet-5 saw 14 epochs of 300 M pictures in its.
    core_days = {"coatnet-5": 1.82e3, "coatnet-6": 6.6e3, "coatnet-7": 20.1e3}
    a_core_day = 14 * 300e6 * operations["coatnet-5"] / core_days["coatnet-5"]
    epochs = {name: core_days[name] * a_core_day / operations[name] / 3e9 for name in core_days}
    assert epochs["coatnet-7"] == pytest.approx(RECIPES["jft-3b"].recipe.epochs, rel=0.05)
    assert epochs["coatnet-6"] == pytest.approx(3, rel=0.1)


@pytest.mark.parametrize("name", DEPTHS)
def test_stochastic_depth_follows_the_model_size(name):
    given = {model: values["stochastic_depth"] for model, values in RECIPES[name].by_model.items()}
    assert given == {f"coatnet-{size}": depth for size, depth in DEPTHS[name].items()}


def test_the_largest_models_of_a_column_have_their_own_values():
    fitted = fit_to(named("imagenet-1k", {"data": "x", "model": "coatnet-3"}), splits_of(32, 3))
    assert fitted.stochastic_depth == 0.7
    by_model = RECIPES["imagenet-1k-384"].by_model["coatnet-3"]
    assert by_model["augmentation"] == {"rand_augment_magnitude": 20}
    fitted = fit_to(named("jft", {"data": "x", "model": "coatnet-5"}), splits_of(32, 3))
    assert (fitted.stochastic_depth, parts(fitted).optimizer.learning_rate) == (0.0, 5e-4)


def test_a_fitted_recipe_leaves_nothing_open_and_fits_to_itself():
    splits = splits_of()
    fitted = fit_to(Recipe(data="digits"), splits)
    for name in ("resolution", "channels", "epochs", "batch_size", "stochastic_depth", "ema_decay", "loss"):
        assert getattr(fitted, name) is not None, name
    assert fit_to(fitted, splits) == fitted
    assert fit_to(Recipe.from_dict(fitted.to_dict()), splits).to_dict() == fitted.to_dict()


def test_small_pictures_keep_their_size_and_colour_and_are_shifted():
    fitted = fit_to(Recipe(data="digits"), splits_of(28, 1))
    preprocessing, augmentation = parts(fitted).preprocessing, parts(fitted).augmentation
    assert (preprocessing.resolution, preprocessing.channels, preprocessing.crop_fraction) == (28, 1, 1.0)
    assert preprocessing.mean == pytest.approx((0.5,), abs=0.02)
    assert preprocessing.std == pytest.approx((3**-0.5 / 2,), abs=0.02)
    assert (augmentation.placement, augmentation.shift) == ("shift", 2)


@pytest.mark.parametrize(
    ("name", "side", "channels", "flip_rate"),
    [("letters", 28, 1, 0.0), ("fashion-mnist", 28, 1, 0.5), ("birds", 32, 3, 0.5), ("photos", 200, 3, 0.5)],
)
def test_only_small_grey_signs_are_not_mirrored(name, side, channels, flip_rate):
    fitted = fit_to(Recipe(data="digits"), splits_of(side, channels, name=name))
    assert parts(fitted).augmentation.flip_rate == flip_rate


def test_photographs_are_cropped():
    fitted = fit_to(Recipe(data="digits"), splits_of(240, 3))
    assert parts(fitted).preprocessing.resolution == 128
    assert parts(fitted).augmentation.placement == "crop"
    assert parts(fitted).augmentation.rand_augment_layers == 2


def test_what_is_given_is_kept():
    given = {"data": "digits", "epochs": 3, "resolution": 20, "optimizer": {"learning_rate": 0.5}}
    given |= {"augmentation": {"shift": 7}, "preprocessing": {"mean": [0.25], "std": [0.125]}}
    fitted = fit_to(Recipe.from_dict(given), splits_of())
    optimizer, _, augmentation, _, preprocessing = parts(fitted)
    assert (fitted.epochs, optimizer.learning_rate, augmentation.shift) == (3, 0.5, 7)
    assert (preprocessing.resolution, preprocessing.mean, augmentation.placement) == (20, (0.25,), "shift")


def test_several_labels_a_picture_mean_the_sigmoid_loss_without_smoothing():
    splits = splits_of()
    labels = np.eye(3, dtype=np.uint8)[splits.training.labels]
    training = ArrayDataset("tags", splits.classes, splits.training.pictures, labels)
    fitted = fit_to(Recipe(data="digits"), Splits("tags", training, training))
    assert (fitted.loss, parts(fitted).mixing.label_smoothing) == ("sigmoid", 0.0)


def test_contradictions_are_refused():
    with pytest.raises(UserError, match="channels is 3, but preprocessing has 1"):
        fit_to(Recipe(data="digits", channels=3, preprocessing={"mean": [0.5], "std": [0.5]}), splits_of())
    with pytest.raises(UserError, match="starts from a bundle"):
        fit_to(named("imagenet-1k-384", {"data": "digits"}), splits_of())
    with pytest.raises(UserError, match=r"scratsh.*did you mean 'scratch'"):
        named("scratsh")


def test_fewer_pictures_are_seen_more_often_but_fewer_steps_are_made():
    numbers = (100, 1_600, 10_000, 60_000, 1_281_167)
    epochs = [fit_epochs(number, 64, finetune=False) for number in numbers]
    assert epochs == sorted(epochs, reverse=True)
    steps = [steps_of(e, n, 64) for e, n in zip(epochs, numbers, strict=True)]
    assert steps == sorted(steps)


def test_fine_tuning_takes_a_third_of_the_epochs_but_enough_steps():
    assert fit_epochs(60_000, 64, finetune=True) == 8
    assert fit_epochs(1_600, 32, finetune=True) == 33
    assert steps_of(fit_epochs(100, 16, finetune=True), 100, 16) == 300
    assert fit_epochs(20, 16, finetune=True) == fit_epochs(20, 16, finetune=False) == 100


def test_the_rate_to_fine_tune_falls_with_the_width_of_what_has_learned():
    assert fit_learning_rate(128, None) == fit_learning_rate(128, 128) == 2e-3
    assert fit_learning_rate(128, 1024) == 2.5e-4
    assert fit_learning_rate(32, 1024) == 1.25e-4


def test_changes_reach_into_the_parts_of_a_named_recipe():
    recipe = named("imagenet-1k", {"mixing": {"mixup_alpha": 0.2}, "epochs": 10})
    assert recipe.epochs == 10
    assert recipe.mixing == {"mixup_alpha": 0.2, "cutmix_alpha": 0.0, "label_smoothing": 0.1}


def test_published_scores_are_fractions_of_known_models():
    for row in RECIPES.values():
        assert set(row.published_top1) <= set(row.by_model)
        assert set(row.by_model) <= set(coatnet.list_variants())
        assert all(0.8 < score < 0.91 for score in row.published_top1.values())
