"""Two waves equal one masked run beyond a prompt's last row: every row, beams, candidates, and turns behind others."""

from __future__ import annotations

import pytest
import torch
from transformers import StaticCache

import vlmprune
from helpers.caches import rounded_cache
from helpers.tiny import (
    IMAGE,
    LAYERS,
    STEPS,
    TOLERANCE,
    dropped_from,
    generate,
    make_batch,
    make_model,
)
from helpers.waves import (
    BOTH,
    SCOUT,
    sets_of,
    teacher_forced,
    waves_masked,
)


@pytest.fixture(scope="module")
def plain():
    return make_model()


@pytest.mark.parametrize("scout", BOTH.values(), ids=BOTH)
def test_beams(plain, scout):
    """The score of every sequence is the masked run's mean log-likelihood of it."""
    batch = make_batch([[4, "I", 7], [2, "I", 3]])
    with vlmprune.prune(plain, scout) as run:
        _, _, out = generate(plain, batch, STEPS, num_beams=2, num_return_sequences=2, output_scores=True)
    sets = sets_of(run)[::2]  # a beam has what its sample has
    for rank in range(2):
        said = out.sequences[rank::2, -STEPS:]
        likely = teacher_forced(plain, batch, sets, said).log_softmax(-1)
        scores = likely.gather(2, said[..., None])[..., 0].mean(1)
        torch.testing.assert_close(out.sequences_scores[rank::2], scores, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize(
    "cache, by", [("dynamic", "default"), ("static", "default"), ("quantized", "attention")]
)
@pytest.mark.parametrize("more", [["I", 3], [3, "I", 2], [4]], ids=str)
def test_second_turns(plain, more, cache, by, monkeypatch):
    """A turn sees all that the turns before it left; its own tokens come in two waves."""
    first = make_batch([[4, "I", 7], [2, "I", 3]])
    settings = {}
    if cache == "static":
        settings = {"past_key_values": StaticCache(config=plain.config, max_cache_len=96)}
    if cache == "quantized":
        settings = {"past_key_values": rounded_cache(monkeypatch, plain.config, LAYERS)}
    with vlmprune.prune(plain, BOTH[by]) as run:
        _, _, out = generate(plain, first, 3, **settings)
        sets = sets_of(run)
        then = make_batch([more, more], seed=3)
        ids = torch.cat([out.sequences, then["input_ids"]], 1)
        real = torch.ones_like(ids)
        real[:, : first["attention_mask"].shape[1]] = first["attention_mask"]
        turn = {**then, "input_ids": ids, "attention_mask": real}
        tokens, logits, _ = generate(plain, turn, STEPS, past_key_values=out.past_key_values)
        past = out.sequences.shape[1] - 1
        if "I" in more:
            later = [({p + past for p in c}, {p + past for p in f}) for c, f in sets_of(run)]
            sets = [(a | c, b | d) for (a, b), (c, d) in zip(sets, later, strict=True)]
    pixels = [x["pixel_values"] for x in (first, then) if "pixel_values" in x]
    whole = torch.cat(pixels)[[0, 2, 1, 3]] if len(pixels) > 1 else pixels[0]  # each sample's together
    turn["pixel_values"] = whole
    want = teacher_forced(plain, turn, sets, tokens, (past,))
    torch.testing.assert_close(logits, want, rtol=0, atol=0.02 if cache == "quantized" else 2e-4)


def test_behind_a_turn_with_other_stages(plain):
    """The layers that both waves run hold unequal numbers of entries then."""
    first, then = make_batch([[4, "I", 7], [2, "I", 3]]), make_batch([["I", 3], ["I", 3]], seed=3)
    with vlmprune.prune(plain, vlmprune.FastV(layer=2, keep=0.4)) as run:
        out = generate(plain, first, 3)[2]
    gone = dropped_from(run, first)[2]
    ids = torch.cat([out.sequences, then["input_ids"]], 1)
    real = torch.ones_like(ids)
    real[:, : first["attention_mask"].shape[1]] = first["attention_mask"]
    turn, past = {**then, "input_ids": ids, "attention_mask": real}, out.sequences.shape[1] - 1
    with vlmprune.prune(plain, SCOUT) as run:
        tokens, logits, _ = generate(plain, turn, STEPS, past_key_values=out.past_key_values)
    every = [{*torch.nonzero(row == IMAGE)[:, 0].tolist()} for row in first["input_ids"]]
    later = [({p + past for p in c}, {p + past for p in f}) for c, f in sets_of(run)]
    sets = [(a | c, f) for a, (c, f) in zip(every, later, strict=True)]
    turn["pixel_values"] = torch.cat([first["pixel_values"], then["pixel_values"]])[[0, 2, 1, 3]]
    width = ids.shape[1] + STEPS - 1
    dropped = 2, torch.nn.functional.pad(gone, (0, width - gone.shape[1]))
    want = teacher_forced(plain, turn, sets, tokens, (past,), dropped)
    torch.testing.assert_close(logits, want, rtol=0, atol=2e-4)


@pytest.mark.parametrize("pad", ["left", "right"])
def test_every_row_and_the_loss(plain, pad):
    """Not only the last one: coarse, fine and text rows, in front of images, between them and behind."""
    batch = make_batch([["I", 9, "I", 4], [3, "I", 5], [12]], pad=pad)
    ids, real = batch["input_ids"], batch["attention_mask"]
    labels = torch.where((real > 0) & (ids != IMAGE), ids, -100)
    places = (real.cumsum(-1) - 1).clamp(min=0)
    for given in ({}, {"labels": labels}):
        with torch.no_grad(), vlmprune.prune(plain, SCOUT) as run:
            got = plain(**batch, **given, position_ids=places, use_cache=False)
        sets = sets_of(run)
        with torch.no_grad(), waves_masked(plain, SCOUT.look, sets, ids == IMAGE, real.bool()):
            want = plain(**batch, **given, position_ids=places, use_cache=False)
        for b in range(3):
            kept = sets[b][0] | sets[b][1]
            rows = [p for p in range(ids.shape[1]) if real[b, p] and (ids[b, p] != IMAGE or p in kept)]
            torch.testing.assert_close(got.logits[b, rows], want.logits[b, rows], atol=TOLERANCE, rtol=0)
    assert float(got.loss) == pytest.approx(float(want.loss), abs=1e-4)


def test_candidates_behind_the_prompt(plain):
    """Assisted decoding rates candidates with the prompt: they run again, and name nothing."""
    batch = make_batch([[4, "I", 7]])
    with vlmprune.prune(plain, SCOUT) as run:
        want = generate(plain, batch, 6)[0]
        sets = sets_of(run)
        got = generate(plain, batch, 6, prompt_lookup_num_tokens=2)[2].sequences[:, -6:]
    assert torch.equal(got, want)
    ids = torch.cat([batch["input_ids"], want[:, :3]], 1)
    given = {**batch, "input_ids": ids, "attention_mask": torch.ones_like(ids)}
    with torch.no_grad(), vlmprune.prune(plain, SCOUT) as run:
        logits = plain(**given, logits_to_keep=4).logits
    assert sets_of(run) == sets and run.report().second_wave.rows == (13,)
    torch.testing.assert_close(
        logits, teacher_forced(plain, batch, sets, want[:, :4]), atol=TOLERANCE, rtol=0
    )
