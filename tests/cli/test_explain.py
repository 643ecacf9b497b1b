"""`coatnet explain`: a PNG an image, errors in one line each, and the relative biases."""

from pathlib import Path

import numpy as np
import PIL.Image
import pytest

from coatnet.cli.explain import new_name
from coatnet.cli.main import main
from coatnet.inference import Predictor


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    images = tmp_path / "images"
    images.mkdir()
    generator = np.random.default_rng(0)
    for name, size in (("a.png", (28, 28)), ("wide.png", (90, 31)), ("color.jpg", (1500, 700))):
        PIL.Image.fromarray(generator.integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)).save(images / name)
    (images / "broken.png").write_bytes(b"hello there")
    return images


@pytest.mark.parametrize("method", ["layercam", "attention"])
def test_each_image_gets_a_file_and_each_unreadable_one_a_line(
    clothes_bundle: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], method: str
) -> None:
    out = tmp_path / "heat" / "maps"
    code = main(
        ["explain", str(clothes_bundle), str(folder), str(tmp_path / "gone.png"), "--method", method, "--out", str(out)]
    )
    printed = capsys.readouterr()
    assert code == 1
    assert [line.split(": ")[2] for line in printed.err.splitlines()] == [
        str(folder / "broken.png"),
        str(tmp_path / "gone.png"),
    ]
    lines, predictor = printed.out.splitlines(), Predictor(clothes_bundle, "torch", "fp32")
    assert len(lines) == 3
    assert len([*out.iterdir()]) == 3
    for line, name, size in zip(
        lines, ("a.png", "color.jpg", "wide.png"), ((224, 224), (1024, 478), (270, 93)), strict=True
    ):
        path, answer, file = line.split(": ")
        prediction = predictor(path, top_k=1)[0]
        assert path == str(folder / name)
        assert answer == f"{prediction.classes[0]} {100 * prediction.probabilities[0]:.1f} %"
        with PIL.Image.open(file) as image:
            assert image.size == (2 * size[0] + 8, size[1])
            halves = [np.asarray(image)[:, : size[0]], np.asarray(image)[:, -size[0] :]]
        explanation = predictor.explain(path, method=method)[0]
        expected = explanation.overlay(PIL.Image.fromarray(halves[0]))
        assert np.abs(np.asarray(expected).astype(int) - halves[1]).max() <= 1
        assert not np.array_equal(*halves)
        with PIL.Image.open(path) as given:  # the left half is the image itself, scaled
            small = np.asarray(given.convert("RGB").resize((8, 8), PIL.Image.Resampling.BOX)).astype(int)
        shown = np.asarray(PIL.Image.fromarray(halves[0]).resize((8, 8), PIL.Image.Resampling.BOX))
        assert np.abs(small - shown).mean() < 10


def test_two_images_of_one_name_get_two_files(clothes_bundle: Path, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "a.png").write_bytes((folder / "a.png").read_bytes())
    given = [str(folder / "a.png"), str(tmp_path / "other" / "a.png")]
    assert main(["explain", str(clothes_bundle), *given, "--class", "Ankle boot", "--out", str(tmp_path / "out")]) == 0
    names = ["a.Ankle-boot-2.png", "a.Ankle-boot.png"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == names
    # Another method or stage lies beside the first, and does not replace it.
    for how in (["--method", "attention"], ["--stage", "1"]):
        assert main(["explain", str(clothes_bundle), given[0], "--out", str(tmp_path / "out"), *how]) == 0
    written = {path.name for path in (tmp_path / "out").iterdir()}
    assert written == {*names, "a.Bag.attention.png", "a.Bag.stage-1.png"}


def test_the_relative_biases_are_written(
    clothes_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["explain", str(clothes_bundle), "--biases", "--out", str(tmp_path / "biases")]) == 0
    names = [f"biases-stage-3-block-{block}.png" for block in (1, 2)]
    assert sorted(path.name for path in (tmp_path / "biases").iterdir()) == names
    assert "4 heads, offsets up to 7 cells" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give images to explain, or --biases"),
        (["a.png", "--biases"], "--biases is about the network"),
        (["a.png", "--method", "gradcam"], "it is one of layercam, attention, occlusion"),
        (["a.png", "--class", "Ankle boots"], "did you mean 'Ankle boot'"),
        (["a.png", "--stage", "9"], "0 is the stem"),
    ],
)
def test_wrong_arguments_are_one_line_and_leave_nothing(
    clothes_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert main(["explain", str(clothes_bundle), *arguments, "--out", str(tmp_path / "out")]) == 2
    printed = capsys.readouterr().err
    assert message in printed
    assert printed.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_pictures_are_not_written_among_the_images_they_explain(
    clothes_bundle: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(folder.iterdir())
    for out in (folder, folder / "maps"):
        assert main(["explain", str(clothes_bundle), str(folder), "--out", str(out)]) == 2
        assert "give a folder outside for out" in capsys.readouterr().err
    tiles = ["predict", str(clothes_bundle), str(folder), "--tiles", "28", "--tile-maps", str(folder / "maps")]
    assert main(tiles) == 2
    assert sorted(folder.iterdir()) == before


def test_names_of_files_fit_whatever_the_script(tmp_path: Path) -> None:
    path = new_name(tmp_path, "写真" * 60, "日本" * 40, set(), ".attention.stage-3")
    assert path.name.startswith("写真") and ".日本" in path.name
    path.touch()  # of more than 255 bytes it could not be
