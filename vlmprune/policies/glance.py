"""A glance at the question, trained: which visual tokens show what is asked."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu

from vlmprune.errors import check
from vlmprune.policies.base import Growth, Needs, TokenContext
from vlmprune.policies.scorer import Scorer


class GlanceScorer(Scorer):
    """A learned vector reads the text behind the last image, head by head; what it found is held against every visual token.

    Made after GlimpsePrune (arXiv 2508.01548), and not the same. There a learned token is appended to the prompt and runs
    through the decoder's layers 0..K (learned vectors are added to it at every layer); its attention logits to the visual
    tokens in layer K, head by head, are the input of a predictor (VIP): self-attention among the visual tokens, conditioned on
    features of four layers of the tower. Here nothing joins the prompt: one cross-attention at the stage takes the token's
    place, with heads of its own in the place of the decoder's, and the predictor is two linear layers on the heads' logits and
    the token's own state, one token at a time. So it can act at layer 0, before the decoder, and knows no token's neighbours.
    It is trained on dice and cross-entropy against boxes as theirs is, without their loss on the answer that the token would
    give (``examples/glance``). Theirs keeps what lies above a probability: ``Learned(threshold=...)``.

    A word is read together with the one before and the one behind. Without text the vector alone asks. A prompt of several
    images is scored by one question.

    Args:
        width: of the hidden states: the language model's.
        layer: the stage that it is trained for; 0 = projected features and embeddings.
        heads: that look for something else each.
        size: width of a head.

    Raises:
        InputError: in ``forward``, hidden states of another width.
    """

    needs = Needs(hidden=True, text=True)
    growth: Growth = "n"

    def __init__(self, width: int, layer: int = 0, heads: int = 8, size: int = 12) -> None:
        super().__init__()
        self.width, self.layer, self.heads, self.size = width, layer, heads, size
        inner = heads * size
        self.glance = nn.Parameter(torch.randn(heads, size))
        self.read, self.see = nn.LayerNorm(width), nn.LayerNorm(width)
        self.words = nn.Linear(3 * width, inner)
        self.word_keys, self.word_values = nn.Linear(inner, inner), nn.Linear(inner, inner)
        self.ask = nn.Sequential(nn.Linear(inner, 2 * inner), nn.GELU(), nn.Linear(2 * inner, inner))
        self.token_keys, self.token_state = nn.Linear(width, inner), nn.Linear(width, inner)
        self.predict = nn.Sequential(nn.Linear(heads + inner, 64), nn.GELU(), nn.Linear(64, 1))

    def forward(self, ctx: TokenContext) -> Tensor:
        """Logits ``[B, N]`` of showing what is asked, in the type of the weights."""
        hidden = ctx.given("hidden")
        width = hidden.shape[2]
        check(
            width == self.width,
            "ctx.hidden",
            f"rows of width {self.width}, as the scorer was made for",
            width,
        )
        seen = self.see(hidden.to(self.dtype))
        keys = self.token_keys(seen).unflatten(-1, (self.heads, self.size))
        logits = torch.einsum("bhd,bnhd->bnh", self.question(ctx), keys) * self.size**-0.5
        found: Tensor = self.predict(torch.cat([logits, gelu(self.token_state(seen))], -1))[..., 0]
        return found

    def question(self, ctx: TokenContext) -> Tensor:
        """What the vector asks for after it has read the text: ``[B, heads, size]``."""
        text = ctx.given("text")
        rows = ctx.given("text_hidden")
        there = (text >= 0)[..., None]
        words = self.read(rows.to(self.dtype)).masked_fill(~there, 0.0)
        padded = nn.functional.pad(words, (0, 0, 1, 1))
        words = gelu(self.words(torch.cat([padded[:, :-2], words, padded[:, 2:]], -1)))
        keys, values = (
            f(words).unflatten(-1, (self.heads, self.size)) for f in (self.word_keys, self.word_values)
        )
        pull = torch.einsum("hd,bthd->bth", self.glance, keys) * self.size**-0.5
        # one more place, at zero, that says nothing: all there is where there is no text
        pull = nn.functional.pad(pull.masked_fill(~there, float("-inf")), (0, 0, 0, 1)).softmax(1)[:, :-1]
        read = torch.einsum("bth,bthd->bhd", pull, values.masked_fill(~there[..., None], 0.0))
        asked = self.glance + read
        return asked + self.ask(asked.flatten(1)).view_as(asked)
