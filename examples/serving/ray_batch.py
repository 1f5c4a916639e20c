"""Answers a file of questions about pictures with vLLM engines that prune, several at once, through Ray Data's own vLLM stage.

    python examples/glyphworld/make_questions.py --seeds 70001:70101 --out asked
    python examples/serving/ray_batch.py asked/questions.jsonl --out answers.jsonl --workers 2

A line of the questions is {"id", "image", "prompt"}: the picture's path (from the file's folder) and the bare question, which
the checkpoint's chat template frames. "vlmprune_keep" in a line is a budget of its own: tokens per image, or a share. A line
of the answers is {"id", "answer", "prompt_tokens", "kept_tokens"}, or {"id", "error"} where that one question could not be
answered; they come in the order of the questions, all at the end, so a run that was killed leaves nothing and is repeated.
The exit status is 1 where there are errors.

Every worker is an engine with one CPU core. For GPUs leave out ``placement_group_config`` and what ``CPU`` and ``ENGINE``
say of the CPU: Ray Data then reserves ``tensor_parallel_size * pipeline_parallel_size`` GPUs for each engine. Ray passes
``engine_kwargs`` on to ``vllm.AsyncEngineArgs`` as they are, so ``hf_overrides`` turns pruning on there as here; vlmprune
must be installed on every node, and the pictures must lie where every node can read them.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from math import ceil
from pathlib import Path
from typing import Any

import ray
from PIL import Image
from ray.data.llm import build_processor, vLLMEngineProcessorConfig
from transformers import AutoConfig, AutoProcessor

from vlmprune.errors import InputError, check
from vlmprune.integrations.vllm import ARCHITECTURES
from vlmprune.integrations.vllm.settings import Settings

CHECKPOINT = Path(__file__).resolve().parents[1] / "glyphworld" / "checkpoint"
PRUNING = {"policy": "divprune", "keep": 64, "positions": "pack"}
ENGINE = {"dtype": "float32", "enforce_eager": True}
CPU = {
    "OMP_NUM_THREADS": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # engines that bind their threads all take the first cores
}
FAILED = "__inference_error__"  # Ray's column; a row that has it filled is passed by the engine
Row = dict[str, Any]


def main() -> int:
    """Read the questions, answer them, write the answers; returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("questions", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--model", default=str(CHECKPOINT), help="folder or name of a checkpoint")
    parser.add_argument("--vlmprune", type=json.loads, default=PRUNING, help="JSON, as in hf_overrides")
    parser.add_argument("--workers", type=int, default=2, help="engines")
    parser.add_argument("--batch", type=int, default=32, help="questions that a worker takes at a time")
    parser.add_argument("--max-tokens", type=int, default=16, help="of an answer")
    parser.add_argument("--address", default="local", help="of a running Ray, or: local")
    args = parser.parse_args()
    try:
        asked = read_questions(args.questions)
        pruning = hf_overrides(args.model, args.vlmprune)
    except InputError as error:
        parser.error(str(error))
    began = time.perf_counter()
    ray.init(
        args.address,
        num_cpus=2 * args.workers if args.address == "local" else None,  # one more each reads pictures
        include_dashboard=False if args.address == "local" else None,
        log_to_driver=False,
    )
    try:
        answers = answer_all(asked, pruning, args)
    finally:
        ray.shutdown()
    write(answers, args.out)
    seconds = time.perf_counter() - began
    errors = sum("error" in answer for answer in answers)
    print(
        f"{len(answers)} questions, {errors} errors, {args.workers} workers: {seconds:.1f} s with the start of the engines, "
        f"{len(answers) / seconds:.2f} rows/s; {args.out}"
    )
    return 1 if errors else 0


def read_questions(file: Path) -> list[Row]:
    """The rows of a file, pictures as paths that do not depend on the folder a worker runs in.

    Raises:
        InputError: a line that is no question.
    """
    asked = []
    for number, line in enumerate(file.read_text().splitlines(), 1):
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            row = None
        fields = isinstance(row, dict) and all(isinstance(row.get(k), str) for k in ("id", "image", "prompt"))
        check(fields, f"{file}:{number}", 'an object with the texts "id", "image" and "prompt"', line[:80])
        asked.append({**row, "image": str(file.parent.resolve() / row["image"])})
    check(bool(asked), str(file), "at least one question", "none")
    return asked


def hf_overrides(model: str, pruning: Row) -> Row:
    """What turns pruning on. Every engine checks it at its start; here it is refused before anything starts.

    Raises:
        InputError: a model or a policy that cannot be pruned in vLLM.
    """
    config = AutoConfig.from_pretrained(model)
    config.vlmprune = pruning
    Settings.of(config)
    return {"architectures": [ARCHITECTURES[config.model_type][0]], "vlmprune": pruning}


def answer_all(asked: Sequence[Row], pruning: Row, args: argparse.Namespace) -> list[Row]:
    """The answers, in the order of the questions."""
    processor = AutoProcessor.from_pretrained(args.model)
    config = vLLMEngineProcessorConfig(
        model_source=args.model,
        engine_kwargs={**ENGINE, "hf_overrides": pruning},
        placement_group_config={"bundles": [{"CPU": 1}]},
        runtime_env={"env_vars": {name: os.environ.get(name, usual) for name, usual in CPU.items()}},
        concurrency=(args.workers, args.workers),
        batch_size=args.batch,
        should_continue_on_error=True,
        log_engine_metrics=False,
        chat_template_stage=False,  # questions are framed and tokenized here: two processes less on every node
        tokenize_stage=False,
        detokenize_stage=False,
    )
    context = ray.data.DataContext.get_current()
    context.wait_for_min_actors_s = 600  # else the engine that is up first takes all it can get
    context.enable_progress_bars = False
    answering = build_processor(
        config, preprocess=asking(args.max_tokens), postprocess=telling(processor.image_token_id)
    )
    rows = [
        {"number": i, "ids": framed(processor, row["prompt"]), "asked": json.dumps(row)}
        for i, row in enumerate(asked)
    ]
    parts = ceil(len(rows) / args.batch)
    made = answering(ray.data.from_items(rows, override_num_blocks=parts)).take_all()
    by_number = {row["number"]: row for row in made}
    return [told(asked[i]["id"], by_number[i]) for i in range(len(asked))]


def framed(processor: Any, question: str) -> list[int]:
    """Token ids of a prompt with one placeholder for the picture. As ids, for a template writes its own ``<bos>``."""
    content = [{"type": "image"}, {"type": "text", "text": question}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    return list(processor.tokenizer(text, add_special_tokens=False)["input_ids"])


def asking(max_tokens: int) -> Callable[[Row], Row]:
    """What makes an engine's request of a row, on a worker."""

    def request(row: Row) -> Row:
        asked = json.loads(row["asked"])  # as text until here: a column of a table makes floats of 64 and 0.5
        made: Row = {
            "tokenized_prompt": list(row["ids"]),
            "sampling_params": {"temperature": 0.0, "max_tokens": max_tokens},
            "mm_processor_kwargs": {"vlmprune_keep": asked.get("vlmprune_keep")},
            FAILED: "",
        }
        try:
            made["multimodal_data"] = {"image": Image.open(asked["image"]).convert("RGB")}
        except OSError as error:
            made[FAILED] = f"image: {error}"
        return made

    return request


def telling(image_token: int) -> Callable[[Row], Row]:
    """What remains of an engine's answer. The prompt has one token for every visual token that stayed."""

    def result(row: Row) -> Row:
        return {
            "number": row["number"],
            "answer": row["generated_text"].strip(),
            "prompt_tokens": row["num_input_tokens"],
            "kept_tokens": list(row["prompt_token_ids"]).count(image_token),
        }

    return result


def told(name: str, row: Row) -> Row:
    """A line of the answers."""
    if row[FAILED]:
        return {"id": name, "error": " ".join(row[FAILED].split())}
    return {"id": name, **{field: row[field] for field in ("answer", "prompt_tokens", "kept_tokens")}}


def write(answers: Sequence[Row], out: Path) -> None:
    """The whole file or none."""
    part = out.with_name(out.name + ".part")
    part.write_text("".join(json.dumps(answer) + "\n" for answer in answers))
    os.replace(part, out)


if __name__ == "__main__":
    sys.exit(main())
