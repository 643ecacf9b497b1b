"""The choice of a pretrained network: its table, what it refuses, what a run makes of `init: auto`."""

import io
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

import coatnet
from coatnet.bundle.timm.catalog import PRETRAINED
from coatnet.bundle.timm.selection import (
    CHOICES,
    choose_pretrained,
    choose_row,
    is_auto,
    is_choice,
    load_pretrained,
    suggest_pretrained,
)
from coatnet.data.datasets import ArrayDataset
from coatnet.data.splits import Splits
from coatnet.errors import UserError
from coatnet.training.config import Recipe
from coatnet.training.initialization import FEW_IMAGES, load_init, suggest_init
from coatnet.training.recipes import named_recipe
from coatnet.training.run import train
from coatnet.training.run_folder import RunFolder

NANO = "timm/coatnet_nano_rw_224.sw_in1k"


def splits_of(number: int, *shape: int) -> Splits:
    """Images that take no memory: one, many times."""
    images = np.broadcast_to(np.zeros((1, *shape), dtype=np.uint8), (number, *shape))
    dataset = ArrayDataset("images", ("a", "b"), images, np.arange(number) % 2)
    return Splits("images", dataset, dataset)


@pytest.mark.parametrize(
    ("gigabytes", "num_images", "side", "name"),
    [
        (0, 100, 300, "coatnet_nano_rw_224.sw_in1k"),  # a CPU, however many images there are
        (0, 1_000_000, 500, "coatnet_nano_rw_224.sw_in1k"),
        (6.2, 100_000, 500, "coatnet_nano_rw_224.sw_in1k"),
        (8.4, 100_000, 500, "coatnet_0_rw_224.sw_in1k"),
        (15.8, 100_000, 500, "coatnet_rmlp_1_rw2_224.sw_in12k_ft_in1k"),
        (25.4, 9_999, 500, "coatnet_rmlp_1_rw2_224.sw_in12k_ft_in1k"),
        (25.4, 10_000, 500, "coatnet_2_rw_224.sw_in12k_ft_in1k"),
        (85.0, 10_000, 383, "coatnet_2_rw_224.sw_in12k_ft_in1k"),
        (85.0, 10_000, 384, "coatnet_rmlp_2_rw_384.sw_in12k_ft_in1k"),
    ],
)
def test_the_network_follows_from_the_gpu_the_number_of_images_and_their_size(gigabytes, num_images, side, name):
    assert choose_row(gigabytes * 1e9, num_images, side).name == name


def test_every_network_of_the_table_is_published_and_the_last_one_takes_anything():
    assert {row.name for row in CHOICES} <= PRETRAINED.keys()
    assert (CHOICES[-1].gpu_bytes, CHOICES[-1].num_images, CHOICES[-1].side) == (0, 0, 0)
    assert is_choice(f"{NANO}@0a1b2c") and not is_choice(NANO) and not is_choice("hf://you/garments@0a1b2c")


def test_the_guide_has_the_table():
    guide = (Path(__file__).parents[2] / "docs" / "guides" / "pretrained.md").read_text(encoding="utf-8")
    found = re.findall(r"^\| ([^|]*?) \| ([\d,]*)[^|]*\| (\d*)[^|]*\| `timm/(\S+)` \| (\S+) M \|", guide, re.MULTILINE)
    rows = [(name, f"{images or 0}", side or "0", size) for _, images, side, name, size in found]
    expected = [(row.name, f"{row.num_images:,}", str(row.side), f"{row.num_parameters / 1e6:.1f}") for row in CHOICES]
    assert rows == expected
    for (gpu, *_), row in zip(found[:-1], CHOICES, strict=False):
        assert 0.85 < row.gpu_bytes / 1e9 / int(gpu.split()[0]) < 1  # cards have a little less than their name says


def test_small_images_have_no_pretrained_network():
    for shape in ((28, 28), (64, 64, 3)):
        with pytest.raises(UserError, match=f"images: its images have {shape[1]} x {shape[0]} pixels at most"):
            choose_pretrained(splits_of(4, *shape), "cpu")
        with pytest.raises(UserError, match="auto finds no pretrained CoAtNet for images"):
            load_init(Recipe(data="images", init="auto"), splits_of(4, *shape), print)
        with pytest.raises(UserError, match="auto finds no pretrained CoAtNet for images"):
            coatnet.probe("auto", splits_of(4, *shape))
    for shape in ((65, 65), (80, 64, 3)):  # gray ones are repeated
        assert choose_pretrained(splits_of(4, *shape), "cpu").hub_id == NANO


def test_a_misspelled_auto_is_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"no model 'atuo' \(did you mean 'auto'\?\)"):
        load_init(Recipe(data="digits", init="atuo"), splits_of(4, 80, 80), print)
    (tmp_path / "autos").mkdir()
    assert is_auto("auto") and not is_auto("autos") and not is_auto("./auto") and not is_auto(None)


def test_auto_beside_another_network_is_refused_before_any_download():
    for given in ({"model": "coatnet-0"}, {"variations": {"attention": "post"}}):
        with pytest.raises(UserError, match=f"init auto chooses the network, and {next(iter(given))} is given"):
            load_init(Recipe(data="x", init="auto", **given), splits_of(4, 80, 80), print)


def test_without_init_few_photographs_get_one_line_of_advice():
    splits, recipe = splits_of(FEW_IMAGES, 80, 80, 3), Recipe(data="images")
    line = suggest_init(recipe, splits)
    assert line == suggest_pretrained(splits, "cpu")
    assert line.startswith("note: 100,000 images are few") and f"--init auto would start from {NANO} (15.1 M" in line
    assert line.endswith("about 61 MB to download") and "\n" not in line
    for other, images in (
        (replace(recipe, init="a/bundle"), splits),
        (named_recipe("imagenet-1k", {"data": "images"}), splits),
        (recipe, splits_of(FEW_IMAGES + 1, 80, 80, 3)),
        (recipe, splits_of(100, 64, 64)),
    ):
        assert suggest_init(other, images) == ""
    for given in ({"model": "coatnet-0"}, {"variations": {"attention": "post"}}):  # which auto refuses
        assert suggest_init(replace(recipe, **given), splits) == f"{line} (without {next(iter(given))})"


def folder_of_images(folder, side):
    for name in ("dark", "light"):
        (folder / name).mkdir(parents=True)
        for index in range(4):
            Image.new("RGB", (side, side), name.replace("dark", "black").replace("light", "white")).save(
                folder / name / f"{index}.png"
            )
    return folder


@pytest.mark.slow
def test_a_run_says_so_at_its_beginning_and_not_when_it_is_resumed(tmp_path):
    data = folder_of_images(tmp_path / "images", 80)
    given = {"data": str(data), "model": "coatnet-femto-16", "resolution": 16, "batch_size": 4, "num_workers": 0}
    printed = []
    for epochs in (1, 2):
        console = Console(file=io.StringIO(), soft_wrap=True)
        train(Recipe(**given, epochs=epochs), tmp_path / "run", console=console)
        printed.append(console.file.getvalue())
    assert printed[0].count(f"--init auto would start from {NANO}") == 1
    assert "resuming" in printed[1] and "--init auto" not in printed[1]

    with pytest.raises(UserError, match="run holds a run with init none, not auto: give the same"):
        RunFolder(tmp_path / "run", Recipe(**given, init="auto"))


def test_a_run_goes_on_with_what_auto_took(tmp_path):
    stored = f"{NANO}@{'0a1b' * 10}"
    (tmp_path / "checkpoints" / "step-000000001").mkdir(parents=True)
    (tmp_path / "recipe.yaml").write_text(f"data: digits\nmodel: coatnet_nano_rw_224\ninit: {stored}\nepochs: 1\n")
    assert RunFolder(tmp_path, Recipe(data="digits", init="auto", epochs=2)).given.init == stored
    (tmp_path / "recipe.yaml").write_text("data: digits\nmodel: coatnet_nano_rw_224\ninit: a/bundle\nepochs: 1\n")
    with pytest.raises(UserError, match="a run with init a/bundle, not auto"):
        RunFolder(tmp_path, Recipe(data="digits", init="auto"))


def test_without_huggingface_hub_the_line_says_what_to_install_and_what_else_there_is(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "huggingface_hub", None)
    with pytest.raises(UserError) as error:
        load_pretrained(splits_of(4, 80, 80), "cpu", print)
    line = str(error.value)
    assert line.startswith(f"auto takes {NANO} (15.1 M parameters): ") and "pip install 'coatnet[hub]'" in line
    assert line.endswith("or name a bundle or folder of this machine")
