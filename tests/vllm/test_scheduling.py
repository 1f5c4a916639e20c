"""Requests cut into chunks, preempted, and many at once: each is answered as if it were alone."""

import asyncio
import itertools

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed (make test-vllm)")

from vllm import AsyncEngineArgs, SamplingParams
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.metrics.loggers import StatLoggerBase

from helpers.served import CHECKPOINT, ENGINE, engine, overrides, preemptions
from helpers.served_apart import Request, answers, heard, same

POLICY = {"policy": "visionzip", "dominant": 40, "contextual": 9, "max_keep": 98, "positions": "pack"}
MIXED = [
    Request(number, images, keep)
    for number, images, keep in itertools.product(range(6), (1, 2), (None, 10, 24, 0.25, 98, 75))
][:64]
"""Six pictures, three questions, one picture or two, six budgets."""
ALONE = {"max_num_seqs": 1, "enable_prefix_caching": False, "mm_processor_cache_gb": 0}


@pytest.fixture(scope="module")
def sequential():
    """Answers of an engine that runs one request at a time and caches nothing: short ones, and long ones."""
    with engine(CHECKPOINT, POLICY, **ALONE) as llm:
        short = answers(llm, MIXED)
        long = answers(llm, MIXED[:8], 60, ignore_eos=True)
    assert len({round(one.logprob, 3) for one in short}) > 40  # pictures and budgets are seen in the answers
    return short, long


def test_chunks_that_end_inside_an_image(sequential):
    requests = MIXED[:24]
    with engine(CHECKPOINT, POLICY, max_num_batched_tokens=16, max_num_seqs=4) as llm:
        steps = []
        (model,) = llm.apply_model(lambda model: model)
        model.register_forward_pre_hook(
            lambda model, args, named: steps.append(len(named["positions"])), with_kwargs=True
        )
        got = answers(llm, requests)
    assert max(steps) <= 16 < 49 <= max(one.prompt for one in got)
    same(got, sequential[0][:24])


def test_requests_that_are_preempted_and_computed_again(sequential):
    small = {"max_model_len": 320, "num_gpu_blocks_override": 12, "enable_prefix_caching": False}
    with engine(CHECKPOINT, POLICY, disable_log_stats=False, **small) as llm:
        got = answers(llm, MIXED[:8], 60, ignore_eos=True)
        assert preemptions(llm) > 0
    same(got, sequential[1])


class Watched(StatLoggerBase):
    """What the scheduler last said of itself."""

    def __init__(self, vllm_config, engine_index=0):
        Watched.last = None

    def record(self, scheduler_stats, iteration_stats, mm_cache_stats=None, engine_idx=0):
        Watched.last = scheduler_stats or Watched.last

    def log_engine_initialized(self):
        pass


async def ask(llm, request, name, steps=8, **sampling):
    """The last output of a request."""
    how = SamplingParams(temperature=0, max_tokens=steps, logprobs=0, **sampling)
    async for output in llm.generate(request.prompt(), how, name):
        last = output
    return last


async def crowd(llm):
    """All requests at once, and among them eight whose clients go away in the middle of an endless answer."""
    kept = [asyncio.create_task(ask(llm, request, f"kept {i}")) for i, request in enumerate(MIXED)]
    left = [
        asyncio.create_task(ask(llm, request, f"left {i}", 300, ignore_eos=True))
        for i, request in enumerate(MIXED[:8])
    ]
    got = [await task for task in kept]
    assert not any(task.done() for task in left)
    for task in left:
        task.cancel()
    ends = await asyncio.gather(*left, return_exceptions=True)
    return heard(got), ends


def test_64_at_once_answer_as_alone_and_cancelled_requests_leave_nothing(sequential):
    async def run():
        settings = {**ENGINE, "hf_overrides": overrides(POLICY)}
        llm = AsyncLLM.from_engine_args(AsyncEngineArgs(str(CHECKPOINT), **settings), stat_loggers=[Watched])
        try:
            got, ends = await crowd(llm)
            last = await ask(llm, MIXED[0], "last")
            return got, ends, heard([last]), llm.output_processor.has_unfinished_requests(), Watched.last
        finally:
            llm.shutdown()

    got, ends, last, unfinished, stats = asyncio.run(run())
    assert [type(end) for end in ends] == [asyncio.CancelledError] * 8
    same(got, sequential[0])
    same(last, sequential[0][:1])
    assert not unfinished
    assert (stats.num_running_reqs, stats.num_waiting_reqs, stats.kv_cache_usage) == (0, 0, 0)
