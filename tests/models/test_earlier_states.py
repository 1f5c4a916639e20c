"""``Needs(earlier=True)``: with what hidden states the tokens that enter a stage entered the layer before."""

from __future__ import annotations

import pytest
import torch

import vlmprune
from helpers.tiny import Drawn, Onlooker, make_batch, make_model
from vlmprune.policies.base import Needs

SPECS = [["I", 9, "I", 4], [3, "I", 5], [12], [4, "I"]]

ASKED = Needs(earlier=True, hidden=True)


@pytest.fixture(scope="module")
def model():
    return make_model()


def run(model, batch, policy):
    with vlmprune.prune(model, policy):
        out = model(**batch, use_cache=True, output_hidden_states=True)
    return out


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("layer, before", [(1, None), (2, None), (4, 2), (4, 3)])
def test_rows_that_entered_the_layer_before(model, side, layer, before):
    """Also where a stage acts there, or further ahead: ``before``."""
    batch = make_batch(SPECS, pad=side)
    seen = Onlooker(layer, ASKED)
    policy = seen if before is None else vlmprune.Stages([Drawn((before,)), seen])
    entered = []
    hook = model.model.language_model.layers[layer - 1].self_attn.register_forward_pre_hook(
        lambda module, args, kwargs: entered.append(kwargs["hidden_states"].clone()), with_kwargs=True
    )
    norm = model.model.language_model.layers[layer - 1].input_layernorm
    try:
        with torch.no_grad():
            run(model, batch, policy)
    finally:
        hook.remove()
    ctx, rows = seen.shown[layer], entered[0]
    for b, n in enumerate(ctx.counts):
        assert not ctx.earlier[b, n:].any()
        # where the short sequence has them: its padding is on the left, but where nothing was dropped yet
        at = ctx.positions[b, :n] if before is None else _places(rows, norm, ctx, b)
        torch.testing.assert_close(norm(ctx.earlier[b, :n]), rows[b, at], atol=1e-6, rtol=1e-6)
        assert n == 0 or not torch.equal(ctx.earlier[b, :n], ctx.hidden[b, :n])


def _places(rows, norm, ctx, b):
    """Of the rows that enter the layer before, each token's nearest one: no two have the same, in the tokens' order."""
    found = torch.cdist(norm(ctx.earlier[b, : ctx.counts[b]]), rows[b]).argmin(1)
    assert found.tolist() == sorted(set(found.tolist()))
    return found


def test_the_distance_is_that_of_the_models_own_hidden_states(model):
    batch, seen = make_batch([[4, "I", 7]]), Onlooker(3, ASKED)
    with torch.no_grad():
        run(model, batch, seen)
        plain = model(**batch, output_hidden_states=True).hidden_states
    ctx = seen.shown[3]
    for got, layer in ((ctx.earlier, 2), (ctx.hidden, 3)):
        torch.testing.assert_close(got[0], plain[layer][0, ctx.positions[0]], atol=1e-6, rtol=1e-6)


def test_only_who_asks_is_given_them(model):
    seen = Onlooker(asked=Needs(hidden=True))
    with torch.no_grad():
        run(model, make_batch([[3, "I", 5]]), seen)
    assert seen.shown[2].earlier is None


def test_where_there_are_none(model):
    with pytest.raises(ValueError, match=r"^earlier: expected False where tokens are restored, got True$"):
        Needs(restored=True, earlier=True)
    said = r"^layer: expected at least 1 where rows that entered the layer before are read, got 0$"
    with pytest.raises(ValueError, match=said), vlmprune.prune(model, Onlooker(0, ASKED)):
        pass


def test_joined_with_other_needs():
    assert (Needs(earlier=True) | Needs(hidden=True)) == Needs(earlier=True, hidden=True)
    assert not (Needs() | Needs(hidden=True)).earlier
