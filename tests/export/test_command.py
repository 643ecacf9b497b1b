"""`coatnet export`: options, and errors of one line before anything is written."""

import subprocess
import sys
from pathlib import Path

import pytest

from coatnet.cli.export import parse_arguments
from coatnet.cli.main import main
from coatnet.export import FORMATS


def error_line(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> str:
    """The line that the program prints about a user's error."""
    assert main(["export", *map(str, arguments)]) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.startswith("coatnet: error: ") and printed.err.count("\n") == 1
    return printed.err


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--format", "onnxx"], "did you mean 'onnx'?"),
        (["--format", "timm"], "timm has no such network"),
        (["--format", "safetensors", "--dynamic-size"], "leave --dynamic-size out"),
        (["--format", "onnx", "--int8", "--calibration", "digits"], "int8) is for format openvino"),
        (["--format", "openvino", "--int8"], "--int8 needs --calibration"),
        (["--format", "openvino", "--calibration", "digits"], "are for --int8"),
        (["--format", "openvino", "--int8", "--calibration", "digits", "--max-drop", "2"], "max_drop is 2.0"),
        (["--format", "openvino", "--int8", "--calibration", "digits"], "unknown to the model"),
        (["--format", "web", "--logits"], "leave --logits and --dynamic-size out"),
        (["--format", "onnx", "--fp16"], "--fp16 is for format web"),
        (["--format", "onnx", "--device", "cuda"], "--device is for format torch-export"),
        (["--format", "torch-export", "--device", "cuda:1"], "--device is 'cuda:1'; it is cpu or cuda"),
        (["--format", "onnx", "--data", "digitz"], "did you mean 'digits'?"),
        (["--format", "onnx", "--logit"], "did you mean '--logits'?"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_an_error_is_one_line_that_says_what_would_be_right(
    clothes_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], said: str
) -> None:
    assert said in error_line(capsys, clothes_bundle, "--out", tmp_path / "out", *options)
    assert list(tmp_path.iterdir()) == []


def test_a_shortage_of_memory_is_no_fault_of_the_network(
    clothes_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def write(*_: object) -> None:
        raise RuntimeError("cannot be written") from MemoryError()

    monkeypatch.setattr("coatnet.export.torch_export.write", write)
    command = ["export", str(clothes_bundle), "--format", "torch-export", "--out", str(tmp_path / "out")]
    assert main(command) == 1
    assert "there is not enough memory" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_an_existing_folder_is_not_overwritten(
    clothes_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path: path.read_bytes() for path in clothes_bundle.iterdir()}
    for out in (clothes_bundle, tmp_path):
        assert "give a new folder" in error_line(capsys, clothes_bundle, "--format", "onnx", "--out", out)
    assert {path: path.read_bytes() for path in clothes_bundle.iterdir()} == before


@pytest.mark.parametrize(
    ("format", "missing", "extra"),
    [
        ("onnx", "onnxscript", "onnx"),
        ("openvino", "openvino", "openvino"),
        ("triton", "onnxruntime", "onnx"),
        ("web", "onnxruntime", "onnx"),
    ],
)
def test_a_missing_package_is_named_with_its_extra(
    clothes_bundle: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    format: str,
    missing: str,
    extra: str,
) -> None:
    monkeypatch.setitem(sys.modules, missing, None)  # as where it is not installed
    said = error_line(capsys, clothes_bundle, "--format", format, "--out", tmp_path / "out")
    assert f"pip install 'coatnet[{extra}]'" in said and list(tmp_path.iterdir()) == []


def test_aoti_without_a_compiler_is_an_error(
    clothes_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))
    said = error_line(capsys, clothes_bundle, "--format", "aoti", "--out", tmp_path / "out")
    assert "needs a C++ compiler, and there is none" in said and list(tmp_path.iterdir()) == []


def test_the_help_names_every_format_without_importing_torch() -> None:
    code = (
        "import sys; from coatnet.cli.main import main as m; m(['export', '--help']); assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0 and all(f"  {name} " in done.stdout for name in FORMATS)


def test_options_are_parsed() -> None:
    given = parse_arguments(["b", "--format", "onnx", "--out", "o", "--logits", "--dynamic-size", "--data", "d"])
    assert (given.logits, given.dynamic_size, given.data, given.int8, given.max_drop) == (True, True, "d", False, 0.01)
