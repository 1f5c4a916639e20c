"""What is noted of vLLM's vision towers, whose attention is called with query, key and value. No vLLM: its gather is stood in for."""

import importlib
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch

from vlmprune.models.host.views import Encoded


@pytest.fixture
def tower(monkeypatch):
    distributed = ModuleType("vllm.distributed")
    distributed.tensor_model_parallel_all_gather = lambda x, dim: torch.cat([x, -x], dim)
    monkeypatch.setitem(sys.modules, "vllm", ModuleType("vllm"))
    monkeypatch.setitem(sys.modules, "vllm.distributed", distributed)
    name = "vlmprune.integrations.vllm.tower"
    monkeypatch.delitem(sys.modules, name, raising=False)
    yield importlib.import_module(name)
    sys.modules.pop(name, None)


@pytest.mark.parametrize("values", [False, True])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("by_name", [False, True])
def test_of_every_rank_query_and_key_and_values_where_they_are_asked_for(tower, values, packed, by_name):
    crops = 1 if packed else 2
    query, key, value = (torch.randn(crops, 5, 6) for _ in range(3))  # 2 heads of this rank
    reads = tower.TowerReads.__new__(tower.TowerReads)
    reads.names = {"q": "query", "k": "key"} | ({"v": "value"} if values else {})
    reads.packed, reads.note = packed, Encoded()
    told = ((), dict(query=query, key=key, value=value)) if by_name else ((query, key, value), {})
    reads._keep(1, SimpleNamespace(head_size=3), *told)
    taken = reads.note.taken
    assert {*taken} == {(1, "q"), (1, "k"), *([(1, "v")] if values else [])}
    for name, x in (("q", query), ("k", key), ("v", value)):
        if (1, name) in taken:
            own = x.view(crops, 5, 2, 3)
            every = torch.cat([own, -own], 2)
            assert torch.equal(taken[1, name], every[0] if packed else every.transpose(1, 2))
