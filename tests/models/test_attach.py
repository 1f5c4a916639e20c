"""Attaching changes one instance and leaves nothing behind; misuse is one clear error."""

from __future__ import annotations

import copy
import pickle
import re
import threading
from dataclasses import dataclass

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import vlmprune
from helpers.tiny import generate, make_batch, make_model
from vlmprune.errors import ModelError, NotPrunedError
from vlmprune.models import find_parts, meter
from vlmprune.models.scope import find_engine

FASTV = vlmprune.FastV(layer=2, keep=0.4)
BATCH = [[4, "I", 7]]


@pytest.fixture
def model():
    model = make_model()
    generate(
        model, make_batch(BATCH), 1
    )  # transformers adds output-capturing hooks of its own at the first call
    return model


def hooks(model) -> dict[str, int]:
    """How many hooks of every kind each module has."""
    kinds = (
        "_forward_hooks",
        "_forward_pre_hooks",
        "_forward_hooks_with_kwargs",
        "_forward_pre_hooks_with_kwargs",
    )
    return {f"{n}.{k}": len(getattr(m, k)) for n, m in model.named_modules() for k in kinds if getattr(m, k)}


def attributes(model) -> dict[str, list[str]]:
    return {name: sorted(vars(module)) for name, module in model.named_modules()}


def test_after_the_block_the_model_is_as_before(model):
    batch = make_batch(BATCH)
    before, names, config = hooks(model), attributes(model), model.config.to_dict()
    _, logits, _ = generate(model, batch, 3)
    with vlmprune.prune(model, FASTV):
        assert hooks(model) != before
        generate(model, batch, 3)
    assert hooks(model) == before
    assert attributes(model) == names
    assert model.config.to_dict() == config
    assert torch.equal(generate(model, batch, 3)[1], logits)


def test_the_model_still_pickles():
    """Checked before its first call: the capturing hooks transformers adds then do not pickle themselves."""
    model, batch = make_model(), make_batch(BATCH)
    with vlmprune.prune(model, FASTV):
        pass
    again = pickle.loads(pickle.dumps(model))
    assert torch.equal(generate(again, batch, 3)[1], generate(model, batch, 3)[1])


def test_an_error_inside_the_block_detaches_too(model):
    before = hooks(model)

    def explode(ctx):
        raise KeyError("selection failed")

    with (
        pytest.raises(KeyError, match="selection failed"),
        vlmprune.prune(model, vlmprune.Custom(2, explode)),
    ):
        generate(model, make_batch(BATCH), 1)
    assert hooks(model) == before


def test_attach_and_detach(model):
    batch, before = make_batch(BATCH), hooks(model)
    with vlmprune.prune(model, FASTV):
        _, want, _ = generate(model, batch, 3)
    run = vlmprune.attach(model, FASTV)
    assert torch.equal(generate(model, batch, 3)[1], want)
    assert run.stages[0].tokens_kept == 6
    vlmprune.detach(model)
    assert hooks(model) == before
    with pytest.raises(
        ValueError, match=r"^model: expected a model with a policy attached, got none attached$"
    ):
        vlmprune.detach(model)


def test_a_second_policy_is_refused_and_the_first_stays(model):
    with vlmprune.prune(model, FASTV) as run:
        with pytest.raises(
            ValueError, match=r"^model: expected no policy attached yet .*, got FastV\(.*layer=2"
        ):
            vlmprune.attach(model, vlmprune.Random(layer=1))
        generate(model, make_batch(BATCH), 1)
        assert run.stages[0].tokens_kept == 6


def test_meter_measures_without_pruning(model):
    batch = make_batch(BATCH)
    _, logits, _ = generate(model, batch, 3)
    with meter(model) as run:
        assert torch.equal(generate(model, batch, 3)[1], logits)
    report = run.report()
    assert run.stages == []
    assert report.flops.pruned == report.flops.full > 0
    assert report.tokens.mean_per_layer == report.visual_tokens == 16


REFUSED = {
    "no-vlm": (
        lambda: LlamaForCausalLM(
            LlamaConfig(
                vocab_size=32,
                hidden_size=16,
                intermediate_size=16,
                num_hidden_layers=1,
                num_attention_heads=2,
            )
        ),
        r"^model: expected a vision-language model of type .*, got 'llama'$",
    ),
    "plain-module": (
        lambda: torch.nn.Linear(2, 2),
        r"^model: expected a vision-language model .* got 'Linear'$",
    ),
    "sliding-window": (
        lambda: make_model("mistral", sliding_window=8),
        r"^decoder: expected full attention in every layer, got a sliding window of 8",
    ),
    "sliding-layers": (
        lambda: make_model("qwen2", use_sliding_window=True, sliding_window=8, max_window_layers=2),
        r"^decoder: expected full attention in every layer, got layers of sliding_attention",
    ),
    "headless": (
        lambda: make_model().model,
        r"^model: expected the class with the language-modeling head, got LlavaModel$",
    ),
}


@pytest.mark.parametrize("make, message", REFUSED.values(), ids=REFUSED)
def test_refused_models(make, message):
    model = make()
    with pytest.raises(ModelError, match=message), vlmprune.prune(model, FASTV):
        pass
    assert hooks(model) == {}


def test_layer_beyond_the_depth(model):
    with pytest.raises(ValueError, match=r"^layer: expected at most 5 \(the decoder has 6 layers\), got 6$"):
        vlmprune.attach(model, vlmprune.FastV(layer=6))
    assert not any(key.endswith("_pre_hooks") for key in hooks(model))


@pytest.mark.parametrize(
    "layers, said",
    [
        ((-1,), "layer: expected a whole number >= 0, got -1"),
        ((True,), "layer: expected a whole number >= 0, got True"),
        (("2",), "layer: expected a whole number >= 0, got '2'"),
        ((3, 1), "layers: expected one or more layers, ascending, got (3, 1)"),
        ((2, 2), "layers: expected one or more layers, ascending, got (2, 2)"),
        ((), "layers: expected one or more layers, ascending, got ()"),
        ([2], "layers: expected one or more layers, ascending, got [2]"),
    ],
)
def test_layers_of_a_policy_that_checks_none(model, layers, said):
    """Before anything runs, and not after it as a stage that did not fire."""

    class Anywhere(vlmprune.FastV):
        """Its layers are those of the test."""

    Anywhere.layers = property(lambda self: layers)
    with pytest.raises(vlmprune.InputError, match=f"^{re.escape(said)}$"):
        vlmprune.attach(model, Anywhere())
    assert not any(key.endswith("_pre_hooks") for key in hooks(model))


def test_policy_must_be_a_policy(model):
    with pytest.raises(
        ValueError, match=r"^policy: expected a PruningPolicy, e.g. FastV\(layer=2\), got 'fastv'$"
    ):
        vlmprune.attach(model, "fastv")


def test_selection_of_a_wrong_kind_is_named(model):
    class Odd(vlmprune.Random):
        def select(self, ctx):
            return super().select(ctx).float()

    with pytest.raises(ValueError, match=r"Odd.*select\(ctx\): expected int64, got torch.float32"):
        with vlmprune.prune(model, Odd(layer=2)):
            generate(model, make_batch(BATCH), 1)


def test_ready_made_mask_is_refused(model):
    batch = make_batch(BATCH)
    n = batch["input_ids"].shape[1]
    batch["attention_mask"] = torch.ones(1, 1, n, n, dtype=torch.bool).tril()
    with (
        pytest.raises(ValueError, match=r"^attention_mask: expected 2-D \[B, S\]"),
        vlmprune.prune(model, FASTV),
    ):
        model(**batch)


# Layers that run without our hooks must not pass silently.


def test_language_model_called_directly_raises(model):
    embeds = torch.randn(1, 9, 64)
    with pytest.raises(NotPrunedError, match="without going through the vision-language model"):
        with vlmprune.prune(model, FASTV), torch.no_grad():
            model.model.language_model(inputs_embeds=embeds)


def test_bypassed_layer_call_raises(model):
    layer = model.model.language_model.layers[2]
    with pytest.raises(NotPrunedError, match="the stage at layer 2 did not fire"):
        with vlmprune.prune(model, FASTV), torch.no_grad():
            layer._forward_pre_hooks.clear()
            layer._forward_pre_hooks_with_kwargs.clear()
            generate(model, make_batch(BATCH), 1)


def test_hooks_removed_by_others_raise(model):
    with pytest.raises(NotPrunedError, match="hooks were removed by other code"):
        with vlmprune.prune(model, FASTV):
            for module in model.modules():
                module._forward_pre_hooks.clear()
                module._forward_hooks.clear()
    assert not any(key.endswith("_pre_hooks") for key in hooks(model))


def test_merged_embeddings_alone_raise(model):
    """Embeddings without ids or images hide where the visual tokens are."""
    with pytest.raises(NotPrunedError, match="no way to find visual tokens"):
        with vlmprune.prune(model, FASTV), torch.no_grad():
            model(inputs_embeds=torch.randn(1, 9, 64), attention_mask=torch.ones(1, 9, dtype=torch.long))


def test_positional_arguments_are_pruned_too(model):
    batch = make_batch([[4, "I", 7], [2, "I", 3]])
    ids, pixels, mask = batch["input_ids"], batch["pixel_values"], batch["attention_mask"]
    with torch.no_grad(), vlmprune.prune(model, FASTV) as run:
        named = model.model(input_ids=ids, pixel_values=pixels, attention_mask=mask).last_hidden_state
        placed = model.model(ids, pixels, mask).last_hidden_state
        assert run.stages[0].tokens_kept == 6
        assert torch.equal(named, placed)
        assert torch.equal(model(ids, pixels, mask).logits, model(**batch).logits)


def test_a_pruned_cache_is_refused_outside_its_scope(model):
    batch = make_batch([[4, "I", 7], [2, "I", 3]])
    with vlmprune.prune(model, FASTV):
        _, _, out = generate(model, batch, 2)
    ids = out.sequences
    real = torch.cat([batch["attention_mask"], torch.ones(2, 2, dtype=torch.long)], 1)
    with pytest.raises(ModelError, match=r"^cache: expected a pruning scope"):
        generate(model, {"input_ids": ids, "attention_mask": real}, 1, past_key_values=out.past_key_values)


def test_embeddings_with_pixels_are_pruned(model):
    batch = make_batch(BATCH)
    embeds = model.get_input_embeddings()(batch["input_ids"])
    with torch.no_grad(), vlmprune.prune(model, FASTV) as run:
        by_ids = model(**batch).logits
        batch.pop("input_ids")
        by_embeds = model(inputs_embeds=embeds, **batch).logits
    assert torch.equal(by_ids, by_embeds)
    assert run.stages[0].tokens_kept == 6


def test_two_models_two_policies_two_threads():
    models = [make_model(seed=0), make_model("qwen2", seed=1)]
    policies = [FASTV, vlmprune.Feather(layers=(1, 4), keep=0.5)]
    batch = make_batch([[4, "I", 7], [2, "I", 3]])

    def once(i):
        with vlmprune.prune(models[i], policies[i]):
            return generate(models[i], batch, 4)[1]

    alone = [once(0), once(1)]
    together: list = [None, None]

    def work(i):
        together[i] = [once(i) for _ in range(3)]

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    [t.start() for t in threads]
    [t.join() for t in threads]
    for i in range(2):
        assert all(torch.equal(out, alone[i]) for out in together[i])


def test_peft_like_wrapper_is_looked_through(model):
    class Wrapper(torch.nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def get_base_model(self):
            return self.inner

    batch = make_batch(BATCH)
    with vlmprune.prune(Wrapper(model), FASTV) as run:
        generate(model, batch, 2)
    assert run.stages[0].tokens_kept == 6


def test_a_scope_can_be_entered_again_but_not_twice_at_once():
    model, batch = make_model(), make_batch([[4, "I", 7]])
    scope = vlmprune.prune(model, FASTV)
    with scope as run:
        want = generate(model, batch, 2)[1]
        with pytest.raises(ValueError, match=r"^model: expected no policy attached yet"), scope:
            pass
        assert torch.equal(generate(model, batch, 2)[1], want)  # the outer block goes on
    with scope as again:
        assert torch.equal(generate(model, batch, 2)[1], want)
    assert again is not run and not model.model._forward_pre_hooks


def test_an_attached_model_can_be_saved(tmp_path):
    """Before it has run: then transformers itself has put closures on it, which nothing can save."""
    model, batch = make_model(), make_batch([[4, "I", 7]])
    vlmprune.attach(
        model,
        vlmprune.Stages([vlmprune.FasterVLM(keep=9, positions="pack"), vlmprune.FastV(layer=2, keep=0.5)]),
    )
    torch.save(model, tmp_path / "model.pt")
    loaded = torch.load(tmp_path / "model.pt", weights_only=False)
    want = generate(model, batch, 2)[1]
    assert torch.equal(generate(loaded, batch, 2)[1], want)
    vlmprune.detach(loaded)
    assert not torch.equal(generate(loaded, batch, 2)[1], want)
    assert torch.equal(generate(model, batch, 2)[1], want)


def test_what_is_under_way_is_not_saved():
    model, batch = make_model(), make_batch([[4, "I", 7]])
    vlmprune.attach(model, vlmprune.FasterVLM(keep=9, positions="pack"))
    generate(model, batch, 2)
    engine = find_engine(find_parts(model))
    for state in (engine.prompts, engine.vision.notes, engine.vision.mine, engine.clock.mine):
        fresh, copied = pickle.loads(pickle.dumps(state)), copy.deepcopy(state)
        assert type(fresh) is type(copied) is type(state)
    assert pickle.loads(pickle.dumps(engine.vision.mine)).runs is None


def test_the_first_choice_at_each_layer_is_checked():
    """A policy that answers positions in place of ordinals would give other tokens without a word."""
    model, batch = make_model(), make_batch([[4, "I", 7]])
    answers = iter([torch.arange(4)[None], torch.tensor([[0, 2, 2, 3]])])

    @dataclass(frozen=True)
    class Twice(vlmprune.PruningPolicy):
        @property
        def layers(self):
            return (2, 4)

        def select(self, ctx):
            return next(answers)

    with pytest.raises(
        ValueError, match=r"select\(ctx\), sample 0: expected each number once, got \[2\] again"
    ):
        with vlmprune.prune(model, Twice()):
            generate(model, batch, 2)
