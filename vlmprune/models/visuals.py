"""The images and videos one call brings: which outputs of the vision tower are theirs, where their tokens stand."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, reduce
from operator import or_
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from vlmprune.errors import ModelError
from vlmprune.models.crop_reads import Seen
from vlmprune.models.host.names import attribute
from vlmprune.models.host.parts import Parts, patch_grid
from vlmprune.models.host.views import Encoded, ImageViews, Shapes, View, image_tokens
from vlmprune.policies.base import tokens_in


class Notes:
    """What was noted of the vision tower's runs, by the states they gave: forgotten with them.

    Not on transformers' output objects, which accelerate, beam search and chunked prefill make anew; the states themselves
    go on as they are, or as a copy on another device.
    """

    def __init__(self) -> None:
        self._by_states = WeakTensorKeyDictionary()

    def add(self, output: Any, note: Encoded) -> None:
        """Remember what the run that gave this output saw."""
        self._by_states[output.last_hidden_state] = note

    def of(self, output: Any) -> Encoded | None:
        """What was noted when the vision tower gave this output; None if it was made elsewhere, or cut out of one."""
        states = attribute(output, "last_hidden_state")
        if states is None or states in self._by_states:
            return None if states is None else self._by_states[states]
        away = [x for x in self._by_states if x.device != states.device and x.shape == states.shape]
        return next((self._by_states[x] for x in away if torch.equal(x.to(states.device), states)), None)

    def __reduce__(self) -> Any:
        return Notes, ()


@dataclass
class Visuals:
    """The images and videos one call brings.

    A placeholder token without images (one that the model itself generated, say) is ordinary text.

    Attributes:
        parts: the model.
        kinds: "image", "video" or both.
        runs: outputs of the vision tower, the last ones of these kinds in the same order. Since transformers 5.18 generate()
            encodes ahead and passes them on; otherwise the base model runs the tower, and they are added meanwhile.
        notes: what was noted of the tower's runs.
    """

    parts: Parts
    kinds: tuple[str, ...]
    runs: list[Any]
    notes: Notes

    @property
    def outputs(self) -> list[Any]:
        """The output object of each kind."""
        return self.runs[-len(self.kinds) :]

    def mask(self, ids: Tensor | None, embeds: Tensor | None, *kinds: str) -> Tensor:
        """``[B, q]`` True at visual tokens of these kinds, found as the base model finds them: by id or by embedding."""
        tokens = [self.parts.token_ids[kind] for kind in kinds]
        if ids is not None:
            marks = [ids == token for token in tokens]
        else:
            assert embeds is not None
            table = self.parts.model.get_input_embeddings()
            marks = [(embeds == table(torch.tensor(t, device=embeds.device))).all(-1) for t in tokens]
        return reduce(or_, marks)

    @property
    def cut(self) -> bool:
        """Whether the features are cut out of the tower's output: chunked prefill hands them over so."""
        return any(attribute(out, "last_hidden_state") is None for out in self.outputs)

    def seen(self) -> list[Encoded]:
        """What was noted of these runs, of each kind; nothing of one outside the scope."""
        return [self.notes.of(output) or Encoded() for output in self.outputs]

    def tokens(self) -> int:
        """How many visual tokens there are in all, known on the host."""
        if self.cut:
            return sum(len(f) for output in self.outputs for f in output.pooler_output)
        return sum(map(image_tokens, (image for images in self.images for image in images)))

    @cached_property
    def images(self) -> list[list[ImageViews]]:
        """The grids of every image, by kind. Raises ModelError where nothing says what the images of these features were."""
        if len(self.runs) < len(self.kinds):
            raise ModelError(
                "vision tower: expected it to run with its hooks, got a run without them (what torch.compile has "
                "compiled before the scope has none: call torch.compiler.reset() first)"
            )
        return [self._grids(*one) for one in zip(self.kinds, self.outputs, strict=True)]

    def _grids(self, kind: str, output: Any) -> list[ImageViews]:
        family, note = self.parts.family, self.notes.of(output)
        adapter = family.videos if kind == "video" else family.images
        if adapter is None or (note is None and not family.square):
            raise ModelError(
                f"{kind}: expected features that this model encoded inside the scope (the images of "
                f"{self.parts.config.model_type!r} differ in shape), got others"
            )
        features = [f for f in output.pooler_output if len(f)]  # Idefics3: none, for a sample without images
        shapes = Shapes(self.parts.config, family.side(self.parts.config))
        return adapter(shapes, features, note or Encoded()) if features else []

    def by_sample(self, counts: Sequence[int], videos: Sequence[Sequence[int]] | None) -> Seen:
        """The images of each sample in prompt order.

        Args:
            counts: visual tokens of each sample.
            videos: for each sample 1 at a visual token that is a video's, else 0; None if the call brings one kind.
        """
        queues = [list(images) for images in self.images]
        samples: list[list[ImageViews]] = [[] for _ in counts]
        kinds: list[list[int]] = [[] for _ in counts]
        for b, count in enumerate(counts):
            left = count
            while left:
                kind = videos[b][count - left] if videos else 0
                queue = queues[kind]
                size = image_tokens(queue[0]) if queue else 0
                if not 0 < size <= left:
                    raise ModelError(
                        f"prompt: expected whole images in every sample, got {left} visual tokens where an "
                        f"image has {size}"
                    )
                samples[b].append(queue.pop(0))
                kinds[b].append(kind)
                left -= size
        return Seen(tuple(map(tuple, samples)), tuple(map(tuple, kinds)))

    def in_chunks(self, ends: Sequence[int]) -> tuple[tuple[ImageViews, ...], ...]:
        """The images that the first ``ends[b]`` visual tokens of each prompt are of, the last one perhaps in part.

        Raises ModelError where features cut out of the tower's output no longer say what their images were.
        """
        if not self.parts.family.square or len(self.kinds) > 1:
            raise ModelError(
                f"prefill_chunk_size: expected None with {self.parts.config.model_type!r} (its images differ in "
                "shape, and their parts do not say of what), got a prompt in chunks"
            )
        grid = patch_grid(self.parts.config)
        return tuple((((View(grid),),) * -(-end // tokens_in([grid]))) for end in ends)
