"""What a policy is: settings in, kept visual tokens out. No model, no cache, no transformers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from functools import wraps
from typing import Any, ClassVar, Literal, Self

from torch import Tensor

from vlmprune.errors import InputError, check
from vlmprune.policies.checks import check_flag, check_whole, check_word, plain, share_of
from vlmprune.policies.chosen import Insertion as Insertion
from vlmprune.policies.chosen import Positions as Positions
from vlmprune.policies.chosen import Ranking as Ranking
from vlmprune.policies.chosen import Reduction as Reduction
from vlmprune.policies.chosen import outcome as outcome
from vlmprune.policies.context import TokenContext as TokenContext
from vlmprune.policies.counts import keep_count
from vlmprune.policies.growth import GROWTHS
from vlmprune.policies.growth import Growth as Growth
from vlmprune.policies.inputs import AttentionInputs as AttentionInputs
from vlmprune.policies.inputs import Grid as Grid
from vlmprune.policies.inputs import Needs as Needs
from vlmprune.policies.inputs import tokens_in as tokens_in
from vlmprune.policies.symbols import SYMBOLS as SYMBOLS
from vlmprune.policies.vision import Crop as Crop
from vlmprune.policies.vision import VisionAttention as VisionAttention

KEEPS = "a setting 'keep', or `at` and `kept` of its own"


@dataclass(frozen=True)
class PruningPolicy:
    """Decides which visual tokens survive at its stages. Holds settings only, never tensors or run state.

    A budget is counted per image, as a share of its tokens (a float) or as a number of them (an int), and a prompt of m
    images has m times as much. A setting ``spend`` says how it is spent: "prompt", the best tokens of all images of the
    prompt together stay, "image", every image keeps its own, or "crop", shared out over what the tower sees as one image (a
    tile, the small view, a video's frame). ``growth`` says what more tokens cost.

    A class checks its settings in ``__post_init__``; before that runs, numpy's numbers have become Python's, and lists and
    arrays tuples, and ``positions``, ``spend`` and a ``vision_layer`` declared as an int have been checked.

    Args:
        earlier_kv: what the layers before the last stage hold in the KV cache once the prompt has run: "full", every
            token they saw, or "compact", only what survived the last stage (the answer then attends to nothing else).
        rectify: whether a token that stays stands for those most like it that go, m with itself, by log m on every
            attention logit it receives from there on (``models/standing.py``); with sdpa, eager or "vlmprune" attention.

    Raises:
        InputError: a setting is out of range; so does every method.
    """

    summary: ClassVar[str] = ""
    """One line for ``vlmprune list``."""
    paper: ClassVar[str] = ""
    """Where the method comes from."""
    formula: ClassVar[str] = ""
    """The choice as a formula: plain text with Unicode maths, one step a line, its letters those of ``SYMBOLS`` or defined in
    it. Of the defaults where a setting switches it, which then stands behind the line; "" = none is written."""
    checked: ClassVar[str] = "formula"
    """"formula": compared with an independent implementation of the published formula; "reading": the sources leave
    room, and the docstring says how it was used."""
    for_video: ClassVar[bool] = False
    """Whether it is made for videos: images are pruned, too, but what the method knows is how frames differ."""
    presets: ClassVar[Mapping[float, str]] = {}
    """Settings, as typed on the command line, by the budget of a published table that they meet: ``budgets.PUBLISHED``."""

    earlier_kv: Literal["full", "compact"] = field(default="full", kw_only=True)
    rectify: bool = field(default=False, kw_only=True)
    spend = "prompt"  # a setting of some methods: annotated there
    positions = "keep"  # so is this
    _ranks: ClassVar[bool] = False

    def __init_subclass__(cls) -> None:
        """Let every policy pass through ``__post_init__`` of this class; one whose ``select`` is its own no longer ranks."""
        super().__init_subclass__()
        kinds = map(vars, cls.__mro__[: cls.__mro__.index(PruningPolicy)])
        cls._ranks = next(("rank" in names for names in kinds if names.keys() & {"rank", "select"}), False)
        growth = cls.__dict__.get("growth")
        if growth is not None and not isinstance(growth, property):
            check(growth in GROWTHS, f"{cls.__name__}.growth", f"one of {', '.join(GROWTHS)}", repr(growth))
        own = cls.__dict__.get("__post_init__")
        if own is not None:

            @wraps(own)
            def both(self: PruningPolicy) -> None:
                PruningPolicy.__post_init__(self)
                own(self)

            cls.__post_init__ = both  # type: ignore[method-assign]

    def __post_init__(self) -> None:
        kind, own = type(self), (PruningPolicy.rank, PruningPolicy.select)
        check((kind.rank, kind.select) != own, kind.__name__, "`rank` or `select` of its own", "neither")
        for setting in fields(self):
            if setting.init:
                object.__setattr__(self, setting.name, plain(getattr(self, setting.name)))
            if setting.name == "vision_layer" and setting.init and setting.type in ("int", int):
                check_whole(setting.name, getattr(self, setting.name))
        check_word("earlier_kv", self.earlier_kv, "full", "compact")
        check_flag("rectify", self.rectify)
        check_word("positions", self.positions, "keep", "pack")
        check_word("spend", self.spend, "prompt", "image", "crop")

    def __str__(self) -> str:
        """The class with those settings that are not the defaults, as tables and plots call a policy."""
        some = ((f.name, getattr(self, f.name), f.default) for f in fields(self) if f.init)
        return f"{type(self).__name__}({', '.join(f'{n}={_short(v)}' for n, v, usual in some if v != usual)})"

    @property
    def layers(self) -> tuple[int, ...]:
        """Decoder layers at which tokens are dropped, ascending; layer K and later see the shortened sequence.

        By default the one in the setting ``layer``.
        """
        return (self._setting("layer", "a setting 'layer', or `layers` of its own"),)

    @property
    def growth(self) -> Growth | None:
        """How the work of a choice grows with the n visual tokens of an image of which the same share stays; None = unknown.

        A class says ``growth = "n"`` (a score for each, and sorting them), "n^2" (all pairs) or "n^3". What is remembered
        for prompts of one kind is counted as it is from the second one on.
        """
        return None

    @property
    def packs(self) -> bool:
        """Whether what stays moves up to positions 0, 1, 2, ...: what the setting ``positions`` says, if there is one."""
        return self.positions == "pack"

    @property
    def inserts(self) -> bool:
        """Whether texts join the prompt (``Reduction.inserted``)."""
        return False

    def needs(self, layer: int) -> Needs:
        """What ``select`` reads from its context at this stage."""
        return Needs()

    def ranks(self, layer: int) -> bool:
        """Whether the choice at this stage is that of ``rank``, and so runs as one fused pass; else ``select`` chooses.

        By default it is where ``rank`` is defined, unless a subclass overrides ``select`` alone.
        """
        return self._ranks

    @property
    def restores(self) -> bool:
        """Whether some stage brings back tokens that earlier ones have set aside (``Needs(restored=True)``)."""
        return any(self.needs(layer).restored for layer in self.layers)

    @property
    def fixed_count(self) -> bool:
        """Whether ``kept`` says exactly how many stay of whole images: then it is known before anything is encoded."""
        return True

    def empties(self, layer: int) -> bool:
        """Whether a sample may lose all of its visual tokens at this stage; elsewhere keeping none is refused.

        Layers behind it then run on text alone. Of a prompt that ends with its image the last token must stay, as generation
        goes on from its row: so such a stage reads where the text is (``Needs(rows="text")``, as ``VTW``).
        """
        return False

    def rank(self, ctx: TokenContext) -> Ranking:
        """The choice as data, for a method that scores tokens and keeps the best ones. A sample with tokens keeps one at
        least (but see ``empties``).

        Example:
            >>> from vlmprune import Random
            >>> Random(keep=3).rank(ctx).keep  # per image, of samples of one and of two
            (3, 6)
        """
        kind = type(self).__name__
        raise InputError(f"{kind}: expected `rank` of its own at a stage where it ranks, got none")

    def select(self, ctx: TokenContext) -> Tensor | Reduction:
        """Which of the visual tokens entering the stage stay: ``[B, K]`` int64 in 0..N-1, ascending, -1 on the right.

        By default what ``rank`` says; a method that is no ranking overrides this. K is what the fullest sample keeps; a
        sample with tokens keeps at least one (but see ``empties``). A method that merges tokens, reorders them or packs their
        positions returns a ``Reduction``. One broken sample (NaN, infinities) must change nothing for the others;
        ``vlmprune.testing.check_policy`` tries all of this.
        """
        ranking = self.rank(ctx)
        return outcome(ranking.index(ctx), ranking.positions)

    def at(self, share: float) -> Self:
        """The same policy keeping ``share`` of the tokens that enter each of its stages: how a budget is met.

        Sets ``keep``, for every layer where that is a tuple; a method whose budget has other names overrides this.

        Raises:
            InputError: the share is not in (0, 1], or the settings leave no room for it.
        """
        share, each = share_of(share), isinstance(self._setting("keep", KEEPS), tuple)
        change: dict[str, Any] = {"keep": (share,) * len(self.layers) if each else share}
        return replace(self, **change)

    def to_dict(self) -> dict[str, Any]:
        """The policy as plain data for JSON and YAML, which ``policy_from`` reads: its name and every setting.

        Defaults are written out, so that a recipe keeps its meaning where one changes. Tuples are lists; a function is
        the path by which it is imported.

        Raises:
            InputError: a class that nobody announced, or a setting that is neither data nor an importable function.

        Example:
            >>> from vlmprune import FastV
            >>> FastV(layer=2, keep=0.5).to_dict()
            {'policy': 'fastv', 'layer': 2, 'keep': 0.5, 'rows': 'last', 'spend': 'prompt', 'earlier_kv': 'full', 'rectify': False}
        """
        from vlmprune.policies.recipe import write

        return write(self)

    def kept(self, tokens: int, images: float, layer: int) -> int:
        """How many of the ``tokens`` visual tokens of one sample that enter the stage at ``layer`` stay.

        By default what the settings ``keep`` and, if there is one, ``spend`` say. A method that counts otherwise overrides
        this; ``select`` takes its counts from here (``quotas``), so that a budget is what a run keeps.

        Args:
            tokens: visual tokens of the sample that enter.
            images: how many images they belong to; part of one counts for its share.
            layer: one of ``layers``.

        Raises:
            InputError: how many stay is known only when they are chosen.
        """
        return keep_count(self._setting("keep", KEEPS), tokens, images, self.spends(layer))

    def spends(self, layer: int) -> str:
        """How the budget is spent at this stage: what the setting ``spend`` says."""
        return self.spend

    def forget(self) -> None:
        """Drop what is remembered of earlier prompts: the next one then costs what a new one does."""

    def _setting(self, name: str, expected: str) -> Any:
        check(name in self.__dataclass_fields__, type(self).__name__, expected, "none")
        return getattr(self, name)

    def __or__(self, other: PruningPolicy) -> PruningPolicy:
        """The union of what both keep, at the same layers."""
        from vlmprune.policies.compose import Union, joint

        return Union(self, other, **joint(self, other))

    def __and__(self, other: PruningPolicy) -> PruningPolicy:
        """What both keep, at the same layers."""
        from vlmprune.policies.compose import Intersection, joint

        return Intersection(self, other, **joint(self, other))


def _short(value: object) -> str:
    """A setting's value; policies among its parts as ``str`` has them."""
    if isinstance(value, tuple):
        return f"({', '.join(map(_short, value))}{',' * (len(value) == 1)})"
    return str(value) if isinstance(value, PruningPolicy) else repr(value)
