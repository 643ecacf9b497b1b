"""Recipes and configurations: every wrong name or value is refused by name, and no file can name code."""

import dataclasses
import time
from pathlib import Path

import numpy as np
import pytest
from tests.training.configs import config_of

from coatnet.data.mixing import Mixing
from coatnet.errors import UserError
from coatnet.system.validated import fields_of
from coatnet.training.config import MAY_CHANGE, Recipe, TrainingConfig, options
from coatnet.training.optimizer import Optimization
from coatnet.training.recipes import RECIPES, named_recipe


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
        (
            {"optimizer": {"lr": 1}},
            r"optimizer.lr is unknown \(did you mean 'learning_rate'\?\); optimizer has learning_rate",
        ),
        ({"optimizer": {"learning_rate": float("inf")}}, "optimizer.learning_rate must be a finite number"),
        ({"optimizer": {"betas": [0.9]}}, "optimizer.betas must be two numbers"),
        ({"optimizer": {"learning_rate": -1}}, "optimizer.learning_rate must be above 0"),
        ({"augmentation": {"flip_rate": 2}}, "flip_rate must be 0 to 1"),
        ({"mixing": {"mixup_alpha": -1}}, "mixing.mixup_alpha must be 0 or more, got -1"),
        ({"schedule": {"decay": "step"}}, "schedule.decay must be one of cosine, linear, constant"),
        ({"augmentation": {"class_path": "os.system"}}, "augmentation.class_path is unknown"),
        ({"mixing": 3}, "mixing"),
        ({"parallelism": "dp"}, "parallelism must be one of ddp, fsdp, hsdp, auto, got 'dp'"),
        ({"num_workers": "some"}, "num_workers must be a whole number or auto, got 'some'"),
        ({"num_workers": -1}, "num_workers must be 0 or more, got -1"),
        ({"channels": 17}, "channels must be 1 to 16, got 17"),
        ({"optimizer": {"betas": [0.9, 1]}}, r"each at least 0 and below 1, got \[0.9, 1\]"),
        (
            {"augmentation": {"crop_scale": [0.5, 0.2]}},
            r"augmentation.crop_scale must be two numbers .* got \[0.5, 0.2\]",
        ),
        ({"lr": 1}, r"lr is unknown \(did you mean 'optimizer.learning_rate'\?\)"),
        ({"weight_decay": 1}, r"weight_decay is unknown \(did you mean 'optimizer.weight_decay'\?\)"),
        ({"img_size": 64}, r"img_size is unknown \(did you mean 'resolution'\?\)"),
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


def test_options_name_every_value_of_a_recipe_and_each_has_a_sentence():
    fields = options()
    assert {"data", "epochs", "optimizer.learning_rate", "augmentation.flip_rate"} <= fields.keys()
    assert "optimizer" not in fields
    assert all(field.description and field.description.endswith(".") for field in fields.values())


def test_a_recipe_has_the_fields_of_a_configuration():
    recipe, config = (
        {field.name: field.default for field in dataclasses.fields(kind)} for kind in (Recipe, TrainingConfig)
    )
    assert list(recipe) == list(config)
    assert recipe["name"] == config["name"]


def test_a_recipe_shows_what_was_asked_and_is_checked_however_it_is_made():
    assert "compile=True" in repr(Recipe(compile=np.True_))
    recipe = Recipe(data=Path("some") / "folder", epochs=np.float32(2), batch_size=np.int64(8), freeze="stem, stages.0")
    assert (
        repr(recipe)
        == "Recipe(name='scratch', data='some/folder', freeze=('stem', 'stages.0'), epochs=2.0, batch_size=8)"
    )
    assert type(recipe.batch_size) is int and recipe.seed is None
    with pytest.raises(UserError, match="epochs must be above 0, got 0"):
        dataclasses.replace(recipe, epochs=0)


def test_a_section_is_given_whole_or_in_part():
    assert Recipe(mixing=Mixing(0.5)).mixing == dataclasses.asdict(Mixing(0.5))
    recipe = Recipe(optimizer={"learning_rate": 0.5})
    assert recipe.changed({"optimizer": {"weight_decay": 0}}).optimizer == {"learning_rate": 0.5, "weight_decay": 0.0}
    assert dataclasses.replace(recipe, optimizer={"weight_decay": 0}).optimizer == {"weight_decay": 0.0}
    config = config_of(mixing=Mixing(0.5), optimizer={"weight_decay": 0.25})
    assert config.mixing == Mixing(0.5) and config.optimizer.weight_decay == 0.25
    assert config.optimizer.betas == Optimization().betas


def test_nulls_of_earlier_releases_mean_that_nothing_was_asked():
    old = {"init": None, "micro_batch_size": None, "patience": None, "max_minutes": None, "num_workers": None}
    assert Recipe.from_dict(old) == Recipe()
    config = config_of()
    assert TrainingConfig.from_dict(config.to_dict() | old | {"keep_every_hours": None}) == config
    assert (config.init, config.patience, config.max_minutes, config.num_workers) == ("", 0, 0.0, "auto")
    assert config.micro_batch_size == config.batch_size


def test_a_configuration_is_frozen_and_lacks_nothing():
    config = config_of()
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.epochs = 3
    values = config.to_dict()
    with pytest.raises(UserError, match=r"^epochs is missing$"):
        TrainingConfig.from_dict({name: value for name, value in values.items() if name != "epochs"})
    assert dataclasses.replace(config, epochs=3).epochs == 3.0


def test_what_may_change_on_resumption_is_marked_at_its_field():
    marked = [
        name for name, field in fields_of(TrainingConfig).items() if field.json_schema_extra == {"may_change": True}
    ]
    assert tuple(marked) == MAY_CHANGE and {"epochs", "device", "max_minutes", "loggers"} <= set(MAY_CHANGE)
    assert not {"seed", "data", "model", "batch_size"} & set(MAY_CHANGE)


def test_changes_of_a_named_recipe_are_checked():
    with pytest.raises(UserError, match=r"optimizer\.learning_rate must be above 0"):
        named_recipe("imagenet-1k", {"optimizer": {"learning_rate": -1}})
