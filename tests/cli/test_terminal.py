"""What a person at a terminal sees beside the results: progress, ``--verbose``, nearest names; and how soon."""

import json
import logging
import re
import subprocess
import sys
from contextlib import contextmanager

import pytest
from rich.console import Console
from transformers.utils import logging as theirs

from helpers.command_line import CHECKPOINT, SCENE, ask, cli
from vlmprune import ops
from vlmprune.bench import FullSize
from vlmprune.checkpoints import Checkpoint
from vlmprune.cli import accm, run
from vlmprune.cli.console import OPEN, progress_bar, table, waiting
from vlmprune.errors import InputError, nearest
from vlmprune.policies import FastV, policy_from
from vlmprune.policies.methods.accm import WORDING

FASTV = "fastv:layer=2,keep=0.25"


@pytest.fixture
def terminal(monkeypatch):
    """stderr as a terminal of 80 columns, which pytest's is not."""
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "80")


def weights(count):
    """Iterated over as transformers does while it loads weights."""
    return theirs.tqdm({f"weight {n}": n for n in range(count)}.items(), desc="Loading weights")


def test_a_bar_shows_what_was_told(terminal, capsys):
    with progress_bar("reading") as tell:
        task = tell.bar.tasks[0]
        assert (task.description, task.total) == ("reading", None)
        tell("answers", 3, 12)
        task = tell.bar.tasks[0]
        assert (task.description, task.completed, task.total) == ("answers", 3, 12)
        tell.bar.refresh()
        tell("drawing", 0, 0)
        assert tell.bar.tasks[0].total is None and len(tell.bar.tasks) == 1
    shown = capsys.readouterr()
    assert shown.out == "" and "answers" in shown.err and "3/12" in shown.err


def test_a_bar_counts_weights_that_are_loaded_inside(terminal, capsys):
    seen = []
    with progress_bar("loading it") as tell:
        for name, _ in weights(3):
            task = tell.bar.tasks[0]
            seen.append((name, task.description, task.completed, task.total))
        assert tell.bar.tasks[0].total is None
        other = theirs.tqdm([1, 2], desc="something else")
        assert list(other) == [1, 2] and tell.bar.tasks[0].total is None
    assert seen == [(f"weight {n}", "loading it", n, 3) for n in range(3)]
    assert theirs.set_tqdm_hook(None) is None  # as it was


def test_a_bar_leaves_transformers_as_it_was_after_an_error(terminal, capsys):
    with pytest.raises(InputError), progress_bar():
        raise InputError("a: expected b, got c")
    assert theirs.set_tqdm_hook(None) is None


def test_the_words_of_a_bar_are_no_markup(terminal, capsys):
    with progress_bar("loading a[0]/[bold]") as tell:
        tell.bar.refresh()
    assert "loading a[0]/[bold]" in capsys.readouterr().err


def test_nothing_is_shown_elsewhere(capsys):
    with waiting("importing"), progress_bar("loading") as tell:
        tell("answers", 1, 2)
        assert theirs.set_tqdm_hook(None) is None
    assert capsys.readouterr() == ("", "")


def test_a_run_tells_which_policy_which_run_and_how_many_tokens(monkeypatch):
    told = []

    @contextmanager
    def recorder(doing):
        told.append((doing, 0, 0))
        yield lambda *args: told.append(args)

    monkeypatch.setattr(run, "progress_bar", recorder)
    done = ask("--policy", FASTV, "--compare", "--repeat", 2, "--json", "--max-new-tokens", 3)
    assert done.exit_code == 0, done.stderr
    assert told[0] == (f"loading {CHECKPOINT}", 0, 0)
    assert [one for one in told if "timed" in one[0]] == [
        ("1 of 2, timed run 1 of 2: unpruned", 1, 6),
        ("1 of 2, timed run 2 of 2: unpruned", 2, 6),
        (f"2 of 2, timed run 1 of 2: {FASTV}", 4, 6),
        (f"2 of 2, timed run 2 of 2: {FASTV}", 5, 6),
    ]
    warm_up = [one for one in told if "warm-up" in one[0] and FASTV in one[0]]
    assert warm_up == [(f"2 of 2, warm-up, {n} tokens: {FASTV}", 3, 6) for n in range(4)]


def test_the_table_of_three_policies_fits_80_columns(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    more = ("--policy", "feather:layers=2/5,keep=0.3", "--policy", "uniform:layer=2,stride=2")
    shown = ask("--policy", FASTV, *more, "--compare", "--repeat", 1).stdout
    assert all(len(line) <= 80 for line in shown.splitlines()) and "…" not in shown
    rows = {line.split("│")[1].strip() for line in shown.splitlines() if "│" in line}
    assert {"decode", "decode steps", "selection"} <= rows and not {"captions", "second wave"} & rows


def test_words_in_tables_are_whole(capsys):
    long = "a" * 30 + "_" + "b" * 30
    for look in ({}, OPEN):
        Console(width=40).print(table(("name", "other"), [(long, "x " * 40)], **look))
        shown = capsys.readouterr().out
        letters = re.sub(r"[^ab_]", "", shown.replace("name", ""))
        assert letters == long and "…" not in shown


@pytest.fixture
def quiet():
    """The package's logger is as it was before."""
    logger = logging.getLogger("vlmprune")
    before = (logger.level, list(logger.handlers))
    yield
    assert (logger.level, list(logger.handlers)) == before


def test_verbose_says_what_is_loaded_and_run(quiet):
    asked = (
        "--model",
        CHECKPOINT,
        "--image",
        SCENE,
        "--prompt",
        "locate the green phone .",
        "--policy",
        FASTV,
    )
    asked += ("--repeat", 2, "--json", "--attn", "vlmprune", "--device", "cpu", "--dtype", "bfloat16")
    plain, told = cli("run", *asked), cli("-v", "run", *asked)
    assert (plain.exit_code, told.exit_code, plain.stderr) == (0, 0, "")
    one, other = (json.loads(done.stdout)["runs"][0] for done in (plain, told))
    assert (one["answer"], one["kept"]) == (other["answer"], other["kept"])
    lines = told.stderr.splitlines()
    assert all(re.match(r"\d\d:\d\d:\d\d vlmprune[.\w]*: ", line) for line in lines)
    for said in (
        r"vlmprune: python \d.*, vlmprune \d.*, torch \d.*, transformers \d",
        r"vlmprune\.cli\.options: downloads are kept in \S",
        rf"vlmprune\.checkpoints: configuration of {CHECKPOINT}: llava, 8 decoder layers$",
        rf"vlmprune\.checkpoints: loading the weights of {CHECKPOINT}$",
        r"vlmprune\.checkpoints: 0\.0118 GB of weights in bfloat16 on cpu, vlmprune attention, loaded in",
        r"vlmprune\.cli\.run: attention kernel: torch",
        rf"vlmprune\.cli\.run: {FASTV}: layer 2: 196→49, one pass \(",
        rf"vlmprune\.cli\.run: {FASTV}, timed run 1: vision .* ms, prefill .* ms, selection .* ms, decode",
        rf"vlmprune\.cli\.run: {FASTV}, timed run 2: ",
    ):
        assert sum(bool(re.search(said, line)) for line in lines) == 1, said


def test_verbose_is_over_after_an_error(quiet):
    done = cli("--verbose", "run", "--model", "x", "--image", SCENE, "--prompt", "x", "--policy", "fether")
    assert done.exit_code == 2 and done.stdout == ""
    first, last = done.stderr.splitlines()
    assert "vlmprune: python" in first and last.startswith("error: policy: expected one of fastv, ")


def test_the_library_logs_and_shows_nothing_by_itself(caplog, capsys):
    with caplog.at_level(logging.INFO, "vlmprune"):
        assert Checkpoint(str(CHECKPOINT), device="cpu").config.model_type == "llava"
    assert [record.name for record in caplog.records] == ["vlmprune.checkpoints"]
    assert capsys.readouterr() == ("", "") and logging.getLogger("vlmprune").handlers == []


def in_a_process(*args):
    """What the command line prints, and which of these packages it has imported."""
    code = (
        "import sys\nfrom vlmprune.cli.main import main\ntry:\n    main()\nexcept SystemExit as done:\n"
        "    heavy = {'torch', 'transformers', 'triton', 'numpy'} & set(sys.modules)\n    print(done.code, sorted(heavy))"
    )
    done = subprocess.run([sys.executable, "-P", "-c", code, *map(str, args)], capture_output=True, text=True)
    return done.stdout.splitlines()[-1], done.stderr


@pytest.mark.parametrize(
    "args", [("--version",), ("--help",), ("run", "--help"), ("accm", "train", "--help"), ("lst",)]
)
def test_what_needs_no_model_imports_nothing_heavy(args):
    """Seconds: torch and transformers take most of them."""
    assert in_a_process(*args)[0] == f"{2 if args == ('lst',) else 0} []"


def test_a_wrong_picture_is_told_before_anything_heavy_is_imported(tmp_path):
    last, said = in_a_process("run", "--model", "x", "--image", tmp_path / "none.png", "--prompt", "x")
    assert last == "2 ['numpy']" and "--image: expected an image file" in said


def test_a_wrong_policy_is_told_before_transformers_is_imported():
    last, said = in_a_process(
        "run", "--model", "x", "--image", SCENE, "--prompt", "x", "--policy", "fastv:layr=2"
    )
    assert last.startswith("2 ") and "transformers" not in last and "(did you mean 'layer'?)" in said


def test_texts_that_help_shows_are_the_library_s():
    assert accm.WORDING == WORDING


def test_completion_is_on():
    assert "--install-completion" in cli("--help").stdout


@pytest.mark.parametrize(
    "typed, meant",
    [
        ("fether", "feather"),
        ("FastV", "fastv"),
        ("visonzip:tokens=64", "visionzip"),
        ("sparsevlm+", None),
        ("divprune + random_dep:layer=5", "random_deep"),
        ("nothing_like_it", None),
        ("fastv:layr=2", "layer"),
        ("feather:layer=2", "layers"),
        ("fastv:rows=lats", "last"),
        ("fastv:earlier_kv=compct", "compact"),
        ("sparsevlm:recycle=False", "false"),
        ("sparsevlm:scale=non", "none"),
        ("fastv:layer=two", None),
    ],
)
def test_the_nearest_name_or_word_of_a_policy(typed, meant):
    with pytest.raises(InputError, match=": expected ") as info:
        policy_from(typed)
    found = re.search(r", got .*? \(did you mean '(.*)'\?\)$", str(info.value))
    assert (found and found[1]) == meant


def test_the_nearest_word_of_a_setting_in_python():
    with pytest.raises(
        InputError, match=r"^rows: expected 'last' or 'mean', got 'maen' \(did you mean 'mean'\?\)$"
    ):
        FastV(rows="maen")


def test_the_nearest_backend_and_shape():
    with pytest.raises(
        InputError, match=r"^name: expected one of cuda, .*, got 'tirton' \(did you mean 'triton'\?\)$"
    ):
        with ops.use_backend("tirton"):
            pass
    with pytest.raises(InputError, match=r"^shape: .*, got 'llava-1.5' \(did you mean 'llava-1.5-\d+b'\?\)$"):
        FullSize("llava-1.5")


@pytest.mark.parametrize(
    "args, said",
    [
        (
            ("list", "--family", "qwen2.5_vl"),
            "--family: .*, got 'qwen2.5_vl' \\(did you mean 'qwen2_5_vl'\\?\\)",
        ),
        (("list", "--family", "paligemma"), "--family: .*, got 'paligemma' \\(the whole prompt"),
        (("list", "fetaher"), "policy: .*, got 'fetaher' \\(did you mean 'feather'\\?\\)"),
        (("bench", "--shape", "tinny"), "--shape: .*, got 'tinny' \\(did you mean 'tiny'\\?\\)"),
    ],
)
def test_the_nearest_name_of_a_command_s_option(args, said):
    done = cli(*args)
    assert done.exit_code == 2 and re.search(f"^error: {said}", done.stderr, re.MULTILINE)


@pytest.mark.parametrize(
    "args, said",
    [
        (("lst",), "Did you mean 'list'?"),
        (("list", "--famly", "llava"), "--family"),
        (("run", "--polcy", "fastv"), "--policy"),
    ],
)
def test_the_nearest_command_and_option(args, said):
    """The parser's own."""
    done = cli(*args)
    assert done.exit_code == 2 and said in done.stderr


def test_nearest():
    assert nearest("fether", ["fastv", "feather"]) == " (did you mean 'feather'?)"
    assert nearest(1.5, ["1.5", "paper"]) == " (did you mean '1.5'?)"
    assert nearest("xyz", ["fastv"]) == nearest("", ["fastv"]) == nearest("fastv", []) == ""
