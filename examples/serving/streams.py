"""What load.py and compare.py measure: streams that ask a server, each as soon as it has its answer, and what they saw."""

from __future__ import annotations

import asyncio
import io
import statistics
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any
from urllib.request import urlopen

from openai import APIError, AsyncOpenAI

# folders only: a checkout must stay off the path
sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1] / "glyphworld"))

from client import message
from make_questions import questions_of

FIRST = 80_000  # seeds of scenes that no training drew
POLL = 0.2  # seconds between two looks at /metrics


@dataclass(frozen=True)
class Plan:
    """What is asked of a server.

    Attributes:
        streams: numbers of streams, one level each.
        requests: of a level, at least; with many streams four for each.
        seconds: after which a level asks nothing new.
        answer: tokens of every answer.
        warmup: requests before the first level, which are not counted.
        size: side of the pictures, in pixels.
    """

    streams: tuple[int, ...] = (1, 2, 4, 8, 16, 32)
    requests: int = 32
    seconds: float = 30.0
    answer: int = 16
    warmup: int = 32
    size: int = 192

    def of(self, streams: int) -> int:
        """Requests of a level."""
        return max(self.requests, 4 * streams)


@dataclass(frozen=True)
class Level:
    """What one number of streams measured: times in seconds, shares from 0 to 1, ``prompt_tokens`` a request's mean."""

    streams: int
    requests: int
    errors: int
    seconds: float
    ttft_median: float
    ttft_p95: float
    requests_per_s: float
    tokens_per_s: float
    kv_peak: float
    prompt_tokens: float
    prefix_cached: float
    pictures_cached: float


@dataclass
class Taken:
    """What the streams of a level note as they run."""

    first: list[float] = field(default_factory=list)
    prompt: list[int] = field(default_factory=list)
    tokens: int = 0
    errors: list[str] = field(default_factory=list)
    kv: list[float] = field(default_factory=list)


def asked(first: int, count: int, size: int) -> list[list[Any]]:
    """So many requests, each about a scene of its own; drawn before anything is timed."""
    made = []
    for seed in range(first, first + count):
        questions = [*questions_of(seed, size)]
        image, entry = questions[seed % len(questions)]
        png = io.BytesIO()
        image.save(png, "PNG")
        made.append(message(entry["prompt"], png.getvalue()))
    return made


async def measured(url: str, plan: Plan) -> list[Level]:
    """All levels of a plan, one after the other. Whichever server is asked, the requests are the same.

    Args:
        url: of the server, without "/v1".
    """
    messages = iter(asked(FIRST, plan.warmup + sum(map(plan.of, plan.streams)), plan.size))
    async with AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        model = (await client.models.list()).data[0].id
        await level(client, url, model, [*islice(messages, plan.warmup)], 8, plan)
        return [
            await level(client, url, model, [*islice(messages, plan.of(streams))], streams, plan)
            for streams in plan.streams
        ]


async def level(
    client: AsyncOpenAI, url: str, model: str, messages: list[list[Any]], streams: int, plan: Plan
) -> Level:
    """So many streams, until all is answered or the plan's time is over."""
    left, taken = iter(messages), Taken()
    before, start = await metrics(url), time.perf_counter()
    watch = asyncio.create_task(watched(url, taken))
    asking = [stream(client, model, left, start + plan.seconds, plan.answer, taken) for _ in range(streams)]
    await asyncio.gather(*asking)
    seconds = time.perf_counter() - start
    watch.cancel()
    with suppress(asyncio.CancelledError):
        await watch
    return summary(streams, taken, seconds, before, await metrics(url))


async def stream(
    client: AsyncOpenAI, model: str, left: Iterator[list[Any]], end: float, answer: int, taken: Taken
) -> None:
    """Ask what is left, one request after the other. A request that fails is counted, and the next one asked."""
    for request in left:
        if time.perf_counter() > end:
            break
        try:
            await one(client, model, request, answer, taken)
        except APIError as error:
            taken.errors.append(str(error))


async def one(client: AsyncOpenAI, model: str, request: list[Any], answer: int, taken: Taken) -> None:
    """One request; its first token is the first that is sent."""
    start, first = time.perf_counter(), None
    chunks = await client.chat.completions.create(
        model=model,
        messages=request,
        max_tokens=answer,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
        extra_body={"ignore_eos": True, "skip_special_tokens": False},  # each token is seen, and as many
    )
    async for chunk in chunks:
        if first is None and chunk.choices and chunk.choices[0].delta.content:
            first = time.perf_counter() - start
        if chunk.usage is not None:
            taken.prompt.append(chunk.usage.prompt_tokens)
            taken.tokens += chunk.usage.completion_tokens
    if first is not None:
        taken.first.append(first)


def summary(
    streams: int, taken: Taken, seconds: float, before: dict[str, float], after: dict[str, float]
) -> Level:
    """A level's numbers. Ends the program where not two requests were answered."""
    if len(taken.first) < 2:
        raise SystemExit(f"{len(taken.first)} answers; errors: {taken.errors[:1]}")
    done = {name: after[name] - before[name] for name in after}
    return Level(
        streams=streams,
        requests=len(taken.first),
        errors=len(taken.errors),
        seconds=seconds,
        ttft_median=statistics.median(taken.first),
        ttft_p95=statistics.quantiles(taken.first, n=20, method="inclusive")[-1],
        requests_per_s=len(taken.first) / seconds,
        tokens_per_s=taken.tokens / seconds,
        kv_peak=max(taken.kv),
        prompt_tokens=statistics.mean(taken.prompt),
        prefix_cached=done["prefix_cache_hits_total"] / done["prefix_cache_queries_total"],
        pictures_cached=done["mm_cache_hits_total"] / done["mm_cache_queries_total"],
    )


async def watched(url: str, taken: Taken) -> None:
    """Note how full the KV cache is, until cancelled."""
    while True:
        taken.kv.append((await metrics(url))["kv_cache_usage_perc"])
        await asyncio.sleep(POLL)


async def metrics(url: str) -> dict[str, float]:
    """vLLM's own, by name without "vllm:"; those with several labels are added up."""
    text = await asyncio.to_thread(lambda: urlopen(f"{url}/metrics").read().decode())
    found: dict[str, float] = {}
    for line in text.splitlines():
        if line.startswith("vllm:"):
            label, value = line.removeprefix("vllm:").rsplit(" ", 1)
            name = label.split("{")[0]
            found[name] = found.get(name, 0.0) + float(value)
    return found
