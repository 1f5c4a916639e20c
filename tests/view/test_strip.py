"""A clip's strip: where the tokens of its frames lie in every family with videos, and which of them are dimmed."""

from types import SimpleNamespace

import pytest
from PIL import Image

from helpers.families import CASES, VIDEO, prompts
from vlmprune.models import check_videos
from vlmprune.policies.base import tokens_in
from vlmprune.view.picture import CAPTION, GAP, TITLE
from vlmprune.view.strip import HEIGHT, NEXT, Clip, clip_of, draw_strips, strip

FAMILIES = [name for name in CASES if name.endswith("-video")]
RED, GREEN = (255, 0, 0), (0, 255, 0)


@pytest.mark.parametrize("name", FAMILIES)
def test_frames_are_the_grids_of_the_tokens(name):
    case = CASES[name]
    inputs, ((picture,),) = prompts(case, [(3, "video", 5)])
    clip = clip_of(case.config(), inputs)
    assert clip.tokens == tokens_in(picture.grids) == int((inputs["input_ids"] == VIDEO).sum())
    newline = [(1, 1)] if name.startswith("llava") else []
    assert [grid for _, grid in clip.frames] + newline == list(picture.grids)
    firsts = [sum(tokens_in([grid]) for grid in picture.grids[:i]) for i in range(len(clip.frames))]
    assert [first for first, _ in clip.frames] == firsts


@pytest.mark.parametrize("name", ["llava-llama", "internvl"])
def test_families_without_videos_are_refused(name):
    said = rf"^--video: expected a checkpoint of a family with videos \(llava_onevision, .*\), got {name[:5]}"
    with pytest.raises(ValueError, match=said):
        check_videos(CASES[name].config(), "--video")
    check_videos(CASES["llava_onevision"].config(), "--video")


def bright(sheet, frame, place, grid=(2, 2), size=HEIGHT):
    """Whether the token at ``place`` of a frame is as it was."""
    left = frame * (size + NEXT) + (place % grid[1]) * size // grid[1] + size // 4
    return max(sheet.getpixel((left, place // grid[1] * size // grid[0] + size // 4))) == 255


def test_exactly_the_dropped_tokens_are_dimmed():
    images = [Image.new("RGB", (20, 20), color) for color in (RED, GREEN, RED, GREEN)]
    clip = Clip(tuple((4 * i, (2, 2)) for i in range(4)), 17)  # the last token is of no frame
    sheet = strip(images, clip, [0, 5, 6, 15, 16])
    assert sheet.size == (4 * (HEIGHT + NEXT) - NEXT, HEIGHT)
    kept = [4 * frame + place for frame in range(4) for place in range(4) if bright(sheet, frame, place)]
    assert kept == [0, 5, 6, 15]
    assert clip.counts([0, 5, 6, 15, 16]) == [1, 2, 0, 1]


def test_where_two_images_are_one_frame_the_first_is_shown():
    images = [Image.new("RGB", (20, 10), color) for color in (RED, RED, GREEN, GREEN)]
    sheet = strip(images, Clip(((0, (1, 1)), (1, (1, 1))), 2), [0, 1])
    assert sheet.size == (2 * (2 * HEIGHT + NEXT) - NEXT, HEIGHT)
    assert sheet.getpixel((5, 5)) == RED and sheet.getpixel((2 * HEIGHT + NEXT + 5, 5)) == GREEN


def test_many_frames_stand_in_several_lines():
    images = [Image.new("RGB", (10, 10), RED)] * 20
    sheet = strip(images, Clip(tuple((i, (1, 1)) for i in range(20)), 20), range(20))
    assert sheet.size == (16 * (HEIGHT + NEXT) - NEXT, 2 * (HEIGHT + NEXT) - NEXT)


def outcome(policy, *stages):
    report = SimpleNamespace(stages=[(layer, 0, len(kept)) for layer, kept in stages])
    label = policy or "unpruned"
    return SimpleNamespace(
        policy=policy, label=label, answer="yes", report=report, kept=[k for _, k in stages]
    )


def test_one_strip_for_every_stage():
    images, clip = [Image.new("RGB", (96, 96), RED)] * 6, Clip(tuple((i, (1, 1)) for i in range(6)), 6)
    runs = [outcome(None), outcome("one", (0, (0, 5))), outcome("two", (0, (0, 1, 4)), (2, (4,)))]
    sheet = draw_strips(images, clip, runs)
    line = CAPTION + HEIGHT + GAP
    assert sheet.size == (6 * (HEIGHT + NEXT) - NEXT + 2 * GAP, GAP + 4 * line + 3 * TITLE)
    tops = [GAP + TITLE, GAP + line + 2 * TITLE, GAP + 2 * line + 3 * TITLE, GAP + 3 * line + 3 * TITLE]
    kept = []
    for top in tops:
        at = [(GAP + i * (HEIGHT + NEXT) + 40, top + CAPTION + 40) for i in range(6)]
        kept.append([i for i, place in enumerate(at) if sheet.getpixel(place) == RED])
    assert kept == [[0, 1, 2, 3, 4, 5], [0, 5], [0, 1, 4], [4]]
