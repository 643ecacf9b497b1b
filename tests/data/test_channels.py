"""Images of 1 to 16 channels and any depth: read as they are, scaled by what the data says."""

import io
import struct
import tracemalloc
import zipfile
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from coatnet.data.channels import (
    find_scale,
    measure,
    measure_if_deep,
    read_pixels,
    read_values,
    to_rgb,
    with_scale,
)
from coatnet.data.datasets import Dataset
from coatnet.data.decode import BadImage, Scale, decode, decoding_pixels, image_size
from coatnet.data.folder import expand_paths
from coatnet.data.loader import read_image
from coatnet.data.open import open_dataset
from coatnet.data.shards.pack import pack
from coatnet.data.splits import SplitRule, divide
from coatnet.data.transforms import Augmentation, EvaluationTransform, Preprocessing, TrainingTransform
from coatnet.data.windows import open_windows
from coatnet.errors import UserError

RANDOM = np.random.default_rng(0)
BANDS = RANDOM.integers(0, 4096, (37, 50, 12)).astype(np.uint16)


def tiff(values: np.ndarray, **options: object) -> bytes:
    tifffile = pytest.importorskip("tifffile")
    buffer = io.BytesIO()
    tifffile.imwrite(buffer, values, photometric="minisblack", **options)
    return buffer.getvalue()


def npy(values: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, values)
    return buffer.getvalue()


def npz(*arrays: np.ndarray, compressed: bool = True) -> bytes:
    buffer = io.BytesIO()
    (np.savez_compressed if compressed else np.savez)(buffer, *arrays)
    return buffer.getvalue()


def png_of_16_bits(values: np.ndarray) -> bytes:
    """A PNG of 2, 3 or 4 channels of 16 bits, which Pillow does not write."""
    height, width, channels = values.shape

    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    header = struct.pack(">IIBBBBB", width, height, 16, {2: 4, 3: 2, 4: 6}[channels], 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def first(values: np.ndarray) -> np.ndarray:
    return np.moveaxis(values, -1, 0)


@pytest.mark.parametrize(
    ("values", "options"),
    [
        (BANDS, {"planarconfig": "contig"}),
        (first(BANDS), {"planarconfig": "separate"}),
        (BANDS, {"planarconfig": "contig", "tile": (16, 16), "compression": "deflate", "predictor": True}),
        (first(BANDS), {"planarconfig": "separate", "tile": (16, 32), "compression": "lzw"}),
        (BANDS, {"planarconfig": "contig", "bigtiff": True, "rowsperstrip": 5, "byteorder": ">"}),
        (BANDS.astype(np.float32) / 7, {"planarconfig": "contig", "compression": "zstd"}),
        (BANDS[..., :3], {"planarconfig": "contig"}),
        (BANDS[..., :2], {"planarconfig": "contig"}),
    ],
)  # fmt: skip
def test_a_tiff_of_any_layout_gives_its_values(values: np.ndarray, options: dict[str, object]) -> None:
    data = tiff(values, **options)
    expected = np.moveaxis(values, 0, -1) if options["planarconfig"] == "separate" else values

    found = read_values(data, "a.tif")

    assert found.dtype == values.dtype and np.array_equal(found, expected)
    assert image_size(data, "a.tif") == (37, 50)


def test_pages_of_a_tiff_are_channels_where_so_many_are_wanted() -> None:
    data = tiff(first(BANDS[..., :5]))
    assert np.array_equal(read_values(data, "a.tif", 5), BANDS[..., :5])
    assert read_values(data, "a.tif").shape == (37, 50, 1)
    with pytest.raises(BadImage, match="it has 5 channels, one a page; more are read"):
        read_values(data, "a.tif", 6)
    with pytest.raises(BadImage, match="it has more than 4 channels, one a page; 4 are read"):  # none is left out
        read_values(data, "a.tif", 4)
    tifffile = pytest.importorskip("tifffile")
    reduced = io.BytesIO()
    with tifffile.TiffWriter(reduced) as file:
        for values in (BANDS[..., 0], BANDS[..., 1], BANDS[::2, ::2, 0]):
            file.write(values, contiguous=False)
    assert read_values(reduced.getvalue(), "a.tif", 2).shape == (37, 50, 2)  # a smaller page is no channel


def test_pages_of_8_bit_tiffs_are_three_channels_where_three_are_asked_for(tmp_path: Path) -> None:
    for name in ("a/0", "a/1", "b/0", "b/1"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        pages = RANDOM.integers(0, 256, (3, 20, 30)).astype(np.uint8)
        (tmp_path / f"{name}.tif").write_bytes(tiff(pages))
    found = measure_if_deep(open_dataset(tmp_path, evaluation=True).training, 3)
    assert found is not None and (found.scale.channels, found.scale.high) == (3, 255.0)
    for path in tmp_path.glob("*/*.tif"):
        Image.fromarray(RANDOM.integers(0, 256, (20, 30, 3)).astype(np.uint8)).save(path)  # colors, on one page
    assert measure_if_deep(open_dataset(tmp_path, evaluation=True).training, 3) is None


def test_one_channel_of_any_depth_needs_no_tifffile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wide, single = (BANDS[..., 0] * 16).astype(np.uint16), (BANDS[..., 0] / 3).astype(np.float32)
    files = {}
    for name, values, kind in (("a.png", wide, "PNG"), ("b.tif", wide, "TIFF"), ("c.tif", single, "TIFF")):
        buffer = io.BytesIO()
        Image.fromarray(values).save(buffer, kind)
        files[name] = (buffer.getvalue(), values)
    deep = tiff(BANDS, planarconfig="contig")
    monkeypatch.setitem(__import__("sys").modules, "tifffile", None)
    for name, (data, values) in files.items():
        assert np.array_equal(read_values(data, name)[..., 0], values), name
    missing = r"format: a TIFF of these channels or values needs tifffile: pip install 'coatnet\[tiff\]'"
    with pytest.raises(BadImage, match=missing):
        read_values(deep, "a.tif")
    for label in ("dry", "wet"):
        for number in range(2):
            (tmp_path / label).mkdir(exist_ok=True)
            (tmp_path / label / f"{number}.tif").write_bytes(deep)
    with pytest.raises(UserError, match=missing):  # not that it is no RGB
        open_dataset(tmp_path)


@pytest.mark.parametrize("channels", [2, 3, 4])
def test_a_png_of_16_bits_keeps_them_in_every_channel(channels: int) -> None:
    pytest.importorskip("imagecodecs")
    values = (BANDS[..., :channels] * 16 + 3).astype(np.uint16)
    assert np.array_equal(read_values(png_of_16_bits(values), "a.png"), values)


@pytest.mark.parametrize(
    ("data", "channels", "expected"),
    [
        (npy(BANDS), None, BANDS),
        (npy(first(BANDS)), None, BANDS),
        (npy(np.asfortranarray(BANDS)), 12, BANDS),
        (npy(BANDS[:12]), 12, BANDS[:12]),
        (npy(BANDS[..., 0]), 1, BANDS[..., :1]),
        (npy(BANDS.astype(">f4")), 12, BANDS.astype(np.float32)),
        (npz(BANDS), 12, BANDS),
        (npz(BANDS, compressed=False), 12, BANDS),
    ],
)
def test_a_numpy_file_is_an_image_with_its_channels_last_or_first(
    data: bytes, channels: int | None, expected: np.ndarray
) -> None:
    assert np.array_equal(read_values(data, "a.npy", channels), expected)
    assert image_size(data, "a.npy") == expected.shape[:2]


def test_files_of_8_bits_are_as_they_are_decoded() -> None:
    buffer = io.BytesIO()
    pixels = RANDOM.integers(0, 256, (20, 30, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(buffer, "PNG")
    assert np.array_equal(read_values(buffer.getvalue(), "a.png"), pixels)
    assert torch.equal(read_pixels(buffer.getvalue(), "a.png"), decode(buffer.getvalue(), "a.png"))
    assert torch.equal(read_pixels(npy(pixels), "a.npy"), decode(buffer.getvalue(), "a.png"))
    levels = read_pixels(buffer.getvalue(), "a.png", Scale(3, 0, 255))
    assert levels.dtype == torch.float32 and torch.equal(levels, decode(buffer.getvalue(), "a.png").float())


@pytest.mark.parametrize(
    ("data", "scale", "reason"),
    [
        (npy(BANDS), None, "pixels: an array of 12 channels of uint16, where 8-bit RGB is read"),
        (npy(BANDS), Scale(5, 0, 1), "channels: it has 12 channels, 5 are read"),
        (npy(BANDS)[:-1], Scale(12, 0, 1), "truncated: "),
        (npy(np.zeros((20, 30, 17))), Scale(17, 0, 1), "channels: it has 17; images of 1 to 16 are read"),
        (npy(np.array(["a"] * 4).reshape(2, 2)), Scale(1, 0, 1), "pixels: an array of <U1 of the shape"),
        (npy(np.zeros((2, 2), complex)), Scale(1, 0, 1), "pixels: an array of complex128"),
        (b"\x93NUMPY\x01\0\xff\xff{", Scale(1, 0, 1), "corrupt: its NumPy header cannot be read"),
        (npz(BANDS, BANDS), Scale(12, 0, 1), "corrupt: 2 arrays in the .npz; an image is one"),
        (b"PK\x03\x04 and no more", Scale(12, 0, 1), "corrupt: "),
    ],
)  # fmt: skip
def test_what_is_no_such_image_is_refused_by_a_reason(
    data: bytes, scale: Scale | None, reason: str, tmp_path: Path
) -> None:
    with pytest.raises(BadImage) as refused:
        read_pixels(data, "a.file", scale)
    assert refused.value.reason.startswith(reason)
    (tmp_path / "a.file").write_bytes(data)
    with pytest.raises(BadImage) as again, open_windows(tmp_path / "a.file", scale) as windows:
        windows.read(0, 0, 1, 1)  # of the whole or a part: one check
    assert again.value.reason == refused.value.reason


def test_a_rgb_model_says_what_twelve_channels_need() -> None:
    with pytest.raises(
        BadImage, match="it has 12 channels, where RGB is read: a model that was trained with --channels 12"
    ):
        read_pixels(tiff(BANDS, planarconfig="contig"), "a.tif")


@pytest.mark.slow
def test_files_that_claim_more_than_they_hold_take_no_memory() -> None:
    header = npy(np.zeros((4, 4), np.uint8))[:128].replace(b"(4, 4)", b"(9999999, 9)")
    with pytest.raises(BadImage, match=r"large: .* a side may have"):
        read_values(header, "a.npy")
    bomb = npz(np.zeros((40_000, 40_000), np.uint8))
    assert len(bomb) < 2_000_000
    with pytest.raises(BadImage, match="large: 40000 x 40000 pixels"):
        read_values(bomb, "a.npz")
    with pytest.raises(BadImage, match="large: 50 x 37 pixels, it may have"):
        read_values(npy(BANDS), "a.npy", max_pixels=10_000)
    assert decoding_pixels(npy(BANDS), "a.npy") >= 37 * 50


def zipped(entries: int, method: int) -> bytes:
    """An array of nine million zeros in a zip, beside other entries."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as archive:
        for number in range(entries - 1):
            archive.writestr(f"{number}.txt", b"")
        archive.writestr("image.npy", npy(np.zeros((3000, 3000), np.uint8)))
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (npz(np.zeros((3000, 3000))), "pixels: an array of 1 channel of float64, where 8-bit RGB is read"),
        (npz(np.zeros((3000, 3000, 4), np.uint8)), "pixels: an array of 4 channels of uint8, where 8-bit RGB is read"),
        (zipped(1, zipfile.ZIP_BZIP2), "format: compression 12 of an .npz is not read; deflate is"),
        (zipped(1, zipfile.ZIP_LZMA), "format: compression 14 of an .npz is not read; deflate is"),
        (zipped(5000, zipfile.ZIP_DEFLATED), "corrupt: 5,000 entries in the .npz; an image is one array"),
    ],
    ids=["doubles", "four channels", "bzip2", "lzma", "entries"],
)
def test_an_archive_is_refused_before_it_is_unpacked(data: bytes, reason: str) -> None:
    tracemalloc.start()
    try:
        with pytest.raises(BadImage) as refused:
            read_pixels(data, "a.npz")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert refused.value.reason.startswith(reason) and peak < 1_000_000


def test_an_archive_takes_the_memory_of_its_values_once() -> None:
    data = npz(np.zeros((1000, 1000, 3), np.uint16))
    tracemalloc.start()
    try:
        values = read_values(data, "a.npz")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert values.nbytes == 6_000_000 and peak < 1.6 * values.nbytes  # with what is allocated ahead, and a piece
    assert decoding_pixels(data, "a.npz") == 1000 * 1000 * 3


def test_the_scale_is_that_of_the_sensor_or_of_the_values() -> None:
    assert scale_of(BANDS) == Scale(12, 0, 4095)
    assert scale_of(BANDS * 4) == Scale(12, 0, 16_383)
    assert scale_of((BANDS / 4096).astype(np.float32)) == Scale(12, 0, 1)
    values = np.array([[[-20.0, 3.0]], [[np.nan, 80.0]]], np.float32)
    assert scale_of(values) == Scale(2, -20, 80)
    levels = Scale(2, -20, 80).levels(values)
    torch.testing.assert_close(levels, torch.tensor([[[0.0], [0.0]], [[58.65], [255.0]]]))
    torch.testing.assert_close(Scale(2, -20, 80).values(levels)[1], torch.tensor([[3.0], [80.0]]))


def test_the_widest_type_of_the_sample_decides_how_many_bits_there_are(tmp_path: Path) -> None:
    for number, values in enumerate((BANDS[..., 0], (BANDS[..., 0] // 16).astype(np.uint8)) * 2):
        for label in ("dry", "wet"):
            (tmp_path / label).mkdir(exist_ok=True)
            Image.fromarray(values).save(tmp_path / label / f"{number}.png")
    assert measure(open_dataset(tmp_path).training, 1).scale == Scale(1, 0, 4095)
    buffer = io.BytesIO()
    Image.fromarray(BANDS[..., 0]).save(buffer, "PPM")
    found = read_values(buffer.getvalue(), "a.pgm")
    assert found.dtype == np.uint16 and np.array_equal(found[..., 0], BANDS[..., 0])


def scale_of(values: np.ndarray) -> Scale:
    from coatnet.data import channels

    return channels.scale_of(values)


def make_folder(root: Path, values: np.ndarray = BANDS, name: str = "{}.npy") -> Path:
    for label in ("dry", "wet"):
        for number in range(3):
            path = root / label / name.format(number)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(npy(np.roll(values, number, axis=1)))
    return root


def test_a_folder_of_such_images_is_opened_with_their_scale(tmp_path: Path) -> None:
    splits = open_dataset(make_folder(tmp_path))
    assert splits.training.scale == Scale(12, 0, 4095)
    assert "50 x 37 pixels, 12 channels, values from 0 to 4095" in splits.describe()
    assert divide(splits, SplitRule(fold="1/2")).training.scale == splits.training.scale
    measured = measure(splits.training, 12)
    expected = BANDS.astype(np.float64).mean((0, 1)) / 4095
    np.testing.assert_allclose(measured.mean, expected, rtol=1e-4)
    np.testing.assert_allclose(measured.std, BANDS.astype(np.float64).std((0, 1)) / 4095, rtol=1e-4)


def test_photographs_have_no_scale_and_damaged_files_decide_nothing(tmp_path: Path) -> None:
    pixels = BANDS[..., :3].astype(np.uint8)
    assert find_scale(open_dataset(make_folder(tmp_path / "rgb", pixels)).training) is None
    folder = make_folder(tmp_path / "bands")
    (folder / "dry" / "-1.npy").write_bytes(b"<html>")
    (folder / "dry" / "-2.npy").write_bytes(npy(BANDS)[:1000])
    assert open_dataset(folder, validation_fraction=0.01).training.scale == Scale(12, 0, 4095)


def test_mixed_numbers_of_channels_are_one_error_that_names_both_files(tmp_path: Path) -> None:
    folder = make_folder(tmp_path)
    (folder / "wet" / "4.npy").write_bytes(npy(BANDS[..., :5]))
    splits = open_dataset(folder)
    with pytest.raises(UserError) as refused:
        measure(splits.training, 12)
    message = str(refused.value)
    assert message == (
        "wet/4.npy: channels: it has 5 channels, 12 are asked for; dry/1.npy has 12: all images of a data set need the "
        "same number"
    )  # fmt: skip


def test_images_are_prepared_alike_in_any_number_of_channels() -> None:
    seen = Preprocessing(resolution=32, mean=(0.5,) * 12, std=(0.25,) * 12, value_range=(0, 4095), crop_fraction=1)
    assert seen.scale is not None and seen.channels == 12
    levels = seen.scale.levels(BANDS)

    image = EvaluationTransform(seen)(levels)

    each = Preprocessing(resolution=32, mean=(0.5,), std=(0.25,), value_range=(0, 4095), crop_fraction=1)
    for channel in (0, 7, 11):
        torch.testing.assert_close(
            image[channel : channel + 1], EvaluationTransform(each)(levels[channel : channel + 1])
        )
    varied = Augmentation(crop_scale=(0.5, 1), rand_augment_layers=3, erasing_rate=1.0)
    trained = TrainingTransform(seen, varied)(levels, 3)
    assert trained.shape == (12, 32, 32) and torch.isfinite(trained).all()
    assert torch.equal(trained, TrainingTransform(seen, varied)(levels, 3))
    # What moves, moves in all channels alike: no operation on colors is among them.
    same = TrainingTransform(seen, varied)(levels[:1].expand(12, -1, -1), 3)
    torch.testing.assert_close(same, same[:1].expand(12, -1, -1))


def test_the_first_three_channels_are_shown(tmp_path: Path) -> None:
    shown = to_rgb(Scale(12, 0, 4095).levels(BANDS))
    assert (
        shown.shape == (3, 37, 50) and shown.dtype == torch.uint8 and int(shown.min()) == 0 and int(shown.max()) == 255
    )
    assert to_rgb(Scale(2, 0, 4095).levels(BANDS[..., :2])).shape == (3, 37, 50)


def test_a_file_of_other_channels_beyond_the_sample_ends_in_the_same_error(tmp_path: Path) -> None:
    folder = make_folder(tmp_path)
    (folder / "wet" / "4.npy").write_bytes(npy(BANDS[..., :5]))
    dataset = with_scale(open_dataset(folder, validation_fraction=0.01).training, Scale(12, 0, 4095))
    odd = next(index for index in range(len(dataset)) if dataset.describe(index) == "wet/4.npy")
    with pytest.raises(UserError, match=r"wet/4.npy: channels: it has 5 channels, 12 are read, as dry/\d.npy has: all"):
        read_image(dataset, odd)


def test_arrays_beside_images_are_no_images(tmp_path: Path) -> None:
    folder = make_folder(tmp_path)
    for label in ("dry", "wet"):
        for number in range(3):
            Image.fromarray(BANDS[..., :3].astype(np.uint8)).save(folder / label / f"{number}.png")
    splits = open_dataset(folder)
    names = [part.describe(index) for part in (splits.training, splits.validation) for index in range(len(part))]
    assert len(names) == 6 and all(name.endswith(".png") for name in names)
    assert "6 .npy" in splits.describe() and splits.training.scale is None
    left_out: Counter[str] = Counter()
    assert len([*expand_paths([folder], left_out)]) == 6 and left_out[".npy"] == 6


def test_shards_of_such_images_are_read_alike(tmp_path: Path) -> None:
    source = make_folder(tmp_path / "data", BANDS[:16, :16])
    packed = open_dataset(str(pack(source, tmp_path / "packed", num_workers=1).folder))
    assert packed.training.scale == Scale(12, 0, 4095)
    plain = open_dataset(source)

    def images(dataset: Dataset) -> list[tuple[int, bytes]]:
        found = (read_image(dataset, index) for index in range(len(dataset)))
        return sorted((int(label), np.asarray(image).tobytes()) for image, label in found)

    assert images(packed.training) == images(plain.training) and len(set(images(plain.training))) > 2


def test_transparency_is_a_channel_where_four_are_asked_for(tmp_path: Path) -> None:
    pixels = RANDOM.integers(0, 256, (9, 8, 4), dtype=np.uint8)
    for label in ("dry", "wet"):
        (tmp_path / label).mkdir()
        for number in range(2):
            Image.fromarray(pixels).save(tmp_path / label / f"{number}.png")
    training = open_dataset(tmp_path).training
    assert measure_if_deep(training, None) is None and measure_if_deep(training, 3) is None
    measured = measure_if_deep(training, 4)
    assert measured is not None and measured.scale == Scale(4, 0, 255)
    found = read_image(with_scale(training, measured.scale), 0)[0]
    assert np.array_equal(np.asarray(found).transpose(1, 2, 0), pixels.astype(np.float32))
