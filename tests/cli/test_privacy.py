"""No file of a run, a bundle, an export, a batch output or a packing names a folder of the user's or holds a secret."""

import json
import re
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import ClassVar

import pytest
from PIL import Image

from coatnet.bundle.bundle import place_name, without_places
from coatnet.cli.main import main
from coatnet.cli.predict import print_prediction
from coatnet.data.shards.pack import pack
from coatnet.errors import UserError, without_credentials
from coatnet.inference.predictor import Prediction
from coatnet.system import credentials
from coatnet.training.config import Recipe, read_yaml

PERSON, PROJECT = b"planted-person", b"planted-project"
PASSWORD, SIGNATURE = b"pl4nted-p4ssword", b"pl4nted-sign4ture"
TINY = ("--model=coatnet-femto-16", "--batch_size=8", "--num_workers=0", "--bad_image_budget=0.2")


@pytest.fixture
def home(tmp_path, monkeypatch):
    """The home folder of a person with a project of 16 images, one of them damaged."""
    home = tmp_path / "home" / PERSON.decode()
    for index in range(16):
        path = home / PROJECT.decode() / "images" / "ab"[index % 2] / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (16, 16), (16 * index, 0, 255 * (index % 2))).save(path)
    path.write_bytes(path.read_bytes()[:40])
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("COATNET_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    return home


def files_with(folder, *texts):
    """The files below that hold one of the texts, by their path and what they hold."""
    found = [
        (path, text) for path in folder.rglob("*") if path.is_file() for text in texts if text in path.read_bytes()
    ]
    return [(str(path.relative_to(folder)), text) for path, text in found]


def run(capsys, code, *arguments):
    """Run a command; what it printed."""
    assert main(list(map(str, arguments))) == code
    return "".join(capsys.readouterr())


@pytest.mark.slow
def test_no_output_names_the_folders_of_its_user(home, tmp_path, monkeypatch, capsys):
    out, data = tmp_path / "out", home / PROJECT.decode() / "images"
    printed = run(capsys, 0, "train", "--data", data, "--out", out / "run", "--epochs=1", *TINY)
    printed += run(capsys, 1, "predict", out / "run", data, "--out", out / "rows.parquet")
    printed += run(capsys, 1, "features", out / "run", "--data", data, "--out", out / "features.npy")
    printed += run(capsys, 1, "pack", data, out / "packed", "--workers=1")
    printed += run(capsys, 0, "evaluate", out / "run", "--data", data)
    pytest.importorskip("onnxscript")
    printed += run(capsys, 0, "export", out / "run", "--format=onnx", "--data", data, "--out", out / "onnx")
    printed += run(capsys, 0, "export", out / "run", "--format=torch-export", "--data", data, "--out", out / "graph")
    assert PERSON.decode() not in printed and PROJECT.decode() not in printed
    # Of a run, recipe.yaml alone says where its data is, counted from the home folder: to resume it.
    assert files_with(out, PERSON, PROJECT, b'File "') == [("run/recipe.yaml", PROJECT)]
    for name in ("report.md", "report.json", "bundle/config.json", "checkpoints"):
        texts = [path for path in [out / "run" / name, *(out / "run" / name).rglob("*")] if path.is_file()]
        assert any(b"b/15.png" in path.read_bytes() for path in texts)
    printed = run(capsys, 0, "train", "--data", data, "--out", out / "run", "--epochs=1.5", *TINY)
    assert "resuming" in printed and files_with(out / "run", PERSON) == []


def test_a_run_beside_its_data_says_where_that_is_from_its_own_folder(home, capsys):
    project = home / PROJECT.decode()
    run(capsys, 0, "train", "--data", project / "images", "--out", project / "run", "--epochs=0.5", *TINY)
    assert files_with(project / "run", PERSON, PROJECT) == []
    assert read_yaml(project / "run" / "recipe.yaml")["data"] == str(project / "images")
    assert Recipe.from_yaml(project / "run" / "recipe.yaml").data == str(project / "images")


class Guarded(SimpleHTTPRequestHandler):
    """Files for whoever gives the password and the signature."""

    asked: ClassVar[list] = []

    def do_HEAD(self):
        self.guard(super().do_HEAD)

    def do_GET(self):
        self.guard(super().do_GET)

    def guard(self, answer):
        Guarded.asked.append((self.headers["Authorization"], self.path))
        answer() if self.headers["Authorization"] and SIGNATURE.decode() in self.path else self.send_error(401)

    def send_head(self):
        if wanted := re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", "")):
            first, last = map(int, wanted.groups())
            with open(self.translate_path(self.path), "rb") as file:
                file.seek(first)
                found = file.read(last + 1 - first)
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {first}-{last}/*")
            self.send_header("Content-Length", str(len(found)))
            self.end_headers()
            self.wfile.write(found)
            return None
        return super().send_head()

    def log_message(self, *_):
        pass


@pytest.mark.slow
def test_credentials_of_a_url_are_used_and_shown_nowhere(home, tmp_path, capsys):
    pytest.importorskip("aiohttp")
    pack(home / PROJECT.decode() / "images", tmp_path / "packed", num_workers=1)
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Guarded, directory=str(tmp_path / "packed")))
    Thread(target=server.serve_forever, daemon=True).start()
    place = f"127.0.0.1:{server.server_port}"
    url = f"http://someone:{PASSWORD.decode()}@{place}/?sig={SIGNATURE.decode()}"
    try:
        out = tmp_path / "out"
        printed = run(capsys, 0, "train", "--data", url, "--out", out / "run", "--epochs=0.5", *TINY)
        printed += run(capsys, 0, "train", "--data", url, "--out", out / "run", "--epochs=1", *TINY)
        assert "resuming" in printed
        printed += run(capsys, 0, "predict", out / "run", url, "--out", out / "rows.parquet")
        printed += run(capsys, 0, "evaluate", out / "run", "--data", url)
        printed += run(capsys, 2, "evaluate", out / "run", "--data", url.replace(place, "127.0.0.1:9"))
        printed += run(capsys, 2, "predict", out / "run", url, url, "--out", out / "rows.parquet")
        printed += run(capsys, 2, "train", "--data", url, url, "--out", out / "run")
        assert read_yaml(out / "run" / "recipe.yaml")["data"] == f"http://{place}/"
        assert all(known for known, _ in Guarded.asked)
        assert PASSWORD.decode() not in printed and SIGNATURE.decode() not in printed and "someone" not in printed
        assert files_with(tmp_path / "out", PASSWORD, SIGNATURE) == []
        assert files_with(tmp_path / "cache", PASSWORD, SIGNATURE) == []
    finally:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize(
    ("given", "shown"),
    [
        ("https://user:pw@host:8080/a/b", "https://host:8080/a/b"),
        ("https://host/a?sig=pw&se=1#pw", "https://host/a"),
        ("hf://hf_pw@owner/name", "hf://owner/name"),
        ("s3://key:se/cr?e#t@bucket/a", "s3://bucket/a"),
        ("simplecache::https://user:p@pw@host/a", "simplecache::https://host/a"),
        ("zip://a.zip::https://user:pw@host/a", "zip://a.zip::https://host/a"),
        ("https://host:80/a@v1", "https://host:80/a@v1"),
        ("hf://owner/name", "hf://owner/name"),
        ("C:\\images?#@", "C:\\images?#@"),
    ],
)
def test_credentials_are_cut_out_of_every_form_of_url(given, shown):
    assert credentials.conceal(given) == shown == credentials.conceal(shown)
    assert without_credentials(f"404, {given!r} is not there") == f"404, {shown!r} is not there"
    assert str(UserError(f"{given} failed")) == f"{shown} failed"
    assert str(UserError(f"{Path(given)} is no bundle")) == f"{Path(shown)} is no bundle"
    assert Recipe(data=given).data == shown


def test_credentials_of_a_web_server_come_from_netrc_too(tmp_path, monkeypatch):
    (tmp_path / "netrc").write_text("machine host login someone password p@ss/word\n")
    (tmp_path / "netrc").chmod(0o600)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    assert credentials.connection("https://host/a/") == ("https://someone:p%40ss%2Fword@host/a", "")
    assert credentials.connection("https://other/a") == ("https://other/a", "")
    assert credentials.connection("s3://host/a") == ("s3://host/a", "")
    credentials.conceal("https://mine:pw@host/a?x=1#y")
    assert credentials.connection("https://host/a") == ("https://mine:pw@host/a", "?x=1")
    assert credentials.token_of(credentials.conceal("hf://hf_pw@owner/name")) == "hf_pw"
    assert credentials.token_of("hf://owner/other") is None


def test_a_record_of_an_earlier_release_is_published_without_its_paths():
    mistakes = [{"image": "/planted/x/images/a/1.png", "truth": "/a", "predicted": "b", "probability": 0.9}]
    record = {
        "recipe": {"data": "/planted/x/images", "init": "/planted/runs/first/bundle", "teacher": "/else/t", "seed": 1},
        "report": {"mistakes": mistakes, "bad_images": {"/else/where/2.png": "cut"}, "data": "images"},
    }
    shared = without_places(record)
    assert shared["recipe"] == {"data": "images", "init": "first/bundle", "teacher": "t", "seed": 1}
    assert shared["report"]["mistakes"] == [mistakes[0] | {"image": "a/1.png"}]
    assert shared["report"]["bad_images"] == {"2.png": "cut"} and without_places(shared) == shared
    for broken in (
        {"recipe": 3, "report": []},
        {"recipe": {"data": None}, "report": {"mistakes": [3], "bad_images": 1}},
    ):
        json.dumps(without_places(broken))
    assert place_name("timm/coatnet_0_rw_224.sw_in1k") == "timm/coatnet_0_rw_224.sw_in1k"


def test_a_url_among_the_images_is_refused_without_its_credentials(capsys):
    prediction = Prediction(str(Path("https://user:pw@host/a?sig=pw")), error="a URL")
    for as_json in (False, True):
        print_prediction(prediction, as_json)
    shown = capsys.readouterr()
    assert "pw" not in shown.out + shown.err and "https:/host/a" in shown.out and "https:/host/a: a URL" in shown.err


@pytest.mark.parametrize(
    "arguments",
    [
        ["train", "--data", "digits"],
        ["predict", "bundle", "images"],
        ["features", "bundle", "--data", "digits"],
        ["export", "bundle", "--format", "onnx"],
        ["pack", "digits"],
    ],
)
def test_results_are_not_written_to_a_url(arguments, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    url = f"s3://user:{PASSWORD.decode()}@bucket/run.parquet?sig={SIGNATURE.decode()}"
    out = [url] if arguments[0] == "pack" else ["--out", url]
    assert main([*arguments, *out]) == 2
    printed = capsys.readouterr()
    assert "is a URL" in printed.err and printed.err.count("\n") == 1
    assert PASSWORD.decode() not in printed.out + printed.err
    assert list(tmp_path.iterdir()) == []
