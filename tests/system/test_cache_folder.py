"""One cache folder for all, named by one variable."""

from pathlib import Path

import pytest

from coatnet.errors import UserError
from coatnet.system.files import cache_folder


def test_the_variables_name_the_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home-of-a-user")
    monkeypatch.delenv("COATNET_CACHE_DIR", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert cache_folder() == Path("/home-of-a-user/.cache/coatnet")
    monkeypatch.setenv("XDG_CACHE_HOME", "/shared")
    assert cache_folder() == Path("/shared/coatnet")
    monkeypatch.setenv("COATNET_CACHE_DIR", "/own")
    assert cache_folder() == Path("/own")


def test_without_a_home_the_variables_suffice(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", no_home)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("COATNET_CACHE_DIR", "/own")
    assert cache_folder() == Path("/own")
    monkeypatch.delenv("COATNET_CACHE_DIR")
    with pytest.raises(UserError, match="set COATNET_CACHE_DIR"):
        cache_folder()
