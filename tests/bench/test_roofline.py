"""The roofline, against numbers computed by hand for a decoder of two small layers."""

import pytest

from vlmprune.bench.roofline import Decoder, Peaks
from vlmprune.errors import InputError
from vlmprune.flops import DecoderShape

# one layer: query and output 2 x 4 x 4, key and value 2 x 4 x 2, feed-forward 3 x 4 x 8: 144 weights; the head has 4 x 10
DECODER = Decoder(DecoderShape(layers=2, hidden=4, heads=2, kv_heads=1, head_dim=2, intermediate=8), 10, 2)
PEAKS = Peaks(flops=10, bandwidth=2)


def test_weights_and_kv():
    assert DECODER.layer_weights == 144
    assert DECODER.kv == 2 * 2 * 2  # key and value of two numbers of two bytes


@pytest.mark.parametrize(
    "lengths, batch, seconds",
    [
        # n = 3: 2*3*144 + 4*9*4 - 48 skipped = 960 FLOPs in 96 s; 288 bytes of weights and 24 of KV in 156 s
        ([3, 3], 1, 156 + 156 + 40),
        # n = 1: 304 FLOPs in 30.4 s; 288 + 8 bytes in 148 s
        ([3, 1], 1, 156 + 148 + 40),
        # 3,840 FLOPs in 384 s, 288 + 96 bytes in 192 s: weights are read once, so now the FLOPs bind; not so in the head
        ([3, 3], 4, 384 + 384 + 40),
    ],
)
def test_prefill(lengths, batch, seconds):
    assert DECODER.prefill_seconds(lengths, batch, PEAKS) == pytest.approx(seconds)


def test_a_second_wave_is_bound_by_its_own_rows():
    # 3 rows of one layer, as in a prefill of 3
    assert DECODER.wave_seconds((1, 3), 1, PEAKS) == pytest.approx(156)
    assert DECODER.wave_seconds((2, 3), 4, PEAKS) == pytest.approx(384 + 384)


def test_decode():
    # behind 3 entries: 288 + 4 x 8 bytes; behind 1: 288 + 2 x 8; the FLOPs, 352 and 320, take less
    assert DECODER.decode_seconds([3, 1], 1, PEAKS) == pytest.approx(160 + 152 + 40)
    assert DECODER.decode_flops([3, 1], 2) == 2 * (2 * 144 + 4 * 4 * 4 + 2 * 144 + 4 * 2 * 4)


def test_a_faster_device_is_bound_by_the_other():
    assert DECODER.prefill_seconds([3, 3], 1, Peaks(10, 1e9)) == pytest.approx(96 + 96 + 8)


def test_other_depths_are_refused():
    for call in (DECODER.prefill_seconds, DECODER.decode_seconds):
        with pytest.raises(InputError, match="lengths: expected 2 numbers, one per layer, got 1"):
            call([3], 1, PEAKS)
