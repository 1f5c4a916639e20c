"""FLOPs against PyTorch's own counter, and against the numbers the papers print."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from vlmprune import flops
from vlmprune.flops import DecoderShape, fastv_layer_macs, fastv_reduction, layer_inputs, sparsevlm_layer_macs

D7, M7, T7 = 4096, 11008, 32  # LLaMA 7B
D13, M13, T13 = 5120, 13824, 40


def attention(x, heads, kv_heads, head_dim, out):
    """Shapes only: projections, scores, values, output, with plain matrix products."""
    n, d = x.shape
    q = (x @ torch.empty(d, heads * head_dim, device="meta")).view(n, heads, head_dim).transpose(0, 1)
    k, v = (
        (x @ torch.empty(d, kv_heads * head_dim, device="meta")).view(n, kv_heads, head_dim) for _ in "kv"
    )
    k, v = (t.repeat_interleave(heads // kv_heads, 1).transpose(0, 1) for t in (k, v))
    mixed = (q @ k.transpose(1, 2)).softmax(-1) @ v
    return mixed.transpose(0, 1).reshape(n, heads * head_dim) @ torch.empty(
        heads * head_dim, out, device="meta"
    )


def counted(function):
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


@pytest.mark.parametrize(
    "n, d, H, Hkv, dh, m", [(7, 32, 4, 4, 8, 48), (13, 24, 6, 2, 10, 40), (1, 8, 1, 1, 8, 8)]
)
def test_decoder_layer_equals_pytorchs_count(n, d, H, Hkv, dh, m):
    def layer():
        x = attention(torch.empty(n, d, device="meta"), H, Hkv, dh, d)
        gate, up = (x @ torch.empty(d, m, device="meta") for _ in "gu")
        (gate * up) @ torch.empty(m, d, device="meta")

    assert flops.decoder_layer_flops(n, d, H, Hkv, dh, m) == counted(layer)


def test_decoder_adds_up_its_layers():
    shape = DecoderShape(layers=3, hidden=24, heads=6, kv_heads=2, head_dim=10, intermediate=40)
    one = [flops.decoder_layer_flops(n, 24, 6, 2, 10, 40) for n in (9, 9, 4)]
    assert flops.decoder_flops(shape, [9, 9, 4]) == sum(one)
    with pytest.raises(ValueError, match=r"^lengths: expected 3 numbers, one per layer, got 2$"):
        flops.decoder_flops(shape, [9, 9])


def test_causal_half():
    """Scores above the diagonal, counted one by one: a product and a sum each for q.k and for p.v."""
    n, H, dh = 6, 2, 8
    assert flops.causal_half_flops(n, H, dh) == sum(4 * H * dh for i in range(n) for j in range(n) if j > i)


def test_layer_inputs():
    assert layer_inputs(5, 10, []) == [10] * 5
    assert layer_inputs(5, 10, [(2, 4)]) == [10, 10, 4, 4, 4]
    assert layer_inputs(5, 10.0, [(0, 7.5), (4, 1.5)]) == [7.5, 7.5, 7.5, 7.5, 1.5]


@pytest.mark.parametrize("stages", [[(5, 1)], [(-1, 1)], [(3, 2), (2, 1)], [(2, 3), (2, 1)]])
def test_layer_inputs_rejects(stages):
    with pytest.raises(ValueError, match=r"^stages: expected ascending layers in 0\.\.4, got \["):
        layer_inputs(5, 10, stages)


@pytest.mark.parametrize(
    "n, stages, cut",
    [
        pytest.param(576, [(2, 144)], 70.8, id="FastV-K2-R75"),
        pytest.param(576, [(3, 144)], 68.5, id="FastV-K3-R75"),
        pytest.param(729, [(3, 182)], 68.6, id="FastV729-K3-R75"),
        pytest.param(729, [(8, 182)], 56.8, id="FastV729-K8-R75"),
        pytest.param(729, [(8, 275), (16, int(0.09 * 275))], 64.2, id="FEATHER"),
        # keep=0.6: 437 tokens by score, and on average 0.4 of the grid's 81 beside them; the paper prints 48 %
        pytest.param(729, [(8, 469), (16, int(0.36 * 469))], 47.9, id="FEATHER-48"),
        pytest.param(576, [(2, 288)], 47.6, id="FastV-K2-R50"),
    ],
)
def test_published_reductions(n, stages, cut):
    assert round(100 * fastv_reduction(layer_inputs(T7, n, stages), D7, M7), 1) == cut


def test_three_matrices_barely_change_the_ratio():
    lengths = layer_inputs(T7, 576, [(2, 288)])
    assert round(100 * fastv_reduction(lengths, D7, M7, layer_macs=sparsevlm_layer_macs), 1) == 47.4


def test_fastv_table_counts_612_tokens_per_layer():
    assert round(fastv_layer_macs(612, D7, M7) / 1e9, 1) == 99.3
    assert round(fastv_layer_macs(612, D13, M13) / 1e9, 1) == 154.6


TABLE_7B = [(2, 50, 54.6), (2, 75, 32.8), (2, 90, 19.9), (3, 50, 56.6), (3, 75, 34.8), (3, 90, 22.8)]
TABLE_7B += [(5, 50, 59.6), (5, 75, 39.7), (5, 90, 27.8), (0, 50, 51.6), (0, 75, 28.8)]
TABLE_13B = [(2, 50, 84.6), (2, 75, 50.2), (2, 90, 29.7)]


@pytest.mark.parametrize(
    "K, R, printed, d, m, layers",
    [(*row, D7, M7, T7) for row in TABLE_7B] + [(*row, D13, M13, T13) for row in TABLE_13B],
)
def test_fastv_table(K, R, printed, d, m, layers):
    """Mean per layer, 36 text and 576 image tokens. The printed cells carry their own rounding, up to 0.45."""
    kept = 36 + round(576 * (100 - R) / 100)
    mean = sum(fastv_layer_macs(n, d, m) for n in layer_inputs(layers, 612, [(K, kept)])) / layers
    assert abs(mean / 1e9 - printed) < 0.45


@pytest.mark.parametrize(
    "stages, mean, tera",
    [
        pytest.param([], 576.0, 4.62, id="all"),
        pytest.param([(3, 309), (7, 204), (16, 113)], 206.5, 2.13, id="192"),
        pytest.param([(3, 312), (7, 117), (16, 39)], 145.4, 1.73, id="128"),
        pytest.param([(3, 249), (7, 55), (16, 27)], 114.1, None, id="96"),
        pytest.param([(3, 82), (7, 32), (16, 18)], 82.3, 1.31, id="64"),
    ],
)
def test_sparsevlm_tokens_and_cost(stages, mean, tera):
    """Mean over layer inputs; cost with 118 text tokens and three feed-forward matrices."""
    lengths = layer_inputs(T7, 576, stages)
    assert flops.mean_tokens(lengths) == pytest.approx(mean, abs=0.051)
    if tera is not None:
        assert round(sum(sparsevlm_layer_macs(n + 118, D7, M7) for n in lengths) / 1e12, 2) == tera


FASTV_MEANS = [(2, 50, 306), (2, 75, 171), (2, 90, 90.4), (3, 50, 315), (3, 75, 184.5), (3, 90, 106.6)]


@pytest.mark.parametrize("K, R, mean", FASTV_MEANS)
def test_fastv_mean_tokens(K, R, mean):
    kept = round(576 * (100 - R) / 100)
    assert flops.mean_tokens(layer_inputs(T7, 576, [(K, kept)])) == pytest.approx(mean, abs=0.051)


def test_empty_lengths_are_refused():
    with pytest.raises(ValueError, match=r"^lengths: expected at least one layer, got none$"):
        flops.mean_tokens([])
    with pytest.raises(ValueError, match=r"^lengths_by_layer: expected at least one layer, got none$"):
        fastv_reduction([], D7, M7)
