"""Three compensators of one's own for ACCM, on a small model that reads: known words, a lookup, another model's captions.

    python -P examples/plug_in_words.py

A scene of 196 visual tokens is cut to 6, and a question is asked about it: without words, and with what each compensator says.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import AutoProcessor, LlavaForConditionalGeneration
from transformers.utils import logging

import vlmprune
from vlmprune.compensation import Discarded, Known

SCENES = Path(__file__).parent / "glyphworld"
READS = SCENES / "checkpoint-reads"
QUESTION, IMAGE = "what does the sign say ?", SCENES / "images/scene_70002.png"


class SceneGraph:
    """A lookup of what is known about images, for example by a detector that ran when they were stored.

    Args:
        facts: sentences; those that share a word with the question are told.
    """

    def __init__(self, facts: Sequence[str]) -> None:
        self.facts = facts

    def __call__(self, images: Sequence[Discarded], candidates: int) -> list[str]:
        """What fits the question of each image."""
        return [self._told({*image.question.split()}) for image in images]

    def _told(self, asked: set[str]) -> str:
        return " ".join(fact for fact in self.facts if asked & {*fact.split()} - {"the", "is", "a", "at"})


class OtherModel:
    """Captions by another model of transformers, which looks at the picture itself (here: the same one, unpruned).

    Args:
        model, processor: anything that generates text from image and text.
        picture: what the prompt's image shows.
    """

    def __init__(self, model: Any, processor: Any, picture: Image.Image) -> None:
        self.model, self.processor, self.picture = model, processor, picture

    @torch.inference_mode()
    def __call__(self, images: Sequence[Discarded], candidates: int) -> list[str]:
        """What it says when asked the same question."""
        return [f"sign {self._ask(image.question)} ." for image in images]

    def _ask(self, question: str) -> str:
        inputs = prompt(self.processor, question, self.picture)
        output = self.model.generate(**inputs, max_new_tokens=8, do_sample=False)
        new = output[0, inputs["input_ids"].shape[1] :]
        return str(self.processor.decode(new, skip_special_tokens=True)).strip()


def prompt(processor: Any, question: str, picture: Image.Image) -> Any:
    """One question about one picture, in the chat template."""
    content = [{"type": "image"}, {"type": "text", "text": question}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    return processor(text=text, images=picture, return_tensors="pt", add_special_tokens=False)


def main() -> None:
    """Ask, and print what was said and answered."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    model = LlavaForConditionalGeneration.from_pretrained(READS, dtype=torch.float32).eval()
    processor, picture = AutoProcessor.from_pretrained(READS), Image.open(IMAGE).convert("RGB")
    other = LlavaForConditionalGeneration.from_pretrained(SCENES / "checkpoint", dtype=torch.float32).eval()
    compensators = {
        "no words": Known([""]),
        "an OCR string": Known(["sign R Z C ."]),  # as a reader of signs would give it
        "another's string": Known(["sign A B C ."]),  # words are believed, right or wrong
        "a scene graph": SceneGraph(["medium red knight at row 1 col 1 .", "sign R Z C ."]),
        "another model": OtherModel(other, processor, picture),
    }
    inputs = prompt(processor, QUESTION, picture)
    for name, compensator in compensators.items():
        policy = vlmprune.ACCM(vlmprune.Uniform(layer=0), compensator, keep=6, wording="{}")
        with vlmprune.prune(model, policy) as run:
            output = model.generate(**inputs, max_new_tokens=8, do_sample=False)
        said = processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        words = run.report().captions[0][0]
        print(f"{name:18} {words or '-':24} -> {said.strip()}")


if __name__ == "__main__":
    main()
