"""The loss of a packed batch: next tokens of the answers, plus what each patch shows (class, colour, box, object middle)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlavaForConditionalGeneration
from transformers.modeling_outputs import BaseModelOutputWithPast
from world.words import COLORS, NUMBERS, SHAPES

from training.batches import IGNORED, NOTES, PATCH_CLASSES, Batch, Text

_BACKGROUND = 0.15  # weight of a patch that shows nothing against one that shows something


class DenseHeads(nn.Module):
    """Linear heads that exist during training only.

    Class, colour and box read the vision tower's patches. The anchors read the projected tokens that the decoder gets: each
    object is announced by exactly one token, the one at its middle, which is what counting needs.
    """

    def __init__(self, vision: int, decoder: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(vision)
        self.patch_class = nn.Linear(vision, PATCH_CLASSES)
        self.patch_color = nn.Linear(vision, 1 + len(COLORS))
        self.patch_box = nn.Linear(vision, 4 * NUMBERS)
        self.anchor_norm = nn.LayerNorm(decoder)
        self.anchor_shape = nn.Linear(decoder, 1 + len(SHAPES))
        self.anchor_color = nn.Linear(decoder, 1 + len(COLORS))
        for head in self.children():
            if isinstance(head, nn.Linear):
                nn.init.zeros_(head.weight)  # says nothing to a trained model before it has learned something

    def forward(self, patches: Tensor, projected: Tensor, batch: Batch) -> Tensor:
        """Sum of the dense losses; ``patches [B, P, vision]``, ``projected [B, P, decoder]``."""
        seen, anchors = self.norm(patches), self.anchor_norm(projected)
        box = self.patch_box(seen).float().view(-1, NUMBERS)
        shown = (batch.patch_class > 0).flatten().float()
        box_loss = F.cross_entropy(box, batch.patch_box.flatten(), reduction="none").view(-1, 4).mean(1)
        return (
            rare(self.patch_class(seen), batch.patch_class)
            + rare(self.patch_color(seen), batch.patch_color)
            + (box_loss * shown).sum() / shown.sum().clamp_min(1)
            + rare(self.anchor_shape(anchors), batch.anchor_shape)
            + rare(self.anchor_color(anchors), batch.anchor_color)
        )


def see(model: LlavaForConditionalGeneration, images: Tensor) -> tuple[Tensor, Tensor]:
    """The patches ``[B, P, vision]`` of ``images [B, side, side, 3]`` uint8 as the tower leaves them, and the visual tokens.

    Visual tokens are what the decoder gets, ``[B, P, decoder]``.
    """
    pixels = (images.permute(0, 3, 1, 2) / 127.5 - 1).contiguous()
    seen = model.model.get_image_features(
        pixel_values=pixels,
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        output_hidden_states=True,
        return_dict=True,
    )
    return seen.hidden_states[-1][:, 1:], torch.stack(list(seen.pooler_output))


def answer_loss(model: LlavaForConditionalGeneration, projected: Tensor, batch: Text) -> Tensor:
    """Mean cross entropy of the tokens of all answers, given the visual tokens, of which there may be none."""
    return word_loss(model, read(model, projected, batch).last_hidden_state, batch)


def read(
    model: LlavaForConditionalGeneration, projected: Tensor, batch: Text, **options: bool
) -> BaseModelOutputWithPast:
    """What the decoder, run with these ``options``, makes of prefix, visual tokens and text."""
    embed = model.get_input_embeddings()
    prefix = embed(batch.prefix).expand(len(projected), -1, -1)
    inputs = torch.cat([prefix, projected.to(prefix.dtype), embed(batch.ids)], 1)
    first = inputs.shape[1] - batch.ids.shape[1]
    pictures = torch.arange(first, device=projected.device).expand(len(projected), -1)
    return model.model.language_model(
        inputs_embeds=inputs,
        attention_mask=packed_mask(batch.segment, batch.document, first),
        position_ids=torch.cat([pictures, batch.positions], 1),
        use_cache=False,
        **options,
    )


def word_loss(model: LlavaForConditionalGeneration, hidden: Tensor, batch: Text) -> Tensor:
    """The mean cross entropy, given the decoder's last states ``[B, S, decoder]``."""
    tokens = model.lm_head(hidden[:, -batch.ids.shape[1] :]).float().flatten(0, 1)
    return F.cross_entropy(tokens, batch.labels.flatten(), ignore_index=IGNORED)


def packed_mask(segment: Tensor, document: Tensor, first: int) -> Tensor:
    """Additive float32 mask ``[B, 1, S, S]``: causal; a question sees the ``first`` positions, its document's notes and itself."""
    whole, part = F.pad(segment, (first, 0)), F.pad(document, (first, 0))
    place = torch.arange(whole.shape[1], device=segment.device)
    told = (whole == NOTES)[:, None, :] | (whole[:, :, None] == whole[:, None, :])
    same = (place < first) | (told & (part[:, :, None] == part[:, None, :]))
    allowed = same & (place[:, None] >= place[None, :])
    return torch.where(allowed, 0.0, torch.finfo(torch.float32).min)[:, None]


def rare(scores: Tensor, target: Tensor) -> Tensor:
    """Mean cross entropy with background patches weighted down."""
    target = target.flatten()
    weight = torch.where(target > 0, 1.0, _BACKGROUND)
    loss = F.cross_entropy(scores.float().flatten(0, 1), target, reduction="none")
    return (loss * weight).sum() / weight.sum()
