"""The captioner of ACCM: says in words what the tokens show that pruning drops, as far as the question needs it.

Source: ACCM: Adaptive Content Compensation Method, ACM MM 2025, arXiv 2508.01236.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
)

from vlmprune.compensation.configs import CaptionerConfig
from vlmprune.compensation.counting import generation_flops
from vlmprune.compensation.interface import Discarded
from vlmprune.compensation.mapper import Mapper
from vlmprune.compensation.parts import Part, check_questions, check_rebuilt, evaluating, is_name
from vlmprune.errors import check, require


@dataclass(frozen=True)
class Drafts:
    """What ``Captioner.draft`` gives.

    Attributes:
        texts: for each image its candidates, the likeliest first.
        flops: what writing all of them cost (2 x MACs), padding and every beam and step that ran included.
    """

    texts: list[list[str]]
    flops: int


class Captioner(Part):
    """Mapper + causal LM: reads ``[question ; prefix of the dropped tokens ; caption]``.

    The question comes as the tokenizer gives it, a token of beginning included, one of end not. The context of the language
    model has to hold the prefix, ``max_new_tokens`` and the question; a question too long for that loses its end (what is
    asked stands first, what form the answer should have last).

    Use ``make`` to build one around a language model with its weights. The constructor makes weights at random.

    Args:
        config: see there.
        language_model: a causal LM to take as it is, of the config's kind; None = a new one, weights at random.
        tokenizer: of the language model.

    Source: the Adaptive Content Compensation Method (ACCM), ACM MM 2025, https://arxiv.org/abs/2508.01236.
    """

    config_class = CaptionerConfig

    def __init__(self, config: CaptionerConfig, language_model: Any = None, tokenizer: Any = None) -> None:
        super().__init__(config)
        if language_model is None:
            language_model = AutoModelForCausalLM.from_config(config.language_model)
        self.language_model = language_model
        self.tokenizer = tokenizer
        width = language_model.get_input_embeddings().weight.shape[1]
        shape = (config.prefix, config.layers, config.heads, config.mlp_ratio)
        self.mapper = Mapper(config.feature_width, width, *shape)
        self.post_init()

    @classmethod
    def make(
        cls, feature_width: int, language_model: Any, tokenizer: Any = None, **settings: Any
    ) -> Captioner:
        """A captioner with a new mapper around a trained language model.

        Args:
            feature_width: of the VLM's projected tokens: the width of its language model.
            language_model: a causal LM, taken as it is, or the name or folder of its checkpoint.
            tokenizer: of it, or its name or folder; None = the one beside the checkpoint.
            **settings: of ``CaptionerConfig``.

        Raises:
            InputError: no tokenizer, none with an end, heads that do not divide the width, a context too short, a model with
                other weights than its configuration says, which could not be loaded again.
        """
        if is_name(language_model):
            tokenizer = tokenizer or language_model
            language_model = AutoModelForCausalLM.from_pretrained(language_model)
        if is_name(tokenizer):
            tokenizer = AutoTokenizer.from_pretrained(tokenizer)
        require(tokenizer, "tokenizer", "the language model's tokenizer")
        check_rebuilt("language_model", language_model, AutoModelForCausalLM)
        config = CaptionerConfig(
            feature_width=feature_width, language_model=language_model.config, **settings
        )
        captioner = cls(config, language_model, tokenizer)
        captioner.to(device=language_model.device, dtype=language_model.dtype)
        captioner._end()
        captioner._room()
        return captioner

    def write(self, images: Sequence[Discarded], candidates: int) -> list[list[str]]:
        """``draft`` without the cost."""
        return self.draft(images, candidates).texts

    @torch.no_grad()
    def draft(self, images: Sequence[Discarded], candidates: int, sample: bool = False) -> Drafts:
        """Candidates for all images by one beam search as wide as there are candidates (1: greedy), without dropout.

        The candidates of an image are different sequences of tokens; their texts can still be equal, or "". With ``sample``
        each is drawn instead, token by token from the whole distribution, by torch's global generator: for training, where
        beams are too alike to learn from.

        Raises:
            InputError: features of another width, an empty question, no image, ``candidates`` below 1, a context too
                short even without question.
        """
        check(candidates >= 1, "candidates", "at least 1", candidates)
        with evaluating(self):
            prompts = self._prompts(images)
            rows = pad_sequence(prompts, batch_first=True, padding_side="left")
            mask = pad_sequence(
                [rows.new_ones(len(p), dtype=torch.long) for p in prompts], True, padding_side="left"
            )
            steps = _Steps()
            written = self.language_model.generate(
                inputs_embeds=rows,
                attention_mask=mask,
                generation_config=self._search(candidates, sample),
                logits_processor=LogitsProcessorList([steps]),
            )
        texts = [self._text(ids) for ids in written.tolist()]
        dropped = max(len(image.dropped) for image in images)
        flops = self.flops(len(images), dropped, rows.shape[1], candidates, steps.run)
        return Drafts([texts[i : i + candidates] for i in range(0, len(texts), candidates)], flops)

    def log_likelihood(self, images: Sequence[Discarded], texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """How likely the captioner is to write these; differentiable.

        Args:
            images: ``I`` of them.
            texts: one an image; of more than ``max_new_tokens`` tokens with the end, the first ones count.

        Returns:
            ``[I]`` float32 sums of log p over the tokens of the caption and its end, and ``[I]`` int64 how many these are.

        Raises:
            InputError: as ``draft``; another number of texts than of images.
        """
        check(len(texts) == len(images), "texts", f"one for each of {len(images)} images", len(texts))
        prompts, captions = self._prompts(images), [self._caption(text) for text in texts]
        embed = self.language_model.get_input_embeddings()
        rows = [torch.cat([p, embed(c[:-1])]) for p, c in zip(prompts, captions, strict=True)]
        labels = [F.pad(c, (len(p) - 1, 0), value=-100) for p, c in zip(prompts, captions, strict=True)]
        wanted = pad_sequence(labels, batch_first=True, padding_value=-100)
        mask = pad_sequence([torch.ones_like(label) for label in labels], batch_first=True)
        inputs = pad_sequence(rows, batch_first=True)
        logits = self.language_model(inputs_embeds=inputs, attention_mask=mask, use_cache=False).logits
        losses = F.cross_entropy(logits.float().transpose(1, 2), wanted, ignore_index=-100, reduction="none")
        return -losses.sum(dim=1), (wanted != -100).sum(dim=1)

    def flops(self, images: int, dropped: int, prompt: int, candidates: int, steps: int) -> int:
        """FLOPs (2 x MACs) of one ``draft``: mapper, the prompts once a beam, and every step of every beam.

        Left out, as everywhere in this package: norms, softmax, activations, embeddings; and the search's bookkeeping.

        Args:
            images: images of the call.
            dropped: tokens of the image that drops most.
            prompt: tokens of the longest prompt, prefix included.
            candidates: beams.
            steps: tokens written in the longest run beam.
        """
        writing = generation_flops(self.language_model, images * candidates, prompt, steps)
        return images * self.mapper.flops(dropped) + writing

    def prefixes(self, images: Sequence[Discarded]) -> Tensor:
        """What the language model is given of the dropped tokens: ``[I, P, W]``; the prefix alone where none is."""
        weight = self.mapper.project.weight
        dropped = []
        for image in images:
            shape, width = tuple(image.features.shape), self.config.feature_width
            fits = len(shape) == 2 and shape[1] == width
            check(fits, "features", f"[tokens, {width}], as the captioner was made for", list(shape))
            chosen = image.features[image.dropped.to(image.features.device)]
            dropped.append(chosen.to(weight.device, weight.dtype))
        counts = [len(rows) for rows in dropped]
        features = pad_sequence(dropped, batch_first=True)
        if len({*counts}) == 1:
            return self.mapper(features, None)
        places = torch.arange(features.shape[1], device=weight.device)
        return self.mapper(features, places < torch.tensor(counts, device=weight.device)[:, None])

    def _prompts(self, images: Sequence[Discarded]) -> list[Tensor]:
        """For each image ``[L, W]``: its question, then its prefix."""
        check(len(images) > 0, "images", "at least one", 0)
        questions = [image.question for image in images]
        check_questions(questions)
        room = self._room()
        embed = self.language_model.get_input_embeddings()
        ids = [self._ids(self._question(question)[:room]) for question in questions]
        return [torch.cat([embed(q), prefix]) for q, prefix in zip(ids, self.prefixes(images), strict=True)]

    def _question(self, text: str) -> list[int]:
        ids = self.tokenizer(text)["input_ids"]
        return ids[:-1] if ids[-1:] == [self.tokenizer.eos_token_id] else ids

    def _caption(self, text: str) -> Tensor:
        ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        end = self._end()
        ids = ids if ids and ids[-1] == end else [*ids, end]
        return self._ids(ids[: self.config.max_new_tokens])

    def _text(self, ids: list[int]) -> str:
        """What stands before the padding that follows the end."""
        end = self._end()
        if end in ids:
            ids = ids[: ids.index(end) + 1]
        return self.tokenizer.decode(ids, skip_special_tokens=True).strip()

    def _ids(self, ids: list[int]) -> Tensor:
        return torch.tensor(ids, dtype=torch.long, device=self.language_model.device)

    def _end(self) -> int:
        end = self.config.end
        if end is None:
            return int(
                require(self.tokenizer.eos_token_id, "tokenizer", "one with an end-of-text token, or end=...")
            )
        token = self.tokenizer.convert_tokens_to_ids(end)
        check(
            token is not None and token != self.tokenizer.unk_token_id,
            "end",
            "one token of the tokenizer",
            repr(end),
        )
        return int(token)

    def _room(self) -> int | None:
        """How many tokens the question may have; None = any number."""
        config = self.language_model.config.get_text_config()
        context = getattr(config, "max_position_embeddings", None)
        if context is None:
            return None
        needed = self.config.prefix + self.config.max_new_tokens
        check(
            context > needed,
            "language_model",
            f"a context of more than {needed} tokens (prefix {self.config.prefix} + max_new_tokens "
            f"{self.config.max_new_tokens})",
            context,
        )
        return context - needed

    def _search(self, candidates: int, sample: bool) -> GenerationConfig:
        """Plain beam search whatever the checkpoint's own settings are.

        Special tokens are never written: they would vanish from the text, and what was likely would not be what it says.
        """
        end = self._end()
        special = [token for token in self.tokenizer.all_special_ids if token != end]
        return GenerationConfig(
            max_new_tokens=self.config.max_new_tokens,
            do_sample=sample,
            top_k=0 if sample else None,
            num_beams=1 if sample else candidates,
            num_return_sequences=candidates,
            early_stopping=candidates > 1 and not sample,
            length_penalty=1.0,
            repetition_penalty=1.0,
            eos_token_id=end,
            pad_token_id=end,
            suppress_tokens=special or None,
        )

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, Mapper):
            nn.init.normal_(module.prefix)


class _Steps(LogitsProcessor):  # type: ignore[misc]
    """Counts the steps of a search: what it returns is shorter where the best beams ended early."""

    def __init__(self) -> None:
        self.run = 0

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.run += 1
        return scores
