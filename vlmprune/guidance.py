"""SGL: a small model answers first; what it looked at guides the pruning of a large one, which a sure answer leaves out.

"A Stitch in Time Saves Nine: Small VLM is a Precise Guidance for Accelerating Large VLMs" (CVPR 2025, arXiv 2412.03324).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any, Literal

import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn.functional import interpolate, pad

from vlmprune.checkpoints import Checkpoint, build_text, generate, make_inputs
from vlmprune.errors import ModelError, check
from vlmprune.models import Run, prune
from vlmprune.models.watching import Watch
from vlmprune.policies.base import Grid, TokenContext, tokens_in
from vlmprune.policies.checks import check_keep, check_share
from vlmprune.policies.sgl import SGL

__all__ = ["Answer", "First", "Guidance", "Stitch", "answer_first", "consistency"]


@dataclass(frozen=True, eq=False)
class Guidance:
    """Scores of one prompt's visual tokens (of a batch: of all its prompts), for ``SGL(guide=...)`` on the same prompt.

    Where another model has other grids for the same images, each grid's scores are resampled, bilinear with antialiasing,
    and keep their sum but for the edges. The paper uses models of one family, whose grids are the same; newline tokens are
    resampled as the column of the grid that they stand in.

    Attributes:
        scores: ``[B, N]`` float32, in prompt order, the higher survives.
        grids: per sample, the grids of its visual tokens.
        sizes: per sample, the visual tokens of each of its images.

    Raises:
        InputError: when called, another number of samples, of images, or of grids of an image; a prompt in chunks.
    """

    scores: Tensor
    grids: tuple[tuple[Grid, ...], ...]
    sizes: tuple[tuple[int, ...], ...]

    def __repr__(self) -> str:
        return f"Guidance(of {len(self.sizes)} prompts)"

    def __call__(self, ctx: TokenContext) -> Tensor:
        """``[B, N]`` for the tokens that enter a stage. No host read."""
        check(
            ctx.shares is None,
            "prefill_chunk_size",
            "None with a guide of whole prompts",
            "a prompt in chunks",
        )
        samples = f"the {len(self.sizes)} samples that the guide was made of"
        check(len(self.sizes) == len(ctx.counts), "guide", samples, len(ctx.counts))
        scores = self.scores.to(ctx.device)
        if ctx.grids != self.grids or ctx.images() != self.sizes:
            wanted = zip(ctx.grids, ctx.images(), strict=True)
            parts = [self._resampled(b, *sample) for b, sample in enumerate(wanted)]
            scores = nn.utils.rnn.pad_sequence(parts, batch_first=True)
        if not scores.shape[1]:
            return scores.new_zeros(ctx.mask.shape)
        return scores.gather(1, ctx.ordinals.clamp(min=0))

    def _resampled(self, sample: int, grids: Sequence[Grid], sizes: Sequence[int]) -> Tensor:
        """``[N']`` one sample's scores in other grids."""
        old, new = list(_by_image(self.grids[sample], self.sizes[sample])), list(_by_image(grids, sizes))
        one, other = ([len(image) for image in images] for images in (old, new))
        name = f"guide, sample {sample}"
        check(one == other, name, f"images of {one} grids, as the guide has seen them", f"of {other}")
        flat, wanted = self.grids[sample], [grid for image in new for grid in image]
        bounds = pairwise(accumulate(map(_cells, flat), initial=0))
        row = self.scores[sample]
        parts = [_resize(row[a:b], *pair) for (a, b), *pair in zip(bounds, flat, wanted, strict=True)]
        return torch.cat(parts) if parts else row[:0]


def _cells(grid: Grid) -> int:
    return tokens_in([grid])


def _by_image(grids: Sequence[Grid], sizes: Sequence[int]) -> Iterator[list[Grid]]:
    """The grids of each image."""
    rest = iter(grids)
    for size in sizes:
        image: list[Grid] = []
        while tokens_in(image) < size:
            image.append(next(rest))
        yield image


def _resize(scores: Tensor, old: Grid, new: Grid) -> Tensor:
    """Scores of one grid's tokens, ``[n]``, in another grid: what it received is spread over as many tokens as there are."""
    if old == new:
        return scores
    grid = interpolate(scores.view(1, 1, *old), size=new, mode="bilinear", antialias=True)
    return grid.flatten() * (_cells(old) / _cells(new))


@dataclass(frozen=True, eq=False)
class First:
    """What a small model said to a batch of prompts, and what it looked at meanwhile.

    Attributes:
        tokens: ``[B, T]`` int64, its greedy answers.
        spoken: ``[B, T]`` bool, False behind the token that ends an answer.
        confidence: ``[B]`` float32 in [0, 1], the geometric mean of its tokens' probabilities, the ending one included.
        guidance: for ``SGL(guide=...)``.
        run: its prefill and decoding; reading the attention is part of their seconds.
    """

    tokens: Tensor
    spoken: Tensor
    confidence: Tensor
    guidance: Guidance
    run: Run


@torch.no_grad()
def answer_first(model: Any, inputs: Mapping[str, Any], max_new_tokens: int = 64) -> First:
    """Let a small model answer greedily, and sum what every layer's rows pay to the visual tokens meanwhile.

    Rows are those of the prompt from its last visual token on, and those of the answer but its last token, as in the
    released code; no attention matrix is made, whatever the model's ``attn_implementation``. It may be the model that
    is guided afterwards.

    Args:
        model: as for ``prune``, with no policy attached.
        inputs: of a processor: ids, mask, pixels; padded on the left.
        max_new_tokens: how long an answer may be, at least 1.

    Raises:
        ModelError: as ``prune``; a decoding that no hook sees (compiled as a whole).
        InputError: a policy is attached.
    """
    found = model.generation_config.eos_token_id
    ends = [] if found is None else [found] if isinstance(found, int) else list(found)
    with Watch(model, ends) as watch:
        out = model.generate(
            **inputs,
            max_new_tokens=max_new_tokens,
            do_sample=False,
            num_beams=1,
            num_return_sequences=1,
            output_scores=True,
            return_dict_in_generate=True,
        )
    received = watch.received()
    tokens = out.sequences[:, -len(out.scores) :]
    if received.steps != len(out.scores) - 1:
        raise ModelError(
            f"generate: expected {len(out.scores) - 1} steps that hooks see, got {received.steps}"
        )
    last = torch.isin(tokens, torch.tensor(ends, dtype=torch.int64, device=tokens.device)).long()
    spoken = last.cumsum(1) - last == 0
    logs = torch.stack([_logs(step, at) for step, at in zip(out.scores, tokens.unbind(1), strict=True)], 1)
    confidence = (logs.masked_fill(~spoken, 0).sum(1) / spoken.sum(1)).exp()
    return First(tokens, spoken, confidence, Guidance(*received[:3]), watch.run)


def _logs(logits: Tensor, tokens: Tensor) -> Tensor:
    """Log-probability of ``tokens [...]`` by ``logits [..., V]``, float32."""
    logs = logits.float().log_softmax(-1)
    return logs.gather(-1, tokens.to(logs.device)[..., None])[..., 0]


@torch.no_grad()
def consistency(model: Any, inputs: Mapping[str, Any], first: First, keep: int | float = 0.05) -> Tensor:
    """``[B]`` float32 in [0, 1]: how probable its own answer is to a small model that sees few of the visual tokens.

    The product of the probabilities of all tokens of the answer, in one forward of prompt and answer in which the best
    tokens by its own guidance alone are left, before the first layer: as released, 5 % of them. The tower runs once more.

    Args:
        model, inputs, first: what ``answer_first`` was given, and gave.
        keep: what stays, a share or a number per image.
    """
    ids, steps = inputs["input_ids"], first.tokens.shape[1]
    rest = {name: _longer(x, ids, steps) for name, x in inputs.items()}
    mask = inputs["attention_mask"] if "attention_mask" in inputs else torch.ones_like(ids)
    rest["attention_mask"] = torch.cat([mask, first.spoken.to(mask)], 1)
    rest["input_ids"] = torch.cat([ids, first.tokens], 1)
    with prune(model, SGL(first.guidance, layer=0, keep=keep)):
        logits = model(**rest, logits_to_keep=steps + 1, use_cache=False).logits
    logs = _logs(logits[:, :-1], first.tokens)
    return logs.masked_fill(~first.spoken.to(logs.device), 0).sum(1).exp()


def _longer(x: Any, ids: Tensor, steps: int) -> Any:
    """An input that says something of each token (which are an image's, say), with zeros for an answer behind."""
    return pad(x, (0, steps)) if isinstance(x, Tensor) and x.shape == ids.shape else x


@dataclass(frozen=True, eq=False)
class Answer:
    """What came of a question.

    Attributes:
        text: the answer.
        by: which model gave it.
        first: the small model's answer.
        confidence, consistency: of that, in [0, 1]; consistency is None where nothing asked for it.
        score: their mean, by which a small model's answer is taken; None likewise.
        run: the large model's, pruned; None where it was not asked.
    """

    text: str
    by: Literal["small", "large"]
    first: str
    confidence: float
    consistency: float | None
    score: float | None
    run: Run | None


@dataclass(frozen=True)
class Stitch:
    """Two models that answer together: the small one first, and the large one, pruned by what it looked at, if need be.

    The small answer is taken where the mean of confidence and consistency reaches ``threshold``. The released code
    computes the two, and asks the large model in any case; how they are joined stands there as comments, product and
    average, and the average is our reading. It names no threshold.

    Args:
        small, large: checkpoints; the same one guides itself.
        depth: share of the large decoder's layers before the stage, ``int(depth * layers)``, as released.
        keep: what stays there, a share or a number per image; .4 and .4 are those of the authors' script.
        threshold: in [0, 1]; None (default) = the large model is always asked.
        left: what the small model sees of the visual tokens when its answer is tried again.

    Raises:
        InputError: a setting is out of range.

    Example:
        >>> from vlmprune.checkpoints import Checkpoint
        >>> from vlmprune.guidance import Stitch
        >>> from PIL import Image
        >>> world = Checkpoint("examples/glyphworld/checkpoint", device="cpu")
        >>> image = Image.open("examples/glyphworld/images/scene_70001.png")
        >>> answer = Stitch(world, world, threshold=0.9).ask([image], "how many phones are there ?")
        >>> answer.by in ("small", "large"), 0 <= answer.score <= 1
        (True, True)
    """

    small: Checkpoint
    large: Checkpoint
    depth: float = 0.4
    keep: int | float = 0.4
    threshold: float | None = None
    left: int | float = 0.05

    def __post_init__(self) -> None:
        for name in ("small", "large"):
            check(
                isinstance(getattr(self, name), Checkpoint), name, "a Checkpoint", repr(getattr(self, name))
            )
        fits = isinstance(self.depth, int | float) and 0 <= self.depth < 1
        check(fits, "depth", "a share in [0, 1)", repr(self.depth))
        check_keep(self.keep)
        check_keep(self.left, "left")
        if self.threshold is not None:
            check_share("threshold", self.threshold)

    @property
    def layer(self) -> int:
        """Where the large model is pruned."""
        return int(self.large.config.text_config.num_hidden_layers * self.depth)

    def ask(self, images: Sequence[Image.Image], text: str, max_new_tokens: int = 64) -> Answer:
        """One prompt, as ``vlmprune run`` takes it: typed, or in the checkpoints' own chat templates.

        Raises:
            InputError: what one of the processors does not take; images that the two models see in different grids.
            ModelError: a model that cannot be pruned.
        """
        small, inputs = self.small, _inputs(self.small, images, text)
        first = answer_first(small.model, inputs, max_new_tokens)
        said, sure = _text(small, first.tokens), first.confidence.item()
        steady = score = None
        if self.threshold is not None:
            steady = consistency(small.model, inputs, first, self.left).item()
            score = (sure + steady) / 2
            if score >= self.threshold:
                return Answer(said, "small", said, sure, steady, score, None)
        policy = SGL(first.guidance, layer=self.layer, keep=self.keep)
        asked = _inputs(self.large, images, text)
        run, tokens = generate(self.large.model, asked, policy, max_new_tokens=max_new_tokens)
        return Answer(_text(self.large, tokens), "large", said, sure, steady, score, run)


def _inputs(checkpoint: Checkpoint, images: Sequence[Image.Image], text: str) -> Any:
    """One prompt for a checkpoint, where its model is."""
    prompt = build_text(checkpoint.processor, text, len(images))
    inputs = make_inputs(checkpoint.processor, [prompt], [list(images)], "images")
    return inputs.to(checkpoint.model.device, dtype=checkpoint.model.dtype)


def _text(checkpoint: Checkpoint, tokens: Tensor) -> str:
    """The answer of a batch of one."""
    said: str = checkpoint.processor.tokenizer.batch_decode(tokens, skip_special_tokens=True)[0]
    return said.strip()
