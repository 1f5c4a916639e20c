"""Our pieces of work as named ranges of torch's profiler: "vlmprune: vision", "prefill", "selection, layer K", "decode"."""

from __future__ import annotations

from torch.autograd import profiler


def begin(name: str, *values: object) -> profiler.record_function | None:
    """Begin a range, whose name takes ``values`` as ``%`` does; None, and one look at a flag, where no profiler runs."""
    if not profiler._is_profiler_enabled:
        return None
    begun = profiler.record_function(f"vlmprune: {name % values}")
    begun.__enter__()  # type: ignore[no-untyped-call]
    return begun


def end(begun: profiler.record_function | None) -> None:
    """End what ``begin`` gave."""
    if begun is not None:
        begun.__exit__(None, None, None)
