"""Plans: the bits of prune_tokens and prune_scored, run after run, whatever they were built for; then workspace and error text."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from helpers import slow
from vlmprune import ops
from vlmprune.errors import BackendError


def stage(device, seed=0, **shape):
    """Arguments of a stage: key is among the tensors to shorten, as it is in a model."""
    query, key, rows, columns = slow.inputs(device=device, seed=seed, **shape)
    (B, _, S, _), g = key.shape, torch.Generator().manual_seed(seed)
    hidden = torch.randn(B, S, 10, generator=g).to(device)
    tensors = [hidden, key, torch.arange(S, device=device)[None] + seed]
    return dict(query=query, key=key, tensors=tensors, rows=rows, columns=columns)


def mask_of(call, seed):
    mask = torch.ones(call["key"].shape[0], call["key"].shape[2], dtype=torch.bool, device=call["key"].device)
    mask[0, seed] = False
    return mask


VARIANTS = {
    "plain": lambda call, seed: {},
    "mask": lambda call, seed: dict(key_mask=mask_of(call, seed)),
    "lse": lambda call, seed: dict(
        lse=ops.row_lse(call["query"], call["key"], call["rows"][:, :1].expand(-1, 13))
    ),
    "weights": lambda call, seed: dict(
        row_weight=torch.full(call["rows"].shape, 1.0 + seed, device=call["key"].device)
    ),
    "pair weights": lambda call, seed: dict(
        pair_weight=torch.rand(2, 5, 9, generator=torch.Generator().manual_seed(seed)).to(call["key"].device)
    ),
    "rope": lambda call, seed: dict(rope=slow.rope(device=call["key"].device, scaling=1.0 + seed)),
    "keep": lambda call, seed: dict(keep=torch.tensor([seed, 3], device=call["key"].device)),
    "code": lambda call, seed: dict(code=(call["columns"] % (3 + seed)).to(torch.int8)),
    "segments": lambda call, seed: dict(
        segments=torch.tensor([[2, seed, 4], [0, 5, 2]], device=call["key"].device),
        keep=torch.tensor([[1, 1, seed], [1, 2, 1]], device=call["key"].device),
    ),
}
SETTINGS = [
    dict(head_reduce="max", row_reduce="sum"),
    dict(normalize="columns"),
    dict(top_heads=3),
    dict(padding="left", newest=True, most=5),
]


def planned(call, **settings):
    with ops.use_backend("triton"):
        return ops.PrunePlan(**call, **settings)


def expected(call, **settings):
    with ops.use_backend("triton"):
        return ops.prune_tokens(**call, **settings)


def assert_same(out, truth):
    assert all(map(torch.equal, out.tensors, truth.tensors))
    names = ("index", "count", "scores", "kept", "columns")
    assert all(torch.equal(getattr(out, name), getattr(truth, name)) for name in names)


@pytest.mark.parametrize(
    "variant, settings",
    [(v, {}) for v in VARIANTS] + [("plain", s) for s in SETTINGS] + [("pair weights", dict(top_heads=1))],
)
def test_runs_are_prune_tokens(variant, settings, device):
    settings = dict(keep=3, width=18) | settings
    plan = None
    for seed in range(2):
        call = stage(device, seed)
        extra = VARIANTS[variant](call, seed)
        truth = expected(call, **settings | extra)
        plan = plan or planned(call, **settings | extra)
        assert_same(plan.run(**call, **extra), truth)


@pytest.mark.parametrize("with_lse", [False, True])
def test_packed_runs(with_lse, device):
    lengths, plan = [[0, 21, 34], [0, 13, 34]], None
    for seed, ends in enumerate(lengths):
        call = stage(device, seed, B=1, S=34, Sq=34)
        ends = torch.tensor(ends, dtype=torch.int32, device=device)
        call["rows"] = torch.tensor([[3, 12], [5, -1]], device=device)
        call["columns"] = torch.tensor([[0, 2, 3, 7], [1, 4, 11, -1]], device=device)
        packed = dict(cu_seqlens=ends)
        if with_lse:  # as FlashAttention's variable-length calls return it
            packed["lse"] = torch.randn(4, 34, generator=torch.Generator().manual_seed(seed)).to(device)
        truth = expected(call, keep=2, **packed)
        plan = plan or planned(call, keep=2, **packed)
        out = plan.run(**call, **packed)
        assert_same(out, truth)
        assert torch.equal(out.cu_seqlens, truth.cu_seqlens)


def test_many_columns_take_one_launch_more(device):
    call = stage(device, B=1, H=1, Hkv=1, Sq=1, S=4200, D=8, R=1, N=4100)
    call["tensors"] = call["tensors"][2:]
    plan, truth = planned(call, keep=70), expected(call, keep=70)
    assert_same(plan.run(**call), truth)


def test_a_run_returns_new_tensors(device):
    """No later run changes what an earlier one returned."""
    call, other = stage(device), stage(device, seed=1)
    plan = planned(call, keep=3)
    first, second = plan.run(**call), plan.run(**other)
    assert_same(first, expected(call, keep=3))
    assert_same(second, expected(other, keep=3))
    assert all(x.is_contiguous() for x in (*first.tensors, *first[1:6]))


def test_gathered_tensors_go_where_they_are_wanted(device):
    call, other = stage(device), stage(device, seed=1)
    plan = planned(call, keep=3)
    given = [torch.empty_like(x) for x in plan.run(**call).tensors]
    out = plan.run(**other, out=given)
    assert all(x is y for x, y in zip(out.tensors, given, strict=True))
    assert_same(out, expected(other, keep=3))


def inputs_of(call):
    return [call["query"], call["key"], call["rows"], call["columns"], *call["tensors"]]


def test_an_attempt_is_a_run_or_none(device):
    call, other = stage(device), stage(device, seed=1)
    plan, truth = planned(call, keep=3), expected(call, keep=3)
    out = plan.attempt(inputs_of(call))
    assert_same(out, truth)
    mine = [*out.tensors, out.index, out.kept, out.columns]
    before = [x.clone() for x in mine]
    again = plan.attempt(inputs_of(other))
    assert all(map(torch.equal, mine, before)) and again.scores is out.scores and again.count is out.count
    strided = torch.stack([call["key"], call["key"]], -1)[..., 0]
    for x in (strided, call["key"].double(), call["key"][:, :, :-1]):
        assert plan.attempt(inputs_of(call | {"key": x})) is None
    assert plan.attempt(inputs_of(call)[:-1]) is None
    assert plan.attempt([*inputs_of(call), call["key"]]) is None


def test_threads_share_a_plan(device):
    """Their launches do not mix, as they have one workspace."""
    calls = [stage(device, seed) for seed in range(4)]
    plan = planned(calls[0], keep=3)
    with ThreadPoolExecutor(4) as pool:
        outs = list(pool.map(lambda call: plan.run(**call), calls * 3))
    for out, call in zip(outs, calls * 3, strict=True):
        assert_same(out, expected(call, keep=3))


SCORED = {
    "plain": lambda scores, seed: {},
    "columns": lambda scores, seed: dict(columns=torch.arange(seed, 2 * 9, 2)[:8].expand(2, 8).contiguous()),
    "mask and codes": lambda scores, seed: dict(
        key_mask=torch.arange(20).expand(2, 20) != 3 + seed, code=(scores > seed).to(torch.int8)
    ),
    "segments": lambda scores, seed: dict(segments=torch.tensor([[4, 2 + seed], [1, 3]])),
}


@pytest.mark.parametrize("variant", SCORED)
def test_runs_of_given_scores_are_prune_scored(variant, device):
    plan = None
    for seed in range(2):
        g = torch.Generator().manual_seed(seed)
        N = 8 if variant == "columns" else 20
        call = dict(scores=torch.randn(2, N, generator=g), tensors=[torch.randn(2, 20, 3, generator=g)])
        extra = SCORED[variant](call["scores"], seed)
        call, extra = to_device(call, device), to_device(extra, device)
        with ops.use_backend("triton"):
            truth = ops.prune_scored(**call, keep=2, **extra)
            plan = plan or ops.ScoredPlan(**call, keep=2, **extra)
        out = plan.run(**call, **extra)
        assert_same(out, truth)
        assert out.scores is call["scores"]


def to_device(call, device):
    return {
        name: [t.to(device) for t in x] if isinstance(x, list) else x.to(device) for name, x in call.items()
    }


def test_bound_tensors_are_read_when_called(device):
    call, other = stage(device), stage(device, seed=1)
    plan, truths = planned(call, keep=3), [expected(x, keep=3) for x in (call, other)]
    bound, again = plan.bind(**call), plan.bind(**other)
    assert_same(bound(), truths[0])
    assert_same(again(), truths[1])  # neither binding disturbs the other
    for name in ("query", "key", "rows", "columns"):
        call[name].copy_(other[name])
    for x, y in zip(call["tensors"], other["tensors"], strict=True):
        x.copy_(y)
    assert_same(bound(), truths[1])


def test_a_bound_call_keeps_its_tensors(device):
    import gc
    import weakref

    call = stage(device)
    bound = planned(call, keep=3).bind(**call)  # the plan itself is gone, too
    truth, alive = expected(call, keep=3), weakref.ref(call["query"])
    del call
    gc.collect()
    assert alive() is not None
    assert_same(bound(), truth)


def test_a_thousand_and_one_runs_need_no_reset(device):
    call = stage(device, B=1, H=1, Hkv=1, S=3, Sq=1, R=1, N=2, D=8)
    plan, truth = planned(call, keep=1), expected(call, keep=1)
    for _ in range(20 if device.type == "cpu" else 1001):
        assert_same(plan.run(**call), truth)


def test_reset_after_a_run_was_broken_off(device):
    call = stage(device)
    plan, truth = planned(call, keep=3), expected(call, keep=3)
    for replay in plan._program._replays:
        if replay.counter is not None:
            replay.counter.fill_(1)  # as if one program had arrived and the others never did
    plan.run(**call)
    plan.reset()
    assert_same(plan.run(**call), truth)


def test_the_plan_keeps_no_example(device):
    """Examples may be freed: neither the plan nor its launches hold them."""
    import gc
    import weakref

    call = stage(device)
    gone = [
        weakref.ref(x) for x in (call["query"], call["key"], *call["tensors"], call["rows"], call["columns"])
    ]
    plan = planned(call, keep=3)
    del call
    gc.collect()
    assert [ref() for ref in gone] == [None] * 7
    call = stage(device, seed=1)
    assert_same(plan.run(**call), expected(call, keep=3))


@pytest.mark.gpu
def test_a_graph_replays_the_plan(device):
    call, other = stage(device), stage(device, seed=1)
    plan, truth = planned(call, keep=3), expected(other, keep=3)
    torch.use_deterministic_algorithms(False)  # filling new memory is not ours to capture
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        plan.run(**call)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = plan.run(**call)
    for name in ("query", "key", "rows", "columns"):
        call[name].copy_(other[name])
    for x, y in zip(call["tensors"], other["tensors"], strict=True):
        x.copy_(y)
    for _ in range(1000):
        graph.replay()
        assert_same(out, truth)


def test_needs_triton():
    with pytest.raises(BackendError, match=r"^no backend can run prune_plan on .*\n  triton: "):
        ops.PrunePlan(**stage(torch.device("cpu")), keep=3)


def misaligned(x):
    return torch.cat([x.flatten(), x.flatten()[:1]])[1:].view(x.shape)


CPU = pytest.mark.cpu("arguments are checked on the host before any launch, and some messages name the CPU")
ERRORS = [
    (
        dict(query=lambda a: a["query"][:1]),
        r"^query: expected \[2, 4, 13, 24\] as in the plan, got \(1, 4, 13, 24\)$",
    ),
    (
        dict(key=lambda a: a["key"].half()),
        r"^key: expected torch\.float32 as in the plan, got torch\.float16$",
    ),
    (dict(key=lambda a: a["key"].to("meta")), r"^key: expected the device cpu as in the plan, got meta$"),
    (
        dict(key=lambda a: a["key"].mT.contiguous().mT),
        r"^key: expected strides \(1008, 504, 24, 1\) as in the plan, got ",
    ),
    (
        dict(query=lambda a: misaligned(a["query"])),
        r"^query: expected memory that starts at a multiple of 16 bytes as in the plan, got 0x",
    ),
    (dict(tensors=lambda a: a["tensors"][:2]), r"^tensors: expected 3 tensors as in the plan, got 2$"),
    (dict(out=lambda a: []), r"^out: expected 3 tensors as in the plan, got 0$"),
    (
        dict(out=lambda a: [torch.empty(2, 20, 10), *a["tensors"][1:]]),
        r"^out\[0\]: expected \[2, 21, 10\] as in the plan, got \(2, 20, 10\)$",
    ),
    (dict(lse=lambda a: torch.zeros(2, 4, 13)), r"^lse: expected None as in the plan, got a tensor$"),
    (dict(key_mask=lambda a: None), r"^key_mask: expected a tensor as in the plan, got None$"),
    (dict(keep=lambda a: torch.ones(2)), r"^keep: expected None as in the plan, got a tensor$"),
    (dict(rows=lambda a: None), r"^rows: expected a tensor as in the plan, got None$"),
    (dict(normalize=lambda a: "none"), r"^normalize: expected None as in the plan, got 'none'$"),
    (dict(colums=lambda a: a["columns"]), r"^colums: expected None as in the plan, got a tensor$"),
]


@pytest.fixture(scope="module")
def masked_plan():
    """A stage with a mask, and its plan."""
    call = stage(torch.device("cpu"))
    call["key_mask"] = mask_of(call, 0)
    return call, planned(call, keep=3)


@CPU
@pytest.mark.parametrize("changes, message", ERRORS)
def test_error_text_of_a_run(changes, message, masked_plan):
    call, plan = masked_plan
    truth = plan.run(**call).index.clone()
    with pytest.raises(ValueError, match=message):
        plan.run(**call | {name: change(call) for name, change in changes.items()})
    assert torch.equal(plan.run(**call).index, truth)  # nothing was half done


@CPU
@pytest.mark.parametrize(
    "name, message",
    [
        ("rows", r"^rows: expected a tensor that the kernels can read in place, got strides \(10, 2\)$"),
        (
            "columns",
            r"^columns: expected a tensor that the kernels can read in place, got strides \(18, 2\)$",
        ),
    ],
)
def test_what_would_be_copied_is_refused(name, message):
    call = stage(torch.device("cpu"))
    call[name] = torch.stack([call[name], call[name]], 2)[..., 0]
    with pytest.raises(ValueError, match=message):
        planned(call, keep=3)


@CPU
def test_bad_arguments_are_those_of_prune_tokens():
    call = stage(torch.device("cpu"))
    with pytest.raises(ValueError, match=r"^keep: expected a whole number in 0\.\.9, got 10$"):
        planned(call, keep=10)
    with pytest.raises(ValueError, match=r"^rows: expected at least one sample, got \(0, 5\)$"):
        planned(
            {name: [t[:0] for t in x] if isinstance(x, list) else x[:0] for name, x in call.items()}, keep=3
        )


@CPU
@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(scores=torch.zeros(2, 19)), r"^scores: expected \[2, 20\] as in the plan, got \(2, 19\)$"),
        (dict(tensors=[]), r"^tensors: expected 1 tensors as in the plan, got 0$"),
        (dict(columns=torch.zeros(2, 20).long()), r"^columns: expected None as in the plan, got a tensor$"),
        (dict(keep=2), r"^keep: expected None as in the plan, got 2$"),
        (
            dict(out=[torch.zeros(2, 19, 3)]),
            r"^out\[0\]: expected \[2, 20, 3\] as in the plan, got \(2, 19, 3\)$",
        ),
    ],
)
def test_error_text_of_a_run_by_scores(changes, message):
    call = dict(scores=torch.zeros(2, 20), tensors=[torch.zeros(2, 20, 3)])
    with ops.use_backend("triton"):
        plan = ops.ScoredPlan(**call, keep=3)
    with pytest.raises(ValueError, match=message):
        plan.run(**call | changes)


@CPU
def test_scores_of_no_sample_are_refused():
    with pytest.raises(ValueError, match=r"^scores: expected at least one sample, got \(0, 4\)$"):
        ops.ScoredPlan(torch.zeros(0, 4), [], keep=2)
