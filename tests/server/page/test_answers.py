"""What mattered, as a heat map over the image; answers that are unsure or unknown; images as the model sees them."""

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image
from playwright.sync_api import Page, Route, expect
from tests.server.page.serving import Server, draw
from tests.server.page.test_looks import expect_accessible, photograph
from tests.server.page.visiting import Visit

from coatnet.inference import Predictor

Open = Callable[..., Visit]
ALPHA = """canvas => {
    const { data, width, height } = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
    return { width, height, alpha: Array.from(data.filter((_, index) => index % 4 === 3)) };
}"""


def answering(predictions: dict[str, float], **more: object) -> Callable[[Route], object]:
    rows = [{"class": name, "probability": probability} for name, probability in predictions.items()]
    times = {"decode": 1.0, "queue": 0.1, "inference": 2.0, "total": 4.0}
    body = {"model": "animals", "predictions": rows, "novelty": None, "unknown": False, "milliseconds": times, **more}
    return lambda route: route.fulfill(json=body)


def color_at(page: Page, selector: str, x: float, y: float) -> tuple[int, ...]:
    """What is seen at a place of an element, as fractions of it."""
    shot = Image.open(io.BytesIO(page.locator(selector).screenshot())).convert("RGB")
    return shot.getpixel((int(x * shot.width), int(y * shot.height)))


def test_the_heat_map_lies_over_what_the_model_saw(visit: Open, server: Server, tmp_path: Path) -> None:
    wide = tmp_path / "wide.png"
    with Image.open(draw(tmp_path / "square.png", 3)) as square:
        square.resize((300, 100)).save(wide)
    seen = visit(server)
    asked: list[str] = []
    seen.page.on("request", lambda request: asked.append(request.url) if "/explain" in request.url else None)
    seen.drop(wide)
    button = seen.see("#explain")
    expect(button).to_have_text("Show what mattered")
    expect(seen.see("#heat")).to_be_hidden()
    assert not asked
    button.click()
    expect(seen.see("#heat")).to_be_visible()
    expect(button).to_have_attribute("aria-pressed", "true")
    over = seen.see("#heat").evaluate(ALPHA)
    alpha = np.array(over["alpha"]).reshape(over["height"], over["width"])
    left, _, right, _ = Predictor(server.arguments[0], "torch").explain(wide)[0].box
    columns = np.flatnonzero(alpha.max(0))
    assert abs(columns[0] / over["width"] - left) < 0.01
    assert abs(columns[-1] / over["width"] - right) < 0.01
    image, canvas = seen.see("#image").bounding_box(), seen.see("#heat").bounding_box()
    assert all(abs(image[key] - canvas[key]) < 1 for key in image)
    assert abs(image["width"] / image["height"] - 3) < 0.02
    expect_accessible(seen)
    button.click()
    expect(seen.see("#heat")).to_be_hidden()
    button.click()
    expect(seen.see("#heat")).to_be_visible()
    assert len(asked) == 1, "the map is asked for once"


def test_a_heat_map_that_cannot_be_had_is_said(visit: Open, server: Server, images: list[Path]) -> None:
    seen = visit(server)
    seen.expected = ("status of 504",)
    refusal = {"error": {"code": "deadline", "message": "no answer within 1 seconds"}}
    seen.page.route("**/explain?*", lambda route: route.fulfill(status=504, json=refusal))
    seen.drop(images[0])
    seen.see("#explain").click()
    expect(seen.see("#heat-problem")).to_have_text("No heat map: no answer within 1 seconds")
    expect(seen.see("#heat")).to_be_hidden()


def test_two_close_classes_are_no_answer(visit: Open, server: Server, images: list[Path]) -> None:
    seen = visit(server)
    seen.on_predict(answering({"ant": 0.162, "bee": 0.16, "cat": 0.1}))
    seen.drop(images[0])
    expect(seen.see("#headline")).to_have_text("Unsure: ant or bee")
    expect(seen.see("#detail")).to_have_text("16.2 % against 16.0 %, likeliest of 8 classes")
    expect(seen.see(".tile .label")).to_have_text("Unsure: ant or bee")
    expect(seen.see("[role=log] p")).to_contain_text("Unsure: ant or bee")
    size = "node => parseFloat(getComputedStyle(node).fontSize)"
    unsure = seen.see("#headline").evaluate(size)
    seen.page.unroute("**/predict?*")
    seen.on_predict(answering({"ant": 0.5, "bee": 0.3}))
    seen.drop(images[1])
    expect(seen.see("#headline")).to_have_text("ant")
    assert unsure < seen.see("#headline").evaluate(size)


def test_an_unknown_image_is_called_so(visit: Open, server: Server, images: list[Path]) -> None:
    seen = visit(server)
    seen.on_predict(answering({"ant": 0.99, "bee": 0.01}, novelty=0.987, unknown=True))
    seen.drop(images[0])
    expect(seen.see("#headline")).to_have_text("Unknown")
    expect(seen.see("#detail")).to_contain_text("more foreign than 98.7 % of known images")
    expect(seen.see(".tile .label")).to_have_text("Unknown")
    expect_accessible(seen)


def test_what_is_transparent_is_white_in_the_dark(visit: Open, server: Server, tmp_path: Path) -> None:
    Image.new("RGBA", (200, 100), (0, 0, 0, 0)).save(tmp_path / "glass.png")
    seen = visit(server, color_scheme="dark")
    seen.drop(tmp_path / "glass.png")
    expect(seen.see(".tile[data-state=done]")).to_have_count(1)
    seen.settle()
    assert color_at(seen.page, "#frame", 0.5, 0.5) == (255, 255, 255)
    assert color_at(seen.page, ".thumbnail", 0.5, 0.5) == (255, 255, 255)
    assert max(color_at(seen.page, "#frame", 0.5, 0.1)) < 60, "beside the image it stays dark"


def test_no_word_is_broken_in_a_tile(visit: Open, server: Server, images: list[Path]) -> None:
    seen = visit(server)
    seen.on_predict(answering({"Archaeopteryx bird": 0.9, "bee": 0.1}))
    seen.drop(images[0])
    label = seen.see(".tile .label")
    expect(label).to_have_text("Archaeopteryx bird")
    lines = label.evaluate("""label => {
        const range = document.createRange();
        range.setStart(label.firstChild, 0);
        range.setEnd(label.firstChild, "Archaeopteryx".length);
        return range.getClientRects().length;
    }""")
    assert lines == 1


def test_a_phone_is_asked_to_take_or_choose(visit: Open, server: Server) -> None:
    for touch, title in ((True, "Take or choose images"), (False, "Drop images anywhere")):
        seen = visit(server, has_touch=touch, is_mobile=touch)
        assert seen.see("#intake-title").inner_text() == title


def test_the_page_shows_no_recipe_and_no_bytes(visit: Open, server: Server, tmp_path: Path) -> None:
    seen = visit(server)
    seen.expected = ("status of 415",)
    (tmp_path / "notes.txt").write_text("no image")
    seen.drop(tmp_path / "notes.txt")
    expect(seen.see("#detail")).to_contain_text("begins with 'no image'")
    assert "b'" not in seen.see("#detail").inner_text()
    seen.see("summary").click()
    assert "recipe" not in seen.see("#card").inner_text()
    photograph(seen, "refused")
