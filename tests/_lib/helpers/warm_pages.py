"""The warm process of tests/pages: has the models' code imported, runs pages of the docs. ``python -m helpers.warm_pages SOCKET``."""

import json
import re
import shutil
import subprocess
import sys
import time
import types
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import AutoProcessor, LlavaForConditionalGeneration

import vlmprune.checkpoints
import vlmprune.cli.run
import vlmprune.eval
from helpers.said import check_noted
from helpers.warm import run, serve

MODEL = "llava-hf/llava-1.5-7b-hf"
BASH = shutil.which("bash")
FILE = re.compile(r"# (\w+\.py)\n")
"""The first line of a block that is a file, which other blocks import."""
ASKED = "USER: <image>\nWhere is the dog? ASSISTANT:"


def given() -> dict[str, Any]:
    """Names that a page may take for granted: what it says it has from "Start"."""
    model, processor = (
        LlavaForConditionalGeneration.from_pretrained(MODEL),
        AutoProcessor.from_pretrained(MODEL),
    )
    image = Image.open("photo.jpg").convert("RGB")
    return {
        "vlmprune": vlmprune,
        "torch": torch,
        "model": model,
        "small": model,
        "processor": processor,
        "image": image,
        "images": [[image], [image]],
        "texts": [ASKED, ASKED],
        "inputs": processor(text=ASKED, images=image, return_tensors="pt"),
        "labels": torch.zeros(2, 196),
        "score": lambda policy: 1.0,
        "policy": vlmprune.FastV(layer=2, keep=64),
    }


def run_page(argv: list[str]) -> None:
    """Run a page's blocks in order, Python in one namespace. ``argv``: the program, and a JSON file with the blocks."""
    blocks = json.loads(Path(argv[1]).read_text())
    wanted = {name for block in blocks for name in block["given"]}
    page = sys.modules["__main__"] = types.ModuleType("__main__")  # where a class of the page is looked for
    if wanted:
        vars(page).update({name: value for name, value in given().items() if name in wanted})
    for block in blocks:
        began = time.perf_counter()
        say(f"--- {block['page']}:{block['line']}")
        if file := FILE.match(block["text"]):
            Path(file[1]).write_text(block["text"])
            sys.path.insert(0, "")
        elif block["language"] == "python":
            lines = "\n" * (block["line"] - 1) + block["text"]
            exec(compile(lines, block["page"], "exec"), vars(page))
        else:
            done = subprocess.run([BASH, "-eo", "pipefail", "-c", block["text"]], check=False)
            if done.returncode:
                raise SystemExit(f"{block['page']}:{block['line']}: exit code {done.returncode}")
        say(f"--- took {time.perf_counter() - began:.1f} s")


def say(text: str) -> None:
    """Into the output of the blocks, in their order."""
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    for name in ("clip", "llama", "llava"):
        import_module(f"transformers.models.{name}.modeling_{name}")
    serve(sys.argv[1], {"run": run, "check": check_noted, "page": run_page})
