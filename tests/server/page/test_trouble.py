"""What goes wrong is said in words, costs no other image, and can be tried again."""

import time
from collections.abc import Callable
from pathlib import Path

import pytest
from playwright.sync_api import Route, expect
from tests.server.page.serving import Server, draw
from tests.server.page.visiting import Visit

Open = Callable[..., Visit]


def test_a_wrong_file_is_named_and_the_others_are_answered(
    visit: Open, server: Server, images: list[Path], tmp_path: Path
) -> None:
    seen, notes = visit(server), tmp_path / "notes.txt"
    seen.expected = ("status of 415",)
    notes.write_text("no image at all")
    seen.drop(images[0], notes)
    expect(seen.see("#file-name")).to_have_text("notes.txt")
    expect(seen.see("#headline")).to_have_text("This is not an image that the server can read")
    expect(seen.see("#detail")).not_to_be_empty()
    expect(seen.see("#again")).to_be_hidden()
    expect(seen.see(".tile .label").last).to_have_text(server.answer(images[0])[0]["class"])


def test_a_file_that_is_too_big_is_not_sent(visit: Open, server: Server, tmp_path: Path) -> None:
    seen, big = visit(server), tmp_path / "big.png"
    big.write_bytes(bytes(3 << 19))
    expect(seen.see("#limit")).to_contain_text("1 MB")
    seen.drop(big)
    expect(seen.see("#headline")).to_have_text("This file is too big")
    expect(seen.see("#detail")).to_have_text("It has 1.5 MB; this server takes 1 MB at most.")
    assert not seen.predictions


def test_a_file_that_went_away_is_told_from_a_server_that_went_away(
    visit: Open, server: Server, images: list[Path], tmp_path: Path
) -> None:
    seen, held, gone = visit(server), list[Route](), draw(tmp_path / "gone.png", 7)
    seen.expected = ("ERR_FILE_NOT_FOUND",)
    seen.on_predict(held.append)
    seen.page.set_input_files("#files", [gone, *images[:3]])  # the newest three are sent first
    expect(seen.see(".tile")).to_have_count(4)
    gone.unlink()
    seen.page.wait_for_timeout(200)
    for route in held:
        route.continue_()
    expect(seen.see(".tile .label").last).to_have_text("This file cannot be read")
    expect(seen.see("#banner")).to_be_hidden()


@pytest.mark.slow
def test_images_wait_for_a_server_that_is_gone(visit: Open, server: Server, images: list[Path]) -> None:
    best = server.answer(images[0])[0]["class"]
    seen = visit(server)
    expect(seen.see("#about")).to_be_visible()
    seen.expected = ("net::ERR_",)  # which one depends on what it was sending
    server.kill()
    seen.drop(images[0])
    expect(seen.see("#banner")).to_be_visible()
    expect(seen.see("#headline")).to_have_text("Waiting")
    server.start()
    expect(seen.see("#headline")).to_have_text(best, timeout=15_000)
    expect(seen.see("#banner")).to_be_hidden()


def test_an_image_that_never_gets_through_ends_in_words(visit: Open, server: Server, images: list[Path]) -> None:
    seen = visit(server)
    seen.expected = ("ERR_CONNECTION_RESET",)
    seen.on_predict(lambda route: route.abort("connectionreset"))
    seen.drop(images[0])
    expect(seen.see("#headline")).to_have_text("This image did not get through")
    assert len(seen.predictions) == 3
    seen.page.unroute("**/predict?*")
    seen.see("#again").click()
    expect(seen.see("#headline")).to_have_text(server.answer(images[0])[0]["class"])
    expect(seen.see("#again")).to_be_hidden()
    expect(seen.see("#headline")).to_be_focused()


def error_response(status: int, code: str, seconds: str) -> Callable[[Route], None]:
    error = {"error": {"code": code, "message": "too much to do"}}
    return lambda route: route.fulfill(status=status, json=error, headers={"Retry-After": seconds})


def test_a_busy_server_is_asked_again_when_it_says(visit: Open, server: Server, images: list[Path]) -> None:
    seen, times = visit(server), list[float]()

    def answer(route: Route) -> None:
        times.append(time.monotonic())
        route.continue_() if len(times) == 2 else error_response(503, "full", "2")(route)

    seen.expected = ("status of 503",)
    seen.on_predict(answer)
    seen.drop(images[0])
    expect(seen.see("#headline")).to_have_text("The server is busy")
    expect(seen.see(".tile .label")).to_have_text("server busy")
    expect(seen.see("#headline")).to_have_text(server.answer(images[0])[0]["class"])
    assert 1.9 < times[1] - times[0] < 3.5


def test_a_server_that_stays_busy_is_asked_six_times(visit: Open, server: Server, images: list[Path]) -> None:
    seen = visit(server)
    seen.expected = ("status of 503",)
    seen.on_predict(error_response(503, "full", "0"))
    seen.drop(images[0])
    expect(seen.see("#again")).to_be_visible()
    expect(seen.see("#headline")).to_have_text("The server is busy")
    expect(seen.see("#detail")).to_have_text("too much to do")
    assert len(seen.predictions) == 6


def test_a_failure_of_the_server_can_be_tried_again(visit: Open, server: Server, images: list[Path]) -> None:
    seen = visit(server)
    seen.expected = ("status of 500",)
    seen.on_predict(error_response(500, "inference", "1"))
    seen.drop(images[0])
    expect(seen.see("#headline")).to_have_text("The server failed")
    assert len(seen.predictions) == 1, "only a busy server is asked again by itself"
    seen.page.unroute("**/predict?*")
    seen.see("#again").click()
    expect(seen.see("#headline")).to_have_text(server.answer(images[0])[0]["class"])
