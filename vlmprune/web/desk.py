"""What a page has on offer: checkpoints, each loaded when it is first asked, methods that can be fitted to one, and examples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from threading import Lock
from typing import NamedTuple

from PIL import Image

from vlmprune.checkpoints import Checkpoint
from vlmprune.errors import InputError, check
from vlmprune.models.host.fitting import settings_for
from vlmprune.policies.registry import load_policies
from vlmprune.view.fitting import Fitted, Size, fit
from vlmprune.view.scene import make_ready, size_of

GLYPHWORLD = Path(__file__).parents[2] / "examples" / "glyphworld"
SHARE = 0.4
"""Of an image's visual tokens: the budget that is set at first."""
BLANK = (336, 336)
"""Width and height of the picture that stands for one that is not there yet."""


class Example(NamedTuple):
    """A picture and what may be asked about it."""

    image: Path
    prompt: str


class Method(NamedTuple):
    """What stands beside a method's box: whether it acts before the language model, and what it keeps."""

    before: bool
    summary: str


class Offer(NamedTuple):
    """What can be asked of a checkpoint: its size, the methods by name, and by name why the others are left out."""

    size: Size
    methods: dict[str, Method]
    left_out: dict[str, str]


class Desk:
    """Checkpoints by name, and the one lock under which any of them runs.

    Attributes:
        sources: folders and hub ids that visitors may choose.
        examples: pictures to begin with.
        any_model: whether visitors may name other checkpoints.
        limit: tokens of the longest answer.
        turn: held by whom a model works for: seconds would be no measure otherwise, and a model takes one policy at a time.
    """

    def __init__(
        self,
        sources: Sequence[str],
        examples: Sequence[Example] = (),
        *,
        device: str = "auto",
        dtype: str = "auto",
        limit: int = 32,
        any_model: bool = False,
    ) -> None:
        """Note what is on offer; nothing is read. Raises InputError as ``Checkpoint`` does for device and dtype."""
        check(bool(sources), "model", "at least one checkpoint folder or hub id", "none")
        self.sources, self.examples = list(sources), list(examples)
        self.any_model, self.limit, self.turn = any_model, limit, Lock()
        self._settings = {"device": device, "dtype": dtype}
        self._offered = {source: Checkpoint(source, **self._settings) for source in sources}
        self._named: Checkpoint | None = None

    def open(self, source: object) -> Checkpoint:
        """The checkpoint of this name; nothing is read. Of those that visitors name only the latest is kept.

        Raises:
            InputError: it is not on offer, and visitors may not name others.
        """
        if isinstance(source, str) and source in self._offered:
            return self._offered[source]
        check(self.any_model, "model", f"one of {', '.join(self.sources)}", repr(source))
        text = source.strip() if isinstance(source, str) else ""
        check(bool(text), "model", "a checkpoint folder or hub id", repr(source))
        if self._named is None or self._named.source != text:
            self._named = Checkpoint(text, **self._settings)
        return self._named

    def path_of(self, picture: Path, name: str) -> str:
        """What a command calls an uploaded picture: an example by its path, any other by its name."""
        for example in self.examples:
            if example.image.name == name and example.image.read_bytes() == picture.read_bytes():
                return as_typed(example.image)
        return name


def size_for(checkpoint: Checkpoint, picture: Image.Image) -> Size:
    """The size of a checkpoint with this picture. Reads no weights.

    Raises:
        InputError, ModelError: what is not there, or cannot be pruned.
    """
    return size_of(checkpoint, make_ready(checkpoint, "?", picture))


def offer(checkpoint: Checkpoint) -> Offer:
    """What can be asked of a checkpoint about a picture of ordinary size. Errors as ``size_for``."""
    size = size_for(checkpoint, Image.new("RGB", BLANK))
    methods, left_out = {}, {}
    for name, kind in load_policies()[0].items():
        if kind.for_video:  # the page has pictures alone
            left_out[name] = f"{name}: made for video"
            continue
        try:
            policy = fitted(checkpoint, name, SHARE * size.visual, size).policy
            methods[name] = Method(policy.layers[0] == 0, kind.summary)
        except InputError as error:
            left_out[name] = str(error)
    return Offer(size, methods, left_out)


def fitted(checkpoint: Checkpoint, name: str, budget: float, size: Size) -> Fitted:
    """A method fitted to a budget, as this family can run it. Raises InputError where that cannot be."""
    found = fit(name, budget, size)
    settings = settings_for(checkpoint.config.model_type, found.policy)
    check(
        settings is not None, name, f"a method for {checkpoint.config.model_type}", "one that packs positions"
    )
    return replace(found, policy=replace(found.policy, **settings)) if settings else found


def as_typed(path: Path) -> str:
    """A path as it is typed here: relative where it lies below the current folder."""
    here = Path.cwd()
    return str(path.relative_to(here) if path.is_relative_to(here) else path)


def shipped(folder: Path = GLYPHWORLD) -> tuple[list[str], list[Example]]:
    """The example model of a checkout and questions for it; nothing where there is no checkout.

    Args:
        folder: with ``checkpoint/`` and ``images/``.
    """
    sources = [as_typed(folder / "checkpoint")] if (folder / "checkpoint" / "config.json").is_file() else []
    examples = [Example(folder / "images" / image, prompt) for image, prompt in QUESTIONS.items()]
    return sources, [example for example in examples if example.image.is_file()]


QUESTIONS = {
    "scene_70001.png": "locate the green phone .",
    "scene_70002.png": "what does the sign say ?",
    "scene_70003.png": "locate the orange ring .",
    "scene_70004.png": "where is the large circle ?",
    "scene_70005.png": "how many orange objects are there ?",
    "scene_70006.png": "what color is the small knight ?",
}
"""One question about each scene of the example model."""
