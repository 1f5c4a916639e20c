"""The OpenAI-compatible server with pruning on: answers, usage, budgets, bad requests, many clients, clients that vanish, its end."""

import asyncio
import json
import math
import subprocess
import sys

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed (make test-vllm)")

import httpx
from openai import AsyncOpenAI, OpenAI

from helpers.served import CHECKPOINT, QUESTIONS, Reference, question
from helpers.server import API_SERVER, SERVE, arguments, chat_body, members, server, started, until
from vlmprune import policy_from

POLICY = {"policy": "divprune", "keep": 64, "positions": "pack"}
SERVED = {**POLICY, "max_keep": 128}
OPTIONS = ("--enable-prompt-tokens-details", "--trust-request-mm-kwargs")
AT_ONCE = 16
"""Requests that run at once; further ones wait."""

BUDGETS = {None: 64, 8: 8, 32: 32, 0.25: 49, 100: 100}
"""What a request asks for, and what it gets of the 196 tokens of an image."""

BUDGET = "a share in (0, 1] or a whole number of tokens per image"
"""What a request may ask for, in the words of the error."""

CLIENT = """
import sys, httpx
body = sys.stdin.buffer.read()
with httpx.stream("POST", sys.argv[1], content=body, headers={"content-type": "application/json"}, timeout=60) as got:
    for line in got.iter_lines():
        print(line, flush=True)
"""


@pytest.fixture(scope="module")
def reference():
    return Reference(CHECKPOINT)


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    with server(
        tmp_path_factory.mktemp("server") / "log", SERVED, *OPTIONS, "--max-num-seqs", str(AT_ONCE)
    ) as one:
        yield one


def asked(number, images=1, keep=None, **more):
    """The chat completion of ``question(number, images)``."""
    text = QUESTIONS[number % len(QUESTIONS)]
    return chat_body(number, text, images, keep, return_token_ids=True, **more)


def sdk(body):
    """A body as OpenAI's client takes it: what it does not know goes into ``extra_body``."""
    known = {"model", "messages", "stream"}
    return {
        **{name: body[name] for name in known & set(body)},
        "extra_body": {k: v for k, v in body.items() if k not in known},
    }


def completed(one, body):
    """The ids of an answer, and its usage."""
    got = OpenAI(base_url=f"{one.url}/v1", api_key="none").chat.completions.create(**sdk(body))
    return got.choices[0].model_extra["token_ids"], got.usage


def of_images(usage):
    """The tokens of a prompt that are of images; what is none is left out of a stream, and null elsewhere."""
    return (usage.prompt_tokens_details.model_extra.get("multimodal_tokens") or {}).get("image", 0)


def budget(keep):
    """The policy with that budget, as transformers runs it."""
    return policy_from({**POLICY, "keep": keep})


def test_answers_are_those_of_transformers(served, reference):
    for number, images in [(0, 1), (1, 1), (2, 1), (3, 2)]:
        ids, _ = completed(served, asked(number, images))
        assert ids == reference(question(number, images), budget(64))


def test_usage_counts_what_is_kept_and_what_was_cached(served):
    body = asked(4, cache_salt="usage")
    words = len(QUESTIONS[1].split()) + len(["<bos>", "USER:", "ASSISTANT:"])
    _, first = completed(served, body)
    assert (of_images(first), first.prompt_tokens) == (64, 64 + words)
    assert first.prompt_tokens_details.cached_tokens == 0
    _, again = completed(served, body)
    assert (of_images(again), again.prompt_tokens) == (64, 64 + words)
    assert again.prompt_tokens_details.cached_tokens == 64


def test_a_request_has_a_budget_of_its_own(served, reference):
    heard = {}
    for keep in (32, 4, 64):
        answers = [completed(served, asked(number, keep=keep)) for number in range(6)]
        assert [of_images(usage) for _, usage in answers] == [keep] * 6
        heard[keep] = [ids for ids, _ in answers]
        assert heard[keep] == [reference(question(number), budget(keep)) for number in range(6)]
    assert heard[4] != heard[32] != heard[64], "budgets that make no difference show nothing"


def test_a_picture_with_a_name_keeps_its_budgets_apart(served):
    body = asked(5)
    body["messages"][0]["content"][0]["uuid"] = "the-same-picture"
    for keep in (None, 32, 4, None, 32):
        own = {} if keep is None else {"mm_processor_kwargs": {"vlmprune_keep": keep}}
        _, usage = completed(served, {**body, **own})
        assert of_images(usage) == (keep or 64)


@pytest.mark.parametrize(
    ("keep", "expected", "got"),
    [
        (129, "at most 128 of this image's 196 tokens", "129"),
        (0.9, "at most 128 of this image's 196 tokens", "0.9"),
        (10**30, "at most", str(10**30)),
        *((bad, BUDGET, repr(bad)) for bad in (0, -1, -0.5, 1.5, 1e9, math.nan, math.inf)),
        *((bad, BUDGET, repr(bad)) for bad in ("many", "32", True, {"keep": 1})),
        ([1], BUDGET, "1"),
    ],
    ids=repr,
)
def test_a_bad_budget_is_a_400_with_one_clear_line(served, keep, expected, got):
    refused = served.chat(asked(0, keep=keep))
    assert refused.status_code == 400, (refused.text, served)
    message = refused.json()["error"]["message"]
    assert message.startswith(f"vlmprune_keep: expected {expected}")
    assert got in message.rpartition(", got ")[2]
    assert "\n" not in message
    assert served.chat(asked(0)).status_code == 200, served


def test_a_misspelt_budget_is_a_400(served):
    refused = served.chat({**asked(0), "mm_processor_kwargs": {"vlmprune_kep": 32}})
    assert refused.status_code == 400, (refused.text, served)
    expected = (
        "mm_processor_kwargs: expected no setting of vlmprune's but 'vlmprune_keep', got 'vlmprune_kep'"
    )
    assert refused.json()["error"]["message"] == expected


def test_many_clients_hear_what_each_hears_alone(served):
    keeps = [*BUDGETS]
    bodies = [
        asked(i, 0 if i % 11 == 7 else 2 if i % 5 == 0 else 1, keeps[i % 4 + i % 2], stream=i % 3 == 0)
        for i in range(64)
    ]

    # These take all places at first, so that others wait.
    holding = asked(0, 0, stream=False, n=AT_ONCE, temperature=1, ignore_eos=True, max_tokens=300)

    async def together():
        async with AsyncOpenAI(base_url=f"{served.url}/v1", api_key="none") as client:
            return await asyncio.gather(*(heard(client, body) for body in (holding, *bodies)))

    _, *crowd = asyncio.run(together())
    for body, (ids, usage) in zip(bodies, crowd, strict=True):
        alone, counted = completed(served, {**body, "stream": False, "cache_salt": "alone"})
        keep = body.get("mm_processor_kwargs", {}).get("vlmprune_keep")
        pictures = len(body["messages"][0]["content"]) - 1
        assert ids == alone
        assert usage.prompt_tokens == counted.prompt_tokens
        assert of_images(usage) == of_images(counted) == pictures * BUDGETS[keep]


async def heard(client, body):
    """The ids of an answer, streamed where asked so, and its usage."""
    if not body["stream"]:
        got = await client.chat.completions.create(**sdk(body))
        return got.choices[0].model_extra["token_ids"], got.usage
    ids, usage = [], None
    async for chunk in await client.chat.completions.create(
        **sdk({**body, "stream_options": {"include_usage": True}})
    ):
        usage = chunk.usage or usage
        for choice in chunk.choices:
            ids += choice.model_extra.get("token_ids") or []
    return ids, usage


def killed(one, body):
    """A client that is killed in the middle of its answers."""
    url = f"{one.url}/v1/chat/completions"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-P", "-c", CLIENT, url], **pipes) as client:
        client.stdin.write(json.dumps(body).encode())
        client.stdin.close()
        assert client.stdout.readline()
        until(lambda: busy(one), 10, one)
        client.kill()


def closed(one, body):
    """A client that closes its socket in the middle of its answers."""
    with httpx.stream("POST", f"{one.url}/v1/chat/completions", json=body, timeout=60) as got:
        lines = got.iter_lines()
        assert next(lines)
        until(lambda: busy(one), 10, one)


def impatient(one, body):
    """A client that waits for whole answers, and no longer than a second."""
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{one.url}/v1/chat/completions", json={**body, "stream": False}, timeout=1)


def busy(one):
    """Whether a server has more to do than it can do at once."""
    return one.metric("vllm:num_requests_running") > 0 and one.metric("vllm:num_requests_waiting") > 0


def idle(one):
    """Whether a server has nothing to do, and keeps room for nobody."""
    gauges = ("vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc")
    return not any(one.metric(name) for name in gauges)


@pytest.mark.parametrize("vanish", [killed, closed, impatient])
def test_a_client_that_vanishes_leaves_nothing_behind(served, vanish):
    answers, steps = 2 * AT_ONCE, 420
    before = served.metric("vllm:generation_tokens_total")
    vanish(served, asked(0, stream=True, ignore_eos=True, n=answers, max_tokens=steps, temperature=1))
    until(lambda: idle(served), 5, served)
    made = served.metric("vllm:generation_tokens_total") - before
    assert 0 < made < answers * steps / 2, f"{made} tokens were made, whole answers are {answers * steps}"
    assert served.chat(asked(0)).status_code == 200, served


def test_a_bad_policy_ends_the_server_with_one_clear_line(tmp_path):
    log = tmp_path / "log"
    with started(log, [*API_SERVER, *arguments({"policy": "nonsense", "keep": 64})]) as process:
        assert process.wait(60) != 0
        until(lambda: not members(process.pid), 5, members(process.pid))
    said = [line for line in log.read_text().splitlines() if "policy: expected one of" in line]
    assert len(said) == 1
    assert "divprune" in said[0]
    assert "got 'nonsense'" in said[0]


def test_several_api_processes_agree_on_budgets(tmp_path):
    entry = ("-c", SERVE, "serve")
    log = tmp_path / "log"
    with server(log, SERVED, *OPTIONS, "--api-server-count", "2", entry=entry) as one:
        for number in range(24):  # each over a connection of its own, so to one process or the other
            keep = [*BUDGETS][number % len(BUDGETS)]
            _, usage = completed(one, asked(0, keep=keep))
            assert of_images(usage) == BUDGETS[keep]
        assert one.chat(asked(0, keep=129)).status_code == 400
        ready = [line for line in log.read_text().splitlines() if "Starting vLLM server" in line]
        assert len({line.split()[0] for line in ready}) == 2, one


def test_on_sigterm_a_server_ends_what_it_has_begun_and_trusts_no_budget_unless_told(tmp_path):
    with server(tmp_path / "log", SERVED, "--shutdown-timeout", "30") as one:
        refused = one.chat(asked(0, keep=32))
        assert refused.status_code == 400
        assert "--trust-request-mm-kwargs" in refused.json()["error"]["message"]
        body = asked(0, stream=True, ignore_eos=True, max_tokens=400, stream_options={"include_usage": True})
        with httpx.stream("POST", f"{one.url}/v1/chat/completions", json=body, timeout=60) as got:
            lines = got.iter_lines()
            assert next(lines)
            one.process.terminate()
            *_, counted, end = [line.removeprefix("data: ") for line in lines if line]
        assert end == "[DONE]"
        assert json.loads(counted)["usage"]["completion_tokens"] == 400
        assert one.process.wait(30) == 0, one
        until(lambda: not one.members(), 5, one)
        assert "force killing" not in one.log.read_text()
