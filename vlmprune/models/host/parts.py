"""Which models can be pruned: finds a VLM's parts, or says in one sentence why it is refused."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import partial
from typing import Any

from torch import Tensor, nn
from transformers import AutoTokenizer, PretrainedConfig, PreTrainedModel

from vlmprune.errors import ModelError, check, first_line
from vlmprune.flops import DecoderShape
from vlmprune.models.host.families import (
    DECODERS,
    FAMILIES,
    REFUSED,
    TOWERS,
    Family,
    Tower,
    token_grid,
)
from vlmprune.models.host.names import Host, attribute
from vlmprune.policies.base import Grid, PruningPolicy
from vlmprune.policies.checks import check_layers


@dataclass(frozen=True)
class Parts:
    """The modules of one VLM instance that pruning touches.

    Attributes:
        model: the module whose ``generate`` is called.
        base: its inner model, which merges image features into the text.
        text: the language model; ``layers`` are its decoder layers.
        vision, projector: vision tower and multi-modal projector.
        host: what this transformers calls the arguments of their forwards.
        family, tower: their entries in the tables.
        token_ids: id of the placeholder token of an "image" and, if the model knows videos, of a "video".
    """

    model: Any  # transformers' modules; torch types their attributes as Tensor | Module, which helps nobody
    base: Any
    text: Any
    layers: list[Any]
    vision: Any
    projector: Any
    config: Any
    host: Host
    family: Family
    tower: Tower
    token_ids: dict[str, int]


PIXELS = {"image": "pixel_values", "video": "pixel_values_videos"}
"""The base model's argument for the pixels of each kind."""


def check_config(config: Any) -> None:
    """Raise ModelError unless this configuration is of a known family and all its decoder layers see everything."""
    kind = config.model_type if isinstance(config, PretrainedConfig) else type(config).__name__
    if kind in REFUSED:
        raise ModelError(f"model: {kind!r} cannot be pruned: {REFUSED[kind]}")
    family = FAMILIES.get(kind)
    if family is None:
        raise ModelError(
            f"model: expected a vision-language model of type {', '.join(FAMILIES)}, got {kind!r}"
        )
    text, vision = attribute(config, "text_config"), attribute(config, "vision_config")
    for name, got, known in (
        ("vision tower", vision.model_type, family.towers),
        ("decoder", text.model_type, family.decoders),
    ):
        if got not in known:
            raise ModelError(f"{name}: expected one of {', '.join(known)}, got {got!r}")
    _check_attention(text)
    if not family.selects:
        return
    strategy, cls = attribute(config, "vision_feature_select_strategy"), TOWERS[vision.model_type].cls
    if (strategy == "default") != cls:
        expected, why = ("default", "its CLS row would count as") if cls else ("full", "it would lose")
        raise ModelError(
            f"vision_feature_select_strategy: expected {expected!r} with {vision.model_type}, "
            f"got {strategy!r} ({why} a patch)"
        )


def _check_attention(text: Any) -> None:
    """Raise ModelError if a decoder layer attends through a sliding window, or is no attention at all."""
    name = DECODERS[text.model_type].window
    told: Any = attribute(text, name) if name is not None else None
    odd: set[str] = set()
    if name == "sliding_window" and told:
        odd = {f"a sliding window of {told}"}
    if name == "layer_types":
        odd = {f"layers of {kind}" for kind in told if kind != "full_attention"}
    if odd:
        raise ModelError(
            f"decoder: expected full attention in every layer, got {', '.join(sorted(odd))}: "
            "after pruning such a layer would silently cover more of the prompt"
        )


def _named(policy: PruningPolicy, layer: int) -> str:
    """What a policy calls this layer: "layer", where it has that or is made of others, or a setting of its own."""
    names = [f.name for f in fields(policy) if getattr(policy, f.name) == layer]
    return "layer" if "layer" in policy.__dataclass_fields__ or not names else names[-1]


def check_stages(policy: PruningPolicy, config: Any) -> None:
    """Raise ValueError if the model cannot run a stage: at no layer of its, or of another form than stages can have.

    One at layer 0 has no layer before it to read; one that brings tokens back leaves nothing to compact; one that may keep
    nothing reads where the text is.
    """
    depth = config.text_config.num_hidden_layers
    check_layers(policy.layers, 0)
    for layer in policy.layers:
        fits = layer < depth
        check(fits, _named(policy, layer), f"at most {depth - 1} (the decoder has {depth} layers)", layer)
        needs = policy.needs(layer)
        fits = layer > 0 or needs.attention != "previous"
        check(fits, "layer", "at least 1 where attention of the layer before is read", layer)
        fits = layer > 0 or not needs.earlier
        check(fits, "layer", "at least 1 where rows that entered the layer before are read", layer)
        if policy.empties(layer):
            text = (
                "Needs(rows='text') at a stage that may keep nothing (a token that ends a prompt must stay)"
            )
            check(needs.reads_text, f"{policy!r}.needs({layer})", text, needs)
        if needs.wave:
            check_wave(policy, layer)
        elif needs.restored:
            same = "'full' with a stage that brings tokens back (layers before it hold others than the last)"
            check(policy.earlier_kv == "full", "earlier_kv", same, repr(policy.earlier_kv))


def check_wave(policy: PruningPolicy, layer: int) -> None:
    """Raise InputError where no second wave can run before the stage at ``layer``."""
    first = (0, layer)
    check(policy.layers[:2] == first, "layers", f"{first} first, where a second wave runs", policy.layers)
    check(not policy.rectify, "rectify", "False with a second wave", policy.rectify)


def check_features(parts: Parts, features: Sequence[Tensor]) -> None:
    """Raise ModelError where ``features`` cannot be added to the rows that enter the decoder layers 1, 2, ..."""
    layer, count = parts.layers[0], len(parts.layers)
    if len(features) >= count:
        raise ModelError(
            f"deepstack_visual_indexes: expected fewer than the {count} decoder layers, got {len(features)}"
        )
    if layer.training and layer.gradient_checkpointing and any(x.requires_grad for x in features):
        run = attribute(layer, "_gradient_checkpointing_func")
        if isinstance(run, partial) and run.keywords.get("use_reentrant") is True:
            raise ModelError(
                "gradient checkpointing: expected use_reentrant=False with stages at or before the layers that a vision "
                "tower in training adds features to, got True (it has no way for their gradients)"
            )


def patch_grid(config: Any) -> Grid:
    """Height and width of one image in visual tokens. Raises ModelError where images differ."""
    family = FAMILIES[config.model_type]
    if not family.square:
        raise ModelError(f"model: expected a family whose images share one grid, got {config.model_type!r}")
    return token_grid(config)


def takes_videos(config: Any) -> bool:
    """Whether a model of this configuration has videos, and ours knows the grids of their tokens."""
    return FAMILIES[config.model_type].videos is not None


def check_videos(config: Any, name: str) -> None:
    """Raise InputError, which calls what was given ``name``, for a family without videos."""
    known = ", ".join(family for family, row in FAMILIES.items() if row.videos is not None)
    check(takes_videos(config), name, f"a checkpoint of a family with videos ({known})", config.model_type)


def find_parts(model: Any) -> Parts:
    """Find the parts of a supported VLM; PEFT wrappers are looked through. Raises ModelError otherwise."""
    if hasattr(model, "get_base_model"):
        model = model.get_base_model()
    config: Any = model.config if isinstance(model, PreTrainedModel) else model
    check_config(config)
    base, family = model.base_model, FAMILIES[config.model_type]
    if base is model or not hasattr(base, family.text):
        raise ModelError(
            f"model: expected the class with the language-modeling head, got {type(model).__name__}"
        )
    text = getattr(base, family.text)
    layers = list(text.layers)
    kinds = ("image", "video") if family.videos is not None else ("image",)
    return Parts(
        model=model,
        base=base,
        text=text,
        layers=layers,
        vision=getattr(base, family.vision),
        projector=base.get_submodule(family.projector),
        config=config,
        host=Host(
            model, base, layers, {kind: PIXELS[kind] for kind in kinds}, text if family.deepstack else None
        ),
        family=family,
        tower=TOWERS[config.vision_config.model_type],
        token_ids={kind: attribute(config, f"{kind}_token_id") for kind in kinds},
    )


def tokenizer_of(model: Any) -> Any:
    """The tokenizer saved beside a model. Raises ModelError if it was not loaded from anywhere, or there is none."""
    source = model.name_or_path
    got = f"a model made in memory, {type(model).__name__}"
    try:
        if source:
            return AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError) as error:
        got = first_line(error)
    raise ModelError(f"tokenizer: expected one saved with the model (or the policy's own), got {got}")


def tower_layers(parts: Parts) -> list[Any]:
    """The vision tower's blocks."""
    return list(parts.vision.get_submodule(parts.tower.layers))


def heads(x: Tensor, head_dim: int) -> Tensor:
    """A projection's ``[B, S, H * D]`` as ``[B, H, S, D]``."""
    return x.view(*x.shape[:2], x.shape[-1] // head_dim, head_dim).transpose(1, 2)


def decoder_shape(config: Any) -> DecoderShape:
    """The decoder's dimensions, for counting FLOPs."""
    text = config.text_config
    heads = text.num_attention_heads
    own = DECODERS[text.model_type].head_dim
    return DecoderShape(
        layers=text.num_hidden_layers,
        hidden=text.hidden_size,
        heads=heads,
        kv_heads=text.num_key_value_heads,
        head_dim=text.head_dim if own else text.hidden_size // heads,
        intermediate=text.intermediate_size,
    )


def vision_flops(parts: Parts, crops: Sequence[int]) -> int:
    """FLOPs of the vision tower and projector on ``crops`` of so many patches: 2 x the weights a state meets, and attention.

    Windowed layers (Qwen2.5-VL) are counted as if every window were full.
    """
    tower, weights = parts.tower, sum(map(linear_weights, tower_layers(parts)))
    width = attribute(parts.config.vision_config, tower.width)
    mergers = [parts.projector, *(attribute(parts.vision, tower.mergers) if tower.mergers else ())]
    stem = sum(m.weight.numel() for m in parts.vision.modules() if isinstance(m, nn.Conv2d | nn.Conv3d))
    total = 0
    for patches in crops:
        states = patches + tower.cls
        total += 2 * (stem * patches + weights * states)
        total += sum(4 * states * span * width for span in _spans(parts, states))
    side = parts.family.side(parts.config)
    return total + sum(2 * linear_weights(m) for m in mergers) * sum(crops) // side**2


def _spans(parts: Parts, states: int) -> list[int]:
    """How many states each state attends to, layer by layer."""
    vision, tower = parts.config.vision_config, parts.tower
    depth = attribute(vision, tower.depth)
    if tower.windows is None:
        return [states] * depth
    window, full = (vision.window_size // vision.patch_size) ** 2, attribute(vision, tower.windows)
    return [states if i in full else min(states, window) for i in range(depth)]


def linear_weights(module: nn.Module) -> int:
    """Weights of all linear layers inside a module; by their sizes, since quantized ones are stored otherwise."""
    return sum(m.in_features * m.out_features for m in module.modules() if isinstance(m, nn.Linear))
