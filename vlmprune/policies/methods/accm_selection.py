"""ACCM's choice of tokens: some by the question, the outliers of CLS attention, and evenly spaced ones up to a fixed number."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from vlmprune.policies.base import Needs, Positions, TokenContext
from vlmprune.policies.budgets import each
from vlmprune.policies.by_image import vision_of
from vlmprune.policies.checks import check_flag, check_keep, check_seed, check_word
from vlmprune.policies.groups import Groups
from vlmprune.policies.parts.filling import InTurn, Turns, asked_for, check_text, filling
from vlmprune.policies.parts.received import joined_attention
from vlmprune.policies.parts.relevance import Relevance, check_relevance, relevance_of


@dataclass(frozen=True)
class ACCMSelection(InTurn):
    """Keeps ``keep`` tokens of every image: those the question chooses, CLS's outliers, and others spread over the image.

    The question chooses ``text`` tokens; to them come those whose CLS attention exceeds ``Q3 + 1.5 (Q3 - Q1)`` of the image. If
    that is too few, every ``ceil(N / missing)``-th of the N tokens follows that is not yet there, then leftovers in an order
    that ``seed`` draws, the same for all images. If it is too many, ``overflow`` decides.

    This is the choice that comes before ACCM's captions. Compared with the released code on the same tensors (680 images of 576
    patches, all five budgets, random and made to overflow or to have no outlier), it keeps the same tokens in the same order,
    but for which are left over and where numbers are equal, with

        ACCMSelection(36, relevance=f, nearest=False, vision_layer=-1, heads="joined", overflow="last", order="selected")

    where f gives the cosine of CLIP's embedding of every patch with that of the question's first line. There the question
    chooses the FARTHEST patches, an overflow keeps the bottom of the image, tokens reach the language model as they were found,
    and leftovers are drawn anew each time; none of that is explained, so none is a default. LLaVA checkpoints carry neither
    CLIP's text tower nor its visual projection: ``"text"`` is a reading, that of CDPruner. Not in the release: where all tokens
    of an image are equally relevant (no text follows it), and where relevance is NaN or infinite, the question chooses none;
    without a CLS token the mean attention that a patch receives from all patches stands in. Left out are its quotas for several
    questions about one image (a prompt is one) and a rounding that can lose an outlier where N is not 576.

    Args:
        keep: tokens per image (int; published budgets 288, 144, 72, 36, 18) or share of its tokens (float).
        text: how many of them the question chooses, a number (int) or a share of them (float). None: 150, 70, 40, 20, 12 for
            the published budgets, else 5/9, as for 72 and 36.
        relevance: ``"text"``, the mean cosine between a projected visual token and the input embeddings of the text after the
            last image; ``"none"``, the question chooses nothing; or a function of the TokenContext (which then has ``hidden``
            and ``embeds``) that returns ``[B, N]`` (else InputError), higher = more relevant.
        nearest: whether the most relevant tokens are chosen, or the least (released code).
        vision_layer: tower layer whose attention is read; -2 is the one whose output LLaVA projects, -1 the released code's.
        heads: ``"split"``, the mean over heads, or ``"joined"`` (released code): one softmax of the whole query and key.
        overflow: ``"score"``: the question's tokens stay, then the outliers by falling attention; or ``"last"`` (released
            code): the last ones in raster order.
        order: ``"raster"``, or ``"selected"`` (released code): question and outliers, evenly spaced, leftovers; each in raster
            order but the last.
        seed: which order leftovers have.
        positions: ``"keep"`` their own, or ``"pack"`` (released code: the kept tokens stand at 0, 1, 2, ...).
    """

    summary = "some by the question, outliers of CLS attention, the rest evenly spaced"
    paper = "the selection of ACCM, Adaptive Content Compensation Method (ACM MM 2025), arXiv 2508.01236"
    formula = (
        "s_j = mean_h V[vision_layer][h, CLS, j];  r_j = mean_t cos(x_j, e_t)  (relevance='text')\n"
        "C = q highest r_j ∪ {s_j > b + 1.5 (b - a)}, a = 1st, b = 3rd quartile of s  (nearest=True)\n"
        "q = 150, 70, 12 where k is 288, 144, 18, else round(5 / 9 k)  (text=None)\n"
        "|C| > k: keep the q, then of C the highest s_j  (overflow='score')\n"
        "|C| < k: keep C, then those of 0, d, 2 d, … that are not in C, d = ⌈n / (k - |C|)⌉,\n"
        "then others in an order that seed draws, until k of every crop are kept"
    )
    presets = each("keep={}", counts=",positions=pack")
    checked = "reading"
    growth = "n"  # of a tower with CLS; without, every patch looks at every other: n^2

    keep: int | float = 36
    text: int | float | None = None
    relevance: Relevance = "text"
    nearest: bool = True
    vision_layer: int = -2
    heads: Literal["split", "joined"] = "split"
    overflow: Literal["score", "last"] = "score"
    order: Literal["raster", "selected"] = "raster"
    seed: int = 0
    positions: Positions = "keep"

    def __post_init__(self) -> None:
        check_keep(self.keep)
        check_text(self.text, self.keep)
        check_relevance(self.relevance)
        check_flag("nearest", self.nearest)
        check_word("heads", self.heads, "split", "joined")
        check_word("overflow", self.overflow, "score", "last")
        check_word("order", self.order, "raster", "selected")
        check_seed(self.seed)

    layers = (0,)  # before the language model
    spend = "crop"

    def needs(self, layer: int) -> Needs:
        asked = self.relevance != "none"
        return Needs(hidden=asked, embeds=asked, vision=(self.vision_layer,))

    def turns(self, ctx: TokenContext, crops: Groups) -> Turns:
        seen, relevance = vision_of(ctx, self.vision_layer, crops), relevance_of(ctx, self.relevance)
        attention = seen.received() if self.heads == "split" else joined_attention(seen)
        if relevance is not None and not self.nearest:
            relevance = -relevance
        return filling(crops, attention, relevance, self.quota, self.seed, self.overflow == "last")

    def quota(self, kept: int) -> int:
        """How many of ``kept`` tokens of an image the question chooses."""
        return asked_for(self.text, kept)
