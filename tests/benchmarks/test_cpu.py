"""What pruning saves on a CPU, tried on four small layers: a row for each policy, ratios within rounds, bare twins of equal rows."""

import csv
from types import SimpleNamespace

import cpu_decode
import cpu_prefill
import cpu_rows
import pytest
import torch

import vlmprune

pytestmark = pytest.mark.cpu("a benchmark of CPUs")


def run(script, monkeypatch, capsys, *arguments):
    monkeypatch.setattr("sys.argv", [script.__name__, "--tiny", *arguments])
    return script.main(), capsys.readouterr().out


def test_prefill_has_a_row_for_each_policy(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(cpu_prefill, "RESULTS", tmp_path)
    code, out = run(cpu_prefill, monkeypatch, capsys, "--rounds", "2", "--batch", "1", "2", "--out", "found")
    with (tmp_path / "found.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert code == 0
    asked = [(size, policy) for size in "12" for policy in cpu_prefill.TINY.policies]
    assert [(row["batch"], row["policy"]) for row in rows] == asked
    for row in rows:
        assert row["policy"] in out and row["cpu"] and int(row["threads"]) == torch.get_num_threads()
        assert float(row["FLOPs ratio"]) > 1 and 0 < float(row["selection"]) < 10
        speed, ratio = float(row["speed-up"]), float(row["FLOPs ratio"])
        assert float(row["of FLOPs"]) == pytest.approx(speed / ratio, rel=1e-3)
        assert 0 < float(row["of bare p20"]) <= float(row["of bare"]) <= float(row["of bare p80"])


def test_every_method_of_the_table_fits_the_model():
    chosen = [vlmprune.policy_from(text) for text in cpu_prefill.table()]
    layers = cpu_prefill.REAL.text["num_hidden_layers"]
    # made of other methods, of a scorer that fits the model, or of another model's scores
    without = [vlmprune.ACCM, vlmprune.Learned, vlmprune.SGL]
    assert [type(policy) for policy in chosen] == [
        k for k in cpu_prefill.BUILT_IN.values() if k not in without and not k.for_video
    ]
    assert all(0 <= layer < layers for policy in chosen for layer in policy.layers)


@pytest.mark.parametrize(
    ("policy", "rows"),
    [
        ("fastv:layer=2,keep=0.25", [(81, None), (81, None), (69, None), (69, None)]),
        (
            "scout:coarse=(divprune:keep=4),fine=3,look=2",
            [*[(69, None)] * 2, *[(33, 72)] * 2, *[(72, None)] * 2],
        ),
    ],
)
def test_a_bare_twin_runs_the_same_rows(policy, rows):
    """Layer after layer, those of a second wave (three tokens, 30 words behind the image) over as many keys."""
    model = cpu_prefill.make_model(cpu_prefill.TINY, torch.device("cpu"), torch.float32)
    prompt = cpu_prefill.make_prompt(model, 1)
    seen = {}

    def recorder(name):
        def record(module, args, kwargs):
            mask, hidden = kwargs["attention_mask"], kwargs["hidden_states"]
            seen.setdefault(name, []).append((hidden.shape[1], None if mask is None else mask.shape[-1]))

        return record

    with torch.inference_mode():
        for arm in cpu_prefill.make_arms(model, prompt, [policy], twins=True):
            attentions = [layer.self_attn for layer in cpu_prefill.find_parts(arm.model).layers]
            handles = [m.register_forward_pre_hook(recorder(arm.name), with_kwargs=True) for m in attentions]
            cpu_prefill.prefill(arm, prompt)
            for handle in handles:
                handle.remove()
    full, pruned, bare = seen.values()
    assert full == [(81, None)] * 4 and pruned == bare == rows


def test_ratios_are_taken_within_rounds():
    """A machine that is twice as slow in one round changes nothing."""

    def report(seconds, selection=0.0):
        flops = SimpleNamespace(full=300, pruned=100)
        return SimpleNamespace(flops=flops, seconds=SimpleNamespace(prefill=seconds, selection=selection))

    rounds = [{"unpruned": report(2.0 * t), "p": report(1.0 * t, 0.1 * t)} for t in (1.0, 2.0, 1.0)]
    row = cpu_prefill.row("p", rounds)
    assert row["speed-up p20"] == row["speed-up"] == row["speed-up p80"] == 2.0
    assert row["of FLOPs"] == pytest.approx(2 / 3, rel=1e-4) and row["saved"] == pytest.approx(0.75)
    assert row["selection"] == row["selection p80"] == 0.05 and "of bare" not in row


def test_a_profile_names_operations(monkeypatch, capsys):
    code, out = run(cpu_prefill, monkeypatch, capsys, "--profile", "--policies", "divprune:keep=4")
    assert code == 0 and out.count("aten::mm") >= 3 and "divprune:keep=4 bare" in out


def test_matrices_are_timed_by_rows(monkeypatch, capsys):
    code, out = run(cpu_prefill, monkeypatch, capsys, "--matrices")
    assert code == 0 and [line.split()[0] for line in out.splitlines()] == ["81", "40", "27", "13", "1"]


def test_decoding_has_a_row_for_each_length_and_policy(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(cpu_decode, "RESULTS", tmp_path)
    code, _ = run(cpu_decode, monkeypatch, capsys, "--rounds", "2", "--images", "1", "3", "--out", "found")
    with (tmp_path / "found.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert code == 0
    asked = [(str(16 * n), policy) for n in (1, 3) for policy in cpu_decode.TINY_POLICIES]
    assert [(row["visual tokens"], row["policy"]) for row in rows] == asked
    for row in rows:
        assert float(row["KV MB"]) <= float(row["unpruned KV MB"]) and float(row["speed-up"]) > 0


@pytest.mark.parametrize("script", [cpu_prefill, cpu_decode])
def test_one_round_is_refused(script, monkeypatch, capsys):
    with pytest.raises(SystemExit):
        run(script, monkeypatch, capsys, "--rounds", "1")
    assert "--rounds: expected at least 2, got 1" in capsys.readouterr().err


def test_a_machine_without_proc_has_a_name(monkeypatch):
    monkeypatch.setattr(cpu_rows.Path, "is_file", lambda self: False)
    assert cpu_rows.machine()["cpu"] == cpu_rows.platform.machine()
