"""FasterVLM against its formula: the best CLS attention of every image."""

import pytest

from helpers.contexts import images_in, kept_lists, patch_scores, sight, top
from vlmprune.policies.base import Needs, Reduction
from vlmprune.policies.methods.fastervlm import FasterVLM

BATCHES = [
    pytest.param({"images": ["square"]}, id="one"),
    pytest.param({"images": ["tall", "none", ((3, 7), (7, 3))]}, id="ragged"),
    pytest.param({"images": ["square"], "few_values": True}, id="ties"),
    pytest.param({"images": ["square", "square"], "cls": False}, id="no-cls"),
]


@pytest.mark.parametrize("settings", BATCHES)
@pytest.mark.parametrize("keep", [1, 5, 0.25, 1.0, 100])
def test_equals_the_formula(settings, keep):
    ctx = sight(**settings)
    got = FasterVLM(keep, positions="pack").select(ctx)
    for sample, here in enumerate(images_in(ctx)):
        expected = []
        for number, first, (r, c) in here:
            count = min(r * c, keep) if isinstance(keep, int) else max(1, int(keep * r * c))
            expected += [first + p for p in top(patch_scores(ctx, -2, number), count)]
        assert kept_lists(got.index)[sample] == expected
    assert got == Reduction(got.index, None, "pack")


def test_another_layer_and_positions():
    ctx = sight(["square"], layers=(-2, 3))
    kept = FasterVLM(6, vision_layer=3, positions="keep").select(ctx)
    assert kept.tolist() == [top(patch_scores(ctx, 3, 0), 6)]
    assert kept.tolist() != FasterVLM(6, positions="pack").select(ctx).index.tolist()


@pytest.mark.parametrize("keep", [192, 128, 64, 0.25])
def test_published_counts(keep):
    kept = FasterVLM(keep, positions="pack").select(sight([((24, 24),)])).index
    assert kept.shape == (1, 144 if keep == 0.25 else keep)


def test_no_images():
    assert FasterVLM(positions="pack").select(sight(["none", "none"])).shape == (2, 0)


def test_needs():
    assert FasterVLM(positions="pack").layers == (0,)
    assert FasterVLM(vision_layer=-1, positions="pack").needs(0) == Needs(vision=(-1,))


@pytest.mark.parametrize(
    "settings, message",
    [
        (
            {"keep": 0},
            r"^keep: expected a share in \(0, 1\] or a whole number of tokens per image >= 1, got 0$",
        ),
        ({"vision_layer": True}, r"^vision_layer: expected a whole number, got True$"),
        ({"positions": None}, r"^positions: expected 'keep' or 'pack', got None$"),
    ],
)
def test_rejects(settings, message):
    with pytest.raises(ValueError, match=message):
        FasterVLM(**settings)
