"""Methods led by an image's small view, in the families that have one: told as such, pruned runs as masked ones, no host read."""

from __future__ import annotations

import pytest
import torch

import vlmprune
from helpers.families import CASES, build, prompts
from helpers.families_oracle import Reader
from vlmprune.models.graphs.reads import HostReads
from vlmprune.policies import crops_of
from vlmprune.policies.base import Needs
from vlmprune.policies.parts.tiles import tiled_images
from vlmprune.testing import check_model

LED = {
    "hired": vlmprune.HiRED(keep=0.4),
    "hired-runs": vlmprune.HiRED(keep=7, content="runs", positions="pack"),
    "globalcom2": vlmprune.GlobalCom2(keep=0.4),
    "holov": vlmprune.HoloV(keep=0.4, runs=4),
}


@pytest.fixture(scope="module", params=["llava_next", "llava_onevision"])
def case(request):
    return CASES[request.param]


@pytest.fixture(scope="module")
def model(case):
    return build(case)


def test_the_small_view_comes_first_and_its_tiles_behind_it(case, model):
    """OneVision shows several images of a sample in small alone."""
    contexts = []
    inputs, pictures = prompts(case, [case.one])
    with torch.no_grad(), vlmprune.prune(model, Reader(contexts.append, Needs(), at=0)):
        model(**inputs)
    crops = crops_of(contexts[0])
    [found] = tiled_images(contexts[0], crops)
    (rows, columns), tiles = found.grid, len(crops.crops) - 1
    assert pictures[0][0].grids == (found.small, (rows, columns + 1))
    assert found.first == 0 and len(found.parts) == tiles and sum(found.sizes) == rows * columns


@pytest.mark.parametrize("policy", LED.values(), ids=LED)
def test_pruned_runs_are_masked_runs(case, model, policy):
    assert check_model(model, policy, samples={"one": [case.one], "padded": case.padded}).ok


@pytest.mark.parametrize("policy", LED.values(), ids=LED)
@pytest.mark.real("the guard's methods would be noted twice")
def test_nothing_more_is_read_from_the_device(case, model, policy):
    inputs, _ = prompts(case, [case.one])
    reads = []
    for one in (vlmprune.FasterVLM(keep=0.4), policy):
        with torch.no_grad(), vlmprune.prune(model, one):
            model(**inputs)  # tensors of the grids are made once
            with HostReads(model.device, (seen := []).append):
                model(**inputs)
        reads.append(len(seen))
    assert reads[1] <= reads[0]
