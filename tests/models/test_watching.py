"""What a watched answer's visual tokens receive, against the attention matrices of the same model run eagerly."""

import pytest
import torch
from torch.testing import assert_close

import vlmprune
from helpers.families import CASES, build, prompts
from helpers.tiny import IMAGE, make_batch, make_model
from vlmprune.errors import InputError, ModelError
from vlmprune.models.watching import Watch

STEPS = 5
SPECS = {
    "one": [[4, "I", 7]],
    "padded-2-1-0-images": [["I", 9, "I", 4], [3, "I", 5], [12]],
    "ends-with-its-image": [[6, "I"], [2, "I", 3]],
}


def watched(model, batch, ends=(), steps=STEPS):
    with Watch(model, ends) as watch:
        out = model.generate(**batch, max_new_tokens=steps, do_sample=False, eos_token_id=[*ends] or None)
    return watch.received(), out[:, batch["input_ids"].shape[1] :]


def slow(model, batch, places, spoken, steps=STEPS):
    """Sums of attention matrices, sample by sample, as the released code sums them: layers, heads and rows."""
    kind = model.config._attn_implementation
    model.set_attn_implementation("eager")
    more = dict(output_attentions=True, return_dict_in_generate=True)
    out = model.generate(**batch, max_new_tokens=steps, do_sample=False, eos_token_id=None, **more)
    model.set_attn_implementation(kind)
    found = []
    for b, columns in enumerate(places):
        total = torch.zeros(len(columns), dtype=torch.float64, device=out.sequences.device)
        for step, layers in enumerate(out.attentions if columns else ()):
            if step < spoken[b]:
                for weights in layers:
                    real = batch["attention_mask"][b].nonzero()[:, 0]
                    rows = [i for i in real.tolist() if i >= columns[-1]] if step == 0 else [0]
                    total += weights[b, :, rows][..., columns].double().sum((0, 1))
        found.append(total.float())
    return found, out.sequences[:, batch["input_ids"].shape[1] :]


def visual(batch, *tokens):
    marked = torch.isin(batch["input_ids"], torch.tensor(tokens or [IMAGE], device=batch["input_ids"].device))
    return [row.nonzero()[:, 0].tolist() for row in marked]


def assert_sums(received, want):
    for got, own in zip(received.scores, want, strict=True):
        assert_close(got[: len(own)], own, rtol=1e-4, atol=1e-4)
        assert not got[len(own) :].any()


@pytest.mark.parametrize("specs", SPECS)
@pytest.mark.parametrize("attn", ["sdpa", "vlmprune"])
def test_equals_sums_of_attention_matrices(specs, attn):
    model, batch = make_model(attn=attn), make_batch(SPECS[specs])
    received, tokens = watched(model, batch)
    want, same = slow(model, batch, visual(batch), [STEPS] * len(tokens))
    assert torch.equal(tokens, same) and received.steps == STEPS - 1
    assert_sums(received, want)
    assert received.sizes == tuple((16,) * spec.count("I") for spec in SPECS[specs])


def test_what_a_batch_feeds_behind_an_answer_counts_for_nothing():
    model, batch = make_model(), make_batch(SPECS["padded-2-1-0-images"])
    _, tokens = watched(model, batch)
    ends = [int(tokens[0, 1])]  # the first answer ends with its second token
    received, cut = watched(model, batch, ends)
    spoken = [row.index(ends[0]) + 1 if ends[0] in row else STEPS for row in tokens.tolist()]
    assert spoken[0] == 2 < spoken[1] and cut.shape == tokens.shape
    want, _ = slow(model, batch, visual(batch), spoken)
    assert_sums(received, want)


@pytest.mark.parametrize("name", ["qwen2_5_vl", "qwen3vl", "llava_next", "internvl"])
def test_other_families(name):
    """Three axes of positions, normed projections, AnyRes grids with newline tokens."""
    model, (batch, _) = build(CASES[name]), prompts(CASES[name], CASES[name].padded)
    received, tokens = watched(model, batch, steps=3)
    want, same = slow(model, batch, visual(batch), [3] * len(tokens), steps=3)
    assert torch.equal(tokens, same)
    assert_sums(received, want)


def hooks(model):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def test_hooks_are_gone_afterwards_and_after_an_error():
    model, batch = make_model(), make_batch(SPECS["one"])
    model(**batch)  # transformers puts hooks of its own on
    before = hooks(model)
    watched(model, batch)
    assert hooks(model) == before
    with pytest.raises(RuntimeError, match="stop"), Watch(model):
        assert hooks(model) > before
        raise RuntimeError("stop")
    assert hooks(model) == before


def test_a_static_cache_and_no_cache():
    model, batch = make_model(), make_batch(SPECS["one"])
    want, _ = watched(model, batch)
    more = dict(max_new_tokens=STEPS, do_sample=False, disable_compile=True)
    with Watch(model) as watch:
        model.generate(**batch, cache_implementation="static", **more)
    assert_close(watch.received().scores, want.scores)
    with (
        Watch(model),
        pytest.raises(ModelError, match=r"^prompt: expected one in a block, in one call, to fill a cache"),
    ):
        model.generate(**batch, use_cache=False, **more)


def test_refusals():
    model, batch = make_model(), make_batch(SPECS["one"])
    with Watch(model):
        model(**batch)
        with pytest.raises(
            ModelError, match=r"^prompt: expected one in a block, in one call, .* got another"
        ):
            model(**batch)
    with (
        Watch(model) as watch,
        pytest.raises(ModelError, match=r"^model: expected a prompt answered .*, got none$"),
    ):
        watch.received()
    with (
        vlmprune.prune(model, vlmprune.FastV()),
        pytest.raises(InputError, match=r"^model: expected no policy"),
    ):
        Watch(model).__enter__()
    with (
        Watch(model),
        pytest.raises(InputError, match=r"^model: .*, got one that is measured in another block$"),
    ):
        vlmprune.prune(model, vlmprune.FastV()).__enter__()
    right = make_batch(SPECS["padded-2-1-0-images"], pad="right")
    with (
        Watch(model),
        pytest.raises(ModelError, match=r"^prompt: expected padding on the left, to answer from"),
    ):
        model.generate(**right, max_new_tokens=2)
    embeds = model.get_input_embeddings()(batch["input_ids"]).detach()
    with (
        Watch(model),
        pytest.raises(ModelError, match=r"^model: .*, got a call of its text model$"),
    ):
        model.model.language_model(inputs_embeds=embeds)
    with (
        Watch(model),
        pytest.raises(InputError, match=r"^inputs_embeds: expected input_ids or images with it"),
    ):
        model.generate(inputs_embeds=embeds, max_new_tokens=2)
