"""Calls out of the ordinary: a replay answers them as a plain run does, or the report says why there was none."""

from dataclasses import dataclass, field

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import vlmprune
from helpers.recorder import Recorder
from helpers.tiny import make_batch, make_model
from vlmprune import FastV, Graphs

POLICY = FastV(layer=2, keep=4)
PADDED = [[4, "I", 7], ["I", 3]]
TOLERANCE = {"atol": 1e-4, "rtol": 0}


def scope(model, policy, graphs):
    return vlmprune.meter(model, graphs) if policy is None else vlmprune.prune(model, policy, graphs)


@torch.no_grad()
def answer(model, batch, graphs=None, policy=POLICY, **settings):
    """The output, what was kept of every sample, and what the report says."""
    with scope(model, policy, graphs) as run:
        out = model(**batch, **settings)
        kept = [run.kept(b) for b in range(len(out.logits))] if run.stages else []
        return out, kept, run.report().graph


def assert_same(model, batch, graphs, policy=POLICY, **settings):
    """As a plain run; returns what the report says."""
    got, kept, said = answer(model, batch, graphs, policy, **settings)
    want, kept_plainly, _ = answer(model, batch, None, policy, **settings)
    real = batch["attention_mask"].bool()
    torch.testing.assert_close(got.logits[real], want.logits[real], **TOLERANCE)
    assert all(map(torch.equal, kept, kept_plainly))
    return said


def assert_always_same(model, batches, policy=POLICY, said="replayed"):
    """As a plain run, all of them; the report says so from the second one on."""
    graphs = Graphs(recorder=Recorder())
    for turn, batch in enumerate(batches):
        how = assert_same(model, batch, graphs, policy)
        assert not turn or how.startswith(said), how


def with_holes(seed):
    """Two prompts whose masks have holes in the text; no position_ids, so the holes are counted."""
    batch = make_batch([[4, "I", 7]] * 2, seed=seed)
    batch["attention_mask"][0, 2] = batch["attention_mask"][1, 24] = 0
    return batch


@pytest.fixture(scope="module")
def model():
    return make_model()


@pytest.mark.parametrize("policy", [None, POLICY, vlmprune.VisPruner(keep=6, positions="pack")], ids=repr)
def test_positions_that_the_model_counts_itself(model, policy):
    assert_always_same(model, map(with_holes, range(3)), policy)


@pytest.mark.parametrize("policy", [None, POLICY, FastV(layer=2, keep=4, earlier_kv="compact")], ids=repr)
def test_a_turn_behind_padded_prompts_without_positions(model, policy):
    """Tokens to come are counted from the padded length on, so the prompt's own must be."""
    graphs, logits = Graphs(recorder=Recorder()), []
    batch, more = make_batch(PADDED), make_batch([[3], [3]], seed=1)
    for _ in range(2):
        answer(model, batch, graphs, policy)
    for some in (graphs, None):
        with torch.no_grad(), scope(model, policy, some):
            cache = model(**batch, use_cache=True).past_key_values
            mask = torch.cat([batch["attention_mask"], more["attention_mask"]], 1)
            logits.append(model(more["input_ids"], attention_mask=mask, past_key_values=cache).logits)
    torch.testing.assert_close(*logits, **TOLERANCE)


def test_tables_that_depend_on_the_longest_position():
    """28 tokens in a graph of 32 rows, where 30 make them long ones."""
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 29}
    rope |= {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
    model = make_model(rope_parameters=rope, max_position_embeddings=29)
    graphs = Graphs(recorder=Recorder())
    for seed in range(3):
        assert_same(model, make_batch([[4, "I", 7]], seed=seed), graphs)


# What a key tells apart, and what is refused


def test_a_number_of_tokens_is_no_share(model):
    """keep=1 and keep=1.0 compare equal."""
    graphs = Graphs(recorder=(recorder := Recorder()))
    for policy in (FastV(layer=2, keep=1), FastV(layer=2, keep=1.0)):
        for seed in range(3):
            said = assert_same(model, make_batch(PADDED, seed=seed), graphs, policy)
    assert said.startswith("replayed") and recorder.captures == 2


@dataclass(frozen=True)
class WithTable(FastV):
    table: dict = field(default_factory=dict)


def test_a_policy_that_nothing_tells_apart(model):
    policy, batch = WithTable(layer=2, keep=4, table={"a": 1}), make_batch(PADDED)
    said = [assert_same(model, batch, Graphs(recorder=Recorder()), policy) for _ in range(3)]
    assert said == ["plain: a policy's settings must tell it apart (unhashable type: 'dict')"] * 3


def labelled(seed):
    """The last token of the image predicts a label, so it stays."""
    batch = make_batch(PADDED, seed=seed)
    return batch | {"labels": batch["input_ids"].clone()}


def test_labels(model):
    assert_always_same(model, map(labelled, range(3)), said="plain: labels are given")


def test_a_mode_that_watches_operations(model):
    graphs, counts = Graphs(recorder=Recorder()), []
    for some in (None, graphs, graphs, graphs):
        with FlopCounterMode(display=False) as counter:
            said = answer(model, make_batch(PADDED), some)[2]
        counts.append(counter.get_total_flops())
    assert len(set(counts)) == 1 and said.startswith("plain: a dispatch mode watches the operations")
