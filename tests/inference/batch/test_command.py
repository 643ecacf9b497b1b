"""`coatnet predict --out`: output and exit codes."""

import re
import sys
from pathlib import Path

import pytest

from coatnet.cli.main import main

parquet = pytest.importorskip("pyarrow.parquet")
GUIDE = Path(__file__).resolve().parents[3] / "docs" / "guides" / "batch.md"


def test_unreadable_files_are_named_and_set_the_exit_code(
    bundle: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out.parquet"
    arguments = ["predict", str(bundle), str(images), "--out", str(out), "--engine", "torch", "--top-k", "2"]
    for _ in range(2):  # the second time the file is only reported
        assert main(arguments) == 1
        printed = capsys.readouterr()
        assert printed.out == f"{out}: 151 images, 2 of which could not be used\n"
        assert printed.err.count("\n") == 2 and "70.png: truncated" in printed.err and "page.jpg: format" in printed.err
    assert len(parquet.read_table(out)["classes"][0]) == 2


def test_exit_code_is_zero_if_all_files_are_readable(
    bundle: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out.parquet"
    assert main(["predict", str(bundle), str(images / "0.png"), "--out", str(out), "--engine", "torch"]) == 0
    assert capsys.readouterr() == (f"{out}: 1 image\n", "")


def test_a_finished_file_says_how_images_that_needed_a_package_are_computed(
    bundle: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.heic").write_bytes(b"\0\0\0\x18ftypheic" + bytes(20))
    for package in ("pi_heif", "pillow_heif"):
        monkeypatch.setitem(sys.modules, package, None)
    out = tmp_path / "out.parquet"
    given = [str(bundle), str(images / "0.png"), str(tmp_path / "a.heic")]
    for _ in range(2):  # the second time the file is only reported
        assert main(["predict", *given, "--out", str(out), "--engine", "torch"]) == 1
        assert capsys.readouterr().out == (
            f"{out}: 2 images, 1 of which could not be used; once the package is installed, remove the file, and the "
            "same command computes it anew\n"
        )


@pytest.mark.parametrize(
    ("launched", "gpus"),
    [
        ({"RANK": "3", "WORLD_SIZE": "4"}, [1]),  # of two GPUs
        ({"RANK": "0", "WORLD_SIZE": "4"}, []),
        ({"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"}, []),
        ({"RANK": "2", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}, [1]),
    ],
)
def test_a_process_has_the_gpu_of_its_local_rank_or_of_its_rank(
    bundle: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, launched: dict, gpus: list[int]
) -> None:
    chosen: list[int] = []
    for name, value in launched.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setattr("torch.cuda.set_device", chosen.append)
    arguments = ["predict", str(bundle), str(images / "bee"), "--out", str(tmp_path / "out.csv")]
    assert main([*arguments, "--engine", "torch", "--precision", "fp32", "--device", "cpu"]) in (0, 1)
    assert chosen == gpus


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--out", "x.xlsx"], "x.xlsx: predictions are written to a .parquet or a .csv"),
        (["--out", "x.parquet", "--json"], "--json is for lines, --out for a file"),
        (["--out", "x.parquet", "--top-k", "0"], "top_k is 0"),
        (["--out", "x.parquet", "--engine", "tensor"], "tensor"),
        (["--out", "x.parquet", "--views", "all"], "views"),
    ],
)
def test_errors_are_one_line_and_leave_no_files(
    bundle: Path,
    images: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    options: list[str],
    words: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["predict", str(bundle), str(images), *options]) == 2
    said = capsys.readouterr().err
    assert words in said and said.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_the_guide_lists_the_columns_of_the_file() -> None:
    from coatnet.inference.batch.parts import schema

    named = re.findall(r"^\| `(\w+)` \|", GUIDE.read_text(encoding="utf-8"), re.MULTILINE)
    assert named == schema().names
