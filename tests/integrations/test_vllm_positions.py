"""Where the plugin for vLLM puts pruned images, against transformers' own positions of the kept tokens."""

import pytest
import torch
import transformers as hf

from vlmprune.integrations.vllm.positions import BYTE, Placed, cells_of, laid_out, put_back, within_image

TEXT, IMAGE, START, SIDE = 3, 7, 8, 2


def positions_of(ids, grids):
    """Transformers' positions ``[3, N]`` of a prompt of whole images, and the next one's."""
    config = hf.Qwen2_5_VLConfig(image_token_id=IMAGE, vision_start_token_id=START)
    model = hf.Qwen2_5_VLModel.__new__(hf.Qwen2_5_VLModel)
    torch.nn.Module.__init__(model)
    model.config = config
    kinds = (ids == IMAGE).int()
    positions, delta = model.get_rope_index(
        ids[None], mm_token_type_ids=kinds[None], image_grid_thw=torch.tensor(grids)
    )
    return positions[:, 0], int(delta) + len(ids)


def drawn(seed, images):
    """A prompt's ids whole and pruned, the kept indices, its grids of patches, and where its pruned images are."""
    generator = torch.Generator().manual_seed(seed)

    def some(low, high):
        return int(torch.randint(low, high, (), generator=generator))

    ids, kept, grids, placed = [TEXT] * some(0, 4), [], [], []
    kept += range(len(ids))
    for _ in range(images):
        rows, columns = some(1, 9), some(1, 9)
        grids.append([1, rows * SIDE, columns * SIDE])
        ids.append(START)
        kept.append(len(ids) - 1)
        stay = (
            torch.randperm(rows * columns, generator=generator)[: some(1, rows * columns + 1)].sort().values
        )
        placed.append(Placed(len(kept), len(stay), max(rows, columns)))
        kept += (stay + len(ids)).tolist()
        ids += [IMAGE] * (rows * columns)
        after = some(1, 6)
        kept += range(len(ids), len(ids) + after)
        ids += [TEXT] * after
    return torch.tensor(ids), torch.tensor(kept), grids, placed


@pytest.mark.parametrize("images", [1, 2, 3])
@pytest.mark.parametrize("seed", range(8))
def test_kept_tokens_stand_where_transformers_had_them(seed, images):
    ids, kept, grids, placed = drawn(seed, images)
    whole, after = positions_of(ids, grids)
    first, following = laid_out(len(kept), placed)
    assert following == after
    image = ids[kept] == IMAGE
    assert torch.equal(first[:, ~image], whole[:, kept][:, ~image])
    cells = torch.cat([cells_of(rows // SIDE, columns // SIDE) for _, rows, columns in grids])
    own = cells[torch.isin((ids == IMAGE).nonzero()[:, 0], kept)]
    assert torch.equal(put_back(first, image, 0, within_image(own)), whole[:, kept])


@pytest.mark.parametrize("chunk", [1, 3, 7])
@pytest.mark.parametrize("seed", range(4))
def test_chunk_by_chunk_and_again_is_the_same(seed, chunk):
    ids, kept, grids, placed = drawn(seed, 2)
    image = ids[kept] == IMAGE
    cells = torch.cat([cells_of(rows // SIDE, columns // SIDE) for _, rows, columns in grids])
    own = cells[torch.isin((ids == IMAGE).nonzero()[:, 0], kept)]
    positions, _ = laid_out(len(kept), placed)
    for _ in range(2):  # what was preempted is computed once more
        for done in range(0, len(kept), chunk):
            before, now = (int(image[:end].sum()) for end in (done, done + chunk))
            if now > before:  # without rows there is nothing to put back
                positions = put_back(positions, image, done, within_image(own[before:now]))
    assert torch.equal(positions, positions_of(ids, grids)[0][:, kept])


def test_images_may_touch():
    positions, after = laid_out(5, [Placed(0, 2, 3), Placed(2, 2, 2)])
    assert positions[0].tolist() == [0, 0, 3, 3, 5]
    assert after == 6
    within = torch.tensor([[0, 0, 0, 0], [0, 2, 1, 1], [1, 0, 0, 1]])
    image = torch.tensor([True, True, True, True, False])
    assert put_back(positions, image, 0, within).tolist() == [
        [0, 0, 3, 3, 5],
        [0, 2, 4, 4, 5],
        [1, 0, 3, 4, 5],
    ]


def test_text_alone_is_counted():
    positions, after = laid_out(4, [])
    assert positions.tolist() == [[0, 1, 2, 3]] * 3
    assert after == 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_columns_are_exact_in_every_type(dtype):
    rows, columns = 3, 5 * BYTE + 7
    frame, row, column = within_image(cells_of(rows, columns).to(dtype))
    assert not frame.any()
    assert torch.equal(row, torch.arange(rows).repeat_interleave(columns))
    assert torch.equal(column, torch.arange(columns).repeat(rows))
