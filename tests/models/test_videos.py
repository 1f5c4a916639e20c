"""Methods for videos on the families that know them: frames are the model's frames, and every video keeps its own budget."""

from __future__ import annotations

import pytest
import torch

import vlmprune
from helpers.families import CASES, build, prompts
from helpers.families_oracle import Reader
from vlmprune.policies.base import Needs, TokenContext
from vlmprune.policies.parts.frames import frames_of

BATCH = ((3, "video", 5, "wide", 4), (2, "video", 6), (9,))
METHODS = [
    vlmprune.EVS(keep=0.4),
    vlmprune.VidCom2(keep=0.4),
    vlmprune.DyCoke(keep=0.4),
    vlmprune.FastVID(keep=0.4, segments=2),
    vlmprune.FlashVID(keep=0.4, then=1.0, layer=2, segments=2, tau=0.5),
    vlmprune.PruneVid(keep=0.4, then=1.0, layer=2, tau=0.1),
    vlmprune.HoliTom(keep=0.4, then=1.0, layer=2, tau=0.1),
]


@pytest.fixture(scope="module", params=[name for name in CASES if name.endswith("-video")])
def case(request):
    return CASES[request.param]


@pytest.fixture(scope="module")
def model(case):
    return build(case)


@pytest.fixture(scope="module")
def batch(case):
    return prompts(case, BATCH)


def test_frames_are_the_models(model, batch):
    inputs, pictures = batch
    contexts: list[TokenContext] = []
    with torch.no_grad(), vlmprune.prune(model, Reader(contexts.append, Needs(hidden=True), at=0)):
        model(**inputs)
    frames, number = frames_of(contexts[0]), 0
    for sample in pictures:
        for picture in sample:
            if picture.kind == "video":
                own = [frames.grids[g] for g in frames.groups.members[number]]
                assert own == [grid for grid in picture.grids if grid != (1, 1)]
            number += 1
    assert len(frames.groups.members) == number


@pytest.mark.parametrize("policy", METHODS, ids=lambda policy: type(policy).__name__)
def test_every_video_keeps_its_own(model, batch, policy):
    inputs, pictures = batch
    with torch.no_grad(), vlmprune.prune(model, policy) as run:
        model(**inputs)
    for b, sample in enumerate(pictures):
        kept, first = run.kept(b).tolist(), 0
        for picture in sample:
            here = [place for place in kept if first <= place < first + picture.tokens]
            assert len(here) == policy.kept(picture.tokens, 1, 0)
            first += picture.tokens
