"""Heat maps: equal to other implementations, of the weights, and where the object is."""

import copy
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import PIL.ExifTags
import PIL.Image
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from coatnet.bundle import Bundle
from coatnet.data.decode import decode
from coatnet.data.transforms import Preprocessing, resize_and_crop, seen_box
from coatnet.errors import UserError
from coatnet.inference.explanation import (
    attention,
    attention_rollout,
    heat_maps,
    layercam,
    occlusion,
    relative_biases,
)
from coatnet.inference.predictor import Predictor
from coatnet.model.attention import MultiHeadProjection
from coatnet.model.config import Stage, Variant
from coatnet.model.network import create_model
from coatnet.model.relative_bias import RelativeBias

torchcam = pytest.importorskip("torchcam.methods")


def make_bundle(
    model: str | Variant = "coatnet-femto-64", channels: int = 3, resolution: int = 30, **changes: object
) -> Bundle:
    torch.manual_seed(0)
    network = create_model(model, num_classes=3, in_channels=channels, resolution=resolution, **changes)
    torch.nn.init.normal_(network.get_classifier().weight)
    preprocessing = Preprocessing(resolution=resolution, mean=(0.5,) * channels, std=(0.5,) * channels)
    return Bundle(network.eval(), ("ant", "bee", "cat"), preprocessing)


def images_for(bundle: Bundle, number: int = 2) -> Tensor:
    side, generator = bundle.preprocessing.resolution, torch.Generator().manual_seed(1)
    return torch.randn(number, bundle.preprocessing.channels, side, side, generator=generator)


def test_relative_biases_are_what_attention_adds_at_the_resolution_of_the_bundle() -> None:
    bundle = make_bundle()
    modules = [module for module in bundle.model.modules() if isinstance(module, RelativeBias)]
    for number, ((name, biases), module) in enumerate(zip(relative_biases(bundle), modules, strict=True), 1):
        assert name == f"stage-3-block-{number}"
        assert biases.shape[1:] == (15, 15)  # 30 pixels are 8 cells a side at stride 4
        matrix = module.matrix((8, 8)).detach().numpy()  # (A, 64, 64)
        np.testing.assert_array_equal(matrix[:, 0, -1], biases[:, 0, 0])  # the first cell asks, the last is asked
        np.testing.assert_array_equal(matrix[:, -1, 0], biases[:, -1, -1])


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_layercam_is_that_of_torchcam_at_every_stage(stage: int) -> None:
    bundle = make_bundle()
    images = images_for(bundle)
    targets = bundle.model(images).argmax(1)
    layer = bundle.model.stages[stage - 1] if stage else bundle.model.stem
    with torchcam.LayerCAM(bundle.model, layer) as extractor:
        scores = bundle.model(images.clone().requires_grad_())
        (cells,) = extractor(targets.tolist(), scores, normalized=False)
    stride = (1, 2, 4, 4)[stage]
    reference = F.interpolate(cells[:, None], scale_factor=stride, mode="bilinear")[:, 0, :30, :30]
    reference = reference / reference.amax((1, 2), keepdim=True)
    found = layercam(bundle, images, targets, stage)
    assert reference.std() > 0.05
    torch.testing.assert_close(found, reference.detach(), atol=1e-4, rtol=1e-4)
    assert torch.equal(layercam(bundle, images, targets, stage - 4), found)
    assert torch.equal(layercam(bundle, images, targets), found) == (stage == 2)  # the last convolutional one


def test_the_most_probable_class_is_explained_unless_another_is_named() -> None:
    bundle = make_bundle()
    images = images_for(bundle)
    best = bundle.model(images).argmax(1)
    for method in ("layercam", "occlusion"):
        assert torch.equal(heat_maps(bundle, images, method=method), heat_maps(bundle, images, best, method=method))
        other = heat_maps(bundle, images, (best + 1) % 3, method=method)
        assert (other - heat_maps(bundle, images, best, method=method)).abs().max() > 0.1


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"attention": "post"},
        {"attention": "local", "window": 3},
        {"relative_bias": False},
        {"attention": "linear", "relative_bias": False},
    ],
)
def test_weights_of_every_attention_are_those_it_computes_with(changes: dict[str, object]) -> None:
    network = make_bundle(**changes).model
    layer = next(module for module in network.modules() if isinstance(module, MultiHeadProjection))
    for table in (value for name, value in layer.named_parameters() if name == "relative_bias.table"):
        torch.nn.init.normal_(table)
    x = torch.randn(2, layer.qkv.in_channels, 7, 5)
    with torch.no_grad():
        merged = layer.merge(layer.weights(x) @ layer.split(x)[2], (7, 5))
        torch.testing.assert_close(merged, layer(x), atol=1e-5, rtol=1e-4)


def plant(number: int, generator: np.random.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Images of noise with a square in one of three colors; its color, and its upper left corner (row, column)."""
    side, size = 32, 8
    images = generator.integers(60, 190, (number, side, side, 3)).astype(np.float32)
    classes, corners = generator.integers(0, 3, number), generator.integers(0, side - size + 1, (number, 2))
    for image, color, (row, column) in zip(images, classes, corners, strict=True):
        image[row : row + size, column : column + size] = 30
        image[row : row + size, column : column + size, color] = 255
    normalized = torch.from_numpy(images).permute(0, 3, 1, 2) / 127.5 - 1
    return normalized, torch.from_numpy(classes), torch.from_numpy(corners)


@pytest.fixture(scope="module")
def finder() -> Bundle:
    """A network that has learned in a few steps which color the square has."""
    bundle, generator = make_bundle(resolution=32), np.random.default_rng(0)
    torch.nn.init.zeros_(bundle.model.get_classifier().weight)
    optimizer = torch.optim.AdamW(bundle.model.parameters(), 2e-3)
    bundle.model.train()
    for _ in range(60):
        images, classes, _ = plant(32, generator)
        loss = F.cross_entropy(bundle.model(images), classes)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    bundle.model.eval()
    return bundle


def correlation(one: Tensor, other: Tensor) -> float:
    """Spearman's: of the ranks of all pixels."""
    ranks = torch.stack([each.flatten().argsort().argsort().float() for each in (one, other)])
    return float(torch.corrcoef(ranks)[0, 1])


@pytest.mark.parametrize(("method", "least"), [("layercam", 0.9), ("attention", 0.9), ("occlusion", 0.8)])
def test_the_maximum_falls_on_the_object(finder: Bundle, method: str, least: float) -> None:
    images, classes, corners = plant(24, np.random.default_rng(1))
    with torch.no_grad():
        assert (finder.model(images).argmax(1) == classes).float().mean() > 0.9
    if method == "occlusion":
        heat = occlusion(finder, images, classes, patch=8)
    else:
        heat = heat_maps(finder, images, classes, method=method)
    peaks = torch.stack(torch.unravel_index(heat.flatten(1).argmax(1), heat.shape[1:]), 1)
    # A pixel counts as on the object up to half a cell of the last map beside it.
    hits = ((peaks >= corners - 2) & (peaks < corners + 8 + 2)).all(1).float().mean()
    print(f"pointing game, {method}: {hits:.0%} of 24 images; by chance at most {12 * 12 / 32**2:.0%}")
    assert hits >= least


def test_random_weights_change_the_map(finder: Bundle) -> None:
    images, classes, _ = plant(8, np.random.default_rng(2))
    before = layercam(finder, images, classes)
    again = layercam(finder, images, classes)
    assert correlation(before, again) > 0.999
    broken = Bundle(copy.deepcopy(finder.model), finder.classes, finder.preprocessing)
    torch.manual_seed(1)
    for blocks in reversed([broken.model.head, *broken.model.stages]):  # a cascade, from the head downwards
        for module in blocks.modules():
            if isinstance(module, torch.nn.Conv2d | torch.nn.Linear):
                module.reset_parameters()
    assert abs(correlation(before, layercam(broken, images, classes))) < 0.5


def test_rows_of_the_rollout_sum_to_one_and_hold_the_biases() -> None:
    bundle = make_bundle("coatnet-femto", resolution=100)
    images = images_for(bundle)
    layers = [module for module in bundle.model.modules() if isinstance(module, MultiHeadProjection)]
    for layer in layers:
        torch.nn.init.normal_(layer.relative_bias.table)
    shares, grid = attention_rollout(bundle.model, images)
    assert grid == (7, 7)
    assert shares.shape == (2, 16, 49)  # the last stage halves the grid, rounded up
    torch.testing.assert_close(shares.sum(-1), torch.ones(2, 16))
    before = attention(bundle, images)
    for layer in layers:
        torch.nn.init.zeros_(layer.relative_bias.table)
    assert (attention(bundle, images) - before).abs().max() > 0.1
    assert not bundle.model.stages[2][0].attention._forward_pre_hooks


def test_one_layer_of_rollout_is_its_attention_and_the_shortcut() -> None:
    """Against the formula of Abnar and Zuidema (2020), written out for a network with one attention."""
    stages = (Stage("mbconv", 1, 16), Stage("transformer", 1, 32, 2))
    bundle = make_bundle(Variant("one", 16, stages, stem_stride=1, resolution=24), resolution=24)
    images, block = images_for(bundle), bundle.model.stages[1][0]
    with torch.no_grad():
        x = block.pool(block.attention_norm(bundle.model.stages[0](bundle.model.stem(images))))
        q, k, _ = block.attention.split(x)
        scores = q @ k.transpose(2, 3) / 32**0.5 + block.attention.relative_bias((6, 6), torch.float32)
        expected = (scores.softmax(-1).mean(1) + torch.eye(36)) / 2
    torch.testing.assert_close(attention_rollout(bundle.model, images)[0], expected)


def test_occlusion_is_that_of_a_slow_loop() -> None:
    bundle = make_bundle(resolution=16)
    images, falls, hidden = images_for(bundle, 1), torch.zeros(16, 16), torch.zeros(16, 16)
    with torch.no_grad():
        score = lambda given: bundle.model(given)[0].softmax(0)[1].logit()  # noqa: E731
        for top in (0, 3, 6, 9, 11):
            for left in (0, 3, 6, 9, 11):
                occluded = images.clone()
                occluded[0, :, top : top + 5, left : left + 5] = 0
                falls[top : top + 5, left : left + 5] += score(images) - score(occluded)
                hidden[top : top + 5, left : left + 5] += 1
    expected = (falls / hidden).clamp(min=0)
    found = occlusion(bundle, images, torch.tensor([1]), patch=5)
    torch.testing.assert_close(found[0], expected / expected.max(), atol=1e-4, rtol=1e-3)


def test_what_cannot_be_explained_is_said_in_one_line() -> None:
    bundle = make_bundle()
    convolutional = make_bundle("coatnet-femto", resolution=64, layout="C-C-C-C")
    images = images_for(bundle)
    for given, options, message in (
        (convolutional, {"method": "attention"}, "has no attention; explain it by layercam or occlusion"),
        (bundle, {"method": "gradcam"}, "it is one of layercam, attention, occlusion"),
        (bundle, {"stage": 4}, "has stages 1 to 3, and 0 is the stem"),
        (bundle, {"method": "occlusion", "stage": 1}, "is about method layercam"),
    ):
        with pytest.raises(UserError, match=message):
            heat_maps(given, images, **options)


def test_networks_of_timm_are_explained() -> None:
    bundle = make_bundle("coatnet_nano_rw_224", resolution=64)
    images = images_for(bundle, 1)
    for method, stage in (("layercam", None), ("layercam", 0), ("attention", None)):
        heat = heat_maps(bundle, images, torch.tensor([1]), method=method, stage=stage)
        assert heat.shape == (1, 64, 64)
        assert heat.std() > 0


@pytest.mark.parametrize("size", [(300, 120), (77, 200), (64, 64), (20, 131)])
@pytest.mark.parametrize("crop", ["center", "squash"])
def test_the_map_lies_where_the_model_looked(size: tuple[int, int], crop: str) -> None:
    """A coordinate grid, resized and cropped as images are, shows which part is seen."""
    height, width = size
    rows, columns = np.meshgrid(np.linspace(0, 255, height), np.linspace(0, 255, width), indexing="ij")
    image = torch.from_numpy(np.stack([rows, columns, rows]).round().astype(np.uint8))
    preprocessing = Preprocessing(resolution=48, crop=crop, crop_fraction=0.8, interpolation="bilinear")
    seen = resize_and_crop(image[None], preprocessing)[0].float() / 255
    left, top, right, bottom = seen_box(height, width, preprocessing)
    for channel, first, last in ((0, top, bottom), (1, left, right)):
        centers = torch.linspace(first, last, 2 * 48 + 1)[1::2]  # of the 48 cells, as fractions
        line = seen[channel].mean(1) if channel == 0 else seen[channel].mean(0)
        assert (line - centers).abs()[4:-4].max() < 0.03


def save(path: Path, pixels: np.ndarray) -> Path:
    PIL.Image.fromarray(pixels).save(path)
    return path


def test_the_predictor_explains_images_in_any_form(tmp_path: Path) -> None:
    bundle = make_bundle(channels=1)
    pixels = np.random.default_rng(0).integers(0, 255, (40, 90), dtype=np.uint8)
    (tmp_path / "broken.png").write_bytes(b"hello")
    predictor = Predictor(bundle, "torch", "fp32", views="flip")
    given = [save(tmp_path / "a.png", pixels), pixels, tmp_path / "broken.png", PIL.Image.fromarray(pixels)]
    found = predictor.explain(given, batch_size=3)
    prediction = predictor(pixels, top_k=1)[0]
    assert [each.name for each in found] == [str(given[0]), "image 1", str(given[2]), "image 3"]
    for each in (found[0], found[1], found[3]):
        assert each.target == prediction.classes[0]
        assert each.probability == pytest.approx(prediction.probabilities[0], abs=1e-6)
        np.testing.assert_allclose(each.heat, found[0].heat, atol=1e-5)
        assert each.box == seen_box(40, 90, bundle.preprocessing)
    assert "not one of" in found[2].error
    assert found[2].heat is None
    over = np.asarray(found[0].overlay(PIL.Image.fromarray(pixels))).astype(int)
    changed = np.abs(over - pixels[..., None]).max(-1).max(0) > 0  # by column
    assert over.shape == (40, 90, 3)
    first, last = round(found[0].box[0] * 90), round(found[0].box[2] * 90)
    assert changed[first:last].all()
    assert not changed[:first].any()
    assert not changed[last:].any()
    assert [each.target for each in predictor.explain(given[:2], target="cat")] == ["cat", "cat"]
    with pytest.raises(UserError, match="no class 'catt' \\(did you mean"):
        predictor.explain(pixels, target="catt")


def test_the_map_is_laid_over_the_image_as_its_exif_data_turns_it(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 255, (40, 90, 3), dtype=np.uint8)
    turned = PIL.Image.Exif()
    turned[PIL.ExifTags.Base.Orientation] = 6
    PIL.Image.fromarray(pixels).save(tmp_path / "a.png", exif=turned)
    (explained,) = Predictor(make_bundle(), "torch", "fp32").explain(tmp_path / "a.png")
    upright = decode((tmp_path / "a.png").read_bytes(), "a.png").permute(1, 2, 0).numpy()
    assert upright.shape == (90, 40, 3)
    with PIL.Image.open(tmp_path / "a.png") as image:
        over = np.asarray(explained.overlay(image))
    np.testing.assert_array_equal(over, np.asarray(explained.overlay(PIL.Image.fromarray(upright))))


def test_of_several_labels_any_can_be_explained() -> None:
    network = make_bundle()
    bundle = Bundle(network.model, network.classes, network.preprocessing, multilabel=True)
    pixels = np.random.default_rng(0).integers(0, 255, (50, 30, 3), dtype=np.uint8)
    predictor = Predictor(bundle, "torch", "fp32")
    probabilities = dict(
        zip(*(getattr(predictor(pixels)[0], name) for name in ("classes", "probabilities")), strict=True)
    )
    for name in bundle.classes:
        found = predictor.explain(pixels, target=name)[0]
        assert found.probability == pytest.approx(probabilities[name], abs=1e-6)
    assert predictor.explain(pixels)[0].target == max(probabilities, key=probabilities.get)


def test_explaining_in_threads_mixes_nothing_up() -> None:
    predictor = Predictor(make_bundle(), "torch", "fp32")
    images = [np.random.default_rng(seed).integers(0, 255, (40, 40, 3), dtype=np.uint8) for seed in range(4)]
    prepared = [predictor.prepare(image)[None] for image in images]
    alone = [predictor.heat_maps(each, np.array([0]), method="attention") for each in prepared]
    with ThreadPoolExecutor(4) as threads:
        together = [
            *threads.map(lambda each: predictor.heat_maps(each, np.array([0]), method="attention"), prepared * 3)
        ]
    for index, heat in enumerate(together):
        np.testing.assert_allclose(heat, alone[index % 4], atol=1e-5)
