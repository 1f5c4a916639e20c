"""Real attention kernels, all that are usable where the tests run: output and log-sum-exp against float64, and their way to
a stage. On the CPU that is torch's flash kernel for CPUs; ``--device cuda`` has torch's for GPUs, and flash-attn where it
is installed, dense and as sequences of a padded batch."""

from __future__ import annotations

import pytest
import torch

import vlmprune
from helpers.attention import draw, logits_of
from helpers.tiny import make_batch, make_model
from vlmprune.models.attention import kernels
from vlmprune.policies.base import AttentionInputs

LENGTHS, HEADS = (1, 7, 128, 301), ((8, 8), (28, 4))
SCALE = 0.3  # of logits_of
NEAR = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
"""Norm of an output's error over the output's: two ulps of a half type."""
BATCHES = {"one": [["I", 7]], "padded": [["I", 9, "I", 4], [3, "I", 5], [12]]}


def padded(length):
    """No padding, some on the left, some on the right."""
    valid = torch.ones(3, length, dtype=torch.bool)
    valid[1, : length // 3] = valid[2, length - length // 4 :] = False
    return valid


def check_kernel(kernel, call, valid):
    """One kernel's output and log-sum-exp of the rows that are no padding, against attention in float64."""
    q, k, v = call.query, call.key, call.value
    causal = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool).tril()
    logits, _ = logits_of(q, k, causal & valid[:, None, None], True)
    value = v.double().repeat_interleave(q.shape[1] // k.shape[1], 1)
    want = (logits.softmax(-1).nan_to_num() @ value).transpose(1, 2)[valid]
    out, lse = kernel.run(call, True)
    error = (out.double()[valid] - want).norm() / want.norm()
    assert out.dtype == q.dtype and out.shape == q.transpose(1, 2).shape
    assert error <= NEAR[q.dtype], f"{kernel.name}: an error of {float(error):.1e}"
    if lse is not None:  # packed, old releases of flash-attn lay it out in another way, which is not used
        assert lse.dtype == torch.float32 and lse.shape == q.shape[:3]
        got, exact = (x.double().transpose(1, 2)[valid] for x in (lse, logits.logsumexp(-1)))
        torch.testing.assert_close(got, exact, atol=1e-3, rtol=0, msg=lambda m: f"{kernel.name}: {m}")


@pytest.mark.parametrize("dtype", NEAR, ids=str)
@pytest.mark.parametrize("size", [64, 80, 128, 256])
@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
def test_output_and_lse_of_every_usable_kernel(packed, size, dtype):
    ran = set()
    for length in LENGTHS:
        for heads, kv_heads in HEADS:
            q, k, v = draw(3, heads, kv_heads, length, length, size, dtype, seed=length)
            valid = padded(length) if packed else torch.ones(3, length, dtype=torch.bool)
            seen = kernels.bounds(valid) if packed else None
            call = kernels.AttentionCall(q, k, v, seen, True, SCALE, 0.0)
            for kernel in kernels.usable(q.device):
                if kernel.takes(call):
                    check_kernel(kernel, call, valid)
                    ran.add(kernel.name)
    if not ran:
        assert q.device.type != "cuda" or dtype == torch.float32
        pytest.skip(f"no kernel here takes {dtype}, {'packed' if packed else 'dense'}")


@pytest.mark.parametrize("specs", BATCHES)
@pytest.mark.parametrize("rows", ["last", "mean"])
def test_lse_reaches_the_stage_is_used_and_does_not_stay(rows, specs, monkeypatch):
    model, batch = make_model(attn="vlmprune"), make_batch(BATCHES[specs])
    place = batch["input_ids"].device
    if not kernels.usable(place):
        pytest.skip("no kernel here")
    if place.type == "cuda":
        model = model.bfloat16()
    found, forwards = [], []
    rating, received = AttentionInputs.rating, AttentionInputs.received

    def spy(self, *args, **kwargs):
        found.append(self)
        return rating(self, *args, **kwargs)

    monkeypatch.setattr(AttentionInputs, "rating", spy)
    handle = model.model.language_model.layers[-1].register_forward_pre_hook(
        lambda m, a, kw: forwards.append(kw["vlmprune"]), with_kwargs=True
    )
    with torch.no_grad(), vlmprune.prune(model, vlmprune.FastV(layer=2, keep=0.5, rows=rows)):
        model(**batch)
    handle.remove()
    (seen,) = found
    monkeypatch.undo()
    assert seen.lse.shape == seen.query.shape[:3]
    assert forwards[0].lse == {}
    again = AttentionInputs(**{**vars(seen), "lse": None})
    which = seen.last if rows == "last" else seen.rows
    near = {"atol": 1e-6, "rtol": 1e-5} if seen.query.dtype == torch.float32 else {"atol": 1e-4, "rtol": 1e-3}
    torch.testing.assert_close(received(seen, which), received(again, which), **near)
    spoiled = AttentionInputs(**{**vars(seen), "lse": seen.lse + 1})
    assert not torch.allclose(received(spoiled, which), received(again, which))
