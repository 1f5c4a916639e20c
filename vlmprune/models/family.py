"""Which models can be pruned: finds a VLM's parts, or says in one sentence why it is refused."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from vlmprune.errors import ModelError, check
from vlmprune.flops import DecoderShape
from vlmprune.models.families import FAMILIES, HAS_CLS, REFUSED, Family, token_grid
from vlmprune.policies.base import Grid, PruningPolicy


@dataclass(frozen=True)
class Parts:
    """The modules of one VLM instance that pruning touches.

    Attributes:
        model: the module whose ``generate`` is called.
        base: its inner model, which merges image features into the text.
        text: the language model; ``layers`` are its decoder layers.
        vision, projector: vision tower and multi-modal projector.
        family: the model's row in the table of families.
        token_ids: id of the placeholder token of an "image" and, if the model knows videos, of a "video".
    """

    model: Any  # transformers' modules; torch types their attributes as Tensor | Module, which helps nobody
    base: Any
    text: Any
    layers: list[Any]
    vision: Any
    projector: Any
    config: Any
    family: Family
    token_ids: dict[str, int]


def check_config(config: Any) -> None:
    """Raise ModelError unless this configuration is of a known family and all its decoder layers see everything."""
    kind = getattr(config, "model_type", type(config).__name__)
    if kind in REFUSED:
        raise ModelError(f"model: {kind!r} cannot be pruned: {REFUSED[kind]}")
    text, vision = getattr(config, "text_config", None), getattr(config, "vision_config", None)
    if text is None or vision is None or getattr(config, "image_token_id", None) is None:
        raise ModelError(f"model: expected a vision-language model with visual tokens, got {kind!r}")
    family = FAMILIES.get(kind)
    for name, got, known in (
        ("model", kind, tuple(FAMILIES)),
        ("vision tower", vision.model_type, family.towers if family else (vision.model_type,)),
        ("decoder", text.model_type, family.decoders if family else (text.model_type,)),
    ):
        if got not in known:
            raise ModelError(f"{name}: expected one of {', '.join(known)}, got {got!r}")
    _check_attention(text)
    strategy, cls = getattr(config, "vision_feature_select_strategy", None), vision.model_type in HAS_CLS
    if strategy is not None and (strategy == "default") != cls:
        expected, why = ("default", "its CLS row would count as") if cls else ("full", "it would lose")
        raise ModelError(
            f"vision_feature_select_strategy: expected {expected!r} with {vision.model_type}, "
            f"got {strategy!r} ({why} a patch)"
        )


def _check_attention(text: Any) -> None:
    """Raise ModelError if a decoder layer attends through a sliding window, or is no attention at all."""
    window, kinds = getattr(text, "sliding_window", None), getattr(text, "layer_types", None)
    if not kinds and window and getattr(text, "use_sliding_window", True):
        kinds = ["sliding_attention"]
    odd = sorted({*(kinds or ())} - {"full_attention"})
    if odd:
        got = (
            f"a sliding window of {window}" if odd == ["sliding_attention"] else f"layers of {', '.join(odd)}"
        )
        raise ModelError(
            f"decoder: expected full attention in every layer, got {got}: "
            "after pruning such a layer would silently cover more of the prompt"
        )


def check_layers(policy: PruningPolicy, config: Any) -> None:
    """Raise ValueError if a stage lies beyond the last decoder layer, or before the first at which it can be."""
    depth, first = config.text_config.num_hidden_layers, FAMILIES[config.model_type].first(config)
    for layer in policy.layers:
        check(layer < depth, "layer", f"at most {depth - 1} (the decoder has {depth} layers)", layer)
        why = f"{config.model_type} adds visual features to the whole prompt up to layer {first - 1}"
        check(layer >= first, "layer", f"at least {first} ({why})", layer)


def patch_grid(config: Any) -> Grid:
    """Rows and columns of visual tokens that one image becomes. Raises ModelError where images differ."""
    family = FAMILIES[config.model_type]
    if not family.square:
        raise ModelError(f"model: expected a family whose images share one grid, got {config.model_type!r}")
    return token_grid(config)


def find_parts(model: Any) -> Parts:
    """Find the parts of a supported VLM; PEFT wrappers are looked through. Raises ModelError otherwise."""
    if hasattr(model, "get_base_model"):
        model = model.get_base_model()
    config: Any = getattr(model, "config", None)
    check_config(config)
    base, family = model.base_model, FAMILIES[config.model_type]
    if base is model or not hasattr(base, family.text):
        raise ModelError(
            f"model: expected the class with the language-modeling head, got {type(model).__name__}"
        )
    text = getattr(base, family.text)
    ids = {"image": config.image_token_id, "video": getattr(config, "video_token_id", None)}
    return Parts(
        model=model,
        base=base,
        text=text,
        layers=list(text.layers),
        vision=getattr(base, family.vision),
        projector=base.get_submodule(family.projector),
        config=config,
        family=family,
        token_ids={kind: number for kind, number in ids.items() if number is not None},
    )


def tower_layers(vision: Any) -> nn.ModuleList:
    """The vision tower's blocks, whatever its family calls them."""
    tower = getattr(vision, "vision_model", vision)
    tower = getattr(tower, "encoder", tower)
    return next(getattr(tower, name) for name in ("layers", "layer", "blocks") if hasattr(tower, name))


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


def vision_flops(parts: Parts, crops: Sequence[int]) -> int:
    """FLOPs of the vision tower and projector on ``crops`` of so many patches: 2 x the weights a row meets, and attention.

    Windowed layers (Qwen2.5-VL) are counted as if every window were full.
    """
    vision, layers = parts.config.vision_config, tower_layers(parts.vision)
    width = getattr(vision, "embed_dim", vision.hidden_size)
    cls = vision.model_type in HAS_CLS
    mergers = [parts.projector, *getattr(parts.vision, "deepstack_merger_list", ())]
    stem = sum(m.weight.numel() for m in parts.vision.modules() if isinstance(m, nn.Conv2d | nn.Conv3d))
    total = 0
    for patches in crops:
        rows = patches + cls
        total += 2 * (stem * patches + linear_weights(layers) * rows)
        total += sum(4 * rows * span * width for span in _spans(vision, rows))
    side = parts.family.side(parts.config)
    return total + sum(2 * linear_weights(m) for m in mergers) * sum(crops) // side**2


def _spans(vision: Any, rows: int) -> list[int]:
    """How many rows each row attends to, layer by layer."""
    depth = getattr(vision, "depth", None) or vision.num_hidden_layers
    full = getattr(vision, "fullatt_block_indexes", None)
    if full is None:
        return [rows] * depth
    window = (vision.window_size // vision.patch_size) ** 2
    return [rows if i in full else min(rows, window) for i in range(depth)]


def linear_weights(module: nn.Module) -> int:
    """Weights of all linear layers inside a module; by their sizes, since quantized ones are stored otherwise."""
    return sum(m.in_features * m.out_features for m in module.modules() if isinstance(m, nn.Linear))
