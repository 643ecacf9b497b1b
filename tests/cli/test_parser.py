"""How options are spelled: hyphens or underscores, under their usual names elsewhere, and under their old names."""

import io
from importlib import import_module

import pytest

from coatnet.cli import evaluate, features, predict, train
from coatnet.cli.main import main
from coatnet.cli.parser import spell_options
from coatnet.errors import UserError, nearest_option

FEATURES = ["bundle", "--out", "x.npy"]


def test_an_option_is_accepted_with_hyphens_and_with_underscores() -> None:
    for spelling in ("--top-k", "--top_k"):
        assert predict.parse_arguments(["bundle", "image.jpg", spelling, "3"]).top_k == 3
        assert predict.parse_arguments(["bundle", "image.jpg", f"{spelling}=3"]).top_k == 3
    for spelling in ("--batch-size", "--batch_size"):
        recipe, _ = train.parse_arguments(["--data", "digits", "--out", "x", spelling, "8"])
        assert recipe.batch_size == 8


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["predict", "bundle", "a.jpg", "--out", ""], "--out is empty: give a path"),
        (["predict", "bundle", "a.jpg", "--tiles", "auto", "--tile-maps="], "--tile-maps is empty: give a path"),
        (["evaluate", "bundle", "--data", "digits", "--out", ""], "--out is empty: give a path"),
        (["compare", "a", "b", "--out", ""], "--out is empty: give a path"),
        (["doctor", "digits", "--write", ""], "--write is empty: give a path"),
        (["doctor", "digits", "--html", ""], "--html is empty: give a path"),
        (["soup", "a", "b", "--out", "c", "--data", ""], "--data is empty: give a path"),
        (["pack", "digits", ""], "OUT is empty: give a path"),
        (["doctor", "digits", "--html", "s3://bucket/page.html"], "s3://bucket/page.html is a URL"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_a_path_that_cannot_be_written_is_one_line_before_any_work(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    printed = capsys.readouterr()
    assert message in printed.err and printed.err.count("\n") == 1 and not printed.out


def test_what_stands_behind_two_hyphens_is_no_option() -> None:
    assert predict.parse_arguments(["bundle", "--", "--top_k"]).paths == ["--top_k"]


def test_values_are_not_respelled() -> None:
    assert spell_options("x", ["--out-file"], ["a_b", "--out_file=c_d", "e-f"]) == ["a_b", "--out-file=c_d", "e-f"]


@pytest.mark.parametrize(
    ("arguments", "answer"),
    [
        (["--gpu", "0"], "'--device'"),
        (["--output", "x"], "'--out'"),
        (["-o", "x"], "'--out'"),
        (["--bs", "8"], "'--batch-size'"),
        (["--batch", "8"], "'--batch-size'"),
        (["--format", "parquet"], "'--out'"),
        (["--dataset", "x"], "'--data'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_usual_name_leads_to_the_option_of_this_program(arguments: list[str], answer: str) -> None:
    with pytest.raises(UserError, match=f"has no option {arguments[0]} .did you mean {answer}"):
        features.parse_arguments([*FEATURES, *arguments])


@pytest.mark.parametrize(
    ("given", "answer"),
    [
        ("--lr", "--optimizer.learning_rate"),
        ("--bs", "--batch_size"),
        ("--output", "--out"),
        ("--workers", "--num_workers"),
        ("--opt", "--optimizer.algorithm"),
        ("--momentum", "--optimizer.betas"),
        ("--steps", "--epochs"),
        ("--dropout", "--stochastic_depth"),
    ],
)
def test_a_usual_name_leads_to_the_option_of_train(given: str, answer: str) -> None:
    with pytest.raises(UserError, match=f"did you mean '{answer}'"):
        train.parse_arguments([given, "1"])


def test_a_usual_name_without_an_equivalent_leads_to_no_other_option() -> None:
    assert nearest_option("--format", ["--port", "--host"]) == ""
    assert nearest_option("--prot", ["--port", "--host"]) == " (did you mean '--port'?)"


def test_a_usual_option_that_does_not_exist_has_a_reason() -> None:
    for given, reason in (
        ("--shuffle", "training images are shuffled, others keep their order"),
        ("--ngpus", "--device names a GPU; train and predict use several under torchrun --nproc-per-node N"),
        ("--num-classes", "the classes are those of the data"),
    ):
        with pytest.raises(UserError, match=f"has no option {given}: {reason}; --help lists them"):
            train.parse_arguments([given, "1"])


def test_the_old_name_of_an_option_is_accepted_with_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    given = features.parse_arguments([*FEATURES, "--pictures", "a.jpg", "b.jpg"])
    assert given.images == ["a.jpg", "b.jpg"]
    warning = capsys.readouterr().err
    assert "--pictures is deprecated" in warning and "use --images" in warning and warning.count("\n") == 1
    with pytest.raises(SystemExit):
        features.parse_arguments(["--help"])
    assert "--pictures" not in capsys.readouterr().out


@pytest.mark.parametrize(("device", "answer"), [("cudda", "did you mean 'cuda'"), ("tpu", "it is auto, cpu, cuda or")])
def test_a_wrong_device_is_one_line(device: str, answer: str) -> None:
    with pytest.raises(UserError, match=answer):
        evaluate.run(["bundle", "--data", "digits", "--device", device])


def test_a_missing_gpu_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="device cuda:1 is not there: torch finds no GPU"):
        evaluate.run(["bundle", "--data", "digits", "--device", "cuda:1"])


def test_a_closed_pipe_ends_the_list_of_models_as_other_output(monkeypatch: pytest.MonkeyPatch) -> None:
    class Closed(io.StringIO):
        def write(self, text: str) -> int:
            raise BrokenPipeError

    monkeypatch.setattr("sys.stdout", Closed())
    with pytest.raises(BrokenPipeError):
        import_module("coatnet.cli.models").run(["coatnet-femto-16"])
