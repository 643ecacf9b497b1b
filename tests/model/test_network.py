"""The whole network: shapes, resolutions, memory formats, compilation, the interface of timm."""

import copy
import pickle
import threading

import pytest
import torch
from torch import nn

from coatnet.errors import UserError
from coatnet.model.compat import from_coatnet_pytorch
from coatnet.model.config import Stage, Variant
from coatnet.model.freeze import freeze, layer_groups
from coatnet.model.inference_cache import InferenceCache
from coatnet.model.layers import StochasticDepth, mean_over_cells, to_map, to_tokens
from coatnet.model.network import create_model
from coatnet.model.resize import change_resolution

TINY = Variant(
    "tiny",
    8,
    (Stage("mbconv", 1, 8), Stage("mbconv", 1, 16), Stage("transformer", 2, 32), Stage("transformer", 1, 64)),
    head_dim=16,
    resolution=64,
)
VARIATIONS = [
    {},
    {"layout": "C-C-C-C"},
    {"layout": "C-C-C-T"},
    {"layout": "C-T-T-T", "head_dim": 8},
    {"layout": "ViT_REL"},
    {"head_dim": 32},
    {"mbconv_norm": "layer"},
    {"downsample": "depthwise"},
    {"relative_bias": False},
    {"attention": "post"},
    {"attention": "local", "window": 3},
    {"attention": "local", "window": 5, "relative_bias": False},
    {"attention": "linear", "relative_bias": False},
    {"layout": "ViT_REL", "attention": "post"},
    {
        "layout": "C-T-T-T",
        "head_dim": 8,
        "attention": "local",
        "mbconv_norm": "layer",
        "downsample": "depthwise",
    },
]


def named(variations):
    return "-".join(f"{key}={value}" for key, value in variations.items()) or "paper"


def tiny(**arguments):
    torch.manual_seed(0)
    return create_model(TINY, num_classes=5, **arguments)


def lively(model):
    """With weights and statistics far from their start, so that no branch is silently zero."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, value in model.state_dict().items():
            if value.is_floating_point():
                noise = torch.rand(value.shape, generator=generator)
                value.copy_(0.5 + noise if "running_var" in name else value + (noise - 0.5) * 0.3)
    return model


@pytest.mark.parametrize("variations", VARIATIONS, ids=named)
def test_every_variation_learns_a_batch_and_compiles_to_the_same_without_a_graph_break(variations):
    model = lively(tiny(**variations))
    images, labels = torch.randn(4, 3, 64, 64), torch.arange(4)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(4):
        loss = nn.functional.cross_entropy(model(images), labels)
        loss.backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]

    torch.compiler.reset()
    compiled = torch.compile(model.eval(), fullgraph=True, backend="eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(images), model(images), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("variations", [{}, {"attention": "local", "window": 3}], ids=named)
def test_a_compiled_training_step_has_no_graph_break_and_gives_the_eager_gradients(variations):
    torch.compiler.reset()
    model = lively(tiny(**variations))
    images = torch.randn(2, 3, 64, 64)
    model(images).square().mean().backward()
    eager = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    torch.compile(model, fullgraph=True, backend="aot_eager")(images).square().mean().backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, eager[name], rtol=1e-3, atol=1e-4)


@pytest.mark.nightly
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("variations", VARIATIONS, ids=named)
def test_inductor_gives_what_eager_gives(variations):
    torch.compiler.reset()
    model = lively(tiny(**variations)).eval()
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(model, fullgraph=True)(images), model(images), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("size", [(64, 64), (200, 200), (192, 320), (97, 131), (33, 64), (1, 1), (7, 300)])
@pytest.mark.parametrize("variations", [{}, {"attention": "post"}, {"attention": "local"}], ids=named)
def test_any_resolution_goes_through(size, variations):
    model = tiny(**variations).eval()
    with torch.no_grad():
        logits = model(torch.randn(2, 3, *size))
    assert logits.shape == (2, 5) and logits.isfinite().all()


def test_stage_maps_have_the_grids_and_widths_of_the_variant():
    images = torch.randn(1, 3, 97, 64)
    last, maps = tiny().eval().forward_intermediates(images)
    assert [tuple(m.shape[1:]) for m in maps] == [
        (8, 49, 32), (8, 25, 16), (16, 13, 8), (32, 7, 4), (64, 4, 2)
    ]  # fmt: skip
    assert last is maps[-1]
    model = tiny().eval()
    assert [m.shape[1] for m in model.forward_intermediates(images, indices=2)[1]] == [32, 64]
    assert [m.shape[1] for m in model.forward_intermediates(images, indices=[0, -1])[1]] == [8, 64]
    last, maps = model.forward_intermediates(images, [0, 1], stop_early=True)
    assert last is maps[1] and len(maps) == 2
    assert len(model.forward_intermediates(images, 3, intermediates_only=True)) == 3
    for unknown in ({"norm": True}, {"output_fmt": "NLC"}):
        with pytest.raises(UserError, match="only unnormalized NCHW feature maps"):
            model.forward_intermediates(images, **unknown)
    for missing in ([5], [-6], 6, 0, []):
        with pytest.raises(UserError, match="this network has 5 feature maps, 0 to 4"):
            model.forward_intermediates(images, missing)


def test_channels_last_and_contiguous_images_give_the_same_and_every_map_is_channels_last():
    model, images = lively(tiny()).eval(), torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(
            model(images), model(images.contiguous(memory_format=torch.channels_last)), rtol=1e-5, atol=1e-6
        )
        for each in model.forward_intermediates(images)[1]:
            assert each.is_contiguous(memory_format=torch.channels_last)
        model.to(memory_format=torch.contiguous_format)
        torch.testing.assert_close(model(images), tiny_logits(images), rtol=1e-4, atol=1e-5)


def tiny_logits(images):
    return lively(tiny()).eval()(images)


def test_tokens_of_a_channels_last_map_are_a_view_and_convert_back():
    x = torch.randn(2, 3, 4, 5).contiguous(memory_format=torch.channels_last)
    tokens = to_tokens(x)
    assert tokens.data_ptr() == x.data_ptr() and tokens.shape == (2, 20, 3)
    assert torch.equal(to_map(tokens, (4, 5)), x)
    torch.testing.assert_close(mean_over_cells(x), x.mean((2, 3)))


def test_the_compiled_bf16_mean_is_a_matrix_product_with_the_same_value():
    torch.compiler.reset()
    x = torch.rand(2, 8, 5, 7).bfloat16()
    graphs = []

    def keep(graph, _):
        graphs.append(graph.code)
        return graph.forward

    with torch.no_grad():
        mean = torch.compile(mean_over_cells, fullgraph=True, backend=keep)(x)
    assert "matmul" in graphs[0]
    assert mean.dtype == torch.bfloat16
    torch.testing.assert_close(mean.float(), x.float().mean((2, 3)), rtol=2**-7, atol=0)


def test_inference_caches_do_not_change_the_logits():
    model, images = lively(tiny()).eval(), torch.randn(2, 3, 64, 64)
    fresh = model(images).detach()  # with gradients nothing is cached
    with torch.no_grad():
        for _ in range(2):
            torch.testing.assert_close(model(images), fresh)
        assert model(torch.randn(2, 3, 96, 64)).shape == (2, 5)
        torch.testing.assert_close(model(images), fresh)
        assert torch.equal(pickle.loads(pickle.dumps(model))(images), model(images))
        assert torch.equal(copy.deepcopy(model)(images), model(images))


class SlowKey:
    """A key whose comparison takes as long as another thread needs to clear the cache."""

    def __init__(self, cache):
        self.cache = cache

    def __hash__(self):
        return 0

    def __eq__(self, other):
        thread = threading.Thread(target=self.cache.clear)
        thread.start()
        thread.join()
        return isinstance(other, SlowKey)


def test_a_cache_that_another_thread_clears_gives_the_value_all_the_same():
    cache = InferenceCache()
    weights = [torch.zeros(2)]
    assert cache.get(SlowKey(cache), weights, lambda: "first") == "first"
    assert cache.get(SlowKey(cache), weights, lambda: "second") == "first"
    assert cache.get(SlowKey(cache), weights, lambda: "third") == "third"


def test_the_interface_of_timm():
    model, images = tiny().eval(), torch.randn(2, 3, 64, 64)
    features = model.forward_features(images)
    assert torch.equal(model.forward_head(features), model(images))
    pooled = model.forward_head(features, pre_logits=True)
    assert pooled.shape == (2, model.num_features) == (2, 64)
    assert torch.equal(model.get_classifier()(pooled), model(images))
    model.reset_classifier(0)
    assert torch.equal(model(images), pooled)
    model.reset_classifier(7, "avg")
    assert model(images).shape == (2, 7) and model.num_classes == 7
    with pytest.raises(UserError, match="global_pool='max': only average pooling"):
        model.reset_classifier(7, "max")
    assert len(model.no_weight_decay()) == 3
    matcher = model.group_matcher()
    assert set(matcher) == {"stem", "blocks"}


def test_timm_groups_parameters_by_block():
    helpers = pytest.importorskip("timm.models")
    model = tiny()
    layers = helpers.group_parameters(model, model.group_matcher(), reverse=True)
    assert layers == {name: i for i, names in enumerate(layer_groups(model)) for name in names}


def test_layer_groups_hold_every_parameter_once_from_stem_to_head():
    model = tiny()
    groups = layer_groups(model)
    assert len(groups) == 1 + 5 + 1
    assert [n for group in groups for n in group] == [n for n, _ in model.named_parameters()]


def test_checkpointing_gives_the_same_gradients_and_counts_batches_once():
    plain, checkpointed = lively(tiny()), lively(tiny())
    checkpointed.set_grad_checkpointing()
    images = torch.randn(2, 3, 64, 64)
    for model in (plain, checkpointed):
        model(images).square().mean().backward()
    for (name, a), b in zip(plain.named_parameters(), checkpointed.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, msg=name)
    for (name, a), b in zip(plain.named_buffers(), checkpointed.buffers(), strict=True):
        assert torch.equal(a, b), name


def test_stochastic_depth_keeps_the_expectation_and_rises_from_first_to_last_block():
    drop = StochasticDepth(0.25).train()
    dropped = drop(torch.ones(40_000, 1))
    assert dropped.unique().tolist() == [0.0, pytest.approx(4 / 3)]
    assert dropped.mean().item() == pytest.approx(1.0, abs=0.02)
    assert torch.equal(drop.eval()(torch.ones(3)), torch.ones(3))
    model = tiny(stochastic_depth=0.6)
    rates = [m.rate for m in model.modules() if isinstance(m, StochasticDepth)]
    assert rates == [pytest.approx(0.6 * i / 4) for i in range(5)]


def test_a_config_builds_the_same_network():
    model = tiny(in_channels=1, attention="post")
    again = create_model(**model.config())
    again.load_state_dict(model.state_dict())
    images = torch.randn(1, 1, 64, 64)
    assert torch.equal(again.eval()(images), model.eval()(images))


def test_a_changed_resolution_gives_the_same_logits_at_that_resolution():
    model, images = lively(tiny()).eval(), torch.randn(2, 3, 96, 96)
    with torch.no_grad():
        before = model(images)
        change_resolution(model, 96)
        torch.testing.assert_close(model(images), before)
    assert model.stages[2][0].attention.relative_bias.grid == (6, 6) and model.resolution == 96


def test_frozen_parts_do_not_move_nor_do_their_statistics():
    model = freeze(tiny(), ["stem", "stages.0"])
    before = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    model.train()(torch.randn(4, 3, 64, 64)).square().mean().backward()
    optimizer.step()
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert not any(name.startswith(("stem", "stages.0")) for name in changed)
    assert any(name.startswith("stages.1") and name.endswith("running_mean") for name in changed)
    with pytest.raises(UserError, match="cannot freeze"):
        freeze(model, ["stage.0"])


def test_from_coatnet_pytorch_creates_the_network_of_the_paper():
    with torch.device("meta"):
        model = from_coatnet_pytorch((224, 224), 3, [2, 2, 3, 5, 2], [64, 96, 192, 384, 768])
        paper = create_model("coatnet-0")
    shapes = {name: p.shape for name, p in paper.named_parameters()}
    assert {name: p.shape for name, p in model.named_parameters()} == shapes
    mixed = from_coatnet_pytorch((32, 64), 1, [2, 1, 1, 1, 1], [8, 8, 8, 32, 64], num_classes=4, block_types="CCCT")
    assert mixed(torch.randn(2, 1, 32, 64)).shape == (2, 4)
    with pytest.raises(UserError, match="1026"):
        from_coatnet_pytorch((224, 224), 3, [2, 2, 6, 14, 2], [128, 128, 256, 512, 1026])
    with pytest.raises(UserError, match="two layers"):
        from_coatnet_pytorch((224, 224), 3, [3, 2, 6, 14, 2], [128, 128, 256, 512, 1024])
    with pytest.raises(UserError, match="block_types"):
        from_coatnet_pytorch((224, 224), 3, [2, 2, 6, 14, 2], [128, 128, 256, 512, 1024], block_types="CXTT")


def test_meta_device_builds_the_largest_member_without_memory():
    with torch.device("meta"):
        model = create_model("coatnet-7")
    assert all(p.is_meta for p in model.parameters())
    assert sum(p.numel() for p in model.parameters()) > 2.4e9


def test_initial_weights_have_variance_one_over_fan_in():
    torch.manual_seed(0)
    for name, weight in create_model("coatnet-nano").named_parameters():
        if weight.ndim > 1 and weight.numel() > 50_000:
            assert weight.std().item() == pytest.approx(weight[0].numel() ** -0.5, rel=0.03), name
