"""The faults that a training must survive, and the table of what became of them: `make test-faults`."""

from pathlib import Path

import pytest

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.faults)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo):
    report = yield
    if report.when == "call" or report.outcome != "passed":
        parameters = getattr(getattr(item, "callspec", None), "params", {})
        for marker in item.iter_markers("fault"):
            number, injected, outcome = marker.args
            report.user_properties.append(("fault", (number, injected.format(**parameters), outcome)))
    return report


def pytest_terminal_summary(terminalreporter) -> None:
    bad = "NOT as expected"
    said = {"passed": "as expected", "failed": bad, "error": bad, "skipped": "not tried here"}
    rows = [
        (*fault, words, report.duration)
        for outcome, words in said.items()
        for report in terminalreporter.stats.get(outcome, [])
        for name, fault in getattr(report, "user_properties", [])
        if name == "fault"
    ]
    if not rows:
        return
    rows.sort(key=lambda row: (int(row[0][1:]), row[1]))
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    terminalreporter.section("fault -> outcome")
    for number, injected, outcome, words, seconds in rows:
        columns = [text.ljust(width) for text, width in zip((number, injected, outcome), widths, strict=True)]
        terminalreporter.line("  ".join([*columns, f"{words} ({seconds:.0f} s)"]))
