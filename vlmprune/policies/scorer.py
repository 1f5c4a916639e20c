"""What a scorer is: a trained module that scores the visual tokens of a stage, and how it is saved and loaded."""

from __future__ import annotations

import hashlib
import inspect
import json
from functools import reduce
from importlib import import_module
from pathlib import Path
from typing import Any, Self

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from vlmprune.compensation.saving import replacing, standing
from vlmprune.errors import InputError, check, first_line
from vlmprune.policies.base import Growth, Needs, TokenContext

CONTENTS, WEIGHTS = "scorer.json", "model.safetensors"


class Scorer(nn.Module):
    """Scores the visual tokens that enter a stage, from what its context holds; ``Learned`` prunes by one.

    A subclass says in ``needs`` what it reads, and scores in ``forward``. The arguments of its ``__init__`` are settings:
    numbers, texts, truth values, lists of these, or None, each kept as an attribute of its own name, from where
    ``save_pretrained`` takes them. It stands at the top of a module that can be imported where it is loaded.

    Attributes:
        needs: what of the context is read.
        layer: the layer whose entering states it was trained on, and the only one that it is then used at; None = any.
        growth: how its work grows with the visual tokens; None = not known.

    >>> from torch import nn
    >>> class Linear(Scorer):
    ...     needs = Needs(hidden=True)
    ...
    ...     def __init__(self, width):
    ...         super().__init__()
    ...         self.width, self.score = width, nn.Linear(width, 1)
    ...
    ...     def forward(self, ctx):
    ...         return self.score(ctx.hidden.to(self.dtype))[..., 0]
    >>> Linear(8)
    Linear(width=8)
    """

    needs: Needs = Needs(hidden=True)
    growth: Growth | None = None
    layer: int | None = None

    def __init__(self) -> None:
        super().__init__()  # by a signature without arguments: a subclass without settings needs no `__init__`

    def forward(self, ctx: TokenContext) -> Tensor:
        """One logit for each visual token, ``[B, N]`` floating: the higher survives; at padding anything.

        Each sample's come from that sample alone, whatever its neighbours hold and however it is padded. A graph can hold
        it if it reads nothing back to the host and is the same program for all prompts of one shape.
        """
        raise NotImplementedError(f"{type(self).__name__}: expected a `forward` of its own, got none")

    @property
    def dtype(self) -> torch.dtype:
        """Of its weights, in which it computes: a ``forward`` brings what it reads to it. float32 if there are none."""
        return next((x.dtype for x in self.parameters()), torch.float32)

    def settings(self) -> dict[str, Any]:
        """The arguments that make another one of this shape. Raises InputError if one is not kept as an attribute."""
        names, kept = inspect.signature(type(self)).parameters, vars(self)
        for name, told in names.items():
            named = told.kind in (told.POSITIONAL_OR_KEYWORD, told.KEYWORD_ONLY)
            check(named, type(self).__name__, "arguments that each have a name", str(told))
            check(
                name in kept, type(self).__name__, f"an attribute {name!r}, as its argument is called", "none"
            )
        return {name: kept[name] for name in names}

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{k}={v!r}' for k, v in self.settings().items())})"

    def save_pretrained(self, folder: str | Path) -> None:
        """Write ``folder`` anew: ``scorer.json``, class and settings, and ``model.safetensors``; until then the old one stands.

        Raises:
            InputError: settings that JSON cannot hold, a class that cannot be imported by its name, weights that share memory,
                or a file in the place of the folder.
        """
        path, settings = f"{type(self).__module__}:{type(self).__qualname__}", self.settings()
        top = not path.startswith("__main__:") and "<locals>" not in path
        check(top, type(self).__name__, "a class at the top of a module that can be imported", path)
        try:
            text = json.dumps({"scorer": path, "settings": settings}, indent=2, allow_nan=False) + "\n"
        except (TypeError, ValueError) as error:
            raise InputError(f"{type(self).__name__}: expected settings for JSON, got {settings}") from error
        with replacing(folder) as beside:
            try:
                save_file({name: x.contiguous() for name, x in self.state_dict().items()}, beside / WEIGHTS)
            except RuntimeError as error:  # says how to call safetensors
                raise InputError(
                    f"{type(self).__name__}: expected weights that share no memory, got tied ones"
                ) from error
            (beside / CONTENTS).write_text(text)

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> Self:
        """What ``save_pretrained`` wrote: in the type it was written, on the CPU, in evaluation mode.

        Imports the module that the folder names, so read only what you trust.

        Raises:
            InputError: no such folder or no scorer in it, one of another class than this, weights that are missing, damaged
                or of other names or shapes than its settings make.
        """
        found = standing(folder)
        check(found.is_dir(), "folder", "a folder of a scorer", f"{folder}, which does not exist")
        kind, settings = _read(found / CONTENTS)
        made = f"a {cls.__name__} in {folder}"
        check(issubclass(kind, cls), "folder", made, f"a {kind.__name__}")
        names = [*inspect.signature(kind).parameters]
        check(
            [*settings] == names,
            CONTENTS,
            f"settings {', '.join(names)}",
            f"{', '.join(settings)} in {folder}",
        )
        try:
            scorer = kind(**settings)
        except (TypeError, ValueError, RuntimeError) as error:
            got = f"{first_line(error)} in {folder}"
            raise InputError(
                f"{CONTENTS}: expected settings that make a {kind.__name__}, got {got}"
            ) from error
        scorer.load_state_dict(_weights(found / WEIGHTS, scorer.state_dict()), assign=True)
        return scorer.eval()


def fingerprint_of(scorer: Scorer | str) -> str:
    """Eight letters that other weights do not share, of a module or of a folder; reads all of them.

    Raises:
        InputError: a folder without weights.
    """
    found = hashlib.sha256()
    if isinstance(scorer, Scorer):
        for name, x in scorer.state_dict().items():
            found.update(name.encode())
            found.update(x.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    else:
        file = standing(scorer) / WEIGHTS
        check(file.is_file(), "scorer", f"a folder with {WEIGHTS}", scorer)
        found.update(file.read_bytes())
    return found.hexdigest()[:8]


def _read(contents: Path) -> tuple[type[Any], dict[str, Any]]:
    """Class and settings of what was saved."""
    check(contents.is_file(), "folder", f"one that a scorer was saved in, with {CONTENTS}", contents.parent)
    try:
        data = json.loads(contents.read_text())
        path, settings = data["scorer"], dict(data["settings"])
        module, _, name = path.partition(":")
        kind: Any = reduce(getattr, name.split("."), import_module(module))
    except (ValueError, KeyError, TypeError, ImportError, AttributeError) as error:
        got = f"{type(error).__name__}: {first_line(error)} in {contents}"
        raise InputError(
            f"{CONTENTS}: expected a scorer that can be imported and its settings, got {got}"
        ) from error
    right = isinstance(kind, type) and issubclass(kind, Scorer)
    check(right, CONTENTS, "a class of Scorer", f"{path} in {contents}")
    return kind, settings


def _weights(file: Path, made: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights in ``file``, of the names and shapes of those ``made``."""
    check(file.is_file(), "folder", f"weights in {WEIGHTS}", f"none in {file.parent}")
    try:
        found = load_file(file)
    except (OSError, SafetensorError) as error:
        raise InputError(
            f"{WEIGHTS}: expected weights of a scorer, got {first_line(error)} in {file}"
        ) from error
    have, want = ({name: tuple(x.shape) for name, x in some.items()} for some in (found, made))
    odd = sorted(name for name in have.keys() | want.keys() if have.get(name) != want.get(name))
    if odd:
        expected, got = (
            f"{odd[0]} {some[odd[0]]}" if odd[0] in some else f"no {odd[0]}" for some in (want, have)
        )
        raise InputError(f"{WEIGHTS}: expected {expected}, got {got} in {file}")
    return found
