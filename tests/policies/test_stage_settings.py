"""Settings of methods of several stages: one for all or one for each, and what a drop leaves."""

import pytest

from vlmprune.errors import InputError
from vlmprune.policies.parts.stage_settings import at_stage, check_drop, check_each_stage, kept_at, left_after

LAYERS = (3, 5)


def test_one_for_all_stages_or_one_for_each():
    assert [at_stage(8, LAYERS, layer) for layer in LAYERS] == [8, 8]
    assert [kept_at((8, 0.5), LAYERS, layer, 20, 1) for layer in LAYERS] == [8, 10]
    for setting in (None, 8, 0.5, (8, 0.5)):
        check_each_stage("keep", setting, LAYERS)
    check_each_stage("drop", (0, 0.5), LAYERS, check_drop)


@pytest.mark.parametrize(
    "drop, tokens, images, left",
    [
        (0.3, 10, 1, 7),
        (0.0, 10, 1, 10),
        (0.99, 10, 1, 1),
        (3, 10, 1, 7),
        (3, 10, 2, 4),
        (3, 10, 0.5, 8),
        (30, 10, 1, 1),
    ],
)
def test_what_a_drop_leaves(drop, tokens, images, left):
    assert left_after(drop, tokens, images) == left


@pytest.mark.parametrize(
    "call, said",
    [
        (lambda: check_each_stage("keep", (8,), LAYERS), "keep: expected 2 entries, one per layer, got (8,)"),
        (lambda: check_each_stage("keep", (), LAYERS), "keep: expected 2 entries, one per layer, got ()"),
        (lambda: check_drop(1.0), "drop: expected a share in [0, 1) or a whole number >= 0, got 1.0"),
        (lambda: check_drop(-1), "drop: expected a share in [0, 1) or a whole number >= 0, got -1"),
        (lambda: check_drop(True), "drop: expected a share in [0, 1) or a whole number >= 0, got True"),
        (lambda: check_drop("a"), "drop: expected a share in [0, 1) or a whole number >= 0, got 'a'"),
        (
            lambda: check_drop(float("nan")),
            "drop: expected a share in [0, 1) or a whole number >= 0, got nan",
        ),
        (
            lambda: kept_at(None, LAYERS, 3, 10, 1),
            "keep: expected a number or share for counts that are known in advance, got None",
        ),
    ],
)
def test_errors(call, said):
    with pytest.raises(InputError) as error:
        call()
    assert str(error.value) == said
