"""`coatnet predict --out`: output and exit codes."""

import re
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
