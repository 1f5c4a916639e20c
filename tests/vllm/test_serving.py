"""examples/serving as its README has it: a server by one command, a client, a short load; and what the scripts refuse."""

import json
import subprocess
import sys

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed (make test-vllm)")

from helpers.served import ROOT, SCENES, environment
from helpers.server import free_port, listening

SERVING = ROOT / "examples" / "serving"
QUESTION = 8  # tokens beside the picture's: <bos> USER: locate the green phone . ASSISTANT:
EAGER = ("--enforce-eager", "--block-size", "32", "--max-model-len", "768")


def run(script, *args):
    command = [sys.executable, "-P", str(SERVING / script), *args]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment())


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """A pruned server's address."""
    port, log = free_port(), tmp_path_factory.mktemp("server") / "log"
    start = [str(SERVING / "serve.py"), "--policy=divprune:keep=64,positions=pack", f"--port={port}", *EAGER]
    with listening(log, start, port) as one:
        yield one.url


def ask(server, *more):
    return run(
        "client.py", "locate the green phone .", "--image", str(SCENES[0]), "--url", f"{server}/v1", *more
    )


def test_a_client_is_answered_and_pays_for_the_kept_tokens(server):
    answer, cost = ask(server).stdout.splitlines()
    assert all(word.isdecimal() for word in answer.split())  # a box, in glyphworld's words
    assert cost.startswith(f"{64 + QUESTION} prompt tokens")


def test_a_request_has_a_budget_of_its_own(server):
    assert ask(server, "--keep", "32").stdout.splitlines()[1].startswith(f"{32 + QUESTION} prompt tokens")
    refused = ask(server, "--keep", "65")
    assert refused.returncode == 1
    assert "vlmprune_keep: expected at most 64 of this image's 576 tokens (more" in refused.stderr


def test_load_counts_what_the_server_did(server, tmp_path):
    out = tmp_path / "load.json"
    short = ("--streams", "1", "4", "--requests", "8", "--answer", "12", "--warmup", "2")
    ran = run("load.py", "--url", server, "--json", str(out), *short)
    assert ran.returncode == 0, ran.stderr
    one, four = json.loads(out.read_text())
    assert [one["streams"], four["streams"]] == [1, 4]
    assert one["requests"] == 8 and four["requests"] == 16
    for level in (one, four):
        assert not level["errors"]
        assert level["tokens_per_s"] == pytest.approx(12 * level["requests_per_s"])  # every answer has twelve
        assert 64 < level["prompt_tokens"] < 64 + 16
        assert level["pictures_cached"] == 0 == level["prefix_cached"]
        assert 0 < level["ttft_median"] <= level["ttft_p95"] < level["seconds"]
    # looked at five times a second: of one stream perhaps between two answers
    assert 0 <= one["kv_peak"] <= four["kv_peak"] < 1
    assert four["kv_peak"] > 0


def test_time_ends_a_level(server, tmp_path):
    out = tmp_path / "load.json"
    short = ("--streams", "2", "--requests", "500", "--seconds", "2")
    run("load.py", "--url", server, "--json", str(out), *short)
    (level,) = json.loads(out.read_text())
    assert 2 <= level["seconds"] < 10 and level["requests"] < 200


def test_load_says_so_where_nothing_is_answered(server):
    ran = run(
        "load.py", "--url", server, "--answer", "5000", "--streams", "2", "--requests", "3", "--warmup", "3"
    )
    assert ran.returncode == 1
    assert "0 answers; errors" in ran.stderr and "max_tokens" in ran.stderr
