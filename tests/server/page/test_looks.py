"""Readable for everybody: by keyboard, by ear, on a phone, in the dark, without motion; with images to look at."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import expect
from tests.server.page.serving import Server
from tests.server.page.visiting import Visit

SCREENSHOTS = Path(__file__).parents[3] / "runs" / "screenshots"
DESKTOP, PHONE = {"width": 1200, "height": 860}, {"width": 320, "height": 640}

Open = Callable[..., Visit]


def photograph(seen: Visit, name: str) -> None:
    SCREENSHOTS.mkdir(parents=True, exist_ok=True)
    seen.settle()
    seen.page.screenshot(path=SCREENSHOTS / f"{name}.png", full_page=True)


def expect_accessible(seen: Visit) -> None:
    seen.settle()
    found = Axe().run(seen.page)
    assert found.violations_count == 0, found.generate_report()
    assert len(found.response["passes"]) > 20


def fill(seen: Visit, images: list[Path], notes: Path) -> None:
    """A history of three images and a file that is none, which is shown."""
    seen.expected = ("status of 415",)
    notes.write_text("no image at all")
    seen.drop(*images[:3], notes)
    expect(seen.see(".tile .number")).to_have_text([re.compile("%"), re.compile("%"), re.compile("%"), ""][::-1])
    expect(seen.see("#result")).to_have_attribute("data-state", "failed")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_state_is_accessible(
    visit: Open, server: Server, images: list[Path], tmp_path: Path, scheme: str
) -> None:
    seen = visit(server, viewport=DESKTOP, color_scheme=scheme)
    expect(seen.see("#about")).to_be_visible()
    expect_accessible(seen)
    photograph(seen, f"empty-{scheme}")
    fill(seen, images, tmp_path / "notes.txt")
    expect_accessible(seen)
    photograph(seen, f"error-{scheme}")
    seen.see(".tile").nth(1).click()
    expect(seen.see("#predictions li")).to_have_count(5)
    expect_accessible(seen)
    photograph(seen, f"result-{scheme}")
    seen.see("summary").click()
    expect_accessible(seen)
    photograph(seen, f"about-{scheme}")


def test_the_banner_and_the_question_for_a_token_are_accessible(visit: Open, guarded: Server, server: Server) -> None:
    asked = visit(guarded)
    asked.expected = ("status of 401",)
    expect(asked.see("#access")).to_be_visible()
    expect_accessible(asked)
    photograph(asked, "token")
    alone = visit(server)
    alone.expected = ("ERR_CONNECTION_",)
    alone.page.route("**/models", lambda route: route.abort("connectionrefused"))
    alone.page.reload()
    expect(alone.see("#banner")).to_be_visible()
    expect_accessible(alone)
    photograph(alone, "gone")


def test_the_dark_page_is_dark(visit: Open, server: Server) -> None:
    brightness = (
        "() => getComputedStyle(document.body).backgroundColor.match(/\\d+/g).slice(0, 3).reduce((a, b) => +a + +b)"
    )
    assert visit(server, color_scheme="light").page.evaluate(brightness) > 600
    assert visit(server, color_scheme="dark").page.evaluate(brightness) < 120


def test_a_phone_shows_everything_without_scrolling_sideways(
    visit: Open, server: Server, images: list[Path], tmp_path: Path
) -> None:
    seen = visit(server, viewport=PHONE, has_touch=True, is_mobile=True)
    expect(seen.see("#about")).to_be_visible()
    assert seen.page.evaluate("document.documentElement.scrollWidth") == 320
    photograph(seen, "phone-empty")
    fill(seen, images, tmp_path / "notes.txt")
    seen.see(".tile").nth(1).tap()
    expect(seen.see("#predictions li")).to_have_count(5)
    expect(seen.see("#headline")).to_be_in_viewport()
    seen.see("summary").tap()
    expect(seen.see("#card h3")).to_be_visible()
    photograph(seen, "phone-result")
    assert seen.page.evaluate("document.documentElement.scrollWidth") == 320
    small = seen.see("button:visible, .button, summary").evaluate_all(
        "all => all.filter((one) => one.getBoundingClientRect().height < 32).map((one) => one.outerHTML)"
    )
    assert not small, "too small for a finger"


def test_nothing_moves_for_those_who_want_it_so(visit: Open, server: Server, images: list[Path]) -> None:
    moving = "() => document.getAnimations().length"
    for motion, moves in (("no-preference", True), ("reduce", False)):
        seen = visit(server, reduced_motion=motion)
        seen.on_predict(lambda route: None)
        seen.drop(images[0])
        expect(seen.see("#headline")).to_have_text("Looking …")
        assert bool(seen.page.evaluate(moving)) == moves
        seen.page.unroute("**/predict?*")


def test_the_keyboard_reaches_everything_and_shows_where_it_is(visit: Open, server: Server, images: list[Path]) -> None:
    seen = visit(server)
    keyboard = seen.page.keyboard
    expect(seen.see("#about")).to_be_visible()
    keyboard.press("Tab")
    expect(seen.see("#files")).to_be_focused()
    assert seen.see("label[for=files]").evaluate("label => getComputedStyle(label).outlineWidth") == "3px"
    with seen.page.expect_file_chooser() as chooser:
        keyboard.press("Space")
    chooser.value.set_files(images[:2])
    expect(seen.see(".tile[data-state=done]")).to_have_count(2)
    visited = []
    for _ in range(6):
        keyboard.press("Tab")
        visited.append(
            seen.page.evaluate(
                "(({ id, className, localName }) => id || className || localName)(document.activeElement)"
            )
        )
        assert seen.page.evaluate("getComputedStyle(document.activeElement).outlineStyle") != "none"
    assert visited == ["explain", "clear", "tile", "tile", "summary", "a"]
    keyboard.press("Shift+Tab")
    keyboard.press("Enter")
    expect(seen.see("#card")).to_be_visible()


def test_answers_and_errors_are_announced(visit: Open, server: Server, images: list[Path], tmp_path: Path) -> None:
    seen = visit(server)
    seen.drop(images[0])
    said = seen.see("[role=log] p")
    expect(said).to_have_text(re.compile(rf"^{images[0].name}: {server.answer(images[0])[0]['class']}, .*%$"))
    seen.expected = ("status of 415",)
    (tmp_path / "notes.txt").write_text("no image at all")
    seen.drop(tmp_path / "notes.txt")
    expect(said.last).to_have_text("notes.txt: This is not an image that the server can read")
