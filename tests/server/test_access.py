"""Which names of the server and which pages are accepted: real requests with the headers that browsers send."""

import pytest
from tests.server.serving import Address, image, make_predictor, running


@pytest.mark.parametrize(
    "host",
    ["localhost", "LOCALHOST:80", "127.0.0.1:8080", "[::1]:8080", "192.168.3.4", "mine.localhost:1", "localhost."],
)
def test_the_server_answers_to_localhost_and_to_addresses(server: Address, host: str) -> None:
    assert server.ask("GET", "/models", None, {"Host": host}).status == 200


@pytest.mark.parametrize(
    "host",
    [
        "evil.example",
        "evil.example:8080",
        "localhost.evil.example",
        "localhost@evil",
        "127.0.0.1.nip.example",
        "",
        "a b",
    ],
)
@pytest.mark.parametrize("path", ["/models", "/", "/v2/health/ready", "/nowhere"])
def test_a_foreign_name_is_refused_on_every_path(server: Address, host: str, path: str) -> None:
    answer = server.ask("GET", path, None, {"Host": host})
    assert answer.status == 421 and "--allowed-host" in str(answer.json["error"])


@pytest.mark.parametrize("path", ["/predict", "/v2/models/one/infer"])
@pytest.mark.parametrize(
    "origin", ["null", "http://evil.example", "http://localhost:1", "http://127.0.0.1", "file://", ""]
)
def test_pages_of_other_origins_compute_nothing(server: Address, path: str, origin: str) -> None:
    answer = server.ask("POST", path, image(), {"Origin": origin, "Content-Type": "text/plain"})
    assert answer.status == 403 and "page" in str(answer.json["error"])
    assert "access-control-allow-origin" not in answer.headers


def test_the_own_page_and_programs_compute(server: Address) -> None:
    own = f"127.0.0.1:{server.port}"
    for scheme in ("http", "https"):  # a proxy may speak TLS
        assert server.predict(image(), Origin=f"{scheme}://{own}").status == 200
    assert server.predict(image()).status == 200
    assert server.ask("GET", "/models", None, {"Origin": "http://evil.example"}).status == 200  # it cannot read that


def test_names_that_are_given_are_accepted() -> None:
    with running(make_predictor(), allowed_hosts=("models.example.com",)) as address:
        assert address.ask("GET", "/models", None, {"Host": "Models.Example.com"}).status == 200
        assert address.ask("GET", "/models", None, {"Host": "example.com"}).status == 421
        for host in ("models.example.com", "127.0.0.1:8080"):  # what a proxy passes on
            headers = {"Host": host, "Origin": "https://models.example.com"}
            assert address.ask("POST", "/predict", image(), headers).status == 200
        assert address.predict(image(), Origin="https://example.com").status == 403
    with running(make_predictor(), allowed_hosts=("*",)) as address:
        assert address.ask("GET", "/models", None, {"Host": "any.example"}).status == 200
        assert address.predict(image(), Origin="https://any.example").status == 403


def test_a_page_at_another_port_of_the_server_is_foreign() -> None:
    with running(make_predictor(), own_names=("127.0.0.1", "Box")) as address:
        for host in ("127.0.0.1", "box"):
            assert address.ask("GET", "/models", None, {"Host": f"{host}:{address.port}"}).status == 200
            assert address.predict(image(), Origin=f"http://{host}:1").status == 403
