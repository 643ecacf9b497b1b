"""`coatnet serve`: names of models, the token, and errors of one line."""

import os
from pathlib import Path

import pytest

from coatnet.cli.main import main
from coatnet.cli.serve import named_bundles, read_token
from coatnet.errors import UserError
from coatnet.server import Settings


def test_a_model_is_called_as_given_or_by_its_path() -> None:
    given = [
        "runs/mine/bundle",
        "b=runs/mine/bundle",
        "timm/coatnet_0_rw_224.sw_in1k@main",
        "hf://me/garments@refs/pr/3",
    ]
    given += ["some/folder/"]
    assert named_bundles(given) == {
        "mine": "runs/mine/bundle",
        "b": "runs/mine/bundle",
        "coatnet_0_rw_224.sw_in1k": "timm/coatnet_0_rw_224.sw_in1k@main",
        "garments": "hf://me/garments@refs/pr/3",
        "folder": "some/folder/",
    }


def test_a_path_with_an_equals_sign_is_a_path(tmp_path: Path) -> None:
    (tmp_path / "lr=1").mkdir()
    assert named_bundles([str(tmp_path / "lr=1")]) == {"lr-1": str(tmp_path / "lr=1")}


@pytest.mark.parametrize(
    ("given", "message"),
    [(["a/b", "c/b"], "two models are called 'b'"), (["x y=a"], "not a name for a model"), (["a="], "names no bundle")],
)
def test_wrong_names_are_refused(given: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        named_bundles(given)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--max-megabytes", "inf"], "--max-megabytes is inf; give a finite number"),
        (["--max-megabytes", "nan"], "--max-megabytes is nan"),
        (["--delay-ms", "-1"], "--delay-ms is -1"),
        (["--deadline", "inf"], "--deadline is inf"),
        (["--max-megabytes", "0"], "max_bytes is 0; it must be above 0"),
        (["--set-method", "aps"], "--set-method says how the sets of --set are made"),
    ],
)
def test_a_limit_without_sense_is_one_line(
    options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["serve", "runs/nowhere", *options]) == 2
    printed = capsys.readouterr()
    assert message in printed.err and printed.err.count("\n") == 1


@pytest.mark.parametrize(("megabytes", "together"), [("600", 600), ("30", 512)])
def test_an_upload_as_large_as_allowed_has_room(megabytes: str, together: int, monkeypatch: pytest.MonkeyPatch) -> None:
    found = []

    def serve(*_: object, settings: Settings, **__: object) -> bool:
        found.append(settings)
        return True

    monkeypatch.setattr("coatnet.server.main.serve", serve)
    assert main(["serve", "runs/mine", "--max-megabytes", megabytes]) == 0
    assert (found[0].max_bytes, found[0].max_upload_bytes) == (int(megabytes) * 2**20, together * 2**20)


@pytest.mark.parametrize(
    ("options", "changed"),
    [
        (["--reject", "0.1", "--set", "0.8", "--set-method", "aps"],
         {"reject": 0.1, "coverage": 0.8, "set_method": "aps"}),
        (["--raw"], {"raw": True}),
    ],
)  # fmt: skip
def test_what_is_asked_of_a_calibrated_model_reaches_it(
    options: list[str], changed: dict, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = []

    def predictor(source: str, *given: object, device: str, **answers: object) -> None:
        asked.append((source, *given, answers))
        raise UserError("far enough")

    monkeypatch.setattr("coatnet.server.main.Predictor", predictor)
    names = ["serve", "one=runs/mine", "--port", "0", "--engine", "torch", "--precision", "bf16"]
    assert main([*names, *options]) == 2 and "far enough" in capsys.readouterr().err
    usual = {"reject": None, "coverage": None, "set_method": "lac", "raw": False}
    assert asked == [("runs/mine", "torch", "bf16", usual | changed)]


def test_a_token_has_eight_characters_that_fit_a_header(tmp_path: Path) -> None:
    assert read_token(None, {}) is None
    assert read_token(None, {"COATNET_TOKEN": " long-enough\n"}) == "long-enough"
    (tmp_path / "token").write_text("from-a-file\n")
    (tmp_path / "token").chmod(0o600)
    assert read_token(str(tmp_path / "token"), {"COATNET_TOKEN": "from-the-shell"}) == "from-a-file"
    for wrong in ("", "short", "with a space", "unwritablé"):
        with pytest.raises(UserError, match="holds no token"):
            read_token(None, {"COATNET_TOKEN": wrong})
    with pytest.raises(UserError, match="cannot be read: No such file"):
        read_token(str(tmp_path / "nowhere"), {})


@pytest.mark.skipif(os.name != "posix", reason="only POSIX has these permissions")
def test_a_token_file_that_others_can_read_is_refused(tmp_path: Path) -> None:
    token = tmp_path / "token"
    token.write_text("from-a-file\n")
    for mode in (0o644, 0o640, 0o604, 0o602):
        token.chmod(mode)
        with pytest.raises(UserError, match=r"can be read by other users.*chmod 600"):
            read_token(str(token), {})
    token.chmod(0o400)
    assert read_token(str(token), {}) == "from-a-file"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("a", "--prot", "80"), "--port"),
        (("a", "--port", "80000"), "no port 80000"),
        (("a", "--host", "no.such.host.invalid"), "no address no.such.host.invalid"),
        (("a", "--batch-size", "0"), "batch_size is 0"),
        (("a", "--token", "x"), "--token-file"),
        (("a", "--allowed-host", "https://models.example.com"), "not a host name"),
        (("a", "--allowed-host", ""), "not a host name"),
    ],
)
def test_an_error_is_one_line(arguments: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
