"""Every page keeps its word: its Python runs, its commands are understood, its links lead somewhere."""

import ast
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tests.pages import PAGES, ROOT, SHELLS, anchors, blocks, links, page_name, programs, prose
from tests.server.serving import make_predictor, running
from torch.distributed.run import get_args_parser as torchrun_parser

import coatnet
from coatnet.bundle import Bundle
from coatnet.cli.arguments.export import export_arguments
from coatnet.cli.arguments.finished import evaluate_arguments, features_arguments, probe_arguments, push_arguments
from coatnet.cli.arguments.looking import doctor_arguments, models_arguments, pack_arguments, plan_arguments
from coatnet.cli.arguments.predict import predict_arguments
from coatnet.cli.arguments.serve import serve_arguments
from coatnet.cli.arguments.train import train_arguments
from coatnet.cli.main import VERBS, main
from coatnet.data.transforms import Preprocessing
from coatnet.export import FORMATS

PARSERS: dict[str, Callable[[list[str]], Any]] = {
    "train": train_arguments,
    "evaluate": evaluate_arguments,
    "predict": predict_arguments,
    "features": features_arguments,
    "probe": probe_arguments,
    "export": export_arguments,
    "serve": serve_arguments,
    "push": push_arguments,
    "models": models_arguments,
    "doctor": doctor_arguments,
    "plan": plan_arguments,
    "pack": pack_arguments,
}
# What a page takes for granted, beside the images of the `desk`.
GIVEN = {
    "docs/guides/batch.md": ["runs/mine/bundle"],
    "docs/guides/export.md": ["runs/mine/bundle", "runs/timm/bundle"],
    "docs/guides/finetuning.md": ["runs/clothes/bundle"],
    "docs/guides/predicting.md": ["runs/mine/bundle"],
    "docs/guides/reports.md": ["runs/mine/bundle"],
    "docs/guides/serving.md": ["server"],
}
# Their blocks are those of another page, which a test compares and another runs.
SAME_AS = {"README.zh.md": "README.md", "docs/tutorial.md": "examples/tutorial.ipynb"}
RUNNABLE = [
    pytest.param(page, slow, id=page_name(page) + " slow" * slow, marks=[pytest.mark.slow] * slow)
    for page in PAGES
    for slow in (False, True)
    if page_name(page) not in SAME_AS
    and any(block.runs and ("slow" in block.words) == slow for block in blocks(page, "python", "sh"))
]
COMMANDS = [
    pytest.param(program, arguments, id=f"{page_name(page)}:{block.line} {' '.join(arguments)}")
    for page in PAGES
    for block in blocks(page, *SHELLS)
    for program in ("coatnet", "torchrun")
    for arguments in programs(block.text, program)
]


def write_images(folder: Path) -> None:
    """Thirty-two images of two classes that a network tells apart."""
    generator = np.random.default_rng(0)
    for index in range(32):
        path = folder / ("dark", "bright")[index % 2] / f"{index}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = generator.integers(0, 128, (16, 16, 3), dtype=np.uint8) + np.uint8(127 * (index % 2))
        Image.fromarray(pixels).save(path)


@pytest.fixture
def desk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a reader: three data sets, single images, a configuration."""
    for name in ("path/to/folder", "another/folder", "other/images"):
        write_images(tmp_path / name)
    noise = np.random.default_rng(1).integers(0, 255, (120, 90, 3), dtype=np.uint8)
    for name in ("holiday.jpg", "other.png", "image.jpg"):
        Image.fromarray(noise).save(tmp_path / name)
    (tmp_path / "mine.yaml").write_text(blocks(ROOT / "docs/guides/training.md", "yaml")[0].text)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COATNET_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path


@pytest.fixture(scope="session")
def digits_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A real bundle, after two epochs of handwritten digits."""
    run = tmp_path_factory.mktemp("digits") / "run"
    coatnet.train(coatnet.Recipe(data="digits", model="coatnet-femto-16", epochs=2, num_workers=0), run)
    return run / "bundle"


@pytest.fixture(scope="session")
def folder_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle of the two classes in `path/to/folder`."""
    folder = tmp_path_factory.mktemp("folder")
    write_images(folder / "images")
    recipe = coatnet.Recipe(data=str(folder / "images"), model="coatnet-femto-16", epochs=2, num_workers=0)
    coatnet.train(recipe, folder / "run")
    return folder / "run/bundle"


@contextmanager
def given(page: str, desk: Path, digits: Path, two_classes: Path) -> Iterator[Callable[[str], str]]:
    """Provide what a page takes for granted; yields what adapts its code to this place."""
    names = GIVEN.get(page, [])
    for name in names:
        if name == "runs/timm/bundle":
            torch.manual_seed(0)
            model = coatnet.create_model("test_coatnet", num_classes=2, resolution=64)
            model.train()(torch.randn(4, 3, 64, 64))
            Bundle(model.eval(), ("a", "b"), Preprocessing(resolution=64)).save(desk / name)
        elif name.startswith("runs/"):
            shutil.copytree(digits if "export" in page or "finetuning" in page else two_classes, desk / name)
    if "server" not in names:
        yield lambda text: text
        return
    with running({"mine": make_predictor(classes=("daisy", "rose", "tulip", "dandelion"))}) as address:
        yield lambda text: text.replace("127.0.0.1:8080", f"127.0.0.1:{address.port}")


@pytest.mark.filterwarnings("default")  # of the programs that open an export
@pytest.mark.parametrize(("page", "slow"), RUNNABLE)
def test_the_python_of_a_page_runs_from_top_to_bottom(
    page: Path, slow: bool, desk: Path, digits_bundle: Path, folder_bundle: Path
) -> None:
    names: dict[str, Any] = {"__name__": "__main__"}
    with given(page_name(page), desk, digits_bundle, folder_bundle) as adapted:
        for block in blocks(page, "python", "sh"):
            place = f"{page_name(page)}, line {block.line}"
            if block.language == "python":
                code = compile("\n" * block.line + adapted(block.text), page_name(page), "exec")
                if block.runs and (slow or "slow" not in block.words):
                    exec(code, names)
            elif block.runs and (slow or "slow" not in block.words):
                for arguments in programs(block.text, "coatnet"):
                    assert main(arguments) == 0, place


@pytest.mark.parametrize(("program", "arguments"), COMMANDS)
def test_a_command_is_understood(program: str, arguments: list[str], desk: Path) -> None:
    if program == "torchrun":
        parsed = torchrun_parser().parse_args(arguments)
        assert parsed.module and parsed.training_script == "coatnet"
        arguments = parsed.training_script_args
    command, *rest = arguments
    assert PARSERS.keys() == VERBS.keys()
    if "--config" in rest:
        (desk / "runs/mine").mkdir(parents=True)
        shutil.copy("mine.yaml", "runs/mine/recipe.yaml")
    PARSERS[command](rest)


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_options_in_the_text_exist(page: Path, capsys: pytest.CaptureFixture[str]) -> None:
    known = options(capsys)
    for command, text in re.findall(r"`coatnet (\w+)([^`\n]*)`", prose(page)):
        assert command in known, f"{page_name(page)}: coatnet {command}"
        wrong = set(re.findall(r"(?<=\s)--[\w.-]+", text)) - known[command]
        assert not wrong, f"{page_name(page)}: coatnet {command}{text}"


_OPTIONS: dict[str, set[str]] = {}


def options(capsys: pytest.CaptureFixture[str]) -> dict[str, set[str]]:
    """The options of each command, from its help."""
    for command in VERBS:
        if command not in _OPTIONS:
            try:
                main([command, "--help"])
            except SystemExit as end:
                assert not end.code
            _OPTIONS[command] = set(re.findall(r"--[\w.-]+", capsys.readouterr().out))
    return _OPTIONS


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_links_lead_to_files_and_headings_that_exist(page: Path) -> None:
    for link in links(page):
        target, _, anchor = link.partition("#")
        found = (page.parent / target).resolve() if target else page
        assert found.exists(), link
        assert not anchor or anchor in anchors(found), link


def test_every_export_format_has_its_command() -> None:
    guides = [ROOT / "docs/guides/export.md", ROOT / "docs/guides/triton.md"]
    calls = [call for guide in guides for block in blocks(guide, "sh") for call in programs(block.text, "coatnet")]
    assert {call[call.index("--format") + 1] for call in calls} == set(FORMATS)


def test_the_errors_that_are_explained_are_those_of_the_code() -> None:
    templates = []
    for path in (ROOT / "src/coatnet").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                parts = (str(part.value) if isinstance(part, ast.Constant) else "\0" for part in node.values)
                templates.append("".join(parts))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                templates.append(node.value)
    text = (ROOT / "docs/faq.md").read_text(encoding="utf-8").partition("## Errors, line by line")[2]
    lines = re.findall(r"^\| `(.*?)` \|", text, re.MULTILINE)
    assert len(lines) > 20
    for line in lines:
        fragments = [re.escape(fragment.strip()) for fragment in line.split("…") if fragment.strip()]
        pattern = re.compile(".*".join(fragments), re.DOTALL)
        assert any(pattern.search(template) for template in templates), line
