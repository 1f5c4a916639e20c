"""``vlmprune eval`` on the small trained model: results, equal FLOPs, kills, and bad input."""

import json
import shutil
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from helpers.command_line import cli
from vlmprune import ops
from vlmprune.cli.eval import read_budgets
from vlmprune.eval.oracle import patches_in
from vlmprune.eval.questions import read_questions
from vlmprune.eval.store import Store

pytest.importorskip("matplotlib")
POLICIES = ("--policy", "fastv:layer=2")
FILES = {
    "answers.jsonl",
    "settings.json",
    "results.json",
    "report.html",
    "pareto.png",
    "families.png",
    "heat.png",
}


@pytest.fixture(autouse=True)
def reference():
    """Kernels have their own tests; interpreted they are slow."""
    with ops.use_backend("reference"):
        yield


@pytest.fixture
def no_pictures(monkeypatch):
    """Drawing takes longer than asking a handful of questions."""
    for name in ("draw_pareto", "draw_families", "draw_heat"):
        monkeypatch.setattr(f"vlmprune.eval.evaluation.{name}", lambda rows: b"png")


@pytest.fixture
def folder(scene, tmp_path):
    """Six questions about two scenes, of three families, two of them as literal prompts."""
    (tmp_path / "q").mkdir()
    lines = []
    for entry in json.loads((scene.parent / "questions.json").read_text())[:2]:
        shutil.copy(scene.parent / entry["image"], tmp_path / "q")
        for asked in entry["qa"]:
            if asked["family"] in ("box", "color", "exist"):
                line = {k: asked[k] for k in ("family", "prompt", "answer")} | {"image": entry["image"]}
                if asked["family"] == "box":  # answered in steps of 4 pixels
                    line["box"] = [4 * int(word) for word in asked["answer"].split()]
                lines.append(line | {"id": f"{entry['seed']}-{asked['family']}"})
    (tmp_path / "q" / "questions.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return tmp_path / "q"


@pytest.fixture
def evaluate(checkpoint, folder, tmp_path):
    def call(*args, model=checkpoint, questions=folder, out=tmp_path / "out"):
        fixed = (
            "--model",
            model,
            "--questions",
            questions,
            "--out",
            out,
            "--dtype",
            "float32",
            "--device",
            "cpu",
        )
        return cli("eval", *fixed, "--batch-size", 4, "--seeds", 2, *args)

    return call


def answers(out):
    """Key -> the rest of every line, but for the time."""
    lines = [json.loads(line) for line in (out / "answers.jsonl").read_text().splitlines()]
    found = {(a["policy"], a["question"], a["seed"]): a | {"prefill": 0} for a in lines}
    assert len(found) == len(lines), "an answer came twice"
    return found


def test_results(evaluate, tmp_path):
    done = evaluate(*POLICIES, "--budgets", "0.5")
    assert done.exit_code == 0, done.stderr
    assert done.stderr == ""
    out = tmp_path / "out"
    assert {path.name for path in out.iterdir()} == FILES
    assert len(answers(out)) == 6 * (1 + 1 + 1 + 1 + 2 + 1)
    rows = json.loads((out / "results.json").read_text())["rows"]
    assert [row["method"] for row in rows] == [
        "unpruned",
        "fastv:layer=2",
        "uniform:layer=2",
        "uniform:layer=2,order=raster",
        "random:layer=2",
        "smaller",
    ]
    unpruned, *pruned, smaller = rows
    assert (smaller["tokens"], smaller["policy"]) == (100, "Smaller(keep=0.52)")
    assert smaller["cut"] == pytest.approx(0.51, abs=0.01) and smaller["prefill"] > 0
    small = {a["question"]: a for key, a in answers(out).items() if key[0].startswith("Smaller")}
    assert len(small) == 6 and not any(a["kept"] for a in small.values())
    assert unpruned["all"]["right"]["mean"] == 1.0 and unpruned["cut"] == 0.0 and unpruned["tokens"] == 196
    assert unpruned["families"].keys() == {"box", "color", "exist"}
    for row in pruned:
        assert row["cut"] == pytest.approx(0.5, abs=0.01)
        assert row["prefill"] > 0 and row["all"]["to_unpruned"]["mean"] <= 0
    page = (out / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 3 and "<script" not in page
    assert "fastv" in done.stdout and "answers/s" in done.stdout


def test_policies_made_of_policies(evaluate, no_pictures, tmp_path):
    recipe = "divprune:keep=0.5 + random_deep:layer=5,keep=0.25"
    (tmp_path / "recipe.yaml").write_text(
        "policy: union\nfirst: {policy: fastv}\nsecond: {policy: uniform}\n"
    )
    done = evaluate("--keep", "--no-baselines", "--policy", recipe, "--policy", tmp_path / "recipe.yaml")
    assert done.exit_code == 0, done.stderr
    rows = json.loads((tmp_path / "out" / "results.json").read_text())["rows"]
    assert [row["method"] for row in rows] == ["unpruned", recipe, str(tmp_path / "recipe.yaml")]
    assert rows[1]["tokens"] == (5 * 98 + 3 * 24) / 8
    assert len(answers(tmp_path / "out")) == 6 * (1 + 2 + 1)  # the recipe draws, so it is asked twice
    assert "divprune" in done.stdout


def test_a_killed_run_goes_on_without_losing_or_repeating(evaluate, no_pictures, tmp_path, monkeypatch):
    """18 answers in two batches of three arms; an exception stops it inside the second arm's first batch."""
    whole, out = tmp_path / "whole", tmp_path / "out"
    args = ("--policy", "random", "--budgets", "0.5", "--no-baselines")
    assert evaluate(*args, out=whole).exit_code == 0
    add, asked = Store.add, []

    def fail(self, answer):
        if len(self.answers) == 7:
            raise KeyError("killed")
        add(self, answer)

    monkeypatch.setattr(Store, "add", fail)
    assert isinstance(evaluate(*args).exception, KeyError)
    assert len(answers(out)) == 7
    lines = out / "answers.jsonl"
    lines.write_bytes(lines.read_bytes()[:-20])  # and the seventh line was not written to its end
    monkeypatch.setattr(Store, "add", lambda self, answer: (asked.append(answer.key), add(self, answer)))
    assert evaluate(*args).exit_code == 0
    assert len(asked) == 18 - 6
    assert answers(out) == answers(whole)

    monkeypatch.setattr("vlmprune.eval.ask.generate", None)  # now there is nothing left to ask
    done = evaluate(*args)
    assert done.exit_code == 0 and "nothing left to ask" in done.stdout


def test_policies_as_given_without_baselines(evaluate, no_pictures, tmp_path):
    done = evaluate("--policy", "uniform:layer=0,keep=49", "--keep", "--no-baselines", "--family", "box")
    assert done.exit_code == 0, done.stderr
    rows = json.loads((tmp_path / "out" / "results.json").read_text())["rows"]
    assert [(row["method"], row["tokens"]) for row in rows] == [
        ("unpruned", 196),
        ("uniform:layer=0,keep=49", 49),
    ]
    kept = [a["kept"] for key, a in answers(tmp_path / "out").items() if key[0] != "unpruned"]
    assert len(kept) == 2
    for ((layer, bits),) in kept:
        assert layer == 0 and int(bits, 16).bit_count() == 49


def test_an_oracle_keeps_the_boxes_of_its_own_questions_also_after_a_kill(
    evaluate, folder, no_pictures, tmp_path, monkeypatch
):
    args = ("--budgets", "0.64", "--oracle", "--seeds", 1)
    whole, out, add = tmp_path / "whole", tmp_path / "out", Store.add
    assert evaluate(*args, out=whole).exit_code == 0

    def fail(self, answer):
        if answer.policy.startswith("Oracle") and answer.question.endswith("exist"):
            raise KeyError("killed")
        add(self, answer)

    monkeypatch.setattr(Store, "add", fail)
    assert isinstance(evaluate(*args).exception, KeyError)
    monkeypatch.setattr(Store, "add", add)
    assert evaluate(*args).exit_code == 0
    found = answers(out)
    assert found == answers(whole)

    asked = {q.id: q for q in read_questions(folder)}
    kept = {key[1]: int(a["kept"][0][1], 16) for key, a in found.items() if key[0].startswith("Oracle")}
    even = {
        key[1]: int(a["kept"][0][1], 16)
        for key, a in found.items()
        if "lattice" in key[0] and key[0].startswith("Uniform")
    }
    assert kept.keys() == asked.keys() and len({*kept.values()}) == 3  # two boxes, and evenly spaced
    for name, bits in kept.items():
        assert bits.bit_count() == even[name].bit_count()
        if asked[name].box is None:
            assert bits == even[name]
        else:
            assert all(bits >> patch & 1 for patch in patches_in(asked[name].region, (14, 14)))
    rows = json.loads((out / "results.json").read_text())["rows"]
    assert [row["method"] for row in rows][-1] == "oracle:layer=2"
    assert rows[-1]["cut"] == rows[1]["cut"] == pytest.approx(0.64, abs=0.01)


def test_batches_answer_like_single_questions(evaluate, no_pictures, tmp_path):
    for size in (1, 2):
        done = evaluate(
            *POLICIES,
            "--keep",
            "--no-baselines",
            "--family",
            "box",
            "--batch-size",
            size,
            out=tmp_path / str(size),
        )
        assert done.exit_code == 0, done.stderr
    assert answers(tmp_path / "1") == answers(tmp_path / "2")


@pytest.mark.parametrize(
    "args, said",
    [
        (("--budgets", "0.5,x"), "--budgets: expected numbers separated by commas, got '0.5,x'"),
        (("--budgets", "1.5"), "--budgets: expected FLOPs cuts between 0 and 1, got 1.5"),
        (("--budgets", "0.5", "--keep"), "--budgets: expected either --budgets or --keep, got both"),
        (("--family", "boxes"), "--family: expected one of box, color, exist, got 'boxes'"),
        (("--policy", "fastv:layer=8"), "layer: expected at most 7"),
        (
            ("--policy", "fastv:layer=6", "--budgets", "0.5"),
            "fastv:layer=6 at budget 0.5: cut: expected a share",
        ),
        (
            ("--policy", "uniform:stride=2"),
            "uniform:stride=2 at budget 0.48: keep: expected either keep or stride",
        ),
        (("--baseline", "best"), "--baseline: expected some of lattice, raster, random, smaller, got best"),
        (
            ("--baseline", "random", "--no-baselines"),
            "--baseline: expected either --baseline or --no-baselines, got both",
        ),
        (("--baseline", "smaller", "--budgets", "0.999"), "cut: expected a share between"),
        (("--questions", "/none"), "--questions: expected a folder with a questions.jsonl, got '/none'"),
        (("--oracle", "--family", "exist"), "--oracle: expected questions with a box, got none"),
        (("--out", "/none/out"), "--out: expected a folder inside an existing one, got '/none/out'"),
        (("--model", "/none"), "--model: expected a checkpoint folder with a config.json"),
    ],
)
def test_bad_input_leaves_nothing_behind(evaluate, tmp_path, monkeypatch, args, said):
    monkeypatch.setattr(
        "vlmprune.checkpoints.AutoModelForImageTextToText", None
    )  # all of it is said before the weights are loaded
    done = evaluate(*args)
    assert (done.exit_code, done.stdout) == (2, "")
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert said in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "content, reason",
    [
        (lambda png: png[:4000], "truncated"),
        (
            lambda png: png[:16] + b"\0\0\x4e\x20" * 2 + png[24:29] + crc(png, 20_000) + png[33:],
            "exceeds limit of",
        ),
        (lambda png: b"not pixels", "cannot identify image file"),
    ],
    ids=["truncated", "400 megapixels", "text"],
)
def test_an_image_that_cannot_be_read_ends_the_run_before_it_begins(
    evaluate, folder, tmp_path, monkeypatch, content, reason
):
    monkeypatch.setattr("vlmprune.checkpoints.AutoModelForImageTextToText", None)
    image = folder / "scene_70002.png"
    image.write_bytes(content(image.read_bytes()))
    done = evaluate(*POLICIES)
    assert (done.exit_code, done.stdout) == (2, "")
    assert done.stderr.startswith(
        f"error: --questions: expected an image file, got '{image}', which cannot be read: "
    )
    assert done.stderr.count("\n") == 1 and reason in done.stderr
    assert not (tmp_path / "out").exists()


def crc(png, side):
    """The checksum of the header of ``png`` with another width and height."""
    return struct.pack(">I", zlib.crc32(png[12:16] + struct.pack(">II", side, side) + png[24:29]))


def test_images_as_people_have_them_give_the_same_answers(evaluate, folder, no_pictures, tmp_path):
    """On its side with a note saying so, and in 16 bits: no other answer than to the plain picture."""
    args = ("--policy", "fastv:layer=3,keep=98", "--keep", "--no-baselines")
    plain = Image.open(folder / "scene_70001.png").convert("L")
    plain.save(folder / "scene_70001.png")
    Image.open(folder / "scene_70002.png").convert("RGB").save(folder / "scene_70002.png")
    assert evaluate(*args, out=tmp_path / "plain").exit_code == 0
    Image.fromarray(np.asarray(plain).astype(np.uint16) * 257).save(folder / "scene_70001.png")
    turned = Image.Exif()
    turned[0x0112] = 6
    upright = Image.open(folder / "scene_70002.png")
    upright.transpose(Image.Transpose.ROTATE_90).save(folder / "scene_70002.png", exif=turned)
    assert evaluate(*args, out=tmp_path / "other").exit_code == 0
    assert answers(tmp_path / "other") == answers(tmp_path / "plain")


def test_our_attention(evaluate, no_pictures, tmp_path):
    """The answers of sdpa from our own attention function, which keeps what its kernel knows for the scoring."""
    args = (*POLICIES, "--keep", "--no-baselines", "--family", "box")
    assert evaluate(*args, out=tmp_path / "sdpa").exit_code == 0
    assert evaluate(*args, "--attn", "vlmprune", out=tmp_path / "ours").exit_code == 0
    assert answers(tmp_path / "ours") == answers(tmp_path / "sdpa")
    assert json.loads((tmp_path / "ours" / "settings.json").read_text())["attention"] == "vlmprune"


def test_settings_that_are_not_ours(evaluate, tmp_path):
    (tmp_path / "out").mkdir()
    for content, said in (("{", "expected a JSON object, got: "), ("[]", "expected a JSON object, got list")):
        (tmp_path / "out" / "settings.json").write_text(content)
        done = evaluate("--keep", "--no-baselines", "--family", "exist")
        assert done.exit_code == 2 and done.stderr.count("\n") == 1
        assert f"settings.json: {said}" in done.stderr


def test_a_question_without_placeholder_names_itself(evaluate, folder):
    lines = (folder / "questions.jsonl").read_text()
    (folder / "questions.jsonl").write_text(lines.replace("<image> locate", "<image> <image> locate", 1))
    done = evaluate()
    assert done.exit_code == 2
    assert "question '70001-box': --prompt: expected 1 x '<image>'" in done.stderr


def test_other_settings_in_the_same_folder(evaluate, no_pictures):
    assert evaluate("--keep", "--no-baselines", "--family", "exist").exit_code == 0
    done = evaluate("--keep", "--no-baselines", "--max-new-tokens", 4)
    assert done.exit_code == 2
    assert "made with max_new_tokens = 4, got one made with 32" in done.stderr


def test_without_matplotlib(evaluate, tmp_path, monkeypatch):
    monkeypatch.setattr("vlmprune.eval.plots.find_spec", lambda name: None)
    done = evaluate()
    assert done.exit_code == 2 and done.stderr.count("\n") == 1
    assert "expected matplotlib (pip install 'vlmprune[plots]'), got no such package" in done.stderr
    assert not (tmp_path / "out").exists()


def test_default_budgets():
    assert read_budgets(None, False) == (0.48, 0.64)
    assert read_budgets(None, True) == ()
    assert read_budgets("0.5, 0.36,0.5", False) == (0.5, 0.36)


def test_batches_need_a_padding_token(evaluate, tmp_path, monkeypatch):
    monkeypatch.setattr("transformers.PreTrainedTokenizerFast.pad_token", None, raising=False)
    done = evaluate()
    assert done.stderr == "error: --batch-size: expected 1 (the tokenizer has no padding token), got 4\n"
    assert not (tmp_path / "out").exists()
