"""Every op has a benchmark, every provider that runs here passes the gate, and the gate refuses a wrong one."""

import pytest
import torch
from micro import foreign, gate
from micro.cases import CASES
from micro.inputs import Inputs
from micro.providers import matrix_fits
from micro.shapes import SHAPES, TINY, Setting
from torch._dynamo.utils import counters

from helpers.micro_cases import make_inputs
from vlmprune import ops
from vlmprune.ops._dispatch import TABLES

BY_NAME = {case.name: case for case in CASES}
SCORED = [case for case in CASES if case.scored]


# the sets are interpreted in tests/ops; of them only what a stage needs is worth the seconds here
INTERPRETED = [case for case in CASES if not case.all_pairs]
RUNNABLE = [
    pytest.param(case, provider, id=f"{case.name}, {provider.name}")
    for case in CASES
    for provider in case.providers()
    if provider.name
    not in ("torch.compile", "triton", "cuda", "plan")  # seconds each; below; GPU only; below
]


def test_every_op_has_a_case():
    planned = {"prune_plan"}  # a provider of prune_tokens
    assert {case.op for case in CASES} | planned == set(TABLES)
    assert len(BY_NAME) == len(CASES)


@pytest.mark.parametrize("case, provider", RUNNABLE)
def test_providers_pass_the_gate(case, provider):
    x = make_inputs()
    reason = provider.why_not(x)
    if reason is not None:
        pytest.skip(reason)
    case.gate(x, provider.run)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", SCORED, ids=lambda case: case.name)
def test_reduced_precision_passes_the_gate(case, dtype):
    x = make_inputs(dtype)
    case.gate(x, case.run)
    if case.torch is not None:
        case.gate(x, case.torch)


@pytest.mark.parametrize("case", INTERPRETED, ids=lambda case: case.name)
def test_kernels_pass_the_gate(case):
    """In the interpreter: the figures of a GPU day then start from inputs that the kernels are known to like."""
    x = make_inputs(rows=2)
    with ops.use_backend("triton"):
        case.gate(x, case.run)


@pytest.mark.parametrize("name", ["prune_tokens", "prune_tokens no LSE", "prune_scored"])
def test_the_plans_pass_the_gate(name):
    (plan,) = BY_NAME[name].ours
    with ops.use_backend("triton"):
        BY_NAME[name].gate(make_inputs(rows=2), plan.run)


def test_the_published_loop_passes_the_gate_whatever_the_dtype():
    case = BY_NAME["greedy_select maxmin"]
    case.gate(make_inputs(torch.bfloat16), foreign.maxmin_loop)


WRONG = {
    "received_attention": lambda x: foreign.scores(x) * 1.1,
    "row_lse": lambda x: foreign.row_lse(x) * float("nan"),
    "select_topk": lambda x: x.scores.topk(x.shape.keep, largest=False).indices.sort().values,
    "select_segments": lambda x: foreign.select_segments(x).sort().values - 1,
    "gather_tokens": lambda x: foreign.gather(x.tensors, x.index.flip(1)),
    "compact_kv": lambda x: x.caches,
    "prune_tokens": lambda x: foreign._keep_and_gather(x, -foreign.scores(x)),
    "prune_scored": lambda x: foreign._keep_and_gather(x, -x.scores),
    "greedy_select maxmin": lambda x: torch.arange(x.chosen)[None],
    "merge_tokens": lambda x: foreign.merge(x).flip(1),
    "cluster_dpc": lambda x: torch.zeros(1, x.shape.visual, dtype=torch.int64),
    "match_bipartite": lambda x: (torch.arange(x.shape.visual)[None] // 2, x.index),
}


@pytest.mark.parametrize("name", WRONG)
def test_the_gate_refuses_a_wrong_result(name):
    with pytest.raises(gate.WrongResultError, match=r"expected .*, got "):
        BY_NAME[name].gate(make_inputs(), WRONG[name])


def test_select_out_of_order_is_refused():
    x = make_inputs()
    with pytest.raises(gate.WrongResultError, match="ascending"):
        BY_NAME["select_topk"].gate(x, lambda x: x.scores.topk(x.shape.keep).indices)


def test_bytes_of_the_first_shape():
    """By hand: LLaVA-1.5 at one row in bf16, 640 -> 128."""
    x = Inputs(Setting(SHAPES[0], torch.bfloat16, 1, torch.device("meta")))
    score = 576 * 4096 * 2 + (4096 * 2 + 8) + 32 * 4 + 576 * 12
    assert BY_NAME["received_attention"].traffic(x) == score
    assert BY_NAME["received_attention"].work(x) == 2 * 32 * 128 * 576
    assert BY_NAME["select_topk"].traffic(x) == 576 * 4 + 65 * 8
    x.tensors = [torch.empty(1, 640, 4096, dtype=torch.bfloat16, device="meta")]
    assert BY_NAME["gather_tokens"].traffic(x) == 2 * 128 * 4096 * 2 + 128 * 8


def test_kept_tokens_of_the_shapes():
    assert [(s.length, s.kept) for s in SHAPES] == [
        (640, 128),
        (2944, 384),
        (4160, 1088),
        (16448, 2112),
        (32832, 4160),
    ]


def test_inputs_do_not_depend_on_the_order_of_use():
    a, b = make_inputs(), make_inputs()
    key, features = a.key, a.features
    assert torch.equal(features, b.features) and torch.equal(key, b.key)
    assert not torch.equal(a.key, a.query[:, :2])


def test_a_huge_attention_matrix_is_not_tried():
    x = Inputs(Setting(SHAPES[-1], torch.float32, 1, torch.device("cpu")))
    assert matrix_fits(x).startswith("the attention matrices take 450 GiB")


def test_the_compiled_version_is_one_graph():
    """What draws inputs is no part of it: it would break the graph, and most would run uncompiled."""
    (provider,) = (p for p in BY_NAME["prune_tokens"].providers() if p.name == "torch.compile")
    counters.clear()
    provider.run(Inputs(Setting(TINY, torch.float32, 1, torch.device("cpu"))))
    torch.compiler.reset()
    assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"]
