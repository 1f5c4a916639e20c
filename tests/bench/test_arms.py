"""The baselines do what they say: the published style keeps what FastV keeps, a smaller image is one, graphs say why not."""

import pytest
import torch

from helpers.families import CASES, build
from helpers.recorder import Recorder
from helpers.tiny import GRID, TOLERANCE, generate, make_batch, make_model
from vlmprune import LVLMCSP, VTW, DivPrune, FastV, Graphs, Stages, meter, ops, prune
from vlmprune.bench import Checkpoint, FullSize, arms, run
from vlmprune.bench.measure import answer
from vlmprune.bench.prompts import Prompt, smaller, why_not_smaller
from vlmprune.bench.published import published_style
from vlmprune.errors import InputError


@pytest.fixture(autouse=True)
def reference():
    with ops.use_backend("reference"):
        yield


@pytest.mark.parametrize("stages", [((2, 5),), ((1, 9), (3, 4))])
def test_the_published_style_gives_what_fastv_gives(stages):
    model, batch = make_model(), make_batch([[3, "I", 5], [4, "I", 4]])
    policy = Stages([FastV(layer=layer, keep=keep) for layer, keep in stages])
    with prune(model, policy):
        tokens, logits, _ = generate(model, batch, 3)
    with published_style(model, stages):
        same, close, out = generate(model, batch, 3)
    assert same.equal(tokens)
    torch.testing.assert_close(close, logits, atol=TOLERANCE, rtol=0)
    lengths = [layer.keys.shape[2] for layer in out.past_key_values.layers]
    for layer, keep in stages:
        assert lengths[layer] == lengths[0] - GRID**2 + keep
    assert model.config.text_config._attn_implementation == "sdpa"
    hooks = [
        h
        for module in model.modules()
        for h in (*module._forward_pre_hooks.values(), *module._forward_hooks.values())
    ]
    assert not [hook for hook in hooks if "published" in hook.__module__]


def test_the_published_style_on_qwen():
    model = build(CASES["qwen2_5_vl"])
    inputs = Prompt(grid=(4, 4)).inputs(model.config, 2, model.device, torch.float32)
    with published_style(model, [(2, 5)]), meter(model) as run:
        answer(model, inputs, 3)
    length = inputs["input_ids"].shape[1]
    assert run.report().kv_bytes == 4 * 2 * 2 * 4 * 8 * (2 * length + 4 * (length - 11))


@pytest.mark.parametrize("tokens, kept", [(4, 4), (5, 4), (12, 9)])
def test_a_smaller_image_of_a_fixed_tower(tokens, kept):
    subject = FullSize("tiny", device="cpu")
    model, asked = subject.model, smaller(subject.config, Prompt(), tokens)
    before = Prompt().inputs(model.config, 1, model.device, torch.float32)
    with torch.no_grad():
        logits = model(**before).logits
    with asked.tower(model), meter(model) as run:
        inputs = asked.prompt.inputs(model.config, 1, model.device, torch.float32)
        answer(model, inputs, 1)
    assert run.report().visual_tokens == kept
    assert inputs["pixel_values"].shape[-1] == 14 * kept**0.5
    with torch.no_grad():
        assert model(**before).logits.equal(logits)  # all is as it was


def test_a_smaller_image_where_pictures_keep_their_shape():
    config = CASES["qwen3vl"].config()
    for tokens, grid in ((16, (4, 4)), (20, (4, 5)), (7, (3, 2))):
        assert smaller(config, Prompt(), tokens).prompt.grid == grid
    assert smaller(config, Prompt(images=2), 20).prompt == Prompt(2, (3, 3))
    with pytest.raises(InputError, match="tokens: expected at least 2, one per image, got 1"):
        smaller(config, Prompt(images=2), 1)
    subject = Checkpoint.of(build(CASES["qwen3vl"]), None)
    *_, left, _ = arms.make_arms(subject, Prompt(), {"vtw": VTW(layer=2)}, {"vtw": [(2, 0)]}, baselines=True)
    assert (
        left.way == "smaller image" and left.reason == "the policy keeps 0 visual tokens, fewer than images"
    )


def test_a_trained_tower_has_one_size():
    config = CASES["llava-llama"].config()
    assert why_not_smaller(config, random=True) is None
    assert why_not_smaller(config, random=False).startswith("the image size of a llava checkpoint is fixed")
    assert why_not_smaller(CASES["qwen2vl"].config(), random=False) is None


POLICIES = {"early": FastV(layer=2, keep=4), "first": DivPrune(keep=3), "idle": FastV(layer=1, keep=1.0)}
POLICIES["back"] = LVLMCSP(scatter=1, prune=2)
KEPT = {"early": [(2, 4)], "first": [(0, 3)], "idle": [], "back": [(0, 4), (2, 4)]}


def test_all_arms_and_why_some_cannot_run():
    subject = Checkpoint.of(make_model(), None)
    made = arms.make_arms(subject, Prompt(), POLICIES, KEPT, baselines=True)
    assert [(arm.method, arm.way) for arm in made] == [
        *[("unpruned", way) for way in ("plain", "graphs")],
        *[(n, w) for n in POLICIES for w in ("plain", "graphs", "smaller image", "published style")],
    ]
    reasons = {arm.name: arm.reason for arm in made}
    assert reasons["early"] is None and reasons["early [published style]"] is None
    assert "layer 0 has none" in reasons["first [published style]"]
    assert reasons["back [published style]"] == "the published style brings no tokens back"
    assert reasons["idle [published style]"] == "the policy did not prune this prompt"
    assert "is fixed" in reasons["early [smaller image]"]
    assert reasons["early + graphs"] == reasons["unpruned + graphs"] == Graphs.refusal(torch.device("cpu"))
    few = arms.make_arms(subject, Prompt(), POLICIES, KEPT, baselines=False)
    assert {arm.way for arm in few} == {"plain", "graphs"}


class Recorded(Graphs):
    """Records operations in place of capturing graphs."""

    def __init__(self):
        super().__init__(recorder=Recorder())

    @classmethod
    def refusal(cls, device):
        return None


def test_graphs_are_kept_over_rounds(monkeypatch):
    """The first prompt of a shape runs plain; the second, in another round's scope, is captured and replayed."""
    monkeypatch.setattr(arms, "Graphs", Recorded)
    subject, policies = (
        FullSize("tiny", device="cpu"),
        ["fastv:layer=2,keep=4", "feather:layers=2/4,keep=0.3"],
    )
    asked = {"baselines": False, "new_tokens": 2, "warm_up": 0}
    for rounds, said in ((1, "plain: the first prompt of its shape"), (2, "replayed: 1 x ")):
        rows = {row.arm: row for row in run(subject, policies, rounds=rounds, **asked).rows}
        for name in ("unpruned + graphs", "fastv:layer=2,keep=4 + graphs"):
            assert rows[name].graph.startswith(said) and rows[name].seconds["prefill"].median > 0
        assert rows["fastv:layer=2,keep=4"].graph is None
        assert rows["fastv:layer=2,keep=4 + graphs"].stages == ((2, 16, 4),)
    assert rows[f"{policies[1]} + graphs"].graph.startswith("plain: adaptive")
