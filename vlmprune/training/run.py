"""A whole training run: checks everything, starts or goes on, saves, and says what came of it."""

from __future__ import annotations

import dataclasses
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from vlmprune import __version__
from vlmprune.checkpoints import Checkpoint, check_padding
from vlmprune.compensation import Known
from vlmprune.errors import check
from vlmprune.policies import ACCM
from vlmprune.policies.recipe import policy_from
from vlmprune.progress import Progress, silent
from vlmprune.training.folder import COMPENSATOR, Folder
from vlmprune.training.plan import Plan
from vlmprune.training.referee import Captioned, Referee
from vlmprune.training.samples import read_samples
from vlmprune.training.start import Start, check_widths, make_describer
from vlmprune.training.trainer import Trainer

RECENT = 20
"""Steps over which figures are averaged where they are shown."""


@dataclass(frozen=True)
class Trained:
    """What came out.

    Attributes:
        steps: updates of the whole run.
        seconds: what they took, also before an interruption.
        figures: means over the last steps: divergences in nats (``kl_none`` without caption, ``kl_random`` a random
            candidate, ``kl_chosen`` the selector's, ``kl_best``), ``picked`` (share where the selector's is the best), losses.
        compensator: the folder of the describer.
    """

    steps: int
    seconds: float
    figures: Mapping[str, float]
    compensator: Path


def train(
    checkpoint: Checkpoint,
    data: Path | str,
    out: Path | str,
    plan: Plan,
    start: Start,
    *,
    resume: bool = False,
    save_steps: int | None = None,
    save_seconds: float = 120.0,
    progress: Progress = silent,
) -> Trained:
    """Train ACCM's captioner and selector: what ``vlmprune accm train`` does, without printing.

    Nothing of the checkpoint is trained. All that can fail without its weights fails before they are read.

    Args:
        checkpoint: the frozen model; its processor must pad if there is more than one question a step.
        data: JSONL file of ``image``, ``question``, ``answer`` (where captions are imitated, ``caption`` in its place); or a
            folder with such a ``questions.jsonl``.
        out: folder of the run, in an existing one.
        plan: how to train.
        start: the describer to start from.
        resume: go on with the run in ``out``, which was asked for in the same words. It ends with the weights that
            it would have had without the interruption: bit by bit on a CPU, with as many threads.
        save_steps: save every so many steps, besides.
        save_seconds: save when so many seconds have passed; 0 = after every step.
        progress: called at every step.

    Raises:
        InputError: bad input: data, policy, describer or widths that do not fit, a folder that holds another run.
        ModelError: a model that cannot be pruned, or answers with numbers that are not finite.
        OSError: a file cannot be written.
    """
    folder, samples = Folder(Path(out), resume), read_samples(data, "caption" if plan.imitate else "answer")
    check(save_steps is None or save_steps >= 1, "save_steps", "at least 1", save_steps)
    captioned = captioned_by(plan, checkpoint)
    check_padding(checkpoint.processor, plan.batch_size)
    describer = None
    if folder.latest is None:
        describer = make_describer(start, checkpoint.config, plan.seed, plan.train_mapper)
    progress(f"loading {checkpoint.source}", 0, 0)
    settings = {"version": __version__, "data": samples.digest, "samples": len(samples.items)}
    settings |= {"model": checkpoint.source, "device": checkpoint.device, "dtype": checkpoint.dtype}
    settings |= {"attention": checkpoint.attention} | dataclasses.asdict(start) | dataclasses.asdict(plan)
    folder.open(settings)
    referee = Referee(checkpoint, captioned, plan.max_answer_tokens, plan.rows)
    state = None
    if describer is None:
        describer, state = folder.load(checkpoint.model.device)
        check_widths(describer, checkpoint.config)
    first = describer.captioner if state is None else None
    reference = None if plan.dpo is None else folder.reference(first)
    trainer = Trainer(referee, describer, samples, plan, reference)
    seconds = 0.0
    if state is None:
        folder.save(describer, trainer.state() | {"seconds": seconds})
    else:
        trainer.load(state)
        seconds = state["seconds"]
    folder.cut_log(trainer.step)
    return _steps(trainer, folder, seconds, save_steps, save_seconds, progress)


def _steps(
    trainer: Trainer,
    folder: Folder,
    before: float,
    save_steps: int | None,
    save_seconds: float,
    progress: Progress,
) -> Trained:
    """All that are left, each logged, and saved from time to time."""
    began = saved = time.monotonic()
    recent: deque[dict[str, float]] = deque(folder.recent(RECENT), maxlen=RECENT)
    seconds, total = before, trainer.total
    progress("training", trainer.step, total)
    while trainer.step < total:
        rates = [group["lr"] for group in trainer.optimizer.param_groups]
        figures = trainer.train_step()
        now = time.monotonic()
        seconds = before + now - began
        recent.append(figures)
        line = {"step": trainer.step, "seconds": round(seconds, 3), "seed": trainer.plan.seed, "rates": rates}
        folder.log(line | {name: round(value, 6) for name, value in figures.items()})
        progress(spell(mean(recent)), trainer.step, total)
        due = save_steps is not None and trainer.step % save_steps == 0
        if due or now - saved >= save_seconds or trainer.step == total:
            folder.save(trainer.describer, trainer.state() | {"seconds": seconds})
            saved = time.monotonic()
    return Trained(total, seconds, mean(recent), folder.path / COMPENSATOR)


def captioned_by(plan: Plan, checkpoint: Checkpoint) -> Captioned:
    """What makes the policy, for any compensator. Raises InputError for a selection that cannot be ACCM's."""
    policy = ACCM(
        selection=policy_from(plan.selection),
        compensator=Known(()),
        keep=plan.keep,
        wording=plan.wording,
        tokenizer=checkpoint.processor.tokenizer,
    )
    return lambda compensator: dataclasses.replace(policy, compensator=compensator)


def mean(figures: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Of each figure over several steps; empty for none."""
    names = figures[0] if figures else ()
    return {name: sum(step[name] for step in figures) / len(figures) for name in names}


def spell(figures: Mapping[str, float]) -> str:
    """The figures that tell how a training goes, in a line."""
    if "kl_none" not in figures:
        return f"captions {figures['captioner']:.3f} nats a token"
    names = {"kl_none": "without", "kl_random": "random", "kl_chosen": "chosen", "kl_best": "best"}
    kl = ", ".join(f"{figures[name]:.3f} {word}" for name, word in names.items())
    return f"KL {kl}; best picked {figures['picked']:.0%}"
