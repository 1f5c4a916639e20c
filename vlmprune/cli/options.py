"""Options that several commands have, and how they open a checkpoint."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Literal, TypeVar

import typer

from vlmprune.cli.console import waiting
from vlmprune.errors import InputError

if TYPE_CHECKING:
    from vlmprune.checkpoints import Checkpoint

log = logging.getLogger(__name__)
Number = TypeVar("Number", int, float)

Model = Annotated[str, typer.Option(help="Checkpoint folder or hub id of a supported vision-language model.")]
POLICY = "NAME[:field=x, ...], several joined by +, & or |, or a YAML file"
Policies = Annotated[list[str] | None, typer.Option(help=f"{POLICY}; repeatable. See `vlmprune list`.")]
MaxNewTokens = Annotated[int, typer.Option(min=1, help="Longest answer.")]
Precision = Literal["auto", "float32", "bfloat16", "float16"]
AUTO = "auto = as the checkpoint stores it, or float32 on a CPU that is slow in that."
Device = Annotated[Literal["auto", "cpu", "cuda"], typer.Option(help="auto = cuda if there is one.")]
DTYPES = "float32, bfloat16, float16, or"
Dtype = Annotated[Precision, typer.Option(metavar="<dtype>", help=f"{DTYPES} {AUTO}")]
Attention = Annotated[
    Literal["sdpa", "eager", "flash_attention_2", "vlmprune"],
    typer.Option(metavar="<name>", help="The model's attention: sdpa, eager, flash_attention_2 or vlmprune."),
]
AsJson = Annotated[bool, typer.Option("--json", help="One JSON object on stdout and nothing else there.")]


def open_checkpoint(model: str, device: str, dtype: str, attn: str) -> Checkpoint:
    """What a command is to load; nothing is read yet."""
    with waiting("importing torch and transformers"):
        from vlmprune.checkpoints import Checkpoint  # first: refuses other versions of transformers

        silence_transformers()
        from huggingface_hub.constants import HF_HUB_CACHE
    log.info("downloads are kept in %s", HF_HUB_CACHE)
    return Checkpoint(model, device, dtype, attn)


def read_numbers(text: str, kind: Callable[[str], Number], name: str) -> tuple[Number, ...]:
    """What ``kind`` reads from ``1,4,16``. Raises InputError, which calls it ``name``, for anything else.

    >>> read_numbers("0.48,0.64", float, "budgets")
    (0.48, 0.64)
    """
    try:
        return tuple(map(kind, text.split(",")))
    except ValueError as error:
        raise InputError(f"{name}: expected numbers separated by commas, got {text!r}") from error


def silence_transformers() -> None:
    """The command line has its own messages."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
