"""The picture: geometry of the image processor, dimmed patches, size of the sheet."""

from types import SimpleNamespace

import pytest
import torch
from PIL import Image, ImageChops
from transformers import AutoProcessor

from helpers.command_line import CHECKPOINT, SCENE, ask
from vlmprune.view.picture import CAPTION, DIMMED, GAP, TITLE, check_target, dim_dropped, draw, seen_images


def test_seen_image_is_the_resized_and_cropped_one():
    processor = AutoProcessor.from_pretrained(CHECKPOINT).image_processor
    wide = Image.new("RGB", (224, 112), (200, 30, 60))
    wide.paste(Image.open(SCENE).convert("RGB").resize((112, 112)), (56, 0))  # the crop takes the middle
    (seen,) = seen_images(torch.as_tensor(processor(wide, return_tensors="pt")["pixel_values"]), processor)
    expected = wide.crop((56, 0, 168, 112))
    assert seen.size == (112, 112)
    assert max(high for _, high in ImageChops.difference(seen, expected).getextrema()) <= 1


def test_exactly_the_dropped_patches_are_dimmed():
    image = Image.new("RGB", (40, 20), (250, 240, 230))
    out = dim_dropped(image, (2, 4), kept={0, 6})
    bright = {i for i in range(8) if out.getpixel((i % 4 * 10 + 5, i // 4 * 10 + 5)) == (250, 240, 230)}
    assert bright == {0, 6}
    assert sum(out.getpixel((15, 5))) < sum(image.getpixel((15, 5))) / 2
    assert sum(out.getpixel((15, 5))) >= sum(DIMMED)
    assert dim_dropped(image, (2, 4), set(range(8))).tobytes() == image.tobytes()


def outcome(policy, *stages):
    report = SimpleNamespace(stages=[(layer, 0, len(kept)) for layer, kept in stages])
    return SimpleNamespace(
        policy=policy, label=policy or "unpruned", answer="yes", report=report, kept=[k for _, k in stages]
    )


def panel(sheet, row, column, size=280):
    left, top = GAP + column * (size + GAP), GAP + row * (TITLE + CAPTION + size + GAP) + TITLE + CAPTION
    return sheet.crop((left, top, left + size, top + size))


def test_one_row_per_policy_and_image_one_panel_per_stage():
    images = [Image.new("RGB", (28, 28), color) for color in ((255, 0, 0), (0, 255, 0))]
    runs = [outcome(None), outcome("one", (1, (0, 5))), outcome("two", (1, (0, 1, 4)), (2, (4,)))]
    sheet = draw(images, (2, 2), runs)
    assert sheet.size == (GAP + 3 * (280 + GAP), GAP + 4 * (TITLE + CAPTION + 280 + GAP))
    assert panel(sheet, 0, 0).getcolors() == [(280 * 280, (255, 0, 0))]  # first the whole image
    assert panel(sheet, 1, 0).getcolors() == [(280 * 280, (0, 255, 0))]
    first = panel(sheet, 0, 1)  # token 0 is patch 0 of image 0
    assert first.getpixel((70, 70)) == (255, 0, 0) and first.getpixel((210, 70)) != (255, 0, 0)
    second = panel(sheet, 1, 1)  # token 5 is patch 1 of image 1
    assert second.getpixel((210, 70)) == (0, 255, 0) and second.getpixel((70, 70)) != (0, 255, 0)
    assert panel(sheet, 0, 2).getcolors() == [
        (280 * 280, (255, 255, 255))
    ]  # policy "one" has no second stage
    last = panel(sheet, 2, 2)  # policy "two", image 0: nothing of it survives the second stage
    assert last.getpixel((70, 70)) == last.getpixel((210, 210)) != (255, 0, 0)


def test_run_saves_the_picture(tmp_path):
    target = tmp_path / "kept.png"
    done = ask(
        "--policy", "fastv:layer=2,keep=0.25", "--policy", "feather:layers=2/5", "--compare", "--save", target
    )
    assert done.exit_code == 0, done.stderr
    size = 112 * 3
    with Image.open(target) as sheet:
        assert sheet.size == (GAP + 3 * (size + GAP), GAP + 2 * (TITLE + CAPTION + size + GAP))


def test_target_is_checked(tmp_path):
    check_target(tmp_path / "kept.webp")
    with pytest.raises(ValueError, match=r"^--save: expected a file name ending in .png, .jpg or .webp, got"):
        check_target(tmp_path / "kept")
