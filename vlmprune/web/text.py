"""The command and the Python that give what the page shows, to be copied."""

from __future__ import annotations

import shlex

from vlmprune.checkpoints import build_text, has_bos
from vlmprune.web.ask import Results

PYTHON = """\
from pathlib import Path

import torch
import vlmprune
from transformers import AutoModelForImageTextToText, AutoProcessor
from vlmprune.images import open_rgb

source = {source!r}
model = AutoModelForImageTextToText.from_pretrained(source, dtype=torch.{dtype})
model = model.to({device!r}).eval()
processor = AutoProcessor.from_pretrained(source)
inputs = processor(
    text={text!r},
    images=open_rgb(Path({file!r}), "image"),
    return_tensors="pt",{settings}
).to(model.device, dtype=model.dtype)


def answer():
    new = model.generate(**inputs, max_new_tokens={limit}, do_sample=False, num_beams=1)
    new = new[0, inputs["input_ids"].shape[1] :]
    return processor.tokenizer.decode(new, skip_special_tokens=True).strip()


print("unpruned", answer(), sep=" | ")
for policy in [
{policies}]:
    with vlmprune.prune(model, vlmprune.policy_from(policy)) as run:
        print(policy, answer(), run.report().tokens.mean_per_layer, sep=" | ")
"""


def command(results: Results) -> str:
    """``vlmprune run`` with the same model, picture, question and policies, for a shell."""
    question, checkpoint = results.question, results.question.checkpoint
    lines = [
        f"vlmprune run --model {shlex.quote(checkpoint.source)}",
        f"--image {shlex.quote(question.file)}",
        f"--prompt {shlex.quote(question.prompt)}",
        f"--device {checkpoint.device} --dtype {checkpoint.dtype} --max-new-tokens {results.limit}",
        "--compare" if results.seen is None else "--compare --save kept.png",
        *(f"--policy {shlex.quote(policy)}" for policy in _policies(results)),
    ]
    return " \\\n    ".join(lines)


def python(results: Results) -> str:
    """A script that asks the same of the same model."""
    question, checkpoint = results.question, results.question.checkpoint
    text = build_text(checkpoint.processor, question.prompt, 1)
    own = has_bos(checkpoint.processor, [text])
    return PYTHON.format(
        source=checkpoint.source,
        dtype=checkpoint.dtype,
        device=checkpoint.device,
        text=text,
        file=question.file,
        settings="\n    add_special_tokens=False," if own else "",
        limit=results.limit,
        policies="".join(f"    {policy!r},\n" for policy in _policies(results)),
    )


def _policies(results: Results) -> list[str]:
    """Those that gave an answer, as typed."""
    return [column.fitted.text for column in results.columns if column.outcome and column.fitted]
