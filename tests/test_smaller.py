"""Pictures made smaller: as many tokens as they say, the tower's own positions where nothing changes, nothing left behind."""

from types import SimpleNamespace

import pytest
import torch
import transformers as hf
from PIL import Image

from helpers.clips import tokenizer
from helpers.families import CASES, build
from helpers.tiny import GRID, make_model
from vlmprune import FastV, meter, prune
from vlmprune.checkpoints import make_inputs
from vlmprune.errors import InputError, ModelError
from vlmprune.flops import decoder_flops
from vlmprune.models.host.parts import decoder_shape
from vlmprune.smaller import Smaller, SmallPictures, as_they_are

IMAGE = 199
SIDE = 14 * GRID


def llava(tower):
    """A tiny model, and a processor of the kind that checkpoints with such a tower have."""
    clip = hf.CLIPImageProcessor(
        size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE}, do_center_crop=True
    )
    images = clip if tower == "clip" else hf.SiglipImageProcessor(size={"height": SIDE, "width": SIDE})
    processor = hf.LlavaProcessor(
        image_processor=images,
        tokenizer=tokenizer(),
        patch_size=14,
        vision_feature_select_strategy="default" if tower == "clip" else "full",
        num_additional_image_tokens=1 if tower == "clip" else 0,
    )
    return make_model(tower=tower), processor


def picture(width=80, height=60, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return Image.fromarray(
        torch.randint(256, (height, width, 3), generator=generator, dtype=torch.uint8).numpy()
    )


TEXTS = ["<bos> w5 <image> w6 w7", "<bos> <image> w8 <image> w9 w10 w11"]
IMAGES = [[picture()], [picture(60, 90, 1), picture(70, 70, 2)]]


@pytest.mark.parametrize("tower", ["clip", "siglip"])
@pytest.mark.parametrize("keep, side", [(0.6, 3), (9, 3), (8, 2), (0.01, 1)])
def test_the_tower_sees_a_smaller_square(tower, keep, side):
    """Every layer sees so many tokens; the features are those of the tower with its position table resized."""
    model, processor = llava(tower)
    pictures = SmallPictures(model.config, processor)
    shown = pictures.inputs(TEXTS, IMAGES, keep, "q").to(model.device, model.dtype)
    assert (shown.whole, shown.shown) == ((16, 32), (side**2, 2 * side**2))
    with torch.inference_mode(), pictures.tower(model), meter(model) as run:
        logits = model(**shown.inputs).logits
    assert run.report().visual_tokens == 1.5 * side**2

    resized, _ = llava(tower)
    resized.load_state_dict(model.state_dict())
    embeddings = resized.model.vision_tower.embeddings
    table, cls = embeddings.position_embedding.weight.data, int(tower == "clip")
    grid = table[cls:].T.reshape(1, -1, GRID, GRID)
    grid = torch.nn.functional.interpolate(grid, size=(side, side), mode="bicubic", align_corners=False)
    table = torch.cat([table[:cls], grid.flatten(2)[0].T])
    embeddings.position_embedding = torch.nn.Embedding(*table.shape, _weight=table)
    embeddings.position_ids = torch.arange(len(table))[None].to(table.device)
    embeddings.image_size = side * 14
    with torch.inference_mode():
        expected = resized(**shown.inputs).logits
    real = shown.inputs["attention_mask"].bool()
    torch.testing.assert_close(logits[real], expected[real], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("tower", ["clip", "siglip"])
def test_everything_is_the_unpatched_model_and_nothing_stays_behind(tower):
    model, processor = llava(tower)
    pictures = SmallPictures(model.config, processor)
    plain = make_inputs(processor, TEXTS, IMAGES, "q").to(model.device, dtype=model.dtype)
    shown = pictures.inputs(TEXTS, IMAGES, 1.0, "q").to(model.device, model.dtype)
    assert shown.whole == shown.shown == as_they_are(model.config, plain).shown
    torch.testing.assert_close(shown.inputs["pixel_values"], plain["pixel_values"], rtol=0, atol=0)
    with torch.inference_mode():
        before = model(**plain).logits
        with pictures.tower(model):
            torch.testing.assert_close(model(**shown.inputs).logits, before, rtol=0, atol=0)
        with pytest.raises(KeyError, match="mine"), pictures.tower(model):
            raise KeyError("mine")
        torch.testing.assert_close(model(**plain).logits, before, rtol=0, atol=0)
    assert not model.model.vision_tower._forward_pre_hooks


def test_the_report_is_beside_the_prompt_with_whole_pictures():
    """FLOPs, padding included, of beams too; one who did not make pictures smaller is told what the run says itself."""
    model, processor = llava("clip")
    pictures = SmallPictures(model.config, processor)
    shown = pictures.inputs(TEXTS, IMAGES, 4, "q").to(model.device, model.dtype)
    shape = decoder_shape(model.config)
    flops = {length: decoder_flops(shape, [length] * shape.layers) for length in (5 + 32, 5 + 8)}
    for beams in (1, 2):
        with torch.inference_mode(), pictures.tower(model), meter(model) as run:
            model.generate(**shown.inputs, max_new_tokens=2, num_beams=beams, do_sample=False)
        report = shown.report(run.report(), model.config)
        assert report.visual_tokens == 24 and report.tokens.mean_per_layer == 6
        assert (report.flops.full, report.flops.pruned) == tuple(2 * beams * f for f in flops.values())
    plain = as_they_are(model.config, make_inputs(processor, TEXTS, IMAGES, "q"))
    plain = plain.to(model.device, model.dtype)
    with torch.inference_mode(), prune(model, FastV(layer=2, keep=0.5)) as run:
        model(**plain.inputs)
    assert plain.report(run.report(), model.config).as_dict() == run.report().as_dict()


@pytest.fixture
def no_videos(monkeypatch):
    """Processors of pictures alone: those of videos need torchvision."""
    checks = "transformers.processing_utils.ProcessorMixin.check_argument_for_proper_class"
    monkeypatch.setattr(checks, lambda self, name, argument: None)


def of_any_size(kind):
    """A family's configuration, as far as pictures go, and a processor with the settings of its checkpoints."""
    images = hf.Qwen2VLImageProcessor()
    if kind == "qwen3_vl":
        images = hf.Qwen2VLImageProcessor(
            patch_size=16, size={"shortest_edge": 65536, "longest_edge": 16777216}
        )
    tiled = {"tokenizer": tokenizer(), "patch_size": 14, "num_additional_image_tokens": 1}
    made = {
        "qwen2_vl": lambda: hf.Qwen2VLProcessor(images, tokenizer()),
        "qwen2_5_vl": lambda: hf.Qwen2_5_VLProcessor(images, tokenizer()),
        "qwen3_vl": lambda: hf.Qwen3VLProcessor(images, tokenizer()),
        "llava_next": lambda: hf.LlavaNextProcessor(
            hf.LlavaNextImageProcessor(), vision_feature_select_strategy="default", **tiled
        ),
        "llava_onevision": lambda: hf.LlavaOnevisionProcessor(
            hf.LlavaOnevisionImageProcessor(),
            tokenizer(),
            num_image_tokens=729,
            vision_feature_select_strategy="full",
        ),
    }
    return SimpleNamespace(model_type=kind, image_token_id=IMAGE, video_token_id=-2), made[kind]()


ANY_SIZE = ["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "llava_next", "llava_onevision"]


@pytest.mark.parametrize("kind", ANY_SIZE)
@pytest.mark.parametrize("size", [(640, 480), (300, 900)])
def test_a_resized_picture_has_as_many_tokens_as_fit(no_videos, kind, size):
    """Counted in the processor's own output; no other size of its shape comes nearer (every 16th is tried)."""
    config, processor = of_any_size(kind)
    pictures, one = SmallPictures(config, processor), picture(*size)

    def tokens(image):
        return as_they_are(config, make_inputs(processor, ["w3 <image> w4"], [[image]], "q")).shown[0]

    whole = tokens(one)
    for keep in (1.0, 0.5, int(0.6 * whole)):
        budget = int(keep * whole) if isinstance(keep, float) else keep
        shown = pictures.inputs(["w3 <image> w4"], [[one]], keep, "q")
        assert shown.whole == (whole,) and shown.shown[0] <= budget
        width, height = pictures.plan(size, keep).size
        assert width / height == pytest.approx(size[0] / size[1], rel=0.02)
        for n in range(1, 17):
            other = tokens(one.resize((size[0] * n // 20, size[1] * n // 20)))
            assert not shown.shown[0] < other <= budget
    assert pictures.inputs(["w3 <image> w4"], [[one]], 1.0, "q").shown == (whole,)


@pytest.mark.parametrize("name", ["qwen2vl", "llava_next"])
def test_the_model_takes_the_resized_picture(no_videos, name):
    """Tiny models with processors to fit: what the model saw is what was counted, and the report says what it saves."""
    model, prompt = build(CASES[name]), ["w5 <image> w6 w7"]
    size = {"shortest_edge": 16} if name == "llava_next" else {"shortest_edge": 64, "longest_edge": 4096}
    tiles = {"size": size, "crop_size": {"height": 16, "width": 16}}
    processor = {
        "qwen2vl": lambda: hf.Qwen2VLProcessor(
            hf.Qwen2VLImageProcessor(patch_size=4, merge_size=2, size=size), tokenizer()
        ),
        "llava_next": lambda: hf.LlavaNextProcessor(
            hf.LlavaNextImageProcessor(image_grid_pinpoints=model.config.image_grid_pinpoints, **tiles),
            tokenizer(),
            patch_size=4,
            vision_feature_select_strategy="default",
            num_additional_image_tokens=1,
        ),
    }[name]()
    pictures = SmallPictures(model.config, processor)
    shown = pictures.inputs(prompt, [[picture(60, 45)]], 0.7, "q").to(model.device, model.dtype)
    with torch.inference_mode(), pictures.tower(model), meter(model) as run:
        model.generate(**shown.inputs, max_new_tokens=2, do_sample=False)
    report = run.report()
    assert (report.visual_tokens,) == shown.shown < shown.whole and report.flops.cut == 0
    beside = shown.report(report, model.config)
    assert (beside.visual_tokens,) == shown.whole and 0 < beside.flops.cut < 1


def test_several_pictures_of_one_prompt(no_videos):
    config, processor = of_any_size("qwen2_vl")
    images = [[image.resize((200, 150)) for image in some] for some in IMAGES]
    shown = SmallPictures(config, processor).inputs(TEXTS, images, 0.5, "q")
    assert shown.whole[1] == 2 * shown.whole[0]
    assert all(few <= many / 2 for few, many in zip(shown.shown, shown.whole, strict=True))


@pytest.mark.parametrize(
    "kind, keep, said",
    [
        ("qwen3_vl", 20, r"^smaller: expected at least 70 tokens for 640 x 480 pixels .*, got 20$"),
        ("llava_next", 64, r"^smaller: expected at least \d+ tokens for 640 x 480 pixels .*, got 64$"),
    ],
)
def test_fewer_tokens_than_any_size_has(no_videos, kind, keep, said):
    with pytest.raises(InputError, match=said):
        SmallPictures(*of_any_size(kind)).plan((640, 480), keep)


def test_what_cannot_be_made_smaller_says_so(no_videos):
    with pytest.raises(
        ModelError, match=r"^smaller: expected a model of type llava, .*, got 'internvl' \(it"
    ):
        SmallPictures(SimpleNamespace(model_type="internvl"), None)
    config, processor = of_any_size("llava_onevision")
    with pytest.raises(
        InputError, match=r"^q: expected one picture a prompt \(llava_onevision .*, got several"
    ):
        SmallPictures(config, processor).inputs(TEXTS, IMAGES, 0.5, "q")
    model, processor = llava("clip")
    processor.image_processor.do_resize = False
    with pytest.raises(InputError, match=r"^smaller: expected an image processor that resizes, got"):
        SmallPictures(model.config, processor).inputs(TEXTS, IMAGES, 4, "q")
    model, processor = llava("clip")
    processor.num_additional_image_tokens = 3
    with pytest.raises(
        InputError, match=r"^q: expected \(4, 8\) visual tokens from the processor.*got \(6, 12\)"
    ):
        SmallPictures(model.config, processor).inputs(TEXTS, IMAGES, 4, "q")


@pytest.mark.parametrize(
    "text, said",
    [
        ("smaller:keep=two", "keep: expected int or float, got 'two'"),
        ("smaller:tokens=64", "smaller: expected the field keep, got 'tokens'"),
        ("smaller:keep=1.5", "keep: expected a share in"),
    ],
)
def test_as_typed(text, said):
    assert Smaller.read("smaller:keep=64") == Smaller(64)
    assert Smaller.read("smaller") == Smaller(0.25)
    assert Smaller.read("uniform") is None
    with pytest.raises(InputError, match=f"^{said}"):
        Smaller.read(text)
