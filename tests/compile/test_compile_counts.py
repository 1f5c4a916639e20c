"""How many kernels prompts of random lengths meet, by the keys that Triton keeps compiled kernels by: none is compiled.

Each new one holds a prompt up for a second. A length, a count or a stride that is random from prompt to prompt should not
be part of a key, not even by whether 16 divides it.
"""

import random

import pytest
import torch
import triton
import triton.language as tl
from micro import stub

from vlmprune import ops

if triton.knobs.runtime.interpret:
    pytest.skip("the interpreter has no keys; run with TRITON_INTERPRET=0", allow_module_level=True)

PROMPTS = 200
H, HKV, D = 4, 2, 64


class Prompt:
    """Tensors of some prompts of one length: N visual tokens of S, of which K stay."""

    def __init__(self, seed):
        self.rng = rng = random.Random(seed)
        self.B, self.N = rng.choice((1, 1, 2, 3, 5)), rng.randint(2, 3000)
        self.S, self.K = self.N + rng.randint(1, 300), rng.randint(1, self.N)

    def zeros(self, *shape, dtype=torch.bfloat16):
        return torch.zeros(self.B, *shape, dtype=dtype)

    def heads(self, n):
        """``[B, n, S, D]``, one time in two as a projection leaves it: a view of ``[B, S, n, D]``."""
        x = self.zeros(self.S, n, D).transpose(1, 2)
        return x if self.rng.random() < 0.5 else x.contiguous()

    @property
    def list(self):
        return torch.arange(self.N).expand(self.B, -1).contiguous()

    @property
    def kept(self):
        return torch.arange(self.K).expand(self.B, -1).contiguous()

    @property
    def scoring(self):
        rows = torch.full((self.B, 1), self.S - 1)
        return dict(query=self.heads(H), key=self.heads(HKV), rows=rows, columns=self.list)

    @property
    def lse(self):
        return self.zeros(H, self.S, dtype=torch.float32)

    @property
    def tensors(self):
        return [
            self.zeros(self.S, H * D),
            self.zeros(self.S, D),
            self.list.new_zeros(self.B, self.S),
            self.heads(HKV),
        ]

    @property
    def scores(self):
        return self.zeros(self.N, dtype=torch.float32)

    @property
    def rows(self):
        return self.zeros(self.N, D)


CASES = {
    "row_lse": lambda p: ops.row_lse(**{k: v for k, v in p.scoring.items() if k != "columns"}),
    "received_attention": lambda p: ops.received_attention(**p.scoring, lse=p.lse),
    "prune_tokens": lambda p: ops.prune_tokens(**p.scoring, tensors=p.tensors, keep=p.K, lse=p.lse),
    "prune_tokens without lse": lambda p: ops.prune_tokens(**p.scoring, tensors=p.tensors, keep=p.K),
    "prune_scored": lambda p: ops.prune_scored(p.scores, p.tensors, columns=p.list, keep=p.K),
    "select_topk": lambda p: ops.select_topk(p.scores, p.K),
    "gather_tokens": lambda p: ops.gather_tokens(p.tensors, p.kept),
    "compact_kv": lambda p: ops.compact_kv([p.heads(HKV)], p.kept),
    "greedy_select maxmin": lambda p: ops.greedy_select(p.rows, p.K, "maxmin"),
    "merge_tokens": lambda p: ops.merge_tokens(p.rows, p.list % p.K, p.K),
    "cluster_dpc": lambda p: ops.cluster_dpc(p.rows, p.K),
}

# By CHUNK where there are several sizes of tiles; by whether 16 divides N where it is the length of a row of pairs of tokens,
# as such rows are then read in whole words. Others: once more at most.
MOST = {
    "_select_topk_kernel": 6,  # CHUNK, KEYS
    "_first_values_kernel": 9,  # CHUNK; N
    "_greedy_select_kernel": 9,  # CHUNK; N
    "_spread_kernel": 3,  # N, farthest_ptr
    "_score_kernel": 4,  # N, farthest_ptr, score_ptr
}


def kernels_met(monkeypatch, call):
    """Of each kernel the keys that launches ask for, which are not made; and what of its arguments is in each key."""
    met = {}

    def note(self, key, signature, device, constexprs, options, attrs, warmup):
        names = lambda found: {(self.arg_names[at[0]], *at[1:]): str(x) for at, x in found.items()}  # noqa: E731
        met.setdefault(self.__name__, {})[key] = names(attrs) | names(constexprs)

    monkeypatch.setattr(
        stub._StubDriver, "get_current_device", lambda self: "of this test"
    )  # nothing compiled yet
    monkeypatch.setattr(triton.runtime.jit.JITFunction, "_do_compile", note)
    with stub.launching() as filling:
        filling.on = False
        for seed in range(PROMPTS):
            call(Prompt(seed))
    return met


def differing(keys):
    """The arguments that are not the same in all keys."""
    every = {name for key in keys for name in key}
    return sorted({name[0] for name in every if len({key.get(name) for key in keys}) > 1})


@pytest.mark.parametrize("name", CASES)
def test_prompts_of_random_lengths_meet_few_kernels(name, monkeypatch):
    met = kernels_met(monkeypatch, CASES[name])
    assert met, "nothing was launched"
    for kernel, keys in met.items():
        assert len(keys) <= MOST.get(kernel, 2), f"{kernel}: {len(keys)}, by {differing(keys.values())}"


@triton.jit
def _fill_kernel(x_ptr, N, K, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(x_ptr + at, K, mask=at < N)


def test_what_is_in_a_key_is_seen(monkeypatch):
    fill = lambda p: _fill_kernel[(1,)](p.scores, p.N, 7, triton.next_power_of_2(p.N))  # noqa: E731
    keys = kernels_met(monkeypatch, fill)["_fill_kernel"].values()
    assert differing(keys) == ["BLOCK", "N"] and len(keys) > 7
