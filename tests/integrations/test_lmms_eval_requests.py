"""What lmms-eval asks for, read without lmms-eval: policies, batches, generation settings, ends of answers, costs."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import yaml
from PIL import Image

from vlmprune import DivPrune, Feather, RandomDeep, Scout, Stages, Uniform
from vlmprune.cli.listing import Filters, show_policies
from vlmprune.flops import DecoderShape, decoder_flops, layer_inputs
from vlmprune.integrations.lmms_eval.cost import Cost
from vlmprune.integrations.lmms_eval.requests import (
    cut,
    make_batches,
    read_count,
    read_generation,
    read_image,
    read_policy,
)
from vlmprune.models.clock import Seconds
from vlmprune.models.report import FlopCounts, Report, TokenCounts
from vlmprune.policies import policy_from
from vlmprune.policies.budgets import PUBLISHED
from vlmprune.policies.registry import BUILT_IN
from vlmprune.policies.schedule import stage_counts
from vlmprune.smaller import Smaller

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs" / "benchmarks.md"


def ask(text, settings=None, task="pope"):
    return SimpleNamespace(args=(text, None, settings or {}, 0, task, "test"))


def test_entry_point_is_light():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    module, _, name = project["entry-points"]["lmms_eval.models"]["vlmprune"].partition(":")
    assert callable(getattr(import_module(module), name))
    heavy = {"transformers", "torch", "triton", "lmms_eval"}
    code = f"import sys, {module}; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr


def test_policy_has_semicolons_between_its_fields():
    assert read_policy("feather:layers=2/5;keep=0.3") == Feather(layers=(2, 5), keep=0.3)
    assert read_policy("feather") == Feather()
    assert read_policy("none") is None


def test_smaller_pictures_instead_of_a_policy():
    assert read_policy("smaller:keep=64") == Smaller(64)
    assert read_policy("smaller:keep=0.25") == Smaller(0.25)


def test_policies_made_of_policies(tmp_path):
    recipe = Stages([DivPrune(keep=0.5), RandomDeep(layer=20, keep=0.25)])
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe.to_dict()))
    assert read_policy("divprune:keep=0.5 + random_deep:layer=20;keep=0.25") == recipe
    assert read_policy(str(tmp_path / "recipe.yaml")) == recipe
    assert read_policy(recipe.to_dict()) == recipe
    scout = Scout(coarse=DivPrune(keep=48, positions="keep") | Uniform(layer=0, keep=24), fine=24)
    text = "scout:coarse=(divprune:keep=48;positions=keep | uniform:layer=0;keep=24);fine=24"
    assert read_policy(text) == scout


@pytest.mark.parametrize(
    "text, complaint",
    [
        ("throttle", "policy: expected one of fastv"),
        ("fastv:layer=2:keep=0.5", "layer: expected int, got '2:keep=0.5'"),
        ("smaller:tokens=64", "smaller: expected the field keep, got 'tokens'"),
        ("fastv:depth=2", "policy fastv: expected one of the fields layer"),
        (64, r"policy: expected NAME\[:field=value;...\] or none, got 64"),
    ],
)
def test_bad_policy(text, complaint):
    with pytest.raises(ValueError, match=complaint):
        read_policy(text)


def test_images_are_pictures_or_paths_and_come_in_upright(tmp_path):
    held = Image.new("RGB", (4, 2), "red")
    exif = Image.Exif()
    exif[0x0112] = 6
    held.save(tmp_path / "held.png", exif=exif)
    Image.fromarray(np.full((2, 3), 65535, np.uint16)).save(tmp_path / "deep.png")
    opened = Image.open(tmp_path / "held.png")
    assert [read_image(given, "pope").size for given in (held, opened, str(tmp_path / "held.png"))] == [
        (4, 2),
        (2, 4),
        (2, 4),
    ]
    assert read_image(Image.open(tmp_path / "deep.png"), "pope").getpixel((0, 0)) == (255, 255, 255)
    assert read_image(tmp_path / "deep.png", "pope").getpixel((0, 0)) == (255, 255, 255)


@pytest.mark.parametrize(
    "given, complaint",
    [
        ("https://example.com/a.png", r"^pope: expected an image file, got 'https:.*', which is no file$"),
        (__file__, r"^pope: expected an image file, got '.*\.py', which cannot be read: cannot identify"),
        (b"\x89PNG", r"^pope: expected images as pictures or paths, got bytes$"),
    ],
)
def test_what_is_no_image(given, complaint):
    with pytest.raises(ValueError, match=complaint):
        read_image(given, "pope")


@pytest.mark.parametrize("given", ["auto", 0, "-1", 1.5, "2x"])
def test_bad_count(given):
    with pytest.raises(ValueError, match="batch_size: expected a whole number, at least 1, got"):
        read_count("batch_size", given)


@pytest.mark.parametrize("model", PUBLISHED, ids=lambda model: model.model)
def test_docs_run_every_preset(model, capsys):
    """Their loop goes over what ``vlmprune list --budget`` prints, which is every preset, as lmms-eval takes it."""
    assert f"$(settings {' '.join(map(str, model.budgets))})" in DOCS.read_text()
    for budget in model.budgets:
        show_policies(False, filters=Filters(budget=budget))
        said = capsys.readouterr().out.split()
        expected = {name: kind.presets[budget] for name, kind in BUILT_IN.items() if budget in kind.presets}
        assert said == [f"{name}:{settings}" for name, settings in expected.items()]
        made = [read_policy(text.replace(",", ";")) for text in said]
        assert made == [policy_from(text) for text in said]


@pytest.mark.parametrize("name", ["at_64_percent", "at_48_percent"])
def test_docs_cut_what_they_say(name):
    """The share of the visual tokens' FLOPs that FEATHER's setting saves, within what a few tokens of its union are."""
    shape = DecoderShape(32, 4096, 32, 32, 128, 11008)
    cuts = {}
    for text in listed(name):
        lengths = layer_inputs(32, 576, stage_counts(read_policy(text), 576))
        cuts[text] = 1 - decoder_flops(shape, lengths) / decoder_flops(shape, [576] * 32)
    published = cuts.pop("fastv:layer=3;keep=0.25", None) or cuts.pop("fastv:layer=3;keep=0.5")
    assert published == pytest.approx(0.684 if name == "at_64_percent" else 0.458, abs=0.001)
    assert list(cuts.values()) == pytest.approx([0.642 if name == "at_64_percent" else 0.478] * 5, abs=0.002)


def listed(name):
    """The policies of one list in the docs, but for ``none``."""
    block = re.search(rf"^{name}=\((.*?)\)$", DOCS.read_text(), re.DOTALL | re.MULTILINE)
    return set(re.findall(r'"([^"]+)"', block.group(1)))


def test_count_is_read_from_text():
    assert [read_count("batch_size", given) for given in (4, "16")] == [4, 16]


def test_batches_are_of_one_task_and_one_setting_with_the_longest_first():
    short = {"max_new_tokens": 16}
    requests = [
        ask("aa", short),
        ask("aaaa", short),
        ask("a", {"max_new_tokens": 128}),
        ask("aaa", short),
        ask("aaaaa", short, task="gqa"),
        ask("aaa", short),
    ]
    assert list(make_batches(requests, 2)) == [[1, 3], [5, 0], [2], [4]]
    assert list(make_batches(requests, 1)) == [[1], [3], [5], [0], [2], [4]]
    assert list(make_batches([], 4)) == []


def test_greedy_unless_a_temperature_is_asked_for():
    greedy = {"num_beams": 1, "do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    assert read_generation({"until": ["\n"]}, 1024) == {**greedy, "max_new_tokens": 1024}
    asked = {"max_new_tokens": 16, "temperature": 0, "top_p": 1.0, "image_aspect_ratio": "original"}
    assert read_generation(asked, 1024) == {**greedy, "max_new_tokens": 16}
    sampled = {"temperature": 0.7, "top_p": 0.9, "num_beams": 2}
    expected = {**greedy, **sampled, "do_sample": True, "max_new_tokens": 8}
    assert read_generation(sampled, 8) == expected
    assert read_generation(sampled | {"do_sample": False}, 8) == {
        **greedy,
        "num_beams": 2,
        "max_new_tokens": 8,
    }


@pytest.mark.parametrize(
    "until, left",
    [
        (None, "yes. USER: no"),
        ([], "yes. USER: no"),
        ("", "yes. USER: no"),
        (".", "yes"),
        (["USER:", "."], "yes"),
        (["ASSISTANT:"], "yes. USER: no"),
        ("yes", ""),
    ],
)
def test_an_answer_stops_at_the_first_of_the_strings(until, left):
    assert cut("yes. USER: no", until) == left


def test_a_blank_line_ends_no_answer():
    """lmms-eval's default for tasks that name no string."""
    assert cut("One.\n\nTwo.", ["\n\n"]) == "One.\n\nTwo."


def test_costs_are_means_over_requests():
    seconds = Seconds(vision=0.0, prefill=0.3, selection=0.0, decode=0.0)
    batch = Report(
        visual_tokens=100.0,
        stages=(),
        tokens=TokenCounts(mean_per_layer=50.0, after_last_stage=20.0, resident_kv=50.0),
        flops=FlopCounts(full=3000, pruned=1500, vision=0),
        seconds=seconds,
        decode_steps=1,
    )
    last = replace(
        batch, visual_tokens=200.0, flops=FlopCounts(1000, 1000, 0), seconds=replace(seconds, prefill=0.1)
    )
    cost = Cost()
    cost.add(batch, 3)
    cost.add(last, 1)
    assert cost.means("gqa") == pytest.approx(
        {
            "gqa/requests": 4,
            "gqa/visual_tokens": 125,
            "gqa/visual_tokens_mean_over_layers": 50,
            "gqa/visual_tokens_after_last_stage": 20,
            "gqa/visual_tokens_in_kv_cache": 50,
            "gqa/flops_cut": 1 - 2500 / 4000,
            "gqa/prefill_ms": 100,
        }
    )
