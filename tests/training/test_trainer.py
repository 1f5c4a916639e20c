"""Steps with a referee whose taste is known: what it likes becomes likelier, and the selector learns to see it."""

import math
from dataclasses import replace

import pytest
import torch

from helpers.describers import FEATURES, make_describer
from vlmprune.compensation import Discarded
from vlmprune.errors import ModelError
from vlmprune.training.objective import judge
from vlmprune.training.plan import Plan
from vlmprune.training.referee import Case
from vlmprune.training.samples import Sample, Samples
from vlmprune.training.trainer import Trainer

QUESTIONS = (
    "what color is the cup ?",
    "is there a phone ?",
    "locate the green phone .",
    "how many objects are there ?",
)


class Taste:
    """Stands for the frozen model: an answer comes nearer by so many nats as ``liking`` says of a text."""

    def __init__(self, liking):
        self.liking = liking
        self.checkpoint = type("Checkpoint", (), {"model": torch.nn.Linear(1, 1)})
        self.checkpoint.model.device = torch.device("cpu")
        self.heard = []

    def hear(self, samples):
        self.heard.append([sample.where for sample in samples])
        images = self.show(samples)
        return Case(None, torch.empty(0), images, torch.full((len(samples),), 9.0))

    def show(self, samples):
        images = []
        for sample in samples:
            draw = torch.Generator().manual_seed(int(sample.where))
            features = torch.randn(12, FEATURES, generator=draw)
            images.append(Discarded(features, torch.arange(2, 12), sample.question))
        return images

    def divergences(self, case, texts):
        return torch.tensor([[9.0 - self.liking(text) for text in some] for some in texts])


def samples():
    return Samples([Sample(str(i), None, QUESTIONS[i % 4], "yes") for i in range(8)], "")


def make_trainer(liking, chooses=True, describer=None, **plan):
    settings = {"candidates": 4, "batch_size": 4, "steps": 200, "warm_up": 0, "clip": 100.0} | plan
    plan = Plan("uniform", **settings)
    return Trainer(Taste(liking), describer or make_describer(chooses=chooses), samples(), plan)


def long(text):
    return float(len(text))


def test_a_step_makes_the_best_candidates_likelier():
    trainer = make_trainer(long, captioner_rate=1e-3)
    case = trainer.referee.hear(trainer.samples.batch(0, 4, 0))
    texts = trainer.describer.captioner.write(case.images, 4)
    verdict = judge(trainer.referee.divergences(case, texts))
    best = [some[i] for some, i in zip(texts, verdict.best.tolist(), strict=True)]
    assert verdict.margin.min() > 0

    def likely():
        with torch.no_grad():
            return trainer.describer.captioner.log_likelihood(case.images, best)[0].sum().item()

    before = likely()
    figures = trainer.train_step()
    assert likely() > before
    assert figures["kl_best"] < figures["kl_random"] and figures["kl_none"] == 9.0
    assert figures["margin"] == pytest.approx(figures["kl_random"] - figures["kl_best"], rel=1e-5)


def test_no_candidate_better_no_step():
    """Advantages of 0: nothing is learned from candidates that are equally good."""
    trainer = make_trainer(lambda text: 1.0, captioner_rate=1.0, selector_rate=1.0)
    before = {name: value.clone() for name, value in trainer.describer.state_dict().items()}
    figures = trainer.train_step()
    assert figures["captioner"] == figures["selector"] == 0 and figures["picked"] == 1
    assert all(torch.equal(value, before[name]) for name, value in trainer.describer.state_dict().items())


def test_the_selector_learns_what_the_referee_likes():
    """The same candidates come every other step: at first a quarter are picked right, about as many as by chance."""
    plan = {"captioner_rate": 0.0, "selector_rate": 3e-3, "steps": 40}
    trainer = make_trainer(lambda text: -3.0 * text.split().count("there"), **plan)
    figures = [trainer.train_step() for _ in range(40)]
    assert sum(f["picked"] for f in figures[:2]) / 2 == 0.25
    assert sum(f["picked"] for f in figures[-10:]) / 10 > 0.95
    assert figures[-1]["kl_chosen"] < figures[-1]["kl_random"]


@pytest.mark.parametrize("weighting", ["batch", "sample"])
def test_training_leads_the_captioner_to_what_is_liked(weighting):
    trainer = make_trainer(
        long, chooses=False, sample=True, captioner_rate=3e-3, steps=40, weighting=weighting
    )
    figures = [trainer.train_step() for _ in range(40)]
    early, late = (sum(f["kl_random"] for f in some) / 10 for some in (figures[:10], figures[-10:]))
    assert late < early - 2
    assert "selector" not in figures[0]


def test_preferences_by_hand_and_learned():
    trainer = make_trainer(long, dpo=0.5, captioner_rate=1e-3, sample=True)
    case = trainer.referee.hear(trainer.samples.batch(0, 4, 0))
    first = trainer.train_step()
    assert first["captioner"] == pytest.approx(math.log(2))  # it is its own reference
    texts = trainer.describer.captioner.draft(case.images, 4, True).texts
    verdict = judge(trainer.referee.divergences(case, texts))
    got = trainer._captioner_loss(case.images, texts, verdict).item()
    want = []
    with torch.no_grad():
        for image, some, best, worst in zip(case.images, texts, verdict.best, verdict.worst, strict=True):
            better, worse, held_better, held_worse = (
                model.log_likelihood([image], [some[i]])[0].item()
                for model in (trainer.describer.captioner, trainer.reference)
                for i in (best, worst)
            )
            want.append(-math.log(1 / (1 + math.exp(-0.5 * ((better - held_better) - (worse - held_worse))))))
    assert got == pytest.approx(sum(want) / 4, rel=1e-3)
    figures = [trainer.train_step() for _ in range(30)]
    assert sum(f["captioner"] for f in figures[-5:]) / 5 < math.log(2)
    assert sum(f["kl_random"] for f in figures[-5:]) < sum(f["kl_random"] for f in figures[:5])


def test_captions_are_imitated():
    """By mapper and language model, from the question and what is dropped; the selector has no part in it."""
    trainer = make_trainer(long, imitate=True, train_mapper=True, captioner_rate=1e-2, steps=100, warm_up=5)
    said = ["it is green", "yes", "row 3 col 5", "4 objects"]  # one a question
    items = [replace(s, caption=said[i % 4]) for i, s in enumerate(trainer.samples.items)]
    trainer.samples = Samples(items, "")
    before = {name: value.clone() for name, value in trainer.describer.selector.state_dict().items()}
    losses = [trainer.train_step()["captioner"] for _ in range(100)]
    assert sum(losses[-4:]) / 4 < 0.6 and losses[0] > 2
    assert trainer.describer.captioner.write(trainer.referee.show(items), 1) == [
        [item.caption] for item in items
    ]
    after = trainer.describer.selector.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())


@pytest.mark.parametrize("mapper, encoder", [(False, False), (True, None)])
def test_what_is_frozen_stays(mapper, encoder):
    trainer = make_trainer(
        long, train_mapper=mapper, train_encoder=encoder, captioner_rate=0.1, selector_rate=0.1
    )
    before = {name: value.clone() for name, value in trainer.describer.named_parameters()}
    trainer.train_step()
    moved = {
        name for name, value in trainer.describer.named_parameters() if not torch.equal(value, before[name])
    }
    parts = {".".join(name.split(".")[:2]) for name in moved}
    want = {"captioner.language_model", "selector.blocks", "selector.score"}
    assert parts == want | ({"captioner.mapper", "selector.text_encoder"} if mapper else set())


def test_rates_warm_up_and_fall():
    trainer = make_trainer(long, warm_up=2, steps=6, captioner_rate=1e-3, selector_rate=2e-3)
    rates = []
    for _ in range(6):
        rates.append([group["lr"] for group in trainer.optimizer.param_groups])
        trainer.train_step()
    want = [0, 0.5, 1, 0.75, 0.5, 0.25]
    assert [pair[0] for pair in rates] == pytest.approx([share * 1e-3 for share in want])
    assert [pair[1] for pair in rates] == pytest.approx([share * 2e-3 for share in want])


def test_steps_depend_on_nothing_that_was_drawn_before_them_and_leave_no_trace():
    found = []
    for noise in (1, 2):
        trainer = make_trainer(long, sample=True, captioner_rate=1e-2, selector_rate=1e-2)
        torch.manual_seed(noise)
        state = torch.get_rng_state()
        figures = [trainer.train_step() for _ in range(3)]
        found.append((figures, trainer.describer.state_dict(), trainer.referee.heard))
        assert torch.equal(torch.get_rng_state(), state)
    assert found[0][0] == found[1][0] and found[0][2] == found[1][2]
    assert all(torch.equal(value, found[1][1][name]) for name, value in found[0][1].items())


def test_what_is_not_finite_changes_nothing():
    trainer = make_trainer(
        lambda text: math.inf if "there" in text else 1.0, captioner_rate=1.0, selector_rate=1.0
    )
    before = {name: value.clone() for name, value in trainer.describer.state_dict().items()}
    with pytest.raises(ModelError, match=r"^step 1: expected a finite number for kl_random, got -inf"):
        trainer.train_step()
    assert all(torch.equal(value, before[name]) for name, value in trainer.describer.state_dict().items())


@pytest.mark.parametrize(
    "setting, said",
    [
        ({"candidates": 1}, "^candidates: expected a whole number of 2 or more, got 1$"),
        ({"batch_size": 0}, "^batch_size: expected a whole number of 1 or more, got 0$"),
        ({"rows": 3}, "^rows: expected a whole number of 4 or more, got 3$"),
        ({"epochs": 0.0}, "^epochs: expected a number above 0, got 0.0$"),
        ({"dpo": 0.0}, "^dpo: expected a number above 0, got 0.0$"),
        ({"captioner_rate": -1.0}, "^captioner_rate: expected a learning rate, 0 or more, got -1.0$"),
        ({"imitate": True, "dpo": 0.1}, "^imitate: expected False with dpo, got True$"),
        ({"weighting": "none"}, "^weighting: expected 'batch' or 'sample', got 'none'$"),
    ],
)
def test_plans_out_of_range(setting, said):
    with pytest.raises(ValueError, match=said):
        Plan("uniform", **setting)


def test_lengths_of_runs():
    plan = Plan("uniform", batch_size=4, epochs=2.5)
    assert plan.total(10) == 7 and plan.warming(7) == 0
    assert Plan("uniform", steps=3).total(10) == 3
    assert Plan("uniform").warming(10**6) == 1000 and Plan("uniform", warm_up=5).warming(100) == 5
