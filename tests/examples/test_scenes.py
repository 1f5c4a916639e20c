"""Scenes: the same pixels for the same seed, and what a scene says of itself is what its pixels show."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from world.scenes import SIDES, make_scene
from world.words import COLORS, TOKEN_ID, VOCABULARY

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


@pytest.mark.parametrize("side", SIDES)
def test_pixels_show_what_the_scene_says(side):
    """Every thing has its colour where it covers the pixels fully, inside the image and apart from all others."""
    solid = 0
    for seed in range(25):
        scene = make_scene(seed, side)
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


def test_vocabulary_is_the_checkpoints():
    """The token ids of the shipped checkpoint; a word inserted anywhere would move them."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(IMAGES.parent / "checkpoint")
    assert tokenizer.convert_ids_to_tokens(list(range(len(VOCABULARY)))) == VOCABULARY
    assert len(tokenizer) == len(VOCABULARY) == 128


def test_refuses_another_size():
    with pytest.raises(ValueError, match=r"^side: expected one of \(112, 192\), got 100$"):
        make_scene(1, 100)
