"""A tiny model with videos and a processor for it. transformers' video processors need torchvision, which tests do without."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import transformers as hf
from PIL import Image
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit

from helpers.families import BOS, CASES, EOS, IMAGE, PAD, VIDEO, build
from vlmprune.checkpoints import Checkpoint

SIDE = 16
TEMPLATE = (
    "<bos>{% for message in messages %}{% for part in message['content'] %}"
    "{% if part['type'] == 'text' %}{{ part['text'] }} {% else %}<{{ part['type'] }}> {% endif %}"
    "{% endfor %}{% endfor %}"
)


def tokenizer() -> Any:
    """Words w3, w4, ... with placeholders of images and videos."""
    words = {"<pad>": PAD, "<bos>": BOS, "<eos>": EOS, "<video>": VIDEO, "<image>": IMAGE}
    words |= {f"w{i}": i for i in range(3, VIDEO)}
    made = Tokenizer(WordLevel(words, unk_token="w3"))
    made.pre_tokenizer = WhitespaceSplit()
    marks = {"image_token": "<image>", "video_token": "<video>"}
    return hf.PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", bos_token="<bos>", extra_special_tokens=marks
    )


class Frames:
    """Stands for LLaVA-OneVision's video processor: every frame resized and scaled to 0..1. Frames are all taken as they are."""

    def __call__(self, videos: Sequence[np.ndarray], do_sample_frames: bool, **kwargs: Any) -> dict[str, Any]:
        assert not do_sample_frames
        return {"pixel_values_videos": torch.stack([torch.stack([*map(_pixels, video)]) for video in videos])}


def _pixels(frame: np.ndarray) -> torch.Tensor:
    small = Image.fromarray(frame.transpose(1, 2, 0)).resize((SIDE, SIDE))
    return torch.from_numpy(np.asarray(small).transpose(2, 0, 1) / 255).float()


def clip_checkpoint(monkeypatch: Any) -> Checkpoint:
    """A tiny LLaVA-OneVision: 2 x 2 tokens a frame and one newline."""
    checks = "transformers.processing_utils.ProcessorMixin.check_argument_for_proper_class"
    monkeypatch.setattr(checks, lambda self, name, argument: None)
    model = build(CASES["llava_onevision-video"])
    processor = hf.LlavaOnevisionProcessor(
        hf.LlavaOnevisionImageProcessor(size={"height": SIDE, "width": SIDE}),
        tokenizer(),
        Frames(),
        num_image_tokens=SIDE,
        vision_feature_select_strategy="full",
        chat_template=TEMPLATE,
    )
    return Checkpoint.of(model, processor)
