"""The page of ``vlmprune show`` without a browser: what a visitor may send, what is on offer, what is asked, shown and copied."""

from __future__ import annotations

import shlex
import socket
import tomllib
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import yaml
from PIL import Image, ImageOps

from helpers.command_line import CHECKPOINT, EXAMPLE, SCENE, cli
from vlmprune.checkpoints import Checkpoint
from vlmprune.errors import InputError
from vlmprune.images import open_rgb
from vlmprune.policies.registry import BUILT_IN, list_policies
from vlmprune.view.fitting import Size
from vlmprune.view.picture import dim_dropped
from vlmprune.web import limits
from vlmprune.web.ask import Asked, answers
from vlmprune.web.cards import results_html
from vlmprune.web.controls import examples_html, fault_html, methods_html, status_html
from vlmprune.web.desk import Desk, Example, fitted, offer, shipped, size_for
from vlmprune.web.pictures import veil
from vlmprune.web.text import command, python

ROOT = Path(__file__).parents[2]
SCENE_SIZE = Size(8, 4, 196)


def saved(folder, name, image, form, **settings):
    path = folder / name
    image.save(path, form, **settings)
    return path


# Pictures


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP"])
def test_three_formats_are_read(tmp_path, form):
    path = saved(tmp_path, "picture", Image.new("RGB", (40, 30), "red"), form)
    assert limits.open_picture(path, "picture").size == (40, 30)


def test_pictures_come_upright(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees
    path = saved(tmp_path, "turned.jpg", Image.new("RGB", (40, 30)), "JPEG", exif=exif)
    assert limits.open_picture(path, "turned.jpg").size == (30, 40)


def large(folder):
    path = saved(folder, "large", Image.new("RGB", (8, 8)), "PNG")
    with path.open("ab") as file:
        file.truncate(limits.BYTES + 1)
    return path


def cut(folder):
    path = saved(folder, "cut", Image.effect_noise((200, 200), 50), "PNG")
    path.write_bytes(path.read_bytes()[:2000])
    return path


def garbage(folder):
    (folder / "garbage").write_bytes(bytes(range(256)))
    return folder / "garbage"


REFUSED = {
    "large": (large, "at most 10 MB, got 'me.png' of 10.0 MB"),
    "cut": (cut, "a whole PNG or JPEG or WebP file, got 'me.png', which cannot be read"),
    "garbage": (garbage, "which cannot be read"),
    "empty": (lambda folder: (folder / "empty").touch() or folder / "empty", "which cannot be read"),
    "another format": (lambda f: saved(f, "gif", Image.new("RGB", (8, 8)), "GIF"), "which cannot be read"),
    "pixels": (lambda f: saved(f, "wide", Image.new("1", (8000, 5001)), "PNG"), "40 million pixels"),
    "thin": (lambda f: saved(f, "thin", Image.new("1", (2001, 100)), "PNG"), "one side at most 20 times"),
    "greys": (lambda f: saved(f, "float", Image.new("F", (4, 4), 7.0), "TIFF"), "which cannot be read"),
    "gone": (lambda folder: folder / "gone", "which cannot be read"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_other_files_are_refused_without_a_path(tmp_path, kind):
    make, words = REFUSED[kind]
    path = make(tmp_path)
    with pytest.raises(InputError) as caught:
        limits.open_picture(path, "me.png")
    assert str(caught.value).startswith("picture: expected ") and words in str(caught.value)
    assert str(tmp_path) not in str(caught.value)


def test_pixels_are_counted_before_they_are_decoded(tmp_path, monkeypatch):
    path = saved(tmp_path, "wide", Image.new("1", (8000, 5001)), "PNG")
    monkeypatch.setattr(limits, "as_rgb", lambda image: pytest.fail("decoded"))
    with pytest.raises(InputError):
        limits.open_picture(path, "wide.png")


# What else is sent


def test_a_picture_is_called_what_its_owner_calls_it(tmp_path):
    path = str(saved(tmp_path, "0123abc.png", Image.new("RGB", (8, 8)), "PNG"))
    for called, name in (("../../dog.png", "dog.png"), ("", "0123abc.png"), (7, "0123abc.png")):
        assert limits.read_picture({"path": path, "orig_name": called}, tmp_path)[2] == name


@pytest.mark.parametrize("payload", [None, {}, {"path": None}, {"path": 3}, "a", []])
def test_no_picture(payload):
    with pytest.raises(InputError, match="picture: expected a picture, got none"):
        limits.read_picture(payload, Path("."))


def test_only_what_was_put_in_is_opened(tmp_path, monkeypatch):
    """By another path, through a link, a device, or a name that no file has."""
    uploads = tmp_path / "uploads"
    uploads.mkdir()
    own = saved(uploads, "own", Image.new("RGB", (8, 8)), "PNG")
    other = saved(tmp_path, "other", Image.new("RGB", (8, 8)), "PNG")
    (uploads / "link").symlink_to(other)
    assert limits.read_picture({"path": str(own)}, uploads)[1] == own
    monkeypatch.setattr(limits, "open_picture", lambda *args: pytest.fail("opened"))
    for path in (
        other,
        uploads / ".." / other.name,
        uploads / "link",
        "/dev/stdin",
        uploads,
        "a\0b",
        "x" * 5000,
    ):
        with pytest.raises(
            InputError, match=r"^picture: expected one that was put in here, got another file$"
        ):
            limits.read_picture({"path": str(path)}, uploads)


@pytest.mark.parametrize("sent", [None, "", "  \n", "x" * 1001, 7, ["a"]])
def test_no_question(sent):
    with pytest.raises(InputError, match="question: expected a text of 1 to 1000 letters"):
        limits.read_prompt(sent)


@pytest.mark.parametrize("sent", [None, True, "78", 0, -1, float("nan"), float("inf"), [7]])
def test_no_budget(sent):
    with pytest.raises(InputError, match="budget: expected a number"):
        limits.read_budget(sent)


@pytest.mark.parametrize("sent", [None, "fastv", {"fastv": 1}, [1], ["custom"], ["fastv", "no such"]])
def test_no_methods(sent):
    with pytest.raises(InputError, match="methods: expected"):
        limits.read_methods(sent)


def test_methods_in_the_order_of_the_registry():
    names = list_policies()
    assert limits.read_methods([]) == ()
    assert limits.read_methods([names[4], names[1], names[1]]) == (names[1], names[4])


# What is on offer


def test_only_what_is_on_offer_is_opened():
    desk = Desk([str(CHECKPOINT)])
    assert desk.open(str(CHECKPOINT)) is desk.open(str(CHECKPOINT))
    for source in ("someone/else", None, 3, ["a"]):
        with pytest.raises(InputError, match="model: expected one of"):
            desk.open(source)


def test_of_others_the_latest_is_kept():
    desk = Desk(["a"], any_model=True)
    first = desk.open(" b ")
    assert first.source == "b" and desk.open("b") is first
    assert desk.open("c").source == "c" and desk.open("b") is not first
    for source in ("", " ", None, 3):
        with pytest.raises(InputError, match="model: expected a checkpoint folder or hub id"):
            desk.open(source)


def test_a_checkout_brings_a_model_and_examples(tmp_path, monkeypatch):
    sources, examples = shipped()
    assert [Checkpoint(source).config.model_type for source in sources] == ["llava"]
    assert len(examples) == 6 and all(open_rgb(image, "").size == (112, 112) for image, _ in examples)
    assert shipped(tmp_path) == ([], [])
    monkeypatch.chdir(EXAMPLE)
    assert shipped()[0] == ["checkpoint"]


@pytest.fixture(scope="module")
def checkpoint():
    return Checkpoint(str(CHECKPOINT), device="cpu", dtype="float32")


def test_methods_that_can_be_fitted(checkpoint):
    size, methods, left_out = offer(checkpoint)
    assert size == SCENE_SIZE
    assert {*methods, *left_out} == {*list_policies()}
    assert set(left_out) == {"accm", "learned", "sgl", "vtw"} | {
        n for n, k in BUILT_IN.items() if k.for_video
    }
    assert (methods["fastv"].before, methods["divprune"].before) == (False, True)
    html = methods_html(offer(checkpoint), ("fastv",))
    assert html.count('type="checkbox"') == len(methods) and html.count(" checked") == 1
    assert methods["feather"].summary in html and left_out["vtw"].split(":")[0] in html


def test_a_family_without_packed_positions():
    """Qwen-VL has none: published settings that pack are changed, and nothing else is."""
    qwen = SimpleNamespace(config=SimpleNamespace(model_type="qwen2_5_vl"))
    llava = SimpleNamespace(config=SimpleNamespace(model_type="llava"))
    size = Size(28, 32, 196)
    packed, kept = fitted(llava, "visionzip", 78, size), fitted(qwen, "visionzip", 78, size)
    assert packed.policy.packs and not kept.policy.packs
    assert kept.policy == replace(packed.policy, positions="keep") and kept.mean == packed.mean


# Asking


def ask(checkpoint, methods=("feather",), budget=78.0, prompt="locate the green phone .", picture=None):
    desk = Desk([checkpoint.source], limit=8)
    picture = picture or open_rgb(SCENE, "")
    return list(answers(desk, Asked(checkpoint, picture, "it's.png", prompt, methods, budget)))


@pytest.fixture(scope="module")
def asked(checkpoint):
    return ask(checkpoint, ("feather", "random_deep", "accm"), budget=60.0)


def test_what_is_found_so_far(asked):
    told = [results.doing for results in asked]
    assert told[0].startswith("Loading ") and told[-1] == ""
    assert told[1:-1] == [f"Asking {name}" for name in ("without pruning", "feather", "random_deep", "accm")]
    assert [len(results.columns) for results in asked] == [0, 0, 1, 2, 3, 4]
    assert "Asking feather (2 of 4)" in status_html(asked[2]) and 'value="1"' in status_html(asked[2])
    assert status_html(asked[-1]) == ""


def test_every_column_has_its_outcome(asked):
    unpruned, feather, deep, accm = asked[-1].columns
    assert unpruned.outcome.answer == "9 11 12 14" and unpruned.outcome.kept == ()
    assert feather.fitted.meets and feather.outcome.report.tokens.mean_per_layer == pytest.approx(60, abs=2)
    assert not deep.fitted.meets and len(deep.outcome.kept[-1]) == 60
    assert accm.outcome is None and "selection" in accm.fault


def test_what_cannot_be_met_or_made_is_told(asked):
    html = results_html(asked[-1])
    assert "Cannot come down to 60: some layers see every token. Set so that those behind them" in html
    assert "policy accm: expected a value for selection, compensator" in html
    assert html.count("<article") == 4 and html.count("data-stages=") == 3


@pytest.mark.parametrize("words", ["<image>", "a <image> b <image> c"])
def test_a_question_with_placeholders(checkpoint, words):
    if words == "<image>":
        assert ask(checkpoint, (), prompt=words)[-1].columns[0].outcome is not None
    else:
        with pytest.raises(InputError, match="prompt: expected 1 x '<image>'"):
            ask(checkpoint, (), prompt=words)


def test_a_budget_beyond_the_image(checkpoint):
    with pytest.raises(InputError, match="budget: expected at most 196 visual tokens, got 197"):
        ask(checkpoint, (), budget=197.0)


def test_tiles_are_not_drawn_but_answered(tmp_path):
    from helpers.served_tiny import tiny

    checkpoint = Checkpoint(str(tiny("llava_next", tmp_path)), device="cpu", dtype="float32")
    square, wide = Image.new("RGB", (64, 64), "red"), Image.new("RGB", (96, 30), "red")
    assert size_for(checkpoint, square).visual > size_for(checkpoint, wide).visual
    budget = size_for(checkpoint, wide).visual * 0.7
    results = ask(checkpoint, ("divprune",), budget, "what ?", wide)[-1]
    assert results.seen is None and all(column.outcome is not None for column in results.columns)
    html = results_html(results)
    assert html.count("Not drawn: llava_next") == 2 and 'type="range"' not in html and "--save" not in html
    assert results.columns[1].outcome.report.tokens.mean_per_layer == pytest.approx(budget, abs=1)


# Shown


def test_a_veil_dims_as_the_picture_of_run_does():
    picture = open_rgb(SCENE, "")
    kept = {*range(0, 196, 3), *range(60, 90)}
    over = veil((14, 14), kept).resize(picture.size, Image.Resampling.NEAREST)
    veiled = Image.alpha_composite(picture.convert("RGBA"), over).convert("RGB")
    difference = np.abs(np.asarray(veiled, int) - np.asarray(dim_dropped(picture, (14, 14), kept), int))
    assert difference.max() <= 2
    assert np.array_equal(np.asarray(veiled)[:8, :8], np.asarray(picture)[:8, :8])


def test_what_others_wrote_is_escaped(asked, tmp_path):
    bad = "<img src=x onerror=alert(1)>"
    last = asked[-1]
    first = replace(last.columns[0], outcome=replace(last.columns[0].outcome, answer=bad))
    other = replace(last.columns[1], outcome=replace(last.columns[1].outcome, answer=f"{bad} '\""))
    question = replace(last.question, prompt=bad, file=f"{bad}.png")
    html = results_html(replace(last, question=question, columns=(first, other)))
    example = Example(saved(tmp_path, "a.png", Image.new("RGB", (8, 8)), "PNG"), bad)
    for text in (html, fault_html(bad), status_html(replace(last, doing=bad)), examples_html([example])):
        assert "&lt;img src=x" in text and "<img src=x" not in text


def test_words_that_differ_are_marked(asked):
    last = asked[-1]
    said = replace(last.columns[1], outcome=replace(last.columns[1].outcome, answer="9 11 1 <b> 14"))
    html = results_html(replace(last, columns=(last.columns[0], said)))
    assert "9 11 <mark>1 &lt;b&gt;</mark> 14" in html and "differs" in html and "as unpruned" not in html
    same = results_html(replace(last, columns=last.columns[:2]))
    assert "<mark>" not in same and "as unpruned" in same


# Copied


def test_the_command_survives_a_shell(asked):
    words = shlex.split(command(asked[-1]))
    assert words[:2] == ["vlmprune", "run"]
    given = dict(pairwise(words))
    assert given["--image"] == "it's.png" and given["--prompt"] == "locate the green phone ."
    assert given["--dtype"] == "float32" and given["--max-new-tokens"] == "8"
    policies = [word for option, word in pairwise(words) if option == "--policy"]
    assert policies == [column.fitted.text for column in asked[-1].columns[1:3]]


def test_the_python_is_python(asked):
    bad = replace(asked[-1].question, file="a'\"\\\n.png", prompt='say "it\'s" {x}')
    text = python(replace(asked[-1], question=bad))
    compile(text, "copied", "exec")
    assert repr(bad.file) in text and "add_special_tokens=False" in text


def test_an_example_is_named_by_its_path(tmp_path):
    desk = Desk(["a"], [Example(SCENE, "?")])
    copy = saved(tmp_path, "other.png", ImageOps.flip(open_rgb(SCENE, "")), "PNG")
    assert desk.path_of(SCENE, SCENE.name).endswith(f"examples/glyphworld/images/{SCENE.name}")
    assert desk.path_of(copy, SCENE.name) == SCENE.name
    assert desk.path_of(SCENE, "mine.png") == "mine.png"


# The Space


def test_the_space_says_what_it_needs():
    space, project = ROOT / "examples" / "space", tomllib.loads((ROOT / "pyproject.toml").read_text())
    front = yaml.safe_load((space / "README.md").read_text().split("---")[1])
    pins = (ROOT / "requirements" / "pages.txt").read_text()
    assert f"gradio=={front['sdk_version']}\n" in pins and front["sdk"] == "gradio"
    assert (space / front["app_file"]).is_file() and len(front["short_description"]) <= 60
    needed = set((space / "requirements.txt").read_text().split())
    assert needed <= set(project["project"]["dependencies"])


# The command


def test_without_gradio(monkeypatch):
    monkeypatch.setattr("vlmprune.cli.web.find_spec", lambda name: None)
    done = cli("show")
    assert done.exit_code == 2
    assert done.stderr == "error: vlmprune show needs Gradio: pip install 'gradio>=6.31,<7'\n"


def test_a_port_that_is_taken(monkeypatch):
    monkeypatch.setattr("vlmprune.cli.web.find_spec", lambda name: object())
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = cli("show", "--port", port)
    assert done.exit_code == 2
    assert f"error: --port: expected a free port of 127.0.0.1, got {port} (" in done.stderr


def test_nothing_is_written_beside_the_package():
    """Gradio writes a stub beside a file with a component of its own."""
    pytest.importorskip("gradio", reason="Gradio is not installed (make test-pages)")
    from vlmprune.web import upload

    assert issubclass(upload.Upload, upload.gr.Image)
    assert not list(Path(upload.__file__).parent.glob("*.pyi"))
