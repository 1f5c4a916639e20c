"""Methods before the decoder that read the vision tower, on every family: right attention, and pruned runs as masked ones."""

from __future__ import annotations

from dataclasses import replace
from itertools import chain

import pytest
import torch
from transformers.modeling_utils import AttentionInterface
from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches as tiles
from transformers.vision_utils import get_vision_window_index

import vlmprune
from helpers.families import CASES, build, prompts
from helpers.families_oracle import Reader, generate
from vlmprune.models.host.parts import find_parts, tower_layers
from vlmprune.policies.base import Needs, TokenContext
from vlmprune.policies.crops import crops_of
from vlmprune.testing import check_model

SEEN: list[torch.Tensor] = []


def probe(module, query, key, value, attention_mask, scaling=None, **kwargs):
    """Attention as a formula; the mean over heads of what every state receives from every row is kept."""
    scale = module.scaling if scaling is None else scaling
    weights = (query.float() @ key.float().mT * scale).softmax(-1)
    SEEN.append(weights.mean(1))  # [G, P, P]
    return (weights.to(value) @ value).transpose(1, 2).contiguous(), None


AttentionInterface.register("tower_probe", probe)
# A tower knows nothing of the decoder.
FAMILIES = [name for name in CASES if name == "llava-llama" or not name.startswith("llava-")]
# Blocks of a pixel shuffle: tests/models/test_vision.py.
TOWERS = [name for name in FAMILIES if not name.startswith(("idefics", "smolvlm", "internvl"))]


def by_layer(tower, run):
    """What the last but one of the tower's three layers attends to, by its calls of attention."""
    usual, tower.config._attn_implementation = tower.config._attn_implementation, "tower_probe"
    SEEN.clear()
    out = run()
    tower.config._attn_implementation = usual
    each = len(SEEN) // 3
    return out, SEEN[-2 * each : -each] if len(SEEN) % 3 == 0 else None


def packed_scores(model, kind, pixels, thw):
    """Mean attention each merged block of a Qwen tower receives, in the order of the tokens, one list an image or video."""
    tower, side = model.model.visual, model.config.vision_config.spatial_merge_size
    with torch.no_grad():
        calls = []
        for block in tower.blocks:
            calls.append([])
            block.attn.register_forward_hook(lambda m, a, o, at=calls[-1]: at.extend(SEEN) or SEEN.clear())
        usual, tower.config._attn_implementation = tower.config._attn_implementation, "tower_probe"
        SEEN.clear()
        tower(pixels, grid_thw=thw)
        tower.config._attn_implementation = usual
        for block in tower.blocks:
            block.attn._forward_hooks.clear()
    groups = calls[1]
    paid = torch.cat([w[0].sum(0) for w in groups])
    blocks = paid.view(-1, side**2).mean(1)
    vision = model.config.vision_config
    if hasattr(vision, "fullatt_block_indexes"):
        order, _ = get_vision_window_index(thw, side, vision.window_size, vision.patch_size)
        blocks = blocks[torch.argsort(order)]
    frames = [(h, w) for t, h, w in thw.tolist() for _ in range(t)]
    sizes = [h * w // side**2 for h, w in frames]
    rows = torch.cat([torch.full((n,), float(h * w)) for n, (h, w) in zip(sizes, frames, strict=True)])
    per_image = [t * h * w // side**2 for t, h, w in thw.tolist()]
    return list((blocks / rows).split(per_image))


def tiled_scores(model, inputs, kind):
    """The same of the families of tiles and frames: the scores sent through the model's own packing, newlines NaN."""
    base, tower = model.model, model.model.vision_tower
    pixels = inputs["pixel_values_videos" if kind == "video" else "pixel_values"]
    counts, sizes = inputs.get("batch_num_images"), inputs.get("image_sizes")
    if kind == "video":
        crops = pixels.flatten(0, 1)
    elif pixels.ndim == 5:
        alone = [True] * len(sizes) if counts is None else [n == 1 for n in counts for _ in range(n)]
        pinpoints, side = model.config.image_grid_pinpoints, model.config.vision_config.image_size
        split = [tiles(s, pinpoints, side) if a else 1 for s, a in zip(sizes, alone, strict=True)]
        crops = torch.cat([p[:n] for p, n in zip(pixels, split, strict=True)])
    else:
        crops = pixels
    with torch.no_grad():
        _, [weights] = by_layer(tower, lambda: tower(crops))
    cls = model.config.vision_config.model_type == "clip_vision_model"
    scores = (weights[:, 0, 1:] if cls else weights.mean(1))[..., None]
    if kind == "video":
        pooled = base.apply_pooling(scores).flatten(1).view(len(pixels), -1)
        return [torch.cat([x, torch.tensor([torch.nan])]) for x in pooled]
    if sizes is None:
        return [x[:, 0] for x in scores]
    nan = torch.tensor([torch.nan])
    more = {"vision_feature_select_strategy": "full"} if model.config.model_type == "llava_next" else {}
    if not more:
        more = {"vision_aspect_ratio": model.config.vision_aspect_ratio}
    packed, _ = base.pack_image_features(scores.split(split), sizes, image_newline=nan, **more)
    return [x[:, 0] for x in packed]


def wanted(model, inputs, pictures):
    """Scores of every picture in prompt order, NaN at newlines."""
    found = {}
    for kind, pixels, thw in (
        ("image", "pixel_values", "image_grid_thw"),
        ("video", "pixel_values_videos", "video_grid_thw"),
    ):
        if pixels in inputs:
            qwen = thw in inputs
            found[kind] = iter(
                packed_scores(model, kind, inputs[pixels], inputs[thw])
                if qwen
                else tiled_scores(model, inputs, kind)
            )
    return [next(found[p.kind]) for sample in pictures for p in sample]


@pytest.mark.parametrize("name", TOWERS)
def test_tokens_receive_the_towers_own_attention(name):
    """In every family against the model's own attention, tiles, pooling, windows and merging; several images and videos."""
    case = CASES[name]
    model = build(case)
    inputs, pictures = prompts(case, case.padded)
    contexts: list[TokenContext] = []
    with vlmprune.prune(model, Reader(contexts.append)):
        generate(model, inputs)
    ctx = contexts[0]
    got = crops_of(ctx).spread(ctx.vision[-2].received(), fill=torch.nan)
    scores = iter(wanted(model, inputs, pictures))
    for b, sample in enumerate(pictures):
        want = torch.cat([next(scores) for _ in sample]) if sample else torch.zeros(0)
        torch.testing.assert_close(got[b, : len(want)], want, atol=1e-6, rtol=1e-4, equal_nan=True)


@pytest.mark.parametrize("name", FAMILIES)
def test_features_are_what_the_projector_turns_into_the_tokens(name):
    """But for tokens between patches: the model mixes them behind the projector."""
    case = CASES[name]
    model = build(case)
    inputs, _ = prompts(case, case.padded)
    contexts: list[TokenContext] = []

    reader = Reader(contexts.append, Needs(hidden=True, vision=(-2,)), at=0)
    with torch.no_grad(), vlmprune.prune(model, reader):
        model(**inputs)
    ctx = contexts[0]
    made = crops_of(ctx).split(ctx.hidden)
    shares = ctx.vision[-2].shares
    mixed = torch.zeros(made.shape[:2], dtype=torch.bool)
    if shares is not None and name.startswith("llava_onevision"):
        mixed = shares.amax(2) < 1
    real = (made != 0).any(2) & ~mixed
    torch.testing.assert_close(ctx.project(ctx.features)[real], made[real], atol=1e-4, rtol=1e-4)
    assert real.any()


BEFORE = {
    "fastervlm": vlmprune.FasterVLM(keep=6, positions="keep"),
    "fastervlm-share": vlmprune.FasterVLM(keep=0.4, positions="keep", spend="image"),
    "vispruner": vlmprune.VisPruner(keep=0.5, positions="keep"),
    "visionzip": vlmprune.VisionZip(dominant=3, contextual=2, positions="keep"),
    "vscan": vlmprune.VScan(keep=0.6, then=0.5, layer=3, window=2, shallow_layer=0, positions="keep"),
    "accm_selection": vlmprune.ACCMSelection(keep=0.4, positions="keep"),
    "cdpruner": vlmprune.CDPruner(keep=6, positions="keep"),
    "prumerge": vlmprune.PruMerge(keep=6, neighbours=3),
    "prumerge-outliers": vlmprune.PruMerge(keep=0.9, adaptive=True, plus=True),
    "trim": vlmprune.TRIM(keep=0.4),
    "tome": vlmprune.ToMe(keep=0.4),
    "visiontrim": vlmprune.VisionTrim(keep=8),
    "visiontrim-received": vlmprune.VisionTrim(keep=0.5, score="received"),
}
PACKED = {
    "fastervlm": vlmprune.FasterVLM(keep=6, positions="pack"),
    "visionzip": vlmprune.VisionZip(dominant=0.3, contextual=0.2, positions="pack"),
    "vscan": vlmprune.VScan(keep=0.6, then=0.5, layer=3, window=2, shallow_layer=0, positions="pack"),
    "cdpruner": vlmprune.CDPruner(keep=0.5, positions="pack"),
    "prumerge": vlmprune.PruMerge(keep=0.5, plus=True, neighbours=3, positions="pack"),
}


@pytest.fixture(scope="module", params=FAMILIES)
def case(request):
    return CASES[request.param]


@pytest.fixture(scope="module")
def model(case):
    return build(case)


@pytest.mark.parametrize("policy", BEFORE.values(), ids=BEFORE)
def test_pruned_runs_are_masked_runs(case, model, policy):
    report = check_model(model, policy, samples={"one": [case.one], "padded": case.padded})
    assert report.ok


@pytest.mark.parametrize("policy", PACKED.values(), ids=PACKED)
def test_packed_runs_are_masked_runs(case, model, policy):
    if model.config.model_type.startswith("qwen"):
        inputs, _ = prompts(case, [case.one])
        with torch.no_grad(), vlmprune.prune(model, policy), pytest.raises(vlmprune.ModelError, match="pack"):
            model(**inputs)
        return
    assert check_model(model, policy, samples={"one": [case.one], "padded": case.padded}).ok


@pytest.mark.parametrize(
    "policy",
    [vlmprune.FasterVLM(keep=1.0, positions="pack"), vlmprune.VisPruner(keep=1.0, positions="pack")],
    ids=["f", "v"],
)
def test_keep_all_is_the_unpruned_model(case, model, policy):
    inputs, _ = prompts(case, case.padded)
    plain = generate(model, inputs)[1]
    with vlmprune.prune(model, replace(policy, positions="keep")) as run:
        assert torch.equal(generate(model, inputs)[1], plain)
    assert run.stages[0].kept == run.stages[0].entered


@pytest.mark.parametrize("name", ["llava_next", "llava_onevision", "qwen2vl-video"])
def test_an_images_budget_is_shared_out_over_its_crops(name):
    """Evenly, as far as each has tokens; newline tokens stay only when all others do."""
    case = CASES[name]
    model = build(case)
    inputs, _ = prompts(case, case.padded)
    contexts: list[TokenContext] = []
    reader = Reader(contexts.append, Needs(), at=0)
    for keep in (7, 10, 1.0):
        policy = vlmprune.FasterVLM(keep=keep, positions="keep")
        with torch.no_grad(), vlmprune.prune(model, reader):
            model(**inputs)
        with torch.no_grad(), vlmprune.prune(model, policy) as run:
            model(**inputs)
        groups, ctx = crops_of(contexts[-1]), contexts[-1]
        for image, owner in enumerate(groups.owners):
            members = [i for i, at in enumerate(groups.images) if at == image]
            kept = {*run.kept(owner).tolist()}
            counts = [len(kept & {*places(groups.crops[i])}) for i in members]
            sizes = [groups.tokens[i] for i in members]
            total = [*chain(*ctx.images())][image]
            budget = min(sum(sizes), total if keep == 1.0 else keep)
            assert sum(counts) == budget
            level = max(counts)
            assert all(n in (level, level - 1) or n == size for n, size in zip(counts, sizes, strict=True))
            assert len(kept & {*groups.rest[image]}) == (len(groups.rest[image]) if keep == 1.0 else 0)


def places(crop):
    return [crop.first + i * crop.width + j for i in range(crop.rows) for j in range(crop.columns)]


@pytest.mark.parametrize("name", ["llava_next", "qwen2_5_vl"])
def test_a_projection_of_another_name_is_an_error_and_leaves_no_hook(name):
    model = build(CASES[name])
    tower = find_parts(model)
    attn = getattr(tower_layers(tower)[1], tower.tower.attention)
    lost = "qkv" if name == "qwen2_5_vl" else "k_proj"
    attn.something_new = getattr(attn, lost)
    delattr(attn, lost)
    with pytest.raises(vlmprune.VersionError, match=f"expected '{lost}' in "):
        vlmprune.attach(model, vlmprune.FasterVLM(positions="pack"))
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in tower.vision.modules())
    assert "get_image_features" not in vars(model.model)
