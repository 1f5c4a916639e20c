"""Engines on two ranks, without a tower, and without the plugin."""

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed (make test-vllm)")

from helpers.served import CHECKPOINT, engine
from helpers.served_apart import Request, answers, apart, same
from helpers.served_tiny import renamed

REQUESTS = [Request(0), Request(1, 2), Request(2, keep=24), Request(5, 2, 10)]
READS_TOWER = {"policy": "visionzip", "dominant": 40, "contextual": 9, "positions": "pack"}
DIVPRUNE = {"policy": "divprune", "keep": 49, "positions": "pack"}
NO_PLUGIN = {"VLLM_PLUGINS": "", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}


@pytest.mark.parametrize("policy", [READS_TOWER, DIVPRUNE], ids=lambda policy: policy["policy"])
def test_tensor_parallel_2_in_an_engine_of_its_own_process(policy):
    """Each rank has half of the tower's heads; a policy that reads the tower is shown all of them."""
    two = {"tensor_parallel_size": 2, "distributed_executor_backend": "mp"}
    got = apart(REQUESTS, policy, surroundings={"VLLM_ENABLE_V1_MULTIPROCESSING": "1"}, **two)
    with engine(CHECKPOINT, policy) as llm:
        same(got, answers(llm, REQUESTS))


def test_an_engine_of_text_alone_has_no_tower():
    text = [Request(0, 0), Request(1, 0)]
    with engine(CHECKPOINT, READS_TOWER) as llm:
        whole = answers(llm, text)
    with engine(CHECKPOINT, READS_TOWER, limit_mm_per_prompt={"image": 0}) as llm:
        same(answers(llm, text), whole)


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """The checkpoint with the names of weights that vLLM's own class knows."""
    return renamed(CHECKPOINT, tmp_path_factory.mktemp("published") / "hub", "hub")


def test_without_the_override_nothing_changes(published):
    """vLLM's own class, where the plugin is loaded and where vLLM was told to load none."""
    from vllm import ModelRegistry

    whole = [Request(0), Request(1, 2), Request(2)]
    with engine(published) as llm:
        loaded = answers(llm, whole)
        (kind,) = llm.apply_model(type)
    assert "VLMPruneLlavaForConditionalGeneration" in ModelRegistry.get_supported_archs()
    assert kind.__module__.startswith("vllm.")
    assert loaded[0].prompt > 196
    assert apart(whole, None, published, NO_PLUGIN) == loaded


def test_without_the_plugin_its_architecture_is_unknown():
    """So the surroundings of the test above do keep the plugin out."""
    with pytest.raises(AssertionError, match=r"Model architectures \['VLMPruneLlava\w+'\] are not supported"):
        apart([Request(0)], DIVPRUNE, surroundings=NO_PLUGIN)


def test_lora_of_the_tower_is_refused():
    """vLLM assigns adapters to as many of the tower's tokens as stay."""
    with (
        pytest.raises(ValueError, match=r"enable_tower_connector_lora: expected False \(.*\), got True"),
        engine(CHECKPOINT, DIVPRUNE, enable_lora=True, enable_tower_connector_lora=True),
    ):
        pass
