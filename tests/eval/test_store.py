"""Answers on disk survive kills: nothing lost, nothing twice, nothing of another run."""

import pytest

from vlmprune.eval.store import Answer, Store, write

SETTINGS = {"model": "m", "dtype": "float32"}


def answer(question, seed=0):
    return Answer("p", question, seed, "läuft\u2028\n", True, False, 0.5, 12.0, 0.01, ((2, "ff"), (5, "3")))


def test_round_trip(tmp_path):
    store = Store(tmp_path / "new", SETTINGS)
    written = [answer("1"), answer("2"), answer("2", seed=1)]
    for each in written:
        store.add(each)
    assert list(Store(tmp_path / "new", SETTINGS).answers.values()) == written


@pytest.mark.parametrize("lost", [1, 5, 60])
def test_a_line_cut_short_is_gone_and_can_come_again(tmp_path, lost):
    store = Store(tmp_path, SETTINGS)
    store.add(answer("1"))
    store.add(answer("2"))
    whole = store.path.read_bytes()
    store.path.write_bytes(whole[:-lost])
    again = Store(tmp_path, SETTINGS)
    assert [key[1] for key in again.answers] == ["1"]
    again.add(answer("2"))
    assert store.path.read_bytes() == whole


def test_no_answer_twice(tmp_path):
    store = Store(tmp_path, SETTINGS)
    store.add(answer("1"))
    with pytest.raises(ValueError, match=r"^answer: expected a new one, got \('p', '1', 0\)$"):
        store.add(answer("1"))
    store.path.write_bytes(store.path.read_bytes() * 2)
    with pytest.raises(ValueError, match=r"answers.jsonl line 2: expected every answer once, got"):
        Store(tmp_path, SETTINGS)


@pytest.mark.parametrize("line", [b"{}", b"[]", b"{", b'{"policy": 1}'])
def test_damage_inside_is_told_with_its_line_and_left_alone(tmp_path, line):
    store = Store(tmp_path, SETTINGS)
    store.add(answer("1"))
    damaged = store.path.read_bytes() + line + b"\n" + b"half"
    store.path.write_bytes(damaged)
    with pytest.raises(ValueError, match=r"answers.jsonl line 2: expected an answer, got"):
        Store(tmp_path, SETTINGS)
    assert store.path.read_bytes() == damaged


def test_other_settings_are_refused(tmp_path):
    Store(tmp_path, SETTINGS)
    said = r"^out: expected a new folder, or one made with dtype = 'bfloat16', got one made with 'float32'$"
    with pytest.raises(ValueError, match=said):
        Store(tmp_path, SETTINGS | {"dtype": "bfloat16"})


def test_answers_without_settings_are_refused(tmp_path):
    (tmp_path / "answers.jsonl").write_text("")
    with pytest.raises(ValueError, match=r"^out: expected a folder with settings.json beside answers.jsonl"):
        Store(tmp_path, SETTINGS)


def test_write_replaces_a_whole_file(tmp_path):
    for data in (b"one", b"two"):
        write(tmp_path / "file", data)
        assert (tmp_path / "file").read_bytes() == data
    assert len(list(tmp_path.iterdir())) == 1
