"""The README in both languages: the same commands, the family as it is counted, and a set-up that make does itself."""

import ast
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from tests.pages import ROOT, Block, blocks, links, shell_lines

from coatnet.model.complexity import complexity
from coatnet.model.registry import VARIANTS

ENGLISH, CHINESE = ROOT / "README.md", ROOT / "README.zh.md"


@pytest.mark.skipif(not shutil.which("make"), reason="make is not installed")
@pytest.mark.parametrize("target", ["demo", "test", "check"])
def test_make_sets_itself_up_once_and_again_when_what_it_needs_has_changed(target: str, tmp_path: Path) -> None:
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
        os.utime(tmp_path / name, (1, 1))

    def installs() -> bool:
        run = subprocess.run(["make", "-n", target], cwd=tmp_path, capture_output=True, text=True, check=True)
        return "pip install" in run.stdout

    assert installs()
    installed = tmp_path / ".venv/.installed"
    installed.parent.mkdir()
    installed.touch()
    assert not installs()
    (tmp_path / "constraints.txt").touch()
    os.utime(installed, (2, 2))
    assert installs()


def code(block: Block) -> object:
    """What a block does, without its comments."""
    if block.language == "python":
        return ast.dump(ast.parse(block.text))
    return shell_lines(block.text) if block.language == "sh" else re.findall(r"[\w./-]+/|\w+\.md", block.text)


def test_both_languages_have_the_same_code_and_the_same_links() -> None:
    assert [code(block) for block in blocks(ENGLISH)] == [code(block) for block in blocks(CHINESE)]
    other = {"README.md", "README.zh.md"}
    assert [link for link in links(ENGLISH) if link not in other] == [
        link for link in links(CHINESE) if link not in other
    ]


FIGURE = r"\d+\.\d+|n = [\d,]+"  # other whole numbers may be words in one of the languages


def test_both_languages_have_the_same_figures() -> None:
    """Every figure, each as often."""
    english, chinese = [sorted(re.findall(FIGURE, page.read_text(encoding="utf-8"))) for page in (ENGLISH, CHINESE)]
    assert english == chinese
    assert english


@pytest.mark.parametrize("page", [ENGLISH, CHINESE], ids=["English", "Chinese"])
def test_the_table_of_the_family_holds_what_is_counted(page: Path) -> None:
    rows = re.findall(r"^\| (coatnet-\S+ .*) \|$", page.read_text(encoding="utf-8"), re.MULTILINE)
    assert len(rows) == 12
    for row in rows:
        name, parameters, macs = [cell.split(" (")[0].replace(",", "") for cell in row.split(" | ")][:3]
        counted = complexity(VARIANTS[name], 224)
        assert float(parameters.removesuffix(" M")) == pytest.approx(counted.parameters / 1e6, rel=0.005)
        assert float(macs) == pytest.approx(counted.macs / 1e9, rel=0.005)
