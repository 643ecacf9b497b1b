"""Images without labels are found in folders; folders that cannot be listed are reported."""

import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from coatnet.bundle import Bundle
from coatnet.cli.main import main
from coatnet.data.folder import expand_paths, open_images
from coatnet.data.open import open_dataset
from coatnet.data.transforms import Preprocessing
from coatnet.errors import UserError
from coatnet.model.network import create_model

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="its permissions are others")
DENIED = "unreadable: Permission denied"


@pytest.fixture
def folder() -> Iterator[Path]:
    """An image, and a folder that cannot be listed."""
    with tempfile.TemporaryDirectory() as root:  # pytest's own may be entered by its user alone
        folder = Path(root)
        folder.chmod(0o755)
        Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(folder / "seen.png")
        (folder / "locked").mkdir(mode=0)
        yield folder
        (folder / "locked").chmod(0o755)


@contextmanager
def no_privileges() -> Iterator[None]:
    """Root may read everything; 65534 is nobody."""
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(user)


def test_a_folder_that_cannot_be_listed_is_reported_after_the_images(folder: Path) -> None:
    with no_privileges():
        assert list(expand_paths([folder])) == [(folder / "seen.png", None), (folder / "locked", DENIED)]
        assert list(expand_paths([folder / "locked"])) == [(folder / "locked", DENIED)]


def test_a_file_in_an_unreadable_folder_is_reported_as_unreadable(folder: Path) -> None:
    hidden, missing = folder / "locked" / "1.png", [folder / "missing.png", folder / "seen.png" / "x", Path("\0")]
    with no_privileges():
        found = list(expand_paths([hidden, *missing]))
    assert found == [(hidden, DENIED), *((path, "no such file") for path in missing)]


def test_predict_names_an_unreadable_folder_and_fails(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = create_model("coatnet-femto", num_classes=2, resolution=32)
    Bundle(model, ("a", "b"), Preprocessing(resolution=32)).save(folder / ".bundle")  # hidden, so it is not searched
    with no_privileges():
        assert main(["predict", str(folder / ".bundle"), str(folder)]) == 1
    printed = capsys.readouterr()
    assert printed.out.count("\n") == 1 and str(folder / "seen.png") in printed.out
    error, left_out = printed.err.splitlines()
    assert error == f"coatnet: error: {folder / 'locked'}: {DENIED}" and left_out.endswith(": 1 hidden")


def test_opening_images_refuses_an_unreadable_folder(folder: Path) -> None:
    with no_privileges(), pytest.raises(UserError, match=f"locked: {DENIED}"):
        open_images([folder])


def test_names_with_line_breaks_are_shown_on_one_line(tmp_path: Path) -> None:
    (tmp_path / "two\nlines \x1b\x85\u2028é\u3000.png").write_bytes(b"")
    assert open_images([tmp_path]).describe(0) == "two\\nlines \\x1b\\x85\\u2028é\u3000.png"
    with pytest.raises(UserError, match=r"no\\nwhere: no such file"):
        open_images([tmp_path / "no\nwhere"])


def test_a_data_folder_that_cannot_be_read_is_named(folder: Path) -> None:
    with no_privileges(), pytest.raises(UserError, match=r"/locked cannot be read \(Permission denied\)"):
        open_dataset(folder / "locked")
