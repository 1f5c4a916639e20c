"""One attached model in several threads: every call gets what it gets alone."""

from __future__ import annotations

import sys
import threading

import pytest
import torch

import vlmprune
from helpers.families import CASES as FAMILIES
from helpers.families import build, prompts
from helpers.table import CELLS, KINDS
from helpers.tiny import BEFORE_PREFILL, generate, make_batch, make_model

THREADS, ROUNDS = 4, 3
POLICIES = {
    "fastv": vlmprune.FastV(layer=2, keep=0.4),
    "sparsevlm": vlmprune.SparseVLM(layers=(2, 4), keep=(9, 4), positions="pack"),
    "fastervlm": vlmprune.FasterVLM(keep=5, positions="pack"),
    "visionzip": vlmprune.VisionZip(dominant=4, contextual=2, positions="pack"),
    "cdpruner": vlmprune.CDPruner(keep=5, positions="pack"),
}


def batches():
    """Prompts of other lengths and numbers of images in every thread."""
    return [
        make_batch([[3 + i, "I", 5 + 2 * i] + (["I", 2] if i % 2 else [])], seed=i) for i in range(THREADS)
    ]


def logits_of(model, batch, how):
    if how == "forward":
        with torch.no_grad():
            return model(**batch).logits[:, -1]
    settings = {"prefill_chunk_size": 7} if how == "chunks" else {}
    return generate(model, batch, 3, **settings)[1]


@pytest.fixture
def quick_switches():
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(interval)


CASES = [(name, how) for name in POLICIES for how in ("generate", "forward")]
CASES += [("fastv", "chunks")] if BEFORE_PREFILL else []


def answers_in_threads(answer, count):
    """What each thread got, round by round; it got fewer answers if it raised."""
    got = [[] for _ in range(count)]
    barrier = threading.Barrier(count)

    def work(i):
        barrier.wait()
        for _ in range(ROUNDS):
            got[i].append(answer(i))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(count)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    return got


def all_equal(got, alone) -> None:
    for mine, want in zip(got, alone, strict=True):
        assert len(mine) == ROUNDS
        for logits in mine:
            torch.testing.assert_close(logits, want, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name, how", CASES)
def test_threads_do_not_meet(name, how, quick_switches):
    model, calls = make_model(), batches()
    run = vlmprune.attach(model, POLICIES[name])
    alone = [logits_of(model, batch, how) for batch in calls]
    all_equal(answers_in_threads(lambda i: logits_of(model, calls[i], how), THREADS), alone)
    assert run.report().flops.cut > 0 and run.stages
    vlmprune.detach(model)


@pytest.mark.parametrize("family, kind", [cell for cell in CELLS if cell[1] in ("before-tower", "both")])
def test_threads_with_images_of_unequal_size(family, kind, quick_switches):
    case = FAMILIES[family]
    model, shapes = build(case), ("wide", "tall", "wide")
    calls = [prompts(case, ((2 + i, shape, 4 + i),), i)[0] for i, shape in enumerate(shapes)]
    settings = {"do_sample": False, "output_logits": True, "return_dict_in_generate": True}

    def answer(i):
        return torch.stack(model.generate(**calls[i], **settings, max_new_tokens=3).logits)

    with vlmprune.prune(model, KINDS[kind]):
        alone = [answer(i) for i in range(3)]
        all_equal(answers_in_threads(answer, 3), alone)
