"""Training on clips: packed batches, three more losses, and the trainer of pictures with both.

A OneVision token does not say of which frame it is: its position alone does. Left to the answers, that is learned late (after
700 steps things were found, but mostly not when). So the decoder's states in the middle are asked for the frame and
for the motion of what is seen; some heads are told where to look: at a thing's place a frame before, and, where an answer
is given, at what is asked about.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import LlavaOnevisionForConditionalGeneration
from world.video_questions import ClipQuestion, ask_clip
from world.video_words import FAMILIES
from world.videos import CELLS, DIRECTIONS, FRAMES, Clip, cell, make_clip
from world.words import COLORS, SHAPES

from training.batches import IGNORED, Ints, Row, Text
from training.loop import Plan, Trainer
from training.losses import rare, read, word_loss
from training.video_model import TOKENS, pixels
from training.wording import Wording

# Shares of the families in training: most for where and when.
MIX = {"where": 0.2, "place": 0.06, "at": 0.1, "when": 0.18, "total": 0.1, "count": 0.14, "way": 0.08, "mover": 0.06, "exist": 0.08}  # fmt: skip
MOTIONS = ("", "new", "rest", *DIRECTIONS)  # of what a token shows the middle of; "" = of nothing
_KNOWN = 4  # decoder layers after which frame and motion are to be known
_FOLLOWING = 2, 1  # the layer, and how many of its heads, that look at the frame before
_ANSWERING = (
    5,
    2,
)  # those that look at what is asked about: of what moves one at where it begins, one at where it ends
_ENDS = ("way", "mover")  # families of which that is asked
_MISSES = 10  # draws that gave no new question, after which a clip gets no more


@dataclass(frozen=True)
class Clips(Text):
    """The text behind B clips of F frames, the frames, and what each token shows the middle of, C tokens a frame."""

    images: Tensor  # [B, F, side, side, 3] uint8
    anchor_shape: Tensor  # [B, F C] 1 + shape, 0 = nothing
    anchor_color: Tensor  # [B, F C] 1 + colour, 0 = nothing
    motion: Tensor  # [B, F C] index into MOTIONS
    before: Tensor  # [B, F C] the token of the same thing a frame before, -1 = none
    asked: Tensor  # [B, 2, T, F C] bool: where an answer is given, the tokens of what it is about, for each of two heads


def make_clips(seeds: Sequence[int], wording: Wording, text: int = 192) -> Clips:
    """The batch of these clips, the same whenever it is made."""
    clips = [make_clip(seed) for seed in seeds]
    rows = [_row(seed, clip, wording, text) for seed, clip in zip(seeds, clips, strict=True)]
    shown = [_tokens(clip) for clip in clips]
    asked = [[_asked(*row)] for row in rows]
    texts = [row.columns() for row, _ in rows]
    stacked = [
        torch.from_numpy(np.stack(column))
        for part in (texts, [[clip.frames] for clip in clips], shown, asked)
        for column in zip(*part, strict=True)
    ]
    return Clips(torch.tensor(wording.prefix), *stacked)


def _row(seed: int, clip: Clip, wording: Wording, text: int) -> tuple[Row, list[ClipQuestion]]:
    """The questions behind one clip, and which they are."""
    row, asked = Row(wording, text), []
    row.tell((), len(wording.prefix) + TOKENS)
    misses = 0
    for question in _ask(clip, np.random.default_rng((seed, 7))):
        if row.ask(question):
            asked.append(question)
        else:
            misses += 2  # a shorter one may still fit
        if misses >= _MISSES:
            break
    return row, asked


def _asked(row: Row, questions: Sequence[ClipQuestion]) -> NDArray[np.bool_]:
    """For every position of the text the tokens of what the answer that is given there is about, ``[2, T, F C]``."""
    _, labels, segment, *_ = row.columns()
    told = np.zeros((2, len(labels), FRAMES, CELLS, CELLS), bool)
    for number, question in enumerate(questions, 1):
        here = (segment == number) & (labels != IGNORED)
        ends = question.family in _ENDS
        for head, seen in enumerate(
            (question.seen[:1], question.seen[-1:]) if ends else (question.seen,) * 2
        ):
            for time, box in seen:
                told[head, here, time, *cell(box)] = True
    return told.reshape(2, len(labels), -1)


def _ask(clip: Clip, rng: np.random.Generator) -> Iterator[ClipQuestion]:
    """Different questions, until too many draws gave no new one."""
    seen: set[tuple[str, ...]] = set()
    misses = 0
    while misses < _MISSES:
        question = ask_clip(clip, rng.choice(FAMILIES, p=[MIX[family] for family in FAMILIES]), rng)
        if question is None or question.words in seen:
            misses += 1
            continue
        seen.add(question.words)
        yield question


def _tokens(clip: Clip) -> Ints:
    """Shape, colour, motion and token a frame before of what has its middle in the cell of each token, ``[4, F C]``."""
    shown = np.zeros((4, FRAMES, CELLS, CELLS), np.int64)
    shown[3] = -1
    for thing in clip.things:
        motion = MOTIONS.index(thing.way or "rest")
        for time in range(thing.first, thing.last + 1):
            said, before = MOTIONS.index("new"), -1
            if time > thing.first:
                place = time - 1, *cell(thing.box(time - 1))
                said, before = motion, np.ravel_multi_index(place, (FRAMES, CELLS, CELLS))
            shown[:, time, *cell(thing.box(time))] = 1 + thing.shape, 1 + thing.color, said, before
    return shown.reshape(4, -1)


class ClipHeads(nn.Module):
    """Linear heads that exist during training only.

    The anchors read the visual tokens, as those of pictures do; frame and motion the decoder's states of them.
    """

    def __init__(self, vision: int, decoder: int) -> None:
        super().__init__()
        self.anchor_norm, self.state_norm = nn.LayerNorm(decoder), nn.LayerNorm(decoder)
        self.anchor_shape = nn.Linear(decoder, 1 + len(SHAPES))
        self.anchor_color = nn.Linear(decoder, 1 + len(COLORS))
        self.frame, self.motion = nn.Linear(decoder, FRAMES), nn.Linear(decoder, len(MOTIONS))

    def forward(self, tokens: Tensor, batch: Clips) -> Tensor:
        """Sum of the losses of the anchors; ``tokens [B, F C, decoder]``."""
        anchors = self.anchor_norm(tokens)
        shape, color = self.anchor_shape(anchors), self.anchor_color(anchors)
        return rare(shape, batch.anchor_shape) + rare(color, batch.anchor_color)

    def follow(self, states: Tensor, batch: Clips) -> Tensor:
        """Sum of the losses of frame and motion; ``states [B, F C, decoder]``."""
        states = self.state_norm(states)
        number = torch.arange(FRAMES, device=states.device).repeat_interleave(CELLS**2)
        frame = self.frame(states).float().flatten(0, 1)
        return F.cross_entropy(frame, number.repeat(len(states))) + rare(self.motion(states), batch.motion)


def see_clips(model: LlavaOnevisionForConditionalGeneration, images: Tensor) -> Tensor:
    """The visual tokens ``[B, F C + 1, decoder]``."""
    seen = model.model.get_video_features(
        pixels(
            images
        ),  # by place: transformers 5.17 has another name for it, and puts no newline behind the tokens
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        return_dict=True,
    ).pooler_output[:, : TOKENS - 1]
    return torch.cat([seen, model.model.image_newline.to(seen).expand(len(seen), 1, -1)], 1)


def clip_losses(
    model: LlavaOnevisionForConditionalGeneration, heads: ClipHeads, projected: Tensor, batch: Clips
) -> tuple[Tensor, Tensor, Tensor]:
    """The losses of the answers, of frame and motion, and of where some heads look."""
    out = read(model, projected, batch, output_hidden_states=True, output_attentions=True)
    visual = slice(len(batch.prefix), len(batch.prefix) + TOKENS - 1)
    states = out.hidden_states[_KNOWN][:, visual]
    (layer, number), (last, several) = _FOLLOWING, _ANSWERING
    followed = out.attentions[layer][:, :number, visual, visual]
    before = F.one_hot(batch.before + 1, TOKENS)[..., 1:]
    answering = out.attentions[last][:, :several, -batch.ids.shape[1] :, visual]
    looks = _looks(followed, before[:, None]) + _looks(answering, batch.asked)
    return word_loss(model, out.last_hidden_state, batch), heads.follow(states, batch), looks


def _looks(attention: Tensor, wanted: Tensor) -> Tensor:
    """How much of their attention ``[B, heads, Q, K]`` those queries that have a wanted key ``[B, heads, Q, K]`` spend elsewhere."""
    there = (attention.float() * wanted).sum(-1)
    told = wanted.any(-1).float()
    return -(there.clamp_min(1e-6).log() * told).sum() / told.sum().clamp_min(1)


class ClipTrainer(Trainer):
    """A trainer whose pictures are clips. What a glyph looks like the tower knows from pictures: it is frozen."""

    kind = "video"
    make_heads = ClipHeads
    frozen = ("model.model.vision_tower.",)
    weights = Trainer.weights | {"time": 0.3, "looks": 0.1}

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.see = see_clips
        self.clip_losses: Callable[..., tuple[Tensor, Tensor, Tensor]] = clip_losses

    def compile(self) -> None:
        """Compile the two halves of the model."""
        self.see, self.clip_losses = torch.compile(see_clips), torch.compile(clip_losses)

    def losses(self, batch: Clips, told: None, looking: bool) -> dict[str, Tensor]:
        """What is wrong with what is seen, with the answers, and with when things are seen."""
        tokens = self.see(self.model, batch.images)
        answers, time, looks = self.clip_losses(self.model, self.heads, tokens, batch)
        dense = self.heads(tokens[:, :-1], batch)
        return {"dense": dense, "answers": answers, "time": time, "looks": looks}

    def batches(self) -> Dataset[tuple[Clips, Text | None]]:
        """The clips of every step."""
        return _ClipBatches(self.plan, self.wording)


class _ClipBatches(Dataset[tuple[Clips, Text | None]]):
    """Batch number i of a plan."""

    def __init__(self, plan: Plan, wording: Wording) -> None:
        self.plan, self.wording = plan, wording

    def __getitem__(self, step: int) -> tuple[Clips, Text | None]:
        first = self.plan.first_seed + step * self.plan.batch
        return make_clips(range(first, first + self.plan.batch), self.wording, self.plan.text), None
