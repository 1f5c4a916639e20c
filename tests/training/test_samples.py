"""Lines in, samples out; every epoch has all of them, in an order that the seed fixes."""

import json

import pytest

from helpers.describers import write_data
from vlmprune.errors import InputError
from vlmprune.training.samples import Sample, Samples, read_samples


@pytest.fixture
def file(tmp_path):
    return write_data(tmp_path / "data")


def test_a_file_and_its_folder_are_the_same(file):
    found, again = read_samples(file), read_samples(str(file.parent))
    assert found.items == again.items and found.digest == again.digest
    first, last = found.items[0], found.items[-1]
    assert first.question == "locate the green phone ." and "<image>" in last.question
    assert first.where == f"{file}:1" and first.answer == "9 11 12 14" and first.image.is_file()


def test_every_epoch_has_each_sample_once_in_another_order():
    samples = Samples([Sample(str(i), None, "", "") for i in range(10)], "")
    stream = [sample.where for step in range(10) for sample in samples.batch(step, 3, seed=1)]
    epochs = [stream[at : at + 10] for at in (0, 10, 20)]
    assert all(sorted(epoch) == sorted(map(str, range(10))) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert stream[9:12] == [sample.where for sample in samples.batch(3, 3, seed=1)]  # wherever one starts
    assert [sample.where for sample in samples.batch(0, 10, seed=2)] != epochs[0]


@pytest.mark.parametrize(
    "change, said",
    [
        (lambda line: "{", ":2: expected a JSON object, got '{'"),
        (lambda line: "[1]", r":2: expected a JSON object, got \[1\]"),
        (
            lambda line: line | {"image": "none.png"},
            ":2: expected an image file, named from the folder of the data",
        ),
        (lambda line: line | {"question": " "}, ":2: expected a text as 'question', got ' '"),
        (lambda line: line | {"answer": 3}, ":2: expected a text as 'answer', got 3"),
        (
            lambda line: {"image": line["image"], "answer": "yes"},
            ":2: expected a text as 'question', got None",
        ),
        (lambda line: {"question": "what", "answer": "yes"}, ":2: expected a text as 'image', got None"),
    ],
)
def test_a_bad_line_is_named(file, change, said):
    lines = file.read_text().split("\n")
    changed = change(json.loads(lines[1]))
    lines[1] = changed if isinstance(changed, str) else json.dumps(changed)
    file.write_text("\n".join(lines))
    with pytest.raises(InputError, match=said):
        read_samples(file)


def test_captions_in_place_of_answers(file):
    lines = [json.loads(line) for line in file.read_text().split("\n")]
    with pytest.raises(InputError, match=":1: expected a text as 'caption', got None"):
        read_samples(file, "caption")
    file.write_text("\n".join(json.dumps(line | {"caption": "a cup", "answer": None}) for line in lines))
    assert {(sample.caption, sample.answer) for sample in read_samples(file, "caption").items} == {
        ("a cup", "")
    }


def test_no_data(file, tmp_path):
    file.write_text("\n \n")
    with pytest.raises(InputError, match=r"^data: expected at least one line in .*, got none$"):
        read_samples(file)
    with pytest.raises(
        InputError, match=r"^data: expected a JSONL file, or a folder with a questions.jsonl, got"
    ):
        read_samples(tmp_path)
    file.write_bytes(b"\xff")
    with pytest.raises(InputError, match="expected UTF-8 text, got invalid start byte"):
        read_samples(file)
