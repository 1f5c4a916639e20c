"""Pruning where models are served: offloaded, on several devices, on several ranks, in adapters and pipelines."""

from __future__ import annotations

import socket
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import multiprocessing

import vlmprune
from helpers.families import CASES as FAMILIES
from helpers.families import IMAGE, VIDEO
from helpers.families import build as family_model
from helpers.families import prompts as family_prompts
from helpers.rank import chosen, one_rank
from helpers.table import CELLS, KINDS
from helpers.table import FAMILIES as TABLE
from helpers.tiny import LAYERS, TOLERANCE, dropped_from, generate, make_batch, make_model, oracle
from vlmprune.errors import ModelError
from vlmprune.models.decoder_reads import _ranks
from vlmprune.models.host.parts import find_parts

BATCH = [[4, "I", 7], [2, "I", 3, "I", 5]]
POLICY = vlmprune.Stages(
    [vlmprune.FastV(layer=2, keep=0.5), vlmprune.PyramidDrop(layers=(4,), positions="keep")]
)

GLYPHWORLD = Path(__file__).parents[2] / "examples" / "glyphworld"


def pruned(model, target=None):
    """Logits and kept positions of a pruned generation."""
    with vlmprune.prune(model if target is None else target, POLICY) as run:
        _, logits, _ = generate(model, make_batch(BATCH), 3)
    return logits, [stage.index for stage in run.stages]


@pytest.fixture(scope="module")
def plain():
    return pruned(make_model())


def same(got, want) -> None:
    assert torch.equal(got[0], want[0])
    assert all(torch.equal(a, b) for a, b in zip(got[1], want[1], strict=True))


# accelerate


@pytest.mark.cpu("is accelerate's main device here")
def test_offloaded_to_the_cpu(plain):
    accelerate = pytest.importorskip("accelerate")
    model = make_model()
    accelerate.cpu_offload(model, execution_device="cpu")
    same(pruned(model), plain)
    late = make_model()
    with vlmprune.prune(late, POLICY) as run:  # the offloading hooks come after ours
        accelerate.cpu_offload(late, execution_device="cpu")
        _, logits, _ = generate(late, make_batch(BATCH), 3)
    same((logits, [stage.index for stage in run.stages]), plain)
    same(pruned(late), plain)


@pytest.mark.cpu("is accelerate's main device here")
def test_dispatched_to_cpu_and_disk(plain, tmp_path):
    accelerate = pytest.importorskip("accelerate")
    model = make_model()
    text = "model.language_model"
    rest = ["model.vision_tower", "model.multi_modal_projector", "lm_head"]
    rest += [f"{text}.embed_tokens", f"{text}.norm", f"{text}.rotary_emb"]
    places = {name: "cpu" for name in rest}
    places |= {f"{text}.layers.{i}": "disk" if i % 2 else "cpu" for i in range(LAYERS)}
    accelerate.dispatch_model(model, places, main_device="cpu", offload_dir=tmp_path, force_hooks=True)
    assert any(p.is_meta for p in model.parameters())
    same(pruned(model), plain)


def spread(model):
    """A device map by blocks, as "auto" would make it for several GPUs: here all of them are the CPU."""
    text = find_parts(model).text
    places = {}
    for name, module in model.named_modules():
        inside = any(name.startswith(known + ".") for known in places)
        holds = (
            any(module is part or part in module.modules() for part in (text, *text.layers))
            and module not in text.layers
        )
        if name and not inside and not holds and any(True for _ in module.parameters()):
            places[name] = "cpu"
    own = {name for name, _ in model.named_parameters()} - {
        name for name, _ in model.named_parameters() if any(name.startswith(known + ".") for known in places)
    }
    return places | dict.fromkeys(own, "cpu")


# Unpruned, transformers itself fails with these offloaded: it encodes images outside of any forward.
NOT_OFFLOADED = ("llava_next", "llava_onevision", "idefics3")
PLACED = [("dispatched", name) for name in TABLE]
PLACED += [("offloaded", name) for name in TABLE if not name.startswith(NOT_OFFLOADED)]


@pytest.mark.parametrize("how, name", PLACED)
@pytest.mark.cpu("is accelerate's main device here")
def test_every_family_on_accelerates_devices(how, name):
    """Its hooks rebuild whatever goes in and out of every module, transformers' output objects too."""
    accelerate = pytest.importorskip("accelerate")
    case = FAMILIES[name]
    model, (inputs, _) = family_model(case), family_prompts(case, case.padded)
    settings = {
        "do_sample": False,
        "return_dict_in_generate": True,
        "output_logits": True,
        "max_new_tokens": 3,
    }
    settings["suppress_tokens"] = [IMAGE, VIDEO]
    for policy in [KINDS[kind] for family, kind in CELLS if family == name]:
        model = family_model(case)
        with vlmprune.prune(model, policy):
            want = torch.stack(model.generate(**inputs, **settings).logits)
        if how == "dispatched":
            accelerate.dispatch_model(model, spread(model), main_device="cpu", force_hooks=True)
        else:
            accelerate.cpu_offload(model, execution_device="cpu")
        with vlmprune.prune(model, policy) as run:
            got = torch.stack(model.generate(**inputs, **settings).logits)
        assert torch.equal(got, want) and run.report().flops.cut > 0


SPREAD = {
    "previous-layer": vlmprune.Stages([vlmprune.FastV(layer=layer, keep=0.8) for layer in (2, 3, 4)]),
    "own-layer": vlmprune.PyramidDrop(layers=(2, 4, 5), positions="pack"),
    "text-states": vlmprune.Stages(
        [vlmprune.FastV(layer=2, keep=0.8), *(vlmprune.DART(layer=layer, keep=5) for layer in (4, 5))]
    ),
}


@pytest.mark.parametrize("policy", SPREAD.values(), ids=SPREAD)
@pytest.mark.cpu("is accelerate's main device here")
def test_layers_on_two_devices(policy):
    """Layers 3.. live elsewhere (on "meta", which computes shapes and refuses to mix with the CPU): our hooks see the rows
    where the layer before left them, and must bring along what they have themselves."""
    hooks = pytest.importorskip("accelerate.hooks")
    model, batch = make_model(), make_batch([[4, "I", 7]])
    for block in [*model.model.language_model.layers[3:], model.model.language_model.norm, model.lm_head]:
        block.to("meta")
        for module in block.modules():
            hooks.add_hook_to_module(module, hooks.AlignDevicesHook(execution_device="meta"))
    with torch.no_grad(), vlmprune.prune(model, policy) as run:
        out = model(**batch, use_cache=True)
    places = [stage.index.device.type for stage in run.stages]
    assert (places[0], places[-1]) == ("cpu", "meta")
    rows = batch["input_ids"].shape[1] - 16
    kept = [16] * 2 + [run.stages[0].tokens_kept] * (run.stages[1].layer - 2)
    assert [out.past_key_values.layers[i].keys.shape[2] - rows for i in range(len(kept))] == kept
    assert out.logits.shape[1] == rows + 16


# PEFT


@pytest.mark.parametrize("wrapped", [False, True])
def test_lora(wrapped):
    """Scores come from the adapted projections; the wrapper or the base model may be passed."""
    peft = pytest.importorskip("peft")
    model, batch = make_model(), make_batch(BATCH)
    before, _ = pruned(model)
    settings = peft.LoraConfig(target_modules=["q_proj", "k_proj"], init_lora_weights=False)
    torch.manual_seed(0)
    adapted = peft.get_peft_model(model, settings).eval()
    policy = vlmprune.Feather(layers=(2, 4), keep=0.5)
    with vlmprune.prune(adapted if wrapped else model, policy) as run:
        tokens, logits, _ = generate(adapted, batch, 3)
    want_tokens, want, _ = oracle(model, batch, dropped_from(run, batch), 3)
    torch.testing.assert_close(logits, want, atol=TOLERANCE, rtol=0)
    assert torch.equal(tokens, want_tokens)
    assert not torch.equal(logits, before)
    kept = [stage.index for stage in run.stages]
    merged = adapted.merge_and_unload()
    with vlmprune.prune(merged, policy) as run:
        generate(merged, batch, 1)
    assert all(torch.equal(a.index, b) for a, b in zip(run.stages, kept, strict=True))


# Tensor parallelism: every rank has half of the heads and must keep the same tokens.


@pytest.mark.slow
@pytest.mark.cpu("holds the shards of gloo's ranks")
def test_tensor_parallel_ranks_keep_the_same_tokens(tmp_path):
    model = make_model()
    model.save_pretrained(tmp_path)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    multiprocessing.start_processes(one_rank, (str(tmp_path), port), nprocs=2, start_method="spawn")
    want = chosen(model)
    for rank in (0, 1):
        heads, said = torch.load(tmp_path / f"rank{rank}.pt")
        assert heads == 4  # of 8: the ranks really share them
        for (logits, kept), (want_logits, want_kept) in zip(said, want, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(kept, want_kept, strict=True))
            torch.testing.assert_close(logits, want_logits, atol=TOLERANCE, rtol=0)


def test_heads_that_are_missing_without_a_trace_are_refused():
    attn = SimpleNamespace(q_proj=torch.nn.Linear(64, 32))
    assert _ranks(attn, 8, 8) is None
    with pytest.raises(
        ModelError, match=r"^q_proj: expected all 8 heads, or a DTensor .*, got 4 heads in a Parameter$"
    ):
        _ranks(attn, 4, 8)


# Pipelines and servers


def test_attached_under_a_pipeline():
    """The trained example, through transformers' own pipeline: attach prunes its calls, detach ends that."""
    from transformers import pipeline

    pipe = pipeline("image-text-to-text", model=str(GLYPHWORLD / "checkpoint"), dtype=torch.float32)
    image = str(GLYPHWORLD / "images" / "scene_70001.png")
    question = "<bos> USER: <image> find the large yellow object ? ASSISTANT:"

    def ask() -> str:
        said = pipe(
            images=image, text=question, return_full_text=False, generate_kwargs={"max_new_tokens": 5}
        )
        return said[0]["generated_text"].strip()

    before = ask()
    assert before == "row 3 col 5"
    run = vlmprune.attach(pipe.model, vlmprune.Uniform(layer=0, keep=1))
    pruned_answer = ask()
    assert [(s.layer, s.tokens_in, s.tokens_kept) for s in run.stages] == [(0, 196, 1)]
    assert pruned_answer != before  # one visual token tells nothing about the image
    vlmprune.detach(pipe.model)
    assert ask() == before
    assert run.report().visual_tokens == 196  # no call after detach was recorded
    with vlmprune.prune(pipe.model, vlmprune.FastV(layer=6, keep=0.5)):
        assert ask() == before


def test_after_a_failing_method_an_attached_model_goes_on():
    """An exception in one call leaves nothing for the next one, nor in the cache it was given."""
    model, batch = make_model(), make_batch(BATCH)
    _, unpruned, _ = generate(model, batch, 2)
    fail = [True]

    def moody(ctx):
        if fail.pop():
            raise KeyError("selection failed")
        return torch.where(ctx.mask, torch.arange(ctx.mask.shape[1]), -1)[:, :4]

    run = vlmprune.attach(model, vlmprune.Custom(2, moody))
    with pytest.raises(KeyError, match="selection failed"):
        generate(model, batch, 2)
    assert run.stages == []
    fail.append(False)
    _, logits, _ = generate(model, batch, 2)
    vlmprune.detach(model)
    _, want, _ = oracle(model, batch, dropped_from(run, batch), 2)
    torch.testing.assert_close(logits, want, atol=TOLERANCE, rtol=0)
    assert torch.equal(generate(model, batch, 2)[1], unpruned)
