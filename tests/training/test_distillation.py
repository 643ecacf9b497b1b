"""Distillation: its loss is the formula, the teacher stays as it is, sees what it should, and runs resume exactly."""

import copy
import json
import signal
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tests.training.test_finetuning import DIGITS, bits, learned, noise, splits_of
from tests.training.trainers import RecordingConsole, trainer_for
from torch.distributions import Bernoulli, Categorical, kl_divergence

import coatnet
from coatnet.data.mixing import mix
from coatnet.data.transforms import EvaluationTransform, Preprocessing
from coatnet.errors import UserError
from coatnet.inference.logits import infer
from coatnet.training import distillation
from coatnet.training.checkpoint import load_checkpoint, published
from coatnet.training.config import Recipe
from coatnet.training.distillation import change_preprocessing, divergence
from coatnet.training.interruption import Interrupted
from coatnet.training.run import train
from coatnet.training.trainer import step_seed

MIXED = {"mixup_alpha": 0.8, "label_smoothing": 0.1}
BRIEF = {"data": "digits", "model": "coatnet-femto-16", "epochs": 0.1, "batch_size": 32, "micro_batch_size": 20}
BRIEF |= {"evaluate_every": 0.039, "ema_decay": 0.9, "mixing": MIXED, "precision": "fp32"}


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A teacher of color images of another size and level, whose classes are in another order."""
    other = {"resolution": 16, "mean": (0.4, 0.5, 0.6), "std": (0.2, 0.3, 0.4), "crop_fraction": 1.0}
    return learned(DIGITS[::-1], **other).save(tmp_path_factory.mktemp("teachers") / "mine" / "bundle")


def following(teacher, **distillation):
    return Recipe(**BRIEF, teacher=str(teacher), distillation=distillation)


def batch(trainer):
    batches = trainer.batches()
    found = next(batches)
    batches.close()
    return found


# The loss


@pytest.mark.parametrize("multilabel", [False, True])
def test_the_divergence_is_that_of_torchs_distributions(multilabel):
    student, teacher, temperature = 3 * torch.randn(6, 5), 3 * torch.randn(6, 5), 1.7
    kind, probabilities = (Bernoulli, torch.sigmoid) if multilabel else (Categorical, lambda x: x.softmax(1))
    p, q = (kind(logits=(each / temperature).double()) for each in (teacher, student))
    expected = temperature**2 * kl_divergence(p, q).sum()
    found = divergence(student, probabilities(teacher / temperature), temperature, multilabel=multilabel)
    assert float(found) == pytest.approx(float(expected), rel=1e-5)
    same = divergence(teacher, probabilities(teacher / temperature), temperature, multilabel=multilabel)
    assert float(same) == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize("views", ["same", "fixed"])
def test_a_step_adds_the_divergence_from_the_teacher_on_the_mixed_images(views, home, tmp_path):
    recipe = replace(following(home, views=views, weight=0.7, temperature=3.0), micro_batch_size=32)
    splits = splits_of(noise(48, 8, 8))
    trainer = trainer_for(recipe, splits)
    trainer.folder.path = tmp_path
    trainer.compute_teacher_logits()
    images, labels, indices = batch(trainer)
    student, teacher = copy.deepcopy(trainer.model), coatnet.load(home)
    student.get_classifier()._forward_pre_hooks.clear()
    loss, _ = trainer.step(images, labels, indices)

    seed, mixing = step_seed(0, 0), trainer.config.mixing
    mixed, targets = mix(images, labels, num_classes=10, mixing=mixing, seed=seed)
    seen = change_preprocessing(mixed, trainer.config.preprocessing, teacher.preprocessing)
    with torch.no_grad():
        logits, answers = student(mixed), (teacher.model(seen).flip(1) / 3).softmax(1)
        if views == "fixed":  # of each image as it is, blended like the labels
            whole = [splits.training.read(int(index))[0] for index in indices]
            views_of_teacher = torch.stack([EvaluationTransform(teacher.preprocessing)(image) for image in whole])
            answers = (teacher.model(views_of_teacher).flip(1) / 3).softmax(1)
            unsmoothed = replace(mixing, label_smoothing=0.0)
            _, answers = mix(images, answers, num_classes=10, mixing=unsmoothed, seed=seed)
    followed = 9 * kl_divergence(Categorical(probs=answers), Categorical(logits=logits / 3)).mean()
    expected = 0.3 * F.cross_entropy(logits, targets) + 0.7 * followed
    assert loss == pytest.approx(float(expected), rel=1e-3 if views == "fixed" else 1e-5)  # kept in half precision


def test_only_the_network_learns_and_micro_batches_change_nothing(home):
    losses = []
    for micro in (32, 20, 7):
        recipe = replace(
            following(home, feature_weight=0.5), micro_batch_size=micro, variations={"mbconv_norm": "layer"}
        )
        trainer = trainer_for(recipe)
        trainer.model.stem.eval()  # its BatchNorm would see other batches
        before, weights = (
            bits(trainer.teacher.model.state_dict()),
            copy.deepcopy(trainer.model.get_classifier().weight),
        )
        losses.append(trainer.step(*batch(trainer)))
        assert bits(trainer.teacher.model.state_dict()) == before == bits(coatnet.load(home).model.state_dict())
        assert not trainer.teacher.model.training
        assert all(each.grad is None for each in trainer.teacher.model.parameters())
        assert not torch.equal(trainer.model.get_classifier().weight, weights)
    assert losses[1] == pytest.approx(losses[0], rel=1e-4) and losses[2] == pytest.approx(losses[0], rel=1e-4)


def test_a_network_learns_what_only_the_teacher_knows(home):
    """The labels have no part in the loss: what remains is the distance from the teacher, and from its features."""
    recipe = following(home, weight=1.0, feature_weight=1.0)
    trainer = trainer_for(replace(recipe, optimizer={"learning_rate": 3e-3}, schedule={"decay": "constant"}))
    given = batch(trainer)
    projection = trainer.teacher.tensors()[distillation.PROJECTION].detach().clone()
    losses = [trainer.step(*given)[0] for _ in range(15)]
    assert losses[-1] < 0.5 * losses[0]
    assert not torch.equal(projection, trainer.teacher.tensors()[distillation.PROJECTION])


# What the teacher sees


def test_a_view_is_changed_to_the_teachers_preprocessing():
    gray = Preprocessing(resolution=12, crop_fraction=1.0, mean=(0.3,), std=(0.2,))
    color = Preprocessing(resolution=12, crop_fraction=1.0, mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6))
    pixels = torch.from_numpy(96 + noise(2, 3, 12, 12) // 4)  # nothing is clamped
    images = EvaluationTransform(color).batch(pixels)
    assert change_preprocessing(images, color, color) is images
    for wanted in (gray, replace(color, resolution=24), replace(gray, resolution=7, interpolation="bilinear")):
        found = change_preprocessing(images, color, wanted)
        # uint8 pixels are rounded, floating ones are not
        torch.testing.assert_close(found, EvaluationTransform(wanted).batch(pixels), rtol=0, atol=0.02)
    enlarged = change_preprocessing(EvaluationTransform(gray).batch(pixels[:, :1]), gray, color)
    torch.testing.assert_close(enlarged, EvaluationTransform(color).batch(pixels[:, :1]), rtol=0, atol=1e-5)


def test_several_labels_an_image_are_followed_class_by_class(tmp_path):
    splits = splits_of(noise(40, 8, 8), multilabel=True)
    learned(DIGITS, multilabel=True).save(tmp_path / "t")
    trainer = trainer_for(Recipe(data="x", teacher=str(tmp_path / "t"), model="coatnet-femto-16"), splits)
    targets = trainer.prepare_batch(*batch(trainer))[1]
    assert targets.shape[1] == 20 and float((targets[:, 10:].sum(1) - 1).abs().min()) > 0.01  # no softmax
    with pytest.raises(UserError, match="pictures has one label per image, but the teacher learned with several"):
        trainer_for(Recipe(data="x", teacher=str(tmp_path / "t")), splits_of(noise(40, 8, 8)))


@pytest.mark.parametrize(
    ("classes", "message"),
    [
        ((*DIGITS, "ten"), "the teacher also knows ten: it must have the 10 classes of digits"),
        (DIGITS[1:], "the teacher does not know 0: it must"),
        (tuple("abcdefghij"), "does not know 0, 1, 2, 3, 4 and 5 more and also knows a, b, c, d, e and 5 more"),
    ],
)
def test_a_teacher_of_other_classes_is_refused(classes, message, tmp_path):
    learned(classes).save(tmp_path / "t")
    with pytest.raises(UserError, match=message):
        train(following(tmp_path / "t"), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"distillation": {"weight": 0.5}}, "distillation needs a teacher: give teacher as well"),
        ({"teacher": "no/such"}, "no/such is not a bundle"),
        ({"teacher": "t", "distillation": {"weight": 1.5}}, "distillation.weight must be 0 to 1, got 1.5"),
        ({"teacher": "t", "distillation": {"temperature": 0}}, "distillation.temperature must be above 0, got 0"),
        (
            {"teacher": "t", "distillation": {"views": "fixed", "feature_weight": 1}},
            "distillation.feature_weight is for views same",
        ),
    ],
)
def test_a_recipe_that_contradicts_itself_is_refused(asked, message, tmp_path):
    with pytest.raises(UserError, match=message):
        train(Recipe(**BRIEF | asked), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_answers_that_take_too_much_memory_are_refused(home, monkeypatch):
    monkeypatch.setattr(distillation, "MAX_STORED_BYTES", 20_000)
    with pytest.raises(UserError, match=r"views fixed would keep 0 GiB of logits.*give views same"):
        trainer_for(following(home, views="fixed"))


# Runs


@pytest.mark.parametrize("asked", [{"feature_weight": 0.5}, {"views": "fixed"}], ids=["features", "fixed"])
def test_a_resumed_run_equals_one_that_never_stopped(asked, tmp_path, monkeypatch):
    recipe = following(learned(DIGITS).save(tmp_path / "mine" / "bundle"), **asked)
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    stop(recipe, whole, after=4)
    stop(recipe, cut, after=2)
    if asked == {"views": "fixed"}:  # a pass over the images is not made twice
        monkeypatch.setattr(distillation, "infer", None)
    text = stop(Recipe.from_yaml(cut / "recipe.yaml"), cut, after=4)
    ends = [load_checkpoint(published(run / "checkpoints")[-1]).tensors for run in (whole, cut)]
    assert bits(ends[0]) == bits(ends[1]) and (distillation.PROJECTION in ends[0]) == ("feature_weight" in asked)
    assert "following mine/bundle (coatnet-femto-16)" in text and "warning" not in text


def stop(recipe, out, after):
    """Train until the evaluation after a step, and return what was said."""
    console = RecordingConsole(signal.SIGINT, at=f"(step {after})")
    with pytest.raises(Interrupted):
        train(recipe, out, console=console)
    return console.text


def test_the_bundle_names_the_teacher_and_holds_the_network_alone(home, tmp_path):
    bundle = coatnet.load(trainer_for(following(home, feature_weight=0.5)).bundle().save(tmp_path / "made"))
    assert bundle.record["recipe"]["teacher"] == "mine/bundle"
    assert str(home.parent.parent) not in json.dumps(bundle.record)
    assert set(bundle.model.state_dict()) == set(learned(DIGITS).model.state_dict())


def test_another_teacher_is_noted_when_a_run_is_resumed(tmp_path):
    teacher = learned(DIGITS)
    teacher.save(tmp_path / "t")
    stop(following(tmp_path / "t", views="fixed"), tmp_path / "run", after=2)
    with torch.no_grad():
        teacher.model.get_classifier().weight.mul_(2)
    teacher.save(tmp_path / "t")
    text = stop(following(tmp_path / "t", views="fixed"), tmp_path / "run", after=4)
    assert "the teacher t, or the release of coatnet or torch, is another than when the run began" in text
    assert len(list((tmp_path / "run").glob("teacher-*.npy"))) == 2  # the new one has its own


def test_a_teacher_of_another_width_is_refused_where_features_have_been_followed(tmp_path):
    learned(DIGITS).save(tmp_path / "t")
    stop(following(tmp_path / "t", feature_weight=0.5), tmp_path / "run", after=2)
    learned(DIGITS, variant="coatnet-nano-64").save(tmp_path / "t")
    with pytest.raises(UserError, match=r"began with a teacher of 128 features, .* this one has 256: give the one"):
        train(following(tmp_path / "t", feature_weight=0.5), tmp_path / "run")


def test_the_answers_are_those_of_the_teachers_own_evaluation(home, tmp_path):
    teacher, splits = coatnet.load(home), splits_of(noise(150, 8, 8))
    trainer = trainer_for(following(home, views="fixed"), splits)
    trainer.folder.path = tmp_path
    assert trainer.teacher.stored(torch.arange(3)).isnan().all()  # of a dry run, which follows the labels
    trainer.compute_teacher_logits()
    batches = infer(
        teacher.model,
        splits.training,
        preprocessing=teacher.preprocessing,
        batch_size=50,
        bad_images=trainer.bad_images,
    )
    expected = torch.cat([outputs for outputs, *_ in batches]).flip(1)
    found = trainer.teacher.stored(torch.arange(len(splits.training)))
    torch.testing.assert_close(found, (expected / 2).softmax(1), rtol=0, atol=2e-3)

    trainer.teacher.logits = np.array(trainer.teacher.logits)
    images, labels, indices = batch(trainer)
    trainer.teacher.logits[indices[4]] = np.nan  # an image that could not be read
    targets = trainer.prepare_batch(images, labels, indices)[1]
    labels_only = [4, 5]  # 5 is mixed with it
    assert targets.isfinite().all() and torch.equal(targets[labels_only, :10], targets[labels_only, 10:])
    assert not torch.equal(targets[:, :10], targets[:, 10:])


def test_a_teacher_of_other_values_sees_the_same_values():
    ours = Preprocessing(resolution=8, mean=(0.2,), std=(0.5,), value_range=(0, 100))
    theirs = Preprocessing(resolution=8, mean=(0.4,), std=(0.3,), value_range=(-50, 150))
    values = np.random.default_rng(0).uniform(0, 100, (8, 8, 1)).astype(np.float32)
    seen = [EvaluationTransform(each)(each.scale.levels(values))[None] for each in (ours, theirs)]
    torch.testing.assert_close(change_preprocessing(seen[0], ours, theirs), seen[1], rtol=1e-4, atol=1e-5)
