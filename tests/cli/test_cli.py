"""The command line: what is printed, the exit code, and errors of one line without a traceback."""

import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from coatnet import list_variants
from coatnet.bundle import Bundle
from coatnet.cli.main import COMMANDS, main
from coatnet.data.transforms import Preprocessing
from coatnet.model.network import create_model
from coatnet.training.config import TrainingConfig

PROGRAM = [sys.executable, "-m", "coatnet"]
QUICK = ["--model", "coatnet-femto", "--resolution", "32", "--num_workers", "0"]


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An image folder with two classes: 12 dark and 12 bright images."""
    folder = tmp_path_factory.mktemp("images")
    noise = np.random.default_rng(0)
    for name, level in (("bright", 200), ("dark", 30)):
        (folder / name).mkdir()
        for number in range(12):
            pixels = (level + noise.integers(-30, 30, (32, 32, 3))).astype(np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{number}.png")
    return folder


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained model with the classes of `images`."""
    model = create_model("coatnet-femto", num_classes=2, resolution=32)
    return Bundle(model, ("bright", "dark"), Preprocessing(resolution=32)).save(
        tmp_path_factory.mktemp("model") / "bundle"
    )


def error_line(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The line that the program prints about a user's error."""
    assert main(arguments) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("coatnet: error: ") and printed.err.count("\n") == 1
    return printed.err


def help_of(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    with pytest.raises(SystemExit) as end:
        main([*arguments, "--help"])
    assert end.value.code in (0, None)
    return capsys.readouterr().out


def test_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(f"coatnet {command}" in text for command in COMMANDS)
    assert main([]) == 0 and capsys.readouterr().out == text


@pytest.mark.parametrize("command", COMMANDS)
def test_the_help_of_a_command_has_examples(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert f"examples:\n  coatnet {command}" in help_of(capsys, command)


def test_help_and_version_do_not_import_torch() -> None:
    program = (
        "import sys\nfrom coatnet.cli.main import main\n"
        "for arguments in (['--help'], ['--version'], ['evalute'], ['predict']):\n    main(arguments)\n"
        "assert not {'torch', 'numpy', 'pydantic', 'yaml'} & set(sys.modules)"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


@pytest.mark.parametrize(
    ("arguments", "answer"),
    [
        (["trian"], "'train'"),
        (["evaluate", "x", "--dta", "y"], "'--data'"),
        (["evaluate", "x"], "--data"),
        (["predict", "x", "y", "--topk", "3"], "'--top-k'"),
        (["predict", "x", "y", "--top-k", "many"], "many"),
        (["models", "coatnet-00"], "'coatnet-0'"),
        (["train", "scrach", "--data", "digits", "--out", "x"], "'scratch'"),
        (["train", "--epoch", "3"], "'--epochs'"),
        (["train", "--optimizer.learning_rat=3"], "'learning_rate'"),
        (["train", "--optimizer.lr", "3"], "'learning_rate'?); optimizer has learning_rate, weight_decay"),
        (
            ["train", "--optimizer.x", "3"],
            "has no option --optimizer.x; optimizer has learning_rate, weight_decay",
        ),
        (["train", "--optimizer", "3"], "optimizer has learning_rate"),
        (["train", "--optimizer.learning_rate", "-1"], "optimizer.learning_rate must be above 0"),
        (["train", "--compile", "maybe"], "compile must be true or false, got 'maybe'"),
        (["train", "--variations", "many"], "variations must be names with values, such as {name: value}, got 'many'"),
        (["train", "--data", "digits", "--out", "x", "--variations.downsample", "no"], "expand, depthwise"),
        (["train", "--data", "digits", "--out", "x", "--model", "coatnet-00"], "'coatnet-0'"),
        (["train", "--data", "fashion-mnist-smal", "--out", "x"], "'fashion-mnist-small'"),
        (["train", "--epochs", "many"], "epochs must be a number, got 'many'"),
        (["train", "--epochs"], "--epochs"),
        (["train", "--schedule.decay", "cosin"], "cosine, linear, constant"),
        (["train", "--data", "digits"], "--out"),
        (["train", "--out", "x"], "--data"),
        (["train", "--data", "digits", "--out", "x", "--config", "missing.yaml"], "missing.yaml"),
        (["train", "--data", "no/such/folder", "--out", "x"], "no/such/folder"),
        (["evaluate", "no/such/bundle", "--data", "digits"], "no/such/bundle"),
        (["predict", "no/such/bundle", "a.png"], "no/such/bundle"),
        (["doctor", "no/such/folder"], "no/such/folder"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_user_error_is_one_line_that_says_what_would_be_right(
    arguments: list[str],
    answer: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert answer in error_line(capsys, *arguments)
    assert not list(tmp_path.iterdir())  # nothing is written


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("epoch: 3", "run.yaml: epoch is unknown (did you mean 'epochs'?)"),
        ("optimizer: {lr: 3}", "run.yaml: optimizer.lr is unknown"),
        ("optimizer: 3", "run.yaml: optimizer must be names with values, such as {name: value}, got 3"),
        ("name: 3", "run.yaml: name must be a text, got 3"),
        ("name: scrach", "did you mean 'scratch'"),
    ],
)
def test_an_error_in_a_config_names_the_file(
    text: str, answer: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "run.yaml").write_text(text)
    out = tmp_path / "out"
    assert answer in error_line(
        capsys, "train", "--data", "digits", "--out", str(out), "--config", str(tmp_path / "run.yaml")
    )
    assert not out.exists()


def printed_recipe(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict:
    import yaml

    assert main(["train", *arguments, "--print_config"]) == 0
    return yaml.safe_load(capsys.readouterr().out)


@pytest.mark.slow
def test_a_dry_run_prints_what_a_training_would_take_and_writes_nothing(images, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    arguments = ["train", "--data", str(images), *QUICK, "--epochs", "1000", "--max_minutes", "0.2"]
    assert main([*arguments, "--dry_run"]) == 0
    text = capsys.readouterr().out
    config, _, figures = text.partition("\n\n")
    assert TrainingConfig.from_dict(yaml.safe_load(config)).model == "coatnet-femto"
    found = re.search(r"([\d.]+) of 1000 epochs, which fit into 0.2 minutes, ([\d,]+) steps: about 0\.[1-3]", figures)
    assert found and 0 < float(found[1]) < 1000
    assert re.search(r"at [\d.]+ images/s, [\d.]+ GB of memory", figures)
    assert list(tmp_path.iterdir()) == []

    assert main([*arguments[:3], "--model", "coatnet-fento", "--dry_run"]) == 2
    assert "coatnet-femto" in capsys.readouterr().err


def test_options_override_the_config_which_overrides_the_recipe(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    config = tmp_path / "run.yaml"
    config.write_text("epochs: 7\nbatch_size: 32\noptimizer: {learning_rate: 1e-2, weight_decay: 0.2}\n")
    options = ["--epochs", "9", "--optimizer.learning_rate", "3e-4"]
    for arguments in ([*options, "--config", str(config)], ["--config", str(config), *options]):
        recipe = printed_recipe(capsys, "imagenet-1k", *arguments)
        assert (recipe["name"], recipe["epochs"], recipe["batch_size"]) == ("imagenet-1k", 9, 32)
        assert recipe["optimizer"] == {"learning_rate": 3e-4, "weight_decay": 0.2, "grad_clip_norm": 1.0}


def test_options_go_over_single_variations_and_the_resolution_of_a_file(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    config = tmp_path / "run.yaml"
    config.write_text("variations: {downsample: depthwise, attention: post}\nresolution: 128\n")
    given = ["--config", str(config), "--variations.downsample", "expand", "--preprocessing.resolution", "192"]
    recipe = printed_recipe(capsys, *given)
    assert recipe["variations"] == {"downsample": "expand", "attention": "post"}
    assert recipe["resolution"] == recipe["preprocessing"]["resolution"] == 192
    assert printed_recipe(capsys, "imagenet-1k", "--preprocessing.resolution", "192")["resolution"] == 192


def test_copies_of_a_file_hold_for_its_data_and_its_division(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    config = tmp_path / "run.yaml"
    config.write_text("data: images\nkept_together: [[a.png, b.png]]\n")
    for same in ([], ["--data", "images"], ["--validation_fraction", "0.1", "--seed", "3"]):
        assert printed_recipe(capsys, "--config", str(config), *same)["kept_together"] == [["a.png", "b.png"]]
    for other in (["--data", "others"], ["--test_fraction", "0.2"], ["--fold", "1/5"], ["--folds", "5"]):
        assert "kept_together" not in printed_recipe(capsys, "--config", str(config), *other)


def test_the_printed_recipe_can_be_given_as_config(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    options = [
        "imagenet-21k",
        "--data",
        "x",
        "--compile",
        "--variations.attention",
        "post",
        "--batch-size",
        "8",
    ]
    recipe = printed_recipe(capsys, *options)
    assert recipe["compile"] is True and recipe["variations"] == {"attention": "post"} and recipe["batch_size"] == 8
    (tmp_path / "run.yaml").write_text(json.dumps(recipe))
    assert printed_recipe(capsys, "--config", str(tmp_path / "run.yaml")) == recipe


def test_train_evaluate_and_predict_in_sequence(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    arguments = ["train", "--data", str(images), "--out", str(run), "--epochs", "1", *QUICK]
    assert main(arguments) == 0
    assert "accuracy" in capsys.readouterr().out
    files = {path.name for path in run.iterdir()}
    assert {"recipe.yaml", "metrics.jsonl", "curves.png", "confusion.png", "report.md", "bundle"} <= files

    assert main(["evaluate", str(run / "bundle"), "--data", str(images), "--json"]) == 0
    measured = json.loads(capsys.readouterr().out)
    reported = json.loads((run / "report.json").read_text())
    assert measured["figures"] == pytest.approx(reported["figures"])

    assert main(["predict", str(run / "bundle"), str(images / "dark")]) == 0
    lines = capsys.readouterr().out
    assert lines.count("\n") == 12
    assert main(["predict", str(run), str(images / "dark"), "--device", "cpu"]) == 0  # the run stands for its bundle
    assert capsys.readouterr().out == lines

    assert main(arguments) == 0  # a finished run is left unchanged
    assert "is finished" in capsys.readouterr().err


def test_evaluate_writes_into_no_run_no_file_and_not_among_the_images(
    bundle: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "run").mkdir()
    (tmp_path / "run/recipe.yaml").write_text("data: digits")
    before = sorted(path for path in (images, tmp_path) for path in path.rglob("*"))
    for out, message in (
        (tmp_path / "file", "is a file: give a folder for out"),
        (tmp_path / "run", "whose own report would be replaced"),
        (bundle, "whose own report would be replaced"),
        (images / "new", "give a folder outside for out"),
    ):
        assert main(["evaluate", str(bundle), "--data", str(images), "--split", "all", "--out", str(out)]) == 2
        error = capsys.readouterr().err
        assert error.startswith("coatnet: error: ") and error.count("\n") == 1 and message in error
    assert before == sorted(path for path in (images, tmp_path) for path in path.rglob("*"))


def test_evaluate_prints_a_report(bundle: Path, images: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", str(bundle), "--data", str(images), "--split", "all"]) == 0
    assert "24 images" in capsys.readouterr().out


def test_figures_are_printed_where_the_report_cannot_be_written(
    bundle: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("coatnet.evaluation.write_report", refuse)
    out = str(tmp_path / "out")
    assert main(["evaluate", str(bundle), "--data", str(images), "--split", "all", "--out", out]) == 2
    printed = capsys.readouterr()
    assert "24 images" in printed.out and "could not be written: No space left on device" in printed.err


def test_an_unreadable_image_gets_its_own_line_and_the_others_are_predicted(
    bundle: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(images, tmp_path / "mixed")
    bad = tmp_path / "mixed" / "dark" / "0.png"
    bad.write_bytes(bad.read_bytes()[:40])
    assert main(["predict", str(bundle), str(tmp_path / "mixed"), "missing.png", "--top-k", "1"]) == 1
    printed = capsys.readouterr()
    assert printed.out.count("\n") == 23 and printed.out.count(" %\n") == 23
    assert printed.err.count("\n") == 2 and str(bad) in printed.err and "missing.png" in printed.err


def test_predictions_as_json_are_one_object_per_line(
    bundle: Path, images: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["predict", str(bundle), str(images / "dark"), "missing.png", "--json"]) == 1
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert len(lines) == 13
    assert sum(lines[0]["probabilities"].values()) == pytest.approx(1.0) and lines[0]["error"] is None
    assert lines[-1]["path"] == "missing.png" and lines[-1]["error"]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="file names that are not UTF-8")
def test_a_file_name_that_is_not_utf8_is_printed(bundle: Path, images: Path, tmp_path: Path) -> None:
    shutil.copy(images / "dark" / "1.png", os.fsencode(tmp_path) + b"/\xff.png")
    run = subprocess.run([*PROGRAM, "predict", str(bundle), str(tmp_path)], capture_output=True, text=True)
    assert run.returncode == 0 and run.stderr == ""
    assert "ff.png: " in run.stdout


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such file names")
def test_control_characters_in_a_file_name_are_escaped(
    bundle: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copy(images / "dark" / "1.png", tmp_path / "two\nlines\x1b[31m.png")
    (tmp_path / "no\r\nimage.png").write_text("text")
    assert main(["predict", str(bundle), str(tmp_path)]) == 1
    printed = capsys.readouterr()
    assert printed.out.count("\n") == 1 and r"two\nlines\x1b[31m.png: " in printed.out
    assert printed.err.count("\n") == 1 and r"no\r\nimage.png: " in printed.err
    assert main(["predict", str(bundle), str(tmp_path), "--json"]) == 1
    names = [json.loads(line)["path"] for line in capsys.readouterr().out.splitlines()]
    assert str(tmp_path / "two\nlines\x1b[31m.png") in names  # JSON has the exact name
    assert main(["evaluate", str(bundle), "--data", "no\nfolder\x1b[2J"]) == 2
    printed = capsys.readouterr().err
    assert printed.count("\n") == 1 and r"no\nfolder\x1b[2J" in printed


def test_the_help_of_train_explains_every_field_of_a_configuration(capsys: pytest.CaptureFixture[str]) -> None:
    from coatnet.training.config import options

    text = " ".join(help_of(capsys, "train").split())
    assert "tensorboard,wandb,mlflow" in text and " One of ddp, fsdp, hsdp, auto. Default: auto. " in text
    for name, field in options().items():
        assert name == "name" or (f" --{name} " in text and " ".join(field.description.split()) in text), name


def test_doctor_fails_for_an_unreadable_image(images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", str(images)]) == 0
    shutil.copytree(images, tmp_path / "bad")
    (tmp_path / "bad" / "dark" / "0.png").write_bytes(b"")
    assert main(["doctor", str(tmp_path / "bad")]) == 1
    assert "0.png" in capsys.readouterr().out


def test_strict_doctor_reports_images_that_decode_with_a_warning(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(images, tmp_path / "some")
    encoded = io.BytesIO()
    Image.fromarray(np.random.default_rng(1).integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(encoded, "JPEG")
    data = bytearray(encoded.getvalue())
    data[len(data) // 2 : len(data) // 2 + 40] = bytes(40)
    (tmp_path / "some" / "dark" / "flawed.jpg").write_bytes(data)
    assert main(["doctor", str(tmp_path / "some")]) == 0
    assert "flawed.jpg" not in capsys.readouterr().out
    assert main(["doctor", str(tmp_path / "some"), "--strict"]) == 1
    assert "flawed.jpg: " in capsys.readouterr().out


def test_models_gives_counted_and_published_figures(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["models", "coatnet-0", "coatnet-femto", "--json"]) == 0
    first, second = json.loads(capsys.readouterr().out)
    assert first["name"] == "coatnet-0" and second["published"] is None
    assert first["parameters"] == pytest.approx(first["published"]["parameters"], rel=0.01)
    assert set(first["macs"]) == {"224", "384", "512"}
    for resolution, published in first["published"]["macs"].items():
        assert 1.0 <= published / first["macs"][resolution] <= 1.04


def test_models_prints_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["models", "coatnet-0", "coatnet-femto", "coatnet-femto-16"]) == 0
    table = capsys.readouterr().out
    assert re.search(r"coatnet-femto +2\.79 +0\.53 +1\.79 +3\.69 +\n", table)
    assert re.search(r"coatnet-femto-16 +0\.62 +at 8: 0\.01 +\n", table)  # not shown at larger resolutions
    assert "25.0 (25)" in table and "4.14 (4.2)" in table


def test_models_lists_the_checkpoints_of_timm_with_their_published_accuracy(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["models", "--json"]) == 0
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)}
    assert rows.keys() == set(list_variants())
    checkpoints = {each["id"]: each for row in rows.values() for each in row["pretrained"]}
    assert len(checkpoints) == 16
    best = checkpoints["timm/coatnet_rmlp_2_rw_384.sw_in12k_ft_in1k"]
    assert best == rows["coatnet_rmlp_2_rw_384"]["pretrained"][0] and best["top1"] == 0.87388
    assert checkpoints["timm/coatnet_3_rw_224.sw_in12k"]["top1"] is None
    assert rows["coatnet_0_rw_224"]["parameters"] == pytest.approx(27.44e6, rel=1e-3)
    assert rows["coatnet_0_rw_224"]["macs"]["224"] == pytest.approx(4.43e9, rel=0.01)

    assert main(["models", "coatnet_2_rw_224"]) == 0
    table = capsys.readouterr().out
    assert re.search(r"coatnet_2_rw_224 +73\.9 +15\.0 +\.sw_in12k_ft_in1k +86\.6 %", table) and ".sw_in12k " in table


def test_a_closed_pipe_is_no_error() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    run = subprocess.run([*PROGRAM, "--help"], stdout=writing, stderr=subprocess.PIPE, text=True)
    os.close(writing)
    assert run.returncode == 141 and run.stderr == ""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="needs signals")
def test_interrupted_training_saves_and_the_same_command_resumes(images: Path, tmp_path: Path) -> None:
    command = [
        *PROGRAM,
        "train",
        "--data",
        str(images),
        "--out",
        str(tmp_path / "run"),
        "--epochs",
        "400",
        *QUICK,
    ]
    for again in (False, True):
        with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
            assert process.stderr is not None
            printed = ""
            for line in process.stderr:
                printed += line
                if "step " in line and " images/s" in line:
                    process.send_signal(signal.SIGINT)
                    break
            printed += process.stderr.read()
        assert process.returncode == 130, printed
        assert "resumes" in printed and "Traceback" not in printed
        assert ("resuming" in printed) == again
        assert list((tmp_path / "run" / "checkpoints").iterdir())


@pytest.mark.parametrize("command", ["evaluate", "features", "probe"])
def test_commands_that_compute_keep_freed_memory(command, monkeypatch, capsys):
    called = []
    monkeypatch.setattr("coatnet.system.hardware.keep_freed_memory", lambda: called.append(command))
    assert main([command, "no/model", "--data", "digits", *(["--out", "x.npy"] if command == "features" else [])]) == 2
    assert called == [command] and "no/model" in capsys.readouterr().err
