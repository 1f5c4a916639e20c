"""The selector of ACCM: which of several captions answers the question best.

Source: ACCM: Adaptive Content Compensation Method, ACM MM 2025, arXiv 2508.01236.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModel, AutoTokenizer

from vlmprune.compensation.blocks import Block, block_flops
from vlmprune.compensation.configs import SelectorConfig
from vlmprune.compensation.counting import attention_flops, weights
from vlmprune.compensation.parts import Part, check_questions, check_rebuilt, is_name
from vlmprune.errors import check, require

TEMPLATE = "Question: {question}  Supplemental information for questions: {caption}"


class Selector(Part):
    """Text encoder + transformer layers over the candidates of an image + ``Linear(W -> 1)``.

    Each candidate is read together with the question, as ``TEMPLATE`` says, and becomes one vector: the encoder's pooled
    output, or the mean of its last hidden states over real tokens where it has none. Texts longer than the encoder's
    context lose their end. A pooled output like CLIP's is read at the end-of-text token: the tokenizer has to add one, or
    all candidates look the same. The layers know no positions: the order of candidates does not matter.

    Use ``make`` to build one around a text encoder with its weights. The constructor makes weights at random.

    Args:
        config: see there.
        text_encoder: an encoder to take as it is, of the config's kind; None = a new one, weights at random.
        tokenizer: of the text encoder; it needs a padding token.

    Source: the Adaptive Content Compensation Method (ACCM), ACM MM 2025, https://arxiv.org/abs/2508.01236.
    """

    config_class = SelectorConfig

    def __init__(self, config: SelectorConfig, text_encoder: Any = None, tokenizer: Any = None) -> None:
        super().__init__(config)
        if text_encoder is None:
            text_encoder = AutoModel.from_config(config.text_encoder)
        self.text_encoder = text_encoder
        self.tokenizer = tokenizer
        width = config.text_encoder.get_text_config().hidden_size
        blocks = (
            Block(width, config.heads, config.mlp_ratio, "gelu", bias=True, dropout=config.dropout)
            for _ in range(config.layers)
        )
        self.blocks = nn.ModuleList(blocks)
        self.score = nn.Linear(width, 1)
        self.post_init()
        self._freeze()
        self.train(self.training)

    @classmethod
    def make(cls, text_encoder: Any, tokenizer: Any = None, **settings: Any) -> Selector:
        """A selector with new layers over a trained text encoder.

        Args:
            text_encoder: an encoder of transformers, taken as it is, or the name or folder of its checkpoint.
            tokenizer: of it, or its name or folder; None = the one beside the checkpoint.
            **settings: of ``SelectorConfig``.

        Raises:
            InputError: no tokenizer, or one without a padding token; heads that do not divide the width; an encoder with
                other weights than its configuration says, which could not be loaded again.
        """
        if is_name(text_encoder):
            tokenizer = tokenizer or text_encoder
            text_encoder = AutoModel.from_pretrained(text_encoder)
        if is_name(tokenizer):
            tokenizer = AutoTokenizer.from_pretrained(tokenizer)
        require(tokenizer, "tokenizer", "the text encoder's tokenizer")
        require(tokenizer.pad_token, "tokenizer", "one with a padding token")
        check_rebuilt("text_encoder", text_encoder, AutoModel)
        config = SelectorConfig(text_encoder=text_encoder.config, **settings)
        selector = cls(config, text_encoder, tokenizer)
        return selector.to(device=text_encoder.device, dtype=text_encoder.dtype)

    def forward(self, questions: Sequence[str], candidates: Sequence[Sequence[str]]) -> Tensor:
        """``judge`` without the cost: ``[I, k]`` logits."""
        return self.judge(questions, candidates)[0]

    def judge(self, questions: Sequence[str], candidates: Sequence[Sequence[str]]) -> tuple[Tensor, int]:
        """Logits ``[I, k]``, the highest for the caption that helps most, and what they cost (2 x MACs).

        Args:
            questions: ``I`` of them.
            candidates: for each the same number ``k`` of captions.

        Raises:
            InputError: other numbers of candidates than of questions, or not the same for each; an empty question.
        """
        check_questions(questions)
        counts = [len(texts) for texts in candidates]
        check(
            len(counts) == len(questions) > 0,
            "candidates",
            f"one list for each of {len(questions)} questions",
            len(counts),
        )
        check(len({*counts}) == 1 and counts[0] > 0, "candidates", "as many for each question", counts)
        texts = [
            TEMPLATE.format(question=question, caption=caption)
            for question, captions in zip(questions, candidates, strict=True)
            for caption in captions
        ]
        tokens = self.tokenizer(
            texts, padding=True, truncation=True, max_length=self._context(), return_tensors="pt"
        ).to(self.device)
        x = self._encoded(tokens).view(len(questions), counts[0], -1).to(self.score.weight.dtype)
        for block in self.blocks:
            x = block(x, None)
        return self.score(x).squeeze(-1), self.flops(len(questions), counts[0], tokens["input_ids"].shape[1])

    def flops(self, images: int, candidates: int, tokens: int) -> int:
        """FLOPs (2 x MACs) of one ``judge``: every text through the encoder (its pooler left out), then our layers.

        Args:
            images: questions of the call.
            candidates: captions a question.
            tokens: of the longest text, as all are padded to it.
        """
        config = self.config.text_encoder.get_text_config()
        poolers = tuple(
            m for name, m in self.text_encoder.named_modules() if name.split(".")[-2:-1] == ["pooler"]
        )
        text = 2 * weights(self.text_encoder, poolers) * tokens + attention_flops(config, tokens, tokens)
        width = self.score.in_features
        layer = block_flops(width, self.config.mlp_ratio, candidates)
        return images * (candidates * (text + 2 * width) + len(self.blocks) * layer)

    def train(self, mode: bool = True) -> Selector:
        """As of any module; a frozen text encoder stays without dropout."""
        super().train(mode)
        if not self.config.train_text_encoder:
            self.text_encoder.eval()
        return self

    def _freeze(self) -> None:
        self.text_encoder.requires_grad_(self.config.train_text_encoder)

    def _encoded(self, tokens: Any) -> Tensor:
        """One vector a text, ``[T, W]``."""
        with nullcontext() if self.config.train_text_encoder else torch.no_grad():
            given = self.text_encoder(input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"])
            if "pooler_output" in given:  # an output lists what it has
                return given["pooler_output"]
            real = tokens["attention_mask"][..., None].to(given.last_hidden_state.dtype)
            return (given.last_hidden_state * real).sum(1) / real.sum(1)

    def _context(self) -> int:
        config = self.config.text_encoder.get_text_config()
        return min(getattr(config, "max_position_embeddings", 512), self.tokenizer.model_max_length)
