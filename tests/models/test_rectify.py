"""``rectify=True``: a token that stays stands for those most like it that went, in prefill and decoding, in every cache.

``check_model`` compares with the masked run, whose columns get the log of what an own, slow count says.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass, replace

import pytest
import torch
import transformers
from packaging.version import Version
from torch._dynamo.utils import counters
from transformers import CompileConfig, StaticCache

import vlmprune
from helpers.tiny import IMAGE, Drawn, generate, make_batch, make_model
from vlmprune.errors import ModelError
from vlmprune.models.graphs.reads import HostReads
from vlmprune.models.graphs.unfit import unfit_model
from vlmprune.testing import check_model
from vlmprune.testing.masked import masked_logits
from vlmprune.testing.recorded import Recorded

ONE = [[4, "I", 7]]
PADDED = [["I", 9, "I", 4], [3, "I", 5], [12]]
COMPACT = {"earlier_kv": "compact", "rectify": True}
POLICIES = {
    "one-stage": vlmprune.FastV(layer=2, keep=5, rectify=True),
    "layer-0": vlmprune.Random(layer=0, keep=0.3, rectify=True),
    "two-stages": vlmprune.Stages(
        [vlmprune.FastV(layer=1, keep=0.7), vlmprune.Random(layer=4, keep=0.4)], rectify=True
    ),
    "packed": vlmprune.PyramidDrop(layers=(2, 4), rectify=True, positions="pack"),
    "merged": vlmprune.SparseVLM(layers=(1, 3, 4), keep=(10, 6, 3), rectify=True, positions="pack"),
    "union": vlmprune.FastV(layer=2, keep=0.2, rectify=True)
    | vlmprune.Uniform(layer=2, keep=0.3, rectify=True),
    "compacted": vlmprune.FastV(layer=3, keep=5, **COMPACT),
    "two-stages-compacted": vlmprune.Feather(layers=(2, 4), keep=0.5, **COMPACT),
    "merged-compacted": vlmprune.SparseVLM(layers=(1, 3, 4), keep=(10, 6, 3), **COMPACT),
}
ATOL = {"rtol": 0, "atol": 1e-4}
SAMPLES = {"one": [("square", 5)]}
CROPS = Version(transformers.__version__) >= Version("5.24")


@pytest.fixture(scope="module")
def model():
    return make_model()


def run_of(model, batch, policy, steps=5, **kwargs):
    with vlmprune.prune(model, policy):
        return generate(model, batch, steps, **kwargs)


def same(got, want):
    assert torch.equal(got[0], want[0])
    torch.testing.assert_close(got[1], want[1], **ATOL)


@pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES)
@pytest.mark.parametrize("attn", ["sdpa", "eager", "vlmprune"])
def test_equals_the_masked_run_with_the_logs_added(attn, policy):
    """One prompt and a padded batch, over some steps of decoding."""
    report = check_model(make_model(attn=attn), policy)
    assert [row.verdict for row in report.rows] == ["ok"] * 6


@pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES)
def test_the_logs_are_what_it_changes(model, policy):
    """Not of nothing: plain pruning lies far from it, though it keeps the same tokens at its first stage."""
    batch = make_batch(PADDED)
    change = {"policies": tuple(policy.policies)} if isinstance(policy, vlmprune.Stages) else {}
    if isinstance(policy, vlmprune.Union):
        change = {name: replace(getattr(policy, name), rectify=False) for name in ("first", "second")}
    plain = replace(policy, rectify=False, **change)
    got, want = (run_of(model, batch, one, 1)[1] for one in (policy, plain))
    assert (got - want)[:2].abs().amax((1, 2)).min() > 0.01
    torch.testing.assert_close(got[2], want[2], **ATOL)  # a sample without an image


@pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES)
def test_every_token_is_stood_for_once(model, policy):
    cache = run_of(model, make_batch(PADDED), policy, 2)[2].past_key_values
    for layer in cache.layers[max(policy.layers) :]:
        stood = layer.bias.exp() if layer.valid is None else layer.bias.exp() * layer.valid
        text = (stood == 1).sum(1)
        assert stood.sum(1).round().tolist() == [1 + 16 + 9 + 16 + 4, 1 + 3 + 16 + 5, 13]
        assert (text < stood.shape[1]).tolist()[:2] == [True, True]


def test_as_many_as_are_like_it(model):
    """Three colours of patches: one of each stays, and stands for all of its colour."""
    batch = make_batch(ONE)
    colours = torch.tensor([0] * 9 + [1] * 2 + [2] * 5)

    def features(module, args, output):
        return torch.eye(64)[colours].expand(output.shape) + 0 * output

    handle = model.model.multi_modal_projector.register_forward_hook(features)
    try:
        cache = run_of(
            model, batch, vlmprune.Custom(0, lambda ctx: torch.tensor([[0, 10, 12]]), rectify=True), 1
        )
    finally:
        handle.remove()
    bias = cache[2].past_key_values.layers[0].bias
    torch.testing.assert_close(bias[0, 5:8].exp(), torch.tensor([9.0, 2.0, 5.0]))
    assert bias[0, :5].eq(0).all() and bias[0, 8:].eq(0).all()


@dataclass(frozen=True)
class Joined(vlmprune.PruningPolicy):
    """Keeps the tokens 0, 3 and 9; says of some whom they were merged with, however unlike they are."""

    layer: int = 0

    def select(self, ctx):
        index = torch.tensor([[0, 3, 9]])
        merged = torch.full(ctx.mask.shape, -1)
        merged[0, 10:] = 3
        merged[0, 3] = 9  # who stays stands for itself all the same
        return vlmprune.Reduction(index, merged=merged)


def test_as_many_as_were_merged_with_it(model):
    cache = run_of(model, make_batch(ONE), Joined(rectify=True), 1)[2].past_key_values
    stood = cache.layers[0].bias[0, 5:8].exp().round().tolist()
    assert stood[1] >= 7 and sum(stood) == 16
    assert [row.verdict for row in check_model(model, Joined(rectify=True), samples=SAMPLES).rows] == [
        "ok"
    ] * 3


@pytest.mark.parametrize("specs", [ONE, PADDED], ids=["one", "padded"])
def test_keep_all_is_bit_equal_to_the_unpatched_model(model, specs):
    batch = make_batch(specs)
    got = run_of(model, batch, vlmprune.FastV(layer=2, keep=1.0, rectify=True))
    want = generate(model, batch, 5)
    assert torch.equal(got[1], want[1])
    assert {type(layer).__name__ for layer in got[2].past_key_values.layers} == {"DynamicLayer"}


class Stream(nullcontext):
    """transformers' offloading uses CUDA streams whatever the device; without one there is nothing to wait for."""

    def wait_stream(self, other):
        pass

    synchronize = nullcontext.__enter__


@pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES)
@pytest.mark.parametrize("kind", ["static", "offloaded", "offloaded_static", None])
def test_every_kind_of_cache(model, policy, kind, monkeypatch):
    if not torch.cuda.is_available():
        monkeypatch.setattr("torch.Stream", Stream)
        monkeypatch.setattr(torch.cuda, "default_stream", lambda device: Stream())
    batch = make_batch(PADDED)
    steps, how = (1, {"use_cache": False}) if kind is None else (5, {"cache_implementation": kind})
    same(run_of(model, batch, policy, steps, **how), run_of(model, batch, policy, steps))


def test_compiled_decode_is_one_graph():
    torch._dynamo.reset()
    counters.clear()
    model, batch = make_model(num_hidden_layers=2), make_batch(PADDED)
    compiled = CompileConfig(fullgraph=True, backend="eager", mode=None, dynamic=False)
    compiled._compile_all_devices = True
    how = {"cache_implementation": "static", "compile_config": compiled}
    for keep, graphs in ((0.5, 1), (3, 1)):
        policy = vlmprune.FastV(layer=1, keep=keep, rectify=True)
        same(run_of(model, batch, policy, 4, **how), run_of(model, batch, policy, 4))
        assert counters["stats"]["unique_graphs"] == graphs
    assert not counters["graph_break"]


@pytest.mark.parametrize("specs", [ONE, PADDED[:2]], ids=["one", "padded"])
@pytest.mark.parametrize("kv", ["full", "compact"])
def test_second_turn(model, specs, kv):
    """Of text, from the returned cache: what stood for others still does."""
    batch, policy = make_batch(specs), Drawn((2, 4), earlier_kv=kv, rectify=True)
    recorded = Recorded(policy, earlier_kv=kv, rectify=True)
    with vlmprune.prune(model, recorded):
        tokens, _, out = generate(model, batch, 3)
        answers, standing = dict(recorded.answers), dict(recorded.standing)
        said = torch.cat([tokens, torch.tensor([[5, 6]] * len(tokens))], 1)
        ids = torch.cat([batch["input_ids"], said], 1)
        mask = torch.cat([batch["attention_mask"], torch.ones_like(said)], 1)
        text = {"input_ids": ids, "attention_mask": mask}
        more, logits, _ = generate(model, text, 4, past_key_values=out.past_key_values)
    every = torch.cat([said, more], 1)
    want = masked_logits(model, batch, every, answers, kv == "compact", standing)
    torch.testing.assert_close(logits, want[:, -4:], **ATOL)


@pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
@pytest.mark.parametrize("kv", ["full", "compact"])
def test_a_second_image_and_samples_that_do_not_disturb_one_another(model, static, kv):
    """Each sample of a batch gets in both turns what it gets alone."""
    policy = vlmprune.FastV(layer=2, keep=0.4, rows="mean", earlier_kv=kv, rectify=True)
    firsts = [make_batch([spec], seed=i) for i, spec in enumerate([[4, "I", 7], [2, "I", 5, "I", 3]])]
    seconds = [make_batch([spec], seed=9 + i) for i, spec in enumerate([["I", 2], [4, "I"]])]

    def two_turns(first, second, **cache):
        with vlmprune.prune(model, policy):
            tokens, logits, out = generate(model, first, 3, **cache)
            ids = torch.cat([first["input_ids"], tokens, second["input_ids"]], 1)
            mask = [first["attention_mask"], torch.ones_like(tokens), second["attention_mask"]]
            call = {**second, "input_ids": ids, "attention_mask": torch.cat(mask, 1)}
            more = generate(model, call, 3, past_key_values=out.past_key_values)[1]
        return torch.cat([logits, more], 1)

    want = torch.cat([two_turns(a, b) for a, b in zip(firsts, seconds, strict=True)])
    both = [joined(turn) for turn in (firsts, seconds)]
    cache = {"past_key_values": StaticCache(config=model.config, max_cache_len=96)} if static else {}
    torch.testing.assert_close(two_turns(*both, **cache), want, rtol=0, atol=2e-4)


def joined(batches):
    """Batches of one as a batch, padded on the left."""
    width = max(b["input_ids"].shape[1] for b in batches)
    out = {"pixel_values": torch.cat([b["pixel_values"] for b in batches])}
    for name in ("input_ids", "attention_mask"):
        rows = [torch.nn.functional.pad(b[name], (width - b[name].shape[1], 0)) for b in batches]
        out[name] = torch.cat(rows)
    return out


@pytest.mark.parametrize("kind", [{}, {"cache_implementation": "static"}], ids=["dynamic", "static"])
def test_beams(model, kind):
    """Against runs without a cache, in which every step prunes anew: this choice stays the same."""
    batch, policy = make_batch([[4, "I", 7], [2, "I", 3]]), vlmprune.Uniform(layer=2, keep=0.3, rectify=True)
    got, want = (run_of(model, batch, policy, 6, num_beams=3, **k)[2] for k in (kind, {"use_cache": False}))
    assert torch.equal(got.sequences, want.sequences)
    torch.testing.assert_close(torch.stack(got.logits), torch.stack(want.logits), **ATOL)


@pytest.mark.parametrize("kv", ["full", "compact"])
@pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
def test_rejected_candidates_are_cropped(model, static, kv):
    if static and not CROPS:
        pytest.skip("transformers < 5.24 crops no static cache")
    batch, policy = make_batch([[8, "I", 7]]), vlmprune.FastV(layer=2, keep=0.4, earlier_kv=kv, rectify=True)
    batch["input_ids"][0, -1] = batch["input_ids"][0, 2]  # so that there is something to look up
    how = {"prompt_lookup_num_tokens": 4, "max_matching_ngram_size": 1}
    if static:
        how["past_key_values"] = StaticCache(config=model.config, max_cache_len=64)
    assert torch.equal(run_of(model, batch, policy, 12, **how)[0], run_of(model, batch, policy, 12)[0])


@pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
def test_what_is_written_over_a_cropped_entry_stands_for_itself(model, static):
    if static and not CROPS:
        pytest.skip("transformers < 5.24 crops no static cache")
    batch, policy = make_batch([[4, "I"]]), vlmprune.Random(layer=0, keep=4, rectify=True)
    cache = StaticCache(config=model.config, max_cache_len=40) if static else None
    out = run_of(model, batch, policy, 1, **({"past_key_values": cache} if static else {}))[2].past_key_values
    layer = out.layers[0]
    assert layer.bias[0, 5:9].exp().sum().round() == 16
    layer.crop(-2)
    kept = layer.bias[0, :7].clone()
    assert kept[5:].exp().sum() >= 2 and layer.bias[0, 7:].eq(0).all()


@pytest.mark.real("checkpointing asks PyTorch for the device's module")
def test_steps_of_training(model):
    """Checkpointed layers run twice, under the same logs."""
    model, batch = make_model(), make_batch(PADDED[:2], pad="right")
    labels = batch["input_ids"].masked_fill(batch["input_ids"] == IMAGE, -100)
    weight, found = model.model.multi_modal_projector.linear_2.weight, []
    model.train()
    for again in (False, True):
        if again:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        with vlmprune.prune(model, Drawn((2, 4), rectify=True)):
            loss = model(**batch, labels=labels, use_cache=False).loss
            loss.backward()
        found.append((loss.detach(), weight.grad))
        weight.grad = None
    torch.testing.assert_close(*found, rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    """The logs are added in the rows' precision."""
    report = check_model(make_model().to(dtype), vlmprune.Random(layer=2, keep=3, rectify=True))
    assert [row.verdict for row in report.rows] == ["ok"] * 6


@pytest.mark.parametrize("attn", ["flash_attention_2", "flex_attention"])
def test_other_implementations_are_refused(model, attn, monkeypatch):
    config = model.model.language_model.config
    monkeypatch.setattr(config, "_attn_implementation_internal", attn)
    expected = (
        rf"^attn_implementation: expected 'sdpa', 'eager' or 'vlmprune' with rectify=True .*, got '{attn}'$"
    )
    with pytest.raises(ModelError, match=expected), vlmprune.prune(model, POLICIES["one-stage"]):
        pass
    with vlmprune.prune(model, vlmprune.FastV(layer=2)):
        pass


def test_a_rectified_cache_needs_it_in_later_calls_too(model, monkeypatch):
    out = run_of(model, make_batch(ONE), POLICIES["layer-0"], 2)[2]
    monkeypatch.setattr(
        model.model.language_model.config, "_attn_implementation_internal", "flash_attention_2"
    )
    step = {"input_ids": torch.tensor([[5]]), "past_key_values": out.past_key_values}
    with torch.no_grad(), vlmprune.prune(model, vlmprune.FastV(layer=2)):
        with pytest.raises(ModelError, match=r"^attn_implementation: expected 'sdpa'"):
            model(**step)
    monkeypatch.undo()
    with pytest.raises(ModelError, match=r"^cache: expected a pruning scope"):
        model(**step)


def test_no_graph(model):
    assert unfit_model(model.model.language_model, POLICIES["one-stage"]).startswith("rectify=True")
    assert unfit_model(model.model.language_model, vlmprune.FastV(layer=2)) is None


@pytest.mark.real("the guard's methods would be noted twice")
@pytest.mark.parametrize("name", ["one-stage", "packed", "compacted"])
def test_nothing_is_read_back(model, name):
    batch, policy = make_batch(ONE), POLICIES[name]
    batch.pop("attention_mask")
    with torch.no_grad():
        with HostReads(model.device, (plain := []).append):
            model(**batch)
        with vlmprune.prune(model, policy):
            model(**batch)  # the first choice at each layer is read back, to be checked
            with HostReads(model.device, (pruned := []).append):
                model(**batch)
    assert len(pruned) <= len(plain), pruned
