"""Prefills captured and replayed: what an unpruned or plainly pruned run gives, for every method, batch and family.

Without a GPU a recorder of operations stands in the place of CUDA graphs (``helpers.recorder``).
"""

from itertools import product

import pytest
import torch
from transformers import CompileConfig

import vlmprune
from helpers.families import CASES, build, prompts
from helpers.methods import shuffled
from helpers.recorder import Recorder
from helpers.scorers import glance
from helpers.table import CELLS, KINDS
from helpers.table import FAMILIES as TABLE
from helpers.tiny import BEFORE_PREFILL, STEPS, generate, make_batch, make_model, upstream
from vlmprune import Graphs
from vlmprune.policies import PruningPolicy
from vlmprune.policies.registry import BUILT_IN, policies

pytestmark = pytest.mark.real("no graph is made where a dispatch mode watches, as the pretended device does")

SPECS = {
    "one": [[4, "I", 7]],
    "padded": [[4, "I", 7], [2, "I", 5]],
    "padded-2-1-0-images": [["I", 9, "I", 4], [3, "I", 5], [12]],
    "ends-with-its-image": [[4, "I"]],
}
FIXED = {
    "unpruned": None,
    "fastv": vlmprune.FastV(layer=2, keep=0.4),
    "fastv-compact": vlmprune.FastV(layer=2, keep=6, rows="mean", earlier_kv="compact"),
    "fastv-image": vlmprune.FastV(layer=3, keep=5, spend="image"),
    "pyramiddrop": vlmprune.PyramidDrop(layers=(1, 3, 5), positions="pack"),
    "sparsevlm": vlmprune.SparseVLM(layers=(2, 4), keep=(9, 4), positions="pack"),
    "sparsevlm+": vlmprune.SparseVLMPlus(layers=(2, 4), keep=(9, 4), heads=3),
    "dart": vlmprune.DART(layer=2, keep=8, pivots=(2, 2), count="exact"),
    "knorm": vlmprune.KNorm(layer=2, keep=0.4),
    "greedyprune": vlmprune.GreedyPrune(layer=2, keep=6, tau=0.8),
    "v2drop": vlmprune.V2Drop(layers=(2, 4), keep=(0.5, 3)),
    "dart-first": vlmprune.DART(layer=0, keep=8, pivots=(2, 2), order="norm"),
    "dart-then": vlmprune.Stages([vlmprune.DART(layer=0, keep=12), vlmprune.DART(layer=3, keep=5)]),
    "priortr": vlmprune.PriorTR(layer=2, keep=6),
    "fitprune": vlmprune.FitPrune(layers=(1, 2, 4), drop=(2, 0.3, 4)),
    "mustdrop": vlmprune.MustDrop(layers=(2, 4), keep=(9, 4), positions="pack"),
    "ficoco": vlmprune.FiCoCo(layers=(2, 4), drop=4, positions="pack"),
    "vscan": vlmprune.VScan(keep=8, then=4, layer=3, window=2, shallow_layer=1, positions="pack"),
    "star": vlmprune.STAR(keep=8, then=4, layer=3),
    "vtw": vlmprune.VTW(layer=3),
    "fastervlm": vlmprune.FasterVLM(keep=6, positions="pack"),
    "visionzip": vlmprune.VisionZip(dominant=5, contextual=2, positions="pack"),
    "vispruner": vlmprune.VisPruner(keep=6, positions="keep"),
    "folder": vlmprune.Folder(keep=6, positions="pack"),
    "aim": vlmprune.AIM(keep=9, layer=2, stages=2, positions="pack"),
    "flowcut": vlmprune.FlowCut(keep=6, vision_layers=(0, 1), positions="pack"),
    "divprune": vlmprune.DivPrune(keep=6, positions="pack"),
    "cdpruner": vlmprune.CDPruner(keep=6, positions="pack"),
    "prumerge": vlmprune.PruMerge(keep=7, neighbours=4),
    "prumerge-plus": vlmprune.PruMerge(keep=7, plus=True, positions="pack"),
    "trim": vlmprune.TRIM(keep=6, positions="pack"),
    "tome": vlmprune.ToMe(keep=6, positions="pack"),
    "visiontrim": vlmprune.VisionTrim(keep=8, positions="pack"),
    "hired": vlmprune.HiRED(keep=6, early_layer=0),
    "globalcom2": vlmprune.GlobalCom2(keep=6, positions="pack"),
    "holov": vlmprune.HoloV(keep=6, runs=4),
    "hiprune": vlmprune.HiPrune(keep=10, alpha=0.5, object_layer=0),
    "scope": vlmprune.SCOPE(keep=6, positions="pack"),
    "mmtok": vlmprune.MMTok(keep=6),
    "prunesid": vlmprune.PruneSID(keep=9),
    "zoo_prune": vlmprune.ZOOPrune(keep=6, directions=3),
    "agilepruner": vlmprune.AgilePruner(keep=6, average=4.0),
    "evs": vlmprune.EVS(keep=6),
    "vidcom2": vlmprune.VidCom2(keep=6, positions="pack"),
    "dycoke": vlmprune.DyCoke(keep=6),
    "fastvid": vlmprune.FastVID(keep=6),
    "flashvid": vlmprune.FlashVID(keep=9, then=4, layer=3, positions="pack"),
    "prunevid": vlmprune.PruneVid(keep=9, then=0.5, layer=3),
    "holitom": vlmprune.HoliTom(keep=9, then=4, layer=3, positions="pack"),
    "accm-selection": vlmprune.ACCMSelection(keep=6, positions="pack"),
    "accm-selection-released": vlmprune.ACCMSelection(
        keep=6,
        nearest=False,
        vision_layer=-1,
        heads="joined",
        overflow="last",
        order="selected",
        positions="pack",
    ),
    "learned": vlmprune.Learned(glance(64), layer=0, keep=6),
    "sgl": vlmprune.SGL(shuffled, layer=3, keep=0.4),
    "random": vlmprune.Random(layer=0, keep=0.3),
    "uniform": vlmprune.Uniform(layer=1, keep=0.25),
    "without-sinks": vlmprune.WithoutSinks(vlmprune.FastV(layer=2, keep=0.4), tau=2.5, dimensions=(1, 5, 9)),
    "two": vlmprune.Stages([vlmprune.FasterVLM(keep=8, positions="pack"), vlmprune.FastV(layer=3, keep=0.5)]),
}
ADAPTIVE = {
    "feather": vlmprune.Feather(layers=(2, 4), keep=0.5),
    "sparsevlm-rank": vlmprune.SparseVLM(layers=(2, 4), version="paper", positions="pack"),
    "mustdrop-thresholds": vlmprune.MustDrop(layers=(2, 4), global_thr=0.05, individual_thr=0.05),
    "prumerge-outliers": vlmprune.PruMerge(keep=0.9, adaptive=True, plus=True, positions="pack"),
    "prunevid-clusters": vlmprune.PruneVid(layer=3),
    "grid": vlmprune.Stages([vlmprune.FastV(layer=1), vlmprune.Uniform(layer=2, keep=None, stride=2)]),
    "both": vlmprune.FastV(layer=2, keep=0.5) | vlmprune.Uniform(layer=2, keep=0.3),
}


def scope(model: torch.nn.Module, policy: PruningPolicy | None, graphs: Graphs | None):
    return vlmprune.meter(model, graphs) if policy is None else vlmprune.prune(model, policy, graphs)


def outcome(model, policy, batch, graphs=None, **settings):
    """Tokens, logits, what was kept at every stage, the cache, and what the report says."""
    with scope(model, policy, graphs) as run:
        tokens, logits, out = generate(model, batch, STEPS, **settings)
        samples, stages = len(batch["input_ids"]), range(len(run.stages))
        kept = [run.kept_at(i, b) for i in stages for b in range(samples)]
        return tokens, logits, kept, out.past_key_values, run.report()


def assert_same(got, want):
    assert torch.equal(got[0], want[0])
    torch.testing.assert_close(got[1], want[1], atol=1e-4, rtol=0)
    assert all(map(torch.equal, got[2], want[2])) and len(got[2]) == len(want[2])
    for one, other in zip(got[3].layers, want[3].layers, strict=True):
        assert type(one) is type(other) and one.keys.shape == other.keys.shape
        assert one.get_seq_length() == other.get_seq_length()
    for field in ("visual_tokens", "stages", "tokens", "flops", "kv_bytes"):
        assert getattr(got[4], field) == getattr(want[4], field)


@pytest.fixture(scope="module")
def model():
    return make_model()


@pytest.mark.parametrize(
    "name, specs",  # "padded" alone is part of what the unequal batch is: once, and in the tests below
    [
        (name, specs)
        for name, specs in product(FIXED, SPECS)
        if (specs != "padded" or name == "fastv") and (name, specs) != ("vtw", "ends-with-its-image")
    ],
)
def test_replays_equal_plain_runs(model, name, specs):
    """The second prompt of a shape is captured; it and the next one, with a longer text, answer as ever."""
    graphs, policy = Graphs(recorder=(recorder := Recorder())), FIXED[name]
    longer = [[*spec, 1] for spec in SPECS[specs]]
    first = outcome(model, policy, make_batch(SPECS[specs], seed=0), graphs)
    assert first[4].graph.startswith("plain: the first prompt of its shape")
    for seed, spec in enumerate((SPECS[specs], longer), 1):
        batch = make_batch(spec, seed=seed)
        got = outcome(model, policy, batch, graphs)
        assert_same(got, outcome(model, policy, batch))
        assert got[4].graph.startswith("replayed: ")
    assert recorder.captures == 1 and recorder.replays == 2 and len(graphs) == 1


def test_a_prompt_that_ends_with_its_image_keeps_that_row_and_is_run_as_ever(model):
    """That it does is not known in a graph."""
    graphs, policy, batch = (
        Graphs(recorder=Recorder()),
        FIXED["vtw"],
        make_batch(SPECS["ends-with-its-image"]),
    )
    for _ in range(2):
        got = outcome(model, policy, batch, graphs)
        assert_same(got, outcome(model, policy, batch))
        assert got[4].graph == "plain: a prompt that ends with its image, whose last row stays"


@pytest.mark.parametrize("name", ADAPTIVE)
@pytest.mark.real("reads are found below what is pretended")
def test_what_depends_on_data_runs_as_ever_and_says_so(model, name):
    graphs = Graphs(recorder=(recorder := Recorder()))
    for seed in range(3):
        batch = make_batch(SPECS["padded"], seed=seed)
        got = outcome(model, ADAPTIVE[name], batch, graphs)
        assert_same(got, outcome(model, ADAPTIVE[name], batch))
    assert got[4].graph.startswith("plain: adaptive: ")
    assert recorder.captures == 0


def test_every_method_is_in_one_of_the_tables():
    def names(policies):
        return {type(policy) for policy in policies.values() if policy is not None}

    made = names(FIXED) | names(ADAPTIVE)
    # of random's kind; in test_accm.py; never one, in test_restored.py and test_waves_around.py
    elsewhere = {vlmprune.RandomDeep, vlmprune.ACCM, vlmprune.LVLMCSP, vlmprune.Scout}
    assert {policies()[name] for name in BUILT_IN} <= made | elsewhere


BOTH = {"both-tower": vlmprune.VScan(0.6, 0.5, layer=3, window=2, shallow_layer=0, positions="keep")}


@pytest.mark.parametrize("family, kind", [*CELLS, *((family, "both-tower") for family in TABLE)])
def test_families(family, kind):
    case, policy = CASES[family], (KINDS | BOTH)[kind]
    model, graphs = build(case), Graphs(recorder=(recorder := Recorder()))
    for seed in range(3):
        batch, _ = prompts(case, case.padded, seed)
        with torch.no_grad():
            with vlmprune.prune(model, policy) as run:
                want, kept = model(**batch, use_cache=True), run.kept()
            with vlmprune.prune(model, policy, graphs) as run:
                got = model(**batch, use_cache=True)
        valid = batch["attention_mask"].bool()
        torch.testing.assert_close(got.logits[valid], want.logits[valid], atol=1e-4, rtol=1e-4)
        assert torch.equal(run.kept(), kept)
    assert run.report().graph.startswith("replayed") and recorder.replays == 2


@pytest.mark.parametrize(
    "attention", [pytest.param("eager", marks=upstream("makes a tensor for each of its masks")), "vlmprune"]
)
def test_attention_implementations(attention):
    model = make_model(attn=attention)
    graphs = Graphs(recorder=(recorder := Recorder()))
    for seed in range(3):
        batch = make_batch(SPECS["padded"], seed=seed)
        assert_same(*(outcome(model, FIXED["fastv"], batch, g) for g in (graphs, None)))
    assert recorder.replays == 2


WAYS = {
    "static": ({"cache_implementation": "static"}, "replayed"),
    "beams": ({"num_beams": 3}, "replayed"),
    "no cache": ({"use_cache": False}, "replayed"),
    "chunks": ({"prefill_chunk_size": 9}, "plain: a prompt in several calls"),
    "offloaded": ({"cache_implementation": "offloaded"}, "plain: an offloaded cache"),
}
WAYS_OF = [
    pytest.param(name, way, marks=[pytest.mark.gpu] if way == "offloaded" else [])
    for name in ("fastv", "fastv-compact", "pyramiddrop", "fastervlm")
    for way in WAYS
    if way != "chunks" or (BEFORE_PREFILL and name != "fastervlm")  # which needs whole images
]


@pytest.mark.parametrize("name, way", WAYS_OF)
def test_ways_of_generating(model, name, way):
    graphs, (settings, said) = Graphs(recorder=Recorder()), WAYS[way]
    for seed in range(3):
        batch = make_batch(SPECS["padded"], seed=seed)
        got, want = (outcome(model, FIXED[name], batch, g, **settings) for g in (graphs, None))
        assert torch.equal(got[0], want[0])
        torch.testing.assert_close(got[1], want[1], atol=1e-4, rtol=0)
    assert got[4].graph.startswith(said)


def test_compiled_decode_follows_a_replay():
    """generate's own compiled step, one graph, on the static cache that a replay has filled."""
    model, policy = make_model(), FIXED["pyramiddrop"]
    compiled = CompileConfig(fullgraph=True, backend="eager", mode=None, dynamic=False)
    compiled._compile_all_devices = True
    how = {"cache_implementation": "static", "compile_config": compiled}
    graphs = Graphs(recorder=(recorder := Recorder()))
    torch.compiler.reset()
    for seed in range(3):
        batch = make_batch(SPECS["padded"], seed=seed)
        got = outcome(model, policy, batch, graphs, **how)
        want = outcome(model, policy, batch)
        assert torch.equal(got[0], want[0])
        torch.testing.assert_close(got[1], want[1], atol=1e-4, rtol=0)
    assert recorder.replays == 2 and got[4].decode_steps == 0  # compiled steps run no hook
    torch.compiler.reset()


def test_a_second_turn_and_training_run_as_ever(model):
    graphs, policy = Graphs(recorder=Recorder()), FIXED["fastv"]
    batch = make_batch(SPECS["one"])
    with vlmprune.prune(model, policy, graphs) as run:
        with torch.no_grad():
            model(**batch)
            out = model(**batch, use_cache=True)
            assert run.report().graph.startswith("replayed")
            more = make_batch(SPECS["one"], seed=1)
            more["attention_mask"] = torch.cat([batch["attention_mask"], more["attention_mask"]], 1)
            model(**more, past_key_values=out.past_key_values)
            assert run.report().graph == "plain: a prompt in several calls, or behind another"
        model(**batch)
        assert run.report().graph == "plain: gradients are on (torch.no_grad)"
