"""Bad input in the real engine: refused when it starts, in the process that starts it, or with the request alone."""

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed (make test-vllm)")

import psutil
import torch
import transformers
import vllm
from transformers import (
    AutoConfig,
    AutoTokenizer,
    LlavaNextConfig,
    LlavaNextImageProcessor,
    LlavaNextProcessor,
)
from vllm.model_executor.models.config import MODELS_CONFIG_MAP

from helpers.served import CHECKPOINT, LLAVA, engine, overrides, question, said, tokens
from vlmprune.errors import InputError
from vlmprune.integrations.vllm import ARCHITECTURES, UNPRUNED
from vlmprune.integrations.vllm.startup import PrunedConfig, UnprunedConfig

NEXT = "VLMPruneLlavaNextForConditionalGeneration"
QWEN = "VLMPruneQwen2_5_VLForConditionalGeneration"
KEEPING = {"policy": "divprune", "keep": 16}
SMALL = {**KEEPING, "positions": "pack"}
SEES = {"policy": "fastervlm", "keep": 16, "vision_layer": -1, "positions": "pack"}


def refused(model, over, expected, **settings):
    """The line that a start ends with; nothing runs behind it."""
    before = {child.pid for child in psutil.Process().children(recursive=True)}
    with pytest.raises(ValueError, match=r"expected .*, got ") as caught:
        with engine(model, None, **{"hf_overrides": over, **settings}):
            pass
    lines = [line.strip() for line in str(caught.value).splitlines() if "expected" in line]
    assert len(lines) == 1
    assert expected in lines[0]
    assert {child.pid for child in psutil.Process().children(recursive=True)} <= before


@pytest.mark.parametrize(
    ("policy", "expected"),
    [
        ({"policy": "divprun"}, "policy: expected one of fastv, feather, "),
        ({"policy": "divprune", "kep": 3}, "policy divprune: expected one of the fields keep, positions"),
        ({"policy": "cdpruner"}, "CDPruner: expected a choice by the image alone"),
        ({"policy": "fastv"}, "FastV: expected a policy that prunes at layer 0 alone"),
        ({"policy": "uniform", "layer": 0, "stride": 2}, "Uniform: expected a count known before"),
        (
            {**SMALL, "keep": 197},
            "expected at most the 196 tokens of this model's largest image",
        ),
        ({**SMALL, "max_keep": 197}, "max_keep: expected 16 (what the policy keeps itself) to 196"),
        ({**SMALL, "max_keep": 15}, "max_keep: expected 16 (what the policy keeps itself) to 196"),
        (KEEPING, "positions: expected 'pack' with this model in vLLM"),
        ({**SMALL, "positions": "keep"}, "positions: expected 'pack' with this model in vLLM"),
        (
            {**SEES, "vision_layer": 4},
            "vision_layer: expected -4 to -1, or 0 to 3 (of 4 layers vLLM loads 4)",
        ),
        ("divprune", "hf_overrides['vlmprune']: expected a dict"),
    ],
    ids=repr,
)
def test_settings(policy, expected):
    refused(CHECKPOINT, overrides(policy), expected)


def test_an_architecture_without_a_policy():
    refused(CHECKPOINT, {"architectures": [LLAVA]}, "hf_overrides['vlmprune']: expected a dict")


def test_a_policy_without_an_architecture():
    """vLLM alone would take the setting, and prune nothing."""
    refused(CHECKPOINT, {"vlmprune": SMALL}, f"architectures: expected ['{LLAVA}'] beside 'vlmprune'")


def test_a_layer_that_vllm_does_not_load():
    over = {**overrides(SEES), "vision_feature_layer": -2}
    refused(CHECKPOINT, over, "expected -4 to -2, or 0 to 2 (of 4 layers vLLM loads 3), got -1")


def test_what_hides_the_tower():
    compiled = {"compile_mm_encoder": True}
    refused(CHECKPOINT, overrides(SEES), "compile_mm_encoder: expected False", compilation_config=compiled)


def test_what_passes_the_pruning_by():
    """vLLM replays a captured tower in place of asking the model for its images."""
    captured = {"cudagraph_mm_encoder": True}
    refused(CHECKPOINT, overrides(SMALL), "cudagraph_mm_encoder: expected False", compilation_config=captured)


def test_a_budget_among_the_settings_of_the_processor():
    kwargs = {"vlmprune_keep": 8}
    refused(
        CHECKPOINT,
        overrides(SMALL),
        "mm_processor_kwargs: expected no 'vlmprune_keep'",
        mm_processor_kwargs=kwargs,
    )


@pytest.mark.parametrize("over", [overrides(SMALL), {"vlmprune": SMALL}], ids=["pruned", "stray"])
def test_another_release(monkeypatch, over):
    monkeypatch.setattr(vllm, "__version__", "0.99.1")
    refused(CHECKPOINT, over, "vllm: expected 0.32, with which vlmprune was tested")


# Other checkpoints; they need no weights to be refused


def configured(folder, kind, architecture):
    config = getattr(transformers, f"{kind}Config")()
    config.architectures = [architecture]
    config.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("kind", "own", "expected"),
    [
        ("Qwen2VL", "Qwen2VLForConditionalGeneration", "model_type: expected one of llava, "),
        ("InternVL", "InternVLForConditionalGeneration", "model_type: expected one of llava, "),
        ("Qwen2_5_VL", "Qwen2_5_VLForConditionalGeneration", f"architectures: expected ['{QWEN}']"),
    ],
)
@pytest.mark.parametrize("stray", [False, True], ids=["architecture", "stray"])
def test_another_family(tmp_path, kind, own, expected, stray):
    over = {"vlmprune": KEEPING} if stray else overrides(KEEPING)
    refused(configured(tmp_path, kind, own), over, expected)


@pytest.fixture
def tiled(tmp_path):
    """LLaVA-NeXT with glyphworld's tower: the largest of its images has 14 * 14 tokens, 28 * 28, and 28 newlines."""
    base, pins = AutoConfig.from_pretrained(CHECKPOINT), [[112, 224], [224, 112], [224, 224]]
    config = LlavaNextConfig(
        vision_config=base.vision_config,
        text_config=base.text_config,
        image_token_index=base.image_token_index,
        image_grid_pinpoints=pins,
        vision_feature_layer=-1,
    )
    config.architectures = ["LlavaNextForConditionalGeneration"]
    config.save_pretrained(tmp_path)
    side = {"height": 112, "width": 112}
    images = LlavaNextImageProcessor(size={"shortest_edge": 112}, crop_size=side, image_grid_pinpoints=pins)
    LlavaNextProcessor(
        images,
        AutoTokenizer.from_pretrained(CHECKPOINT),
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    ).save_pretrained(tmp_path)
    return tmp_path


def test_more_than_the_largest_image_has(tiled):
    refused(
        tiled,
        overrides({**SMALL, "keep": 1009}, NEXT),
        "the 1008 tokens of this model's largest image",
    )
    refused(
        tiled,
        overrides({**SMALL, "max_keep": 1009}, NEXT),
        "max_keep: expected 16 (what the policy keeps itself) to 1008",
    )


def test_what_is_registered_changes_nothing_else():
    for architecture in UNPRUNED:
        assert MODELS_CONFIG_MAP[architecture] is UnprunedConfig
    for architecture, _ in ARCHITECTURES.values():
        assert MODELS_CONFIG_MAP[architecture] is PrunedConfig
    own = vars(UnprunedConfig).keys() & {"verify_and_update_config", "verify_and_update_model_config"}
    assert own == {"verify_and_update_model_config"}


# Requests


@pytest.fixture(scope="module")
def served():
    policy = {**SMALL, "max_keep": 100}
    with engine(CHECKPOINT, policy, enable_mm_embeds=True) as llm:
        yield llm


@pytest.fixture
def still(served):
    """The engine answers as before, and holds nothing of what was refused."""
    usual = tokens(said(served, [question(0).prompt()]))
    yield
    assert served.llm_engine.get_num_unfinished_requests() == 0
    assert tokens(said(served, [question(0).prompt()])) == usual


@pytest.mark.parametrize("asked", [0, -3, True, "64", 64.0, [64], float("nan"), {"keep": 3}], ids=repr)
def test_no_budget(served, still, asked):
    with pytest.raises(InputError, match=r"^vlmprune_keep: expected a share in \(0, 1\] or a whole number"):
        said(served, [question(0).prompt(vlmprune_keep=asked)])


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        (101, "at most 100 of this image's 196 tokens"),
        (0.6, "at most 100 of this image's 196 tokens"),
        (197, "at most the 196 tokens of this image"),
    ],
)
def test_too_large_a_budget_ends_its_request_alone(served, still, asked, expected):
    with pytest.raises(InputError, match=f"^vlmprune_keep: expected {expected}"):
        said(served, [question(1).prompt(), question(0).prompt(vlmprune_keep=asked), question(2).prompt()])


def test_embeddings_cannot_be_pruned(served, still):
    rows = torch.zeros(1, 196, served.llm_engine.model_config.get_hidden_size())
    with pytest.raises(InputError, match=r"^image: expected a picture .*, got embeddings$"):
        said(served, [{"prompt": question(0).text, "multi_modal_data": {"image": rows}}])


def test_budgets_that_are_allowed(served):
    asked = [question(0).prompt(vlmprune_keep=keep) for keep in (1, 0.5, 100, None)]
    text = len(question(0).text.split()) - 1
    assert [len(one.prompt_token_ids) - text for one in said(served, asked)] == [1, 98, 100, 16]


def test_without_an_image_there_is_nothing_to_ask_for(served):
    text = "<bos> USER: how many phones are there ? ASSISTANT:"
    outputs = said(served, [{"prompt": text}, {"prompt": text, "mm_processor_kwargs": {"vlmprune_keep": 0}}])
    assert tokens(outputs[:1]) == tokens(outputs[1:])
