"""Recipes are strict at the door: every wrong key or value is refused by name, and no file can name code."""

import time

import pytest

from coatnet.errors import UserError
from coatnet.training.config import Recipe, options
from coatnet.training.recipes.registry import RECIPES


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"epoch": 3}, r"epoch is unknown \(did you mean 'epochs'"),
        ({"epochs": "many"}, "epochs must be"),
        ({"epochs": float("nan")}, "epochs must be"),
        ({"epochs": -1}, "epochs must be above 0"),
        ({"batch_size": 1.5}, "batch_size must be"),
        ({"batch_size": True}, "batch_size must be"),
        ({"compile": "yes"}, "compile must be true or false"),
        ({"precision": "fp64"}, "precision must be one of auto, fp32, bf16"),
        ({"seed": -1}, "seed must be"),
        ({"ema_decay": 1.0}, "ema_decay must be"),
        ({"optimizer": {"lr": 1}}, "optimizer.lr is unknown; Optimization has learning_rate"),
        ({"optimizer": {"learning_rate": float("inf")}}, "optimizer.learning_rate must be a finite number"),
        ({"optimizer": {"betas": [0.9]}}, "optimizer.betas must be two numbers"),
        ({"optimizer": {"learning_rate": -1}}, "optimizer.learning_rate must be above 0"),
        ({"augmentation": {"flip_rate": 2}}, "flip_rate must be 0 to 1"),
        ({"mixing": {"mixup_alpha": -1}}, "mixup_alpha must be 0 or above"),
        ({"schedule": {"decay": "step"}}, "schedule.decay must be one of cosine, linear, constant"),
        ({"augmentation": {"class_path": "os.system"}}, "augmentation.class_path is unknown"),
        ({"mixing": 3}, "mixing"),
        ({"parallelism": "dp"}, "parallelism must be one of ddp, fsdp, hsdp, auto, got 'dp'"),
        ({"loggers": 3}, "loggers must be names with commas between, such as one,two, got 3"),
    ],
)
def test_wrong_values_are_refused_by_name(values, named):
    with pytest.raises(UserError, match=named):
        Recipe.from_dict(values)


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_equals_itself_after_a_round_trip_through_yaml(name, tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPES[name].recipe.to_yaml())
    assert Recipe.from_yaml(path) == RECIPES[name].recipe


def test_exponents_without_a_point_are_numbers(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text("optimizer: {learning_rate: 1e-3}\nepochs: 3\n")
    assert Recipe.from_yaml(path) == Recipe(epochs=3.0, optimizer={"learning_rate": 0.001})


@pytest.mark.parametrize(
    "text",
    [
        "optimizer: !!python/object/apply:os.system ['echo broken into']",
        "a: &a [1, 1]\nb: &b [*a, *a]\nvariations: {x: [*b, *b]}",
        "- a list",
        "epochs: [unclosed",
        "name: \x00",
        "variations: " + "[" * 5000,
        "# " + "x" * 10_000_000,
    ],
)
def test_a_file_that_is_no_recipe_is_refused_in_bounded_time(text, tmp_path, capfd):
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    began = time.monotonic()
    with pytest.raises(UserError, match=r"recipe\.yaml"):
        Recipe.from_yaml(path)
    assert time.monotonic() - began < 20
    assert "broken into" not in capfd.readouterr().out


def test_options_name_every_value_of_a_recipe():
    names = options()
    assert {"data", "epochs", "optimizer.learning_rate", "augmentation.flip_rate"} <= names.keys()
    assert "optimizer" not in names
