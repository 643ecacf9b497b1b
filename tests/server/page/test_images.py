"""Images that are dropped, pasted or picked are classified, shown and remembered."""

from collections.abc import Callable
from pathlib import Path

from playwright.sync_api import Route, expect
from tests.server.page.serving import Server
from tests.server.page.visiting import Visit

Open = Callable[..., Visit]


def percent(probability: float) -> str:
    if 0 < probability < 0.001:
        return "< 0.1 %"
    if 0.999 < probability < 1:
        return "> 99.9 %"
    return f"{100 * probability:.1f} %"


def expect_answer(seen: Visit, server: Server, image: Path) -> None:
    """The main view shows this image and the server's five classes, with bars as long as they are likely."""
    answer = server.answer(image)
    expect(seen.see("#file-name")).to_have_text(image.name)
    expect(seen.see("#headline")).to_have_text(answer[0]["class"])
    expect(seen.see("#predictions .class")).to_have_text([row["class"] for row in answer])
    expect(seen.see("#predictions .percent")).to_have_text([percent(row["probability"]) for row in answer])
    seen.settle()
    for row, bar in zip(answer, seen.see(".fill").all(), strict=True):
        share = bar.evaluate("bar => bar.getBoundingClientRect().width / bar.parentElement.clientWidth")
        assert abs(share - row["probability"]) < 0.01


def test_a_dropped_image_gets_the_answer_of_the_server(visit: Open, server: Server, images: list[Path]) -> None:
    seen = visit(server)
    seen.drop(images[0])
    expect_answer(seen, server, images[0])
    expect(seen.see("#detail")).to_have_text("likeliest of 8 classes")
    expect(seen.see("#footnote")).to_contain_text("inference")
    assert seen.see("#image").evaluate("image => image.naturalWidth") == 200


def test_an_image_can_be_pasted(visit: Open, server: Server, images: list[Path]) -> None:
    seen = visit(server)
    seen.paste(images[1])
    expect_answer(seen, server, images[1])


def test_an_image_can_be_picked_twice(visit: Open, server: Server, images: list[Path]) -> None:
    seen = visit(server)
    for count in (1, 2):
        with seen.page.expect_file_chooser() as chooser:
            seen.see("label[for=files]").click()
        assert chooser.value.is_multiple()
        chooser.value.set_files(images[2])
        expect(seen.see(".tile[data-state=done]")).to_have_count(count)
        expect_answer(seen, server, images[2])


def test_the_page_says_where_to_drop_while_something_is_dragged(visit: Open, server: Server) -> None:
    seen = visit(server)
    transfer = seen.page.evaluate_handle("() => new DataTransfer()")
    expect(seen.see("#overlay")).to_be_hidden()
    seen.page.dispatch_event("main", "dragover", {"dataTransfer": transfer})
    expect(seen.see("#overlay")).to_be_visible()
    seen.page.dispatch_event("body", "dragleave", {"dataTransfer": transfer})
    expect(seen.see("#overlay")).to_be_hidden()


def test_dropped_text_is_answered_by_a_hint(visit: Open, server: Server) -> None:
    seen = visit(server)
    seen.drop()
    expect(seen.see("#notice")).to_contain_text("no file")
    expect(seen.see("#result")).to_be_hidden()


def test_of_two_fast_drops_the_last_is_shown_and_both_are_kept(visit: Open, server: Server, images: list[Path]) -> None:
    seen, held, first = visit(server), list[Route](), images[0].read_bytes()
    seen.on_predict(lambda route: held.append(route) if route.request.post_data_buffer == first else route.continue_())
    seen.drop(images[0])
    seen.drop(images[1])
    expect_answer(seen, server, images[1])
    held[0].continue_()
    best = [server.answer(image)[0]["class"] for image in (images[1], images[0])]
    expect(seen.see(".tile .label")).to_have_text(best)
    expect_answer(seen, server, images[1])


def test_many_images_are_sent_three_at_a_time(visit: Open, server: Server, images: list[Path]) -> None:
    seen, held, most = visit(server), list[Route](), 0
    seen.on_predict(held.append)
    dropped = [*images, *images]
    seen.drop(*dropped)
    while len(held) < 3:  # a browser on a busy machine takes its time
        seen.page.wait_for_timeout(20)
    for _ in dropped:
        seen.page.wait_for_timeout(60)  # no fourth comes
        while not held:
            seen.page.wait_for_timeout(20)
        most = max(most, len(held))
        held.pop(0).continue_()
    assert most == 3
    best = [server.answer(image)[0]["class"] for image in reversed(dropped)]
    expect(seen.see(".tile .label")).to_have_text(best)
    expect(seen.see(".tile .name")).to_have_text([image.name for image in reversed(dropped)])


def test_an_image_of_the_history_is_shown_again(visit: Open, server: Server, images: list[Path]) -> None:
    seen = visit(server)
    seen.drop(*images[:3])
    expect(seen.see(".tile[data-state=done]")).to_have_count(3)
    oldest = seen.see(".tile").last
    oldest.focus()
    seen.page.keyboard.press("Enter")
    expect_answer(seen, server, images[0])
    expect(seen.see(".tile[aria-current=true]")).to_have_count(1)
    expect(oldest).to_have_attribute("aria-current", "true")
    assert len(seen.predictions) == 3, "it was sent again"


def test_clearing_forgets_the_images_and_gives_their_memory_back(
    visit: Open, server: Server, images: list[Path]
) -> None:
    seen = visit(server)
    seen.drop(*images[:2])
    expect(seen.see(".tile[data-state=done]")).to_have_count(2)
    addresses = seen.see(".tile img").evaluate_all("images => images.map((image) => image.src)")
    alive = "all => Promise.all(all.map((one) => new Promise((done) => Object.assign(new Image(), "
    alive += "{ src: one, onload: () => done(true), onerror: () => done(false) }))))"
    assert seen.page.evaluate(alive, addresses) == [True, True]
    seen.see("#clear").click()
    expect(seen.see(".tile")).to_have_count(0)
    expect(seen.see("#result")).to_be_hidden()
    seen.expected = ("ERR_FILE_NOT_FOUND",)
    assert seen.page.evaluate(alive, addresses) == [False, False]


def test_clearing_calls_back_what_was_sent(visit: Open, server: Server, images: list[Path]) -> None:
    seen, held = visit(server), list[Route]()
    seen.on_predict(held.append)
    with seen.page.expect_event("requestfailed"):
        seen.drop(images[0])
        expect(seen.see("#headline")).to_have_text("Looking …")
        seen.see("#clear").click()
    seen.page.unroute("**/predict?*")
    seen.drop(images[1])
    expect_answer(seen, server, images[1])
    expect(seen.see(".tile")).to_have_count(1)
