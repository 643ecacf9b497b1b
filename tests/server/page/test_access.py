"""A server with a token and two models, the classes of one named to break the page."""

from collections.abc import Callable
from pathlib import Path

import pytest
from playwright.sync_api import expect
from tests.server.page.conftest import CLASSES, HOSTILE, TOKEN
from tests.server.page.serving import Server
from tests.server.page.visiting import Visit

Open = Callable[..., Visit]


@pytest.fixture
def inside(visit: Open, guarded: Server) -> Visit:
    """The page once the token is given."""
    seen = visit(guarded)
    seen.expected = ("status of 401",)
    seen.see("#token").fill(TOKEN)
    seen.see("#token").press("Enter")
    expect(seen.see("#about")).to_be_visible()
    return seen


@pytest.mark.slow
def test_a_token_is_asked_for_until_it_is_right(visit: Open, guarded: Server) -> None:
    seen = visit(guarded)
    seen.expected = ("status of 401",)
    expect(seen.see("#token")).to_be_focused()
    expect(seen.see("#access-detail")).to_have_text("It is kept for this tab only.")
    seen.page.keyboard.type("wrong-token")
    seen.page.keyboard.press("Enter")
    expect(seen.see("#access-detail")).to_have_text("The last one was not accepted.")
    expect(seen.see("#token")).to_have_value("")
    seen.page.keyboard.type(TOKEN)
    seen.page.keyboard.press("Enter")
    expect(seen.see("#access")).to_be_hidden()
    expect(seen.see("#about")).to_be_visible()


def test_the_token_lives_as_long_as_the_tab(inside: Visit, visit: Open, guarded: Server) -> None:
    inside.page.reload()
    expect(inside.see("#about")).to_be_visible()
    expect(inside.see("#access")).to_be_hidden()
    assert inside.page.evaluate("localStorage.length") == 0
    assert not inside.context.cookies()
    other = inside.context.new_page()
    other.goto(guarded.url)
    expect(other.locator("#access")).to_be_visible()


def test_without_a_token_the_page_says_so_and_asks_again(visit: Open, guarded: Server, images: list[Path]) -> None:
    seen = visit(guarded)
    seen.expected = ("status of 401",)
    seen.see("#access").get_by_role("button", name="Cancel").click()
    expect(seen.see("#notice")).to_contain_text("token")
    seen.drop(images[0])
    expect(seen.see("#access")).to_be_visible()
    seen.see("#token").fill(TOKEN)
    seen.see("#token").press("Enter")
    expect(seen.see("#predictions li")).to_have_count(5)
    expect(seen.see("#notice")).to_be_empty()


def test_class_names_are_text(inside: Visit, images: list[Path]) -> None:
    inside.drop(images[0])
    expect(inside.see("#predictions .class")).to_have_count(5)
    shown = inside.see("#predictions .class").all_text_contents()
    assert sorted(shown) == sorted(HOSTILE)
    assert inside.see("#headline").text_content() == shown[0]
    assert inside.see(".tile .label").text_content() == shown[0]
    inside.see("summary").click()
    for name in HOSTILE:
        assert name in (inside.see("#card").text_content() or "")
    assert inside.see("main script, main img:not(#image):not(.tile img), main a").count() == 0
    assert inside.page.evaluate("window.hacked") is None


def test_a_long_class_name_does_not_widen_the_page(inside: Visit, images: list[Path]) -> None:
    inside.page.set_viewport_size({"width": 320, "height": 640})
    inside.drop(*images)
    expect(inside.see(".tile[data-state=done]")).to_have_count(4)
    assert inside.page.evaluate("document.documentElement.scrollWidth") == 320


def test_another_model_is_asked_about_the_image_that_is_shown(
    inside: Visit, server: Server, images: list[Path]
) -> None:
    choice = inside.see("#model")
    assert choice.locator("option").all_text_contents() == ["hostile", "animals", "labels"]
    inside.drop(images[0])
    expect(inside.see("#footnote")).to_contain_text("hostile")
    choice.select_option("animals")
    expect(inside.see("#footnote")).to_contain_text("animals")
    expect(inside.see("#headline")).to_have_text(server.answer(images[0])[0]["class"])
    expect(inside.see(".tile")).to_have_count(2)
    expect(inside.see("#facts")).to_contain_text(f"one of {len(CLASSES)} classes")


def test_labels_of_which_several_may_apply_are_told_from_classes(
    inside: Visit, server: Server, images: list[Path]
) -> None:
    inside.see("#model").select_option("labels")
    expect(inside.see("#facts")).to_contain_text(f"any of {len(CLASSES)} labels")
    inside.drop(images[0])
    expect(inside.see("#detail")).to_contain_text("any number of which may apply")
    classes = server.answer(images[0])  # the same weights: the same order, other shares
    expect(inside.see("#predictions .class")).to_have_text([row["class"] for row in classes])
    shares = [float(text.strip("<> %")) for text in inside.see("#predictions .percent").all_text_contents()]
    assert sum(shares) > 101
