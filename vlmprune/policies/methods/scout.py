"""Scout: a coarse view of the image says where to look, and the tokens found there run after it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from vlmprune.errors import check
from vlmprune.policies.base import Growth, Needs, PruningPolicy, TokenContext
from vlmprune.policies.checks import check_flag, check_seed, check_word
from vlmprune.policies.choose import marks
from vlmprune.policies.growth import worst
from vlmprune.policies.methods.divprune import DivPrune
from vlmprune.policies.methods.random import drawn
from vlmprune.policies.parts.blur import blurred, check_spread
from vlmprune.policies.parts.joining import apart, input_embeddings
from vlmprune.policies.parts.two_waves import TwoWaves


@dataclass(frozen=True)
class Scout(TwoWaves):
    """Looks at a coarse set of tokens first, and takes in as many fine ones where the prompt looks.

    Early layers do not know where to look, late ones know but save little. A coarse view is enough to know where:

    1. The text and what ``coarse`` keeps run layers 0..look-1, at their own positions.
    2. The attention of the last prompt row in layer look-1, head mean, is spread over the grid of each image (a Gaussian).
       It names ``fine`` more tokens, the best of all images of a prompt together.
    3. These and the text behind the last image run layers 0..look-1 over keys and values of the first run. Coarse tokens,
       and text in front of the last image, are not run again: there, and only there, they do not see the fine ones.

    From ``look`` on, and in the answer, all of it is one sequence under the usual causal mask; every layer holds coarse and
    fine tokens. It costs what keeping both from layer 0 costs, and the text behind the image once more in ``look`` layers.

    Args:
        coarse: a policy that acts before the language model alone and only drops tokens (diverse ones, where nothing is
            said: ``studies/where_to_look``); whatever it does with positions, they stay the tokens' own.
        fine: tokens that join: a share (float) of all visual tokens, or a number per image (int).
        look: the first layer that sees coarse and fine tokens; those before it are run in two waves. At least 1; where the
            attention has come to depend on the question, as ``vlmprune tune`` measures (the default is for 32 layers).
        by: what names fine tokens: "attention" alone; "diverse", attention among tokens unlike the coarse ones and one
            another (greedy MAP of a DPP with the kernel ``a_i cos_ij a_j`` of spread attention and projected features, in
            which the coarse tokens stand already); or "random" (a baseline).
        spread: standard deviation of the Gaussian, in rows and columns of visual tokens, from 0.25 to 1000.
        rope: whether the attention is the model's; False = its query and keys without RoPE, softmax over the coarse tokens.
        seed: which draw "random" is; 0 if not given.

    Raises:
        InputError: a setting is out of range; where it runs, a coarse policy that merges or moves tokens.
    """

    summary = "a coarse view first, then as many fine tokens where the prompt looks"
    paper = "this project"
    formula = (
        "C = what coarse keeps at layer 0;  a_i = mean_h A[look-1][h, last, i] for i ∈ C  (rope=True)\n"
        "b_j = ∑_{i ∈ C} a_i exp(-d_ij² / (2 spread²)), d_ij = distance in one grid, in rows and columns\n"
        "L_ij = b_i cos(e_i, e_j) b_j\n"
        "k(fine) times: bring back the j for which det L[C ∪ back ∪ j] is highest  (by='diverse')\n"
        "those then run layers 0 … look - 1 as well, and the text behind the last image again"
    )

    coarse: PruningPolicy = DivPrune(keep=0.125)  # noqa: RUF009  # frozen
    fine: int | float = 0.0833
    look: int = 20
    by: Literal["attention", "diverse", "random"] = "diverse"
    spread: float = 1.0
    rope: bool = True
    seed: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_word("by", self.by, "attention", "diverse", "random")
        check_spread(self.spread)
        check_flag("rope", self.rope)
        if self.by == "random":
            object.__setattr__(self, "seed", 0 if self.seed is None else self.seed)
            check_seed(self.seed)
        check(self.by == "random" or self.seed is None, "seed", "None where nothing is drawn", self.seed)

    @property
    def growth(self) -> Growth | None:
        """That of the coarse policy, or of a DPP; spreading scores over a square image is n^1.5, and a small part of it."""
        return worst((self.coarse.growth, "n^3" if self.by == "diverse" else "n"))

    def needs(self, layer: int) -> Needs:
        if layer == 0:
            return self.coarse.needs(0)
        attention: Literal["previous"] | None = None if self.by == "random" else "previous"
        return Needs(attention=attention, rows="last", embeds=self.by == "diverse", restored=True, wave=True)

    def worth(self, ctx: TokenContext, ran: Tensor, kept: int) -> Tensor:
        if self.by == "random":
            return drawn(self.seed or 0, ctx.counts, ctx.device)
        looked = self._looked(ctx, ran)
        if self.by == "attention":
            return looked
        return apart(looked, input_embeddings(ctx), marks(ran, ctx.mask.shape[1]), ctx.mask, kept)

    def _looked(self, ctx: TokenContext, ran: Tensor) -> Tensor:
        """float32 ``[B, N]``: the attention that coarse tokens received, spread to those around them."""
        seen = ctx.given("attention")
        if self.rope:
            received = seen.received(seen.last)
        else:
            seen = seen.chunk()
            received = seen.received(seen.last, normalize="columns", unrotated=True)
        return blurred(received, ran, ctx.grids, self.spread, ctx.mask.shape[1])
