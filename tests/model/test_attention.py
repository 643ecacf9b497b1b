"""Attention equals the paper's formulas, written out as loops."""

import math

import pytest
import torch
import torch.nn.functional as F

from coatnet.model.attention import (
    LinearAttention,
    LocalAttention,
    PlainAttention,
    PostRelativeAttention,
    RelativeAttention,
    scaled_dot_product_attention,
)
from coatnet.model.relative_bias import RelativeBias, expand_table, opaque_expand_table, resample

GRID = (3, 4)
N = GRID[0] * GRID[1]


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def strong(attention, deviation=1.0):
    """With weights large enough that every term of the formula matters."""
    for parameter in attention.parameters():
        torch.nn.init.normal_(parameter, std=deviation)
    return attention.double()


def cells(grid):
    return [(row, column) for row in range(grid[0]) for column in range(grid[1])]


def formula(attention, x, *, post):
    """Equation (3) as a double loop over query i and key i', each with its own bias, by index i - i'."""
    q, k, v = attention.split(x)
    table = attention.relative_bias.table
    height, width = GRID
    heads = torch.zeros_like(q)
    for b in range(q.shape[0]):
        for a in range(q.shape[1]):
            for n, (i, j) in enumerate(cells(GRID)):
                scores, biases = [], []
                for m, (i2, j2) in enumerate(cells(GRID)):
                    scores.append(q[b, a, n] @ k[b, a, m] / math.sqrt(q.shape[-1]))
                    biases.append(table[a, i - i2 + height - 1, j - j2 + width - 1])
                scores, biases = torch.stack(scores), torch.stack(biases)
                weights = scores.softmax(0) + biases if post else (scores + biases).softmax(0)
                heads[b, a, n] = weights @ v[b, a]
    return attention.merge(heads, GRID)


@pytest.mark.parametrize(("kind", "post"), [(RelativeAttention, False), (PostRelativeAttention, True)])
def test_attention_equals_the_double_loop(kind, post):
    attention = strong(kind(8, 12, 4, RelativeBias(3, GRID)), 0.5)
    x = torch.randn(2, 8, *GRID, dtype=torch.float64)
    torch.testing.assert_close(attention(x), formula(attention, x, post=post))


def test_plain_attention_is_relative_attention_with_a_zero_table():
    plain, relative = PlainAttention(8, 12, 4).double(), RelativeAttention(8, 12, 4, RelativeBias(3, GRID)).double()
    relative.load_state_dict({**plain.state_dict(), "relative_bias.table": 0 * relative.relative_bias.table})
    x = torch.randn(2, 8, *GRID, dtype=torch.float64)
    torch.testing.assert_close(plain(x), relative(x))


def test_eager_attention_equals_torchs_fused_attention():
    q, k, v = torch.randn(3, 2, 3, N, 8, dtype=torch.float64)
    bias = torch.randn(3, N, N, dtype=torch.float64)
    torch.testing.assert_close(
        scaled_dot_product_attention(q, k, v, bias), F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
    )
    torch.testing.assert_close(scaled_dot_product_attention(q, k, v), F.scaled_dot_product_attention(q, k, v))


def test_the_bias_matrix_is_block_toeplitz():
    bias = RelativeBias(2, GRID)
    matrix = bias.matrix(GRID)
    for n, (i, j) in enumerate(cells(GRID)):
        for m, (i2, j2) in enumerate(cells(GRID)):
            wanted = bias.table[:, i - i2 + GRID[0] - 1, j - j2 + GRID[1] - 1]
            assert torch.equal(matrix[:, n, m], wanted)


def test_the_opaque_operation_has_the_values_and_gradients_of_expand_table():
    table = torch.randn(2, 2 * GRID[0] - 1, 2 * GRID[1] - 1, dtype=torch.float64, requires_grad=True)
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(opaque_expand_table, (table, *GRID), test_utils=checks)
    upstream = torch.randn(2, N, N, dtype=torch.float64)
    (plain,) = torch.autograd.grad(expand_table(table, *GRID), table, upstream)
    matrix = opaque_expand_table(table, *GRID)
    assert torch.equal(matrix, expand_table(table, *GRID))
    assert matrix.stride(1) % 8 == 0, "torch's fused attention would pad it, and Inductor then fails on a GPU"
    torch.testing.assert_close(torch.autograd.grad(matrix, table, upstream)[0], plain)

    graphs = []

    def keep(graph, _):
        graphs.append(graph.code)
        return graph.forward

    torch.compile(RelativeBias(2, GRID), fullgraph=True, backend=keep)(GRID, torch.float32)
    assert "relative_bias_pairs" in graphs[0]


def test_adding_a_constant_to_the_table_changes_post_but_not_pre_attention():
    x = torch.randn(2, 8, *GRID, dtype=torch.float64)
    for kind, changes in ((RelativeAttention, False), (PostRelativeAttention, True)):
        attention = strong(kind(8, 12, 4, RelativeBias(3, GRID)))
        before = attention(x)
        with torch.no_grad():
            attention.relative_bias.table += 3.0
        assert torch.allclose(before, attention(x)) is not changes


def test_with_zero_queries_and_keys_attention_is_a_normalized_global_depthwise_convolution():
    """The paper's unification: softmax(w_{i-j}) sums x_j over the map like a convolution whose kernel is exp(w).

    The convolution divides by the kernel's own sum over the map, which is a convolution of ones.
    """
    attention = RelativeAttention(8, 8, 4, RelativeBias(2, GRID))
    torch.nn.init.normal_(attention.relative_bias.table)
    torch.nn.init.zeros_(attention.qkv.weight[:16])  # queries and keys
    x = torch.randn(2, 8, *GRID)
    values = attention.split(x)[2]  # (B, A, N, D)
    images = values.permute(0, 1, 3, 2).reshape(2, 8, *GRID)
    # conv2d slides an unmirrored kernel: its entry at offset key - query is the table's at query - key.
    kernel = attention.relative_bias.table.exp().flip(1, 2).repeat_interleave(4, dim=0)[:, None]
    padding = (GRID[0] - 1, GRID[1] - 1)
    summed = F.conv2d(images, kernel, padding=padding, groups=8)
    total = F.conv2d(torch.ones_like(images), kernel, padding=padding, groups=8)
    convolved = (summed / total).reshape(2, 2, 4, N).transpose(2, 3)
    torch.testing.assert_close(attention(x), attention.merge(convolved, GRID))


@pytest.mark.parametrize("relative_bias", [True, False])
@pytest.mark.parametrize("max_dense_cells", [0, 20], ids=["gathered", "dense"])
@pytest.mark.parametrize("window", [3, 7, 11])
def test_local_attention_is_masked_global_attention(window, max_dense_cells, relative_bias, monkeypatch):
    monkeypatch.setattr("coatnet.model.attention.MAX_DENSE_CELLS", max_dense_cells)
    radius, grid = window // 2, (4, 5)
    local = strong(LocalAttention(8, 12, 4, window, relative_bias=relative_bias), 0.7)
    x = torch.randn(2, 8, *grid, dtype=torch.float64)
    table = local.relative_bias.table if relative_bias else torch.zeros(3, window, window, dtype=torch.float64)
    bias = torch.full((3, 20, 20), float("-inf"), dtype=torch.float64)
    for n, (i, j) in enumerate(cells(grid)):
        for m, (i2, j2) in enumerate(cells(grid)):
            if abs(i - i2) <= radius and abs(j - j2) <= radius:
                bias[:, n, m] = table[:, i - i2 + radius, j - j2 + radius]
    output, expected = local(x), local.merge(scaled_dot_product_attention(*local.split(x), bias), grid)
    torch.testing.assert_close(output, expected)
    weights = list(local.parameters())
    for gradient, wanted in zip(
        *(torch.autograd.grad(y.square().sum(), weights, retain_graph=True) for y in (output, expected)), strict=True
    ):
        torch.testing.assert_close(gradient, wanted)
    torch.testing.assert_close(local.merge(local.weights(x) @ local.split(x)[2], grid), expected)


def test_a_window_larger_than_the_map_takes_no_memory_without_a_relative_bias():
    local, plain = LocalAttention(8, 12, 4, 1_000_001, relative_bias=False), PlainAttention(8, 12, 4)
    plain.load_state_dict(local.state_dict())
    x = torch.randn(2, 8, *GRID)
    torch.testing.assert_close(local(x), plain(x))  # the offsets of the window alone would be 4 TB


def test_local_attention_saves_no_matrix_of_all_pairs_of_a_large_map():
    grid = (64, 64)
    local, largest = LocalAttention(4, 4, 4, 3, relative_bias=True), 0
    with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
        sizes: list[int] = []
        local(torch.randn(1, 4, *grid))
        largest = max(sizes)
    assert largest < 64 * 64 * 64 * 64 / 50


def test_linear_attention_equals_its_quadratic_form():
    linear = strong(LinearAttention(8, 12, 4))
    x = torch.randn(2, 8, *GRID, dtype=torch.float64)
    q, k, v = linear.split(x)
    weights = (F.elu(q) + 1) @ (F.elu(k) + 1).transpose(-2, -1)
    quadratic = weights / weights.sum(-1, keepdim=True) @ v
    torch.testing.assert_close(linear(x), linear.merge(quadratic, GRID))


def test_resampling_to_the_same_grid_is_the_identity():
    table = torch.randn(2, 5, 7)
    assert resample(table, (3, 4)) is table


def test_resampling_is_bilinear_and_keeps_the_zero_offset_in_the_middle():
    table = torch.randn(2, 5, 7)
    larger = resample(table, (5, 6))
    expected = F.interpolate(table[None], size=(9, 11), mode="bilinear", align_corners=False)[0]
    assert torch.equal(larger, expected)
    torch.testing.assert_close(larger[:, 4, 5], table[:, 2, 3])


def test_the_cached_bias_matrix_follows_the_table():
    bias = RelativeBias(2, GRID).eval()
    with torch.no_grad():
        first = bias(GRID, torch.float32)
        assert bias(GRID, torch.float32) is first
        assert torch.equal(first, bias.matrix(GRID))
        bias.table.mul_(2)
        assert torch.equal(bias(GRID, torch.float32), 2 * first)
        assert bias((2, 2), torch.float32).shape == (2, 4, 4)
        assert bias(GRID, torch.bfloat16).dtype == torch.bfloat16
        bias.load_state_dict({"table": torch.ones_like(bias.table)})
        assert torch.equal(bias(GRID, torch.float32), torch.ones(2, N, N))
