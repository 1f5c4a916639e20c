"""What the host calls things: found in its signatures, or an error that names the version and what is missing."""

from __future__ import annotations

import inspect

import pytest
import torch
import transformers
from packaging import version
from torch import nn
from transformers import DynamicCache

import vlmprune
from helpers.families import CASES, build
from helpers.tiny import BEFORE_PREFILL, generate, make_batch, make_model
from vlmprune.errors import ModelError, NotPrunedError, VersionError
from vlmprune.models.host import names, versions
from vlmprune.models.host.parts import find_parts

RENAMED = version.parse(transformers.__version__) >= version.parse("5.24")
FASTV = vlmprune.FastV(layer=2, keep=0.4)


@pytest.fixture(scope="module")
def model():
    return make_model()


@pytest.mark.parametrize("name", [name for name in CASES if "video" not in name])
def test_names_are_those_of_the_signatures(name):
    parts = find_parts(build(CASES[name]))
    layer = inspect.signature(type(parts.layers[0]).forward).parameters
    assert parts.host.cache in layer
    assert parts.host.cache == ("cache" if RENAMED else "past_key_values")
    assert set(parts.host.pixels) == set(parts.token_ids)


def renamed(cls, old, new):
    """A subclass whose forward has one argument under another name."""

    class Renamed(cls):
        pass

    signature = inspect.signature(cls.forward)
    parameters = [p.replace(name=new) if p.name == old else p for p in signature.parameters.values()]

    def forward(self, *args, **kwargs):
        if new in kwargs:
            kwargs[old] = kwargs.pop(new)
        return cls.forward(self, *args, **kwargs)

    forward.__signature__ = signature.replace(parameters=parameters)
    Renamed.forward = forward
    return Renamed


LOST = {
    "base": (lambda m: m.model, "input_ids"),
    "pixels": (lambda m: m.model, "pixel_values"),
    "encoded": (lambda m: m.model, "mm_encoder_outputs"),
    "labels": (lambda m: m, "labels"),
    "layer": (lambda m: m.model.language_model.layers[0], "position_embeddings"),
    "cache": (lambda m: m.model.language_model.layers[0], names.CACHE[not RENAMED]),
    "attention": (lambda m: m.model.language_model.layers[0].self_attn, "hidden_states"),
}


if not BEFORE_PREFILL:
    del LOST["encoded"]


@pytest.mark.parametrize("lost", LOST)
def test_a_renamed_argument_is_an_error_at_attach(lost):
    model = make_model()
    find, name = LOST[lost]
    module = find(model)
    module.__class__ = renamed(type(module), name, "kv" if lost == "cache" else "something_new")
    shown = "cache or past_key_values" if lost == "cache" else name
    with pytest.raises(
        VersionError, match=rf"^transformers {transformers.__version__}: expected '{shown}' in Renamed"
    ):
        vlmprune.attach(model, FASTV)
    assert not model.model._forward_pre_hooks


def test_a_layer_that_is_called_without_a_name_is_an_error(model):
    """A text model that gives its layers the cache under a new name, which the layers still take."""
    text = model.model.language_model

    def rename(module, args, kwargs):
        return args, {("kv" if name == model_cache else name): x for name, x in kwargs.items()}

    model_cache = find_parts(model).host.cache
    handles = [layer.register_forward_pre_hook(rename, with_kwargs=True) for layer in text.layers]
    try:
        with pytest.raises(
            VersionError, match=f"expected '{model_cache}' in the arguments of a decoder layer"
        ):
            with vlmprune.prune(model, FASTV):
                generate(model, make_batch([[4, "I", 7]]), 2)
    finally:
        [handle.remove() for handle in handles]


def test_a_cache_that_the_layers_do_not_get_is_an_error(model):
    name = find_parts(model).host.cache

    def forget(module, args, kwargs):
        return args, {**kwargs, name: None}

    handle = model.model.language_model.layers[3].register_forward_pre_hook(forget, with_kwargs=True)
    try:
        with pytest.raises(ModelError, match="expected the call's KV cache at its decoder layers, got None"):
            with vlmprune.prune(model, FASTV):
                generate(model, make_batch([[4, "I", 7]]), 2)
    finally:
        handle.remove()


@pytest.mark.parametrize("name", names.CACHE)
def test_the_caller_may_use_either_name(model, name):
    if name == "cache" and not RENAMED:
        pytest.skip("no such argument before transformers 5.24")
    batch = make_batch([[4, "I", 7]])
    caches = DynamicCache(config=model.config), DynamicCache(config=model.config)
    with torch.no_grad(), vlmprune.prune(model, FASTV):
        want = model(**batch, past_key_values=caches[0]).logits
        got = model(**batch, **{name: caches[1]}).logits
    assert torch.equal(got, want)
    assert caches[1].layers[3].dropped == caches[0].layers[3].dropped > 0


def test_arguments_by_place_are_read_too():
    class Module(nn.Module):
        def forward(self, a, b=3, *, c=4, **kwargs):
            return a

    signature = names.Signature(Module(), ["a", "b", "c"])
    assert signature.read((1,), {"c": 2, "d": 5}) == {"a": 1, "b": 3, "c": 2, "d": 5}
    assert signature.first(["z", "b"]) == "b"


def test_a_newer_version_is_allowed_with_one_warning(monkeypatch):
    real = versions.version
    monkeypatch.setattr(versions, "version", lambda name: "5.99.1" if name == "transformers" else real(name))
    with pytest.warns(
        UserWarning, match=r"tested with transformers up to 5\.\d+, this is 5\.99\.1: run `vlmprune check"
    ) as seen:
        versions.check_versions()
    assert len([w for w in seen if "transformers" in str(w.message)]) == 1


def test_tested_versions_are_supported_ones():
    for name, (oldest, end) in versions.SUPPORTED.items():
        tested = versions.TESTED[name]
        assert list(tested) == sorted(tested) and tested[0] >= oldest and (end is None or tested[-1] < end)


def test_a_missed_stage_is_reported_at_the_call(model):
    """attach() in a server: nobody ever leaves a scope there."""
    batch = make_batch([[4, "I", 7]])
    embeds = model.get_input_embeddings()(batch["input_ids"]).detach()
    vlmprune.attach(model, FASTV)
    try:
        with torch.no_grad():
            with pytest.raises(NotPrunedError, match="no way to find visual tokens"):
                model(inputs_embeds=embeds)
            with pytest.raises(NotPrunedError, match="without going through the vision-language model"):
                model.model.language_model(input_ids=batch["input_ids"][:, :3])
    finally:
        vlmprune.detach(model)  # raises no more: both were said when they happened
