"""What stands around two waves: later stages, hooks, gradients, devices, failures; and what is refused."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import pytest
import torch

import vlmprune
from helpers import pretended
from helpers.recorder import Recorder
from helpers.tiny import (
    STEPS,
    TOLERANCE,
    generate,
    make_batch,
    make_model,
    upstream,
)
from helpers.waves import (
    BOTH,
    PADDED,
    SCOUT,
    sets_of,
)
from vlmprune import Scout
from vlmprune.errors import InputError, ModelError
from vlmprune.models.layout import moved
from vlmprune.policies import Needs
from vlmprune.testing import check_model


@pytest.fixture(scope="module")
def plain():
    return make_model()


def test_a_later_stage_and_a_compact_cache(plain):
    """What follows the second wave is a sequence like others."""
    policy = vlmprune.Stages([SCOUT, vlmprune.FastV(layer=4, keep=0.5)], earlier_kv="compact")
    for row in check_model(plain, policy).rows + check_model(plain, SCOUT).rows:
        assert row.verdict == "ok", row


def test_gradients_flow_through_both_waves(plain):
    """The slope along fine tokens' embeddings is what small steps give."""
    batch, moved = make_batch([[4, "I", 7]]), {}

    def embedded(module, args, kwargs):
        moved["x"] = (kwargs["inputs_embeds"].detach() + moved["step"]).requires_grad_()
        return args, {**kwargs, "inputs_embeds": moved["x"]}

    def loss(step):
        moved["step"] = step
        return plain(**batch, use_cache=False).logits[0, -1].log_softmax(-1)[5]

    handle = plain.model.language_model.register_forward_pre_hook(embedded, with_kwargs=True)
    try:
        with vlmprune.prune(plain, SCOUT) as run:
            loss(0.0).backward()
            sets = sets_of(run)
            direction = torch.zeros_like(moved["x"])
            some = [*sets[0][0], *sets[0][1]]
            direction[0, some] = torch.randn(len(some), 64, generator=torch.Generator().manual_seed(0))
            slope = (moved["x"].grad * direction).sum()
            with torch.no_grad():
                steps = (loss(3e-3 * direction) - loss(-3e-3 * direction)) / 6e-3
            assert sets_of(run) == sets
    finally:
        handle.remove()
    assert abs(slope) > 0.1
    torch.testing.assert_close(slope, steps, rtol=0.03, atol=0)  # rounding and curvature: 0.01


REFUSED = {
    "between": (
        lambda: vlmprune.Stages([SCOUT, vlmprune.Random(layer=2)]),
        r"layers: expected \(0, 3\) first, where a second wave runs, got \(0, 2, 3\)",
    ),
    "too-deep": (lambda: Scout(look=6), "look: expected at most 5"),
}


@pytest.mark.parametrize("policy, message", REFUSED.values(), ids=REFUSED)
def test_refused(plain, policy, message):
    with pytest.raises(InputError, match=message), vlmprune.prune(plain, policy()):
        pass


def test_refused_where_it_runs(plain):
    batch = make_batch([[4, "I", 7]])
    with pytest.raises(InputError, match="coarse: expected a policy that only drops tokens"):
        generate_with(plain, Scout(coarse=vlmprune.VisionZip(dominant=3, contextual=2), look=3), batch)


@upstream("loses the images of a chunked prefill")
def test_refused_in_chunks(plain):
    batch = make_batch([[4, "I", 7]])
    with pytest.raises(ModelError, match="method that reads the prompt's text, got a prompt in chunks"):
        generate_with(plain, SCOUT, batch, prefill_chunk_size=8)


def generate_with(model, policy, batch, **settings):
    with vlmprune.prune(model, policy):
        return generate(model, batch, 1, **settings)


def test_hidden_states_of_both_waves(plain):
    """What the second wave's layers give stands behind what the first one's gave."""
    batch = make_batch([[4, "I", 7]])
    with torch.no_grad(), vlmprune.prune(plain, SCOUT):
        states = plain(**batch, output_hidden_states=True).hidden_states
    assert [x.shape[1] for x in states] == [16] * 4 + [10] * 3 + [19] * 3


def test_never_a_graph_and_why(plain):
    with torch.no_grad(), vlmprune.prune(plain, SCOUT, vlmprune.Graphs(recorder=Recorder())) as run:
        plain(**make_batch(PADDED), use_cache=True)
    assert run.report().graph == "plain: a stage brings tokens back"


def test_attached_until_detached(plain):
    """Also where a call fails under way: nothing of it is left on the model."""
    batch = make_batch([[4, "I", 7]])
    want = generate(plain, batch, 2)[1]
    run = vlmprune.attach(plain, SCOUT)
    failing = plain.model.language_model.layers[1].register_forward_pre_hook(fail_in_second_wave)
    try:
        with pytest.raises(ZeroDivisionError):
            generate(plain, batch, 2)
        failing.remove()
        got = generate(plain, batch, 2)[1]
        assert run.report().stages == ((0, 16, 4), (3, 16, 7))
    finally:
        failing.remove()
        vlmprune.detach(plain)
    assert not torch.equal(got, want) and torch.equal(generate(plain, batch, 2)[1], want)


def fail_in_second_wave(module, args):
    if args[0].shape[1] == 10:
        raise ZeroDivisionError


@pytest.mark.cpu("is accelerate's main device here")
def test_weights_that_come_and_go():
    """accelerate's hooks bring a layer's weights for the second wave as for the first."""
    accelerate = pytest.importorskip("accelerate")
    model, batch = make_model(), make_batch([[4, "I", 7], [2, "I", 3]])
    want = generate_pruned(model, batch)
    accelerate.cpu_offload(model, execution_device="cpu")
    assert any(p.is_meta for p in model.parameters())
    assert torch.equal(generate_pruned(model, batch), want)


def generate_pruned(model, batch):
    with vlmprune.prune(model, SCOUT):
        return generate(model, batch, STEPS)[1]


@dataclass(frozen=True)
class Forgetful(vlmprune.PruningPolicy):
    """Drops at layer 3 some of what has run since layer 0."""

    layers = (0, 3)

    def needs(self, layer):
        return Needs(restored=layer > 0, wave=layer > 0)

    def select(self, ctx):
        first, end = (0, 4) if ctx.layer == 0 else (2, 8)
        return torch.arange(first, end).expand(len(ctx.counts), -1)


def test_what_has_run_has_to_stay(plain):
    """One clear error at the first choice; the rows that are dropped would take the places of others."""
    with pytest.raises(
        InputError, match=r"sample 0: expected every token that has run to stay, got not \[0\]"
    ):
        with vlmprune.prune(plain, Forgetful()), torch.no_grad():
            plain(**make_batch([[4, "I", 7]]))


@pytest.mark.cpu("is the other device here")
@pytest.mark.parametrize("scout", BOTH.values(), ids=BOTH)
def test_layers_on_two_devices(scout):
    """The last layers lie elsewhere, the stage and its decision too: what layer 0 knows is brought there."""
    model, batch = make_model(), make_batch(PADDED)
    with torch.no_grad(), vlmprune.prune(model, scout):
        want = model(**batch).logits[:, -1]
    text, there = model.model.language_model, pretended.DEVICE
    elsewhere = [*text.layers[2:], text.norm, model.lm_head]
    with pretended.pretending(), torch.no_grad(), vlmprune.prune(model, scout) as run:
        for module in (*text.layers[:2], *elsewhere):
            device = there if module in elsewhere else pretended.CPU
            module.to(device).register_forward_pre_hook(partial(bring, device), with_kwargs=True)
        got = model(**batch).logits[:, -1]
        assert [stage.index.device for stage in run.stages] == [pretended.CPU, there]
        torch.testing.assert_close(got.cpu(), want, atol=TOLERANCE, rtol=0)


def bring(device, module, args, kwargs):
    """As a device map's hooks do, which run behind ours."""
    known = {name: x for name, x in kwargs.items() if isinstance(x, torch.Tensor | tuple)}
    return moved(args, device), {**kwargs, **moved(known, device)}
