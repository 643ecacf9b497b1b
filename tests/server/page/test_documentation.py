"""The documentation of the API renders in a browser, from this server alone."""

from collections.abc import Callable

from tests.server.page.serving import Server
from tests.server.page.visiting import Visit


def test_the_documentation_renders_with_nothing_from_elsewhere(visit: Callable[..., Visit], server: Server) -> None:
    tab = visit(server)
    tab.page.goto(f"{server.url}/docs")
    tab.see(".opblock").first.wait_for()
    assert tab.see(".opblock").count() == 10
    operation = tab.see("#operations-default-predict_predict_post")
    operation.click()
    operation.locator(".responses-wrapper").wait_for()
    assert "likeliest first" in operation.inner_text()
