"""Two models that answer one prompt: the small one first, the large one if that is not sure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from PIL import Image
from torch import Tensor

from vlmprune.checkpoints import Checkpoint, build_text, generate, make_inputs
from vlmprune.errors import check
from vlmprune.guidance.first import answer_first, consistency
from vlmprune.models import Run
from vlmprune.policies.checks import check_keep, check_share, is_number
from vlmprune.policies.methods.sgl import SGL


@dataclass(frozen=True, eq=False)
class Answer:
    """What came of a question.

    Attributes:
        text: the answer.
        by: which model gave it.
        first: the small model's answer.
        confidence, consistency: of that, in [0, 1]; consistency is None where nothing asked for it.
        score: their mean, by which a small model's answer is taken; None likewise.
        run: the large model's, pruned; None where it was not asked.
    """

    text: str
    by: Literal["small", "large"]
    first: str
    confidence: float
    consistency: float | None
    score: float | None
    run: Run | None


@dataclass(frozen=True)
class Stitch:
    """Two models that answer together: the small one first, and the large one, pruned by what it looked at, if need be.

    The small answer is taken where the mean of confidence and consistency reaches ``threshold``. The released code
    computes the two, and asks the large model in any case; how they are joined stands there as comments, product and
    average, and the average is our reading. It names no threshold.

    Args:
        small, large: checkpoints; the same one guides itself.
        depth: share of the large decoder's layers before the stage, ``int(depth * layers)``, as released.
        keep: what stays there, a share or a number per image; 0.4 is that of the authors' script, as is that of ``depth``.
        threshold: in [0, 1]; None (default) = the large model is always asked.
        left: what the small model sees of the visual tokens when its answer is tried again.

    Raises:
        InputError: a setting is out of range.

    Example:
        >>> from vlmprune.checkpoints import Checkpoint
        >>> from vlmprune.guidance import Stitch
        >>> from PIL import Image
        >>> world = Checkpoint("examples/glyphworld/checkpoint", device="cpu")
        >>> image = Image.open("examples/glyphworld/images/scene_70001.png")
        >>> answer = Stitch(world, world, threshold=0.9).ask([image], "how many phones are there ?")
        >>> answer.by in ("small", "large"), 0 <= answer.score <= 1
        (True, True)
    """

    small: Checkpoint
    large: Checkpoint
    depth: float = 0.4
    keep: int | float = 0.4
    threshold: float | None = None
    left: int | float = 0.05

    def __post_init__(self) -> None:
        for name in ("small", "large"):
            check(
                isinstance(getattr(self, name), Checkpoint), name, "a Checkpoint", repr(getattr(self, name))
            )
        fits = is_number(self.depth) and 0 <= self.depth < 1
        check(fits, "depth", "a share in [0, 1)", repr(self.depth))
        check_keep(self.keep)
        check_keep(self.left, "left")
        if self.threshold is not None:
            check_share("threshold", self.threshold)

    @property
    def layer(self) -> int:
        """Where the large model is pruned."""
        return int(self.large.config.text_config.num_hidden_layers * self.depth)

    def ask(self, images: Sequence[Image.Image], text: str, max_new_tokens: int = 64) -> Answer:
        """One prompt, as ``vlmprune run`` takes it: typed, or in the checkpoints' own chat templates.

        Raises:
            InputError: what one of the processors does not take; images that the two models see in different grids.
            ModelError: a model that cannot be pruned.
        """
        small, inputs = self.small, _inputs(self.small, images, text)
        first = answer_first(small.model, inputs, max_new_tokens)
        said, sure = _text(small, first.tokens), first.confidence.item()
        steady = score = None
        if self.threshold is not None:
            steady = consistency(small.model, inputs, first, self.left).item()
            score = (sure + steady) / 2
            if score >= self.threshold:
                return Answer(said, "small", said, sure, steady, score, None)
        policy = SGL(first.guidance, layer=self.layer, keep=self.keep)
        asked = _inputs(self.large, images, text)
        run, tokens = generate(self.large.model, asked, policy, max_new_tokens=max_new_tokens)
        return Answer(_text(self.large, tokens), "large", said, sure, steady, score, run)


def _inputs(checkpoint: Checkpoint, images: Sequence[Image.Image], text: str) -> Any:
    """One prompt for a checkpoint, where its model is."""
    prompt = build_text(checkpoint.processor, text, len(images))
    inputs = make_inputs(checkpoint.processor, [prompt], [list(images)], "images")
    return inputs.to(checkpoint.model.device, dtype=checkpoint.model.dtype)


def _text(checkpoint: Checkpoint, tokens: Tensor) -> str:
    """The answer of a batch of one."""
    said: str = checkpoint.processor.tokenizer.batch_decode(tokens, skip_special_tokens=True)[0]
    return said.strip()
