"""Scorers as policies: saved and loaded, ranked by against a slow reference, moved, refused with one line."""

import copy
import json
import pickle
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from helpers.device import placed
from helpers.scorers import SLOPE, Slope, glance
from vlmprune.errors import InputError
from vlmprune.policies import (
    GlanceScorer,
    Learned,
    Needs,
    Reduction,
    Scorer,
    keep_for_mean_tokens,
    policy_from,
)
from vlmprune.testing import check_policy
from vlmprune.testing.context import WIDTH, make_context

IMAGES = [[(4, 5)], [], [(5, 4), (2, 10)]]


class Forgetful(Scorer):
    """Does not keep what it is made of."""

    def __init__(self, size):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(size))


class Plain(Scorer):
    """Whatever is given as scores."""

    def __init__(self, answer=None):
        super().__init__()
        self.answer = answer

    def forward(self, ctx):
        return self.answer


class Bare(Scorer):
    """Without settings and without an `__init__`."""

    def forward(self, ctx):
        return ctx.hidden.float().sum(-1)


class Loose(Scorer):
    """Takes whatever comes."""

    def __init__(self, **settings):
        super().__init__()
        self.settings_given = settings


class Tied(Scorer):
    """Two names of one weight."""

    def __init__(self):
        super().__init__()
        self.one = self.other = nn.Parameter(torch.zeros(2))


@pytest.fixture
def folder(tmp_path):
    glance(WIDTH).save_pretrained(tmp_path / "glance")
    return tmp_path / "glance"


def refused(said):
    return pytest.raises(InputError, match=f"^{said}$")


# ---- saved and loaded


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("loader", [Scorer, GlanceScorer])
def test_a_round_trip(tmp_path, loader, dtype):
    made = glance(WIDTH, layer=3).to(dtype)
    made.save_pretrained(tmp_path / "a")
    found = loader.from_pretrained(tmp_path / "a")
    assert type(found) is GlanceScorer and repr(found) == "GlanceScorer(width=8, layer=3, heads=2, size=4)"
    assert found.dtype == dtype and not found.training
    ctx = make_context(made.needs, IMAGES, 3)
    assert torch.equal(placed(made)(ctx), placed(found)(ctx))
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == ["model.safetensors", "scorer.json"]
    Slope(2).save_pretrained(tmp_path / "a")  # in the place of another
    assert repr(Scorer.from_pretrained(tmp_path / "a")) == "Slope(terms=2)"


def test_what_cannot_be_saved_leaves_the_folder(folder):
    class Local(Slope):
        pass

    for scorer, said in (
        (Forgetful(3), r"Forgetful: expected an attribute 'size', as its argument is called, got none"),
        (Loose(size=3), r"Loose: expected arguments that each have a name, got \*\*settings"),
        (Tied(), "Tied: expected weights that share no memory, got tied ones"),
        (Plain(answer={1}), r"Plain: expected settings for JSON, got \{'answer': \{1\}\}"),
        (Plain(answer=float("nan")), r"Plain: expected settings for JSON, got .*"),
        (
            Local(),
            r"Local: expected a class at the top of a module that can be imported, got .*<locals>\.Local",
        ),
    ):
        with refused(said):
            scorer.save_pretrained(folder)
    assert isinstance(Scorer.from_pretrained(folder), GlanceScorer)
    with refused("folder: expected a folder to write, got .*scorer.json, which is a file"):
        Bare().save_pretrained(folder / "scorer.json")
    assert isinstance(Scorer.from_pretrained(folder), GlanceScorer)


def test_a_scorer_without_settings(tmp_path):
    Bare().save_pretrained(tmp_path / "a")
    assert repr(Scorer.from_pretrained(tmp_path / "a")) == "Bare()"
    assert "settings are a value" in check_policy(Learned(Bare().eval(), 2, 0.5))


def test_folders_that_hold_no_scorer(folder, tmp_path):
    contents, weights = folder / "scorer.json", folder / "model.safetensors"
    with refused(
        rf"folder: expected a folder of a scorer, got {re.escape(str(tmp_path))}/no, which does not exist"
    ):
        Scorer.from_pretrained(tmp_path / "no")
    with refused("folder: expected a Slope in .*glance, got a GlanceScorer"):
        Slope.from_pretrained(folder)
    good = json.loads(contents.read_text())
    for data, said in (
        (
            "{",
            "scorer.json: expected a scorer that can be imported and its settings, got JSONDecodeError: .*",
        ),
        (json.dumps([1]), "scorer.json: expected a scorer .*, got TypeError: .*"),
        (json.dumps(good | {"scorer": "no.such:Thing"}), "scorer.json: .*, got ModuleNotFoundError: .*"),
        (json.dumps(good | {"scorer": "torch.nn:Thing"}), "scorer.json: .*, got AttributeError: .*"),
        (
            json.dumps(good | {"scorer": "torch.nn:Linear"}),
            r"scorer.json: expected a class of Scorer, got torch.nn:Linear in .*",
        ),
        (
            json.dumps(good | {"settings": {"width": 8}}),
            r"scorer.json: expected settings width, layer, heads, size, got width in .*",
        ),
        (
            json.dumps(good | {"settings": good["settings"] | {"width": "x"}}),
            r"scorer.json: expected settings that make a GlanceScorer, got .* in .*glance",
        ),
        (
            json.dumps(good | {"settings": good["settings"] | {"width": 16}}),
            r"model.safetensors: expected read.bias \(16,\), got read.bias \(8,\) in .*",
        ),
    ):
        contents.write_text(data)
        with refused(said):
            Scorer.from_pretrained(folder)
    contents.write_text(json.dumps(good))
    kept = load_file(weights)
    save_file({name: x for name, x in kept.items() if name != "glance"}, weights)
    with refused(r"model.safetensors: expected glance \(2, 4\), got no glance in .*"):
        Scorer.from_pretrained(folder)
    save_file(kept | {"more": torch.zeros(1)}, weights)
    with refused(r"model.safetensors: expected no more, got more \(1,\) in .*"):
        Scorer.from_pretrained(folder)
    weights.write_bytes(b"nothing")
    with refused(r"model.safetensors: expected weights of a scorer, got .*"):
        Scorer.from_pretrained(folder)
    weights.unlink()
    with refused(r"folder: expected weights in model.safetensors, got none in .*"):
        Scorer.from_pretrained(folder)
    contents.unlink()
    with refused(r"folder: expected one that a scorer was saved in, with scorer.json, got .*"):
        Scorer.from_pretrained(folder)


# ---- as a policy


def slow_choice(scores, ctx, keep, threshold=None):
    """Of each sample the best by score, the lower number first among equals; with a threshold those above it, one at least."""
    out = []
    for b, n in enumerate(ctx.counts):
        most = int(keep * n + 1e-6) if isinstance(keep, float) else min(n, keep * len(ctx.images()[b]))
        order = sorted(range(n), key=lambda i: (-scores[b][i], i))[: max(1, most) if n else 0]
        if threshold is not None:
            order = [i for i in order if 1 / (1 + 2.718281828459045 ** -scores[b][i]) > threshold] or order[
                :1
            ]
        out.append(sorted(order))
    return out


def kept(policy, ctx):
    choice = policy.select(ctx)
    index = choice.index if isinstance(choice, Reduction) else choice
    return [[i for i in row if i >= 0] for row in index.tolist()]


@pytest.mark.parametrize("keep", [0.3, 4, 10_000])
@pytest.mark.parametrize("threshold", [None, 0.2, 0.7, 0.999999])
def test_keeps_the_best(keep, threshold):
    policy = Learned(SLOPE, 2, keep, threshold)
    for few in (False, True):
        ctx = make_context(policy.needs(2), IMAGES, 2, few_values=few)
        if few:
            ctx.hidden.round_()
        scores = (ctx.hidden[..., 0] - 0.5 * ctx.hidden[..., 1] - 2 * ctx.hidden[..., 2]).tolist()
        assert kept(policy, ctx) == slow_choice(scores, ctx, keep, threshold)


@pytest.mark.parametrize("keep", [0.3, 10_000])
def test_a_threshold_holds_what_every_policy_holds(keep):
    assert check_policy(Learned(SLOPE, 2, keep, threshold=0.5))[-1] == "settings are a value"


def test_a_folder_is_a_policy_as_good(folder):
    policy = policy_from(f"learned:scorer={folder},layer=0,keep=0.3")
    assert policy.growth == "n" and "settings are a value" in check_policy(policy)
    ctx = make_context(policy.needs(0), IMAGES, 0)
    for same in (policy_from(policy.to_dict()), pickle.loads(pickle.dumps(policy)), copy.deepcopy(policy)):
        assert same == policy and kept(same, ctx) == kept(policy, ctx)
    assert kept(policy, ctx) == kept(Learned(glance(WIDTH), 0, 0.3), ctx)
    assert keep_for_mean_tokens(policy, 100, layers=4, visual=400) == 0.25


def test_a_module_is_no_data():
    with refused(
        r"scorer: expected data, or a function that can be imported by its name, got Slope\(terms=3\)"
    ):
        Learned(SLOPE, 2).to_dict()


def test_other_weights_are_another_policy(folder):
    before = Learned(str(folder), 0)
    glance(WIDTH, seed=1).save_pretrained(folder)
    after = Learned(str(folder), 0)
    assert before != after and repr(before) != repr(after)
    with refused(rf"weights: expected '{after.weights}', those of '.*', or '', got '{before.weights}'"):
        policy_from(before.to_dict())
    scorer = glance(WIDTH)
    one = Learned(scorer, 0)
    nn.init.zeros_(scorer.glance)
    assert one != Learned(scorer, 0)


def test_it_is_loaded_where_nothing_is_differentiated_and_trains_on(folder):
    policy = Learned(str(folder), 0)
    with torch.inference_mode():
        policy.select(make_context(policy.needs(0), IMAGES, 0))
    scorer = placed(policy._held.scorer)
    scorer(make_context(policy.needs(0), IMAGES, 0)).sum().backward()
    assert scorer.glance.grad is not None


@pytest.mark.parametrize(
    "settings, said",
    [
        ({"scorer": "no/such"}, "scorer: expected a Scorer, or the folder of a saved one, got 'no/such'"),
        (
            {"scorer": nn.Linear(2, 1)},
            "scorer: expected a Scorer, or the folder of a saved one, got Linear.*",
        ),
        ({"layer": -1}, "layer: expected a whole number >= 0, got -1"),
        ({"keep": 0}, "keep: expected a share .*, got 0"),
        ({"threshold": 1}, r"threshold: expected a probability in \(0, 1\) as a float, or None, got 1"),
        (
            {"threshold": 0.5, "spend": "image"},
            "spend: expected 'prompt' with a threshold, which counts no images, got 'image'",
        ),
        ({"weights": "x"}, r"weights: expected '\w{8}', those of Slope\(terms=3\), or '', got 'x'"),
    ],
    ids=str,
)
def test_settings_that_are_refused(settings, said):
    with refused(said):
        Learned(**({"scorer": SLOPE, "layer": 2} | settings))


def test_a_folder_without_weights(tmp_path):
    with refused(f"scorer: expected a folder with model.safetensors, got {re.escape(str(tmp_path))}"):
        Learned(str(tmp_path), 0)


def test_how_many_a_threshold_keeps_is_not_known_beforehand():
    with refused("threshold: expected None where counts must be known beforehand, got one; see keep"):
        Learned(SLOPE, 2, threshold=0.5).kept(576, 1, 2)


def test_a_scorer_is_held_to_its_layer_its_width_and_its_shape():
    with refused(
        r"layer: expected 3, where GlanceScorer\(width=8, layer=3, heads=2, size=4\) was trained, got 2"
    ):
        Learned(glance(WIDTH, layer=3), 2).needs(2)
    ctx = make_context(Needs(hidden=True, text=True), IMAGES, 0)
    with refused("ctx.hidden: expected rows of width 16, as the scorer was made for, got 8"):
        Learned(glance(16), 0).select(ctx)
    with refused(r"scorer: expected a module in evaluation mode \(\.eval\(\)\), got one in training mode"):
        Learned(Slope(), 0).select(ctx)
    for answer, got in ((None, "NoneType"), (torch.zeros(3, 4), r"torch.float32 \(3, 4\)")):
        with refused(rf"scorer: expected floating scores \(3, 40\), got {got}"):
            Learned(Plain(answer).eval(), 0).select(ctx)
    for name in ("hidden", "text_hidden"):
        with refused(rf"ctx\.{name.removesuffix('_hidden')}: expected .*declare Needs.*, got None"):
            placed(glance(WIDTH))(
                make_context(Needs(hidden=name != "hidden", text=name == "hidden"), IMAGES, 0)
            )
    with pytest.raises(NotImplementedError, match="Scorer: expected a `forward` of its own, got none"):
        Scorer()(ctx)


def test_what_the_documentation_shows():
    text = (Path(__file__).parents[2] / "docs" / "scorers.md").read_text()
    names = {}
    exec(text.split("```python\n")[1].split("```")[0], names)
    assert "settings are a value" in check_policy(Learned(names["Bilinear"](WIDTH).eval(), layer=2))


# ---- the glance, against itself said slowly


def slow_glance(scorer, rows, words):
    """Logits of one sample's tokens ``[N, D]`` by its words ``[T, D]``: one head, one word, one token at a time."""
    w, heads, size = scorer.state_dict(), scorer.heads, scorer.size
    linear = lambda name, x: w[f"{name}.weight"] @ x + w[f"{name}.bias"]  # noqa: E731
    norm = lambda name, x: nn.functional.layer_norm(x, x.shape, w[f"{name}.weight"], w[f"{name}.bias"])  # noqa: E731
    none = torch.zeros_like(rows[0])
    normed = [none, *(norm("read", x) for x in words), none]
    spoken = [nn.functional.gelu(linear("words", torch.cat(normed[i : i + 3]))) for i in range(len(words))]
    asked = []
    for h in range(heads):
        here = slice(h * size, (h + 1) * size)
        weight = [float((w["glance"][h] @ linear("word_keys", x)[here] / size**0.5).exp()) for x in spoken]
        total = 1 + sum(weight)
        read = sum(
            (a / total * linear("word_values", x)[here] for a, x in zip(weight, spoken, strict=True)),
            none[:size],
        )
        asked.append(w["glance"][h] + read)
    asked = torch.cat(asked)
    asked = asked + linear("ask.2", nn.functional.gelu(linear("ask.0", asked)))
    out = []
    for row in rows:
        seen = norm("see", row)
        key = linear("token_keys", seen)
        logits = (
            torch.stack([asked[i : i + size] @ key[i : i + size] for i in range(0, heads * size, size)])
            / size**0.5
        )
        state = nn.functional.gelu(linear("token_state", seen))
        out.append(
            linear("predict.2", nn.functional.gelu(linear("predict.0", torch.cat([logits, state]))))[0]
        )
    return torch.stack(out)


def test_a_glance_is_what_it_says():
    scorer = placed(glance(WIDTH))
    ctx = make_context(scorer.needs, IMAGES, 0, after=[3, 0, 0])
    found = scorer(ctx)
    for b, n in enumerate(ctx.counts):
        words = int((ctx.text[b] >= 0).sum())
        assert (words == 0) == (b > 0)
        if n:
            want = slow_glance(scorer, ctx.hidden[b, :n], ctx.text_hidden[b, :words])
            torch.testing.assert_close(found[b, :n], want, atol=1e-5, rtol=1e-5)


def test_a_search_for_a_share_reads_the_folder_once(tmp_path, monkeypatch):
    SLOPE.save_pretrained(tmp_path / "slope")
    policy = Learned(str(tmp_path / "slope"), layer=2)
    read = []
    load = Scorer.from_pretrained
    monkeypatch.setattr(Scorer, "from_pretrained", lambda folder: read.append(folder) or load(folder))
    share = keep_for_mean_tokens(policy, 192, layers=32, visual=576)
    assert policy.at(share) == Learned(str(tmp_path / "slope"), layer=2, keep=share) and len(read) == 1
