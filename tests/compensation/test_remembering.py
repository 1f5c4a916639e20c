"""Captions are written once for the same image and question, and texts known before plug in."""

import copy
import pickle
import threading

import pytest
import torch

from vlmprune.compensation import Caption, Discarded, Known, Remembering
from vlmprune.compensation.captions import captions_of
from vlmprune.errors import InputError


class Counting:
    """Says which question it was asked the how-manieth time."""

    def __init__(self):
        self.calls = []

    def __call__(self, images, candidates):
        start = sum(len(call) for call in self.calls)
        self.calls.append([image.question for image in images])
        return [Caption(f"{image.question} {start + i}", ("x",), 7) for i, image in enumerate(images)]


def image(question="what", seed=0, dropped=(1, 2), dtype=torch.float32):
    features = torch.randn(4, 6, generator=torch.Generator().manual_seed(seed)).to(dtype)
    return Discarded(features, torch.tensor(dropped, dtype=torch.long), question)


def told(captions):
    return [(c.text, c.candidates, c.flops) for c in captions]


def test_only_the_unseen_is_asked_each_once_in_one_call():
    remembering = Remembering(Counting())
    first = remembering([image(), image("where"), image()], 3)
    assert told(first) == [("what 0", ("x",), 7), ("where 1", ("x",), 7), ("what 0", ("x",), 0)]
    second = remembering([image("where"), image("who"), image()], 3)
    assert told(second) == [("where 1", ("x",), 0), ("who 2", ("x",), 7), ("what 0", ("x",), 0)]
    assert remembering.compensator.calls == [["what", "where"], ["who"]] and remembering.hits == 3
    remembering([image()], 3)
    assert len(remembering.compensator.calls) == 2


@pytest.mark.parametrize(
    "other, candidates",
    [
        (image("where"), 3),
        (image(seed=1), 3),
        (image(dropped=(1, 3)), 3),
        (image(dropped=()), 3),
        (image(dtype=torch.bfloat16), 3),
        (image(dtype=torch.float16), 3),
        (Discarded(image().features.reshape(6, 4), image().dropped, "what"), 3),
        (image(), 2),
    ],
)
def test_whatever_differs_is_another_image(other, candidates):
    remembering = Remembering(Counting())
    remembering([image()], 3)
    remembering([other], candidates)
    assert remembering.hits == 0 and len(remembering.compensator.calls) == 2
    remembering([other], candidates)
    assert remembering.hits == 1


def test_strides_and_gradients_do_not_matter():
    remembering = Remembering(Counting())
    plain = image(dtype=torch.bfloat16)
    turned = plain.features.T.contiguous().T.requires_grad_()
    remembering([plain], 1)
    with torch.inference_mode():
        remembering([Discarded(turned, plain.dropped, "what")], 1)
    assert remembering.hits == 1


def test_the_one_not_asked_for_longest_is_forgotten():
    remembering = Remembering(Counting(), entries=2)
    for question in ("a", "b", "a", "c", "a", "b"):
        remembering([image(question)], 1)
    assert remembering.compensator.calls == [["a"], ["b"], ["c"], ["b"]]
    many = remembering([image(question) for question in "defg"], 1)
    assert [c.text.split()[0] for c in many] == [*"defg"]
    remembering.clear()
    remembering([image("g")], 1)
    assert remembering.compensator.calls[-1] == ["g"]


def test_copies_start_empty():
    remembering = Remembering(Counting(), entries=5)
    remembering([image()], 1)
    remembering([image()], 1)
    for copied in (copy.deepcopy(remembering), pickle.loads(pickle.dumps(Remembering(Known(["a"]), 5)))):
        assert copied.entries == 5 and copied.hits == 0
        assert copied.compensator is not remembering.compensator
        copied([image()], 1)
        assert copied.hits == 0


def test_many_threads():
    remembering = Remembering(Counting(), entries=8)
    wrong = []

    def ask(seed):
        for turn in range(60):
            question = f"q{(turn + seed) % 12}"
            (caption,) = remembering([image(question)], 1)
            if caption.text.split()[0] != question:
                wrong.append(caption)

    threads = [threading.Thread(target=ask, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and len(remembering._captions) == 8


def test_bare_strings_are_captions():
    remembering = Remembering(lambda images, candidates: [image.question for image in images])
    assert told(remembering([image("a"), image("b")], 1)) == [("a", (), 0), ("b", (), 0)]


@pytest.mark.parametrize(
    "answer, message",
    [
        (["a"], "what reader returns: expected 2 captions, one an image, got 1"),
        ("ab", "what reader returns: expected a list of 2 captions, got str"),
        (None, "what reader returns: expected a list of 2 captions, got NoneType"),
        (["a", 3], "what reader returns: expected str or Caption for each image, got int"),
        (["a", Caption(None)], "what reader returns: expected captions of text, got None"),
    ],
)
def test_a_compensator_that_answers_something_else_is_named(answer, message):
    def reader(images, candidates):
        return answer

    with pytest.raises(InputError, match=message):
        captions_of(reader, [image("a"), image("b")], 1)
    with pytest.raises(InputError, match=message):
        Remembering(reader)([image("a"), image("b")], 1)


def test_bad_settings():
    for entries in (0, -1, 2.5, True):
        with pytest.raises(InputError, match=f"entries: expected a positive int, got {entries}"):
            Remembering(Counting(), entries)
    with pytest.raises(InputError, match="compensator: expected a callable"):
        Remembering("words")


def test_known_texts():
    texts = ["STOP", ""]
    known = Known(texts)
    texts.append("later")
    assert told(known([image(), image()], 3)) == [("STOP", (), 0), ("", (), 0)]
    message = "Known.texts: expected one text for each image of the prompts, 3, got 2"
    with pytest.raises(InputError, match=message):
        known([image()] * 3, 1)
    several = [image(seed=seed) for seed in (0, 0, 1, 1)]  # copies of a prompt
    assert [caption.text for caption in Known(["a", "b"])(several)] == ["a", "a", "b", "b"]
    with pytest.raises(
        InputError, match=r"texts: expected one text for each image, \[text, ...\], got 'STOP'"
    ):
        Known("STOP")
    with pytest.raises(InputError, match="texts: expected strings, got 3"):
        Known(["a", 3])
