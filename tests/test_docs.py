"""Every page keeps its word: its Python runs, its commands are understood, its links lead somewhere."""

import ast
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
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
from coatnet.cli import parser
from coatnet.cli.main import COMMANDS, main
from coatnet.data.decode import MAX_PIXELS, MAX_SIDE
from coatnet.data.transforms import Preprocessing
from coatnet.export import FORMATS
from coatnet.training.recipes import RECIPES
from coatnet.training.run_folder import MAY_CHANGE

# What a page takes for granted, beside the images of the `desk`.
GIVEN = {
    "docs/guides/batch.md": ["runs/mine/bundle"],
    "docs/guides/export.md": ["runs/mine/bundle", "runs/timm/bundle"],
    "docs/guides/finetuning.md": ["runs/clothes/bundle"],
    "docs/guides/explaining.md": ["runs/mine/bundle"],
    "docs/guides/integrations.md": ["runs/mine/bundle"],
    "docs/guides/predicting.md": ["runs/mine/bundle"],
    "docs/guides/reports.md": ["runs/mine/bundle"],
    "docs/guides/reliability.md": ["runs/mine/bundle"],
    "docs/guides/serving.md": ["server"],
}
# Parts of what the Python of a page prints.
PRINTED = {
    "README.md": ["accuracy", "bright"],
    "docs/guides/predicting.md": ["holiday.jpg {'", "image 1 {'", "(('"],
    "docs/guides/serving.md": [" %  "],
}
# Their blocks are those of another page, which a test compares and another runs.
SAME_AS = {"README.zh.md": "README.md", "docs/tutorial.md": "examples/tutorial.ipynb"}
RUNNABLE = [
    pytest.param(page, nightly, id=page_name(page) + " nightly" * nightly, marks=[pytest.mark.nightly] * nightly)
    for page in PAGES
    for nightly in (False, True)
    if page_name(page) not in SAME_AS
    and any(block.runs and ("nightly" in block.words) == nightly for block in blocks(page, "python", "sh"))
]
CALLS = [
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
def folder_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle of the two classes in `path/to/folder`."""
    folder = tmp_path_factory.mktemp("folder")
    write_images(folder / "images")
    recipe = coatnet.Recipe(data=str(folder / "images"), model="coatnet-femto-16", epochs=2, num_workers=0)
    coatnet.train(recipe, folder / "run")
    return folder / "run/bundle"


@contextmanager
def given(page: str, desk: Path, clothes: Path, two_classes: Path) -> Iterator[Callable[[str], str]]:
    """Provide what a page takes for granted; yields what adapts its code to this place."""
    names = GIVEN.get(page, [])
    for name in names:
        if name == "runs/timm/bundle":
            torch.manual_seed(0)
            model = coatnet.create_model("test_coatnet", num_classes=2, resolution=64)
            model.train()(torch.randn(4, 3, 64, 64))
            Bundle(model.eval(), ("a", "b"), Preprocessing(resolution=64)).save(desk / name)
        elif name.startswith("runs/"):
            shutil.copytree(
                clothes if any(name in page for name in ("export", "finetuning", "reliability")) else two_classes,
                desk / name,
            )
    if "server" not in names:
        yield lambda text: text
        return
    with running({"mine": make_predictor(classes=("daisy", "rose", "tulip", "dandelion"))}) as address:
        yield lambda text: text.replace("127.0.0.1:8080", f"127.0.0.1:{address.port}")


@pytest.mark.docs
@pytest.mark.filterwarnings("default")  # of the programs that open an export
@pytest.mark.parametrize(("page", "nightly"), RUNNABLE)
def test_the_python_of_a_page_runs_from_top_to_bottom(
    page: Path, nightly: bool, desk: Path, clothes_bundle: Path, folder_bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names: dict[str, Any] = {"__name__": "__main__"}
    with given(page_name(page), desk, clothes_bundle, folder_bundle) as adapted:
        for block in blocks(page, "python", "sh"):
            place = f"{page_name(page)}, line {block.line}"
            if block.language == "python":
                code = compile("\n" * block.line + adapted(block.text), page_name(page), "exec")
                if block.runs and (nightly or "nightly" not in block.words):
                    exec(code, names)
                    check_export(names)
            elif block.runs and (nightly or "nightly" not in block.words):
                for arguments in programs(block.text, "coatnet"):
                    assert main(arguments) == 0, place
    printed = capsys.readouterr().out
    assert all(text in printed for text in PRINTED.get(page_name(page), [])), printed


def check_export(names: dict[str, Any]) -> None:
    """What an export gave: probabilities of ten classes for one image, and the names of the classes."""
    if "probabilities" in names:
        probabilities = np.asarray(torch.as_tensor(names["probabilities"]).detach())
        assert probabilities.shape == (1, 10) and probabilities.sum() == pytest.approx(1, abs=1e-3)
    if "classes" in names:
        assert names["classes"][1] == "Trouser"


@pytest.mark.parametrize(("program", "arguments"), CALLS)
def test_a_command_is_understood(program: str, arguments: list[str], desk: Path) -> None:
    if program == "torchrun":
        known = torchrun_parser()
        if "--shutdown-timeout" in arguments and "--shutdown-timeout" not in known.format_help():
            pytest.skip("torchrun has this option since torch 2.12, as the page says")
        parsed = known.parse_args(arguments)
        assert parsed.module and parsed.training_script == "coatnet"
        arguments = parsed.training_script_args
    command, *rest = arguments
    assert command in COMMANDS
    if "--config" in rest:
        (desk / "runs/mine").mkdir(parents=True)
        shutil.copy("mine.yaml", "runs/mine/recipe.yaml")
    import_module(f"coatnet.cli.{command}").parse_arguments(rest)


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_options_in_the_text_exist(page: Path, capsys: pytest.CaptureFixture[str]) -> None:
    known = options(capsys)
    for command, text in re.findall(r"`coatnet ([a-z]+)([^`\n]*)`", prose(page)):
        assert command in known, f"{page_name(page)}: coatnet {command}"
        wrong = set(re.findall(r"(?<=\s)--[\w.-]+", text)) - known[command]
        assert not wrong, f"{page_name(page)}: coatnet {command}{text}"


_OPTIONS: dict[str, set[str]] = {}


def options(capsys: pytest.CaptureFixture[str]) -> dict[str, set[str]]:
    """The options of each command, from its help."""
    for command in COMMANDS:
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


def test_the_table_of_places_to_run_names_all_there_are() -> None:
    page = (ROOT / "docs/guides/integrations.md").read_text(encoding="utf-8")
    formats = re.findall(r"^\|[^|]*\| `coatnet export --format ([\w-]+)`", page, re.MULTILINE)
    assert sorted(formats) == sorted(FORMATS)
    modules = re.findall(r"^\|[^|]*\| `coatnet\.integrations\.(\w+)`", page, re.MULTILINE)
    files = {path.stem for path in (ROOT / "src/coatnet/integrations").glob("*.py")} - {"__init__", "tables"}
    assert set(modules) == files
    for name in modules:
        assert (ROOT / f"tests/integrations/test_{name}.py").exists() and f"coatnet[{name}]" in page


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


PLANS = [rest for block in blocks(ROOT / "docs/guides/scale.md", "sh") for rest in programs(block.text, "coatnet")]


@pytest.mark.parametrize("arguments", [rest for rest in PLANS if rest[0] == "plan"], ids=" ".join)
def test_a_plan_of_the_guide_is_made(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    command, model, *rest = arguments
    assert model in coatnet.list_variants()
    assert main([command, "coatnet-femto", *rest]) == 0  # a small network, for the time it takes
    page = capsys.readouterr().out
    assert "torchrun" in page and "gradients" in page


def test_the_steps_of_the_paper_are_those_of_the_recipes() -> None:
    rows = re.findall(r"(?m)^\| (`.*?`[^|]*)\|.*\| ([\d,]+) \|$", prose(ROOT / "docs/guides/scale.md"))
    assert len(rows) == 7
    for names, steps in rows:
        first, *_ = re.findall(r"`(.*?)`", names)
        assert RECIPES[first].steps == int(steps.replace(",", "")), first


def test_what_may_differ_on_resume_is_what_the_code_allows() -> None:
    text = prose(ROOT / "docs/guides/training.md")
    sentence = re.search(r"When you resume, these may differ from before: (.*?)\. Any other", text, re.DOTALL)
    assert sentence and tuple(re.findall(r"`(\w+)`", sentence[1])) == MAY_CHANGE


def test_the_bounds_of_images_are_those_of_the_decoder() -> None:
    text = (ROOT / "SECURITY.md").read_text(encoding="utf-8")
    assert f"refused above {MAX_PIXELS // 10**6} million pixels or {MAX_SIDE:,} a side" in text


def test_exit_codes_are_those_of_the_program() -> None:
    listed = re.findall(r"^\| (\d+) \|", prose(ROOT / "docs/reference/command-line.md"), re.MULTILINE)
    codes = {value for name, value in vars(parser).items() if name.isupper() and isinstance(value, int)}
    assert {int(code) for code in listed} == codes | {0}


def test_the_messages_of_the_page_are_explained() -> None:
    scripts = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "src/coatnet/server/page").glob("*.[jh]*"))
    section = prose(ROOT / "docs/guides/page.md").partition("## 2. ")[2].partition("## 3. ")[0]
    messages = [row for row in re.findall(r"^\| (.*?) \|", section, re.MULTILINE) if row not in ("message", "---")]
    assert len(messages) == 6
    for message in messages:
        assert message in scripts, message


def test_tests_that_a_page_names_exist() -> None:
    code = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("*.py"))
    defined = set(re.findall(r"^def (test_\w+)\(", code, re.MULTILINE))
    for page in PAGES:
        assert set(re.findall(r"`(test_\w+)`", prose(page))) <= defined | {"test_coatnet"}, page_name(page)


def test_files_that_a_page_names_exist() -> None:
    known = [path.relative_to(ROOT).as_posix() for path in ROOT.glob("src/coatnet/**/*.*")]
    known += [path.relative_to(ROOT).as_posix() for folder in ("tests", "examples", "benchmarks", "docs", "scripts")
              for path in (ROOT / folder).rglob("*")]  # fmt: skip
    for page in PAGES:
        for name in re.findall(r"`((?:[\w-]+/)*[\w-]+\.(?:py|ipynb|js))`", prose(page)):
            if name not in ("coatnet.py", "classify.py"):  # of chinhsuanwu/coatnet-pytorch, and of an export
                assert any(f"/{path}".endswith(f"/{name}") for path in known), f"{page_name(page)}: {name}"


def test_code_that_stands_for_an_equation_exists() -> None:
    page = prose(ROOT / "docs/coatnet.md")
    named = re.findall(r"`(\w+\.py)`((?:, `[^`]+`)+)", page)
    assert len(named) > 40
    for file, names in named:
        code = (ROOT / "src/coatnet/model" / file).read_text(encoding="utf-8")
        for name in re.findall(r"`(\w+)(?![\w]|\.py|\.nn)", names):
            assert re.search(rf"\b{name}\b", code), f"{file}: {name}"


def test_options_of_benchmarks_exist() -> None:
    calls = [call for page in PAGES for block in blocks(page, "sh") for call in programs(block.text, "python")]
    calls = [call for call in calls if call[0].startswith("benchmarks/")]
    assert len(calls) > 5
    for script, *arguments in calls:
        code = (ROOT / script).read_text(encoding="utf-8")
        for option in arguments:
            assert not option.startswith("--") or f'"{option}"' in code, f"{script} {option}"


def test_the_files_of_a_command_follow_from_each_other() -> None:
    section = prose(ROOT / "docs/design.md").partition("## 4. How to follow a command")[2].partition("\n## ")[0]
    tables = section.split("\n\n| `coatnet ")[1:]
    assert [table.partition("`")[0] for table in tables] == ["train", "evaluate", "predict", "export", "serve"]
    for table in tables:
        read = ""
        for name in re.findall(r"`([\w/]+\.py)`", table):
            path = ROOT / "src/coatnet" / name
            module = f"coatnet.{name.removesuffix('.py').removesuffix('/__init__').replace('/', '.')}"
            folder = path.with_name("__init__.py").read_text(encoding="utf-8")  # may hand its names on
            package = module.rpartition(".")[0]
            known = not read or module in read or (module in folder and f"from {package} import" in read)
            known = known or (package == "coatnet.cli" and 'import_module(f"coatnet.cli.' in read)
            assert known, f"{name} is imported by no file before it"
            read += path.read_text(encoding="utf-8")
