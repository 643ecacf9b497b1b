"""The paper's recipes hold its Table 10 number by number, and the scores of its tables of results."""

import pytest

import coatnet
from coatnet.data.mixing import Mixing
from coatnet.data.transforms import Augmentation
from coatnet.training.optimizer import Optimization, Schedule
from coatnet.training.recipes import RECIPES

COLUMNS = ("epochs", "batch_size", "learning_rate", "minimum_learning_rate", "decay", "warmup_steps")
COLUMNS += ("weight_decay", "grad_clip_norm", "ema_decay", "loss", "label_smoothing", "mixup_alpha")
COLUMNS += ("rand_augment",)
# paper: Table 10; the 15,500 steps are its 5 epochs of 12.7 M images in batches of 4,096.
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
# paper: percent by size, from the first one on. Tables 4 and 13; 4 and 14; 5 (coatnet-3 there with strided depthwise
# convolutions).
SCORES = {
    "imagenet-1k": (0, [81.6, 83.3, 84.1, 84.5]),
    "imagenet-1k-384": (0, [83.9, 85.1, 85.7, 85.8]),
    "imagenet-1k-512": (2, [85.9, 86.0]),
    "imagenet-21k-to-1k-384": (2, [87.1, 87.6, 87.9]),
    "imagenet-21k-to-1k-512": (2, [87.3, 87.9, 88.1]),
    "imagenet-21k-randaugment-to-1k-384": (4, [88.3]),
    "imagenet-21k-randaugment-to-1k-512": (4, [88.4]),
    "imagenet-21k-randaugment-150-to-1k-384": (4, [88.4]),
    "imagenet-21k-randaugment-150-to-1k-512": (4, [88.56]),
    "jft-to-1k-384": (3, [88.52]),
    "jft-to-1k-512": (3, [88.81, 89.11, 89.77]),
    "jft-3b-to-1k-512": (6, [90.45, 90.88]),
}
SILENT = ("jft-3b", "jft-3b-to-1k-512")
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


@pytest.mark.parametrize("name", TABLE_10)
def test_recipes_hold_the_numbers_of_table_10(name):
    recipe = RECIPES[name].recipe
    whole = (Optimization(**recipe.optimizer), Schedule(**recipe.schedule), Augmentation(**recipe.augmentation))
    layers, magnitude = whole[-1].rand_augment_layers, whole[-1].rand_augment_magnitude
    values = {**vars(recipe), **{name: value for section in whole for name, value in vars(section).items()}}
    values |= vars(Mixing(**recipe.mixing))
    values["rand_augment"] = (layers, magnitude) if layers else None
    assert {key: values[key] for key in COLUMNS} == dict(zip(COLUMNS, TABLE_10[name], strict=True))


@pytest.mark.parametrize("name", [*TABLE_10, *SAME_BUT, *SILENT])
def test_pretraining_crops_the_centre_at_224_and_finetuning_sees_whole_images_of_the_size_in_its_name(name):
    recipe, finetunes = RECIPES[name].recipe, RECIPES[name].needs_init
    assert finetunes == name.endswith(("-384", "-512"))
    assert recipe.resolution == (int(name[-3:]) if finetunes else 224)
    assert recipe.preprocessing["crop"] == ("squash" if finetunes else "center")


@pytest.mark.parametrize("name", SAME_BUT)
def test_the_other_recipes_of_the_paper_differ_in_one_thing(name):
    like, but = SAME_BUT[name]
    assert vars(RECIPES[name].recipe) == {**vars(RECIPES[like].recipe), "name": name, **but}
    assert RECIPES[name].by_model == RECIPES[like].by_model


def test_every_recipe_is_held_to_the_table_or_says_that_the_paper_is_silent():
    assert set(RECIPES) - {"scratch", "finetune", "fashion-mnist"} == {*TABLE_10, *SAME_BUT, *SILENT}
    assert {name for name, row in RECIPES.items() if row.silent} == set(SILENT)
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
    # paper: Table 5, TPUv3-core-days; coatnet-5 saw 14 epochs of 300 M images in its.
    core_days = {"coatnet-5": 1.82e3, "coatnet-6": 6.6e3, "coatnet-7": 20.1e3}
    a_core_day = 14 * 300e6 * operations["coatnet-5"] / core_days["coatnet-5"]
    epochs = {name: core_days[name] * a_core_day / operations[name] / 3e9 for name in core_days}
    assert epochs["coatnet-7"] == pytest.approx(RECIPES["jft-3b"].recipe.epochs, rel=0.05)
    assert epochs["coatnet-6"] == pytest.approx(3, rel=0.1)


@pytest.mark.parametrize("name", DEPTHS)
def test_stochastic_depth_follows_the_model_size(name):
    given = {model: values["stochastic_depth"] for model, values in RECIPES[name].by_model.items()}
    assert given == {f"coatnet-{size}": depth for size, depth in DEPTHS[name].items()}


@pytest.mark.parametrize("name", [name for name, row in RECIPES.items() if row.data])
def test_scores_are_those_of_the_paper(name):
    percents = {model: 100 * score for model, score in RECIPES[name].published_top1.items()}
    first, scores = SCORES.get(name, (0, []))  # pre-training on other classes has none
    assert percents == pytest.approx({f"coatnet-{first + i}": score for i, score in enumerate(scores)})
    for model in percents:  # what is fine-tuned to a score has a recipe that it starts from
        assert any(model in row.by_model for row in RECIPES.values() if not row.needs_init)


def test_peak_learning_rates_on_jft_follow_the_model_size():
    rates = {model: values["optimizer"]["learning_rate"] for model, values in RECIPES["jft"].by_model.items()}
    assert rates == {"coatnet-3": 1e-3, "coatnet-4": 5e-4, "coatnet-5": 5e-4}


@pytest.mark.parametrize("name", ["imagenet-1k-384", "imagenet-1k-512"])
def test_the_largest_model_alone_has_stronger_augmentation(name):
    magnitudes = {
        model: values.get("augmentation", {}).get("rand_augment_magnitude", 15)
        for model, values in RECIPES[name].by_model.items()
    }
    assert magnitudes == {"coatnet-0": 15, "coatnet-1": 15, "coatnet-2": 15, "coatnet-3": 20}


def test_published_scores_are_fractions_of_known_models():
    for row in RECIPES.values():
        assert set(row.published_top1) <= set(row.by_model)
        assert set(row.by_model) <= set(coatnet.list_variants())
        assert all(0.8 < score < 0.91 for score in row.published_top1.values())
