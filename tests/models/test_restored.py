"""Tokens that come back: rows set aside stand in the sequence again, as they were, in their places, in later layers only.

``check_model`` compares with the masked run, which puts hidden rows back to what they were when they were hidden. More in
test_table.py: caches, beams and second turns, on several families.
"""

from __future__ import annotations

import pytest
import torch

import vlmprune
from helpers.recorder import Recorder
from helpers.table import Back
from helpers.tiny import IMAGE, STEPS, generate, make_batch, make_model, upstream
from vlmprune import LVLMCSP, FastV, Graphs, Random, SparseVLM, Stages, VisionZip
from vlmprune.errors import InputError
from vlmprune.flops import decoder_flops, layer_inputs
from vlmprune.models import layer_inputs as layer_inputs_of
from vlmprune.models.host.masks import pruned_mask
from vlmprune.models.host.parts import decoder_shape
from vlmprune.models.prefill import Prefill
from vlmprune.policies import Needs, keep_for_mean_tokens
from vlmprune.policies.schedule import stage_counts
from vlmprune.testing import check_model
from vlmprune.testing.masked import masked_logits
from vlmprune.testing.recorded import Recorded

CSP = LVLMCSP(cluster=5, then=6, scatter=2, prune=4)
PADDED = [["I", 9, "I", 4], [3, "I", 5], [12]]
PACKED = VisionZip(dominant=6, contextual=2, positions="pack")
POLICIES = {
    "clusters": CSP,
    "by-cls": LVLMCSP(cluster=5, then=6, scatter=2, prune=4, by="cls", rows="text"),
    "to-the-end": Stages([Random(0, keep=0.3), Back(3)]),
    "some-back": Stages([Random(0, keep=0.3), Back(2, keep=0.5), FastV(layer=4, keep=0.5)]),
    "set-aside-twice": Stages(
        [Random(0, keep=0.5), FastV(layer=1, keep=0.5), Back(3), FastV(layer=5, keep=0.3)]
    ),
    "back-twice": Stages(
        [Random(0, keep=0.3), Back(1, keep=0.6), FastV(layer=2, keep=0.5), Back(4, keep=0.8)]
    ),
    "merged-and-packed": Stages([PACKED, Back(2), FastV(layer=3, keep=0.4)]),
    "packed-once-more": Stages(
        [
            PACKED,
            SparseVLM(layers=(1,), keep=(5,), positions="pack"),
            Back(3),
            SparseVLM(layers=(4,), keep=(6,), positions="pack"),
        ]
    ),
    "rectified": Stages([Random(0, keep=0.3), Back(2), FastV(layer=4, keep=0.4)], rectify=True),
    "rectified-some-back": Stages([Random(0, keep=0.3), Back(2, keep=0.5), FastV(layer=4)], rectify=True),
}


@pytest.fixture(scope="module")
def model():
    return make_model()


@pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES)
def test_equals_the_masked_run(model, policy):
    report = check_model(model, policy)
    assert [row.verdict for row in report.rows] == ["ok"] * 6


@pytest.mark.parametrize("attn", ["eager", "vlmprune"])
def test_other_attention(attn):
    assert all(row.verdict == "ok" for row in check_model(make_model(attn=attn), CSP).rows)


def test_only_a_stage_that_drops_rows_leaves_padding_on_the_left(model, monkeypatch):
    """Where all are back padding stands where the prompt had it: kernels on a GPU are told so, once for each mask."""
    told = []

    def recorded(*args, left, **kwargs):
        told.append(left)
        return pruned_mask(*args, left=left, **kwargs)

    monkeypatch.setattr(layer_inputs_of, "pruned_mask", recorded)
    with torch.no_grad(), vlmprune.prune(model, CSP):
        model(**make_batch([[4, "I", 7], [2, "I", 3]], pad="right"))
    assert told == [True, False, True]


def test_the_check_can_fail(model, monkeypatch):
    """A token that does not come back is found, and one that comes back as anything else than it left."""
    batch = make_batch(PADDED)
    recorded = Recorded(CSP)
    with vlmprune.prune(model, recorded):
        tokens, logits, _ = generate(model, batch, STEPS)
    want = masked_logits(model, batch, tokens, recorded.answers)
    torch.testing.assert_close(logits, want, atol=1e-4, rtol=0)
    entered, answer = recorded.answers[2]
    fewer = {**recorded.answers, 2: (entered[:, :-1], answer[:, :-1])}  # a token that does not come back
    dropped = {0: recorded.answers[0], 4: recorded.answers[4]}  # only those that the last stage keeps do
    for other in (fewer, dropped):
        assert (masked_logits(model, batch, tokens, other) - want).abs().max() > 1e-2
    usual = Prefill.entering

    def changed(self, i, hidden, rope):
        self.aside = None if self.aside is None else self.aside * 1.5
        return usual(self, i, hidden, rope)

    monkeypatch.setattr(Prefill, "entering", changed)
    with vlmprune.prune(model, CSP):
        assert (generate(model, batch, STEPS)[1] - logits)[:2].abs().max() > 1e-2


def test_nothing_set_aside_changes_nothing(model):
    batch = make_batch(PADDED)
    usual = generate(model, batch, STEPS)[1]
    with vlmprune.prune(model, LVLMCSP(cluster=1.0, then=1.0, scatter=2, prune=4)) as run:
        assert torch.equal(generate(model, batch, STEPS)[1], usual)
    assert [stage.tokens_kept for stage in run.stages] == [32] * 3


def test_what_the_report_says(model):
    """Counts that grow; FLOPs of the rows that each layer saw; a cache that holds a subset, all, and the rest."""
    batch = make_batch([[4, "I", 7]])
    batch.pop("attention_mask")
    with torch.no_grad(), vlmprune.prune(model, CSP) as run:
        out = model(**batch, use_cache=True)
        report = run.report()
    assert report.stages == ((0, 16, 5), (2, 16, 16), (4, 16, 6))
    assert stage_counts(CSP, 16) == [(0, 5), (2, 16), (4, 6)]
    visual = [5, 5, 16, 16, 6, 6]
    assert layer_inputs(6, 16, stage_counts(CSP, 16)) == visual
    assert report.tokens.mean_per_layer == sum(visual) / 6 == 9 and report.tokens.after_last_stage == 6
    assert report.flops.pruned == decoder_flops(decoder_shape(model.config), [n + 12 for n in visual])
    held = [layer.keys.shape[2] for layer in out.past_key_values.layers]
    assert held == [n + 12 for n in visual]
    assert [layer.get_seq_length() for layer in out.past_key_values.layers] == [28] * 6
    assert out.logits.shape[1] == 28
    assert run.kept_at(0).tolist() == [0, 3, 6, 9, 12] and run.kept_at(1).tolist() == list(range(16))


def test_a_budget_is_met_though_counts_grow():
    share = keep_for_mean_tokens(LVLMCSP(), 192, layers=32, visual=576)
    lengths = layer_inputs(32, 576, stage_counts(LVLMCSP().at(share), 576))
    assert 191 < sum(lengths) / 32 <= 192 and max(lengths[8:12]) == 576
    with pytest.raises(InputError, match="mean: expected tokens between"):
        keep_for_mean_tokens(LVLMCSP(), 64, layers=32, visual=576)


def test_rows_set_aside_are_let_go(model):
    """Behind the last stage that could bring them back nothing holds them."""
    seen = []
    with torch.no_grad(), vlmprune.prune(model, CSP):
        layers = model.model.language_model.layers
        handles = [
            layer.register_forward_pre_hook(
                lambda m, a, k: seen.append(k["vlmprune"].aside is None), with_kwargs=True
            )
            for layer in layers
        ]
        model(**make_batch(PADDED))
        [handle.remove() for handle in handles]
    assert seen == [False, False, True, True, True, True]


@upstream("loses the images of a chunked prefill")
@pytest.mark.parametrize("size", [5, 23])
def test_prefill_in_chunks(model, size):
    """Each chunk's tokens come back in that chunk: as the masked run of all chunks' choices has it."""
    policy, batch = (
        Stages([Random(0, keep=0.5), Back(2), FastV(layer=4, keep=0.5)]),
        make_batch([[8, "I", 7, "I"]]),
    )
    with vlmprune.prune(model, policy) as run:
        tokens, logits, _ = generate(model, batch, STEPS, prefill_chunk_size=size)
    at = torch.nonzero(batch["input_ids"][0] == IMAGE)[:, 0]
    kept = {i: run.kept_at(n).tolist() for n, i in enumerate((0, 2, 4))}
    assert kept[2] == list(range(32)) and len(kept[0]) < 32
    answers = {i: (at[None], torch.tensor([rows])) for i, rows in kept.items()}
    torch.testing.assert_close(logits, masked_logits(model, batch, tokens, answers), atol=1e-4, rtol=0)


def test_gradients_flow_through_what_was_set_aside(model):
    """A token that is only there in the middle layers is learned from, too: the slope is what small steps give."""
    batch = make_batch([[4, "I", 7]])
    moved = {}

    def embedded(module, args, kwargs):
        moved["x"] = (kwargs["inputs_embeds"].detach() + moved["step"]).requires_grad_()
        return args, {**kwargs, "inputs_embeds": moved["x"]}

    def loss(step):
        moved["step"] = step
        return model(**batch, use_cache=False).logits[0, -1].log_softmax(-1)[5]

    handle = model.model.language_model.register_forward_pre_hook(embedded, with_kwargs=True)
    with vlmprune.prune(model, Stages([Random(0, keep=0.3), Back(2), Random(4, keep=0.4)])) as run:
        loss(0.0).backward()
        visual = torch.nonzero(batch["input_ids"][0] == IMAGE)[:, 0]
        aside = visual[[i for i in range(16) if i not in run.kept_at(0).tolist()]]
        direction = torch.zeros_like(moved["x"])
        direction[0, aside] = torch.randn(len(aside), 64, generator=torch.Generator().manual_seed(0))
        slope = (moved["x"].grad * direction).sum()
        with torch.no_grad():
            steps = (loss(3e-3 * direction) - loss(-3e-3 * direction)) / 6e-3
    handle.remove()
    assert abs(slope) > 0.1
    torch.testing.assert_close(slope, steps, rtol=0.01, atol=0)


def test_no_graph_and_why(model):
    with torch.no_grad(), vlmprune.prune(model, CSP, Graphs(recorder=Recorder())) as run:
        model(**make_batch(PADDED), use_cache=True)
    assert run.report().graph == "plain: a stage brings tokens back"


def test_the_layer_before_knows_nothing_of_them():
    with pytest.raises(
        InputError, match="attention: expected 'own' or None where tokens are restored, got 'previous'"
    ):
        Needs(attention="previous", restored=True)
    with pytest.raises(InputError, match="attention"):
        (Back(2) | FastV(layer=2)).needs(2)
