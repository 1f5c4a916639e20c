"""A pruned cache layer counts tokens seen, not stored, through everything generate() does to a cache."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer, StaticLayer

from vlmprune.errors import ModelError
from vlmprune.models.host.cache_layers import (
    PRUNED,
    PrunedDynamicLayer,
    PrunedStaticLayer,
    keep_entries,
    lengthen,
)
from vlmprune.models.host.cache_view import (
    check_cache,
    entries,
    extend_validity,
    held_keys,
    make_prunable,
    past_validity,
)


def states(batch: int, n: int, start: int = 0) -> torch.Tensor:
    """Keys that carry their number: ``[B, 1, n, 1]``."""
    return (
        torch.arange(start, start + n, dtype=torch.float32).view(1, 1, n, 1).expand(batch, -1, -1, -1).clone()
    )


def pruned(batch: int = 2) -> tuple[DynamicCache, PrunedDynamicLayer]:
    """Five entries stored of nine seen; sample 1 has two padding slots in front."""
    cache = DynamicCache()
    layer = make_prunable(cache, 0)
    layer.announce(torch.tensor([[True] * 5, [False, False, True, True, True]])[:batch], 4)
    layer.update(states(batch, 5), states(batch, 5))
    return cache, layer


def grow(layer: PrunedDynamicLayer, n: int) -> None:
    """What the wiring does for ``n`` more tokens."""
    layer.announce(extend_validity(layer.valid, layer.stored(), None, n), 0)
    layer.update(states(2, n), states(2, n))


def test_lengths_are_logical():
    cache, layer = pruned()
    assert (cache.get_seq_length(), layer.stored(), layer.dropped) == (9, 5, 4)
    assert layer.get_mask_sizes(3) == (8, 4)
    grow(layer, 1)
    assert (layer.get_seq_length(), layer.stored()) == (10, 6)


def test_announcement_counts_once():
    _, layer = pruned()
    grow(layer, 1)
    assert layer.dropped == 4 and layer.pending is None


def test_a_decode_step_leaves_everything_as_it_was():
    cache, layer = pruned()
    known = layer.valid
    layer.admit()
    layer.update(states(2, 1), states(2, 1))
    assert layer.valid is known and layer.dropped == 4 and layer.pending is None
    assert (layer.get_seq_length(), layer.stored(), entries(cache, 0, 10)) == (10, 6, 6)
    hidden = torch.zeros(2, 1, 4)
    assert layer.key_mask(known, 6, hidden).tolist() == [
        [True] * 7,
        [False, False, True, True, True, True, True],
    ]
    assert lengthen(known, 3).tolist() == [[True] * 3, [False, False, True]]


def static(cls: type[StaticLayer] = StaticLayer) -> PrunedStaticLayer:
    """Five entries stored of nine seen, of an allocation of eight."""
    layer = cls(max_cache_len=8)
    layer.__class__ = PRUNED[cls]
    layer.announce(torch.tensor([[True] * 5, [False, False, True, True, True]]), 4)
    layer.update(states(2, 5, 1), states(2, 5, 1))
    return layer


def test_a_static_layer_writes_where_the_stored_entries_end():
    layer = static()
    length = layer.cumulative_length
    assert (int(layer.get_seq_length()), int(layer.stored()), layer.get_mask_sizes(1)) == (9, 5, (8, 4))
    layer.admit()
    layer.update(states(2, 1, 6), states(2, 1, 6))
    assert layer.keys[0, 0, :, 0].tolist() == [1, 2, 3, 4, 5, 6, 0, 0] and layer.cumulative_length is length
    assert held_keys(layer, 6, layer.keys.device)[0, 0, :, 0].tolist() == [1, 2, 3, 4, 5, 6]
    visible = layer.key_mask(layer.valid, layer.stored(), torch.zeros(2, 1, 4))
    assert visible.tolist() == [[True] * 7 + [False], [False] * 2 + [True] * 5 + [False]]
    with pytest.raises(ModelError, match=r"^cache: expected a pruning scope"):
        layer.update(states(2, 1), states(2, 1))


@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_keeping_some_entries(kind):
    layer = pruned()[1] if kind == "dynamic" else static()
    storage = layer.keys.data_ptr()
    index = torch.tensor([[0, 3, 4], [-1, 2, 4] if kind == "dynamic" else [2, 4, -1]])
    before = layer.keys.clone()
    keep_entries([layer], index, kind == "static")
    layer.forget(2, index >= 0)
    assert (int(layer.get_seq_length()), int(layer.stored()), layer.dropped) == (9, 3, 6)
    assert layer.valid[:, :3].tolist() == (index >= 0).tolist()
    kept = held_keys(layer, 3, index.device)[:, 0, :, 0]
    want = before[:, 0, :, 0].gather(1, index.clamp(min=0))
    assert torch.equal(kept[index >= 0], want[index >= 0])
    assert (layer.keys.data_ptr() == storage) == (kind == "static")


def test_a_crop_that_reaches_padding_of_a_static_layer_is_refused():
    """Which of a shorter sample's tokens it would forget, only padding knows."""
    layer = static()
    keep_entries([layer], torch.tensor([[0, 3, 4], [2, 4, -1]]), True)
    layer.forget(2, torch.tensor([[True] * 3, [True, True, False]]))
    layer.admit()
    layer.update(states(2, 1, 6), states(2, 1, 6))
    with pytest.raises(
        ValueError, match=r"^tokens_to_remove: expected a number that reaches no padding .* got -2$"
    ):
        layer.crop(-2)
    assert int(layer.stored()) == 4
    assert layer._all_valid(3, 4)  # the one that decoding wrote


def test_a_reset_layer_is_as_it_was_before_pruning():
    layer = static()
    layer.reset()
    assert type(layer) is StaticLayer and int(layer.get_seq_length()) == 0
    layer.update(states(2, 2), states(2, 2))


def test_crop_reorder_repeat_select_reset():
    _, layer = pruned()
    layer.crop(-2)
    assert (layer.get_seq_length(), layer.stored(), layer.valid.shape[1]) == (7, 3, 3)
    layer.reorder_cache(torch.tensor([1, 0]))
    assert layer.valid.tolist() == [[False, False, True], [True] * 3]
    layer.batch_repeat_interleave(2)
    assert layer.valid.shape == (4, 3) and layer.keys.shape[0] == 4
    layer.batch_select_indices(torch.tensor([0]))
    assert layer.valid.tolist() == [[False, False, True]]
    plain = DynamicLayer()
    plain.update(states(1, 3), states(1, 3))
    layer.reset()
    plain.reset()
    assert type(layer) is DynamicLayer and layer.__dict__.keys() == plain.__dict__.keys()


@pytest.mark.parametrize("number", [3, -6])
def test_a_crop_to_a_length_or_of_more_than_is_held_is_refused(number):
    _, layer = pruned()
    expected = "a negative number, at least -5, on a pruned cache layer"
    with pytest.raises(ValueError, match=rf"^tokens_to_remove: expected {expected}, got {number}$"):
        layer.crop(number)
    assert layer.stored() == 5


@pytest.mark.parametrize(
    "clone", [copy.deepcopy, lambda c: pickle.loads(pickle.dumps(c))], ids=["deepcopy", "pickle"]
)
def test_copies_are_independent(clone):
    cache, layer = pruned()
    other = clone(cache)
    grow(other.layers[0], 1)
    assert (other.get_seq_length(), cache.get_seq_length()) == (10, 9)
    assert layer.valid.shape == (2, 5) and other.layers[0].valid.shape == (2, 6)


def test_use_outside_the_scope_is_refused():
    """Nobody announces chunks there: masks and positions of a pruned cache would be wrong."""
    _, layer = pruned()
    message = r"^cache: expected a pruning scope"
    with pytest.raises(ModelError, match=message):
        layer.update(states(2, 1), states(2, 1))
    assert layer.stored() == 5
    plain = make_prunable(DynamicCache(), 0)
    plain.announce(None, 4)
    plain.update(states(1, 5), states(1, 5))
    plain.update(states(1, 1), states(1, 1))  # batch 1 decodes without a mask, in the scope and outside
    with pytest.raises(ModelError, match=message):
        plain.update(states(1, 2), states(1, 2))
    plain.announce(None, 0, torch.tensor([[3]]))
    plain.update(states(1, 1), states(1, 1))
    with pytest.raises(ModelError, match=message):
        plain.update(states(1, 1), states(1, 1))


def test_other_layers_are_refused():
    """A subclass may do anything to its entries; a sliding one would silently cover more of the prompt."""
    cache = DynamicCache()
    check_cache(None)
    check_cache(cache)

    class Strange(DynamicLayer):
        pass

    for odd in (Strange(), DynamicSlidingWindowLayer(4)):
        cache.layers = [odd]
        with pytest.raises(
            ModelError, match=rf"expected layers of DynamicLayer, .*, got {type(odd).__name__}$"
        ):
            check_cache(cache)
    with pytest.raises(ModelError, match=r"got str$"):
        check_cache("a cache")


def test_past_of_an_unpruned_layer_is_told_by_the_attention_mask():
    cache = DynamicCache()
    cache.update(states(2, 3), states(2, 3), 0)
    seen = torch.tensor([[False, True, True, True, True], [True] * 5])
    assert past_validity(cache, 0, seen, 3).tolist() == seen[:, :3].tolist()
    assert past_validity(cache, 0, None, 3) is None
    assert past_validity(None, 0, seen, 0) is None


def test_extend_validity():
    some = torch.tensor([[False, True]])
    assert extend_validity(None, 3, None, 2) is None
    assert extend_validity(some, 2, None, 1).tolist() == [[False, True, True]]
    assert extend_validity(None, 1, some, 2).tolist() == [[True, False, True]]
