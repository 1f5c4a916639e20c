"""Scenes: the same pixels for the same seed, and what a scene says of itself is what its pixels show."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from world import clutter as cluttered
from world.scenes import SIDES, make_scene
from world.words import COLORS, SIZE_NAMES, TOKEN_ID, VOCABULARY

IMAGES = Path(__file__).parents[2] / "examples" / "glyphworld" / "images"


@pytest.mark.parametrize("seed", range(70001, 70007))
def test_shipped_images_are_their_seeds(seed):
    shipped = np.asarray(Image.open(IMAGES / f"scene_{seed}.png"))
    assert np.array_equal(make_scene(seed).image, shipped)


@pytest.mark.parametrize("side", SIDES)
def test_a_seed_is_a_scene(side):
    first, again, other = make_scene(5, side), make_scene(5, side), make_scene(6, side)
    assert first.image.shape == (side, side, 3) and first.image.dtype == np.uint8
    assert np.array_equal(first.image, again.image)
    assert [thing.box for thing in first.things] == [thing.box for thing in again.things]
    assert not np.array_equal(first.image, other.image)


@pytest.mark.parametrize("clutter", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("side", SIDES)
def test_pixels_show_what_the_scene_says(side, clutter):
    """Every thing has its colour where it covers the pixels fully, inside the image and apart from all others."""
    solid = 0
    for seed in range(25):
        scene = make_scene(seed, side, clutter)
        boxes = [thing.box for thing in scene.things] + ([scene.sign.box] if scene.sign else [])
        owner = np.zeros((side, side), int)
        for left, top, right, bottom in boxes:
            assert 0 < left < right < side and 0 < top < bottom < side
            owner[top:bottom, left:right] += 1
        assert owner.max() == 1
        for thing in scene.things:
            left, top, right, bottom = thing.box
            pixels = scene.image[top:bottom, left:right][thing.coverage > 0.99]
            if len(pixels) > 4:  # thin ones have none
                solid += 1
                distances = [np.abs(pixels.mean(0) - color).sum() for color in COLORS.values()]
                assert int(np.argmin(distances)) == thing.color
    assert solid > 60


@pytest.mark.parametrize("side", SIDES)
def test_box_steps_and_cells_have_words(side):
    for seed in range(25):
        scene = make_scene(seed, side)
        for thing in scene.things:
            assert all(str(step) in TOKEN_ID and 0 <= step <= 32 for step in scene.steps(thing.box))
            assert all(0 <= place < 7 for place in scene.cell(thing.box))


def test_clutter_has_its_pixels_too():
    """A seed is a scene at any clutter, and the photographs of the repository are what it is made of."""
    pixels = {clutter: make_scene(5, 192, clutter).image for clutter in (0.0, 0.5, 1.0)}
    for clutter, image in pixels.items():
        assert np.array_equal(image, make_scene(5, 192, clutter).image)
    shades = [
        np.abs(np.diff(make_scene(seed, 192, 1.0).image.astype(int), axis=1)).mean() for seed in range(30)
    ]
    smooth = [np.abs(np.diff(make_scene(seed, 192).image.astype(int), axis=1)).mean() for seed in range(30)]
    assert not np.array_equal(pixels[0.0], pixels[0.5]) and not np.array_equal(pixels[0.5], pixels[1.0])
    assert np.mean(shades) > 1.3 * np.mean(smooth)


def test_decoys_are_nothing_that_is_asked_about(monkeypatch):
    """Without decoys the same objects stand in the same places, and at full clutter most scenes have some."""
    scenes = [make_scene(seed, 192, 1.0) for seed in range(20)]
    monkeypatch.setattr(cluttered, "decoys", lambda rng, clutter: [])
    bare = [make_scene(seed, 192, 1.0) for seed in range(20)]
    assert [[thing.box for thing in scene.things] for scene in scenes] == [
        [thing.box for thing in scene.things] for scene in bare
    ]
    differ = [np.abs(a.image.astype(int) - b.image).max(-1) > 30 for a, b in zip(scenes, bare, strict=True)]
    for scene, elsewhere in zip(scenes, differ, strict=True):
        for box in [thing.box for thing in scene.things]:
            assert not elsewhere[box.top : box.bottom, box.left : box.right].any()
    assert sum(mask.sum() > 40 for mask in differ) >= 15


def test_photographs_of_training_are_not_those_of_evaluation():
    """By the seed, as with scenes."""
    shown = {
        first: {tuple(photograph.getpixel((7, 7))) for photograph in cluttered.photographs(first)}
        for first in (cluttered.FIRST_SEED - 1, cluttered.FIRST_SEED)
    }
    unseen, trained = shown.values()
    assert len(unseen) == 3 and len(trained) == 12 and not unseen & trained


def test_large_things_grow():
    """At full clutter a large object may have up to 1.75 times its size; small ones stay."""
    sizes = {True: [], False: []}
    for seed in range(40):
        for thing in make_scene(seed, 192, 1.0).things:
            sizes[SIZE_NAMES[thing.size] == "large"].append(max(thing.coverage.shape))
    assert max(sizes[False]) <= 19 and 40 < max(sizes[True]) <= 48 and min(sizes[True]) >= 23


def test_vocabulary_is_the_checkpoints():
    """The token ids of the shipped checkpoint; a word inserted anywhere would move them."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(IMAGES.parent / "checkpoint")
    assert tokenizer.convert_ids_to_tokens(list(range(len(VOCABULARY)))) == VOCABULARY
    assert len(tokenizer) == len(VOCABULARY) == 128


def test_refuses_another_size():
    with pytest.raises(ValueError, match=r"^side: expected one of \(112, 192\), got 100$"):
        make_scene(1, 100)


@pytest.mark.parametrize("clutter", [-0.1, 1.5, float("nan")])
def test_refuses_other_clutter(clutter):
    with pytest.raises(ValueError, match=f"^clutter: expected a number within 0 and 1, got {clutter}$"):
        make_scene(1, 112, clutter)
