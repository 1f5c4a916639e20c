"""``Needs(text=True)``: the rows of the text behind the last image that enter a stage, where prompts begin, the last norm."""

from __future__ import annotations

import pytest
import torch

import vlmprune
from helpers.tiny import Drawn, Onlooker, make_batch, make_model
from vlmprune.policies.base import Needs

SPECS = [["I", 9, "I", 4], [3, "I", 5], [12], [4, "I"]]
WORDS = [4, 5, 0, 0]

ASKED = Needs(text=True, hidden=True)


@pytest.fixture(scope="module")
def model():
    return make_model()


def rows_entering(model, layer, batch, policy):
    """What enters a decoder layer, before a stage there acts."""
    entering = []

    def note(module, args, kwargs):
        entering.append((args[0] if args else kwargs["hidden_states"]).clone())

    decoder = model.model.language_model.layers[layer]
    hook = decoder.register_forward_pre_hook(note, with_kwargs=True)
    try:
        with torch.no_grad(), vlmprune.prune(model, policy):
            model(**batch, use_cache=True)
    finally:
        hook.remove()
    return entering[0]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize(
    "layer, before", [(0, False), (2, False), (4, False), (4, True)], ids=["0", "2", "4", "4-after-a-stage"]
)
def test_text_rows(model, side, layer, before):
    batch = make_batch(SPECS, pad=side)
    seen = Onlooker(layer, ASKED)
    policy = vlmprune.Stages([Drawn((2,)), seen]) if before else seen
    entering = rows_entering(model, layer, batch, policy)
    ctx = seen.shown[layer]
    assert ctx.text_hidden.shape == (4, max(WORDS), 64) and ctx.text.shape == (4, max(WORDS))
    first = batch["attention_mask"].long().argmax(1)
    assert ctx.start[:, 0].tolist() == first.tolist()
    assert (side == "left") == bool(first.any())
    assert (ctx.text >= 0).sum(1).tolist() == WORDS
    for b, words in enumerate(WORDS):
        assert not ctx.text_hidden[b, words:].any()
        if side == "left" or before:  # then text ends the rows
            want = entering[b, entering.shape[1] - words :]
        else:
            want = entering[b, ctx.text[b, :words]]
        assert torch.equal(ctx.text_hidden[b, :words], want)
    states = torch.randn(2, 3, 64)
    assert torch.equal(ctx.norm(states), model.model.language_model.norm(states))


def test_only_who_asks_is_given_them(model):
    seen = Onlooker(asked=Needs(hidden=True))
    with torch.no_grad(), vlmprune.prune(model, seen):
        model(**make_batch([[3, "I", 5]]))
    ctx = seen.shown[2]
    assert ctx.text_hidden is None and ctx.norm is None and ctx.start is None and ctx.text is None


def test_joined_with_other_needs():
    both = Needs(text=True) | Needs(attention="previous")
    assert both.text and both.reads_text and both.attention == "previous"
    assert not (Needs() | Needs(hidden=True)).reads_text
    assert all(need.reads_text for need in (Needs(embeds=True), Needs(rows="text"), Needs(text=True)))
