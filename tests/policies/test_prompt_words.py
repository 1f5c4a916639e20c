"""What is asked, and where a text about an image belongs, under templates and tokens of many kinds."""

import pytest

from helpers.words import ASSISTANT, BLANK, CLOSE, OPEN, TEMPLATE, USER, make_tokenizer
from vlmprune.errors import InputError
from vlmprune.policies.parts.prompt_words import closes, places_behind, question_of, turn_of, without_special

I = 199  # noqa: E741
CHATML = (
    "{% if messages[0]['role'] != 'system' %}<s> w80 w81 </s> {% endif %}{% for m in messages %}<s> {{ m['role'] }} "
    "{{ m['content'] }} </s> {% endfor %}{% if add_generation_prompt %}<s> assistant {% endif %}"
)
"""Of tokenizers of language models: contents are texts, a system prompt comes first."""
TIGHT = (
    "{% for m in messages %}<img>{{ 'w90' if m['role'] == 'user' else 'w91' }} {{ m['content'] }}</img>{% endfor %}"
    "{% if add_generation_prompt %}<img>w91{% endif %}"
)
"""Its turns begin and end with special tokens, beside which decoding puts blanks."""
STRICT = "{{ raise_exception('roles must alternate') }}"


@pytest.mark.parametrize(
    "template, turn",
    [
        (TEMPLATE, ("w90", "w91")),
        (CHATML, ("</s> <s> user", "</s> <s> assistant")),
        (None, ("", "")),
        (STRICT, ("", "")),
        ("{{ messages[0]['content'] }}", ("", "")),
        (TIGHT, ("<img>w90", "</img><img>w91")),
        ({"default": TEMPLATE, "tool_use": CHATML}, ("w90", "w91")),
        ({"rag": TEMPLATE, "tool_use": CHATML}, ("", "")),
    ],
    ids=["lists", "texts", "none", "refuses", "first turn only", "special", "several", "several, no default"],
)
def test_the_turn_of_a_template(template, turn):
    assert turn_of(make_tokenizer(template=template)) == turn


@pytest.mark.parametrize(
    "ids, question",
    [
        ([USER, I, BLANK, 5, 6, ASSISTANT], "w5 w6"),
        ([USER, I, CLOSE, 5, OPEN, I, CLOSE, BLANK, 6, 7, ASSISTANT], "w6 w7"),
        ([USER, 5, I, ASSISTANT], "w5"),
        ([USER, I, ASSISTANT], ""),
        ([USER, 8, I, 5, ASSISTANT, 6, 2, USER, 7, I, BLANK, ASSISTANT], "w7"),
        ([USER, 8, I, 5, ASSISTANT, 6, 2, USER, I, ASSISTANT], ""),
        ([USER, I, 5, USER, 6, ASSISTANT], "w5 w90 w6"),
        ([USER, I, 5, ASSISTANT, 6, 2, USER, 7, 8, ASSISTANT], "w7 w8"),
        ([USER, I, 5, ASSISTANT, 30, 31, 2], "w5"),
        ([-1, -1, USER, I, 5, ASSISTANT, -1], "w5"),
    ],
    ids=[
        "line end",
        "two images",
        "asked before",
        "nothing asked",
        "asked before, later",
        "nothing asked later",
        "a header within",
        "latest turn",
        "with its answer",
        "padded",
    ],
)
def test_the_question(ids, question):
    last = max(i for i, token in enumerate(ids) if token == I)
    assert question_of(ids, last, make_tokenizer()) == question


def test_special_tokens_of_turns():
    """Blanks beside them do not hide a turn's end, and none of them closes an image."""
    tokenizer = make_tokenizer(template=TIGHT)
    assert question_of([OPEN, USER, I, 5, 6, CLOSE, OPEN, ASSISTANT], 2, tokenizer) == "w5 w6"
    later = [OPEN, USER, I, 5, CLOSE, OPEN, ASSISTANT, 6, CLOSE, OPEN, USER, 7, CLOSE, OPEN, ASSISTANT]
    assert question_of(later, 2, tokenizer) == "w7"
    before = [OPEN, USER, 5, I, CLOSE, OPEN, ASSISTANT]
    assert question_of(before, 3, tokenizer) == "w5"
    assert places_behind(before, [(3, 3)], tokenizer) == [4]


def test_words_are_no_special_tokens():
    tokenizer = make_tokenizer()
    tokenizer.add_tokens("<row>", special_tokens=True)  # which all_special_tokens does not have
    assert without_special("a\n{b}<image></s> <row>c", tokenizer) == "a\n{b}    c"


def test_without_a_template_all_behind_the_image_is_asked():
    assert question_of([USER, I, BLANK, 5, ASSISTANT], 1, make_tokenizer(template=None)) == "w5 w91"


@pytest.mark.parametrize(
    "ids, behind",
    [
        ([1, USER, I, I, 5, ASSISTANT], [4]),
        ([1, USER, I, BLANK, BLANK, 5, ASSISTANT], [5]),
        ([1, USER, OPEN, I, CLOSE, 5, ASSISTANT], [5]),
        ([1, USER, OPEN, I, CLOSE, OPEN, I, CLOSE, 5, ASSISTANT], [5, 8]),
        ([1, USER, OPEN, I, OPEN, I, OPEN, 5, ASSISTANT], [5, 7]),
        ([1, USER, I, BLANK, I, BLANK, 5, ASSISTANT], [4, 6]),
        ([1, USER, I, 5, I, 6, ASSISTANT], [3, 5]),
        ([1, USER, 5, OPEN, I, CLOSE, 2, USER], [6]),
        ([1, USER, I, BLANK], [3]),
        ([1, USER, I, BLANK, -1, -1], [3]),
    ],
    ids=[
        "nothing closes it",
        "line ends",
        "special tokens",
        "closed, then opened",
        "one token between, which closes",
        "line ends between",
        "words between",
        "the turn ends",
        "the prompt ends",
        "padding follows",
    ],
)
def test_places_behind_images(ids, behind):
    images, at = [], 0
    while at < len(ids):
        if ids[at] == I:
            end = at
            while end + 1 < len(ids) and ids[end + 1] == I:
                end += 1
            images.append((at, end))
            at = end
        at += 1
    assert places_behind(ids, images, make_tokenizer()) == behind


def test_an_image_at_the_end():
    with pytest.raises(InputError, match=r"^prompt: expected words behind its last image, got none$"):
        places_behind([1, USER, 5, I], [(3, 3)], make_tokenizer())


def test_what_closes_an_image():
    tokenizer = make_tokenizer()
    assert [closes(token, tokenizer) for token in (BLANK, CLOSE, 5, 0, 1, 2, -1)] == [True, True] + [
        False
    ] * 5
