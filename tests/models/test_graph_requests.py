"""A thousand requests of random shapes and policies, as graphs and as ever: the same answers, and memory stays as it was."""

import ctypes
import gc
import random
import resource
from pathlib import Path

import pytest
import torch

import vlmprune
from helpers.recorder import Recorder
from helpers.tiny import generate, make_batch, make_model
from vlmprune import Graphs

REQUESTS, STEPS = 1000, 2
POLICIES = [
    None,
    vlmprune.FastV(layer=2, keep=0.4),
    vlmprune.FastV(layer=3, keep=5, earlier_kv="compact"),
    vlmprune.PyramidDrop(layers=(1, 3, 5), positions="pack"),
    vlmprune.FasterVLM(keep=6, positions="pack"),
    vlmprune.DivPrune(keep=6, positions="pack"),
    vlmprune.Feather(layers=(2, 4), keep=0.5),
]
SETTINGS = [{}, {}, {}, {"cache_implementation": "static"}, {"num_beams": 2}]


def request(rng: random.Random):
    """A batch of up to three prompts of up to two images, a policy, and a way of generating."""
    specs = []
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        images = rng.choice([0, 1, 1, 1, 2])
        specs.append([rng.randint(1, 6), *["I"] * images, rng.randint(1, 40)])
    return make_batch(specs, seed=rng.randrange(1 << 30)), rng.choice(POLICIES), rng.choice(SETTINGS)


def answer(model, batch, policy, graphs, settings):
    scope = vlmprune.meter(model, graphs) if policy is None else vlmprune.prune(model, policy, graphs)
    with scope as run:
        return generate(model, batch, STEPS, **settings)[:2], run.report().graph.split(":")[0]


def resident():
    """Bytes of memory that this process has, without what its allocator holds free: how much depends on earlier tests."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


@pytest.mark.slow
@pytest.mark.cpu("counts the memory of the host")
def test_a_thousand_requests():
    model, rng = make_model(), random.Random(0)
    graphs, held, said = Graphs(memory=48 << 20, recorder=(recorder := Recorder())), [], []
    for turn in range(1, REQUESTS + 1):
        batch, policy, settings = request(rng)
        (tokens, logits), how = answer(model, batch, policy, graphs, settings)
        (want_tokens, want_logits), _ = answer(model, batch, policy, None, settings)
        assert torch.equal(tokens, want_tokens), (turn, policy, settings)
        torch.testing.assert_close(logits, want_logits, atol=1e-4, rtol=0)
        assert graphs.nbytes <= graphs.memory
        said.append(how)
        if turn in (REQUESTS // 2, REQUESTS):
            graphs.clear()
            held.append(resident())
    assert held[1] <= 1.01 * held[0], held
    assert said.count("replayed") > REQUESTS // 3 and recorder.captures > 50
