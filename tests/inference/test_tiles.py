"""Tiles of an image that is too large to be seen at once."""

import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from coatnet.bundle import Bundle
from coatnet.cli.main import main
from coatnet.data.decode import MAX_MEGAPIXELS, BadImage, Scale
from coatnet.data.transforms import Preprocessing, seen_box
from coatnet.data.windows import open_windows
from coatnet.errors import UserError
from coatnet.evaluation.calibrate import calibrate
from coatnet.inference.predictor import Predictor
from coatnet.inference.tiles import classify_tiles, starts
from coatnet.model.network import create_model

RANDOM = np.random.default_rng(0)


def predictor_for(seen: Preprocessing) -> Predictor:
    torch.manual_seed(0)
    model = create_model("coatnet-femto-16", num_classes=3, in_channels=seen.channels, resolution=seen.side).eval()
    return Predictor(Bundle(model, ("ant", "bee", "cat"), seen), "torch", "fp32")


RGB = Preprocessing(resolution=16, crop_fraction=1.0)
DEEP = Preprocessing(resolution=16, mean=(0.5,) * 5, std=(0.3,) * 5, value_range=(0, 4095), crop_fraction=1.0)
SCALED = Preprocessing(resolution=16, mean=(0.5,) * 3, std=(0.3,) * 3, value_range=(0, 255), crop_fraction=1.0)
VALUES = RANDOM.integers(0, 4096, (70, 90, 5)).astype(np.uint16)


@pytest.mark.parametrize("length", [16, 17, 100, 1000])
@pytest.mark.parametrize("overlap", [0.0, 0.25, 0.9])
def test_tiles_cover_a_side_from_end_to_end_and_share_what_is_asked_for(length: int, overlap: float) -> None:
    found = starts(length, 16, overlap, "image")
    assert found[0] == 0 and found[-1] == max(0, length - 16)
    assert max(np.diff(found), default=0) <= max(1, 16 * (1 - overlap))


def test_one_tile_is_the_image_and_several_are_averaged(tmp_path: Path) -> None:
    pixels = RANDOM.integers(0, 256, (40, 40, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    predictor = predictor_for(RGB)

    (whole,) = predictor(tmp_path / "a.png")
    one = classify_tiles(predictor, tmp_path / "a.png", side=40)
    assert one.prediction.classes == whole.classes and one.boxes.tolist() == [[0, 0, 40, 40]]
    np.testing.assert_allclose(one.prediction.probabilities, whole.probabilities, atol=1e-6)

    four = classify_tiles(predictor, tmp_path / "a.png", side=20, overlap=0)
    alone = [predictor(pixels[top : top + 20, left : left + 20])[0] for top in (0, 20) for left in (0, 20)]
    for tile, expected in zip(four.each(), alone, strict=True):
        assert tile.classes == expected.classes
        np.testing.assert_allclose(tile.probabilities, expected.probabilities, atol=1e-6)
    np.testing.assert_allclose(four.probabilities.sum(1), 1, atol=1e-5)
    mean = dict(zip(four.classes, four.probabilities.mean(0), strict=True))
    assert mean == pytest.approx(dict(zip(four.prediction.classes, four.prediction.probabilities, strict=True)))
    assert four.prediction.probabilities != pytest.approx(alone[0].probabilities)
    np.testing.assert_array_equal(four.thumbnail, pixels)
    heat = four.heat("ant")
    np.testing.assert_allclose(heat[::20, ::20].ravel(), four.probabilities[:, 0])
    assert four.map().size == (40, 40) and not np.array_equal(np.asarray(four.map()), four.thumbnail)

    many, total, count = classify_tiles(predictor, tmp_path / "a.png", side=20, overlap=0.5), *np.zeros((2, 40, 40))
    for (top, left, height, width), row in zip(many.boxes, many.probabilities, strict=True):
        total[top : top + height, left : left + width] += row[1]
        count[top : top + height, left : left + width] += 1
    assert count.max() > 1
    np.testing.assert_allclose(many.heat("bee"), total / count, rtol=1e-5)


@pytest.mark.parametrize("layout", ["npy", "contig", "separate", "strips"])
def test_windows_of_a_file_are_those_of_the_image_without_holding_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, layout: str
) -> None:
    path = tmp_path / ("a.npy" if layout == "npy" else "a.tif")
    if layout == "npy":
        np.save(path, VALUES)
    else:
        tifffile = pytest.importorskip("tifffile")
        given = np.moveaxis(VALUES, -1, 0) if layout == "separate" else VALUES
        tile = {} if layout == "strips" else {"tile": (16, 32)}
        config = "separate" if layout == "separate" else "contig"
        tifffile.imwrite(path, given, photometric="minisblack", planarconfig=config, compression="zlib", **tile)
    scale = DEEP.scale
    assert scale is not None
    monkeypatch.setattr("coatnet.data.windows.read_image_file", pytest.fail)  # nothing is read whole
    with open_windows(path, scale) as windows:
        assert windows.size == (70, 90)
        for top, left, height, width in ((0, 0, 70, 90), (15, 31, 2, 2), (60, 1, 10, 89)):
            part = VALUES[top : top + height, left : left + width]
            assert torch.equal(windows.read(top, left, height, width), scale.levels(part))


def test_colors_of_a_tiff_are_read_as_they_are_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tifffile = pytest.importorskip("tifffile")
    monkeypatch.setattr("coatnet.data.windows.read_image_file", pytest.fail)  # nothing is read whole
    pixels = RANDOM.integers(0, 256, (50, 70, 3), dtype=np.uint8)
    for name, options in (("a.tif", {"compression": "lzw"}), ("b.tif", {"compression": "jpeg"})):
        tifffile.imwrite(tmp_path / name, pixels, photometric="rgb", tile=(16, 16), **options)
        with open_windows(tmp_path / name, None) as windows, Image.open(tmp_path / name) as image:
            expected = torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)
            apart = (windows.read(3, 5, 40, 60).int() - expected[:, 3:43, 5:65].int()).abs().max()
            assert apart <= (0 if name == "a.tif" else 4)  # two decoders of JPEG


@pytest.mark.parametrize("side", [None, 20, 33])
@pytest.mark.parametrize("size", [(16, 32), (32, 16), (16, 16)])
def test_tiles_have_the_shape_that_the_model_sees_so_that_all_of_the_image_is_seen(
    tmp_path: Path, size: tuple[int, int], side: int | None
) -> None:
    seen = Preprocessing(resolution=size, crop_fraction=1.0)
    Image.fromarray(RANDOM.integers(0, 256, (70, 90, 3), dtype=np.uint8)).save(tmp_path / "a.png")
    found = classify_tiles(predictor_for(seen), tmp_path / "a.png", side=side, overlap=0)
    shown = np.zeros((70, 90), bool)
    for top, left, height, width in found.boxes:
        edges = np.array(seen_box(height, width, seen)) * (width, height, width, height)
        first, upper, last, lower = np.round(edges + np.array([left, top, left, top])).astype(int)
        shown[upper:lower, first:last] = True
    assert shown.all() and min(found.boxes[0, 2:]) == (side or 16)


def test_an_image_above_the_limit_of_pixels_is_classified_tile_by_tile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    np.save(tmp_path / "large.npy", VALUES)
    monkeypatch.setenv(MAX_MEGAPIXELS, "0.01")  # of 5 channels: 45 x 45 pixels at once
    predictor = predictor_for(DEEP)
    (refused,) = predictor(tmp_path / "large.npy")
    assert refused.error is not None and refused.error.startswith("large: ")
    found = classify_tiles(predictor, tmp_path / "large.npy", batch_size=7)
    assert len(found.boxes) == 6 * 8 and found.size == (70, 90) and found.thumbnail.shape == (70, 90, 3)
    assert len(classify_tiles(predictor, tmp_path / "large.npy", side=40).boxes) == 2 * 3  # a row of these is too large


def test_tiles_are_of_the_pixels_of_the_file_however_large_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = Image.fromarray(RANDOM.integers(0, 256, (40, 60, 3), dtype=np.uint8))
    for name in ("a.tif", "a.png", "a.jpg", "a.webp"):
        image.save(tmp_path / name)
    monkeypatch.setattr("coatnet.data.decode.REDUCED_PIXELS", 40 * 60 // 4)
    predictor = predictor_for(RGB)
    expected, *others = (classify_tiles(predictor, tmp_path / f"a.{kind}") for kind in ("tif", "png", "jpg", "webp"))
    for found in others:
        assert found.size == expected.size == (40, 60)
        np.testing.assert_array_equal(found.boxes, expected.boxes)
    np.testing.assert_array_equal(others[0].probabilities, expected.probabilities)
    (whole,) = predictor([tmp_path / "a.png"])  # which is halved
    assert whole.error is None
    for kind in ("jpg", "webp"):
        assert classify_tiles(predictor_for(SCALED), tmp_path / f"a.{kind}").size == (40, 60)


def test_tiles_of_a_batch_are_not_held_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    np.save(tmp_path / "large.npy", np.zeros((1200, 1200, 5), np.uint16))
    monkeypatch.setenv(MAX_MEGAPIXELS, "0.5")  # of 5 channels: 100,000 pixels at once, a tile of 300 x 300
    predictor = predictor_for(DEEP)
    tracemalloc.start()
    try:
        assert len(classify_tiles(predictor, tmp_path / "large.npy", side=300, overlap=0).boxes) == 16
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 4 * 300 * 300 * 5 * 4  # the values and levels of one and the next; all sixteen are 29 MB


def test_the_thumbnail_has_one_stretch_of_values_for_all_tiles(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.repeat(np.uint16([100, 2100, 4000]), 16)[None, :, None].repeat(16, 0).repeat(5, 2))
    found = classify_tiles(predictor_for(DEEP), tmp_path / "a.npy", overlap=0)
    np.testing.assert_allclose(found.thumbnail[8, 8::16, 0], [0, 131, 255], atol=1)


def test_what_cannot_be_tiled_is_one_line(tmp_path: Path) -> None:
    predictor = predictor_for(RGB)
    (tmp_path / "empty.tif").write_bytes(b"")
    (tmp_path / "broken.tif").write_bytes(b"II*\0\x08\0\0\0")
    for name in ("empty.tif", "broken.tif", "missing.tif"):
        with pytest.raises(BadImage):
            classify_tiles(predictor, tmp_path / name)
    with pytest.raises(UserError, match="tile-overlap is a part of a side"):
        classify_tiles(predictor, tmp_path / "a.png", overlap=1.0)
    with pytest.raises(BadImage, match="tiles on a side"):
        starts(10**9, 16, 0.25, "a.tif")


def test_a_tile_is_refused_and_has_a_set_of_classes_as_an_image_of_its_own(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = create_model("coatnet-femto-16", num_classes=10, in_channels=1, resolution=8).eval()
    seen = Preprocessing(resolution=8, mean=(0.5,), std=(0.3,), crop_fraction=1.0)
    bundle = calibrate(Bundle(model, tuple("0123456789"), seen), "digits")
    predictor = Predictor(bundle, "torch", "fp32", reject=0.05, coverage=0.9)
    pixels = RANDOM.integers(0, 256, (40, 40), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    found = classify_tiles(predictor, tmp_path / "a.png", side=20, overlap=0)
    alone = [predictor(pixels[top : top + 20, left : left + 20])[0] for top in (0, 20) for left in (0, 20)]
    for tile, expected in zip(found.each(), alone, strict=True):
        assert tile.novelty == pytest.approx(expected.novelty, abs=0.01) and tile.novelty is not None
        assert (
            tile.unknown == expected.unknown and tile.class_set and set(tile.class_set) == set(expected.class_set or ())
        )


def test_the_command_prints_tiles_and_draws_their_map(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    np.save(tmp_path / "a.npy", VALUES)
    bundle = predictor_for(DEEP).bundle.save(tmp_path / "bundle")
    arguments = ["predict", str(bundle), str(tmp_path / "a.npy"), "--engine", "torch"]
    assert main([*arguments, "--tiles", "48", "--each-tile", "--tile-maps", str(tmp_path / "maps")]) == 0
    *tiles, last = capsys.readouterr().out.splitlines()
    assert len(tiles) == 6 and "a.npy[0:48,0:48]: " in tiles[0] and "a.npy: " in last
    (drawn,) = (tmp_path / "maps").iterdir()
    plain = classify_tiles(predictor_for(DEEP), tmp_path / "a.npy", side=48).thumbnail
    with Image.open(drawn) as image:
        assert image.size == (90, 70) and not np.array_equal(np.asarray(image), plain)
    assert main([*arguments, "--tiles", "48", "--each-tile", "--tile-overlap", "0.9"]) == 0
    assert len(capsys.readouterr().out.splitlines()) - 1 > len(tiles)
    for wrong, message in (
        (["--each-tile"], "give that as well"),
        (["--tiles", "0"], "--tiles is a side in pixels, such as 512, or auto"),
        (["--tiles", "8", "--out", str(tmp_path / "x.csv")], "give one of them"),
    ):
        assert main([*arguments, *wrong]) != 0
        assert message in capsys.readouterr().err


def test_a_scale_of_other_channels_is_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", VALUES)
    with (
        pytest.raises(BadImage, match="channels: it has 5 channels, 3 are read"),
        open_windows(tmp_path / "a.npy", Scale(3, 0, 1)) as windows,
    ):
        windows.read(0, 0, 4, 4)
