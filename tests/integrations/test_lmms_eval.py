"""The lmms-eval model against the same model asked directly, on a local task with the scenes of examples/glyphworld."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("lmms_eval", reason="lmms-eval is not installed (make test-eval)")

from lmms_eval.evaluator import simple_evaluate
from lmms_eval.models import get_model
from lmms_eval.tasks import TaskManager
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, AutoProcessor

import vlmprune

HERE = Path(__file__).parent
TASK = HERE / "glyphworld_task"
GLYPHWORLD = HERE.parents[1] / "examples" / "glyphworld"
CHECKPOINT = GLYPHWORLD / "checkpoint"
ARGS = f"pretrained={CHECKPOINT},dtype=float32"
DOCS = [json.loads(line) for line in (TASK / "questions.jsonl").read_text().splitlines()]
FEATHER = "feather:layers=2/5;keep=0.3"
SCOUT = "scout:coarse=(uniform:layer=0;keep=24);fine=16;look=6"
POLICIES = {
    "none": None,
    FEATHER: vlmprune.Feather(layers=(2, 5), keep=0.3),
    SCOUT: vlmprune.Scout(coarse=vlmprune.Uniform(layer=0, keep=24), fine=16, look=6),
}


@pytest.fixture(autouse=True)
def in_the_tasks_folder(monkeypatch, tmp_path_factory):
    """The task names its questions by a relative path; what datasets makes of them goes to a folder of the tests."""
    monkeypatch.chdir(TASK)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path_factory.getbasetemp() / "datasets"))


def evaluate(policy, size, model="vlmprune", args="", **settings):
    """Answers by document, and the whole of lmms-eval's results."""
    results = simple_evaluate(
        model=model,
        model_args=f"{ARGS},{args or f'policy={policy}'}",
        tasks=["glyphworld"],
        batch_size=size,
        device="cpu",
        task_manager=TaskManager(include_path=str(TASK), include_defaults=False),
        **settings,
    )
    samples = sorted(results["samples"]["glyphworld"], key=lambda sample: sample["doc_id"])
    return [sample["resps"][0][0] for sample in samples], results


evaluated = cache(evaluate)


@cache
def asked_directly(policy):
    """Answer and report of every question, one by one, without lmms-eval and without the chat template."""
    model = AutoModelForImageTextToText.from_pretrained(CHECKPOINT, dtype=torch.float32).eval()
    processor = AutoProcessor.from_pretrained(CHECKPOINT)
    with torch.inference_mode():
        return [ask(model, processor, POLICIES[policy], doc) for doc in DOCS]


def ask(model, processor, policy, doc):
    images = [Image.open(GLYPHWORLD / "images" / name).convert("RGB") for name in doc["images"]]
    text = f"<bos> USER: {'<image> ' * len(images)}{doc['question']} ASSISTANT:"
    inputs = processor(text=text, images=images or None, return_tensors="pt", add_special_tokens=False)
    with vlmprune.meter(model) if policy is None else vlmprune.prune(model, policy) as run:
        output = model.generate(**inputs, max_new_tokens=12, do_sample=False)
    answer = processor.tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return answer, run.report()


def load(**changes):
    args = ",".join(f"{name}={value}" for name, value in changes.items())
    return get_model("vlmprune").create_from_arg_string(f"{ARGS},{args}", {"device": "cpu"})


@pytest.mark.parametrize("size", [1, 4])
@pytest.mark.parametrize("policy", POLICIES)
def test_answers_are_the_models_own(policy, size):
    answers, _ = evaluated(policy, size)
    assert answers == [answer for answer, _ in asked_directly(policy)]


def test_unpruned_answers_are_those_of_lmms_evals_own_model():
    pytest.importorskip("decord", reason="lmms-eval's llava_hf needs it")
    answers, _ = evaluate(None, 1, model="llava_hf", args="device_map=cpu")
    with_images = [number for number, doc in enumerate(DOCS) if doc["images"]]  # it answers no others
    ours, _ = evaluated("none", 1)
    assert [ours[number] for number in with_images] == [answers[number] for number in with_images]


def test_a_policy_changes_what_is_seen():
    assert evaluated(FEATHER, 1)[0] != evaluated("none", 1)[0]


def test_our_attention_answers_as_sdpa_does():
    answers, _ = evaluate(None, 4, args=f"policy={FEATHER},attn_implementation=vlmprune")
    assert answers == evaluated(FEATHER, 4)[0]


@pytest.mark.parametrize("size", [1, 4])
def test_smaller_pictures_and_their_cost(size):
    """64 tokens a picture: the model's own answers to pictures made small by hand, the cost beside whole pictures."""
    answers, results = evaluated("smaller:keep=64", size)
    assert answers == smaller_by_hand()
    costs = results["throughput"]
    pictures = [len(doc["images"]) for doc in DOCS]
    got = {name: costs[f"avg_glyphworld/{name}"] for name in ("visual_tokens", "visual_tokens_in_kv_cache")}
    mean = sum(pictures) / len(pictures)
    assert got == pytest.approx({"visual_tokens": 196 * mean, "visual_tokens_in_kv_cache": 64 * mean})
    assert costs["avg_glyphworld/flops_cut"] > 0.5


@cache
def smaller_by_hand():
    model = AutoModelForImageTextToText.from_pretrained(CHECKPOINT, dtype=torch.float32).eval()
    processor = AutoProcessor.from_pretrained(CHECKPOINT)
    processor.image_processor.size = {"shortest_edge": 64}
    processor.image_processor.crop_size = {"height": 64, "width": 64}
    tower = model.model.vision_tower
    own = tower.forward
    tower.forward = lambda *args, **kwargs: own(*args, **kwargs, interpolate_pos_encoding=True)
    with torch.inference_mode():
        return [ask(model, processor, None, doc)[0] for doc in DOCS]


@pytest.mark.parametrize("policy", POLICIES)
def test_results_hold_the_cost(policy):
    costs = evaluated(policy, 1)[1]["throughput"]
    reports = [report for _, report in asked_directly(policy)]
    mean = {
        "requests": len(DOCS),
        "visual_tokens": sum(r.visual_tokens for r in reports) / len(DOCS),
        "visual_tokens_mean_over_layers": sum(r.tokens.mean_per_layer for r in reports) / len(DOCS),
        "visual_tokens_after_last_stage": sum(r.tokens.after_last_stage for r in reports) / len(DOCS),
        "flops_cut": 1 - sum(r.flops.pruned for r in reports) / sum(r.flops.full for r in reports),
    }
    got = {name: costs[f"avg_glyphworld/{name}"] for name in mean}
    assert got == pytest.approx(mean)
    assert (got["flops_cut"] > 0.5) == (policy != "none")
    assert costs["avg_glyphworld/prefill_ms"] > 0


def test_answers_come_from_lmms_evals_cache_but_only_to_the_same_policy(tmp_path):
    first, _ = evaluate("none", 4, use_cache=str(tmp_path))
    again, results = evaluate("none", 4, use_cache=str(tmp_path))
    assert again == first
    assert "throughput" not in results  # nothing ran
    other, results = evaluate(FEATHER, 4, use_cache=str(tmp_path))
    assert other == evaluated(FEATHER, 4)[0]
    assert results["throughput"]["avg_glyphworld/requests"] == len(DOCS)


def test_generation_settings_are_the_tasks_or_the_command_lines():
    long, _ = evaluated("none", 4)
    short, _ = evaluate("none", 4, gen_kwargs="max_new_tokens=1")
    assert short == [answer.split()[0] for answer in long]


@pytest.mark.parametrize(
    "changes, complaint",
    [
        ({"policy": "throttle"}, "policy: expected one of fastv, feather"),
        ({"policy": "fastv:layer=99"}, "layer: expected at most"),
        ({"policy": "fastv:keep=2.0"}, "keep: expected"),
        ({"policy": "smaller:keep=2.0"}, "keep: expected a share in (0, 1]"),
        ({"dtype": "int8"}, "dtype: expected one of auto, float32, float16, bfloat16, got 'int8'"),
        ({"batch_size": "auto"}, "batch_size: expected a whole number, at least 1, got 'auto'"),
    ],
)
def test_bad_arguments_are_refused_before_the_weights_are_loaded(changes, complaint, monkeypatch):
    monkeypatch.setattr("vlmprune.checkpoints.AutoModelForImageTextToText", None)
    with pytest.raises(ValueError, match=re.escape(complaint)):
        load(**changes)


def test_missing_weights_are_refused(tmp_path):
    shutil.copytree(CHECKPOINT, tmp_path / "part")
    weights = load_file(CHECKPOINT / "model.safetensors")
    weights.pop(next(name for name in weights if "mlp.down_proj" in name))
    save_file(weights, tmp_path / "part" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"checkpoint: expected every weight in .* got 1 missing"):
        load(pretrained=tmp_path / "part")


def test_a_processor_without_a_chat_template_is_refused(tmp_path):
    shutil.copytree(CHECKPOINT, tmp_path / "mute", ignore=shutil.ignore_patterns("chat_template.jinja"))
    with pytest.raises(ValueError, match="processor: expected one with a chat template, got"):
        load(processor=tmp_path / "mute")


def request(lm, content):
    lm.task_dict["talk"] = {"test": [None]}
    messages = [{"role": "user", "content": content}]
    arguments = ("", lambda _: messages, {}, 0, "talk", "test")
    return type("Request", (), {"args": arguments})()


def test_system_prompt_is_a_text_or_a_file(tmp_path):
    (tmp_path / "polite.txt").write_text("be polite .\n")
    for given in ("be polite .", tmp_path / "polite.txt"):
        lm = load(system_prompt=given)
        lm.processor.chat_template = (
            "{% for m in messages %}[{{ m.role }}] {{ m.content[0].text }} {% endfor %}"
        )
        text, images = lm._read(request(lm, [{"type": "text", "text": "hello"}]))
        assert (text.strip(), images) == ("[system] be polite . [user] hello", [])


def test_images_as_people_have_them():
    """On its side with a note saying so, and as 16-bit greys: the pixels of the plain picture."""
    lm = load()
    grey = Image.open(GLYPHWORLD / "images" / DOCS[0]["images"][0]).convert("L")
    turned = grey.transpose(Image.Transpose.ROTATE_90)
    exif = turned.getexif()
    exif[0x0112] = 6
    deep = Image.fromarray(np.asarray(grey).astype(np.uint16) * 257)
    plain, *others = (
        lm._make_inputs([request(lm, [{"type": "image", "url": image}, {"type": "text", "text": "hello"}])])
        for image in (grey, turned, deep)
    )
    for other in others:
        assert torch.equal(other.inputs["pixel_values"], plain.inputs["pixel_values"])


def test_what_is_not_offered_says_so():
    lm = load()
    with pytest.raises(
        ValueError, match="talk: expected requests of text and images, got a video or a sound"
    ):
        lm.generate_until([request(lm, [{"type": "video", "url": "clip.mp4"}])])
    with pytest.raises(NotImplementedError, match="expected one that generates its answers"):
        lm.loglikelihood([])
    with pytest.raises(NotImplementedError, match="expected one question a request"):
        lm.generate_until_multi_round([])


def test_tasks_of_the_docs_are_lmms_evals():
    named = re.findall(
        r"^TASKS=(\S+)$", (HERE.parents[1] / "docs" / "benchmarks.md").read_text(), re.MULTILINE
    )
    assert len(named) == 2
    assert {task for line in named for task in line.split(",")} <= set(TaskManager().all_tasks)


def test_command_line(tmp_path):
    args = ["--model", "vlmprune", "--model_args", f"{ARGS},policy={FEATHER}", "--tasks", "glyphworld"]
    args += ["--include_path", str(TASK), "--batch_size", "4", "--device", "cpu"]
    done = subprocess.run(
        [sys.executable, "-P", "-m", "lmms_eval", *args, "--output_path", str(tmp_path), "--log_samples"],
        cwd=TASK,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert re.search(r"glyphworld\s*\|none", done.stdout), done.stdout
    (file,) = tmp_path.rglob("*_results.json")
    costs = json.loads(file.read_text())["throughput"]
    ours = evaluated(FEATHER, 4)[1]["throughput"]
    for name in ("visual_tokens_mean_over_layers", "flops_cut"):
        assert costs[f"avg_glyphworld/{name}"] == pytest.approx(ours[f"avg_glyphworld/{name}"])
