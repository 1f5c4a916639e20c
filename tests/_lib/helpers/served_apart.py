"""An engine in a process of its own, for what needs more than one process or other surroundings: asks it, and says what it said."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import pytest

from helpers.served import CHECKPOINT, engine, question, said
from helpers.server import started


class Said(NamedTuple):
    """One answer."""

    ids: list[int]
    logprob: float
    prompt: int
    """Tokens of the prompt, as the engine counts them."""
    cached: int


class Request(NamedTuple):
    """A question to glyphworld's checkpoint, in a form that can be sent."""

    number: int = 0
    images: int = 1
    keep: int | float | None = None

    def prompt(self) -> dict[str, Any]:
        """As ``LLM.generate`` takes it."""
        more = {} if self.keep is None else {"vlmprune_keep": self.keep}
        return question(self.number, self.images).prompt(**more)


def heard(outputs: Sequence[Any]) -> list[Said]:
    """What an engine's outputs say; they are asked for with logprobs."""
    return [
        Said(
            [*output.outputs[0].token_ids],
            output.outputs[0].cumulative_logprob,
            len(output.prompt_token_ids),
            output.num_cached_tokens,
        )
        for output in outputs
    ]


def answers(llm: Any, requests: Sequence[Request], steps: int = 8, **sampling: Any) -> list[Said]:
    """Greedy answers of an engine."""
    return heard(said(llm, [request.prompt() for request in requests], steps, logprobs=0, **sampling))


def same(got: Sequence[Said], expected: Sequence[Said]) -> None:
    """AssertionError unless the same was said, to prompts of the same length, with about the same probability."""
    assert [one.ids for one in got] == [one.ids for one in expected]
    assert [one.prompt for one in got] == [one.prompt for one in expected]
    assert [one.logprob for one in got] == pytest.approx([one.logprob for one in expected], abs=1e-3)


def apart(
    requests: Sequence[Request],
    policy: Mapping[str, Any] | None,
    model: Path = CHECKPOINT,
    surroundings: Mapping[str, str] | None = None,
    **settings: Any,
) -> list[Said]:
    """Greedy answers of an engine in a new process, with ``surroundings`` added to its environment."""
    asked = {"requests": requests, "policy": policy, "model": str(model), "settings": settings}
    with TemporaryDirectory() as folder:
        log, answered = Path(folder) / "log", Path(folder) / "answers.json"
        command = ["-m", "helpers.served_apart", json.dumps(asked), str(answered)]
        with started(log, command, **(surroundings or {})) as process:
            assert process.wait(180) == 0, log.read_text()
        return [Said(*one) for one in json.loads(answered.read_text())]


def main() -> None:
    """Start the engine that the first argument describes, and write its answers to the file that the second names."""
    asked = json.loads(sys.argv[1])
    requests = [Request(*one) for one in asked["requests"]]
    with engine(Path(asked["model"]), asked["policy"], **asked["settings"]) as llm:
        Path(sys.argv[2]).write_text(json.dumps(answers(llm, requests)))


if __name__ == "__main__":
    main()
