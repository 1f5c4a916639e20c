"""Which settings answer best at a budget: every candidate fitted to it, then raced on questions."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlmprune.checkpoints import Checkpoint, check_padding
from vlmprune.errors import InputError, check
from vlmprune.eval.arms import Arm, PromptSize, fit_arm
from vlmprune.eval.ask import Subject, typical_prompt, with_template
from vlmprune.eval.plots import check_matplotlib
from vlmprune.eval.questions import Question, read_questions
from vlmprune.eval.store import Store, check_out, write
from vlmprune.policies.base import PruningPolicy
from vlmprune.policies.recipe import to_yaml
from vlmprune.progress import Progress, silent
from vlmprune.tuning.plots import draw_race
from vlmprune.tuning.race import Rung, Standing, answers_to, ask, race, split
from vlmprune.tuning.schedules import GSearch, Score
from vlmprune.tuning.space import Candidate, candidates

BEST, RESULTS, PLOT = "best.yaml", "search.json", "search.png"


@dataclass(frozen=True)
class Found:
    """What a search found.

    Attributes:
        policy: the best.
        rungs: who took part in each, and how they stood.
        left_out: by name of a candidate why it could not take part.
        settings: all that the answers depend on, the budget, and the prompt it was counted for.
        file: the policy as a file for ``policy_from`` and ``--policy``.
    """

    policy: PruningPolicy
    rungs: tuple[Rung, ...]
    left_out: Mapping[str, str]
    settings: Mapping[str, Any]
    file: Path

    @property
    def level(self) -> list[Standing]:
        """Those of the last rung that its questions do not tell apart from the best, which is not among them."""
        return [one for one in self.rungs[-1].standings[1:] if one.to_best.high >= 0]


def search(
    checkpoint: Checkpoint,
    questions: Path | str,
    out: Path | str,
    policies: Sequence[str | PruningPolicy] = (),
    *,
    budget: float,
    families: Sequence[str] = (),
    first: int = 16,
    one_in: int = 2,
    seed: int = 0,
    batch_size: int = 16,
    max_new_tokens: int = 32,
    progress: Progress = silent,
) -> Found:
    """The best of many settings of any policies at equal FLOPs, by successive halving on questions with answers.

    Every candidate keeps as much as the budget leaves (``PruningPolicy.at``). In the first rung each answers ``first``
    questions, the same for all; the better ones go on to as many more, then to twice as many, until all are asked. The same
    seed and questions give the same result, and a run that was killed goes on from its folder. G-Search is fitted to answers:
    where it takes part, ``first`` questions are its own, and the rungs ask the others. What won was chosen on these
    questions, so its figures here flatter it: ask others (``vlmprune eval --policy OUT/best.yaml --keep``).

    Args:
        checkpoint: whom to ask.
        questions: folder with a ``questions.jsonl`` and its images.
        out: folder for answers, ``best.yaml``, ``search.json`` and ``search.png``, in an existing one.
        policies: objects or texts, in which braces stand for alternatives (``space.expand``) and schedules have names
            (``schedules.SCHEDULES``); none = ``space.default_policies``.
        budget: share of the prefill's FLOPs to save.
        families: only these families of questions; empty: all.
        first: questions of the first rung.
        one_in: 2 = the better half goes on, 3 = the best third.
        seed: of the order of the questions.
        batch_size: questions asked at once.
        max_new_tokens: longest answer.
        progress: called at every step and answer.

    Raises:
        InputError: bad input, too few questions for G-Search, no candidate that can meet the budget, one that no file can hold
            (``PruningPolicy.to_dict``), or answers of other settings in ``out``.
        ModelError: a model that cannot be pruned.
        OSError: a file cannot be written.
    """
    check_matplotlib("vlmprune tune")
    _check_settings(budget, first, one_in, batch_size, max_new_tokens, seed)
    questions, out = Path(questions), Path(out)
    asked = read_questions(questions, families)
    check_out(out)
    tried, left_out = candidates(policies, checkpoint)
    check_padding(checkpoint.processor, min(batch_size, len(asked)))
    asked = with_template(checkpoint, asked)
    prompt = typical_prompt(checkpoint, asked)
    own, parts = _parts(asked, first, seed, tried)
    fitted = _fitted(tried, budget, prompt, left_out)
    subject = Subject(checkpoint, batch_size, max_new_tokens)
    progress(f"loading {checkpoint.source}", 0, 0)
    settings = subject.settings(questions) | {"families": sorted(families), "first": first, "seed": seed}
    store = Store(out, settings)
    arms = _arms(fitted, budget, prompt, _scoring(subject, own, store, progress), left_out)
    rungs = tuple(race(subject, arms, parts, one_in, store, left_out, progress))
    counted = {"visual_tokens": prompt.visual, "text_tokens": prompt.text, "precision": checkpoint.precision}
    settings = settings | {"budget": budget, "one_in": one_in} | counted
    found = Found(_winner(arms, rungs), rungs, left_out, settings, out / BEST)
    _write(found, out)
    return found


def _check_settings(
    budget: float, first: int, one_in: int, batch_size: int, max_new_tokens: int, seed: int
) -> None:
    least = {
        "first": (first, 1),
        "one_in": (one_in, 2),
        "batch_size": (batch_size, 1),
        "max_new_tokens": (max_new_tokens, 1),
        "seed": (seed, 0),
    }
    for name, (count, lowest) in least.items():
        check(count >= lowest, name, f"at least {lowest}", count)
    check(0 < budget < 1, "budget", "a share of the FLOPs between 0 and 1", f"{budget:g}")


def _parts(
    asked: Sequence[Question], first: int, seed: int, tried: Mapping[str, Candidate]
) -> tuple[list[Question], list[list[Question]]]:
    """The questions that G-Search alone is asked, and those of each rung: nothing is raced on what it was fitted to."""
    parts = split(asked, first, seed)
    if not any(isinstance(one, GSearch) for one in tried.values()):
        return [], parts
    expected = f"at least {2 * first} with g_search, which has {first} to itself"
    check(len(parts) > 1, "questions", expected, len(asked))
    own, *others = parts
    return own, split([question for part in others for question in part], first, seed)


def _fitted(
    tried: Mapping[str, Candidate], budget: float, prompt: PromptSize, left_out: dict[str, str]
) -> dict[str, Candidate]:
    """Those that can meet the budget, policies fitted to it, before anything is loaded or asked; why others cannot.

    Raises:
        InputError: none can, or a policy that no file can hold.
    """
    fitted: dict[str, Candidate] = {}
    for text, one in tried.items():
        to_yaml(one if isinstance(one, PruningPolicy) else one.of)
        try:
            if isinstance(one, PruningPolicy):
                policy = fit_arm(text, one, budget, prompt).policy
                assert policy is not None
                fitted[text] = policy
            else:
                one.check_budget(budget, prompt)
                fitted[text] = one
        except InputError as error:
            left_out[text] = str(error).removeprefix(f"{text} at budget {budget:g}: ")
    reasons = "; ".join(f"{text}: {why}" for text, why in left_out.items())
    check(bool(fitted), "policy", f"one that can meet a budget of {budget:g}", reasons)
    return fitted


def _arms(
    fitted: Mapping[str, Candidate],
    budget: float,
    prompt: PromptSize,
    score: Score,
    left_out: dict[str, str],
) -> list[Arm]:
    """An arm for every candidate, each policy once; schedules are fitted, for which some ask questions."""
    arms: dict[str, Arm] = {}
    for text, one in fitted.items():
        policy = one if isinstance(one, PruningPolicy) else one.fit(budget, prompt, score)
        arm = Arm(text, budget, policy)
        same = arms.setdefault(arm.key, arm)
        if same is not arm:
            left_out[text] = f"policy: expected another than {same.method}, got the same at this budget"
    return list(arms.values())


def _winner(arms: Sequence[Arm], rungs: Sequence[Rung]) -> PruningPolicy:
    policy = next(arm.policy for arm in arms if arm.method == rungs[-1].standings[0].method)
    assert policy is not None
    return policy


def _scoring(subject: Subject, part: Sequence[Question], store: Store, progress: Progress) -> Score:
    """Share of right answers to ``part``; what the store has is not asked again."""

    def score(policy: PruningPolicy) -> float:
        arm = Arm("g_search", None, policy)
        ask(subject, [arm], part, 0, store, progress, "g_search")
        return statistics.fmean(answer.right for answer in answers_to(arm, [part], store))

    return score


def _write(found: Found, out: Path) -> None:
    """The plot, all figures, and, last, the best policy."""
    write(out / PLOT, draw_race(found.rungs))
    rungs = [
        {
            "questions": rung.questions,
            "unpruned": rung.unpruned._asdict(),
            "standings": [one.as_dict() for one in rung.standings],
        }
        for rung in found.rungs
    ]
    plain = {
        "settings": dict(found.settings),
        "best": found.rungs[-1].standings[0].method,
        "left_out": dict(found.left_out),
        "rungs": rungs,
    }
    write(out / RESULTS, json.dumps(plain, indent=1).encode())
    write(found.file, to_yaml(found.policy).encode())
