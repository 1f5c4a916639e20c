"""Calls out of the ordinary: a replay answers them as a plain run does, or the report says why there was none."""

import gc
from dataclasses import dataclass, field
from weakref import ref

import pytest
import torch
from torch.nn.modules.module import register_module_forward_hook
from torch.utils.flop_counter import FlopCounterMode

import vlmprune
from helpers.recorder import Recorder
from helpers.tiny import make_batch, make_model
from vlmprune import FastV, Graphs
from vlmprune.policies.base import Needs

pytestmark = pytest.mark.real("no graph is made where a dispatch mode watches, as the pretended device does")

POLICY = FastV(layer=2, keep=4)
PADDED = [[4, "I", 7], ["I", 3]]
TOLERANCE = {"atol": 1e-4, "rtol": 0}


def scope(model, policy, graphs):
    return vlmprune.meter(model, graphs) if policy is None else vlmprune.prune(model, policy, graphs)


@torch.no_grad()
def answer(model, batch, graphs=None, policy=POLICY, **settings):
    """The output, what was kept of every sample, and what the report says."""
    with scope(model, policy, graphs) as run:
        out = model(**batch, **settings)
        kept = [run.kept(b) for b in range(len(out.logits))] if run.stages else []
        return out, kept, run.report().graph


def assert_same(model, batch, graphs, policy=POLICY, **settings):
    """As a plain run; returns what the report says."""
    got, kept, said = answer(model, batch, graphs, policy, **settings)
    want, kept_plainly, _ = answer(model, batch, None, policy, **settings)
    real = batch["attention_mask"].bool()
    torch.testing.assert_close(got.logits[real], want.logits[real], **TOLERANCE)
    assert all(map(torch.equal, kept, kept_plainly))
    return said


def assert_always_same(model, batches, policy=POLICY, said="replayed"):
    """As a plain run, all of them; the report says so from the second one on."""
    graphs = Graphs(recorder=Recorder())
    for turn, batch in enumerate(batches):
        how = assert_same(model, batch, graphs, policy)
        assert not turn or how.startswith(said), how


def with_holes(seed):
    """Two prompts whose masks have holes in the text; no position_ids, so the holes are counted."""
    batch = make_batch([[4, "I", 7]] * 2, seed=seed)
    batch["attention_mask"][0, 2] = batch["attention_mask"][1, 24] = 0
    return batch


@pytest.fixture(scope="module")
def model():
    return make_model()


@pytest.mark.parametrize("policy", [None, POLICY, vlmprune.VisPruner(keep=6, positions="pack")], ids=repr)
def test_positions_that_the_model_counts_itself(model, policy):
    assert_always_same(model, map(with_holes, range(3)), policy)


@pytest.mark.parametrize("policy", [None, POLICY, FastV(layer=2, keep=4, earlier_kv="compact")], ids=repr)
def test_a_turn_behind_padded_prompts_without_positions(model, policy):
    """Tokens to come are counted from the padded length on, so the prompt's own must be."""
    graphs, logits = Graphs(recorder=Recorder()), []
    batch, more = make_batch(PADDED), make_batch([[3], [3]], seed=1)
    for _ in range(2):
        answer(model, batch, graphs, policy)
    for some in (graphs, None):
        with torch.no_grad(), scope(model, policy, some):
            cache = model(**batch, use_cache=True).past_key_values
            mask = torch.cat([batch["attention_mask"], more["attention_mask"]], 1)
            logits.append(model(more["input_ids"], attention_mask=mask, past_key_values=cache).logits)
    torch.testing.assert_close(*logits, **TOLERANCE)


def test_tables_that_depend_on_the_longest_position():
    """28 tokens in a graph of 32 rows, where 30 make them long ones."""
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 29}
    rope |= {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
    model = make_model(rope_parameters=rope, max_position_embeddings=29)
    graphs = Graphs(recorder=Recorder())
    for seed in range(3):
        assert_same(model, make_batch([[4, "I", 7]], seed=seed), graphs)


# What a key tells apart, and what is refused


def test_a_number_of_tokens_is_no_share(model):
    """keep=1 and keep=1.0 compare equal."""
    graphs = Graphs(recorder=(recorder := Recorder()))
    for policy in (FastV(layer=2, keep=1), FastV(layer=2, keep=1.0)):
        for seed in range(3):
            said = assert_same(model, make_batch(PADDED, seed=seed), graphs, policy)
    assert said.startswith("replayed") and recorder.captures == 2


@dataclass(frozen=True)
class WithTable(FastV):
    table: dict = field(default_factory=dict)


def test_a_policy_that_nothing_tells_apart(model):
    policy, batch = WithTable(layer=2, keep=4, table={"a": 1}), make_batch(PADDED)
    said = [assert_same(model, batch, Graphs(recorder=Recorder()), policy) for _ in range(3)]
    assert said == ["plain: a policy's settings must tell it apart (unhashable type: 'dict')"] * 3


def labelled(seed):
    """The last token of the image predicts a label, so it stays."""
    batch = make_batch(PADDED, seed=seed)
    return batch | {"labels": batch["input_ids"].clone()}


def test_labels(model):
    assert_always_same(model, map(labelled, range(3)), said="plain: labels are given")


def test_a_mode_that_watches_operations(model):
    graphs, counts = Graphs(recorder=Recorder()), []
    for some in (None, graphs, graphs, graphs):
        with FlopCounterMode(display=False) as counter:
            said = answer(model, make_batch(PADDED), some)[2]
        counts.append(counter.get_total_flops())
    assert len(set(counts)) == 1 and said.startswith("plain: a dispatch mode watches the operations")


# What a model may become between two prompts


def adapted():
    """A LLaVA with an adapter on its text model."""
    peft = pytest.importorskip("peft")
    settings = peft.LoraConfig(
        target_modules=r".*language_model.*(q_proj|down_proj)", init_lora_weights=False
    )
    return peft.get_peft_model(make_model(), settings).eval()


def scaled(model):
    for part in model.modules():
        if isinstance(getattr(part, "scaling", None), dict):
            part.scaling["default"] *= 3


@pytest.mark.parametrize(
    "change",
    [lambda model: model.base_model.disable_adapter_layers(), scaled, lambda model: model.merge_adapter()],
    ids=["off", "scaled", "merged"],
)
def test_an_adapter_is_switched(change):
    """None of it moves a weight, or changes a module for another."""
    model, graphs = adapted(), Graphs(recorder=(recorder := Recorder()))
    for seed in range(2):
        assert_same(model, make_batch(PADDED, seed=seed), graphs)
    change(model)
    assert assert_same(model, make_batch(PADDED, seed=2), graphs).startswith("replayed")
    assert recorder.captures == 2


class Counting(torch.nn.Module):
    """A layer's MLP that counts its calls, and answers by their number."""

    def __init__(self, mlp):
        super().__init__()
        self.mlp, self.calls = mlp, 0

    def forward(self, x):
        self.calls += 1
        return self.mlp(x) * self.calls


def test_a_module_that_changes_as_it_runs():
    model, graphs = make_model(), Graphs(recorder=Recorder())
    layer = model.model.language_model.layers[4]
    layer.mlp = Counting(layer.mlp)
    batch = make_batch(PADDED)
    said = [answer(model, batch, graphs)[2] for _ in range(3)]
    assert said[1:] == ["plain: other code's modules change as they run"] * 2 and len(graphs) == 0


def test_a_hook_of_other_code_sees_every_call():
    """Also one that changes nothing, and comes and goes."""
    model, graphs, seen = make_model(), Graphs(recorder=(recorder := Recorder())), []
    mlp, batch = model.model.language_model.layers[4].mlp, make_batch(PADDED)
    for _ in range(2):
        answer(model, batch, graphs)
    handle = mlp.register_forward_hook(lambda module, args, out: seen.append(out.shape))
    said = [answer(model, batch, graphs)[2] for _ in range(2)]
    assert (
        said == ["plain: a hook of other code on a LlamaMLP, which would see no replay"] * 2
        and len(seen) == 2
    )
    handle.remove()
    assert answer(model, batch, graphs)[2].startswith("replayed") and recorder.captures == 2
    with register_module_forward_hook(lambda module, args, out: seen.append(None)):
        assert answer(model, batch, graphs)[2] == "plain: global hooks on every module"
    assert len(seen) > 10


def test_a_projector_that_stages_call():
    """VisionZip projects merged features anew."""
    model, graphs = make_model(), Graphs(recorder=(recorder := Recorder()))
    policy, projector = (
        vlmprune.VisionZip(dominant=5, contextual=2, positions="pack"),
        model.model.multi_modal_projector,
    )
    for seed in range(2):
        assert_same(model, make_batch(PADDED, seed=seed), graphs, policy)
    state = {name: 1.5 * x for name, x in projector.state_dict().items()}
    projector.load_state_dict(state, assign=True)
    assert assert_same(model, make_batch(PADDED, seed=2), graphs, policy).startswith("replayed")
    assert recorder.captures == 2


# Masks


def with_a_hidden_token(seed):
    """The mask hides a token of the first image."""
    batch = make_batch(PADDED, seed=seed)
    batch["attention_mask"][0, 9] = 0
    return batch


def test_a_mask_that_hides_visual_tokens(model):
    assert_always_same(model, map(with_a_hidden_token, range(3)), said="plain: the attention mask hides")


def test_a_sample_that_is_padding_only(model):
    batches = [make_batch([*PADDED, [5]], seed=seed) for seed in range(3)]
    for batch in batches:
        batch["attention_mask"][2] = 0
    assert_always_same(model, batches)


# What policies say, and modes


class Varying(FastV):
    """Keeps of all samples but the first only those of the first tokens whose hidden state is positive."""

    def ranks(self, layer):
        return False

    def needs(self, layer):
        return Needs(hidden=True)

    def select(self, ctx):
        stay = ctx.hidden[:, : self.keep, 0] > 0
        stay[0], stay[:, 0] = True, True
        numbers = torch.where(stay, torch.arange(self.keep), self.keep).sort(1).values
        return torch.where(numbers < self.keep, numbers, -1)


def test_a_policy_that_keeps_another_number_than_it_says(model):
    batches = [make_batch(PADDED, seed=seed) for seed in range(3)]
    assert_always_same(model, batches, Varying(layer=2, keep=6), "plain: adaptive: ")


@pytest.mark.parametrize("first", [torch.inference_mode, torch.no_grad])
def test_captured_in_one_mode_and_replayed_in_the_other(model, first):
    graphs, batch, step = Graphs(recorder=Recorder()), make_batch(PADDED), torch.tensor([[5], [5]])
    mask = torch.nn.functional.pad(batch["attention_mask"], (0, 1), value=1)
    logits = []
    with vlmprune.prune(model, POLICY, graphs) as run:
        for mode in (first, first, torch.no_grad, torch.inference_mode):
            with mode():
                cache = model(**batch, use_cache=True).past_key_values
                logits.append(model(step, attention_mask=mask, past_key_values=cache).logits)
    assert run.report().graph.startswith("replayed")
    for some in logits[1:]:
        torch.testing.assert_close(some, logits[0], **TOLERANCE)


def test_a_graph_holds_nothing_of_the_prompt_it_was_captured_with():
    """All states of the vision tower would be much, and are counted nowhere."""
    model, graphs, states = make_model(), Graphs(recorder=Recorder()), []
    tower = model.model.vision_tower
    tower.register_forward_hook(lambda module, args, out: states.append(ref(out.last_hidden_state)))
    for _ in range(2):
        said = answer(model, make_batch(PADDED), graphs)[2]
    gc.collect()
    assert said.startswith("replayed") and [state() for state in states] == [None, None]
