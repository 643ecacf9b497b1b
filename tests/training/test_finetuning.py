"""Fine-tuning: what is taken over from a bundle, which parts learn at which step, and what is refused."""

import copy
import json
import signal
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from tests.training.trainers import RecordingConsole, trainer_for

import coatnet
from coatnet.bundle import Bundle
from coatnet.cli.main import main
from coatnet.data.datasets import ArrayDataset
from coatnet.data.splits import Splits
from coatnet.data.transforms import Preprocessing, TrainingTransform
from coatnet.errors import UserError
from coatnet.model.network import create_model
from coatnet.training.checkpoint import load_checkpoint, published
from coatnet.training.config import Recipe
from coatnet.training.defaults import resolve
from coatnet.training.interruption import Interrupted
from coatnet.training.optimizer import Optimization, parameter_groups
from coatnet.training.recipes import named_recipe
from coatnet.training.run import train

DIGITS = tuple(str(digit) for digit in range(10))
LETTERS = tuple("abcdefghij")
# 1,617 digits in batches of 32: evaluated after each of six steps, the first three of them for the classifier alone.
BRIEF = {"data": "digits", "epochs": 0.1, "batch_size": 32, "evaluate_every": 0.01, "ema_decay": 0.9}
HEAD_FIRST, BORDER = 0.05, 3


def learned(classes=LETTERS, *, variant="coatnet-femto-16", multilabel=False, **preprocessing):
    """A bundle whose weights and statistics are nobody's defaults."""
    preprocessing = Preprocessing(**{"resolution": 8, "mean": (0.3,), "std": (0.4,)} | preprocessing)
    torch.manual_seed(0)
    shape = {"in_channels": preprocessing.channels, "resolution": preprocessing.resolution}
    model = create_model(variant, num_classes=len(classes), **shape)
    with torch.no_grad():
        for name, value in model.state_dict().items():
            if value.is_floating_point():
                value.add_(0.05 * torch.rand_like(value))
            elif name.endswith("num_batches_tracked"):
                value.fill_(7)
        next(model.parameters())[0, 0, 0, 0] = -0.0  # which sums lose
    return Bundle(model.eval(), classes, preprocessing, multilabel)


@pytest.fixture(scope="module")
def letters(tmp_path_factory):
    return learned().save(tmp_path_factory.mktemp("init") / "letters")


def finetune(init, **changes):
    return named_recipe("finetune", BRIEF | {"init": str(init)} | changes)


def splits_of(images, classes=DIGITS, name="pictures", *, multilabel=False):
    labels = np.arange(len(images)) % len(classes)
    labels = np.eye(len(classes), dtype=np.uint8)[labels] if multilabel else labels
    return Splits(name, *(ArrayDataset(name, classes, images, labels) for _ in range(2)))


def noise(*shape):
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def bits(tensors):
    return {name: value.contiguous().numpy().tobytes() for name, value in tensors.items()}


# What is taken over


@pytest.mark.parametrize(
    ("classes", "kept", "description"),
    [
        (DIGITS, True, ", its classifier kept"),
        (LETTERS, False, ", a new classifier for 10 classes"),
        (LETTERS[:4], False, ", a new classifier for 10 classes"),
    ],
)
def test_the_classifier_is_kept_only_for_the_same_classes(classes, kept, description):
    start = learned(classes)
    trainer = trainer_for(finetune("digits/bundle"), init=start)
    assert trainer.describe().startswith(f"coatnet-femto-16 from digits/bundle{description}, ")
    before, after = start.model.state_dict(), trainer.model.state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == (set() if kept else {"head.classifier.weight"} | ({"head.classifier.bias"} & changed))
    assert trainer.model.get_classifier().out_features == 10


def test_classes_in_another_order_keep_their_rows():
    """Such as those of an extended bundle, whose new classes stand behind the old ones."""
    start = learned(DIGITS[3:] + DIGITS[:3])
    trainer = trainer_for(finetune("digits/bundle"), init=start)
    assert ", its classifier kept" in trainer.describe()
    images = torch.rand(4, 1, 8, 8)
    with torch.no_grad():
        before, after = (model.eval()(images) for model in (start.model, trainer.model))
    torch.testing.assert_close(after, before.roll(3, 1), rtol=0, atol=1e-6)


def test_the_average_starts_from_the_weights_of_the_bundle():
    start = learned(DIGITS)
    trainer = trainer_for(finetune("digits/bundle"), init=start)
    assert bits(trainer.average.model.state_dict()) == bits(start.model.state_dict())


def test_the_preprocessing_is_that_of_the_bundle_unless_the_recipe_gives_one():
    start = learned(crop="squash", crop_fraction=0.8, interpolation="bilinear", resolution=12)
    splits = coatnet.open_dataset("digits")
    assert resolve(finetune("x"), splits, start).preprocessing == start.preprocessing
    given = finetune("x", preprocessing={"crop": "center"}, resolution=16)
    expected = replace(start.preprocessing, crop="center", resolution=16)
    assert resolve(given, splits, start).preprocessing == expected


def test_a_folder_is_stored_by_its_full_path_and_an_id_as_it_is(letters, monkeypatch):
    splits, start = coatnet.open_dataset("digits"), learned()
    monkeypatch.chdir(letters.parent)
    assert resolve(finetune("letters"), splits, start).init == str(letters)
    for init in ("timm/coatnet_0_rw_224.sw_in1k", "timm/coatnet_0_rw_224.sw_in1k@v1.0"):
        fitted = resolve(finetune(init), splits, start)
        assert fitted.init == init
        assert resolve(Recipe.from_dict(fitted.to_dict()), splits, start) == fitted


@pytest.mark.parametrize(("asked", "flip_rate"), [({}, 0.0), ({"augmentation": {"flip_rate": 0.5}}, 0.5)])
def test_small_gray_images_are_enlarged_and_shifted_for_a_color_model_of_224_pixels(asked, flip_rate):
    start = learned(variant="coatnet-femto", resolution=224, mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4))
    splits = splits_of(noise(40, 28, 28))
    recipe = finetune("x", data="fashion-mnist-small", batch_size=2, **asked)
    trainer = trainer_for(recipe, splits, start)
    config = trainer.config
    augmentation, mixing, preprocessing = config.augmentation, config.mixing, config.preprocessing
    assert preprocessing == start.preprocessing
    assert (augmentation.placement, augmentation.shift) == ("shift", 8)  # 1 of 28 pixels, enlarged
    assert (augmentation.flip_rate, augmentation.rand_augment_layers, mixing.mixup_alpha) == (flip_rate, 0, 0.0)
    transform = TrainingTransform(preprocessing, augmentation)
    images = torch.stack([transform(splits.training.images[i], seed=i) for i in range(2)])
    assert images.shape == (2, 3, 224, 224)
    loss, _ = trainer.step(images, torch.arange(2))
    assert np.isfinite(loss)


def test_photographs_for_a_small_model_are_shifted_and_mirrored():
    fitted = resolve(finetune("x"), splits_of(noise(40, 100, 100)), learned())
    assert (fitted.augmentation.placement, fitted.augmentation.flip_rate) == ("shift", 0.5)


@pytest.mark.parametrize("variant", ["coatnet-femto", "test_coatnet"])
def test_at_a_higher_resolution_the_biases_are_resampled_and_the_logits_equal_those_of_the_bundle(variant):
    start = learned(DIGITS, variant=variant, resolution=64, mean=(0.5,) * 3, std=(0.5,) * 3)
    trainer = trainer_for(finetune("x", resolution=96), init=start)
    tables = {name: value for name, value in trainer.model.named_parameters() if name.endswith("relative_bias.table")}
    assert {value.shape[1:] for name, value in tables.items() if "stages.2" in name} == {(11, 11)}
    images = torch.randn(2, 3, 96, 96)
    with torch.no_grad():
        expected = start.model(images)
        torch.testing.assert_close(trainer.model.eval()(images), expected)
        torch.testing.assert_close(trainer.average.model(images), expected)


@pytest.mark.slow
def test_at_a_constant_rate_every_step_has_the_rate_of_the_recipe(letters, tmp_path, capsys):
    arguments = ["--init", str(letters), "--data", "digits", "--out", str(tmp_path / "run"), "--resolution", "12"]
    arguments += ["--epochs", "0.1", "--batch_size", "32", "--schedule.decay", "constant"]
    assert main(["train", "finetune", *arguments, "--schedule.warmup_steps", "0"]) == 0
    capsys.readouterr()
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    recipe = Recipe.from_yaml(tmp_path / "run" / "recipe.yaml")
    assert {r["learning_rate"] for r in records if "loss" in r} == {recipe.optimizer["learning_rate"]}
    assert coatnet.load(tmp_path / "run" / "bundle").preprocessing.resolution == 12


def test_the_papers_recipes_for_a_higher_resolution_take_any_bundle():
    start = learned(variant="coatnet-femto", resolution=64, mean=(0.5,) * 3, std=(0.5,) * 3)
    recipe = named_recipe("imagenet-1k-384", {"data": "digits", "init": "x", "resolution": 96, "batch_size": 8})
    trainer = trainer_for(recipe, init=start)
    config = trainer.config
    optimizer, schedule, preprocessing = config.optimizer, config.schedule, config.preprocessing
    assert (trainer.model.variant.name, preprocessing.crop, schedule.decay) == ("coatnet-femto", "squash", "constant")
    assert (optimizer.learning_rate, optimizer.layer_decay) == (5e-5, 1.0)


# Which parts learn


@pytest.mark.parametrize("variant", ["coatnet-0", "coatnet-6", "coatnet-pico-64", "coatnet_0_rw_224", "test_coatnet"])
def test_every_block_has_its_own_learning_rate_and_every_parameter_one_group(variant):
    with torch.device("meta"):
        model = create_model(variant, num_classes=10)
    groups = parameter_groups(model, Optimization(layer_decay=0.8))["adamw"]
    num_blocks = sum(stage.depth for stage in model.variant.stages)
    scales = sorted({group["scale"] for group in groups}, reverse=True)
    assert scales == pytest.approx([0.8**i for i in range(num_blocks + 2)])
    names = [name for group in groups for name in group["names"]]
    assert sorted(names) == sorted(name for name, _ in model.named_parameters())
    assert sum(len(group["params"]) for group in groups) == len(names)


def test_frozen_parts_stay_bit_for_bit_and_have_no_optimizer_state(letters, tmp_path, capsys):
    images, out = tmp_path / "pictures", tmp_path / "run"
    for number, level in enumerate(np.linspace(20, 220, 40)):
        path = images / ("bright" if number >= 20 else "dark") / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray((level + noise(9, 9) / 9).astype(np.uint8)).save(path)
    arguments = ["--init", str(letters), "--data", str(images), "--out", str(out), "--epochs", "6"]
    arguments += ["--num_workers", "0", "--freeze", "stem,stages.0"]
    assert main(["train", "finetune", *arguments]) == 0
    opening = capsys.readouterr().err
    assert f"coatnet-femto-16 from {letters.name}, a new classifier for 2 classes, " in opening
    assert "M of them frozen" in opening
    recipe = Recipe.from_yaml(out / "recipe.yaml")
    assert recipe.freeze == ("stem", "stages.0")
    assert recipe == replace(recipe, freeze="stem, stages.0")

    start, end = bits(load_file(letters / "model.safetensors")), bits(load_file(out / "bundle" / "model.safetensors"))
    frozen = {name for name in start if name.startswith(("stem.", "stages.0."))}
    assert any(name.endswith("running_mean") for name in frozen)
    assert {name: end[name] for name in frozen} == {name: start[name] for name in frozen}
    assert all(end[name] != start[name] for name in start if name.startswith("stages.1.") and "weight" in name)
    tensors = load_checkpoint(published(out / "checkpoints")[-1]).tensors
    assert {name for name in frozen if f"optimizer.exp_avg.{name}" in tensors} == set()
    assert any(name.startswith("optimizer.exp_avg.stages.1.") for name in tensors)
    for part in ("model", "average"):
        assert bits({name: tensors[f"{part}.{name}"] for name in frozen}) == {name: start[name] for name in frozen}


@pytest.mark.parametrize(("variant", "resolution"), [("coatnet-femto-16", 8), ("test_coatnet", 64)])
def test_in_the_head_first_phase_only_the_classifier_changes_and_then_everything(variant, resolution):
    start = learned(variant=variant, resolution=resolution)
    trainer = trainer_for(finetune("x", head_first_epochs=HEAD_FIRST), init=start)
    assert f"for {BORDER} steps only the classifier learns" in trainer.describe()
    before = copy.deepcopy(trainer.model.state_dict())
    images, labels = torch.randn(32, 1, resolution, resolution), torch.arange(32) % 10
    for step in range(BORDER + 1):
        trainer.step(images, labels)
        after = trainer.model.state_dict()
        moved = {name for name, value in before.items() if not torch.equal(value, after[name])}
        states = {name for name in trainer.tensors() if name.startswith("optimizer.exp_avg.")}
        if step < BORDER:
            assert moved == {"head.classifier.weight", "head.classifier.bias"}
            assert states == {f"optimizer.exp_avg.{name}" for name in moved}
    assert moved == set(before)
    assert states == {f"optimizer.exp_avg.{name}" for name, _ in trainer.model.named_parameters()}


def test_muon_waits_while_only_the_classifier_learns():
    recipe = finetune("x", head_first_epochs=HEAD_FIRST, optimizer={"algorithm": "muon"})
    trainer = trainer_for(recipe, init=learned(resolution=8))
    before = copy.deepcopy(trainer.model.state_dict())
    for step in range(BORDER + 1):
        trainer.step(torch.randn(32, 1, 8, 8), torch.arange(32) % 10)
        moved = {name for name, value in trainer.model.state_dict().items() if not torch.equal(value, before[name])}
        assert (moved == {"head.classifier.weight", "head.classifier.bias"}) == (step < BORDER)


@pytest.fixture(scope="module")
def uninterrupted(letters, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "whole"
    report = train(head_first(letters), out, console=RecordingConsole())
    return out, report


def head_first(letters):
    return finetune(letters, head_first_epochs=HEAD_FIRST, freeze=["stem"], stochastic_depth=0.3)


@pytest.mark.slow
@pytest.mark.parametrize("step", [BORDER - 1, BORDER, BORDER + 1])
def test_a_run_interrupted_around_the_end_of_head_first_equals_the_uninterrupted_one(
    step, uninterrupted, letters, tmp_path
):
    out, report = uninterrupted
    with pytest.raises(Interrupted):
        train(head_first(letters), tmp_path / "cut", console=RecordingConsole(signal.SIGINT, at=f"(step {step})"))
    assert published(tmp_path / "cut" / "checkpoints")[-1].name == f"step-{step:09d}"
    assert train(head_first(letters), tmp_path / "cut", console=RecordingConsole()) == report
    whole, cut = (load_checkpoint(published(run / "checkpoints")[-1]).tensors for run in (out, tmp_path / "cut"))
    assert bits(whole) == bits(cut)


# What is refused


@pytest.mark.parametrize(
    ("changes", "named_in_it"),
    [
        (
            {"freeze": "stem,stage.0"},
            r"cannot freeze 'stage\.0' \(did you mean 'stages\.0'\?\): the network has stem, ",
        ),
        ({"freeze": ["stem", "stages", "head"]}, "freeze stem,stages,head is the whole network"),
        ({"freeze": "head"}, "freeze head covers the classifier, which is new"),
        ({"freeze": 3}, "freeze must be names"),
        ({"head_first_epochs": -1}, "head_first_epochs must be 0 or more"),
        ({"head_first_epochs": 0.1}, r"head_first_epochs 0\.1 leaves nothing of 0\.1 epochs"),
        ({"init": "no/such/bundle"}, "no/such/bundle"),
        ({"init": None}, "starts from a bundle: give init"),
        ({"init": None, "name": "scratch", "freeze": "stem"}, "freeze is for a network that has learned"),
        ({"init": None, "name": "scratch", "head_first_epochs": 0.05}, "head_first_epochs is for a network that has"),
        ({"variations": {"downsample": "depthwise"}}, "variations cannot be given together with init"),
    ],
)
def test_a_user_error_is_one_line_and_leaves_nothing(changes, named_in_it, letters, tmp_path):
    with pytest.raises(UserError, match=named_in_it) as error:
        train(Recipe.from_dict(finetune(letters).to_dict() | changes), tmp_path / "run", console=RecordingConsole())
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()


def test_the_classifier_does_not_learn_alone_for_all_of_a_limit(letters):
    recipe, start = finetune(letters, head_first_epochs=1.0, epochs=10), coatnet.load(letters)
    splits = coatnet.open_dataset("digits")
    resolve(recipe, splits, start, epochs_that_fit=2.0)
    with pytest.raises(UserError, match=r"leaves nothing of 0\.8 epochs that fit into max_minutes for the rest"):
        resolve(recipe, splits, start, epochs_that_fit=0.8)


def test_a_run_cannot_use_the_folder_of_the_bundle_it_starts_from(letters):
    before = {path: path.read_bytes() for path in letters.iterdir()}
    with pytest.raises(UserError, match="is not the folder of a run"):
        train(finetune(letters), letters, console=RecordingConsole())
    assert {path: path.read_bytes() for path in letters.iterdir()} == before


def test_a_frozen_classifier_cannot_learn_first():
    with pytest.raises(UserError, match="head_first_epochs is for a classifier that learns"):
        trainer_for(finetune("x", freeze="head", head_first_epochs=HEAD_FIRST), init=learned(DIGITS))


def test_the_same_classes_with_labels_of_another_kind_are_refused_and_other_classes_are_not():
    tagged = splits_of(noise(40, 8, 8), multilabel=True)
    with pytest.raises(UserError, match="pictures has several labels per image, but init learned the same classes"):
        resolve(finetune("x"), tagged, learned(DIGITS))
    with pytest.raises(UserError, match="pictures has one label per image, but init learned the same classes"):
        resolve(finetune("x"), splits_of(noise(40, 8, 8)), learned(DIGITS, multilabel=True))
    trainer = trainer_for(finetune("x"), tagged, learned(LETTERS))
    assert trainer.config.loss == "sigmoid"


def test_freeze_is_a_list_in_yaml_and_a_comma_separated_text_on_the_command_line(tmp_path, capsys):
    (tmp_path / "recipe.yaml").write_text("name: finetune\ndata: digits\ninit: x\nfreeze: [stem, stages.0]\n")
    assert main(["train", "--config", str(tmp_path / "recipe.yaml"), "--print_config"]) == 0
    from_yaml = capsys.readouterr().out
    arguments = ["--data", "digits", "--init", "x", "--freeze", "stem, stages.0", "--print_config"]
    assert main(["train", "finetune", *arguments]) == 0
    assert capsys.readouterr().out == from_yaml
    assert "freeze:\n- stem\n- stages.0\n" in from_yaml
