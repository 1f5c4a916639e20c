"""The example that searches a schedule, on one scene."""

import re
import sys

import search_schedule


def test_it_searches_and_compares(monkeypatch, capsys):
    few = ["--seeds", "70201:70202", "--others", "70202:70203", "--levels", "2", "--tolerance", "1"]
    monkeypatch.setattr(sys, "argv", ["search_schedule.py", *few])
    search_schedule.main()
    lines = capsys.readouterr().out.splitlines()
    # the whole and the first layer's half, then the curves; all of the score may go, so a half stays everywhere
    assert lines[0].startswith("8 scores of ")
    assert "G-Search (0.5, 0.5, 0.5, 0.5, 0.5, 0.5)" in lines[2]
    right, cuts, tokens = zip(
        *(map(float, re.findall(r"[\d.]+", line)[:3]) for line in lines[1:]), strict=True
    )
    assert len(lines) == 6 and all(0 <= share <= 100 for share in right)
    assert (
        cuts[0] == 0 and abs(cuts[1] - cuts[3]) < 1 and abs(tokens[1] - tokens[2]) < 3 and cuts[4] >= cuts[1]
    )
