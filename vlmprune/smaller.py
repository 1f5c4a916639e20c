"""Pictures made smaller, to as many visual tokens as pruning would leave: the baseline that needs no pruning.

VTC-Bench (Liao et al., "Are We Using the Right Benchmark", arXiv 2510.07143) finds it ahead of many methods on the usual
benchmarks. There it is asked of Qwen2-VL, which takes pictures of any size; here also of LLaVA, whose tower then sees a
smaller square with its position embeddings interpolated.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import isqrt
from typing import Any, NamedTuple

from PIL import Image

from vlmprune.checkpoints import is_visual, make_inputs
from vlmprune.errors import InputError, ModelError, check
from vlmprune.flops import decoder_flops
from vlmprune.models import Report, find_parts, patch_grid
from vlmprune.models.host.parts import decoder_shape
from vlmprune.policies.checks import check_keep
from vlmprune.policies.counts import keep_count
from vlmprune.policies.recipe import read_setting
from vlmprune.policies.syntax import parse

NAME = "smaller"
ONE_SIZE = ("llava",)
"""Families whose tower takes one size: it is shown a smaller square."""
ANY_SIZE = ("llava_next", "llava_onevision", "qwen2_vl", "qwen2_5_vl", "qwen3_vl")
"""Families whose tokens follow from the size of the picture: it is resized before the processor."""
CUBIC = Image.Resampling.BICUBIC
BENT = 0.02
"""How much a picture's shape may change when its smaller sides are rounded to whole pixels."""
Size = tuple[int, int]
"""Width and height in pixels."""


@dataclass(frozen=True)
class Smaller:
    """How small: nothing is pruned, the decoder is the same, and the prompt has fewer visual tokens from the start.

    Args:
        keep: share (float) of a picture's visual tokens, or visual tokens per picture (int): at most so many, and as near
            as the sizes that the model can see come to it.

    Raises:
        InputError: out of range.

    >>> Smaller.read("smaller:keep=64"), Smaller.read("fastv:keep=64")
    (Smaller(keep=64), None)
    """

    keep: int | float = 0.25

    def __post_init__(self) -> None:
        check_keep(self.keep)

    @classmethod
    def read(cls, text: str) -> Smaller | None:
        """What ``smaller[:keep=value]`` says; None where a policy is named. Raises InputError for another field or value."""
        if text.partition(":")[0].strip() != NAME:
            return None
        said = parse(text)
        for field in said:
            check(field in ("policy", "keep"), NAME, "the field keep", repr(field))
        return cls(read_setting(said["keep"], int | float, "keep")) if "keep" in said else cls()


class Plan(NamedTuple):
    """One picture: its visual tokens as it is and in small, and the size that it is given."""

    whole: int
    shown: int
    size: Size


@dataclass(frozen=True)
class Shown:
    """A batch as the model is asked it.

    Attributes:
        inputs: token ids, padded on the left, and pixel values.
        whole: visual tokens of each sample with its pictures as they are.
        shown: visual tokens of each sample in these inputs.
    """

    inputs: Any
    whole: tuple[int, ...]
    shown: tuple[int, ...]

    def to(self, device: Any, dtype: Any) -> Shown:
        """On a device, pixels in ``dtype``."""
        return dataclasses.replace(self, inputs=self.inputs.to(device, dtype=dtype))

    def report(self, report: Report, config: Any) -> Report:
        """The report of a run on these inputs, beside the same prompts with their pictures as they are (padding included)."""
        lengths = self.inputs["attention_mask"].sum(1).tolist()
        longest = max(n - few + many for n, few, many in zip(lengths, self.shown, self.whole, strict=True))
        shape = decoder_shape(config)
        before, now = (
            decoder_flops(shape, [n] * shape.layers) for n in (longest, self.inputs["input_ids"].shape[1])
        )
        flops = dataclasses.replace(report.flops, full=report.flops.full // now * before)  # of every beam
        return dataclasses.replace(report, visual_tokens=sum(self.whole) / len(self.whole), flops=flops)


def as_they_are(config: Any, inputs: Any) -> Shown:
    """A batch whose pictures nobody made smaller."""
    counts = tuple(is_visual(config, inputs["input_ids"]).sum(1).tolist())
    return Shown(inputs, counts, counts)


class SmallPictures:
    """Makes pictures smaller for one checkpoint. What it found for a size it remembers."""

    def __init__(self, config: Any, processor: Any) -> None:
        """Note whose.

        Raises:
            ModelError: its pictures cannot be made smaller.
        """
        kind = config.model_type
        if kind not in ONE_SIZE + ANY_SIZE:
            known = ", ".join(ONE_SIZE + ANY_SIZE)
            raise ModelError(
                f"smaller: expected a model of type {known}, got {kind!r} (it cuts whole tiles of one size out of any picture)"
            )
        self._config, self._processor, self._resizes = config, processor, kind in ANY_SIZE
        self._counts: dict[Size, list[tuple[int, Size]]] = {}

    def plan(self, size: Size, keep: int | float) -> Plan:
        """What a picture of this size becomes. Raises InputError if the model can see none with so few tokens."""
        if not self._resizes:
            return self._square(keep)
        if size not in self._counts:
            self._counts[size] = self._count(size)
        counts = self._counts[size]
        whole = counts[-1][0]
        budget = keep_count(keep, whole)
        fits = [(tokens, smaller) for tokens, smaller in counts if tokens <= budget]
        least = min(tokens for tokens, _ in counts)
        expected = f"at least {least} tokens for {size[0]} x {size[1]} pixels (the processor makes no fewer of this shape)"
        check(bool(fits), NAME, expected, budget)
        return Plan(whole, *max(fits))  # of as many tokens the largest picture

    def inputs(
        self, texts: Sequence[str], images: Sequence[list[Image.Image]], keep: int | float, name: str
    ) -> Shown:
        """A batch with smaller pictures, on the CPU; arguments but ``keep`` as for ``vlmprune.checkpoints.make_inputs``.

        Raises:
            InputError: as ``make_inputs``, or the model can see no picture with so few tokens.
        """
        alone = self._config.model_type != "llava_onevision" or all(len(some) < 2 for some in images)
        check(alone, name, "one picture a prompt (llava_onevision shows several at one size)", "several")
        plans = [[self.plan(image.size, keep) for image in some] for some in images]
        settings = {}
        if self._resizes:
            images = [
                [image.resize(plan.size, CUBIC) for image, plan in zip(some, its, strict=True)]
                for some, its in zip(images, plans, strict=True)
            ]
        elif any(images):
            settings = self._square_settings(self._square(keep))
        inputs = make_inputs(self._processor, texts, images, name, **settings)
        got = as_they_are(self._config, inputs).shown
        shown = tuple(sum(plan.shown for plan in its) for its in plans)
        whole = tuple(sum(plan.whole for plan in its) for its in plans)
        check(got == shown, name, f"{shown} visual tokens from the processor, as it said", got)
        return Shown(inputs, whole, shown)

    @contextmanager
    def tower(self, model: Any) -> Iterator[None]:
        """Let the vision tower of ``model`` take smaller squares inside the block; pictures as they are it sees as ever."""
        if self._resizes:
            yield
            return
        hook = find_parts(model).vision.register_forward_pre_hook(_interpolate, with_kwargs=True)
        try:
            yield
        finally:
            hook.remove()

    def _square(self, keep: int | float) -> Plan:
        """The largest square of patches that the tower can be shown."""
        vision, (rows, columns) = self._config.vision_config, patch_grid(self._config)
        check(rows == columns, NAME, "a tower that sees squares", f"{rows} x {columns} patches")
        side = isqrt(keep_count(keep, rows * columns))
        pixels = vision.image_size if side == rows else side * vision.patch_size
        return Plan(rows * columns, side * side, (pixels, pixels))

    def _square_settings(self, plan: Plan) -> dict[str, Any]:
        """The image processor's own resizing and cropping, to scale."""
        given, full = self._processor.image_processor, self._config.vision_config.image_size
        check(given.do_resize, NAME, "an image processor that resizes", "one with do_resize=False")
        sizes = {"size": given.size} | ({"crop_size": given.crop_size} if given.do_center_crop else {})
        return {
            name: {edge: round(pixels * plan.size[0] / full) for edge, pixels in dict(size).items()}
            for name, size in sizes.items()
        }

    def _count(self, size: Size) -> list[tuple[int, Size]]:
        """Visual tokens of the picture at every size of its shape, ascending, itself last; by the processor's own count."""
        longest, shortest = max(size), min(size)
        # Rounded up: a picture never gets slimmer than it is, which processors may refuse.
        short = {n: -(-shortest * n // longest) for n in range(1, longest + 1)}
        sizes = [
            tuple(n if edge == longest else other for edge in size)
            for n, other in short.items()
            if other * longest <= n * shortest * (1 + BENT)
        ]
        asked = [(height, width) for width, height in sizes]
        try:
            counts = self._processor._get_num_multimodal_tokens(image_sizes=asked)["num_image_tokens"]
        except ValueError as error:
            raise InputError(f"{NAME}: expected a picture that the processor takes, got: {error}") from error
        return [(tokens, (width, height)) for tokens, (width, height) in zip(counts, sizes, strict=True)]


def _interpolate(vision: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The keyword by which transformers' CLIP and SigLIP fit their position embeddings to any size."""
    return args, kwargs | {"interpolate_pos_encoding": True}
