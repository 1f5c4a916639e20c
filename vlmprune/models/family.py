"""Which models can be pruned: finds a VLM's parts, or says in one sentence why it is refused."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from vlmprune.errors import ModelError, check
from vlmprune.flops import DecoderShape, projector_flops, vision_tower_flops
from vlmprune.policies.base import Grid, PruningPolicy

VLM_TYPES = ("llava",)
VISION_TYPES = ("clip_vision_model", "siglip_vision_model")
DECODER_TYPES = ("llama", "mistral", "qwen2")


@dataclass(frozen=True)
class Parts:
    """The modules of one VLM instance that pruning touches.

    Attributes:
        model: the module whose ``generate`` is called.
        base: its inner model, which merges image features into the text.
        text: the language model; ``layers`` are its decoder layers.
        vision, projector: vision tower and multi-modal projector.
        image_token_id: id of the image placeholder token.
        grid: patch rows and columns of every image.
    """

    model: Any  # transformers' modules; torch types their attributes as Tensor | Module, which helps nobody
    base: Any
    text: Any
    layers: list[Any]
    vision: Any
    projector: Any
    config: Any
    image_token_id: int
    grid: Grid


def check_config(config: Any) -> None:
    """Raise ModelError unless this configuration is a LLaVA-1.5-type model whose decoder layers all see everything."""
    kind = getattr(config, "model_type", type(config).__name__)
    text, vision = getattr(config, "text_config", None), getattr(config, "vision_config", None)
    if text is None or vision is None or getattr(config, "image_token_id", None) is None:
        raise ModelError(f"model: expected a vision-language model with visual tokens, got {kind!r}")
    for name, got, known in (
        ("model", kind, VLM_TYPES),
        ("vision tower", vision.model_type, VISION_TYPES),
        ("decoder", text.model_type, DECODER_TYPES),
    ):
        if got not in known:
            raise ModelError(f"{name}: expected one of {', '.join(known)}, got {got!r}")
    if slides(text):
        raise ModelError(
            f"decoder: expected full attention in every layer, got a sliding window of {text.sliding_window}: "
            "after pruning the window would silently cover more of the prompt"
        )


def slides(text: Any) -> bool:
    """True if any decoder layer attends through a sliding window."""
    kinds = getattr(text, "layer_types", None)
    if kinds:
        return any(kind != "full_attention" for kind in kinds)
    return getattr(text, "sliding_window", None) is not None and getattr(text, "use_sliding_window", True)


def check_layers(policy: PruningPolicy, depth: int) -> None:
    """Raise ValueError if a stage lies beyond the last decoder layer."""
    for layer in policy.layers:
        check(layer < depth, "layer", f"at most {depth - 1} (the decoder has {depth} layers)", layer)


def patch_grid(config: Any) -> Grid:
    """Patch rows and columns that one image becomes; every row of them is one visual token."""
    vision = config.vision_config
    size, patch = vision.image_size, vision.patch_size
    height, width = (size, size) if isinstance(size, int) else size
    has_cls = vision.model_type == "clip_vision_model"
    if has_cls and config.vision_feature_select_strategy == "full":
        raise ModelError(
            "vision_feature_select_strategy: expected 'default' with a CLIP tower, "
            "got 'full' (its CLS row would count as a patch)"
        )
    return height // patch, width // patch


def find_parts(model: Any) -> Parts:
    """Find the parts of a supported VLM; PEFT wrappers are looked through. Raises ModelError otherwise."""
    if hasattr(model, "get_base_model"):
        model = model.get_base_model()
    config: Any = getattr(model, "config", None)
    check_config(config)
    base = model.base_model
    if base is model or not hasattr(base, "language_model"):
        raise ModelError(
            f"model: expected the class with the language-modeling head, got {type(model).__name__}"
        )
    text = base.language_model
    return Parts(
        model=model,
        base=base,
        text=text,
        layers=list(text.layers),
        vision=base.vision_tower,
        projector=base.multi_modal_projector,
        config=config,
        image_token_id=config.image_token_id,
        grid=patch_grid(config),
    )


def decoder_shape(config: Any) -> DecoderShape:
    """The decoder's dimensions, for counting FLOPs."""
    text = config.text_config
    heads = text.num_attention_heads
    return DecoderShape(
        layers=text.num_hidden_layers,
        hidden=text.hidden_size,
        heads=heads,
        kv_heads=text.num_key_value_heads,
        head_dim=getattr(text, "head_dim", None) or text.hidden_size // heads,
        intermediate=text.intermediate_size,
    )


def vision_flops(config: Any) -> int:
    """FLOPs of the vision tower (all its layers run, whichever feeds the projector) and projector, for one image."""
    vision, text = config.vision_config, config.text_config
    patches = patch_grid(config)[0] * patch_grid(config)[1]
    features = config.vision_feature_layer
    width = vision.hidden_size * (1 if isinstance(features, int) else len(features))
    tower = vision_tower_flops(
        layers=vision.num_hidden_layers,
        tokens=patches + (vision.model_type == "clip_vision_model"),
        hidden=vision.hidden_size,
        intermediate=vision.intermediate_size,
        patches=patches,
        patch_size=vision.patch_size,
        channels=vision.num_channels,
    )
    return tower + projector_flops(patches, (width, text.hidden_size, text.hidden_size))
