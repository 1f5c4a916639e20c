"""One image's choice in vLLM's worker: nothing waits for the device, so that a step's images only queue their kernels there."""

import pytest
import torch

from vlmprune.integrations.vllm.choice import context_of, kept_rows
from vlmprune.integrations.vllm.settings import Settings
from vlmprune.models.graphs.reads import HostRead, HostReads
from vlmprune.models.host.views import View
from vlmprune.policies import VisionAttention, policy_from

SIDE, WIDTH = 12, 24
POLICIES = [
    {"policy": "divprune", "keep": 20},
    {"policy": "visionzip", "dominant": 15, "contextual": 5},
    {"policy": "fastervlm", "keep": 20},
    {"policy": "vispruner", "keep": 20},
    {"policy": "folder", "keep": 20},
    {"policy": "uniform", "layer": 0, "keep": 20},
    {"policy": "cdpruner", "keep": 20, "relevance": "none"},
    {"policy": "accm_selection", "keep": 20, "relevance": "none"},
]


def policy_of(settings):
    return Settings(policy_from(settings)).policy_for(SIDE**2, 20)


def asked(policy, seed=0, dtype=torch.float32):
    """What a worker asks a policy of one crop of a tower with a CLS row, and the crop's rows."""
    torch.manual_seed(seed)
    rows = torch.randn(SIDE**2, WIDTH, dtype=dtype)
    query, key = torch.randn(2, 1, 2, 1 + SIDE**2, 8, dtype=dtype)
    layers = policy.needs(0).vision
    seen = {
        "vision": {layer: VisionAttention(query, key, 8**-0.5, True) for layer in layers},
        "features": torch.randn(1, SIDE**2, WIDTH, dtype=dtype),
        "project": torch.nn.Linear(WIDTH, WIDTH, dtype=dtype).forward,
    }
    return context_of(rows, (View((SIDE, SIDE)),), None, seen if layers else {}), rows


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("settings", POLICIES, ids=lambda settings: settings["policy"])
@torch.inference_mode()
def test_a_choice_reads_nothing_back(settings, dtype):
    policy = policy_of(settings)
    kept_rows(policy, *asked(policy, dtype=dtype), 20)  # tables of the grid are made once
    ctx, rows = asked(policy, 1, dtype)
    with HostReads(torch.device("cpu")):
        kept = kept_rows(policy, ctx, rows, 20)
    assert kept.shape == (20, WIDTH) and kept.dtype == dtype and kept.isfinite().all()


@torch.inference_mode()
def test_the_guard_can_fail():
    policy = policy_of(
        {"policy": "random", "layer": 0, "keep": 20}
    )  # its list comes from a generator on the host
    with pytest.raises(HostRead), HostReads(torch.device("cpu")):
        kept_rows(policy, *asked(policy), 20)
