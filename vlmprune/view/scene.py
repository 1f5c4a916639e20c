"""A picture and a question made ready for a checkpoint: its inputs, how many visual tokens that is, and what of it can be drawn."""

from __future__ import annotations

from typing import Any, NamedTuple

from PIL import Image

from vlmprune.checkpoints import Checkpoint, build_text, make_inputs
from vlmprune.models import patch_grid
from vlmprune.models.host.families import FAMILIES, TOWERS
from vlmprune.models.host.names import attribute
from vlmprune.policies.base import Grid
from vlmprune.view.fitting import Size
from vlmprune.view.picture import seen_images


class Seen(NamedTuple):
    """A picture as the model sees it, and the grid of its tokens; None where that is not one grid."""

    image: Image.Image | None
    grid: Grid


def make_ready(checkpoint: Checkpoint, prompt: str, picture: Image.Image, name: str = "picture") -> Any:
    """Token ids and pixel values of a question, on the CPU. Raises InputError for what the checkpoint's processor refuses."""
    text = build_text(checkpoint.processor, prompt, 1)
    return make_inputs(checkpoint.processor, [text], [[picture]], name)


def size_of(checkpoint: Checkpoint, inputs: Any) -> Size:
    """Layers of decoder and vision tower, and as many visual tokens as these inputs have."""
    config, tokenizer = checkpoint.config, checkpoint.processor.tokenizer
    image = tokenizer.convert_tokens_to_ids(checkpoint.processor.image_token)
    visual = int((inputs["input_ids"] == image).sum())
    tower = attribute(config.vision_config, TOWERS[config.vision_config.model_type].depth)
    return Size(config.text_config.num_hidden_layers, tower, visual)


def seen(checkpoint: Checkpoint, inputs: Any) -> Seen:
    """What the model sees of the one picture in these inputs."""
    shape = tuple(inputs["pixel_values"].shape)
    if len(shape) == 4 and shape[0] == 1 and FAMILIES[checkpoint.config.model_type].square:
        (image,) = seen_images(inputs["pixel_values"].float().cpu(), checkpoint.processor.image_processor)
        return Seen(image, patch_grid(checkpoint.config))
    return Seen(None, (1, size_of(checkpoint, inputs).visual))
