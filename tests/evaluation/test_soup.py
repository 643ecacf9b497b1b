"""Averages of models: as good as the best one or better, without what spoils them, refused where they mean nothing."""

import json
from dataclasses import replace

import pytest
import torch
from tests.training.trainers import trainer_for

import coatnet
from coatnet.bundle import Bundle
from coatnet.bundle.config import extensions
from coatnet.cli.main import main
from coatnet.data.splits import Splits
from coatnet.data.transforms import Augmentation, EvaluationTransform, TrainingTransform
from coatnet.errors import UserError
from coatnet.evaluation.soup import AS_EVALUATED, SELECTED, average_weights

BRIEF = {"data": "digits", "model": "coatnet-femto-16", "batch_size": 32, "ema_decay": 0.0, "num_workers": 0}


def trained(steps, start=None, **changes):
    """A bundle after a few real steps, without a run folder."""
    trainer = trainer_for(coatnet.Recipe(**BRIEF | changes), init=start)
    batches = trainer.batches()
    for _ in range(steps):
        trainer.step(*next(batches))
    batches.close()
    bundle = trainer.bundle()
    bundle.model.requires_grad_(False).eval()
    return bundle


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Two models fine-tuned from one, one of another start, and one whose weights were disturbed."""
    home = tmp_path_factory.mktemp("models")
    base = trained(20, epochs=0.4, optimizer={"learning_rate": 0.01, "algorithm": "muon"})
    base.save(home / "base" / "bundle")
    tuned = {
        "init": str(home / "base" / "bundle"),
        "epochs": 0.16,
        "optimizer": {"learning_rate": 3e-3, "algorithm": "muon"},
    }
    found = {name: trained(8, base, seed=seed, **tuned) for seed, name in enumerate(("one", "two"), start=1)}
    found["other"] = trained(8, seed=9, epochs=0.16)
    broken = coatnet.load(found["two"].save(home / "two" / "bundle"))
    with torch.no_grad():
        for parameter in broken.model.parameters():
            parameter.add_(0.5 * torch.randn_like(parameter))
    found["broken"] = broken
    for name, bundle in found.items():
        bundle.save(home / name / "bundle")
    return {name: home / name / "bundle" for name in (*found, "base")}


@pytest.fixture(scope="module")
def digits():
    return coatnet.open_dataset("digits")


def weights(path):
    return coatnet.load(path).model.state_dict()


@pytest.mark.slow
def test_the_average_is_at_least_as_good_as_the_best_and_a_broken_model_is_left_out(folders, digits, tmp_path):
    offered = [folders[name] for name in ("broken", "one", "two")]
    made = coatnet.soup(offered, digits)
    alone = {name: coatnet.evaluate(folders[name], digits).figures["top1"] for name in ("broken", "one", "two")}
    assert {member.name: member.figure for member in made.members} == {f"{k}/bundle": v for k, v in alone.items()}
    assert [member.figure for member in made.members] == sorted(alone.values(), reverse=True)
    assert [(member.name, member.taken) for member in made.members][-1] == ("broken/bundle", False)
    assert made.members[-1].together < made.report.figures["top1"]
    assert made.report.figures["top1"] >= max(alone.values()) > 0.8
    assert made.report == coatnet.evaluate(made.bundle, digits)
    # Calibrated as after a training, and measured by what was not fitted to the image.
    found = made.report.reliability
    assert found.num_shared == len(digits.validation) and found.error_after != found.error_before
    assert found.network == {
        name: pytest.approx(coatnet.evaluate(made.bundle.uncalibrated(), digits).figures[name], rel=1e-4)
        for name in ("nll", "brier", "calibration_error")
    }

    loaded = coatnet.load(made.bundle.save(tmp_path / "average"))
    assert coatnet.evaluate(loaded, digits) == made.report
    assert loaded.record["report"]["headline"] == made.report.headline()
    assert [row["name"] for row in loaded.record["soup"]["members"] if row["taken"]] == [
        member.name for member in made.members if member.taken
    ]
    card = (tmp_path / "average" / "README.md").read_text()
    assert "## An average of models" in card and "left out" in card and "These held-out images chose the models" in card
    assert str(folders["one"].parent.parent) not in card + (tmp_path / "average" / "config.json").read_text()


def test_weights_are_the_mean_and_statistics_those_of_training_images(folders, digits):
    one, two = (coatnet.load(folders[name]) for name in ("one", "two"))
    few = Splits("few", *(replace_images(each, 50) for each in (digits.training, digits.validation)))
    found = average_weights([one, two], few.training, 0).model
    for name, value in found.named_parameters():
        expected = (one.model.get_parameter(name) + two.model.get_parameter(name)) / 2
        torch.testing.assert_close(value, expected, rtol=1e-6, atol=1e-7)
    stem = next(module for module in found.modules() if isinstance(module, torch.nn.BatchNorm2d))
    images = EvaluationTransform(one.preprocessing).batch(torch.from_numpy(few.training.images)[:, None])
    seen = []
    stem.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    with torch.no_grad():
        found.train()(images)
    torch.testing.assert_close(stem.running_mean, seen[0].mean((0, 2, 3)), rtol=1e-4, atol=1e-5)
    assert (
        TrainingTransform(one.preprocessing, AS_EVALUATED)
        .batch(torch.from_numpy(few.training.images)[:, None], torch.arange(50).numpy().astype("uint64"))
        .equal(images)
    )
    averaged = average_weights([one, two], None, 0).model.state_dict()
    for name, value in averaged.items():
        if "running" in name:
            torch.testing.assert_close(value, (weights(folders["one"])[name] + weights(folders["two"])[name]) / 2)
    assert Augmentation("none", flip_rate=0.0) == AS_EVALUATED


def test_frozen_statistics_stay(folders, digits):
    """The weights behind them have learned with them; they are those that all models share."""
    one, two = (coatnet.load(folders[name]) for name in ("one", "two"))
    two.model.stem.load_state_dict(one.model.stem.state_dict())
    images, frozen = replace_images(digits.training, 64), one.model.stem.state_dict()
    found = average_weights([one, two], images, 0).model
    assert all(torch.equal(value, frozen[name]) for name, value in found.stem.state_dict().items())
    name, norm = [(n, m) for n, m in found.named_modules() if isinstance(m, torch.nn.BatchNorm2d)][-1]
    seen = []
    norm.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    with torch.no_grad():
        found.train()
        for module in found.stem.modules():
            module.eval()
        found(EvaluationTransform(one.preprocessing).batch(torch.from_numpy(images.images)[:, None]))
    torch.testing.assert_close(norm.running_mean, seen[0].mean((0, 2, 3)), rtol=1e-3, atol=1e-4)
    assert not torch.equal(norm.running_mean, one.model.get_submodule(name).running_mean)


def replace_images(dataset, count):
    return type(dataset)(dataset.name, dataset.classes, dataset.images[:count], dataset.labels[:count])


@pytest.mark.slow
def test_models_of_other_starts_are_said_to_be_so_and_the_best_one_stays_alone(folders, digits, tmp_path, capsys):
    command = ["soup", str(folders["one"]), str(folders["other"]), "--data", "digits", "--out", str(tmp_path / "made")]
    assert main(command) == 0
    text = capsys.readouterr().out
    assert "other/bundle started from untrained weights of seed 9, one/bundle from base/bundle: averages of" in text
    assert "No average is as good as the best model alone: the bundle is that model, calibrated." in text
    best = max(("one", "other"), key=lambda name: coatnet.evaluate(folders[name], digits).figures["top1"])
    made = coatnet.load(tmp_path / "made").uncalibrated().model.state_dict()
    for name, value in weights(folders[best]).items():
        torch.testing.assert_close(made[name], value, rtol=1e-5 if "classifier" in name else 0, atol=0)
    assert main([*command[:-1], str(tmp_path / "uniform"), "--uniform"]) == 2
    assert "only models of one start can be averaged; leave out uniform" in capsys.readouterr().err
    assert not (tmp_path / "uniform").exists()


def test_a_uniform_average_takes_all(folders, tmp_path, capsys):
    made = coatnet.soup([folders["one"], folders["two"]], uniform=True)
    assert made.report is None and all(member.taken and member.figure is None for member in made.members)
    assert made.bundle.calibration is None and "not calibrated (no images)" in made.to_text()
    assert "BatchNorm statistics are averaged" in made.to_text()
    out = str(tmp_path / "made")
    (folders["one"].parent / "recipe.yaml").write_text("data: digits\n")  # a run says where its images are
    assert main(["soup", str(folders["one"].parent), str(folders["broken"]), "--out", out, "--uniform", "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["rule"] == "uniform" and [row["taken"] for row in record["members"]] == [True, True]
    assert "The best model alone has" in record["summary"] and SELECTED not in record["summary"]

    one, two = (coatnet.load(folders[name]) for name in ("one", "two"))
    first, second = ({"data": data, "added": [one.classes[0]]} for data in ("first", "second"))
    one, two = (
        replace(bundle, record={**bundle.record, "extension": {**last, "earlier": earlier}})
        for bundle, last, earlier in ((one, first, []), (two, second, [first]))
    )
    assert extensions(coatnet.soup([one, two], uniform=True).bundle.record) == [first, second]

    (folders["one"].parent / "recipe.yaml").write_text(f"data: {tmp_path / 'gone'}\n")
    command = ["soup", str(folders["one"].parent), str(folders["two"]), "--out", out]
    assert main(command) == 2 and "no dataset at" in capsys.readouterr().err
    assert main([*command, "--uniform"]) == 0
    printed = capsys.readouterr()
    assert "gone is not there any more, so nothing is measured" in printed.err and "(no images)" in printed.out
    (folders["one"].parent / "recipe.yaml").write_text("data: digits\n")


def test_a_full_disk_costs_the_model_and_not_the_figures(folders, tmp_path, monkeypatch, capsys):
    def full(*_, **__):
        raise UserError("no space left")

    monkeypatch.setattr(Bundle, "save", full)
    models = [str(folders["one"]), str(folders["two"])]
    assert main(["soup", *models, "--data", "digits", "--out", str(tmp_path / "made")]) == 2
    printed = capsys.readouterr()
    assert "no space left" in printed.err and "of 2 models: " in printed.out and "The averaged model" not in printed.out


def test_what_does_not_belong_together_is_refused(folders, digits, tmp_path, capsys):
    one = coatnet.load(folders["one"])
    seen = replace(one, preprocessing=replace(one.preprocessing, crop_fraction=0.9))
    wide = coatnet.create_model("coatnet-pico-64", num_classes=10, in_channels=1, resolution=8)
    split = replace(one, record={"recipe": {"validation_fraction": 0.2}})
    recipe = one.record["recipe"]
    tested = replace(one, record={"recipe": recipe | {"test_fraction": 0.2}})
    copies = replace(one, record={"recipe": recipe | {"kept_together": [["0", "1"]]}})
    for other, message in (
        (
            replace(one, classes=(*one.classes[:-1], "another")),
            "the list of classes of model 2 is another than of model 1",
        ),
        (seen, r"preprocessing.crop_fraction of model 2 is another than of model 1 \(0.9, not 1.0\): give models that"),
        (Bundle(wide, one.classes, one.preprocessing), r"the network of model 2 .* \(coatnet-pico-64, not coatnet-fem"),
        (replace(one, multilabel=True), r"multilabel of model 2 is another than of model 1 \(True, not False\)"),
        (split, r"validation_fraction of model 2 is another than of model 1 \(0.2, not 0.1\)"),
        (tested, r"test_fraction of model 2 is another than of model 1 \(0.2, not 0.0\)"),
        (copies, "kept_together of model 2 is another than of model 1"),
    ):
        with pytest.raises(UserError, match=message):
            coatnet.soup([one, other], digits)
    with pytest.raises(UserError, match="two models or more"):
        coatnet.soup([one], digits)
    with pytest.raises(UserError, match="is named twice: name each model once"):
        coatnet.soup([folders["one"], folders["one"]], digits)
    with pytest.raises(UserError, match="one/bundle is named twice"):  # a run stands for its bundle
        coatnet.soup([folders["one"].parent, folders["one"]], digits)
    with pytest.raises(UserError, match="data must be what open_dataset opens"):
        coatnet.soup([one, one], digits.training)
    with pytest.raises(UserError, match="data is missing: give the images to choose by"):
        coatnet.soup([one, one])

    base, two, out = str(folders["base"]), str(folders["two"]), str(tmp_path / "out")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "letter.txt").write_text("mine")
    for arguments, message in (
        ([base, two, "--out", out], "--data is missing"),
        ([base, two, "--data", "digits", "--out", two], "would replace a model that is read"),
        ([base, two, "--data", "digits", "--out", str(tmp_path / "full")], "holds something else than a bundle"),
        ([base, "--data", "digits", "--out", out], "two models or more"),
        ([base, "no/such", "--data", "digits", "--out", out], "no/such is not a bundle"),
    ):
        assert main(["soup", *arguments]) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()
