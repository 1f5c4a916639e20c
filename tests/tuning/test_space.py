"""What braces stand for, what a sweep leaves out and why, and what is tried where nothing is said."""

import re

import pytest

from helpers.command_line import CHECKPOINT
from vlmprune.checkpoints import Checkpoint
from vlmprune.errors import InputError
from vlmprune.policies import FastV, Feather, policy_from
from vlmprune.policies.recipe import named
from vlmprune.tuning.schedules import PSigmoid
from vlmprune.tuning.space import candidates, default_policies, expand

checkpoint = Checkpoint(str(CHECKPOINT), device="cpu", dtype="float32")  # 8 layers; no weights are read


@pytest.mark.parametrize(
    "text, expected",
    [
        ("fastv:layer=2", ["fastv:layer=2"]),
        ("{a,b}", ["a", "b"]),
        ("x={3..5}", ["x=3", "x=4", "x=5"]),
        ("x={1..6..2}", ["x=1", "x=3", "x=5"]),
        ("x={5..}", ["x=5", "x=6", "x=7"]),
        ("x={1,5..6, 9}", ["x=1", "x=5", "x=6", "x=9"]),
        ("{a,b}+{1..2}", ["a+1", "a+2", "b+1", "b+2"]),
        ("{a,a}", ["a"]),
    ],
)
def test_braces(text, expected):
    assert expand(text, 8) == expected


@pytest.mark.parametrize(
    "text, said",
    [
        (
            "fastv:layer={2",
            r"^policy: expected braces \{...\} that match and hold none, got 'fastv:layer=\{2'$",
        ),
        ("fastv:layer=2}", r"^policy: expected braces"),
        ("{a,{b}}", r"^policy: expected braces"),
        ("x={}", r"^policy: expected alternatives as \{2,5\}, \{2..5\} or \{2..\}, got 'x=\{\}'$"),
        ("x={1,}", r"^policy: expected alternatives"),
        ("x={a..b}", r"^policy: expected alternatives"),
        ("x={5..2}", r"^policy: expected a range that ascends, in steps of 1 or more, of 8 layers"),
        ("x={9..}", r"^policy: expected a range that ascends"),
        ("x={1..4..0}", r"^policy: expected a range that ascends"),
    ],
)
def test_broken_braces(text, said):
    with pytest.raises(ValueError, match=said):
        expand(text, 8)


def test_a_sweep_leaves_out_what_cannot_be_and_says_why():
    found, left_out = candidates(["feather:layers={2,4}/{4,9}", FastV(layer=3)], checkpoint)
    assert found == {"feather:layers=2/4": Feather(layers=(2, 4)), str(FastV(layer=3)): FastV(layer=3)}
    assert list(left_out) == ["feather:layers=2/9", "feather:layers=4/4", "feather:layers=4/9"]
    assert left_out["feather:layers=4/9"] == "layer: expected at most 7 (the decoder has 8 layers), got 9"


@pytest.mark.parametrize(
    "wanted, said",
    [
        (
            "fastv:lair={2,3}",
            r"^policy fastv: expected one of the fields layer, .*, got 'lair' \(did you mean 'layer'\?\)$",
        ),
        ("fastv:layer={8,9}", r"^layer: expected at most 7"),
        (FastV(layer=8), r"^layer: expected at most 7"),
        ("fasttv", r"^policy: "),
        ("p_sigmoid:steepness=1", r"^p_sigmoid: expected of=\(POLICY\), got none$"),
        ("p_sigmoid:of=(fastv),k=1", r"^p_sigmoid: expected some of of, steepness, got 'k'$"),
        ("p_sigmoid:of=(feather)", r"^policy: expected a policy with settings 'layer' and 'keep'"),
        ("p_sigmoid:of=(fastv),steepness=-1", r"^steepness: expected a number from 0"),
        ("g_search:of=(fastv),levels=0", r"^levels: expected a whole number >= 1, got 0$"),
        ("g_search:of=(fastv),tolerance=-0.1", r"^tolerance: expected a number >= 0, got -0.1$"),
        ("p_sigmoid:of=(fastv) + vtw:layer=6", r"^policy: expected p_sigmoid by itself"),
    ],
)
def test_what_no_reading_makes_is_an_error(wanted, said):
    with pytest.raises(ValueError, match=said):
        candidates([wanted], checkpoint)


@pytest.mark.parametrize("wanted", ["fastv:layer=2", ["fastv", 3], {"fastv"}, 3], ids=repr)
def test_not_a_list_of_policies(wanted):
    said = re.escape(f"policies: expected a list of texts and policies, got {wanted!r}")
    for read in (named, lambda given: candidates(given, checkpoint)):
        with pytest.raises(InputError, match=f"^{said}$"):
            read(wanted)


@pytest.mark.parametrize("depth", [2, 8, 28, 32])
def test_the_default_fits_any_depth(depth):
    texts = [text for some in default_policies(depth) for text in expand(some, depth)]
    assert 8 < len(set(texts)) == len(texts) < 60
    for text in texts:
        if not text.startswith("p_sigmoid"):
            assert max(policy_from(text).layers) < depth
    if depth == 8:
        found, left_out = candidates((), checkpoint)
        assert list(found) == texts and not left_out
        assert found["p_sigmoid:of=(fastv:layer=1),steepness=0.25"] == PSigmoid(FastV(layer=1), 0.25)
