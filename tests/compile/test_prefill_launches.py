"""What a pruned prefill launches, counted at a stand-in for the CUDA driver: a stage is its fused launches."""

from collections import Counter

import pytest
import torch
from transformers import StaticCache

import vlmprune
from helpers.recording_driver import recording_driver
from helpers.tiny import make_batch, make_model

LSE, SCORE, GATHER = "_row_lse_kernel", "_score_select_kernel", "_gather_tokens_kernel"
FIND, SELECT, COMPACT = "_select_topk_kernel", "_select_columns_kernel", "_compact_kv_kernel"
SCORED = [LSE, SCORE, GATHER]
BATCHES = {
    "one": [[4, "I", 7]],
    "padded-2-1-0-images": [[4, "I", 3, "I", 7], ["I", 5], [6]],
    "equal": [["I", 5], ["I", 5]],
}


@pytest.fixture(scope="module")
def recorder():
    with recording_driver(ops=True) as rec, torch.no_grad():
        yield rec


def launches(recorder, model, batch, policy, times=3, **call):
    """Of each of some prefills of the same shapes: first as ops, then by plans."""
    recorder.take()
    with vlmprune.prune(model, policy) as run:
        out = []
        for _ in range(times):
            model(**batch, **{name: make() for name, make in call.items()})
            out.append(recorder.take())
    assert all(path == "one pass (triton)" for path in run.report().paths)
    return out


@pytest.mark.parametrize(
    "policy, stages",
    [
        (vlmprune.FastV(layer=2, keep=0.5), SCORED),
        (vlmprune.FastV(layer=2, keep=3, spend="image"), SCORED),
        (vlmprune.Feather(layers=(2, 4), keep=0.5), SCORED + SCORED),
        (vlmprune.PyramidDrop(layers=(2, 4), positions="pack"), SCORED + SCORED),
        (vlmprune.Uniform(layer=2, keep=0.5), [SELECT, GATHER]),
        (vlmprune.Random(layer=2, keep=0.5), [SELECT, GATHER]),
        (vlmprune.FasterVLM(keep=8, positions="keep"), SCORED),
    ],
    ids=lambda x: repr(x) if isinstance(x, vlmprune.PruningPolicy) else "",
)
@pytest.mark.parametrize("specs", BATCHES)
def test_a_stage_is_its_launches(recorder, policy, stages, specs):
    """Whatever the batch: as many for a padded one, for several images with a quota each, for a sample without any."""
    batch = make_batch(BATCHES[specs])
    first, again, planned = launches(recorder, make_model(), batch, policy)
    packs = getattr(policy, "positions", "keep") == "pack" and specs == "padded-2-1-0-images"
    names = [launch.name for launch in planned]
    assert names[0] == FIND
    if isinstance(policy, vlmprune.FasterVLM) and specs == "padded-2-1-0-images":
        stages = [LSE, SCORE, SELECT, GATHER]  # scored by image, and no sample is one
    if not packs:  # rotary tables of padded samples that are packed are looked up
        assert names[1:] == stages
    told = [[x.without_pointers() for x in one] for one in (first, again, planned)]
    assert told[0] == told[1] == told[2]


@pytest.mark.parametrize("specs", BATCHES)
def test_weights_of_pairs_and_best_heads_take_no_launch(recorder, specs):
    """Before SparseVLM+ scores it finds text and images, and reads rotary tables; their embeddings once a prompt."""
    policy = vlmprune.SparseVLMPlus(layers=(2, 4), keep=(8, 4), heads=2)
    *_, planned = launches(recorder, make_model(), make_batch(BATCHES[specs]), policy)
    without_text = (
        specs == "padded-2-1-0-images"
    )  # a sample that keeps tokens spread evenly, whatever the scores
    scored = [LSE, SCORE, SELECT, GATHER] if without_text else SCORED
    first, second = ([FIND, *[GATHER] * reads, *scored] for reads in (4, 2))
    assert [launch.name for launch in planned] == [FIND, *first, *second]


def test_a_log_sum_exp_that_attention_left_saves_a_launch(recorder):
    model = make_model(attn="vlmprune")
    (one,) = launches(recorder, model, make_batch(BATCHES["one"]), vlmprune.FastV(layer=2, keep=0.5), 1)
    assert [launch.name for launch in one] == [FIND, SCORE, GATHER]


@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_the_cache_of_earlier_layers_is_compacted_in_one_launch(recorder, kind):
    model, batch = make_model(), make_batch(BATCHES["one"])
    call = {"past_key_values": lambda: StaticCache(model.config.text_config, max_cache_len=64)}
    policy = vlmprune.FastV(layer=4, keep=0.5, earlier_kv="compact")
    (one,) = launches(recorder, model, batch, policy, 1, **(call if kind == "static" else {}))
    names = [launch.name for launch in one]
    assert names[:-1] == [FIND, *SCORED] and names[-1] == (COMPACT if kind == "static" else GATHER)
    # keys and values of four layers are in it
    ours = Counter(name.split(".")[0] for name in one[-1].pointers)
    assert ours["caches" if kind == "static" else "sources"] == 8


def test_prompts_of_many_lengths_meet_few_kernels(recorder):
    """Lengths are no constants of a kernel: what is compiled depends on powers of two."""
    model, policy = make_model(), vlmprune.FastV(layer=2, keep=0.5)
    kernels = set()
    for text in range(3, 83):
        (one,) = launches(recorder, model, make_batch([[text, "I", 7]]), policy, 1)
        kernels |= {(launch.name, launch.function) for launch in one}
    assert len(kernels) <= 6, Counter(name for name, _ in kernels)
