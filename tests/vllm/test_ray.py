"""The Ray Data example as a user runs it: two engines at once answer as one engine does, and bad rows cost no others."""

import json
import os
import signal
import subprocess
import sys
from importlib.util import module_from_spec, spec_from_file_location

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed (make test-vllm)")
pytest.importorskip("ray.data", reason="Ray is not installed (make test-vllm)")

from PIL import Image

from helpers.served import CHECKPOINT, ROOT, SCENES, Asked, engine, environment, said

EXAMPLE = ROOT / "examples" / "serving" / "ray_batch.py"
PRUNING = {"policy": "divprune", "keep": 64, "max_keep": 100, "positions": "pack"}
BUDGETS = {1: 16, 2: 0.25, 4: 100, 6: 0.5}
TOO_MUCH, NO_PICTURE = 3, 5


def framed(row):
    return f"<bos> USER: <image> {row['prompt']} ASSISTANT:"


def questions():
    """Eight, of two pictures; as make_questions.py writes them, with budgets of their own."""
    bare = ("locate the green phone .", "what does the sign say ?", "how many phones are there ?")
    rows = [
        {"id": f"{i}-asked", "image": str(SCENES[i % 2]), "prompt": bare[i % len(bare)]} for i in range(8)
    ]
    for i, keep in BUDGETS.items():
        rows[i]["vlmprune_keep"] = keep
    rows[TOO_MUCH]["vlmprune_keep"] = 101
    rows[NO_PICTURE]["image"] = "nowhere.png"
    return rows


def run(folder, rows, *options):
    """Answers, exit status and what was printed; nothing that it started is left."""
    (folder / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = folder / "answers.jsonl"
    command = [
        sys.executable,
        "-P",
        str(EXAMPLE),
        str(folder / "questions.jsonl"),
        "--out",
        str(out),
        *options,
    ]
    quiet = environment(RAY_USAGE_STATS_ENABLED="0", RAY_AUTH_MODE="disabled")
    started = subprocess.Popen(
        command,
        env=quiet,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        printed, _ = started.communicate(timeout=240)
    except subprocess.TimeoutExpired:
        os.killpg(started.pid, signal.SIGKILL)
        raise
    lines = out.read_text().splitlines() if out.exists() else []
    return [json.loads(line) for line in lines], started.returncode, printed


def one_engine(rows):
    """The same lines from a single engine in this process."""
    prompts = []
    for row in rows:
        own = {"vlmprune_keep": row["vlmprune_keep"]} if "vlmprune_keep" in row else {}
        prompts.append(Asked(framed(row), (Image.open(row["image"]).convert("RGB"),)).prompt(**own))
    with engine(CHECKPOINT, PRUNING) as llm:
        outputs = said(llm, prompts, steps=16)
        image = llm.get_tokenizer().convert_tokens_to_ids("<image>")
    return [
        {
            "id": row["id"],
            "answer": output.outputs[0].text.strip(),
            "prompt_tokens": len(output.prompt_token_ids),
            "kept_tokens": output.prompt_token_ids.count(image),
        }
        for row, output in zip(rows, outputs, strict=True)
    ]


def test_two_workers_answer_as_one_engine_and_bad_rows_cost_no_others(tmp_path):
    rows = questions()
    answers, status, printed = run(tmp_path, rows, "--batch", "4", "--vlmprune", json.dumps(PRUNING))
    assert status == 1, printed
    assert [answer["id"] for answer in answers] == [row["id"] for row in rows]
    assert "8 questions, 2 errors, 2 workers" in printed
    bad = [answers.pop(i) for i in (NO_PICTURE, TOO_MUCH)]
    assert all(answer.keys() == {"id", "error"} and "\n" not in answer["error"] for answer in bad)
    assert "nowhere.png" in bad[0]["error"]
    assert "vlmprune_keep: expected at most 100 of this image's 196 tokens (more" in bad[1]["error"]
    good = [row for i, row in enumerate(rows) if i not in (NO_PICTURE, TOO_MUCH)]
    assert answers == one_engine(good)
    assert [answer["kept_tokens"] for answer in answers] == [64, 16, 49, 100, 98, 64]


@pytest.fixture(scope="module")
def example():
    spec = spec_from_file_location("ray_batch", EXAMPLE)
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("rows", "pruning", "expected"),
    [
        ([], PRUNING, "questions.jsonl: expected at least one question, got none"),
        ([*questions()[:1], {"id": "x"}], PRUNING, "questions.jsonl:2: expected an object with the texts"),
        (questions(), {"policy": "fastv", "layer": 2, "keep": 9}, "FastV: expected a policy that prunes at layer 0 alone"),
        (questions(), 64, "hf_overrides['vlmprune']: expected a dict as in "),
    ],
)  # fmt: skip
def test_what_cannot_be_asked_is_refused_before_anything_starts(
    example, tmp_path, monkeypatch, capsys, rows, pruning, expected
):
    asked, out = tmp_path / "questions.jsonl", tmp_path / "answers.jsonl"
    asked.write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = ["ray_batch.py", str(asked), "--out", str(out), "--vlmprune", json.dumps(pruning)]
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(SystemExit) as left:
        example.main()
    assert left.value.code == 2
    assert expected in capsys.readouterr().err.splitlines()[-1]
    assert not out.exists()
    assert not example.ray.is_initialized()
