"""What the packaging files say of each other: floors and constraints, Python versions, targets of the Makefile."""

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")
TARGETS = set(re.findall(r"^([a-z][a-z-]*):", MAKEFILE, re.MULTILINE))
WORKFLOW: dict[str, Any] = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text(encoding="utf-8"))
FORMS = sorted((ROOT / ".github/ISSUE_TEMPLATE").glob("*.yml"))
REQUIREMENT = re.compile(r"([\w-]+)(?:\[\w+\])?>=([\d.]+)")
NOT_TESTED = ("executorch", "mlflow", "ray", "spark", "wandb")  # extras that the tests go without


def values(job: dict[str, Any], key: str) -> list[str]:
    return job.get("strategy", {}).get("matrix", {}).get(key, [])


def constraints(name: str) -> dict[str, str]:
    lines = (ROOT / name).read_text(encoding="utf-8").splitlines()
    pinned = [line.split("==") for line in lines if not line.startswith("#")]
    return {package.lower().replace("_", "-"): version for package, version in pinned}


def floors() -> dict[str, str]:
    extras = PROJECT["project"]["optional-dependencies"]
    lists = [PROJECT["project"]["dependencies"], *(extras[name] for name in extras if name not in NOT_TESTED)]
    found = [REQUIREMENT.fullmatch(requirement) for requirements in lists for requirement in requirements]
    assert all(found), "every dependency has a floor and nothing else: name>=version"
    return {match[1].lower().replace("_", "-"): match[2] for match in found if match}


def test_the_oldest_versions_that_are_tested_are_the_floors() -> None:
    assert constraints("constraints-oldest.txt") == floors()


def test_the_versions_of_a_repeatable_installation_are_complete_and_not_below_the_floors() -> None:
    def as_numbers(version: str) -> list[int]:
        return [int(part) for part in re.findall(r"\d+", version)]

    groups = [r for group in PROJECT["dependency-groups"].values() for r in group if isinstance(r, str)]
    wanted = floors() | {match[1].lower(): match[2] for match in map(REQUIREMENT.fullmatch, groups) if match}
    pinned = constraints("constraints.txt")
    assert not wanted.keys() - pinned.keys()
    below = [name for name, floor in wanted.items() if as_numbers(pinned[name]) < as_numbers(floor)]
    assert not below


def test_make_installs_every_extra_that_the_tests_need() -> None:
    (listed,) = re.findall(r"^EXTRAS := (.*)$", MAKEFILE, re.MULTILINE)
    assert {*listed.split(","), *NOT_TESTED} == set(PROJECT["project"]["optional-dependencies"])


def test_the_documentation_lists_every_extra() -> None:
    page = (ROOT / "docs/index.md").read_text(encoding="utf-8")
    table = page[page.index("| extra |") :].split("\n\n")[0].splitlines()[2:]
    listed = [name for row in table for name in re.findall(r"`([a-z0-9]+)`", row.split("|")[1])]
    assert sorted(listed) == sorted(PROJECT["project"]["optional-dependencies"])


def test_the_workflow_tests_the_python_versions_of_the_classifiers() -> None:
    classifiers = re.findall(r"Python :: (3\.\d+)", "\n".join(PROJECT["project"]["classifiers"]))
    assert values(WORKFLOW["jobs"]["test"], "python") == classifiers
    assert PROJECT["project"]["requires-python"] == f">={classifiers[0]}"
    assert PROJECT["tool"]["pyrefly"]["python-version"] == f"{classifiers[0]}.0"
    assert PROJECT["tool"]["ruff"]["target-version"] == f"py{classifiers[0].replace('.', '')}"


def test_the_workflow_calls_make_and_nothing_else() -> None:
    called = set()
    for job in WORKFLOW["jobs"].values():
        for step in job["steps"]:
            if "run" in step:
                make, target, *settings = step["run"].replace("${{ matrix.target }}", "MATRIX").split()
                assert make == "make"
                called.update(values(job, "target") if target == "MATRIX" else [target])
                for name in (setting.partition("=")[0] for setting in settings):
                    assert re.search(rf"^{name} \?=", MAKEFILE, re.MULTILINE), f"{name} is no setting of the Makefile"
    assert called <= TARGETS
    assert {"check", "docs", "test", "test-docs", "test-oldest", "test-faults", "release-check"} <= called


def test_every_target_is_phony_and_in_the_help() -> None:
    (phony,) = re.findall(r"^\.PHONY: (.*)$", MAKEFILE, re.MULTILINE)
    assert set(phony.split()) == TARGETS
    assert set(re.findall(r"make ([a-z-]+)[ :]", MAKEFILE.partition("\ninstall:")[0])) >= TARGETS - {"help", "install"}


@pytest.mark.parametrize("path", FORMS, ids=lambda path: path.stem)
def test_an_issue_form_is_one(path: Path) -> None:
    form = yaml.safe_load(path.read_text(encoding="utf-8"))
    if path.stem == "config":
        assert form == {"blank_issues_enabled": False}
        return
    assert {"name", "description", "labels", "body"} == form.keys()
    for field in form["body"]:
        assert field["type"] in ("markdown", "input", "textarea")
        assert field["attributes"].keys() <= {"label", "description", "placeholder", "render", "value"}
        assert field["type"] != "input" or "render" not in field["attributes"]
    names = [field["id"] for field in form["body"] if field["type"] != "markdown"]
    assert len(set(names)) == len(names)


def test_a_bug_and_a_question_ask_for_what_an_answer_needs() -> None:
    for name in ("bug", "question"):
        text = (ROOT / f".github/ISSUE_TEMPLATE/{name}.yml").read_text(encoding="utf-8")
        for asked in ("`coatnet --version`", "ommand", "one-line error", "`coatnet doctor"):
            assert asked in text


def test_the_hooks_are_the_tools_of_the_environment() -> None:
    config = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))
    (repository,) = config["repos"]
    assert repository["repo"] == "local"
    check = MAKEFILE.partition("\ncheck:")[2].partition("\n\n")[0]
    for hook in repository["hooks"]:
        assert hook["language"] == "system"
        tool, verb = hook["entry"].split()[:2]
        assert f"{tool} {verb}" in check
