"""A whole benchmark: checks everything, tries every policy once, measures all arms in turn, counts what they cost."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from vlmprune import __version__
from vlmprune.bench.arms import Arm, Kept, make_arms
from vlmprune.bench.measure import answer, measure
from vlmprune.bench.peaks import measure_peaks
from vlmprune.bench.plots import draw_speedups, draw_throughput
from vlmprune.bench.profiles import write_profile
from vlmprune.bench.prompts import Prompt
from vlmprune.bench.roofline import Decoder, Peaks
from vlmprune.bench.rows import Counter, Row, make_rows, to_csv
from vlmprune.bench.shapes import FullSize
from vlmprune.checkpoints import Checkpoint
from vlmprune.errors import check
from vlmprune.eval.plots import check_matplotlib
from vlmprune.eval.store import check_out, write
from vlmprune.models import find_parts
from vlmprune.models.host.parts import decoder_shape
from vlmprune.policies.base import PruningPolicy
from vlmprune.policies.recipe import named
from vlmprune.progress import Progress, silent


@dataclass(frozen=True)
class Bench:
    """What came out.

    Attributes:
        settings: model, device, prompt, rounds, what the rates of the roofline are.
        rows: every arm at every batch size, the unpruned model first.
        folder: where results.json, results.csv and the pictures are; None if no folder was given.
        profile: the trace; None if none was asked for.
    """

    settings: Mapping[str, Any]
    rows: Sequence[Row]
    folder: Path | None = None
    profile: Path | None = None

    def as_dict(self) -> dict[str, Any]:
        """Plain numbers, ready for JSON."""
        return {"settings": dict(self.settings), "rows": [row.as_dict() for row in self.rows]}


def run(
    checkpoint: Checkpoint,
    policies: Sequence[str | PruningPolicy] | None = None,
    out: Path | str | None = None,
    *,
    batch: Sequence[int] = (1,),
    images: int | None = None,
    new_tokens: int = 16,
    rounds: int = 5,
    warm_up: int = 2,
    baselines: bool = True,
    profile: Path | str | None = None,
    progress: Progress = silent,
) -> Bench:
    """How long the unpruned model and each policy take, phase by phase: what ``vlmprune bench`` does, without printing.

    All that can fail is checked before the weights are loaded.

    Args:
        checkpoint: a ``Checkpoint``, or a ``FullSize`` with random weights.
        policies: as objects, or as typed on the command line; None = those of the ``FullSize``, none of a checkpoint.
        out: folder for results.json, results.csv and pictures, in an existing one; None = nothing is written.
        batch: how many prompts at once; all are measured.
        images: images of a prompt; None = what the ``FullSize`` says, one of a checkpoint.
        new_tokens: length of every answer.
        rounds: timed answers of each arm. In each round all arms have their turn, so that drift hits all alike.
        warm_up: answers of one token before each timed one.
        baselines: also a smaller image and the published style, with the tokens that each policy keeps.
        profile: file for a trace of torch's profiler.
        progress: called at every step and round.

    Raises:
        InputError: bad input.
        ModelError: a model that cannot be pruned.
        OSError: a file cannot be written.

    Example:
        >>> from vlmprune.bench import FullSize, run
        >>> found = run(FullSize("tiny", device="cpu"), ["fastv:layer=2,keep=4"], rounds=1, new_tokens=2)
        >>> [row.arm for row in found.rows if row.way == "plain"]
        ['unpruned', 'fastv:layer=2,keep=4']
    """
    least = {
        "new_tokens": (new_tokens, 1),
        "rounds": (rounds, 1),
        "warm_up": (warm_up, 0),
        "images": (images, 1),
    }
    for name, (count, low) in least.items():
        check(count is None or count >= low, name, f"at least {low}", count)
    sizes = tuple(dict.fromkeys(batch))
    fine = bool(sizes) and all(size >= 1 for size in sizes)
    check(fine, "batch", "numbers of at least 1", ",".join(map(str, sizes)) or "none")
    folder, trace = (None if path is None else Path(path) for path in (out, profile))
    if folder is not None:
        check_matplotlib("vlmprune bench")
        check_out(folder)
    if trace is not None:
        fits = trace.parent.is_dir() and not trace.is_dir()
        check(fits, "profile", "a file in an existing folder", repr(str(trace)))
    methods, prompt = _asked(checkpoint, policies, images)
    progress(f"loading {checkpoint.source}", 0, 0)
    model = checkpoint.model
    progress("peak rates", 0, 0)
    peaks = measure_peaks(model.device, model.dtype)
    kept = {}
    for name, policy in methods.items():
        progress(f"trying {name}", 0, 0)
        kept[name] = _tried(model, prompt, name, policy)
    arms = make_arms(checkpoint, prompt, methods, kept, baselines)
    rows = _measured(
        model, arms, sizes, new_tokens, rounds, warm_up, _counter(model, peaks, new_tokens), progress
    )
    if trace is not None:
        progress("profiling", 0, 0)
        write_profile(trace, model, arms, warm_up)
    settings = _settings(checkpoint, prompt, peaks) | {
        "batch": list(sizes),
        "new_tokens": new_tokens,
        "rounds": rounds,
        "warm_up": warm_up,
    }
    found = Bench(settings, rows, folder, trace)
    if folder is not None:
        _write_all(folder, found)
    return found


def _asked(
    checkpoint: Checkpoint, policies: Sequence[str | PruningPolicy] | None, images: int | None
) -> tuple[dict[str, PruningPolicy], Prompt]:
    """The policies by name, and the prompt; checked against the configuration."""
    ready = checkpoint.shape if isinstance(checkpoint, FullSize) else None
    if policies is None:
        policies = () if ready is None else ready.policies
    prompt = Prompt() if ready is None else ready.prompt
    if images is not None:
        prompt = replace(prompt, images=images)
    methods = named(policies)
    checkpoint.check_depth(methods.values())
    return methods, prompt


def _tried(model: Any, prompt: Prompt, name: str, policy: PruningPolicy) -> Kept:
    """What a policy keeps of the prompt, after each of its stages."""
    arm = Arm(name, "plain", prompt, policy)
    with arm.scope(model) as run:
        answer(model, prompt.inputs(model.config, 1, model.device, model.dtype), 1)
        return [(layer, after) for layer, _, after in run.report().stages]


def _measured(
    model: Any,
    arms: Sequence[Arm],
    sizes: Sequence[int],
    new_tokens: int,
    rounds: int,
    warm_up: int,
    counter: Counter,
    progress: Progress,
) -> list[Row]:
    """The rows of every batch size."""
    total, done = len(arms) * rounds * len(sizes), 0
    rows: list[Row] = []

    def tell(doing: str) -> None:
        nonlocal done
        done += 1
        progress(doing, done, total)

    for size in sizes:
        found = measure(model, arms, size, new_tokens, rounds, warm_up, tell)
        rows += make_rows(arms, size, found, counter)
    return rows


def _counter(model: Any, peaks: Peaks, new_tokens: int) -> Counter:
    parts = find_parts(model)
    width = torch.empty(0, dtype=model.dtype).element_size()
    decoder = Decoder(decoder_shape(parts.config), parts.config.text_config.vocab_size, width)
    tower = {id(p): p for part in (parts.vision, parts.projector) for p in part.parameters()}
    return Counter(decoder, sum(p.numel() * p.element_size() for p in tower.values()), peaks, new_tokens)


def _settings(checkpoint: Checkpoint, prompt: Prompt, peaks: Peaks) -> dict[str, Any]:
    device = torch.device(checkpoint.device)
    gpu = device.type == "cuda"
    return {
        "version": __version__,
        "torch": torch.__version__,
        "model": checkpoint.source,
        "random_weights": isinstance(checkpoint, FullSize),
        "device": torch.cuda.get_device_name(device) if gpu else f"cpu, {torch.get_num_threads()} threads",
        "dtype": checkpoint.dtype,
        "attention": checkpoint.attention,
        "images": prompt.images,
        "peaks": asdict(peaks),
    }


def _write_all(folder: Path, found: Bench) -> None:
    """Write results.json, results.csv and the pictures."""
    folder.mkdir(exist_ok=True)
    write(folder / "results.json", json.dumps(found.as_dict(), indent=1).encode())
    write(folder / "results.csv", to_csv(found.rows).encode())
    write(folder / "speedups.png", draw_speedups(found.rows))
    write(folder / "throughput.png", draw_throughput(found.rows))
