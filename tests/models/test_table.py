"""One table: every family, methods before the decoder and inside it, with the vision tower's attention and without.

Each situation gives what the masked run of the same choices gives, or what the same call alone and plain gives. Batches are
padded, with several images, images of unequal shape or a video, and a sample without any. Elsewhere, on the same cells:
accelerate in test_deploy.py, threads in test_threads.py, captured prefills in test_graphs.py, keep-all and packed positions in test_towers.py.
"""

from __future__ import annotations

import pytest
import torch
from transformers import StaticCache

from helpers.caches import rounded_cache, without_streams
from helpers.families import CASES, LAYERS, STEPS, build, prompts
from helpers.table import CELLS, KINDS, SCATTERED, TOLERANCE, answer, joined, logits_of, rows_of
from helpers.tiny import upstream
from vlmprune.testing.masked import masked_logits
from vlmprune.testing.pictures import ALBUMS

MODELS: dict[str, torch.nn.Module] = {}


@pytest.fixture(
    scope="module",
    params=[
        *CELLS,
        *((family, "scattered") for family in ("llava-llama", "llava_onevision", "qwen3vl-video")),
    ],
    ids="-".join,
)
def cell(request):
    """A family's case, model and padded batch, and a method."""
    family, kind = request.param
    return CASES[family], model_of(family), (KINDS | {"scattered": SCATTERED})[kind]


def model_of(family):
    if family not in MODELS:
        MODELS.clear()  # cells come in the order of families
        MODELS[family] = build(CASES[family])
    return MODELS[family]


def assert_masked(model, inputs, out, said, atol=TOLERANCE):
    tokens = out.sequences[:, -STEPS:]
    want = masked_logits(model, inputs, tokens, said)
    torch.testing.assert_close(logits_of(out), want, atol=atol, rtol=0)


@pytest.mark.parametrize("cache", ["dynamic", "static", "offloaded", "quantized"])
def test_caches(cell, cache, monkeypatch):
    case, model, policy = cell
    inputs, _ = prompts(case, case.padded)
    settings = {} if cache == "dynamic" else {"cache_implementation": cache}
    if cache == "offloaded":
        without_streams(monkeypatch)
    if cache == "quantized":
        settings = {"past_key_values": rounded_cache(monkeypatch, model.config, LAYERS)}
    out, said = answer(model, inputs, policy, **settings)
    assert [*said] == [*policy.layers]
    assert_masked(model, inputs, out, said, 0.02 if cache == "quantized" else TOLERANCE)


@upstream("mixes up the images of beams with unequal image counts")
def test_beams(cell):
    """The score of every sequence is the masked run's mean log-likelihood of it."""
    case, model, policy = cell
    inputs, _ = prompts(case, case.padded)
    out, said = answer(model, inputs, policy, num_beams=2, num_return_sequences=2, output_scores=True)
    tokens = out.sequences[:, -STEPS:]
    for rank in range(2):
        rows = slice(rank, None, 2)
        likely = masked_logits(model, inputs, tokens[rows], rows_of(said, rows)).log_softmax(-1)
        scores = likely.gather(2, tokens[rows, :, None])[..., 0].mean(1)
        torch.testing.assert_close(out.sequences_scores[rows], scores, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("what", ["text", "image"])
@pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
def test_a_second_turn(cell, what, static):
    """What was said and shown before stays as pruned as it was; padding then stands in the midst of the rows."""
    case, model, policy = cell
    if what == "image" and "qwen" in model.config.model_type:
        pytest.skip("transformers itself has no positions for it")
    inputs, seen = prompts(case, case.padded)
    other = [(2 + b, *(["wide"] if what == "image" and b < 2 else []), 3) for b in range(len(seen))]
    more, shown = prompts(case, other, seed=1)
    cache = {"past_key_values": StaticCache(config=model.config, max_cache_len=240)} if static else {}
    first, said = answer(model, inputs, policy, **cache)
    ids = torch.cat([first.sequences, more["input_ids"]], 1)
    ones = torch.ones_like(first.sequences[:, -STEPS:])
    mask = torch.cat([inputs["attention_mask"], ones, more["attention_mask"]], 1)
    call = {**more, "input_ids": ids, "attention_mask": mask}
    out, then = answer(model, call, policy, past_key_values=first.past_key_values)
    past = ids.shape[1] - more["input_ids"].shape[1] - 1  # the first answer's last token is not cached yet
    said = joined(said, then, past) if what == "image" else said
    pictures = [one + two for one, two in zip(seen, shown, strict=True)]
    whole = {"input_ids": ids, "attention_mask": mask}
    whole |= ALBUMS[model.config.model_type].join(model.config, ids, pictures)
    if "batch_num_images" in whole:  # images that were alone in their turn keep their tiles
        turns = zip(inputs["batch_num_images"], more.get("batch_num_images", [0] * len(seen)), strict=True)
        whole["batch_num_images"] = torch.tensor([n for counts in turns for n in counts if n])
    assert_masked(model, whole, out, said)
