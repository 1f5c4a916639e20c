"""What is kept of graphs, what lets one go, and what a failed capture leaves behind."""

import copy
import pickle
import threading

import pytest
import torch

import vlmprune
from helpers.recorder import Recorder
from helpers.tiny import generate, make_batch, make_model
from vlmprune import FasterVLM, FastV, Graphs, InputError, warmup
from vlmprune.constants import whole_numbers
from vlmprune.models.graphs.bindings import Bindings
from vlmprune.models.graphs.buckets import bucket, rounded
from vlmprune.models.graphs.reads import HostRead, HostReads

pytestmark = pytest.mark.real("no graph is made where a dispatch mode watches, as the pretended device does")

POLICY = FastV(layer=2, keep=0.4)
STEPS = 3


def answer(model, batch, graphs, policy=POLICY):
    """Logits, and what the report says."""
    with vlmprune.prune(model, policy, graphs) as run:
        return generate(model, batch, STEPS)[1], run.report().graph


def batch_of(words=7, images=1, seed=0):
    return make_batch([[4, *["I"] * images, words]], seed=seed)


@pytest.fixture(scope="module")
def model():
    return make_model()


# Buckets


def test_buckets_hold_the_prompt_and_little_more():
    for n in range(1, 3000):
        room = rounded(n)
        assert room >= n and rounded(room) == room
        assert room - n < 16 or room - n < n / 16
    assert len({rounded(n) for n in range(1, 257)}) == 16


def test_a_bucket_has_room_for_every_sample():
    assert bucket((640,), (576,)) == 640
    assert bucket((641,), (576,)) == 656
    assert bucket((30, 60), (16, 32)) == 32 + 32  # the longest text, beside the most visual tokens
    assert bucket((16,), (16,)) == 16  # no text


# The store


def test_the_latest_are_kept(model):
    graphs = Graphs(most=2, recorder=(recorder := Recorder()))
    lengths = (7, 30, 60)
    for words in lengths:
        for _ in range(2):
            answer(model, batch_of(words), graphs)
    assert len(graphs) == 2 and recorder.captures == 3
    for words in lengths[1:]:
        assert answer(model, batch_of(words), graphs)[1].startswith("replayed")
    assert recorder.captures == 3
    assert answer(model, batch_of(lengths[0]), graphs)[1].startswith(
        "replayed"
    )  # it came before: captured at once
    assert recorder.captures == 4 and len(graphs) == 2
    assert answer(model, batch_of(lengths[2]), graphs)[1].startswith("replayed")
    assert recorder.captures == 4  # lengths[1] was used longest ago, and went


def test_memory_is_bounded(model):
    graphs = Graphs(recorder=Recorder())
    for _ in range(2):
        answer(model, batch_of(), graphs)
    one = graphs.nbytes
    graphs = Graphs(memory=int(3.5 * one), recorder=(recorder := Recorder()))
    for words in (7, 30, 60, 90, 120):
        for _ in range(2):
            answer(model, batch_of(words), graphs)
        assert 0 < graphs.nbytes <= graphs.memory
    assert recorder.captures == 5 and len(graphs) < 5


def test_one_that_is_too_large_is_not_kept(model):
    graphs = Graphs(memory=1000, recorder=(recorder := Recorder()))
    want, _ = answer(model, batch_of(), None)
    for turn in range(4):
        got, said = answer(model, batch_of(), graphs)
        assert torch.equal(got, want)
        assert said.startswith("plain: memory short: one graph of" if turn else "plain: the first")
    assert len(graphs) == 0 and recorder.captures == 1  # and not tried again


def test_models_and_policies_share_no_graph(model):
    graphs, other = Graphs(recorder=(recorder := Recorder())), make_model(seed=1)
    for one in (model, other):
        for policy in (POLICY, FastV(layer=3, keep=0.4), FastV(layer=2, keep=0.4)):
            want = answer(one, batch_of(), None, policy)[0]
            for _ in range(2):
                got = answer(one, batch_of(), graphs, policy)[0]
                torch.testing.assert_close(got, want, atol=1e-4, rtol=0)
    assert recorder.captures == 4  # an equal policy is the same


def test_clear(model):
    graphs = Graphs(recorder=Recorder())
    for _ in range(2):
        answer(model, batch_of(), graphs)
    graphs.clear()
    assert len(graphs) == graphs.nbytes == 0
    assert answer(model, batch_of(), graphs)[1] == "plain: the first prompt of its shape"


def test_a_copy_starts_empty(model):
    graphs = Graphs(memory=1 << 20, most=3, recorder=Recorder())
    for _ in range(2):
        answer(model, batch_of(), graphs)
    for other in (copy.deepcopy(graphs), pickle.loads(pickle.dumps(graphs))):
        assert len(other) == 0 and (other.memory, other.most) == (1 << 20, 3)


# What a graph has taken for good


def changed_weights(model):
    state = {name: x.clone() for name, x in model.state_dict().items()}
    state["model.language_model.layers.3.mlp.up_proj.weight"] *= 1.5
    model.load_state_dict(state, assign=True)


def moved_weights(model):
    model.double().float()
    model.model.language_model.layers[1].mlp.down_proj.weight.data.mul_(1.2)


def another_layer(model):
    mlp = model.model.language_model.layers[4].mlp
    mlp.down_proj = copy.deepcopy(mlp.down_proj)
    mlp.down_proj.weight.data.mul_(1.2)


def a_forward(model):
    mlp = model.model.language_model.layers[4].mlp
    plain = mlp.forward
    mlp.forward = lambda x: plain(x) * 1.5


def weights_in_place(model):
    model.model.language_model.layers[4].mlp.down_proj.weight.data.mul_(1.2)


@pytest.mark.parametrize(
    "change", [changed_weights, moved_weights, another_layer, a_forward, weights_in_place]
)
def test_a_model_that_has_changed_is_captured_anew(change):
    """Also between two calls of one scope, where other code may do it; weights changed in place need no new capture."""
    model, graphs = make_model(), Graphs(recorder=(recorder := Recorder()))
    before = [answer(model, batch_of(), graphs)[0] for _ in range(2)][-1]
    with vlmprune.prune(model, POLICY, graphs) as run:
        change(model)
        got, said = generate(model, batch_of(), STEPS)[1], run.report().graph
    want = answer(model, batch_of(), None)[0]
    assert not torch.allclose(want, before, atol=1e-3)
    torch.testing.assert_close(got, want, atol=1e-4, rtol=0)
    assert said.startswith("replayed") and recorder.captures == (1 if change is weights_in_place else 2)


def test_bindings_of_a_module():
    module = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.BatchNorm1d(2))
    bound = Bindings(module)
    assert bound.hold()
    module[0].weight.data.mul_(2)
    assert bound.hold()
    module[1].running_mean = torch.ones(2)
    assert not bound.hold()


def test_what_a_run_holds_is_not_written_over(model):
    """Cache, logits and what was kept of one prompt stay when the graph runs another."""
    graphs = Graphs(recorder=Recorder())
    for seed in range(2):
        answer(model, batch_of(seed=seed), graphs)
    with torch.no_grad(), vlmprune.prune(model, POLICY, graphs) as run:
        out = model(**batch_of(seed=3), use_cache=True)
        stage = run.stages[0]
        held = [out.logits, *(x for layer in out.past_key_values.layers for x in (layer.keys, layer.values))]
        copies = [x.clone() for x in held]
        model(**batch_of(seed=4), use_cache=True)
        assert all(map(torch.equal, held, copies))
        late = stage.ordinals  # made when somebody looks
    with torch.no_grad(), vlmprune.prune(model, POLICY) as run:
        model(**batch_of(seed=3), use_cache=True)
        assert torch.equal(late, run.stages[0].ordinals)


def test_a_capture_is_no_part_of_the_times(model):
    """Its runs select as well; the report counts the prompt's own selection alone, of which a replay has none to time."""
    graphs = Graphs(recorder=Recorder())
    with torch.no_grad(), vlmprune.prune(model, POLICY, graphs) as run:
        for selects in (True, False, False):
            model(**batch_of(), use_cache=True)
            seconds = run.report().seconds
            assert (seconds.selection > 0) == selects and seconds.prefill > 0


# Faults


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), "plain: memory short"),
        (
            torch.AcceleratorError("CUDA error: operation not permitted\nadvice"),
            "plain: the capture failed: CUDA error",
        ),
    ],
)
def test_a_capture_that_fails_leaves_the_model_usable(model, error, said):
    graphs = Graphs(recorder=(recorder := Recorder(error)))
    want = answer(model, batch_of(), None)[0]
    for turn in range(4):
        got, why = answer(model, batch_of(), graphs)
        assert torch.equal(got, want)
        assert why.startswith(said if turn else "plain: the first")
    assert not recorder.fails and len(graphs) == 0
    graphs.clear()  # memory was made
    for _ in range(2):
        got, why = answer(model, batch_of(), graphs)
    assert why.startswith("replayed")


def test_an_error_of_the_policy_is_no_reason_to_go_on(model):
    class Wrong(FastV):
        calls = 0

        def rank(self, ctx):
            type(self).calls += 1
            assert self.calls < 2, "a fault of the policy"
            return super().rank(ctx)

    policy, graphs = Wrong(layer=2, keep=0.4), Graphs(recorder=Recorder())
    answer(model, batch_of(), graphs, policy)
    with pytest.raises(AssertionError, match="a fault of the policy"):
        answer(model, batch_of(), graphs, policy)
    assert "forward" not in vars(model.model.language_model) and len(graphs) == 0


def test_nothing_stays_on_the_model(model):
    text = model.model.language_model
    with vlmprune.prune(model, POLICY, Graphs(recorder=Recorder())):
        assert "forward" in vars(text)
    assert "forward" not in vars(text)
    vlmprune.attach(model, POLICY, Graphs(recorder=Recorder()))
    vlmprune.detach(model)
    assert "forward" not in vars(text)


def test_a_forward_of_somebody_else_is_left_alone():
    model, graphs = make_model(), Graphs(recorder=(recorder := Recorder()))
    text = model.model.language_model
    text.forward = own = text.forward
    for _ in range(3):
        said = answer(model, batch_of(), graphs)[1]
    assert (
        said.startswith("plain: other code has put a forward of its own on the model")
        and not recorder.captures
    )
    assert vars(text)["forward"] is own


def test_a_copied_model_has_a_path_of_its_own():
    model, graphs = make_model(), Graphs(recorder=Recorder())
    vlmprune.attach(model, POLICY, graphs)
    other = copy.deepcopy(model)
    assert vars(other.model.language_model)["forward"].__self__.subject.text is other.model.language_model
    batch = batch_of()
    want = generate(model, batch, STEPS)[1]
    for _ in range(3):
        got = generate(other, batch, STEPS)[1]
    torch.testing.assert_close(got, want, atol=1e-4, rtol=0)
    assert len(graphs) == 0
    vlmprune.detach(other)
    vlmprune.detach(model)


def test_threads_share_graphs(model):
    """Four threads, three shapes, one Graphs: each gets what it gets alone."""
    graphs, prompts = Graphs(recorder=Recorder()), [batch_of(words, seed=words) for words in (5, 20, 6, 40)]
    want = [answer(model, batch, None)[0] for batch in prompts]
    got: list[list[torch.Tensor]] = [[] for _ in prompts]

    def work(i):
        for _ in range(4):
            got[i].append(generate(model, prompts[i], STEPS)[1])

    with vlmprune.prune(model, POLICY, graphs):
        threads = [threading.Thread(target=work, args=(i,)) for i in range(len(prompts))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    for mine, expected in zip(got, want, strict=True):
        assert len(mine) == 4
        for logits in mine:
            torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)
    assert len(graphs) == 3


# Reads


@pytest.mark.parametrize(
    "read",
    [
        lambda x: x.tolist(),
        lambda x: x.cpu(),
        lambda x: x.numpy(),
        lambda x: x.sum().item(),
        lambda x: bool(x.any()),
        lambda x: x[x > 0],
        lambda x: x.nonzero(),
        lambda x: torch.equal(x, x),
    ],
)
@pytest.mark.cpu("reads a CPU tensor in every way there is")
def test_host_reads_raise(read):
    x = torch.arange(3)
    with pytest.raises(HostRead), HostReads(x.device):
        read(x)
    read(x)  # nothing stays replaced
    with HostReads(x.device, (told := []).append):
        read(x)
    assert told
    with HostReads(torch.device("cuda")):
        read(x)  # another device may be read


@pytest.mark.cpu("makes CPU tensors")
def test_tensors_of_the_hosts_numbers_are_reads(model):
    """A graph would copy them from where they lay once; those made once (vlmprune.constants) and empty ones are none."""
    cpu = torch.device("cpu")
    with pytest.raises(HostRead, match="a tensor of the host's numbers"), HostReads(cpu):
        torch.tensor([1, 2])
    with HostReads(cpu):
        torch.tensor([]), torch.zeros(3), torch.arange(3)
    whole_numbers((1, 2), cpu)
    with HostReads(cpu):
        whole_numbers((1, 2), cpu)


# Warm-up


def test_warmup_captures_before_the_first_prompt(model, monkeypatch):
    graphs = warmup(model, POLICY, lengths=(24, 40), graphs=Graphs(recorder=(recorder := Recorder())))
    assert recorder.captures == len(graphs) == 2
    got, said = answer(model, batch_of(7), graphs)  # 28 tokens
    assert said == "replayed: 1 x 32 rows"
    torch.testing.assert_close(got, answer(model, batch_of(7), None)[0], atol=1e-4, rtol=0)
    assert recorder.captures == 2


@pytest.mark.parametrize("batch", [1, 2])
def test_warmup_like_a_prompt(model, batch):
    like = batch_of(9, images=2)
    graphs = warmup(
        model,
        FasterVLM(keep=6, positions="pack"),
        (50,),
        like,
        batch,
        Graphs(recorder=(recorder := Recorder())),
    )
    assert recorder.captures == 1
    prompts = make_batch([[4, "I", "I", 12]] * batch)
    assert answer(model, prompts, graphs, FasterVLM(keep=6, positions="pack"))[1].startswith(
        f"replayed: {batch} x"
    )


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ({"lengths": (17,)}, r"lengths: expected whole numbers above 17 \(.*\), got 17"),
        ({"lengths": (2.5,)}, "lengths: expected whole numbers above 17"),
        ({"lengths": (40,), "batch": 0}, "batch: expected a whole number > 0, got 0"),
        ({"lengths": (40,), "like": make_batch([[4]])}, "like: expected a prompt with an image, got none"),
        (
            {"lengths": (40,), "like": make_batch([["I"]])},
            "like: expected text behind the last image, got none",
        ),
        (
            {"lengths": (40,), "like": make_batch([["I", 3]] * 2)},
            "like: expected a prompt of one sample, got 2",
        ),
    ],
    ids=repr,
)
def test_warmup_refuses(model, how, said):
    with pytest.raises(InputError, match=said):
        warmup(model, POLICY, **how)


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ({"memory": 0}, "memory: expected a whole number > 0, got 0"),
        ({"most": 1.5}, "most: expected a whole number > 0, got 1.5"),
        ({"most": True}, "most: expected a whole number > 0, got True"),
    ],
)
def test_graphs_refuse(how, said):
    with pytest.raises(InputError, match=said):
        Graphs(**how)


def test_scopes_take_graphs_or_none(model):
    with pytest.raises(InputError, match="graphs: expected a Graphs, or None, got True"):
        vlmprune.prune(model, POLICY, True)


@pytest.mark.cpu("says that there is no GPU")
def test_without_a_gpu(model):
    for said in ("plain: no GPU", "plain: no GPU"):
        assert answer(model, batch_of(), Graphs())[1] == said
    assert answer(model, batch_of(), None)[1] == ""
    assert Graphs.refusal(torch.device("cpu")) == "no GPU" and Graphs.refusal(torch.device("cuda")) is None
