"""What captioner and selector share: a model of transformers that brings its tokenizer, and checked inputs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoTokenizer, PreTrainedModel

from vlmprune.errors import check

TOKENIZER = "tokenizer"


class Part(PreTrainedModel):  # type: ignore[misc]
    """A model of transformers around another one, with the tokenizer of that one; both are saved and loaded together.

    Attributes:
        tokenizer: of the language model or text encoder inside.
    """

    tokenizer: Any = None

    def save_pretrained(self, save_directory: str | Path, **settings: Any) -> None:
        """As transformers does it, and the tokenizer beside, in the folder ``tokenizer``."""
        super().save_pretrained(save_directory, **settings)
        if self.tokenizer is not None:
            self.tokenizer.save_pretrained(Path(save_directory) / TOKENIZER)

    @classmethod
    def from_pretrained(cls, name: str | Path, *args: Any, **settings: Any) -> Any:
        """As transformers does it, with the tokenizer saved beside."""
        loaded = super().from_pretrained(name, *args, **settings)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        model.tokenizer = AutoTokenizer.from_pretrained(name, subfolder=TOKENIZER)
        model._freeze()
        return loaded

    def _freeze(self) -> None:
        """Mark what is not trained; again after loading, which makes new parameters."""

    def _init_weights(self, module: nn.Module) -> None:
        """Ours start as torch starts them, at any width (transformers' 0.02 is for wide ones); of others, see there."""
        if isinstance(module, (nn.Linear, nn.LayerNorm)):
            module.reset_parameters()


def is_name(model: object) -> bool:
    """Whether it is the name or folder of a checkpoint rather than a model."""
    return isinstance(model, (str, Path))


def check_rebuilt(name: str, model: nn.Module, maker: Any) -> None:
    """Raise InputError unless ``maker.from_config`` makes a model with these weights: what is saved must be loadable."""
    with torch.device("meta"):
        made = maker.from_config(model.config)
    odd = sorted({*made.state_dict()} ^ {*model.state_dict()})[:2]
    check(not odd, name, f"the weights of a {type(made).__name__} as its configuration makes it", odd)


def check_questions(questions: Sequence[str]) -> None:
    """Raise InputError unless every question says something."""
    for question in questions:
        asked = isinstance(question, str) and bool(question.strip())
        check(asked, "question", "words", repr(question))


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """No dropout within; every module's mode is what it was, afterwards."""
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True
