"""Bad input: one clear line on stderr, exit code 2, no traceback; and before the weights are loaded."""

import json
import os
import shutil
import subprocess
import sys

import pytest
from safetensors.torch import load_file, save_file

from helpers.command_line import ask, cli
from vlmprune.checkpoints import build_text
from vlmprune.errors import BackendError, InputError, ModelError, NotPrunedError, VersionError


@pytest.fixture
def broken(checkpoint, tmp_path):
    """The example checkpoint without its weights: passing the early checks would end in another error."""

    def make(**changes):
        copy = tmp_path / "checkpoint"
        shutil.copytree(checkpoint, copy, ignore=shutil.ignore_patterns("*.safetensors"))
        config = json.loads((copy / "config.json").read_text())
        config["text_config"].update(changes.pop("text_config", {}))
        (copy / "config.json").write_text(json.dumps(config | changes))
        return copy

    return make


def one_line(done):
    assert done.exit_code == 2
    assert done.stdout == ""
    line, rest = done.stderr.split("\n", 1)
    assert rest == ""
    assert line.startswith("error: ")
    return line


@pytest.mark.parametrize(
    "policy, said",
    [
        ("fastvv", "policy: expected one of"),
        ("fastv:layr=2", "policy fastv: expected one of the fields layer, keep"),
        ("fastv:layer", "policy fastv: expected field=value"),
        ("fastv:layer=two", "layer: expected int, got 'two'"),
        ("fastv:layer=0", "layer: expected a whole number >= 1"),
        ("fastv:layer=8", "layer: expected at most 7 (the decoder has 8 layers), got 8"),
        ("scout", "look: expected at most 7 (the decoder has 8 layers), got 20"),
        ("feather:layers=2/9", "layer: expected at most 7 (the decoder has 8 layers), got 9"),
        ("fastv:keep=1.5", "keep: expected a share in (0, 1]"),
        ("fastv:keep=0", "keep: expected"),
        ("feather:keep=1", "keep: expected float (with a decimal point, as in 1.0), got '1'"),
        (
            "pyramiddrop:ratio=1",
            "ratio: expected float or float/... (with a decimal point, as in 1.0), got '1'",
        ),
        ("feather:layers=5/2", "layers: expected two layers, ascending"),
    ],
)
def test_bad_policy(broken, policy, said):
    line = one_line(ask("--policy", policy, model=broken()))
    assert said in line
    assert "Traceback" not in line


def test_missing_image(broken, tmp_path):
    assert "--image: expected an image file" in one_line(ask(image=tmp_path / "none.png", model=broken()))


def test_no_image_at_all(broken, tmp_path):
    text = tmp_path / "text.png"
    text.write_text("not pixels")
    line = one_line(ask(image=text, model=broken()))
    assert "--image: expected an image file" in line and "cannot be read" in line


def test_truncated_image(broken, scene, tmp_path):
    half = tmp_path / "half.png"
    half.write_bytes(scene.read_bytes()[:4000])
    assert "half.png', which cannot be read: " in one_line(ask(image=half, model=broken()))


def test_an_image_that_the_processor_refuses(broken, monkeypatch):
    def refuse(self, images=None, **rest):
        raise ValueError("absolute aspect ratio must be smaller than 200, got 900\nadvice")

    monkeypatch.setattr("transformers.LlavaProcessor.__call__", refuse)
    assert one_line(ask(model=broken())) == (
        "error: --image: expected what the checkpoint's processor takes, "
        "got: absolute aspect ratio must be smaller than 200, got 900"
    )


def test_missing_checkpoint(tmp_path):
    assert "--model: expected a checkpoint folder" in one_line(ask(model=tmp_path / "none"))


def test_folder_without_a_checkpoint(tmp_path):
    assert "config.json" in one_line(ask(model=tmp_path))


def test_checkpoint_without_weights(broken):
    assert "model.safetensors" in one_line(ask(model=broken()))


def test_damaged_weights(broken, checkpoint):
    model = broken()
    (model / "model.safetensors").write_bytes((checkpoint / "model.safetensors").read_bytes()[:100_000])
    assert "--model: expected whole weight files" in one_line(ask(model=model))


def test_missing_weights(broken, checkpoint):
    model = broken()
    tensors = load_file(checkpoint / "model.safetensors")
    name = next(name for name in tensors if "q_proj" in name)
    del tensors[name]
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    assert "1 missing, first" in one_line(ask(model=model))


def test_weights_that_do_not_fit(broken, checkpoint):
    model = broken(text_config={"intermediate_size": 100})
    shutil.copy(checkpoint / "model.safetensors", model)
    assert "--model: expected weights that fit the configuration" in one_line(ask(model=model))


def test_more_layers_than_configured(broken, checkpoint):
    model = broken(text_config={"num_hidden_layers": 4})
    shutil.copy(checkpoint / "model.safetensors", model)
    assert "--model: expected as many layers in the configuration" in one_line(ask(model=model))


def test_configuration_that_contradicts_itself(broken):
    model = broken(text_config={"num_attention_heads": 7})
    assert "--model: expected a checkpoint folder or a hub id" in one_line(ask(model=model))


@pytest.mark.parametrize("template", ["{% for %}", "{{ raise_exception('only one image') }}"])
def test_chat_template_that_refuses(broken, template):
    model = broken()
    (model / "chat_template.jinja").write_text(template)
    assert "--prompt: expected what the checkpoint's chat template takes" in one_line(ask(model=model))


@pytest.mark.parametrize("name", ["tokenizer.json", "processor_config.json"])
def test_broken_processor(broken, name):
    model = broken()
    (model / name).write_text("{")
    assert "--model: expected a processor and tokenizer" in one_line(ask(model=model))


def test_a_processor_whose_package_is_missing(broken, monkeypatch):
    def fail(source, revision):
        raise ImportError("\nQwen2VLVideoProcessor requires the Torchvision library\nadvice")

    monkeypatch.setattr("vlmprune.checkpoints.AutoProcessor.from_pretrained", fail)
    line = one_line(ask(model=broken()))
    assert "--model: expected a processor and tokenizer in" in line and line.endswith(
        "the Torchvision library"
    )


def test_clip_rows_that_are_no_patches(broken):
    line = one_line(ask(model=broken(vision_feature_select_strategy="full")))
    assert "vision_feature_select_strategy: expected 'default'" in line


def test_text_model(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    line = one_line(ask(model=tmp_path))
    assert "model: expected a vision-language model" in line and "'llama'" in line


def test_unknown_architecture(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "no_such_model"}))
    assert "no_such_model" in one_line(ask(model=tmp_path))


def test_sliding_window_decoder(broken):
    model = broken(text_config={"model_type": "mistral", "sliding_window": 64})
    assert "decoder: expected full attention in every layer" in one_line(
        ask("--policy", "fastv", model=model)
    )


def test_literal_prompt_with_too_few_placeholders(broken, scene):
    line = one_line(ask("--image", scene, prompt="<image> what color ?", model=broken()))
    assert line == "error: --prompt: expected 2 x '<image>', one per --image, got 1"


def test_literal_prompt_without_placeholder(broken):
    model = broken()
    (model / "chat_template.jinja").unlink()
    line = one_line(ask(model=model))
    assert "--prompt: expected a text with '<image>' in it" in line and "no chat template" in line


def test_flash_attention_on_a_cpu(broken):
    line = one_line(ask("--attn", "flash_attention_2", model=broken()))
    assert "--attn: expected sdpa, eager or vlmprune (flash" in line


@pytest.mark.parametrize("target", ["kept.txt", "missing/kept.png"])
def test_picture_that_cannot_be_written(broken, tmp_path, target):
    assert "--save: expected a file" in one_line(ask("--save", tmp_path / target, model=broken()))


def test_cuda_without_a_gpu(checkpoint, scene, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    done = cli("run", "--model", checkpoint, "--image", scene, "--prompt", "x", "--device", "cuda")
    assert "--device: expected auto or cpu" in one_line(done)


def test_process_exits_with_2_and_no_traceback(checkpoint, tmp_path):
    args = ["run", "--model", checkpoint, "--image", tmp_path / "none.png", "--prompt", "x"]
    command = [sys.executable, "-P", "-m", "vlmprune.cli", *map(str, args)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=os.environ)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("error: --image: expected an image file") and done.stderr.count("\n") == 1


BUGS = (KeyError("ours"), ValueError("operands could not be broadcast"), OSError("made up by a library"))


@pytest.mark.parametrize("bug", BUGS, ids=repr)
def test_a_bug_keeps_its_traceback(monkeypatch, bug):
    def fail(path, name):
        raise bug

    monkeypatch.setattr("vlmprune.cli.pictures.open_rgb", fail)
    done = ask()
    assert done.exit_code == 1 and done.exception is bug and done.stderr == ""


EXPECTED = (
    InputError("a: expected b, got c"),
    ModelError("a: expected b, got c"),
    NotPrunedError("a: expected b, got c"),
    BackendError("a: expected b, got c"),
    VersionError("a: expected b, got c"),
    OSError(28, "No space left on device", "kept.png"),
)


@pytest.mark.parametrize("error", EXPECTED, ids=lambda error: type(error).__name__)
def test_what_is_expected_is_one_line_unless_tracebacks_are_asked_for(monkeypatch, error):
    def fail(path, name):
        raise error

    monkeypatch.setattr("vlmprune.cli.pictures.open_rgb", fail)
    assert one_line(ask()) == f"error: {error}"
    monkeypatch.setattr("vlmprune.env.TRACEBACKS", True)
    done = ask()
    assert done.exit_code == 1 and done.exception is error


def test_tracebacks_by_environment_variable():
    command = [sys.executable, "-P", "-c", "from vlmprune import env; print(env.TRACEBACKS)"]
    for value, wanted in (("1", "True"), ("0", "False")):
        done = subprocess.run(
            command, capture_output=True, text=True, env={**os.environ, "VLMPRUNE_DEBUG": value}
        )
        assert done.stdout.strip() == wanted, done.stderr


def test_another_version_of_transformers(checkpoint, scene):
    """The refusal comes while modules are imported, which is no reason for a traceback."""
    code = f"""
import importlib.metadata as metadata, sys
real = metadata.version
metadata.version = lambda name: "6.1.0" if name == "transformers" else real(name)
sys.argv = ["vlmprune", "run", "--model", {str(checkpoint)!r}, "--image", {str(scene)!r}, "--prompt", "hi"]
from vlmprune.cli.main import main
main()
"""
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert (
        done.stderr.startswith("error: transformers: expected transformers>=")
        and done.stderr.count("\n") == 1
    )
    assert done.stderr.endswith(", got 6.1.0\n")


def test_template_that_forgets_the_image():
    class Processor:
        image_token = "<image>"
        chat_template = "any"

        def apply_chat_template(self, messages, **options):
            return messages[0]["content"][-1]["text"]

    with pytest.raises(ValueError, match=r"^prompt: expected 1 x '<image>', one per image, got 0$"):
        build_text(Processor(), "hello", 1)
