"""What a training starts from: a describer's folder, or new parts around pretrained ones."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from vlmprune.compensation import Captioner, Describer, Selector, load_compensator
from vlmprune.errors import InputError, check, first_line

Part = TypeVar("Part")


@dataclass(frozen=True)
class Start:
    """Where the describer comes from: ``init``, or ``captioner_lm`` with or without ``text_encoder``.

    Args:
        init: folder of a describer.
        captioner_lm: folder or hub id of a causal language model, around which a new captioner is made. Its mapper is
            random, so that it has to be trained, too.
        text_encoder: folder or hub id of a text encoder, around which a new selector is made; None = there is none, and
            the likeliest candidate is taken.

    Raises:
        InputError: neither or both, or a text encoder beside a folder that has its own.
    """

    init: str | None = None
    captioner_lm: str | None = None
    text_encoder: str | None = None

    def __post_init__(self) -> None:
        one = (self.init is None) != (self.captioner_lm is None)
        got = "neither" if self.init is None else "both"
        check(one, "init", "a describer's folder as init, or else a captioner_lm", got)
        alone = self.init is None or self.text_encoder is None
        check(alone, "text_encoder", "none beside init, whose selector it has", repr(self.text_encoder))


def make_describer(start: Start, config: Any, seed: int, train_mapper: bool) -> Describer:
    """In float32 and on the CPU, made for a model with this configuration; what is random in it depends on the seed.

    Raises:
        InputError: nothing there to load, or widths that do not fit.
    """
    if start.init is not None:
        describer = load_compensator(start.init)
        check_widths(describer, config)
        return describer.float()
    check(train_mapper, "train_mapper", "True with a new captioner, whose mapper is random", train_mapper)
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        width, source = config.get_text_config().hidden_size, start.captioner_lm
        captioner = _read(
            "captioner_lm", "a causal language model", source, lambda: Captioner.make(width, source)
        )
        selector, source = None, start.text_encoder
        if source is not None:
            selector = _read("text_encoder", "a text encoder", source, lambda: Selector.make(source))
    return Describer(captioner, selector).float().eval()


def check_widths(describer: Describer, config: Any) -> None:
    """Raise InputError unless the captioner reads features as wide as this model's projector makes them."""
    width, made = config.get_text_config().hidden_size, describer.captioner.config.feature_width
    check(made == width, "init", f"a captioner for features of width {width}, as the model has them", made)


def _read(name: str, what: str, source: Any, make: Callable[[], Part]) -> Part:
    try:
        return make()
    except InputError:
        raise
    except (OSError, ValueError, ImportError) as error:
        raise InputError(f"{name}: expected {what}, got {source!r}: {first_line(error)}") from error
