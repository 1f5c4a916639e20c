"""A small model's guidance: its scores in other grids, how sure it is, and what two models answer together."""

from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from torch.testing import assert_close

import vlmprune
from helpers.tiny import IMAGE, PAD, dropped_from, generate, make_batch, make_model, masked, oracle
from vlmprune.checkpoints import Checkpoint
from vlmprune.errors import InputError, ModelError
from vlmprune.guidance import Guidance, Stitch, answer_first, consistency
from vlmprune.models.watching import Watch
from vlmprune.policies import SGL

GLYPHWORLD = "examples/glyphworld"
SPECS = [["I", 9, "I", 4], [3, "I", 5], [12]]
STEPS = 4


def probabilities(model, batch, tokens, dropped=None):
    """``[B, T]`` of each token behind the prompt and those before it, in one run without a cache."""
    ids, real = batch["input_ids"], batch["attention_mask"]
    n, steps = ids.shape[1], tokens.shape[1]
    ids, real = torch.cat([ids, tokens], 1), torch.cat([real, torch.ones_like(tokens)], 1)
    positions = (real.long().cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad(), masked(model, dropped or {}):
        out = model(
            input_ids=ids,
            attention_mask=real,
            position_ids=positions,
            pixel_values=batch["pixel_values"],
            use_cache=False,
        )
    shares = out.logits[:, n - 1 : n + steps - 1].softmax(-1)
    return shares.gather(-1, tokens[..., None])[..., 0]


@pytest.fixture(scope="module")
def small():
    """Other weights and fewer layers than the large one; one kind of tower, so the same grids."""
    return make_model(
        seed=3, num_hidden_layers=3, hidden_size=32, num_attention_heads=4, num_key_value_heads=2
    )


@pytest.fixture(scope="module")
def large():
    return make_model()


def test_the_large_run_equals_the_masked_run_with_the_best_tokens(small, large):
    batch = make_batch(SPECS)
    guide = answer_first(small, batch, STEPS).guidance
    with vlmprune.prune(large, SGL(guide, layer=2, keep=0.4)) as run:
        tokens, logits, _ = generate(large, batch, STEPS)
    for b, n in enumerate((32, 16, 0)):
        best = guide.scores[b, :n].sort(descending=True).indices[: int(0.4 * n)]
        assert run.kept(b).tolist() == sorted(best.tolist())
    want_tokens, want_logits, _ = oracle(large, batch, dropped_from(run, batch), STEPS)
    assert_close(logits, want_logits, atol=1e-4, rtol=0)
    assert torch.equal(tokens, want_tokens)


def test_a_later_stage_goes_by_ordinals(small, large):
    batch = make_batch(SPECS)
    guide = answer_first(small, batch, STEPS).guidance
    policy = vlmprune.Stages([SGL(guide, layer=1, keep=0.5), SGL(guide, layer=3, keep=0.5)])
    with torch.no_grad(), vlmprune.prune(large, policy) as run:
        large(**batch)
        two = run.kept().tolist()
    assert two == guide.scores[0].topk(8).indices.sort().values.tolist()


def test_confidence_and_consistency(small):
    """By the formulas, from plain runs: the geometric mean, and the product with 2 of 16 tokens left from layer 0 on."""
    batch = make_batch(SPECS)
    first = answer_first(small, batch, STEPS)
    assert_close(first.confidence, probabilities(small, batch, first.tokens).prod(1) ** (1 / STEPS))
    best = first.guidance.scores.topk(4).indices
    hidden = torch.zeros_like(batch["input_ids"], dtype=torch.bool)
    for b, count in enumerate((4, 2, 0)):
        at = (batch["input_ids"][b] == IMAGE).nonzero()[:, 0]
        hidden[b, at] = True
        hidden[b, at[best[b, :count]]] = False
    want = probabilities(small, batch, first.tokens, {0: hidden}).prod(1)
    assert_close(consistency(small, batch, first, keep=0.125), want, rtol=1e-4, atol=0)


def test_what_follows_the_end_of_an_answer_counts_for_nothing(small):
    batch = make_batch(SPECS)
    whole = answer_first(small, batch, STEPS)
    end = int(whole.tokens[1, 1])
    lengths = [row.index(end) + 1 if end in row else STEPS for row in whole.tokens.tolist()]
    small.generation_config.eos_token_id = end
    try:
        first = answer_first(small, batch, STEPS)
    finally:
        small.generation_config.eos_token_id = None
    assert first.spoken.sum(1).tolist() == lengths and lengths[1] == 2 and STEPS in lengths
    assert first.tokens[1, 2:].tolist() == [PAD] * (STEPS - 2)
    plain = probabilities(small, batch, whole.tokens)
    for b, n in enumerate(lengths):
        assert_close(first.confidence[b], plain[b, :n].prod() ** (1 / n))
    everything = consistency(small, batch, first, keep=1.0)
    assert_close(everything, torch.stack([p[:n].prod() for p, n in zip(plain, lengths, strict=True)]))


def test_an_answer_of_one_token_and_a_prompt_without_images(small, large):
    first = answer_first(small, make_batch([[5], [9]]), 1)
    assert first.guidance.scores.shape == (2, 0) and first.tokens.shape == (2, 1)
    with vlmprune.prune(large, SGL(first.guidance, layer=2)):
        generate(large, make_batch([[5], [9]]), 1)


def context(*samples, ordinals=None, shares=None):
    """As much of a context as a guide looks at; a sample is a list of images, an image a list of grids."""
    grids = tuple(tuple(grid for image in sample for grid in image) for sample in samples)
    sizes = tuple(tuple(sum(a * b for a, b in image) for image in sample) for sample in samples)
    counts = tuple(map(sum, sizes))
    if ordinals is None:
        order = torch.arange(max(counts))
        ordinals = torch.stack([torch.where(order < n, order, -1) for n in counts])
    return SimpleNamespace(
        grids=grids,
        images=lambda: sizes,
        counts=counts,
        shares=shares,
        ordinals=ordinals,
        mask=ordinals >= 0,
        device=ordinals.device,
    )


def guidance(scores, *samples):
    ctx = context(*samples)
    return Guidance(scores, ctx.grids, ctx.images())


def test_other_grids_are_resampled_image_by_image():
    """A spot stays where it was, an even image stays even, and what an image receives in all is kept."""
    scores = torch.zeros(2, 32)
    scores[0, :16] = 1.0
    scores[0, 16 + 5] = 16.0  # row 1, column 1 of 4 x 4
    scores[1, :16] = 2.0
    guide = guidance(scores, [[(4, 4)], [(4, 4)]], [[(4, 4)]])
    got = guide(context([[(8, 8)], [(8, 8)]], [[(2, 3)]]))
    assert_close(got[0, :64], torch.full((64,), 0.25))
    spot = got[0, 64:].view(8, 8)
    assert set(spot.flatten().topk(4).indices.tolist()) == {18, 19, 26, 27} and spot[6, 6] == 0
    assert_close(spot.sum(), torch.tensor(16.0))
    assert_close(got[1, :6], torch.full((6,), 2.0 * 16 / 6))


def test_nan_in_one_sample_stays_there():
    scores = torch.rand(2, 16)
    scores[0] = float("nan")
    for grid in ((4, 4), (3, 3)):
        got = guidance(scores, [[(4, 4)]], [[(4, 4)]])(context([[grid]], [[grid]]))
        assert got[0].isnan().all() and got[1].isfinite().all()


@pytest.mark.parametrize(
    "ctx, message",
    [
        (context([[(4, 4)]]), "guide: expected the 2 samples that the guide was made of, got 1"),
        (
            context([[(4, 4)], [(4, 4)]], [[(4, 4)]]),
            r"guide, sample 0: expected images of \[1\] grids, as the guide has seen them, got of \[1, 1\]",
        ),
        (
            context([[(2, 2), (4, 4)]], [[(4, 4)]]),
            r"guide, sample 0: expected images of \[1\] grids, as the guide has seen them, got of \[2\]",
        ),
        (
            context([[(4, 4)]], [[(4, 4)]], shares=(0.5, 0.5)),
            "prefill_chunk_size: expected None with a guide of whole prompts, got a prompt in chunks",
        ),
    ],
)
def test_what_a_guide_refuses(ctx, message):
    with pytest.raises(InputError, match=f"^{message}$"):
        guidance(torch.rand(2, 16), [[(4, 4)]], [[(4, 4)]])(ctx)


@pytest.fixture(scope="module")
def world():
    return Checkpoint(f"{GLYPHWORLD}/checkpoint", device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def image():
    return Image.open(f"{GLYPHWORLD}/images/scene_70001.png")


QUESTION = "how many phones are there ?"


def test_a_sure_answer_leaves_the_large_model_out(world, image):
    """Just above and just below its score; the small model guides itself."""
    asked = Stitch(world, world, threshold=1.0, keep=0.2).ask([image], QUESTION, 8)
    assert asked.score == (asked.confidence + asked.consistency) / 2 and 0 < asked.score < 1
    taken = Stitch(world, world, threshold=asked.score - 1e-4).ask([image], QUESTION, 8)
    assert (taken.by, taken.run, taken.text) == ("small", None, taken.first)
    refused = Stitch(world, world, threshold=asked.score + 1e-4, keep=0.2).ask([image], QUESTION, 8)
    assert refused.by == "large" and refused.score == asked.score
    stage = refused.run.stages[0]
    layers = world.config.text_config.num_hidden_layers
    assert (stage.layer, stage.tokens_in, stage.tokens_kept) == (int(layers * 0.4), 196, 39)


def test_without_a_threshold_the_large_model_is_asked_and_nothing_is_tried_again(world, image):
    answer = Stitch(world, world, keep=1.0).ask([image], QUESTION, 8)
    assert answer.by == "large" and answer.consistency is answer.score is None
    assert answer.text == answer.first  # nothing was pruned, and it is the same model


@pytest.mark.parametrize(
    "settings, message",
    [
        (dict(small="x"), "small: expected a Checkpoint, got 'x'"),
        (dict(depth=1.0), r"depth: expected a share in \[0, 1\), got 1\.0"),
        (dict(depth=False), r"depth: expected a share in \[0, 1\), got False"),
        (dict(threshold=2), r"threshold: expected a share in \[0, 1\], got 2"),
        (dict(left=0), "left: expected a share .*, got 0"),
    ],
)
def test_settings(world, settings, message):
    with pytest.raises(InputError, match=f"^{message}$"):
        Stitch(**({"small": world, "large": world} | settings))


def test_a_model_with_a_policy_is_no_guide(large):
    batch = make_batch([[3, "I", 4]])
    with (
        vlmprune.prune(large, vlmprune.FastV()),
        pytest.raises(InputError, match=r"^model: expected no policy"),
    ):
        answer_first(large, batch, 2)


def test_answers_that_are_asked_for_wrongly(small):
    batch = make_batch([[3, "I", 4]])
    for count in (0, None, 2.5):
        with pytest.raises(InputError, match=r"^max_new_tokens: expected a whole number >= 1, got"):
            answer_first(small, batch, count)
    with pytest.raises(InputError, match=r"^first: expected an answer to each of 3 prompts, got 1 answers$"):
        consistency(small, make_batch(SPECS), answer_first(small, batch, 1))


def test_steps_that_no_hook_sees_are_an_error(small, monkeypatch):
    """As where transformers compiles the whole step of a static cache."""
    received = Watch.received
    monkeypatch.setattr(Watch, "received", lambda self: received(self)._replace(steps=0))
    with pytest.raises(ModelError, match=r"^generate: expected 2 steps that hooks see, got 0$"):
        answer_first(small, make_batch([[3, "I", 4]]), 3)
