"""Which kernels the attention backend calls, and how: sequence bounds for padding, flash-attn's three generations, torch's own.

The flash-attn packages are stand-ins in plain PyTorch (``helpers.fake_flash``): what runs on a GPU is not measured here.
"""

from __future__ import annotations

import sys

import pytest
import torch
from transformers import AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import causal_mask_function

import vlmprune
from helpers import fake_flash
from helpers.attention import Wants, draw, layer, logits_of
from helpers.tiny import generate, make_batch, make_model
from vlmprune.models import explain
from vlmprune.models.attention import kernels
from vlmprune.models.attention.backend import attention, mask

pytestmark = pytest.mark.cpu("stands in for a GPU here; test_flash.py has real kernels")

BATCHES = {"one": [["I", 7]], "padded": [["I", 9, "I", 4], [3, "I", 5], [12]]}
STEPS = 4


VALID = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0], [0, 1, 1, 1, 1, 0], [1] * 6, [0] * 6]).bool()


def test_bounds_say_what_the_mask_says():
    edges = kernels.bounds(VALID)
    assert edges.dtype == torch.int32
    assert edges[:4].tolist() == [0, 2, 6, 6] and edges[-1] == VALID.numel() and (edges.diff() >= 0).all()
    rows = torch.empty(*VALID.shape, 1)[:, None]
    got = kernels.bounds_mask(kernels.AttentionCall(rows, rows, rows, edges, True, None, 0.0))
    want = torch.ones(6, 6, dtype=torch.bool).tril() & VALID[:, None, None]
    assert torch.equal(got[VALID[:, None].expand(-1, 1, -1)], want[VALID[:, None].expand(-1, 1, -1)])
    assert got.any(-1).all()  # a padding row sees itself: no NaN


def ask_mask(valid, rows=None, **more):
    keys = valid.shape[1]
    rows = keys if rows is None else rows
    more = {
        "mask_function": causal_mask_function,
        "dtype": torch.float32,
        "allow_is_causal_skip": True,
    } | more
    return mask(len(valid), rows, keys, keys - rows, 0, attention_mask=valid, **more)


def test_mask_formats(gpu):
    gpu(2)
    assert ask_mask(VALID[3:4]) is None
    assert torch.equal(ask_mask(VALID), kernels.bounds(VALID))
    known = ask_mask(
        VALID, allow_is_causal_skip=False, left_padded=True
    )  # behind a stage: no read of the device
    assert torch.equal(known, kernels.bounds(VALID))
    holes = torch.tensor([[1, 0, 1, 1], [1, 1, 1, 1]]).bool()
    for odd in (
        ask_mask(holes),
        ask_mask(VALID[:, 2:], rows=2),
        ask_mask(VALID, allow_is_causal_skip=False),
        ask_mask(VALID, dtype=torch.float64),
        ask_mask(VALID, mask_function=lambda b, h, q, k: k <= q),
    ):
        assert odd.ndim == 4 and odd.dtype == torch.bool


def test_a_stage_leaves_a_padded_batch_to_the_flash_kernels(gpu, monkeypatch):
    """The engine tells our mask function that padding stands on the left: both halves of the decoder run packed."""
    gpu(2)
    monkeypatch.setattr(kernels, "HALVES", (torch.float32,))
    model, batch = make_model(attn="vlmprune"), make_batch(BATCHES["padded"])
    seen = []
    monkeypatch.setattr(kernels, "choose", lambda call, want: seen.append(call.mask))  # then plain SDPA runs
    with vlmprune.prune(model, vlmprune.Uniform(layer=2, keep=0.5)), torch.no_grad():
        pruned = model(**batch).logits
    assert not pruned.isnan().any()
    packed = [m for m in seen if m is not None and m.ndim == 1]
    assert len(packed) == model.config.text_config.num_hidden_layers
    assert len({len(m) for m in packed}) == 1 and not torch.equal(packed[0], packed[-1])


def test_mask_on_a_cpu_is_sdpas():
    want = AttentionMaskInterface._global_mapping["sdpa"]
    for valid in (VALID, VALID[3:4]):
        got = ask_mask(valid)
        sdpa = want(
            batch_size=len(valid), q_length=6, kv_length=6, q_offset=0, kv_offset=0, attention_mask=valid
        )
        assert (got is None and sdpa is None) or torch.equal(got, sdpa)


# FlashAttention, by stand-ins


@pytest.fixture
def gpu(monkeypatch):
    """Take the CPU for a GPU on which one generation of flash-attn is installed; returns the list of its calls."""

    def pretend(generation, capability=9, takes=None):
        monkeypatch.setattr(kernels, "GPU", "cpu")
        monkeypatch.setattr(kernels, "HALVES", (torch.float32,))
        monkeypatch.setattr(kernels, "capability", lambda device: capability)
        calls = fake_flash.install(monkeypatch, generation, takes)
        clear()
        return calls

    def clear():
        kernels.usable.cache_clear()
        kernels.load.cache_clear()
        for kernel in kernels.KERNELS:
            kernel.refused.clear()

    yield pretend
    clear()


@pytest.mark.parametrize("specs", BATCHES)
@pytest.mark.parametrize("generation", [2, 3, 4])
def test_flash_attn_runs_the_backend(gpu, generation, specs):
    """Unmeasured on a GPU: that the stand-ins behave as the packages do was read, not run."""
    batch = make_batch(BATCHES[specs])
    policy = vlmprune.FastV(layer=2, keep=0.5, rows="mean")
    plain = make_model()
    with vlmprune.prune(plain, policy) as run:
        tokens, logits, _ = generate(plain, batch, STEPS)
        index = run.stages[0].index
    calls, model = gpu(generation), make_model(attn="vlmprune")
    with vlmprune.prune(model, policy) as run:
        got_tokens, got_logits, _ = generate(model, batch, STEPS)
    assert set(calls) == {"dense" if specs == "one" else "packed"}
    assert torch.equal(run.stages[0].index, index)
    torch.testing.assert_close(got_logits, logits, atol=1e-4, rtol=0)
    assert torch.equal(got_tokens, tokens)


@pytest.mark.parametrize("generation", [2, 3, 4])
@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
def test_flash_attn_keeps_the_lse(gpu, generation, packed):
    calls = gpu(generation)
    q, k, v = draw(5, 8, 4, 6, 6, 16, torch.float32)
    wants, seen = Wants(), kernels.bounds(VALID) if packed else None
    got = attention(layer(8, 4), q, k, v, seen, scaling=0.3, vlmprune=wants)[0]
    assert calls == ["packed" if packed else "dense"]
    real = VALID if packed else torch.ones_like(VALID)
    lower = torch.ones(6, 6, dtype=torch.bool).tril() & real[:, None, None]
    want = sdpa_attention_forward(layer(8, 4), q, k, v, lower, scaling=0.3)[0]
    torch.testing.assert_close(got[real], want[real], atol=1e-5, rtol=0)
    want_lse = logits_of(q, k, lower, True)[0].logsumexp(-1).float()
    got_lse, want_lse = (x.transpose(1, 2)[real] for x in (wants.lse[3], want_lse))
    torch.testing.assert_close(got_lse, want_lse, atol=1e-5, rtol=0)


def test_what_a_kernel_cannot_take_goes_to_sdpa_with_the_same_mask(gpu):
    calls = gpu(2)
    q, k, v = draw(5, 8, 4, 6, 6, 12, torch.float32)  # head dim 12
    got = attention(layer(8, 4), q, k, v, kernels.bounds(VALID), scaling=0.3)[0]
    lower = torch.ones(6, 6, dtype=torch.bool).tril() & VALID[:, None, None]
    want = sdpa_attention_forward(layer(8, 4), q, k, v, lower, scaling=0.3)[0]
    assert not calls
    torch.testing.assert_close(got[VALID], want[VALID], atol=1e-6, rtol=0)


@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
def test_torchs_own_gpu_kernel_has_the_layouts_expected(packed):
    """By its shape function; what it computes is not run here."""
    q, k, v = (x.to("meta") for x in draw(5, 8, 4, 6, 6, 16, torch.bfloat16))
    call = kernels.AttentionCall(
        q, k, v, kernels.bounds(VALID).to("meta") if packed else None, True, 0.3, 0.0
    )
    (kernel,) = (kernel for kernel in kernels.KERNELS if kernel.name == "torch flash")
    assert kernel.takes(call) and kernel.spare
    out, lse = kernel.run(call, True)
    assert out.shape == (5, 6, 8, 16) and lse.shape == (5, 8, 6) and lse.dtype == torch.float32


@pytest.mark.parametrize("specs", BATCHES)
def test_a_model_loaded_with_flash_attention_2_is_pruned(monkeypatch, specs):
    """transformers' own FlashAttention function, dense and unpadded, over two turns."""
    batch = make_batch(BATCHES[specs])
    models = [make_model(), make_model()]
    models[1].config.text_config._attn_implementation = "flash_attention_2"
    calls = fake_flash.install_for_transformers(monkeypatch)
    policy, turns = vlmprune.FastV(layer=2, keep=0.5), []
    for model in models:
        with vlmprune.prune(model, policy) as run:
            tokens, logits, first = generate(model, batch, STEPS)
            index = run.stages[0].index
            ids = torch.cat([first.sequences, torch.full((len(tokens), 4), 77)], 1)
            real = torch.nn.functional.pad(batch["attention_mask"], (0, STEPS + 4), value=1)
            again = {"input_ids": ids, "attention_mask": real}
            turns.append(
                (logits, generate(model, again, STEPS, past_key_values=first.past_key_values)[1], index)
            )
    assert set(calls) == ({"dense"} if specs == "one" else {"packed"})
    assert torch.equal(turns[0][2], turns[1][2])
    for one, other in zip(turns[0][:2], turns[1][:2], strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=0)


def test_explain_names_every_kernel_and_says_why_not(gpu):
    assert explain("cpu") == [
        *((f"flash-attn {n}", "needs a cuda device, got cpu") for n in ("3", "4", "2", "4 on 8.x")),
        ("torch flash", "needs a cuda device, got cpu"),
        ("torch flash for CPU", None),
        ("torch sdpa", None),
    ]
    gpu(2)
    reasons = dict(explain("cpu"))
    assert reasons["flash-attn 2"] is None and reasons["torch flash"] is None
    assert reasons["flash-attn 3"].startswith("flash_attn_interface cannot be imported: No module named")


def test_a_kernel_says_which_gpus_it_is_for(gpu, monkeypatch):
    gpu(3)
    monkeypatch.setattr(kernels, "capability", lambda device: 8)
    assert dict(explain("cpu"))["flash-attn 3"] == "needs compute capability 9, got 8"


# What the fourth generation takes: flash_attn/cute/interface.py, _validate_head_dims
BLACKWELL = {*range(8, 129, 8), 256}
FOURTH = {
    8: {*range(8, 129, 8)},
    9: {*range(8, 257, 8)},
    10: BLACKWELL,
    11: BLACKWELL,
    12: {*range(8, 129, 8)},
}


@pytest.mark.parametrize("major", [7, *FOURTH])
def test_the_fourth_generation_takes_fewer_head_dims_on_newer_gpus(gpu, major):
    gpu(4, major)
    taken = set()
    for size in range(4, 520, 4):
        q, k, v = draw(1, 2, 2, 3, 3, size, torch.float32)
        kernel = kernels.choose(kernels.AttentionCall(q, k, v, None, True, None, 0.0), False)
        if kernel is not None and kernel.name.startswith("flash-attn 4"):
            taken.add(size)
    assert taken == FOURTH.get(major, set())


def test_without_a_backward_training_goes_elsewhere(gpu):
    calls = gpu(4, 8)
    q, k, v = draw(1, 2, 2, 3, 3, 16, torch.float32)
    call = kernels.AttentionCall(q.requires_grad_(), k, v, None, True, None, 0.0)
    assert kernels.attend(call, False) is None and not calls
    with torch.no_grad():
        kernels.attend(call, False)
    assert calls == ["dense"]


@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
@pytest.mark.parametrize("generation", [3, 4])
def test_a_refused_call_runs_elsewhere_and_is_not_tried_again(gpu, generation, packed):
    """Another release may take less than was read: the second generation gives the result."""
    second, refusing = gpu(2), gpu(generation, takes={16})
    q, k, v = draw(5, 8, 4, 6, 6, 24, torch.float32)
    seen = kernels.bounds(VALID) if packed else None
    real = VALID if packed else torch.ones_like(VALID)
    lower = torch.ones(6, 6, dtype=torch.bool).tril() & real[:, None, None]
    want = sdpa_attention_forward(layer(8, 4), q, k, v, lower, scaling=0.3)[0]
    for _ in range(2):
        got = attention(layer(8, 4), q, k, v, seen, scaling=0.3)[0]
        torch.testing.assert_close(got[real], want[real], atol=1e-5, rtol=0)
    assert refusing == ["refused"] and second == ["packed" if packed else "dense"] * 2
    why = dict(explain("cpu"))[f"flash-attn {generation}"]
    assert why.startswith("refused float32 with head dim 24: ") and "support" in why
    small = draw(5, 8, 4, 6, 6, 16, torch.float32)
    attention(layer(8, 4), *small, seen, scaling=0.3)
    assert refusing == ["refused", "packed" if packed else "dense"]


def test_an_error_that_is_no_refusal_is_raised(gpu, monkeypatch):
    gpu(3)
    full = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
    module = sys.modules["flash_attn_interface"]
    monkeypatch.setattr(module, "flash_attn_func", fake_flash.raising(full))
    q, k, v = draw(1, 2, 2, 3, 3, 16, torch.float32)
    with pytest.raises(torch.OutOfMemoryError):
        attention(layer(2, 2), q, k, v, None)
    assert dict(explain("cpu"))["flash-attn 3"] is None


def test_a_package_built_for_another_release_of_its_own_needs_is_not_there(gpu, monkeypatch):
    gpu(2)

    def broken(name):
        raise AttributeError("module 'cutlass' has no attribute 'Int32'")

    monkeypatch.setattr(kernels, "import_module", broken)
    assert dict(explain("cpu"))["flash-attn 4"] == (
        "flash_attn.cute cannot be imported: module 'cutlass' has no attribute 'Int32'"
    )


def test_torchs_kernel_leaves_large_heads_to_sdpa_where_it_may_have_no_backward():
    (kernel,) = (kernel for kernel in kernels.KERNELS if kernel.name == "torch flash")
    for size, grad, taken in ((192, True, True), (256, False, True), (256, True, False), (264, False, False)):
        q, k, v = (x.to("meta").requires_grad_(grad) for x in draw(1, 2, 2, 3, 3, size, torch.bfloat16))
        assert kernel.takes(kernels.AttentionCall(q, k, v, None, True, None, 0.0)) is taken


def test_one_packed_row_a_sample_goes_to_sdpa():
    """There the kernels may fold grouped heads into the row, and take each bound for a sample."""
    (kernel,) = (kernel for kernel in kernels.KERNELS if kernel.name == "torch flash")
    for length, taken in ((1, False), (2, True)):
        q, k, v = draw(3, 8, 2, length, length, 64, torch.bfloat16)
        edges = kernels.bounds(torch.ones(3, length, dtype=torch.bool))
        assert kernel.takes(kernels.AttentionCall(q, k, v, edges, True, None, 0.0)) is taken
