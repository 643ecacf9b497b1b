"""What is fuzzed: the readers of all untrusted input, with small valid inputs to begin from."""

import base64
import io
import json
import os
import struct
import tarfile
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from PIL import Image, features

from coatnet.bundle import Bundle, load
from coatnet.bundle.timm.folders import read_timm_folder, write_timm_folder
from coatnet.data.builtin import read_idx
from coatnet.data.channels import read_pixels, read_values, to_levels
from coatnet.data.decode import BadImage, Scale, decode, decoding_pixels, image_size
from coatnet.data.manifest import open_manifest, read_manifest
from coatnet.data.open import open_dataset
from coatnet.data.shards.index import digest
from coatnet.data.shards.pack import pack
from coatnet.data.shards.webdataset import read_samples
from coatnet.data.transforms import Preprocessing
from coatnet.data.windows import open_windows
from coatnet.errors import UserError
from coatnet.inference.batch.parts import Plan
from coatnet.inference.predictor import Predictor
from coatnet.model.complexity import inference_bytes
from coatnet.model.config import Stage
from coatnet.model.network import create_model
from coatnet.model.registry import find_variant
from coatnet.server.errors import RequestError
from coatnet.server.protocol import read_request
from coatnet.training.checkpoint import CorruptCheckpoint, load_checkpoint, part_name, publish, stage, write_part
from coatnet.training.config import Recipe

ALLOWED: tuple[type[BaseException], ...] = (
    UserError,
    CorruptCheckpoint,
    RequestError,
)  # the one kind of error of each reader
SUFFIXES = {"jpeg": "JPEG", "png": "PNG", "gif": "GIF", "bmp": "BMP", "tiff": "TIFF", "webp": "WEBP", "ppm": "PPM"}
SUFFIXES |= {"avif": "AVIF"} if features.check("avif") else {}


@dataclass(frozen=True)
class Target:
    """A reader: valid inputs, and the call with any input, which returns or raises one of `ALLOWED`."""

    seeds: tuple[bytes, ...]
    read: Callable[[bytes], object]


def make_targets(folder: Path) -> dict[str, Target]:
    """All targets by name. What they read is written below `folder`."""
    os.environ["COATNET_CACHE_DIR"] = str(folder / "cache")
    images = {name: image_seeds(kind) for name, kind in SUFFIXES.items()}
    targets = {f"decode-{name}": Target(seeds, read_image) for name, seeds in images.items()}
    for name, seeds in deep_seeds().items():
        if name in ("npy", "tiff"):
            targets[f"windows-{name}"] = windows_target(folder / f"windows.{name}", seeds)
    targets |= {f"values-{name}": Target(seeds, read_deep_image) for name, seeds in deep_seeds().items()}
    return targets | bundles(folder, images["png"][0]) | data(folder, images["png"][0]) | texts(folder)


def image_seeds(kind: str) -> tuple[bytes, ...]:
    pixels = np.random.default_rng(0).integers(0, 255, (12, 17, 3), dtype=np.uint8)
    found = []
    for image in (Image.fromarray(pixels), Image.fromarray(pixels).convert("L"), Image.fromarray(pixels).convert("P")):
        for options in ({}, {"progressive": True, "compression": "tiff_lzw", "save_all": True}):
            buffer = io.BytesIO()
            try:
                image.save(buffer, kind, **options)
            except (ValueError, OSError, KeyError):  # a mode that the format lacks
                continue
            found.append(buffer.getvalue())
    return tuple(dict.fromkeys(found))


def read_image(content: bytes) -> None:
    image_size(content, "image")
    decode(content, "image")


def deep_seeds() -> dict[str, tuple[bytes, ...]]:
    """Images of other channels and types than 8-bit RGB, by kind."""
    values = np.random.default_rng(0).integers(0, 4096, (12, 17, 5)).astype(np.uint16)
    arrays, archives, tiffs = [], [], []
    for each in (values, values.astype(np.float32).transpose(2, 0, 1), values[..., 0]):
        buffer = io.BytesIO()
        np.save(buffer, each)
        arrays.append(buffer.getvalue())
    for save in (np.savez, np.savez_compressed):
        buffer = io.BytesIO()
        save(buffer, values)
        archives.append(buffer.getvalue())
    found = {"npy": tuple(arrays), "npz": tuple(archives)}
    try:
        import imagecodecs
        import tifffile
    except ImportError:
        return found
    layouts: tuple[dict[str, Any], ...] = (
        {},
        {"tile": (16, 16), "compression": "deflate", "predictor": True},
        {"compression": "lzw", "bigtiff": True, "byteorder": ">"},
        {"planarconfig": "separate", "compression": "zstd", "rowsperstrip": 5},
        {"compression": "packbits"},
    )
    for options in layouts:
        buffer, options = io.BytesIO(), {"planarconfig": "contig"} | options
        given = values.transpose(2, 0, 1) if options["planarconfig"] == "separate" else values
        tifffile.imwrite(buffer, given, photometric="minisblack", **options)
        tiffs.append(buffer.getvalue())
    return found | {"tiff": tuple(tiffs), "png": (imagecodecs.png_encode(values[..., :3].copy()),)}


def windows_target(path: Path, seeds: tuple[bytes, ...]) -> Target:
    """Windows of a file on the disk."""

    def read(content: bytes) -> None:
        path.write_bytes(content)
        for scale in (Scale(5, 0, 4095), None):
            with suppress(BadImage), open_windows(path, scale) as windows:
                height, width = windows.size
                for top, left in ((0, 0), (max(0, height - 9), max(0, width - 9))):
                    with suppress(Exception):  # whatever it is, `classify_tiles` makes a line of it
                        windows.read(top, left, min(9, height), min(9, width))

    return Target(seeds, read)


def read_deep_image(content: bytes) -> None:
    with suppress(BadImage):
        image_size(content, "image")
        decoding_pixels(content, "image")
    for scale in (Scale(5, 0, 4095), None):
        with suppress(BadImage):
            read_pixels(content, "image", scale)
    values = read_values(content, "image")
    to_levels(values, "image", Scale(values.shape[-1], 0, 4095))


def bundles(folder: Path, image: bytes) -> dict[str, Target]:
    """The files of a bundle, one of timm's folders and the bodies of requests."""
    torch.manual_seed(0)
    stages = (Stage("mbconv", 1, 16, 1), Stage("transformer", 1, 16))
    variant = replace(find_variant("coatnet-femto-16"), name="tiny", stem_width=8, head_dim=8, stages=stages)
    model = create_model(variant, num_classes=3, in_channels=3, resolution=8).eval()
    record = {"recipe": {"validation_fraction": 0.1}, "report": {"figures": {"n": 3}, "intervals": {"top1": [0.1, 1]}}}
    bundle = Bundle(model, ("cat", "dog", "owl"), Preprocessing(resolution=8), record=record)
    saved = bundle.save(folder / "bundle")
    config, weights = ((saved / name).read_bytes() for name in ("config.json", "model.safetensors"))
    length = struct.unpack("<Q", weights[:8])[0]
    header, tensors = weights[8 : 8 + length], weights[8 + length :]

    pixels = np.random.default_rng(0).integers(0, 255, (30, 40, 3), np.uint8)

    def read_config(content: bytes) -> None:
        (saved / "model.safetensors").write_bytes(weights)
        (saved / "config.json").write_bytes(content)
        loaded = load(saved)
        loaded.card(), repr(loaded)
        seen = loaded.preprocessing
        if seen.resized_side < 1_000 and inference_bytes(loaded.model.variant, seen.resolution) < 1e8:
            (found,) = Predictor(loaded, "torch", "fp32")(pixels)
            assert found.error or np.isfinite(found.probabilities).all()

    def read_weights(content: bytes) -> None:
        (saved / "config.json").write_bytes(config)
        (saved / "model.safetensors").write_bytes(content)
        load(saved)

    def read_header(content: bytes) -> None:
        read_weights(struct.pack("<Q", len(content)) + content + tensors)

    timm = folder / "timm"
    timm.mkdir()
    theirs = create_model("test_coatnet", num_classes=3, resolution=64)
    write_timm_folder(theirs, bundle.classes, Preprocessing(resolution=64), timm)
    seed = (timm / "config.json").read_bytes()

    def read_timm(content: bytes) -> None:
        (timm / "config.json").write_bytes(content)
        read_timm_folder(timm)

    return {
        "config": Target((config,), read_config),
        "safetensors": Target((weights,), read_weights),
        "safetensors-header": Target((header,), read_header),
        "timm-config": Target((seed,), read_timm),
        "protocol": protocol(image),
    }


def protocol(image: bytes) -> Target:
    """The body of a request of the Open Inference Protocol."""
    predictor: Any = SimpleNamespace(image_shape=(1, 4, 4, 3), scale=None, bundle=SimpleNamespace(calibration=None))
    pixels = np.arange(96).reshape(2, 4, 4, 3)
    inputs = (
        ("UINT8", [2, 4, 4, 3], pixels.tolist()),
        ("UINT8", [2, 4, 4, 3], pixels.ravel().tolist()),
        ("BYTES", [1], [base64.b64encode(image).decode()]),
    )
    bodies = [
        {"id": "1", "inputs": [{"name": "images", "datatype": kind, "shape": shape, "data": data}]}
        for kind, shape, data in inputs
    ]
    seeds = tuple(json.dumps({**body, "outputs": [{"name": "class"}]}).encode() for body in bodies)
    return Target(seeds, lambda content: read_request(content, predictor, 8))


def data(folder: Path, image: bytes) -> dict[str, Target]:
    """Tables, tars, shards and the files of MNIST."""
    source = folder / "images"
    for number in range(12):
        path = source / ("cat", "dog", "owl")[number % 3] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(image + bytes([number]))
    packed = pack(source, folder / "packed", num_workers=1).folder
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for name, content in (
            ("a.png", image),
            ("a.cls", b"1"),
            (f"{'x' * 120}.png", image),
            (f"{'x' * 120}.json", b"[2]"),
        ):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    rows = [f"images/{name}/{number}.png,{name}" for number, name in enumerate(("cat", "dog", "owl") * 4)]
    table = "\n".join(["path,label", *rows]).encode()
    idx = struct.pack(">HBBIII", 0, 8, 3, 2, 3, 3) + bytes(18)

    def read_tar(content: bytes) -> None:
        list(read_samples(io.BytesIO(content), "some.tar"))

    targets = {
        "tar": Target((buffer.getvalue(),), read_tar),
        "shards-head": forged(packed, "coatnet-shards.json", update=False),
        "shards-table": forged(packed, "train.shards.npy", update=True),
        "shards-index": forged(packed, "train-000000.npy", update=True),
        "table-csv": table_target(folder / "t.csv", table),
        "table-tsv": table_target(folder / "t.tsv", table.replace(b",", b"\t")),
        "idx": file_target(folder / "train-images-idx3-ubyte", (idx,), read_idx),
    }
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        return targets
    paths, labels = zip(*(row.split(",") for row in rows), strict=True)
    parquet.write_table(pyarrow.table({"path": paths, "label": labels}), folder / "seed.parquet")
    return targets | {"table-parquet": table_target(folder / "t.parquet", (folder / "seed.parquet").read_bytes())}


def forged(packed: Path, name: str, *, update: bool) -> Target:
    """A file of a folder of shards, with the checksums of those that name it."""
    whole = {path.name: path.read_bytes() for path in packed.iterdir() if path.is_file()}

    def read(content: bytes) -> None:
        files = {**whole, name: content}
        if update:
            head = json.loads(files["coatnet-shards.json"])
            if name == "train-000000.npy":
                shards = np.load(io.BytesIO(files["train.shards.npy"]))
                shards["index_sha256"][0], shards["index_bytes"][0] = digest(content), len(content)
                buffer = io.BytesIO()
                np.lib.format.write_array(buffer, shards, version=(1, 0))
                files["train.shards.npy"] = buffer.getvalue()
            head["splits"]["train"]["table_sha256"] = digest(files["train.shards.npy"])
            files["coatnet-shards.json"] = json.dumps(head).encode()
        for path, bytes_of in files.items():
            (packed / path).write_bytes(bytes_of)
        splits = open_dataset(packed)
        splits.training.read(0), splits.training.describe(len(splits.training) - 1), splits.training.label(0)

    return Target((whole[name],), read)


def table_target(path: Path, seed: bytes) -> Target:
    def read(content: bytes) -> None:
        path.write_bytes(content)
        open_manifest(path, 0.1)
        list(read_manifest(path))

    return Target((seed,), read)


def file_target(path: Path, seeds: tuple[bytes, ...], read: Callable[[Path], object]) -> Target:
    def write_and_read(content: bytes) -> None:
        path.write_bytes(content)
        read(path)

    return Target(seeds, write_and_read)


def texts(folder: Path) -> dict[str, Target]:
    """Recipes, plans and checkpoints."""
    recipe = Recipe(data="digits", epochs=3, optimizer={"learning_rate": 1e-3}).to_yaml().encode()
    plan = Plan("model", "torch", "images", 100, "torch", "fp32", "one", 5)
    staged = stage(folder / "checkpoints", "step-1", {})
    name, step = part_name(0, 1), folder / "checkpoints" / "step-1"
    publish(staged, step, {name: write_part(staged / name, {"weight": torch.zeros(2)})}, {"position": {"step": 1}})
    manifest = (step / "manifest.json").read_bytes()
    return {
        "recipe": file_target(folder / "recipe.yaml", (recipe,), Recipe.from_yaml),
        "plan": Target((plan.to_json().encode(),), lambda content: plan.difference(content.decode("utf-8", "replace"))),
        "checkpoint": file_target(step / "manifest.json", (manifest,), lambda path: load_checkpoint(path.parent)),
    }
