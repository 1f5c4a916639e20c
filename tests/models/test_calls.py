"""Calls that are not one prompt a row, padded on the left: packed samples, padding on the right."""

from __future__ import annotations

import pytest
import torch

import vlmprune
from helpers.tiny import generate, make_batch, make_model, oracle
from vlmprune.errors import ModelError
from vlmprune.models.host.views import Encoded
from vlmprune.models.visuals import Notes

FASTV = vlmprune.FastV(layer=2, keep=0.5)
PACKED = "^position_ids: expected one sample a row in a pruning scope, got packed samples"


@pytest.fixture(scope="module")
def model():
    return make_model()


def packed(first, second):
    """Two prompts one behind the other in a row."""
    ids = torch.cat([first["input_ids"], second["input_ids"]], 1)
    positions = torch.cat([torch.arange(b["input_ids"].shape[1]) for b in (first, second)])[None]
    pixels = torch.cat([first["pixel_values"], second["pixel_values"]])
    return {"input_ids": ids, "pixel_values": pixels, "position_ids": positions, "use_cache": False}


@pytest.mark.parametrize(
    "policy",
    [FASTV, vlmprune.Random(layer=0, keep=0.5), vlmprune.FasterVLM(keep=8, positions="pack")],
    ids=repr,
)
def test_packed_samples_are_refused(model, policy):
    call = packed(make_batch([[4, "I", 7]], seed=1), make_batch([[2, "I", 9]], seed=2))
    with torch.no_grad(), vlmprune.prune(model, policy):
        with pytest.raises(ModelError, match=PACKED):
            model(**call)
        bounds = {name: torch.tensor([0, 28, 56]) for name in ("cu_seq_lens_q", "cu_seq_lens_k")}
        with pytest.raises(ModelError, match=PACKED):
            model(**{**call, "position_ids": None}, **bounds)


def test_positions_of_one_sample_are_no_packing(model):
    batch = make_batch([[4, "I", 7]])
    batch.pop("attention_mask")
    length = batch["input_ids"].shape[1]
    with torch.no_grad(), vlmprune.prune(model, FASTV) as run:
        plain = model(**batch, use_cache=False).logits
        given = model(**batch, position_ids=torch.arange(length)[None], use_cache=False).logits
    assert torch.equal(plain, given)
    assert run.stages[0].tokens_kept == 8


def test_generating_from_a_padding_row_is_refused(model):
    """transformers goes on from the last row, which pruning leaves empty where it is padding."""
    batch = make_batch([[4, "I", 7], [2, "I", 3]], pad="right")
    plain = generate(model, batch, 3)[1]
    with vlmprune.prune(model, vlmprune.FastV(layer=2, keep=1.0)):
        assert torch.equal(generate(model, batch, 3)[1], plain)
    with vlmprune.prune(model, FASTV):
        with pytest.raises(ModelError, match=r"^attention_mask: expected padding on the left"):
            generate(model, batch, 3)
        with torch.no_grad():  # no generation: every row's logits are asked for
            assert model(**batch).logits.isfinite().all()


def test_a_note_is_found_by_the_rows_it_belongs_to():
    """Also in an output made anew around the same rows; not in another one with equal rows; forgotten with the rows."""
    from transformers.modeling_outputs import BaseModelOutputWithPooling as Output

    notes, note = Notes(), Encoded((4,))
    rows = torch.randn(2, 5, 3)
    notes.add(Output(last_hidden_state=rows), note)
    assert notes.of(Output(last_hidden_state=rows, pooler_output=rows)) is note
    assert notes.of(Output(last_hidden_state=rows.clone())) is None
    assert notes.of(Output(pooler_output=rows)) is None
    held = notes._by_states
    assert len(held) == 1
    del rows
    assert len(held) == 0


def test_a_prompt_that_ends_with_its_image_answers_from_it(model):
    """Merging methods too: the last row is the newest token's own."""
    batch = make_batch([[3, "I"]])
    for policy in (
        vlmprune.VisionZip(dominant=5, contextual=2, positions="pack"),
        vlmprune.SparseVLM(layers=(2, 4), keep=(9, 4), positions="pack"),
    ):
        with vlmprune.prune(model, policy):
            logits = generate(model, batch, 1)[1]
        assert logits.abs().max() > 0
    with vlmprune.prune(model, vlmprune.FasterVLM(keep=6, positions="pack")) as run:
        got = generate(model, batch, 1)[1]
    visual = batch["input_ids"] == 199
    kept = torch.zeros_like(visual).scatter_(1, run.stages[0].index, True)
    assert kept[0, -1]
    if run.policy.positions == "keep":
        want = oracle(model, batch, {0: visual & ~kept}, 1)[1]
        torch.testing.assert_close(got, want, atol=1e-4, rtol=0)
