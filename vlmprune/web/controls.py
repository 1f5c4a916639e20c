"""The page's own controls as HTML: the methods to tick, the examples, and the line that says what is done or what is wrong."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from html import escape

from PIL import Image

from vlmprune.web.ask import Results
from vlmprune.web.desk import Example, Offer
from vlmprune.web.pictures import data_uri, enlarged

EMPTY = """\
<div class="vp-empty">Answers stand here, side by side: try an example, or put in a picture of your own and ask.</div>"""


def methods_html(offer: Offer, ticked: Collection[str]) -> str:
    """A box for each method, with what it keeps; below, which are left out and why."""
    groups = []
    for title, before in (("Inside the language model", False), ("Before it", True)):
        rows = "".join(
            f'<label><input type="checkbox" value="{escape(name)}"{" checked" * (name in ticked)}>'
            f"<span><b>{escape(name)}</b> {escape(method.summary)}</span></label>"
            for name, method in offer.methods.items()
            if method.before == before
        )
        groups.append(f"<fieldset><legend>{title}</legend>{rows}</fieldset>")
    reasons = "".join(f"<li><b>{escape(name)}</b> {escape(why)}</li>" for name, why in offer.left_out.items())
    rest = f"<details><summary>{len(offer.left_out)} left out</summary><ul>{reasons}</ul></details>"
    title = '<div class="vp-title" id="methods-title">Methods</div>'
    box = '<div class="vp-methods" tabindex="0" role="group" aria-labelledby="methods-title">'
    return f"{title}{box}{''.join(groups)}</div>{rest if reasons else ''}"


def examples_html(examples: Sequence[Example]) -> str:
    """A button for each example; a click tells its number."""
    buttons = "".join(
        f'<button type="button" data-example="{number}"><img src="{_thumbnail(example)}" alt="">'
        f"<span>{escape(example.prompt)}</span></button>"
        for number, example in enumerate(examples)
    )
    return f'<nav class="vp-examples" aria-label="Examples">{buttons}</nav>'


def status_html(results: Results) -> str:
    """What is done now, and how far it is; "" = all is there."""
    if not results.doing:
        return ""
    done, total = len(results.columns), 1 + len(results.question.methods)
    return (
        f'<div class="vp-said vp-status" role="status"><span>{escape(results.doing)} ({done + 1} of {total})</span>'
        f'<progress max="{total}" value="{done}" aria-label="Progress"></progress></div>'
    )


def line_html(text: str) -> str:
    """A word in place of the progress."""
    return f'<div class="vp-said vp-line" role="status">{escape(text)}</div>'


def fault_html(text: str) -> str:
    """Why something could not be done."""
    return f'<div class="vp-said vp-fault" role="alert">{escape(text)}</div>'


def _thumbnail(example: Example) -> str:
    with Image.open(example.image) as image:
        return data_uri(enlarged(image.convert("RGB")).resize((112, 112)), "WEBP")
