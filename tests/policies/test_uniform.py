"""The uniform baseline against its two definitions."""

import pytest

from vlmprune.policies import Uniform


@pytest.mark.parametrize("images", [["square"], ["two", "none", "tall"], [((24, 24),)]])
@pytest.mark.parametrize("keep", [0.25, 0.3, 0.999, 1.0, 1, 7, 1000])
def test_spacing(images, keep, case, kept_lists):
    ctx = case(images).ctx
    got = kept_lists(Uniform(keep=keep).select(ctx))
    for sample, n in enumerate(ctx.counts):
        k = (
            max(1, int(keep * n + 1e-6))
            if isinstance(keep, float)
            else keep * len(images and ctx.grids[sample])
        )
        k = min(n, k)
        assert got[sample] == [int((i + 0.5) * n / k) for i in range(k)]


def test_the_middle_of_equal_parts(case, kept_lists):
    assert kept_lists(Uniform(keep=4).select(case([((2, 6),)]).ctx)) == [[1, 4, 7, 10]]


def test_grid_of_every_image(case, kept_lists):
    """4 x 5 and 5 x 3 patches, stride 2."""
    expected = [0, 2, 4, 10, 12, 14, 20, 22, 26, 28, 32, 34]
    assert kept_lists(Uniform(stride=2).select(case(["two"]).ctx)) == [expected]


def test_grid_after_a_stage_keeps_what_is_left_of_it(case, kept_lists):
    ctx = case(["two", "square"], kept=[[1, 2, 11, 20, 34], [1, 9, 35]]).ctx
    assert kept_lists(Uniform(stride=2).select(ctx)) == [[1, 3, 4], [0]]


def test_defaults():
    assert (Uniform().keep, Uniform().stride) == (0.25, None)
    assert (Uniform(stride=3).keep, Uniform(stride=3).stride) == (None, 3)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"keep": 0.5, "stride": 3}, r"^keep: expected either keep or stride, got keep=0\.5 and stride=3$"),
        ({"stride": 0}, r"^stride: expected a whole number >= 1, got 0$"),
        ({"stride": 1.5}, r"^stride: expected a whole number >= 1, got 1\.5$"),
        ({"keep": 0}, r"^keep: expected a share .* got 0$"),
        ({"layer": -1}, r"^layer: expected a whole number >= 0, got -1$"),
    ],
)
def test_rejects(settings, message):
    with pytest.raises(ValueError, match=message):
        Uniform(**settings)
