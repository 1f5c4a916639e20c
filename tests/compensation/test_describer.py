"""The compensator of ACCM as a whole: choice, cost, and a folder that a kill leaves usable."""

import json
import shutil

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from helpers import tiny_compensator as tiny
from vlmprune.compensation import Describer, load_compensator
from vlmprune.errors import InputError


def test_the_selector_chooses_from_what_the_captioner_writes():
    describer, images = tiny.describer(), tiny.images()
    texts = describer.captioner.write(images, 3)
    logits = describer.selector([image.question for image in images], texts)
    captions = describer(images, 3)
    assert [caption.candidates for caption in captions] == [tuple(row) for row in texts]
    assert [c.text for c in captions] == [
        row[i] for row, i in zip(texts, logits.argmax(1).tolist(), strict=True)
    ]
    assert any(c.text != c.candidates[0] for c in captions)


def test_without_selector_or_choice_the_likeliest_is_taken():
    describer, images = tiny.describer(), tiny.images()
    alone = Describer(describer.captioner)
    assert all(c.text == c.candidates[0] and len(c.candidates) == 3 for c in alone(images, 3))
    assert describe(describer, images, 1) == describe(alone, images, 1)


def describe(describer, images, candidates):
    return [(c.text, c.candidates, c.flops) for c in describer(images, candidates)]


def test_all_images_in_one_search_and_one_choice(monkeypatch):
    describer, calls = tiny.describer(), []
    generate, judge = describer.captioner.language_model.generate, describer.selector.judge
    monkeypatch.setattr(
        describer.captioner.language_model, "generate", lambda **k: calls.append("generate") or generate(**k)
    )
    monkeypatch.setattr(describer.selector, "judge", lambda *a: calls.append("judge") or judge(*a))
    assert len(describer(tiny.images(), 3)) == 4
    assert calls == ["generate", "judge"]


def test_the_same_every_time_in_any_mode():
    describer, images = tiny.describer(), tiny.images()
    expected = describe(describer, images, 3)
    describer.train()
    assert describe(describer, images, 3) == expected
    assert describer.selector.blocks[0].training
    with torch.inference_mode():
        assert describe(describer, images, 3) == expected


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
@pytest.mark.parametrize("candidates", [1, 3])
def test_flops_are_those_that_run(kind, candidates):
    describer, images = tiny.describer(kind), tiny.images()
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        captions = describer(images, candidates)
    assert sum(c.flops for c in captions) == pytest.approx(counter.get_total_flops(), rel=0.02)
    assert len({c.flops for c in captions}) == 1


def test_save_and_load(tmp_path):
    describer, images = tiny.describer("llama"), tiny.images()
    describer.train().save_pretrained(tmp_path / "made")
    loaded = load_compensator(str(tmp_path / "made"))
    ours, theirs = describer.state_dict(), loaded.state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert describe(loaded, images, 3) == describe(describer, images, 3)
    assert not any(module.training for module in loaded.modules())
    files = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.safetensors")}
    assert files == {"made/captioner/model.safetensors", "made/selector/model.safetensors"}

    Describer(describer.captioner).save_pretrained(tmp_path / "made")
    assert load_compensator(tmp_path / "made").selector is None
    assert [path.name for path in tmp_path.iterdir()] == ["made"]


class KilledError(BaseException):
    """As a signal would end it."""


def test_a_killed_save_leaves_the_old_one(tmp_path, monkeypatch):
    """Wherever it is killed: while writing, or between the two steps of replacing."""
    old, new = Describer(tiny.captioner()), Describer(tiny.captioner("llama"))
    folder = tmp_path / "made"
    old.save_pretrained(folder)
    images, expected = tiny.images(), describe(old, tiny.images(), 2)

    def killed(*_, **__):
        raise KilledError

    with monkeypatch.context() as patch, pytest.raises(KilledError):
        patch.setattr(new.captioner.tokenizer, "save_pretrained", killed)
        new.save_pretrained(folder)
    assert describe(load_compensator(folder), images, 2) == expected

    rename = type(folder).rename

    def killed_second(path, target):
        return killed() if path.name.endswith(".new") else rename(path, target)

    with monkeypatch.context() as patch, pytest.raises(KilledError):
        patch.setattr(type(folder), "rename", killed_second)
        new.save_pretrained(folder)
    assert not folder.exists()
    assert describe(load_compensator(folder), images, 2) == expected

    with monkeypatch.context() as patch, pytest.raises(KilledError):
        patch.setattr(new.captioner.tokenizer, "save_pretrained", killed)
        new.save_pretrained(folder)
    assert describe(load_compensator(folder), images, 2) == expected
    new.save_pretrained(folder)
    assert describe(load_compensator(folder), images, 2) == describe(new, images, 2)
    assert [path.name for path in tmp_path.iterdir()] == ["made"]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved") / "made"
    tiny.describer().save_pretrained(folder)
    return folder


def test_folders_that_are_no_compensator(saved, tmp_path):
    with pytest.raises(
        InputError, match=r"folder: expected a folder of a compensator, got .*nowhere, which does"
    ):
        load_compensator(tmp_path / "nowhere")
    with pytest.raises(
        InputError, match=r"folder: expected one that a compensator was saved in, with compensator.j"
    ):
        load_compensator(saved / "captioner")


def damaged(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "damaged")


def test_a_missing_part(saved, tmp_path):
    folder = damaged(saved, tmp_path)
    shutil.rmtree(folder / "selector")
    with pytest.raises(
        InputError, match=r"selector: expected config.json and weights, got none in .*selector"
    ):
        load_compensator(folder)
    shutil.rmtree(folder / "captioner" / "tokenizer")
    with pytest.raises(InputError, match=r"captioner: expected a checkpoint in .*, got "):
        load_compensator(folder)


def test_a_part_that_is_something_else(saved, tmp_path):
    folder = damaged(saved, tmp_path)
    shutil.copy(folder / "selector" / "config.json", folder / "captioner" / "config.json")
    with pytest.raises(
        InputError, match="captioner: expected a checkpoint of accm_captioner, got accm_selector in"
    ):
        load_compensator(folder)
    (folder / "captioner" / "config.json").write_text("{")
    with pytest.raises(InputError, match="captioner: expected a checkpoint in"):
        load_compensator(folder)
    (folder / "compensator.json").write_text("{}")
    with pytest.raises(InputError, match=r"compensator.json: expected a list of parts, got 'parts' in"):
        load_compensator(folder)
    (folder / "compensator.json").write_text(json.dumps({"parts": ["other"]}))
    with pytest.raises(
        InputError, match=r"compensator.json: expected the parts captioner and, if any, selector, got"
    ):
        load_compensator(folder)


def test_weights_that_are_missing_or_damaged(saved, tmp_path):
    folder = damaged(saved, tmp_path)
    config = json.loads((folder / "captioner" / "config.json").read_text())
    (folder / "captioner" / "config.json").write_text(json.dumps(config | {"layers": 5}))
    with pytest.raises(
        InputError, match=r"captioner: expected all weights of a accm_captioner in .*missing_keys"
    ):
        load_compensator(folder)
    (folder / "captioner" / "config.json").write_text(json.dumps(config))
    weights = folder / "captioner" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(InputError, match=r"captioner: expected a checkpoint in .*, got "):
        load_compensator(folder)
    weights.unlink()
    with pytest.raises(InputError, match=r"captioner: expected a checkpoint in .*, got "):
        load_compensator(folder)
