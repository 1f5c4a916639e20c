"""What the second model runner does with pruned images, called as it calls it: it needs Triton on a device, its pruner does not."""

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed (make test-vllm)")

from types import SimpleNamespace

import numpy as np
import torch
from vllm.multimodal.inputs import PlaceholderRange
from vllm.v1.worker.gpu.mm.rope import RopeState
from vllm.v1.worker.gpu.model_states.mm_pruning import MultiModalPruner

from vlmprune.integrations.vllm.positions import cells_of
from vlmprune.integrations.vllm.qwen import Qwen3VL, Qwen25VL

IMAGE, WIDTH, ROW = 4, 16, 1
IDS = [9] * 3 + [IMAGE] * 5 + [9] * 2 + [IMAGE] * 4 + [9] * 3
GRIDS = torch.tensor([[1, 6, 4], [1, 4, 10]])  # in patches: 3 x 2 and 2 x 5 tokens
KEPT = [0, 2, 3, 4, 5], [1, 4, 7, 9]
WANT = [
    [0, 1, 2, 3, 3, 3, 3, 3, 6, 7, 8, 8, 8, 8, 13, 14, 15],
    [0, 1, 2, 3, 4, 4, 5, 5, 6, 7, 8, 8, 9, 9, 13, 14, 15],
    [0, 1, 2, 3, 3, 4, 3, 4, 6, 7, 9, 12, 10, 12, 13, 14, 15],
]


class Rope:
    """The buffers of a ``RopeState``, without the kernels that stage writes to them."""

    num_dims = 3
    read_prefill_positions = RopeState.read_prefill_positions
    update_prefill_positions = RopeState.update_prefill_positions

    def __init__(self, positions, delta):
        table = torch.zeros(6, 64, dtype=torch.int32)
        table[3 * ROW :, : positions.shape[1]] = positions
        self.prefill_positions = SimpleNamespace(gpu=table)
        self.prefill_delta = SimpleNamespace(np=np.full(2, delta, np.int32))


def image(start, tokens, grid):
    place = PlaceholderRange(offset=start, length=tokens)
    return SimpleNamespace(mm_position=place, data={"image_grid_thw": SimpleNamespace(data=grid)})


@pytest.mark.parametrize("kind", [Qwen25VL, Qwen3VL])
def test_borders_inside_images(kind):
    model = kind.__new__(kind)
    torch.nn.Module.__init__(model)
    model.config = SimpleNamespace(image_token_id=IMAGE, vision_config=SimpleNamespace(spatial_merge_size=2))
    images = [image(3, 5, GRIDS[0]), image(10, 4, GRIDS[1])]
    rows = [
        torch.cat([torch.randn(h * w // 4, WIDTH), cells_of(h // 2, w // 2)], 1)[kept].bfloat16()
        for (_, h, w), kept in zip(GRIDS.tolist(), KEPT, strict=True)
    ]
    positions, delta = model.get_mrope_input_positions(IDS, images)
    rope = Rope(positions, delta)
    ids = torch.zeros(2, 64, dtype=torch.int32)
    ids[ROW, : len(IDS)] = torch.tensor(IDS)
    states = SimpleNamespace(all_token_ids=SimpleNamespace(gpu=ids))
    pruner = MultiModalPruner(model, rope, SimpleNamespace(mm_features={"a": images}), WIDTH)
    chunks = {(0, 5): [rows[0][:2]], (5, 11): [rows[0][2:], rows[1][:1]], (11, 17): [rows[1][1:]]}
    for (done, end), window in chunks.items():
        batch = SimpleNamespace(
            req_ids=["a"],
            idx_mapping_np=np.array([ROW]),
            prefill_len_np=np.array([len(IDS)]),
            num_computed_prefill_tokens_np=np.array([done]),
            num_scheduled_tokens=np.array([end - done]),
        )
        clean = pruner.recompute(window, batch, states)
        assert all(torch.equal(x, y[:, :WIDTH]) for x, y in zip(clean, window, strict=True))
    assert rope.prefill_positions.gpu[3 * ROW :, : len(IDS)].tolist() == WANT
    assert int(rope.prefill_delta.np[ROW]) == delta == WANT[0][-1] + 1 - len(IDS)
