"""Every family, equal to the masked run: one table of tiny models, batch 1 and padded batches, images of all shapes."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import vlmprune
from helpers.families import CASES, build, prompts
from helpers.families_oracle import Reader, generate
from helpers.tiny import upstream
from vlmprune.models.host.families import FAMILIES
from vlmprune.policies.base import Needs, TokenContext
from vlmprune.testing import check_model
from vlmprune.testing.pictures import ALBUMS


@pytest.fixture(scope="module", params=CASES)
def case(request):
    return CASES[request.param]


@pytest.fixture(scope="module")
def model(case):
    return build(case)


def test_pruned_runs_are_masked_runs(case, model):
    """Random choices at one and two layers, FastV behind one, rows rewritten and packed; keep-all to the bit."""
    report = check_model(model, samples={"one": [case.one], "padded": case.padded})
    packs = FAMILIES[model.config.model_type].packs
    assert [row.verdict for row in report.rows] == ["ok"] * 2 * (4 + packs)


def test_contexts_describe_the_pictures(case, model):
    inputs, pictures = prompts(case, case.padded)
    contexts: list[TokenContext] = []
    with torch.no_grad(), vlmprune.prune(model, Reader(contexts.append, Needs())):
        model(**inputs)
    assert contexts[0].grids == tuple(tuple(g for p in sample for g in p.grids) for sample in pictures)
    assert contexts[0].images() == tuple(tuple(p.tokens for p in sample) for sample in pictures)


def test_methods_see_real_grids_and_count_images(case, model):
    """A stride walks over every grid of its own shape; a number of tokens is one per image, not per tile or frame."""
    inputs, pictures = prompts(case, case.padded)
    with torch.no_grad(), vlmprune.prune(model, vlmprune.Uniform(layer=2, keep=None, stride=2)) as run:
        model(**inputs)
    for b, sample in enumerate(pictures):
        first, want = 0, []
        for r, c in (grid for picture in sample for grid in picture.grids):
            want += [first + i * c + j for i in range(0, r, 2) for j in range(0, c, 2)]
            first += r * c
        assert run.kept(b).tolist() == want
    with torch.no_grad(), vlmprune.prune(model, vlmprune.FastV(layer=3, keep=2)) as run:
        model(**inputs)
    assert [len(run.kept(b)) for b in range(len(pictures))] == [2 * len(sample) for sample in pictures]


@upstream("mixes up the images of beams with unequal image counts")
def test_beams_see_their_own_samples_images(case, model):
    inputs, pictures = prompts(case, case.padded)
    seen: list[TokenContext] = []
    with vlmprune.prune(
        model, vlmprune.Stages([Reader(seen.append, Needs(), at=2), vlmprune.FastV(layer=3)])
    ):
        generate(model, inputs, num_beams=2)
    grids = [tuple(g for p in sample for g in p.grids) for sample in pictures]
    assert seen[0].grids == tuple(grid for grid in grids for _ in range(2))


def test_vision_flops_equal_pytorchs_count(case, model):
    """Tower and projector as reported, against torch counting the matrix products of the same images."""
    inputs, _ = prompts(case, case.padded)
    with torch.no_grad(), vlmprune.prune(model, vlmprune.Random(layer=2)) as run:
        model(**inputs)
    model.set_attn_implementation("eager")  # the only one that torch counts on every device
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        for kind, pixels, *others in (
            ("image", "pixel_values", "image_sizes", "image_grid_thw", "batch_num_images"),
            ("video", "pixel_values_videos", "video_grid_thw"),
        ):
            if pixels in inputs:
                encode = getattr(model, f"get_{kind}_features")
                encode(inputs[pixels], **{name: inputs[name] for name in others if name in inputs})
    model.set_attn_implementation("sdpa")
    counted, reported = counter.get_total_flops(), run.report().flops.vision
    windowed = hasattr(
        model.config.vision_config, "fullatt_block_indexes"
    )  # reported as if all windows were full
    assert counted <= reported <= 1.02 * counted if windowed else reported == counted


@pytest.mark.parametrize("source", ["previous", "own"])
def test_scores_are_the_decoders_own_attention(case, model, source):
    """Query and key with the family's norms and rotations, against the weights its eager attention returns."""
    inputs, pictures = prompts(case, case.padded)
    contexts: list[TokenContext] = []
    with torch.no_grad(), vlmprune.prune(model, Reader(contexts.append, Needs(attention=source))):
        model(**inputs)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        weights = model(**inputs, output_attentions=True).attentions[2 if source == "previous" else 3]
    model.set_attn_implementation("sdpa")
    seen = contexts[0].attention
    got = seen.received(seen.last)
    for b, sample in enumerate(pictures):
        count = sum(p.tokens for p in sample)
        want = weights[b, :, -1].mean(0)[contexts[0].positions[b, :count]]
        torch.testing.assert_close(got[b, :count], want, atol=1e-6, rtol=1e-4)


def test_every_family_has_pictures():
    assert set(ALBUMS) == set(FAMILIES)
