"""Images of extreme shapes, through the real image processors: tiles without rows, or nothing but newlines."""

from __future__ import annotations

from copy import deepcopy
from functools import wraps

import pytest
import torch
import transformers as hf
from PIL import Image

import vlmprune
from helpers import families_oracle as family
from helpers.device import placed
from helpers.families import CASES, IMAGE, build, prompts

SIZES = [(10_000, 10), (1_500, 20), (700, 10), (10, 10_000), (10, 700), (1, 1), (100, 12)]
"""Width and height."""


def processed(name, model, size):
    """What the family's own image processor makes of a picture."""
    kind = hf.LlavaNextImageProcessor if name == "llava_next" else hf.LlavaOnevisionImageProcessor
    sides = {"shortest_edge": 16} if name == "llava_next" else {"height": 16, "width": 16}
    more = {"crop_size": {"height": 16, "width": 16}} if name == "llava_next" else {}
    processor = kind(size=sides, image_grid_pinpoints=model.config.image_grid_pinpoints, **more)
    pixels = processor(images=[Image.new("RGB", size, "red")], return_tensors="pt")
    return placed({key: pixels[key] for key in ("pixel_values", "image_sizes")})


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("name", ["llava_next", "llava_onevision"])
def test_extreme_shapes_equal_the_masked_run(name, size):
    model = build(CASES[name])
    pixels = processed(name, model, size)
    try:
        with torch.no_grad():
            tokens = len(model.model.get_image_features(**pixels).pooler_output[0])
    except (RuntimeError, ZeroDivisionError) as error:
        pytest.skip(f"the unpruned model does not run: {error}")
    ids = torch.tensor([[1, 5, 6] + [IMAGE] * tokens + [7, 8]])
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), **pixels}
    settings = {
        "do_sample": False,
        "output_logits": True,
        "return_dict_in_generate": True,
        "max_new_tokens": 3,
    }
    with vlmprune.prune(model, vlmprune.FastV(layer=2, keep=0.5)) as run:
        out = model.generate(**inputs, **settings, suppress_tokens=[IMAGE, 198])
    assert run.stages[0].tokens_in == tokens and run.stages[0].tokens_kept == max(1, tokens // 2)
    want = family.oracle(model, inputs, family.dropped_from(run, inputs))[1]
    got = torch.stack(out.logits, 1)
    torch.testing.assert_close(got, want[:, : got.shape[1]], rtol=0, atol=family.TOLERANCE)


def test_other_codes_way_of_encoding_is_kept():
    """What stood in the place of get_image_features is called in the scope, and stands there again after it."""
    case = CASES["llava_next"]
    model, policy = build(case), vlmprune.FasterVLM(keep=3, positions="pack")
    inputs, _ = prompts(case, case.padded)
    with vlmprune.prune(model, policy):
        want = family.generate(model, inputs)[1]
    calls, usual = [], model.model.get_image_features

    @wraps(usual)
    def counting(*args, **kwargs):
        calls.append(1)
        return usual(*args, **kwargs)

    model.model.get_image_features = counting
    with vlmprune.prune(model, policy):
        assert torch.equal(family.generate(model, inputs)[1], want)
    assert calls == [1] and vars(model.model)["get_image_features"] is counting
    with vlmprune.prune(model, policy):
        del model.model.get_image_features
        model.model.get_image_features = counting  # put there within the scope: it stays, too
    assert vars(model.model)["get_image_features"] is counting


@pytest.mark.parametrize("name", ["llava_next", "llava_onevision", "qwen2_5_vl"])
def test_a_copy_of_an_attached_model_prunes_by_itself(name):
    case = CASES[name]
    model, policy = build(case), vlmprune.FasterVLM(keep=3, positions="keep")
    inputs, _ = prompts(case, case.padded)
    plain = family.generate(model, inputs)[1]
    vlmprune.attach(model, policy)
    copy = deepcopy(model)
    want = family.generate(model, inputs)[1]
    vlmprune.detach(model)
    assert torch.equal(family.generate(copy, inputs)[1], want)
    assert torch.equal(family.generate(model, inputs)[1], plain)
    vlmprune.detach(copy)
    assert torch.equal(family.generate(copy, inputs)[1], plain) and not torch.equal(want, plain)
