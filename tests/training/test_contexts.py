"""What a scorer learns from is what a policy of the same needs is shown, and the model is as it was."""

import pytest
import torch

from helpers.tiny import IMAGE, make_batch, make_model
from vlmprune.errors import InputError
from vlmprune.policies import Needs
from vlmprune.training import context_of


@pytest.mark.parametrize("layer", [0, 3])
def test_the_states_that_enter_a_stage(layer):
    model, batch = make_model(), make_batch([["I", 9, "I", 4], [3, "I", 5], [12]])
    with torch.no_grad():
        before = model(**batch, output_hidden_states=True)
    ctx = context_of(model, batch, Needs(hidden=True, text=True), layer)
    assert (
        ctx.layer == layer
        and len(ctx.counts) == 3
        and ctx.counts[0] == 2 * ctx.counts[1]
        and not ctx.counts[2]
    )
    for b, n in enumerate(ctx.counts):
        places = (batch["input_ids"][b] == IMAGE).nonzero()[:, 0]
        assert len(places) == n
        torch.testing.assert_close(ctx.hidden[b, :n], before.hidden_states[layer][b, places])
        words = ctx.text[b][ctx.text[b] >= 0]
        torch.testing.assert_close(ctx.text_hidden[b, : len(words)], before.hidden_states[layer][b, words])
    assert not (ctx.hidden.requires_grad or ctx.hidden.is_inference())
    with torch.no_grad():
        assert torch.equal(model(**batch).logits, before.logits)


def test_a_prompt_without_images():
    with pytest.raises(InputError, match=r"^inputs: expected a prompt with visual tokens, got none$"):
        context_of(make_model(), make_batch([[12]]), Needs(hidden=True), 2)


@pytest.mark.parametrize(
    "needs, layer, message",
    [
        (Needs(hidden=True), -1, "layer: expected a whole number >= 0, got -1"),
        (Needs(hidden=True), 6, r"layer: expected at most 5 \(the decoder has 6 layers\), got 6"),
        (None, 2, r"needs: expected Needs\(...\), got None"),
        (
            Needs(attention="previous"),
            0,
            "layer: expected at least 1 where attention of the layer before is read, got 0",
        ),
    ],
)
def test_what_no_stage_can_show(needs, layer, message):
    with pytest.raises(InputError, match=f"^{message}$"):
        context_of(make_model(), make_batch([["I", 4]]), needs, layer)
