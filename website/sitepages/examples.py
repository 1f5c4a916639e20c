"""How a method is called, on the command line and from Python: with its settings for a published budget, or its defaults."""

from __future__ import annotations

from dataclasses import MISSING

from vlmprune.policies.base import PruningPolicy
from vlmprune.policies.registry import fields_of

BUDGETS = (128, 192)
"""Of the published budgets the first that a method has settings for is shown."""
QUESTION = '--model llava-hf/llava-1.5-7b-hf --image photo.jpg --prompt "Where is the dog?"'
SCENES = "examples/glyphworld"

GIVEN = {
    "accm": (
        f'--model {SCENES}/checkpoint-reads --image {SCENES}/images/scene_70002.png --prompt "what does the sign say ?"',
        f"accm:selection=fastervlm,compensator={SCENES}/compensator,keep=12,wording={{}}",
        f'selection=vlmprune.FasterVLM(), compensator="{SCENES}/compensator", keep=12, wording="{{}}"',
    ),
    "learned": (
        f'--model {SCENES}/checkpoint-576 --image {SCENES}/images/scene_70001.png --prompt "find the green phone ?"',
        "learned:scorer=examples/glance/weights,layer=0,keep=64",
        '"examples/glance/weights", layer=0, keep=64',
    ),
}
"""Methods with trained parts: what to ask which of the shipped models, and with which parts."""

GUIDED = """\
import vlmprune
from vlmprune.guidance import answer_first

first = answer_first(small, inputs)    # a smaller model of the same family: an answer, and a ranking of the visual tokens
with vlmprune.prune(model, vlmprune.SGL(first.guidance, layer=12, keep=0.4)) as run:
    output = model.generate(**inputs, max_new_tokens=64)"""


def command_of(name: str, cls: type[PruningPolicy]) -> str:
    """A command that asks one question with the method, beside the unpruned model; "" = none can be typed."""
    asked, typed, _ = GIVEN.get(name, (QUESTION, f"{name}:{preset(cls)}".rstrip(":"), ""))
    if name not in GIVEN and MISSING in fields_of(cls).values():
        return ""
    return f'vlmprune run {asked} \\\n    --policy "{typed}" --compare --save kept.png'


def python_of(name: str, cls: type[PruningPolicy]) -> str:
    """The lines that prune with the method, for a ``model`` and its ``inputs``."""
    if name == "sgl":
        return GUIDED
    settings = GIVEN[name][2] if name in GIVEN else as_python(preset(cls))
    return (
        f"import vlmprune\n\nwith vlmprune.prune(model, vlmprune.{cls.__name__}({settings})) as run:\n"
        "    output = model.generate(**inputs, max_new_tokens=64)\n\nprint(run.report())"
    )


def preset(cls: type[PruningPolicy]) -> str:
    """The settings that are shown, as typed; "" = the defaults."""
    return next((cls.presets[budget] for budget in BUDGETS if budget in cls.presets), "")


def as_python(settings: str) -> str:
    """Settings as typed in ``--policy``, as arguments: ``layers=2/3,positions=pack`` is ``layers=(2, 3), positions="pack"``."""
    named = (setting.split("=") for setting in settings.split(",") if setting)
    return ", ".join(f"{name}={_value(value)}" for name, value in named)


def _value(typed: str) -> str:
    if "/" in typed:
        return f"({', '.join(map(_value, typed.split('/')))})"
    return typed if typed.replace(".", "", 1).isdigit() else f'"{typed}"'
