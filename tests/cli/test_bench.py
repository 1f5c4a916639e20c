"""``vlmprune bench``: tables, JSON, files and bad input, on a model of six small layers and on the small trained one."""

import json

import pytest

from helpers.command_line import CHECKPOINT, cli
from vlmprune import ops
from vlmprune.bench import Peaks
from vlmprune.cli.options import read_numbers

pytest.importorskip("matplotlib")


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr("vlmprune.bench.benchmark.measure_peaks", lambda device, dtype: Peaks(1e11, 1e10))
    with ops.use_backend("reference"):
        yield


def bench(*args):
    return cli("bench", "--device", "cpu", "--rounds", 1, "--new-tokens", 2, *args)


def test_tables_and_files(tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    files = ("--out", tmp_path / "out", "--profile", tmp_path / "trace.json.gz")
    done = bench("--shape", "tiny", "--policy", "fastv:layer=2,keep=4", "--batch", "1,2", *files)
    assert done.exit_code == 0, done.stderr
    assert done.stderr == ""
    for text in (
        *("batch 1", "batch 2", "16 → 4", "fastv:layer=2,keep=4 [smaller image]", "selection, layer 2"),
        "not run: no GPU",
        f"results: {tmp_path / 'out'}",
        "0.1 TFLOP/s and 10 GB/s, measured in this run",
    ):
        assert text in " ".join(done.stdout.split())
    assert (tmp_path / "out" / "results.json").exists() and (tmp_path / "trace.json.gz").exists()


def test_tables_fit_a_narrow_terminal(monkeypatch):
    """No number is cut or broken at 80 columns, and every arm that ran has its lines."""
    monkeypatch.setenv("COLUMNS", "80")
    said = bench("--shape", "tiny", "--policy", "fastv:layer=2,keep=4").stdout
    assert max(map(len, said.splitlines())) <= 80 and "…" not in said
    prefills = [line for line in said.splitlines() if "│ prefill" in line]
    assert [line.split("│")[1].strip() for line in prefills] == ["2", "4", "5"]
    assert all(".." in line.split("│")[4] for line in prefills)


def test_json_of_a_checkpoint():
    done = bench("--model", CHECKPOINT, "--policy", "uniform:keep=49", "--json", "--dtype", "float32")
    assert done.exit_code == 0, done.stderr
    assert done.stderr == ""
    found = json.loads(done.stdout)
    assert found["settings"]["model"] == str(CHECKPOINT) and not found["settings"]["random_weights"]
    rows = {row["arm"]: row for row in found["rows"]}
    assert rows["uniform:keep=49"]["stages"] == [[2, 196, 49]]
    assert rows["uniform:keep=49"]["speedup"]["prefill"].keys() == {"median", "p20", "p80"}
    assert "is fixed" in rows["uniform:keep=49 [smaller image]"]["reason"]
    assert rows["uniform:keep=49 [published style]"]["reason"] is None


def test_policies_of_the_shape_and_no_baselines():
    rows = json.loads(bench("--shape", "tiny", "--json", "--no-baselines").stdout)["rows"]
    assert [row["method"] for row in rows if row["way"] == "plain"] == [
        "unpruned",
        "fastv:layer=2,keep=4",
        "fastervlm:keep=4",
    ]
    assert {row["way"] for row in rows} == {"plain", "graphs"}


@pytest.mark.parametrize(
    "args, said",
    [
        ((), "--model: expected either --model or --shape, got none"),
        (("--model", "m", "--shape", "tiny"), "--model: expected either --model or --shape, got both"),
        (("--shape", "gpt"), "--shape: expected one of llava-1.5-7b, "),
        (("--shape", "tiny", "--batch", "1;4"), "--batch: expected numbers separated by commas, got '1;4'"),
        (("--shape", "tiny", "--batch", "0"), "--batch: expected numbers of at least 1, got 0"),
        (("--shape", "tiny", "--policy", "fastv:layer=6"), "layer: expected at most 5"),
        (("--shape", "tiny", "--out", "/none/out"), "--out: expected a folder inside an existing one"),
        (
            ("--shape", "tiny", "--profile", "/none/t.json"),
            "--profile: expected a file in an existing folder",
        ),
        (("--shape", "tiny", "--attn", "flash_attention_2"), "--attn: expected sdpa, eager or vlmprune"),
        (("--model", "/none"), "--model: expected a checkpoint folder with a config.json"),
    ],
)
def test_bad_input(monkeypatch, args, said):
    monkeypatch.setattr("vlmprune.bench.shapes.AutoModelForImageTextToText", None)
    monkeypatch.setattr("vlmprune.checkpoints.AutoModelForImageTextToText", None)
    done = bench(*args)
    assert (done.exit_code, done.stdout) == (2, "")
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert said in done.stderr


def test_without_matplotlib(monkeypatch, tmp_path):
    monkeypatch.setattr("vlmprune.eval.plots.find_spec", lambda name: None)
    done = bench("--shape", "tiny", "--out", tmp_path / "out")
    assert done.exit_code == 2 and not (tmp_path / "out").exists()
    assert "vlmprune bench: expected matplotlib" in done.stderr


def test_batch():
    assert read_numbers("1,4, 16", int, "batch") == (1, 4, 16)
