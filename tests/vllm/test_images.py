"""What the model makes of its images, asked directly: each as if it were alone, and nothing of them stays behind."""

import gc

import pytest
import torch

pytest.importorskip("vllm", reason="vLLM is not installed (make test-vllm)")

from transformers import AutoProcessor

from helpers.served import engine
from helpers.served_tiny import SIZES, engine_settings, picture, tiny
from vlmprune.errors import InputError
from vlmprune.integrations.vllm.settings import KEPT

MADE = {
    "llava": ("clip", "llama", {"policy": "fastervlm", "keep": 5, "positions": "pack"}),
    "llava_next": (
        "clip",
        "mistral",
        {"policy": "visionzip", "dominant": 8, "contextual": 3, "positions": "pack"},
    ),
    "llava_onevision": ("siglip", "qwen2", {"policy": "folder", "keep": 0.25, "positions": "pack"}),
}
CLOSE = {"atol": 1e-5, "rtol": 1e-5}
"""Larger batches are multiplied in another order."""


def started(family, folder):
    tower, decoder, policy = MADE[family]
    return engine(tiny(family, folder, tower, decoder), policy, **engine_settings(family))


class Served:
    """A model of vLLM, and its processor."""

    def __init__(self, llm, folder):
        (self.model,) = llm.apply_model(lambda model: model)
        self.processor = AutoProcessor.from_pretrained(folder)

    def call(self, pictures, padded=False):
        """Arguments for all of them at once; ``padded``: tiles filled up to the most, as for images of one request."""
        batches = [pictures] if padded else [[one] for one in pictures]
        made = [
            self.processor(images=some, text="<image>" * len(some), return_tensors="pt") for some in batches
        ]
        pixels = [x for one in made for x in one["pixel_values"]]
        same = len({x.shape for x in pixels}) == 1
        counts = [self.processor(images=[one], text="<image>").input_ids[0] for one in pictures]
        kept = [self.model.pruning.kept(ids.count(self.processor.image_token_id)) for ids in counts]
        call = {"pixel_values": torch.stack(pixels) if same else pixels, KEPT: torch.tensor(kept)}
        if "image_sizes" in made[0]:
            call["image_sizes"] = torch.cat([one["image_sizes"] for one in made])
        return call

    @torch.inference_mode()
    def __call__(self, pictures, **how):
        return self.model.embed_multimodal(**self.call(pictures, **how))


@pytest.fixture(scope="module", params=MADE)
def served(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # else the model is in another process
        with started(request.param, folder) as llm:
            yield Served(llm, folder)


PICTURES = [picture(shape, seed) for seed, shape in enumerate(SIZES)]


@pytest.mark.parametrize("padded", [False, True])
def test_an_image_is_pruned_as_if_it_were_alone(served, padded):
    alone = [served([one])[0] for one in PICTURES]
    assert len({tuple(rows.flatten().tolist()) for rows in alone}) == len(alone)
    together = served(PICTURES, padded=padded)
    backwards = served(PICTURES[::-1], padded=padded)[::-1]
    for one, among, other in zip(alone, together, backwards, strict=True):
        torch.testing.assert_close(among, one, **CLOSE)
        torch.testing.assert_close(other, one, **CLOSE)


@pytest.mark.parametrize("padded", [False, True])
def test_no_more_meets_in_the_tower_than_unpruned(served, monkeypatch, padded):
    """vLLM sends as many images as the kept tokens of which fit; whole ones would have come in several calls."""
    seen, tower = [], served.model.vision_tower
    rows = served(PICTURES, padded=padded)
    crops = served.model.sizes(served.call(PICTURES, padded=padded))
    monkeypatch.setattr(served.model, "at_once", 16 * max(crops))  # a crop has 16 patches
    with monkeypatch.context() as patch:
        forward = tower.forward
        patch.setattr(tower, "forward", lambda x, **how: (seen.append(len(x)), forward(x, **how))[1])
        portions = served(PICTURES, padded=padded)
    assert len(seen) > 1 and sum(seen) == sum(crops) and max(seen) <= max(crops)
    for one, other in zip(rows, portions, strict=True):
        torch.testing.assert_close(one, other, **CLOSE)


def tensors():
    gc.collect()
    return {id(x): x for x in gc.get_objects() if isinstance(x, torch.Tensor)}


def test_nothing_stays_but_the_kept_rows(served):
    call = served.call(PICTURES)
    with torch.inference_mode():
        served.model.embed_multimodal(**call)  # tables of shapes are made once
        before = tensors()
        rows = served.model.embed_multimodal(**call)
    after = tensors()
    assert {*after} - {*before} <= {id(x) for x in rows}
    for x in rows:
        assert x.untyped_storage().nbytes() == x.numel() * x.element_size()  # no view of more
    assert served.model.reads.note is None and not served.model.reads.features


def test_a_call_that_fails_leaves_no_note(served):
    call = served.call(PICTURES[:1])
    with pytest.raises(Exception), torch.inference_mode():  # noqa: B017 - whatever vLLM says
        served.model.embed_multimodal(**call | {"pixel_values": torch.zeros(1, 2, 3, 4)})
    assert served.model.reads.note is None
    assert len(served(PICTURES[:1])[0])


def test_images_without_their_counts_are_refused(served):
    call = served.call(PICTURES[:1])
    del call[KEPT]
    with pytest.raises(InputError, match=f"{KEPT}: expected the count of every image, got none"):
        served.model.embed_multimodal(**call)


def hooks(model):
    return sum(len(part._forward_pre_hooks) + len(part._forward_hooks) for part in model.modules())


def test_hooks_where_the_tower_is_read_alone(tmp_path, monkeypatch):
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    folder = tiny("llava", tmp_path)
    for policy, count in (
        ({"policy": "divprune", "keep": 5, "positions": "pack"}, 0),
        ({"policy": "fastervlm", "keep": 5, "positions": "pack"}, 1),
    ):
        with engine(folder, policy, **engine_settings("llava")) as llm:
            assert llm.apply_model(hooks) == [count], policy
