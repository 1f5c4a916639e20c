"""Two waves equal one masked run: batches, padding, several images, turns, caches, beams, families."""

from __future__ import annotations

import pytest
import torch

import vlmprune
from helpers.tiny import IMAGE, STEPS, TOLERANCE, generate, make_batch, make_model
from helpers.waves import sets_of, waves_oracle
from vlmprune import DivPrune, Random, Scout, Uniform

COARSE = Uniform(layer=0, keep=4)
SCOUT = Scout(coarse=COARSE, fine=3, look=3)
POLICIES = {
    "lattice": SCOUT,
    "first-layer": Scout(coarse=Random(layer=0, keep=0.3), fine=0.3, look=1, by="random"),
    "last-layer": Scout(coarse=DivPrune(keep=5), fine=2, look=5, spread=0.5),
    "union": Scout(coarse=DivPrune(keep=3, positions="keep") | Uniform(layer=0, keep=3), fine=4, look=2, rope=False),
    "all-come-back": Scout(coarse=Random(layer=0, keep=0.2), fine=1.0, look=3),
}
BATCHES = {
    "one": [[4, "I", 7]],
    "two-images": [[2, "I", 3, "I", 5]],
    "image-last": [[3, "I"]],
    "image-first": [["I", 6]],
    "padded-2": [[4, "I", 7], [2, "I", 3]],
    "padded-2-1-0-images": [["I", 9, "I", 4], [3, "I", 5], [12]],
    "long-front-long-back": [[30, "I", 1], ["I", 30]],
    "text-longest": [[50], [2, "I", 3]],
}


@pytest.fixture(scope="module", params=["sdpa", "eager", "vlmprune"])
def model(request):
    return make_model(attn=request.param)


def assert_equals(model, policy, batch, **kwargs):
    with vlmprune.prune(model, policy) as run:
        tokens, logits, _ = generate(model, batch, STEPS, **kwargs)
    want_tokens, want = waves_oracle(model, batch, policy.look, sets_of(run), STEPS, (IMAGE,))
    torch.testing.assert_close(logits, want, atol=TOLERANCE, rtol=0)
    assert torch.equal(tokens, want_tokens)
    return run


@pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES)
@pytest.mark.parametrize("specs", BATCHES.values(), ids=BATCHES)
def test_equals_the_masked_run(model, specs, policy):
    assert_equals(model, policy, make_batch(specs))
