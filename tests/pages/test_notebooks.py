"""The notebooks run from nothing on the CPU, what their text says of the outputs is true, and what is stored is as tidy."""

import json
import re
import runpy
from pathlib import Path

import pytest

nbformat = pytest.importorskip("nbformat", reason="notebooks run in .venv-pages: make test-pages")
pytest.importorskip("nbclient", reason="notebooks run in .venv-pages: make test-pages")

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "notebooks"
LINK = re.compile(r"\]\(([^)\s#]+)(?:#[^)\s]*)?\)")
MACHINE = re.compile(
    r"site-packages|/home/|/root/|/tmp/|/Users/|[Ww]arning|0x[0-9a-f]{6,}|" + re.escape(str(ROOT))
)
LARGEST = 300_000


class Cells:
    """A notebook's code cells by their ids."""

    def __init__(self, notebook):
        self.code = {cell.id: cell for cell in notebook.cells if cell.cell_type == "code"}

    def text(self, name):
        """What a cell gives as text: a table as Markdown, a value as its repr, printed lines."""
        found = [
            out.text if out.output_type == "stream" else out.data.get("text/markdown", out.data["text/plain"])
            for out in self.code[name].outputs
        ]
        return "".join(found).strip()

    def table(self, name):
        """By first cell the others of each row."""
        rows = [
            [part.strip() for part in line.strip("|").split("|")] for line in self.text(name).splitlines()
        ]
        return {row[0]: row[1:] for row in rows[2:]}

    def pictures(self, name):
        return [out for out in self.code[name].outputs if "image/png" in out.get("data", {})]


def read(name):
    return nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)


def check_outputs(cells):
    """Every cell ran, in order; nothing was raised, warned of or said about the machine."""
    assert [cell.execution_count for cell in cells.code.values()] == list(range(1, len(cells.code) + 1))
    for name, cell in cells.code.items():
        for out in cell.outputs:
            assert out.output_type != "error" and out.get("name") != "stderr", f"{name}: {out}"
            texts = {kind: data for kind, data in out.get("data", {}).items() if kind.startswith("text/")}
            found = MACHINE.search(json.dumps([texts, out.get("text", "")]))
            assert found is None, f"{name}: {found[0]!r} in {texts or out.text}"


TRUTH = "9 11 12 14"


def fastv_loses_the_phone_and_feather_does_not(start):
    answers = eval(start.text("prune"))
    assert start.text("unpruned") == repr(TRUTH) == repr(answers["unpruned"])
    assert answers["FEATHER"] == TRUTH != answers["FastV"]
    assert start.pictures("picture") and start.pictures("look")


def the_table_has_what_the_runs_cost(start):
    table = start.table("compare")
    assert list(table) == ["unpruned", "FastV", "FEATHER"]
    answers, tokens, cuts, seconds = zip(*table.values(), strict=True)
    assert answers[0] == answers[2] == TRUTH != answers[1]
    # 196 in the layers ahead of the first stage: (2 * 196 + 6 * 40) / 8, (2 * 196 + 3 * 80 + 3 * 7) / 8
    assert tokens == ("196", "79", "82")
    assert cuts[0] == "0%" and all(50 < int(cut.rstrip("%")) < 70 for cut in cuts[1:])
    assert all(float(ms) > 0 for ms in seconds)


def the_sweep_counts_right_answers(start):
    hits, cut = eval(start.text("right"))
    scenes = json.loads((ROOT / "examples/glyphworld/images/questions.json").read_text())
    entries = [entry for scene in scenes for entry in scene["qa"]]
    assert len(entries) == 44 and cut == 0.0
    assert hits == sum(entry["model"] == entry["answer"] for entry in entries)
    assert start.pictures("curve")


def the_function_answers_right(new_method):
    assert new_method.text("try_function") == repr(TRUTH)
    assert new_method.pictures("kept") and new_method.pictures("look")


def the_policy_passes_and_the_broken_ones_do_not(new_method):
    count, first = eval(new_method.text("check"))
    assert count > len(first) and "layer 0, a padded batch" in first
    assert new_method.text("broken_count").startswith("layer 0, a padded batch: OneCount(")
    assert "expected nothing, as it has no visual tokens" in new_method.text("broken_count")
    assert new_method.text("broken_mean").startswith("layer 0, alone and in a batch of 3: FromTheMean(")


def methods_are_compared_at_one_cut(new_method):
    table = new_method.table("table")
    assert list(table) == ["unpruned", "Contrast", "DivPrune", "FastV", "Uniform", "Random"]
    assert {row[0] for name, row in table.items() if name != "unpruned"} == {"70%"}
    right = {name: int(row[2].split()[0]) for name, row in table.items()}
    counts = {name: int(row[3].rstrip("%")) for name, row in table.items()}
    assert right["unpruned"] > 90 and right["FastV"] < right["Random"] < right["Contrast"]
    # more of all than with evenly spaced tokens, fewer of the counting questions
    assert right["Contrast"] > right["Uniform"] and counts["Contrast"] < counts["Uniform"]


CLAIMS = {
    "start": (
        fastv_loses_the_phone_and_feather_does_not,
        the_table_has_what_the_runs_cost,
        the_sweep_counts_right_answers,
    ),
    "new_method": (
        the_function_answers_right,
        the_policy_passes_and_the_broken_ones_do_not,
        methods_are_compared_at_one_cut,
    ),
}
SAME = {
    "start": ("load", "unpruned", "prune", "right"),
    "new_method": ("try_function", "check", "broken_count", "broken_mean", "questions"),
}
"""Cells that give the same everywhere: no durations, and no accuracies, of which another CPU may move an answer."""


def test_every_notebook_is_here():
    assert {path.stem for path in FOLDER.glob("*.ipynb")} == set(CLAIMS)


@pytest.mark.parametrize("name", CLAIMS)
def test_what_is_stored_is_whole_and_tidy(name):
    stored = read(name)
    nbformat.validate(stored)
    assert stored.metadata.kernelspec.name == "python3"
    # no version of Python and no times, which change with every run
    assert stored.metadata.language_info == {"name": "python"}
    assert all(cell.metadata == {} for cell in stored.cells)
    assert (FOLDER / f"{name}.ipynb").stat().st_size < LARGEST
    check_outputs(Cells(stored))
    for claim in CLAIMS[name]:
        claim(Cells(stored))


@pytest.mark.parametrize("name", CLAIMS)
def test_links_lead_somewhere(name):
    text = "".join(cell.source for cell in read(name).cells if cell.cell_type == "markdown")
    assert LINK.search(text)
    for link in LINK.findall(text):
        assert link.startswith("https://") or (FOLDER / link).exists(), link


@pytest.mark.parametrize("name", CLAIMS)
def test_runs_and_what_it_says_is_true(name):
    """One test a notebook, so that it runs once however many processes share the tests."""
    execute = runpy.run_path(str(FOLDER / "execute.py"))["execute"]
    fresh, stored = Cells(execute(FOLDER / f"{name}.ipynb")), Cells(read(name))
    check_outputs(fresh)
    for claim in CLAIMS[name]:
        claim(fresh)
    for cell in SAME[name]:
        assert fresh.text(cell) == stored.text(cell) != "", cell
