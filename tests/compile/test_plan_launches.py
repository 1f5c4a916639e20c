"""The launches of a bound plan are those of the op it repeats, as Triton's launcher hands them to CUDA."""

from functools import partial

import pytest
import torch
import triton

from helpers.recording_driver import recording_driver
from vlmprune import ops

if triton.knobs.runtime.interpret:
    pytest.skip("the interpreter has no launcher; run with TRITON_INTERPRET=0", allow_module_level=True)


def example(B=1, H=4, Hkv=4, S=160, N=96, D=64, R=1, caches=2, dtype=torch.bfloat16, seed=0, **extra):
    """A stage's arguments; those of ``extra`` that are functions make tensors, new ones for every example."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(shape, generator=generator).to(dtype)

    tensors = [draw(B, S, 64), torch.arange(S).expand(B, S).clone(), torch.ones(B, S, dtype=torch.bool)]
    call = {
        "query": draw(B, H, S, D),
        "key": draw(B, Hkv, S, D),
        "tensors": tensors + [draw(B, Hkv, S, D) for _ in range(caches)],
        "rows": torch.arange(S - R, S).expand(B, R).clone(),
        "columns": torch.arange(35, 35 + N).expand(B, N).clone(),
        "keep": min(N, 24),
    }
    return call | {name: make(B, H, S, D, N, R) if callable(make) else make for name, make in extra.items()}


def lse(B, H, S, D, N, R):
    return torch.zeros(B, H, S)


def mask(B, H, S, D, N, R):
    return torch.ones(B, S, dtype=torch.bool)


def rope(B, H, S, D, N, R):
    return torch.ones(1, S, D), torch.zeros(1, S, D)


def code(B, H, S, D, N, R):
    return (torch.arange(N) % 4).to(torch.int8).repeat(B, 1)


def packed(seed=0):
    """Two samples, end to end."""
    lists = {"rows": torch.tensor([[59], [99]]), "columns": torch.arange(10, 50).repeat(2, 1)}
    return example(seed=seed, **lists, cu_seqlens=torch.tensor([0, 60, 160]))


def scored(seed=0, **sizes):
    """What prune_scored takes of it."""
    call = example(seed=seed, **sizes)
    dropped = ("query", "key", "rows")
    return {"scores": torch.rand(call["columns"].shape)} | {
        name: x for name, x in call.items() if name not in dropped
    }


CASES = {
    "lse": {"lse": lse},
    "mask": {"B": 3, "key_mask": mask, "lse": lse},
    "padded on the left": {"B": 2, "key_mask": mask, "padding": "left", "newest": True},
    "rope": {"rope": rope},
    "codes, keep by sample": {"B": 2, "lse": lse, "code": code, "keep": lambda B, *_: torch.full((B,), 20)},
    "images": {"segments": lambda *_: torch.tensor([[40, 56]]), "keep": lambda *_: torch.tensor([[10, 20]])},
    "long, grouped heads": {"H": 28, "Hkv": 4, "S": 5000, "N": 4096, "lse": lse},
    "longer": {"H": 28, "Hkv": 4, "S": 5000, "N": 4500, "R": 40},
    "many weighted rows": {"R": 64, "row_weight": lambda B, H, S, D, N, R: torch.ones(B, R)},
    "best heads": {"R": 20, "pair_weight": lambda B, H, S, D, N, R: torch.rand(B, R, N), "top_heads": 2},
    "float32": {"dtype": torch.float32, "D": 128, "head_reduce": "max"},
    "many tensors": {"caches": 33, "lse": lse},
    "one column": {"N": 1, "S": 64, "lse": lse},
}
CALLS = {name: partial(example, **sizes) for name, sizes in CASES.items()} | {
    "packed": packed,
    "scores": scored,
    "scores, masked and long": partial(scored, B=2, S=5000, N=4500, key_mask=mask, code=code),
}


def op_and_plan(call):
    return (ops.prune_scored, ops.ScoredPlan) if "scores" in call else (ops.prune_tokens, ops.PrunePlan)


def tensors_of(values):
    """The tensors among values, and in lists of them."""
    for x in values:
        if isinstance(x, torch.Tensor):
            yield x
        elif isinstance(x, list | tuple):
            yield from tensors_of(x)


def starts(values):
    """Where the tensors among values lie."""
    return {x.data_ptr() for x in tensors_of(values)}


def pointers(launches):
    return {pointer for launch in launches for pointer in launch.pointers.values()}


def bind(plan, call):
    """A plan's binding takes what are tensors; the rest it has from its example."""
    return plan.bind(**{name: x for name, x in call.items() if starts([x])})


@pytest.mark.parametrize("case", CALLS)
def test_launches_of_a_plan_are_the_ordinary_ones(case):
    """Function, grid, block, shared memory, stream, every scalar, and every pointer to an input."""
    call = CALLS[case]()
    inputs = starts(call.values())
    with recording_driver(ops=True) as recorder:
        op, plan = op_and_plan(call)
        op(**call)
        expected = recorder.take()
        run = bind(plan(**call), call)
        assert recorder.take() == []  # neither the plan nor binding starts anything
        run()
        launches = recorder.take()
    assert [x.without_pointers() for x in launches] == [x.without_pointers() for x in expected]
    for launch, ordinary in zip(launches, expected, strict=True):
        given = {name for name, pointer in ordinary.pointers.items() if pointer in inputs}
        assert {name for name, pointer in launch.pointers.items() if pointer in inputs} == given
        assert all(launch.pointers[name] == ordinary.pointers[name] for name in given)
    assert inputs <= pointers(launches)


@pytest.mark.parametrize("case", CALLS)
def test_a_binding_has_pointers_of_its_own_tensors_only(case):
    call, other = CALLS[case](), CALLS[case](seed=1)
    with recording_driver(ops=True) as recorder:
        plan = op_and_plan(call)[1](**call)
        runs = [bind(plan, call), bind(plan, other), bind(plan, call)]
        launched, outputs = [], []
        for run in (runs[0], runs[1], runs[0], runs[2]):
            outputs.append(run())
            launched.append(recorder.take())
            assert starts(outputs[-1]) <= pointers(launched[-1])
    first, second, again, anew = launched
    assert again == first and outputs[2] is outputs[0]
    inputs = starts(call.values())  # given scores are an output as well
    assert not starts(outputs[3]) - inputs & starts(outputs[0]) - inputs
    for launches, own, foreign in ((first, call, other), (second, other, call), (anew, call, other)):
        assert starts(own.values()) <= pointers(launches)
        assert not starts(foreign.values()) & pointers(launches)
