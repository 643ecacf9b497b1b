"""The two blocks equal their equations, written out with torch's own operations."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from coatnet.model.attention import RelativeAttention
from coatnet.model.layers import GELU, DepthwiseConv2d, StridedDepthwise, fold_batch_norm
from coatnet.model.mbconv import MBConv
from coatnet.model.relative_bias import RelativeBias
from coatnet.model.transformer import FeedForward, Transformer


def strong(module):
    torch.manual_seed(0)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    for name, buffer in module.named_buffers():
        if "running" in name:
            torch.nn.init.uniform_(buffer, 0.5, 1.5)
    return module.double().eval()


def batch_norm(x, norm):
    return F.batch_norm(x, norm.running_mean, norm.running_var, norm.weight, norm.bias, eps=1e-3)


@pytest.mark.parametrize(("stride", "downsample"), [(1, "expand"), (2, "expand"), (2, "depthwise")])
def test_an_mbconv_block_is_equation_5(stride, downsample):
    block = strong(MBConv(6, 8, stride, downsample=downsample, norm="batch", stochastic_depth=0.0))
    x = torch.randn(2, 6, 7, 6, dtype=torch.float64)
    expand, depthwise, gate = block.expand, block.depthwise, block.squeeze_excite
    strides = (stride, 1) if downsample == "expand" else (1, stride)
    h = F.conv2d(batch_norm(x, block.norm), expand[0].weight, stride=strides[0])
    h = F.gelu(batch_norm(h, expand[1]))
    h = F.conv2d(h, depthwise[0].weight, stride=strides[1], padding=1, groups=32)
    h = F.gelu(batch_norm(h, depthwise[1]))
    squeezed = F.silu(F.linear(h.mean((2, 3)), gate.squeeze.weight, gate.squeeze.bias))
    h = h * F.linear(squeezed, gate.excite.weight, gate.excite.bias).sigmoid()[:, :, None, None]
    residual = F.conv2d(h, block.project.weight, block.project.bias)
    pooled = F.max_pool2d(x, 2, ceil_mode=True) if stride == 2 else x
    shortcut = F.conv2d(pooled, block.shortcut[-1].weight, block.shortcut[-1].bias)
    torch.testing.assert_close(block(x), shortcut + residual)


@pytest.mark.parametrize("stride", [1, 2])
def test_a_transformer_block_is_equation_4(stride):
    grid = (4, 3) if stride == 2 else (7, 6)
    attention = RelativeAttention(6, 8, 4, RelativeBias(2, grid))
    block = strong(Transformer(6, 8, stride, attention=attention, stochastic_depth=0.0))
    x = torch.randn(2, 6, 7, 6, dtype=torch.float64)

    def pool(each):
        return F.max_pool2d(each, 2, ceil_mode=True) if stride == 2 else each

    def layer_norm(each, norm):
        normed = F.layer_norm(each.movedim(1, -1), norm.normalized_shape, norm.weight, norm.bias, eps=1e-5)
        return normed.movedim(-1, 1)

    shortcut = F.conv2d(pool(x), block.shortcut[-1].weight, block.shortcut[-1].bias)
    middle = shortcut + attention(pool(layer_norm(x, block.attention_norm)))
    first, _, second = block.feed_forward
    hidden = F.gelu(F.conv2d(layer_norm(middle, block.feed_forward_norm), first.weight, first.bias))
    torch.testing.assert_close(block(x), middle + F.conv2d(hidden, second.weight, second.bias))


@pytest.mark.parametrize("grid", [(8, 8), (7, 5), (1, 2)])
def test_the_gradients_of_a_strided_depthwise_convolution_are_exact(grid):
    inputs = torch.randn(2, 3, *grid, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(3, 1, 3, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(StridedDepthwise.apply, (inputs, weight, (2, 2), (1, 1)))
    output = StridedDepthwise.apply(inputs, weight, (2, 2), (1, 1))
    torch.testing.assert_close(output, F.conv2d(inputs, weight, None, 2, 1, groups=3), rtol=0, atol=0)


def test_autocast_trains_a_strided_depthwise_convolution_without_the_slow_kernel():
    layer = DepthwiseConv2d(3, 3, 2)
    inputs = torch.randn(2, 3, 9, 9).contiguous(memory_format=torch.channels_last).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        output = layer(inputs)
    assert output.dtype == torch.bfloat16
    assert "StridedDepthwise" in type(output.grad_fn).__name__
    output.float().square().sum().backward()
    gradients = [inputs.grad, layer.weight.grad]
    expected = torch.autograd.grad(layer(inputs).square().sum(), [inputs, layer.weight])
    for gradient, target in zip(gradients, expected, strict=True):
        assert gradient.dtype == torch.float32
        torch.testing.assert_close(gradient, target, rtol=0.05, atol=0.05)


class ContiguousGELUs(TorchDispatchMode):
    """Records of each GELU, forward and backward, whether all that it reads is contiguous."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in (torch.ops.aten.gelu.default, torch.ops.aten.gelu_backward.default):
            maps = [value for value in args if isinstance(value, torch.Tensor)]
            self.calls.append((func.__name__, all(value.is_contiguous() for value in maps)))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "block",
    [
        MBConv(8, 8, 1, downsample="expand", norm="batch", stochastic_depth=0.0),
        MBConv(8, 12, 2, downsample="depthwise", norm="layer", stochastic_depth=0.0),
        FeedForward(8),
    ],
)
def test_gelu_reads_channels_last_maps_as_contiguous_so_that_torch_computes_it_by_its_fast_kernel(block):
    x = torch.randn(2, 8, 6, 6).contiguous(memory_format=torch.channels_last)
    block = block.to(memory_format=torch.channels_last)
    with torch.autocast("cpu", torch.bfloat16), ContiguousGELUs() as found:
        output = block(x)
        output.float().square().sum().backward()
    assert found.calls
    assert all(contiguous for _, contiguous in found.calls), found.calls
    assert {name for name, _ in found.calls} == {"gelu.default", "gelu_backward.default"}
    assert output.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("memory_format", [torch.channels_last, torch.contiguous_format])
def test_gelu_is_that_of_torch_in_every_memory_format_and_no_more_in_a_graph(memory_format):
    x = torch.linspace(-6, 6, 2 * 3 * 4 * 5).view(2, 3, 4, 5).contiguous(memory_format=memory_format).requires_grad_()
    output = GELU()(x)
    assert output.is_contiguous(memory_format=memory_format)
    torch.testing.assert_close(output, F.gelu(x.double()).float(), rtol=1e-5, atol=2e-6)
    gradients = [torch.autograd.grad(each.sum(), x)[0] for each in (output, F.gelu(x))]
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=2e-6)
    graph = torch.export.export(GELU(), (x.detach(),)).graph
    assert [node.target for node in graph.nodes if node.op == "call_function"] == [torch.ops.aten.gelu.default]


@pytest.mark.parametrize("stride", [1, 2])
def test_a_folded_batch_norm_changes_nothing_and_follows_its_statistics(stride):
    block = MBConv(6, 8, stride, downsample="depthwise", norm="batch", stochastic_depth=0.0).eval()
    x = torch.randn(2, 6, 9, 7)
    norm = block.depthwise[1]
    for buffer in (norm.running_mean, norm.running_var, norm.bias):
        with torch.no_grad():
            buffer.add_(1.0)
        expected = block(x).detach()  # with gradients nothing is folded
        with torch.no_grad():
            torch.testing.assert_close(block(x), expected, rtol=1e-4, atol=1e-5)
            assert not torch.equal(block(x), expected)  # it is another way to compute the same


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("product", [torch.nn.Conv2d(6, 8, 1), torch.nn.Conv2d(6, 8, 1, bias=False)])
def test_a_folded_product_equals_product_and_norm(product, norm_first):
    norm = strong(torch.nn.BatchNorm2d(6 if norm_first else 8))
    product, x = product.double(), torch.randn(2, 6, 5, 4, dtype=torch.float64)
    expected = product(norm(x)) if norm_first else norm(product(x))
    weight, bias = fold_batch_norm(product, norm, norm_first=norm_first)
    torch.testing.assert_close(F.conv2d(x, weight, bias), expected)


def test_a_copied_block_has_its_own_cache():
    block = MBConv(6, 8, 1, downsample="expand", norm="batch", stochastic_depth=0.0).eval()
    x = torch.randn(1, 6, 5, 5)
    with torch.no_grad():
        before, copied = block(x), copy.deepcopy(block)
        copied.depthwise[1].running_mean += 1.0
        assert torch.equal(block(x), before) and not torch.allclose(copied(x), before)


def test_caches_are_cleared_after_a_step_of_a_fused_optimizer():
    """A fused optimizer does not increment the version of a weight, so comparing versions is not enough."""
    torch.manual_seed(0)
    block = Transformer(8, 8, 1, attention=RelativeAttention(8, 8, 4, RelativeBias(2, (3, 3))), stochastic_depth=0.0)
    network = torch.nn.Sequential(
        MBConv(8, 8, 1, downsample="expand", norm="batch", stochastic_depth=0.0), block
    ).eval()
    optimizer, x = torch.optim.AdamW(network.parameters(), lr=0.1, fused=True), torch.randn(2, 8, 3, 3)
    with torch.no_grad():
        network(x)
    network(x).square().sum().backward()
    optimizer.step()
    expected = network(x).detach()
    with torch.no_grad():
        torch.testing.assert_close(network(x), expected, rtol=1e-4, atol=1e-5)


def test_eval_clears_caches_after_writes_through_data():
    block = Transformer(8, 8, 1, attention=RelativeAttention(8, 8, 4, RelativeBias(2, (3, 3))), stochastic_depth=0.0)
    convolution = MBConv(8, 8, 1, downsample="expand", norm="batch", stochastic_depth=0.0)
    network, x = torch.nn.Sequential(convolution, block).eval(), torch.randn(2, 8, 3, 3)
    with torch.no_grad():
        network(x)
        for parameter in network.parameters():
            parameter.data.mul_(1.5)
        expected = copy.deepcopy(network)(x)
        torch.testing.assert_close(network.eval()(x), expected)


def test_nothing_is_cached_for_weights_created_in_inference_mode():
    with torch.inference_mode():
        convolution = MBConv(8, 8, 1, downsample="expand", norm="batch", stochastic_depth=0.0).eval()
        attention = RelativeAttention(8, 8, 4, RelativeBias(2, (3, 3))).eval()
        x = torch.randn(2, 8, 3, 3)
        before = attention(convolution(x))
        attention.relative_bias.table.add_(torch.randn_like(attention.relative_bias.table))
        assert not torch.allclose(attention(convolution(x)), before)
