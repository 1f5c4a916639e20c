"""Does a replayed graph give the bits of a first call? Two inputs come in turn, so that what one leaves behind spoils the other."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from micro.clock import capture
from micro.gate import FAILURES, failed
from micro.inputs import Inputs
from micro.providers import Provider
from micro.restart import Journal, device_lost, leave
from micro.shapes import Setting, Shape
from micro.sweep import Sweep, title
from torch import Tensor

FUSED = ("received_attention", "row_lse", "select_topk", "prune_tokens", "prune_scored")


def replays(
    shapes: Sequence[Shape], device: torch.device, dtype: torch.dtype, times: int, journal: Journal
) -> int:
    """Every fused case by every kernel of ours; 1 if a bit differs or one breaks."""
    bad = False
    for case, setting in Sweep(device, shapes, [dtype], (1, 64), (), 0.0, cases=FUSED).settings():
        for provider in case.own():
            x = Inputs(setting)
            name = title(case, x, provider)
            if provider.name == "reference" or provider.why_not(x) is not None or not journal.begin(name):
                continue
            error = None
            try:
                differing = differences(provider, setting, times)
                bad, note = bad or differing > 0, f"{differing} of {times} replays differ"
            except FAILURES as failure:
                error, bad, note = failure, True, failed(failure)
            print(f"{name}: {note}", flush=True)
            if error is not None and device_lost(error):
                leave()
    return int(bad)


def differences(provider: Provider, setting: Setting, times: int) -> int:
    """How many of ``times`` replays give other bits than a first call on that input does; the host waits once, at the end."""
    static = Inputs(setting)
    again, result = _repeating(lambda: provider.run(static), setting.device)
    others = [Inputs(setting, seed) for seed in (1, 2)]
    for other in others:
        _copy(other, static)  # draws what the case reads
    wanted = [[_bits(t).clone() for t in _tensors(provider.run(other))] for other in others]
    differing = torch.zeros((), dtype=torch.int64, device=setting.device)
    for i in range(times):
        _copy(others[i % 2], static)
        again()
        same = [(_bits(t) == want).all() for t, want in zip(_tensors(result[-1]), wanted[i % 2], strict=True)]
        differing += ~torch.stack(same).all()
    return int(differing)


def _repeating(run: Callable[[], Any], device: torch.device) -> tuple[Callable[[], None], list[Any]]:
    """(what calls ``run`` again, from a graph where there is one; its results, of which the last is filled)."""
    results: list[Any] = []

    def call() -> None:
        results.append(run())
        del results[:-1]

    if device.type == "cuda":
        return capture(call).replay, results
    call()
    return call, results


def _copy(source: Inputs, target: Inputs) -> None:
    """What a case has read of ``target`` gets the numbers of ``source``, in place."""
    for name, value in [*vars(target).items()]:
        if name in ("tensors", "caches") or (isinstance(value, Tensor) and not name.startswith("true_")):
            for x, y in zip(_tensors(value), _tensors(getattr(source, name)), strict=True):
                x.copy_(y)


def _tensors(result: Any) -> Iterator[Tensor]:
    if isinstance(result, Tensor):
        yield result
    else:
        for part in result:
            yield from _tensors(part)


def _bits(x: Tensor) -> Tensor:
    return x.contiguous().view(torch.uint8)
