"""A pruned prefill of fixed counts is one list of operations, whatever the prompt says: what a CUDA graph captures of it.

Without a GPU a recorder stands in the place of the graph: it notes the operations of one prefill, and repeats them, and
nothing of the Python between them, on other words and pictures in the same tensors. Ops run their references here; that a
plan does nothing but launch is for tests/compile/test_plan_host.py to say.
"""

import pytest
import torch

import vlmprune
from helpers.recorder import Operations
from helpers.tiny import IMAGE, make_batch, make_model

STATIC = [
    vlmprune.FastV(layer=2, keep=0.4),
    vlmprune.FastV(layer=2, keep=5, rows="mean", earlier_kv="compact"),
    vlmprune.FastV(layer=2, keep=5, spend="image"),
    vlmprune.PyramidDrop(layers=(1, 2, 4), positions="pack"),
    vlmprune.FasterVLM(keep=6, positions="pack"),
    vlmprune.Uniform(layer=2, keep=0.3),
    vlmprune.VScan(keep=9, then=4, layer=3, shallow_layer=0, window=2, positions="pack"),
    vlmprune.DivPrune(keep=4, positions="pack"),
]
SPECS = {"one": [[4, "I", 7]], "two-images": [[4, "I", 3, "I", 7]], "equal": [["I", 5], ["I", 5]]}


def prompts(specs):
    """Two of them, alike but for words and pictures; no mask, which transformers would ask whether it hides anything."""
    first, second = (make_batch(SPECS[specs], seed=seed) for seed in (0, 1))
    words = second["input_ids"] != IMAGE
    second["input_ids"] = torch.where(words, (second["input_ids"] + 1) % (IMAGE - 1), IMAGE)
    for batch in (first, second):
        del batch["attention_mask"]
    assert not torch.equal(first["input_ids"], second["input_ids"])
    assert not torch.equal(first["pixel_values"], second["pixel_values"])
    return first, second


def seen(out):
    """Everything that a prefill leaves: logits, and the keys and values of every layer."""
    layers = out.past_key_values.layers
    return [out.logits, *(x for layer in layers for x in (layer.keys, layer.values))]


def captured_and_replayed(model, policy, first, second):
    """What a prefill of ``first`` leaves when its operations are repeated on ``second``, and what one of ``second`` does."""
    batch = {name: x.clone() for name, x in first.items()}
    with vlmprune.prune(model, policy):
        want = seen(model(**second))
        for _ in range(2):
            model(**batch)  # a capture comes behind runs to warm up
        with Operations() as operations:
            out = seen(model(**batch))
    assert not torch.equal(out[0], want[0])
    for name, x in second.items():
        batch[name].copy_(x)
    operations.replay()
    return out, want


@torch.no_grad()
@pytest.mark.parametrize("specs", SPECS)
@pytest.mark.parametrize("policy", STATIC, ids=repr)
def test_a_captured_prefill_answers_other_prompts(policy, specs):
    out, want = captured_and_replayed(make_model(), policy, *prompts(specs))
    assert all(map(torch.equal, out, want))


@torch.no_grad()
def test_a_choice_by_the_host_is_no_graph():
    """The recorder can tell: numbers that Python has read stay those of the first prompt."""

    class ReadsBack(vlmprune.FastV):
        def select(self, ctx):
            return torch.tensor(super().select(ctx).tolist())

    out, want = captured_and_replayed(make_model(), ReadsBack(layer=2, keep=5), *prompts("one"))
    assert not all(map(torch.equal, out, want))
