"""The example of one's own compensators: what each says is what the answer then is."""

import runpy
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "examples" / "plug_in_words.py"


@pytest.mark.cpu("the script runs where it is")
def test_words_are_believed(capsys):
    runpy.run_path(str(SCRIPT))["main"]()
    rows = [line.rsplit("->", 1) for line in capsys.readouterr().out.splitlines()]
    said = {name.split("  ")[0].strip(): answer.strip() for name, answer in rows}
    assert said.pop("no words") != "R Z C"  # 6 of 196 tokens do not show it
    assert said.pop("another's string") == "A B C"
    assert len(said) == 3 and {*said.values()} == {"R Z C"}
