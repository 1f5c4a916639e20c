"""ACCM's settings, its budget, and what it hands to its compensator; the words in a prompt: tests/models/test_accm.py."""

import os
import pickle
from copy import deepcopy

import pytest
import torch

from helpers import tiny_compensator as tiny
from helpers.methods import echo
from vlmprune.compensation import Caption, Known, Remembering
from vlmprune.errors import InputError
from vlmprune.policies import (
    ACCM,
    ACCMSelection,
    DivPrune,
    FasterVLM,
    FastV,
    Random,
    Reduction,
    Stages,
    Uniform,
    VisionZip,
    VScan,
)
from vlmprune.testing.context import make_context
from vlmprune.testing.words import Words


def accm(selection=None, compensator=echo, **settings):
    return ACCM(selection=selection or FasterVLM(), compensator=compensator, **settings)


@pytest.mark.parametrize("keep", [288, 144, 72, 36, 18])
@pytest.mark.parametrize(
    "selection",
    [FasterVLM(), ACCMSelection(), DivPrune(), Uniform(layer=0), Random(layer=0, spend="image")],
    ids=lambda selection: type(selection).__name__,
)
def test_budgets(selection, keep):
    """Of every selection its own, whatever that was."""
    policy = accm(selection, keep=keep)
    assert policy.kept(576, 1, 0) == keep and policy.kept(1152, 2, 0) == 2 * keep
    assert accm(selection, keep=None).kept(576, 1, 0) == selection.kept(576, 1, 0)


def test_a_budget_of_other_names():
    zipped = VisionZip(dominant=54, contextual=10)
    assert accm(zipped, keep=None).kept(576, 1, 0) == 64
    assert accm(zipped, keep=0.125).kept(576, 1, 0) == 72
    with pytest.raises(InputError, match=r"^keep: expected a share, or None, with .*VisionZip.*, got 36$"):
        accm(zipped)


def test_a_share_of_everything_that_is_kept():
    policy = accm(keep=36).at(0.5)
    assert policy.kept(576, 1, 0) == 288 and policy.keep is None and policy.compensator is echo


def asked_of(policy, images=(((4, 5), (5, 4)), ((2, 10),)), **settings):
    """The compensator's images, and the choice."""
    shown = []

    def noting(cases, candidates):
        shown.extend(cases)
        return echo(cases, candidates)

    policy = accm(policy.selection, noting, keep=policy.keep, **settings)
    ctx = make_context(policy.needs(0), images, 0)
    return shown, policy.select(ctx), ctx


@pytest.mark.parametrize(
    "selection", [FasterVLM(), VisionZip(dominant=4, contextual=2, positions="keep")], ids=["drops", "merges"]
)
def test_the_choice_is_the_selections(selection):
    keep = None if isinstance(selection, VisionZip) else 5
    shown, choice, ctx = asked_of(accm(selection, keep=keep))
    inner = accm(selection, keep=keep).selected.select(ctx)
    inner = inner if isinstance(inner, Reduction) else Reduction(inner)
    assert torch.equal(choice.index, inner.index) and choice.positions == inner.positions
    assert (choice.hidden is None) == (inner.hidden is None)
    lost = [
        sorted(set(range(40)) - set(choice.index[0].tolist())),
        sorted(set(range(20)) - set(choice.index[1].tolist())),
    ]
    assert [x.dropped.tolist() for x in shown] == [
        [i for i in lost[0] if i < 20],
        [i - 20 for i in lost[0] if i >= 20],
        lost[1],
    ]
    for x, (b, first) in zip(shown, ((0, 0), (0, 20), (1, 0)), strict=True):
        assert torch.equal(x.features, ctx.hidden[b, first : first + 20])


def test_the_rows_that_join():
    """The wording with the text in it, embedded by the model's table, cut off at what an image loses."""
    words = ["w1 w2", "", "w3 " * 30]
    policy = accm(FasterVLM(), Known(words), keep=6, wording="w9 {} w8")
    ctx = make_context(policy.needs(0), [[(4, 5), (5, 4)], [], [(2, 10)]], 0)
    texts = policy.select(ctx).inserted
    assert texts.sizes == ((4, 0), (), (14,))
    assert torch.equal(texts.hidden[0, :4], ctx.embed(torch.tensor([9, 1, 2, 8])))
    assert torch.equal(texts.hidden[2], ctx.embed(torch.tensor([9, *[3] * 13])))
    assert [[caption.text for caption in sample] for sample in texts.captions] == [words[:2], [], words[2:]]
    for b, own in enumerate(texts.before):
        assert len(own) == len(texts.sizes[b]) and all(ctx.tokens[b, at] != 49 for at in own)


def test_what_is_asked_can_be_changed():
    shown, _, _ = asked_of(accm(keep=5), question=lambda text: text.split()[0])
    assert all(len(x.question.split()) == 1 for x in shown)
    with pytest.raises(
        InputError, match=r"^prompt, sample 0: expected a question about its images, got none$"
    ):
        asked_of(accm(keep=5), question=lambda text: " ")
    with pytest.raises(InputError, match=r"^question: expected a function that returns a text, got one that"):
        asked_of(accm(keep=5), question=lambda text: None)


@pytest.mark.parametrize("wording, text", [("w9 {} {w8} {0}", "{w1} {}"), ("{}", "w1")])
def test_braces_are_braces(wording, text):
    policy = accm(FasterVLM(), lambda images, candidates: [text], keep=5, wording=wording)
    ctx = make_context(policy.needs(0), [[(4, 5)]], 0)
    ids = ctx.tokenizer()(wording.replace("{}", text, 1), add_special_tokens=False)["input_ids"]
    assert torch.equal(policy.select(ctx).inserted.hidden[0], ctx.embed(torch.tensor(ids)))


def test_a_text_of_blanks_is_no_text():
    policy = accm(FasterVLM(), lambda images, candidates: [" \n"], keep=5)
    ctx = make_context(policy.needs(0), [[(4, 5)]], 0)
    assert policy.select(ctx).inserted.sizes == ((0,),)


def test_a_tokenizer_of_another_model_is_refused():
    policy = accm(FasterVLM(), echo, keep=5)
    ctx = make_context(policy.needs(0), [[(4, 5)]], 0)
    ctx.__dict__["embed"] = torch.nn.Embedding(3, 32)
    with pytest.raises(InputError, match=r"^tokenizer: expected the model's, of at most 3 tokens, got token"):
        policy.select(ctx)


def test_the_same_again_costs_nothing():
    calls = []

    def counting(images, candidates):
        calls.append(len(images))
        return [Caption("w1", flops=7)] * len(images)

    policy = accm(FasterVLM(), counting, keep=5)
    ctx = make_context(policy.needs(0), [[(4, 5)], [(2, 10)]], 0)
    costs = [[c.flops for (c,) in policy.select(ctx).inserted.captions] for _ in range(2)]
    assert costs == [[7, 7], [0, 0]] and calls == [2]
    policy.forget()
    assert policy.select(ctx).inserted.captions[0][0].flops == 7 and calls == [2, 2]
    copy = deepcopy(policy)
    assert copy == policy and copy.select(ctx) and len(calls) == 3  # a copy has a memory of its own
    Stages([policy]).forget()
    (Uniform(layer=0) | Random(layer=0)).forget()


def test_a_memory_of_the_callers_own_is_used():
    own = Remembering(echo, entries=2)
    policy = accm(FasterVLM(), own, keep=5)
    ctx = make_context(policy.needs(0), [[(4, 5)]], 0)
    policy.select(ctx), policy.select(ctx)
    assert own.hits == 1


def test_it_is_a_value():
    policy = accm(keep=18, candidates=2)
    assert pickle.loads(pickle.dumps(policy)) == policy != accm(keep=36, candidates=2)
    assert hash(policy) == hash(accm(keep=18, candidates=2))
    assert policy.to_dict()["compensator"] == "helpers.methods:echo"
    assert policy.to_dict()["selection"]["policy"] == "fastervlm"


class Processor:
    """Has a tokenizer, and is none."""

    tokenizer = chat_template = None

    def __call__(self, images=None, text=None): ...

    def decode(self, ids): ...


def test_its_text_is_the_same_in_every_run():
    """`vlmprune eval` goes on by it: no address, and functions of different modules differ."""
    policy = accm(keep=18, question=echo, tokenizer=Words())
    shown = (
        "compensator=helpers.methods:echo, keep=18, candidates=3, wording='additional information: {}\\n', "
    )
    assert shown + "question=helpers.methods:echo)" in repr(policy)
    assert repr(policy).startswith(
        "ACCM(earlier_kv='full', rectify=False, selection=FasterVLM("
    ) and " at 0x" not in repr(policy)


WRONG = {
    "selection": [FastV(), VScan(), Stages([FasterVLM(), FastV()]), "fastervlm", None, accm()],
    "compensator": ["no such folder", None, 3],
    "keep": [0, -1, 0.0, 1.5, "36", True],
    "candidates": [0, -1, 1.5, True],
    "wording": ["no place", "{} and {}", None],
    "tokenizer": [3, "folder", Processor()],
    "question": ["what"],
}


@pytest.mark.parametrize("name, value", [(name, value) for name, values in WRONG.items() for value in values])
def test_bad_settings_are_named(name, value):
    with pytest.raises(InputError, match=rf"^{name}: expected .*, got "):
        ACCM(**{"selection": FasterVLM(), "compensator": echo} | {name: value})


def test_half_a_prompt_is_refused():
    policy = accm(keep=5)
    ctx = make_context(policy.needs(0), [[(4, 5)]], 0)
    ctx.__dict__["shares"] = (0.5,)
    with pytest.raises(InputError, match=r"^prefill_chunk_size: expected None with ACCM"):
        policy.select(ctx)


def test_a_folder_is_named_with_the_time_of_its_weights(tmp_path):
    """Results go by this text: trained further, the same folder says something else."""
    tiny.describer().save_pretrained(tmp_path / "saved")
    policy = accm(compensator=str(tmp_path / "saved"))
    first = repr(policy)
    assert f"compensator={str(tmp_path / 'saved')!r} of 20" in first
    for weights in (tmp_path / "saved").rglob("*.safetensors"):
        os.utime(weights, (0, 0))
    assert repr(policy) == first.replace(first.split(" of ")[1].split(",")[0], "1970-01-01T00:00:00Z")
    assert policy == accm(compensator=str(tmp_path / "saved"))
