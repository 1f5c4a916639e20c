"""Results as HTML: a card a method with its answer, its picture and its numbers. Whatever a visitor or a model wrote is escaped."""

from __future__ import annotations

from difflib import SequenceMatcher
from html import escape

from vlmprune.view.outcome import Outcome
from vlmprune.view.units import duration, flops
from vlmprune.web.ask import TIMED, Column, Results
from vlmprune.web.pictures import data_uri, enlarged, veil
from vlmprune.web.text import command, python


def results_html(results: Results) -> str:
    """The slider through the stages and a card a method; once all are there, how they were measured and what to copy."""
    cards = "".join(_card(results, column) for column in results.columns)
    picture = results.seen
    seen = "" if picture is None else f' style="--seen: url({data_uri(enlarged(picture), "WEBP")})"'
    foot = "" if results.doing else _foot(results)
    body = f'{_stages(results)}<div class="vp-cards">{cards}</div>{foot}'
    return f'<section class="vp-results"{seen} aria-label="Results">{body}</section>'


def _stages(results: Results) -> str:
    """One slider for all cards, from before any stage to behind the last of the method that has most."""
    most = max((len(column.outcome.kept) for column in results.columns if column.outcome), default=0)
    if not most or results.seen is None:
        return ""
    slider = f'<input type="range" min="0" max="{most}" value="{most}" step="1">'
    return f'<label class="vp-stage"><span>Stage</span>{slider}<output>after the last</output></label>'


def _card(results: Results, column: Column) -> str:
    settings = column.fitted.text if column.fitted else "" if column.method else "every token"
    broken = escape(settings).replace(":", ":<wbr>").replace(",", ",<wbr>")  # where a line may end
    head = f"<header><h3>{escape(column.method or 'unpruned')}</h3><code>{broken}</code></header>"
    if column.outcome is None:
        return f'<article class="vp-card">{head}<p class="vp-note">{escape(column.fault)}</p></article>'
    parts = (
        head,
        _answer(results, column.outcome),
        _picture(results, column, column.outcome),
        _numbers(results, column.outcome),
        _missed(results, column),
    )
    return f'<article class="vp-card" data-stages="{len(column.outcome.kept)}">{"".join(parts)}</article>'


def _answer(results: Results, outcome: Outcome) -> str:
    """The answer; words that are not those of the unpruned model are marked."""
    first, words = results.columns[0].outcome, outcome.answer.split()
    if first is None or first is outcome:
        return f'<div><p class="vp-answer">{escape(outcome.answer) or "(none)"}</p></div>'
    match = SequenceMatcher(None, first.answer.split(), words, autojunk=False)
    parts = []
    for kind, _, _, start, end in match.get_opcodes():
        text = escape(" ".join(words[start:end]))
        parts.append(text if kind == "equal" or not text else f"<mark>{text}</mark>")
    same = first.answer.split() == words
    note = '<span class="vp-same">as unpruned</span>' if same else '<span class="vp-other">differs</span>'
    return f'<div><p class="vp-answer">{" ".join(filter(None, parts)) or "(none)"}</p>{note}</div>'


def _picture(results: Results, column: Column, outcome: Outcome) -> str:
    """The picture under a veil for each stage, of which the slider shows one."""
    if results.seen is None:
        kind = results.question.checkpoint.config.model_type
        return (
            f'<p class="vp-note">Not drawn: {escape(kind)} does not see a picture as one grid of tokens.</p>'
        )
    total, last = results.size.visual, len(outcome.kept)
    veils, captions = [], [_at(0, last, "figcaption", f"all {total}")]
    for stage, ((layer, *_), kept) in enumerate(zip(outcome.report.stages, outcome.kept, strict=True), 1):
        uri = data_uri(veil(results.grid, set(kept)), "PNG")
        veils.append(_at(stage, last, "i", "", f' style="background-image: url({uri})"'))
        captions.append(_at(stage, last, "figcaption", f"from layer {layer}: {len(kept)} of {total}"))
    told = "The picture as the model sees it"
    if column.method:
        told += f", with what {column.method} drops dimmed"
    ratio = f"{results.seen.width} / {results.seen.height}"
    box = f'<div class="vp-seen" role="img" aria-label="{escape(told)}" style="aspect-ratio: {ratio}">'
    return f"<figure>{box}{''.join(veils)}</div>{''.join(captions)}</figure>"


def _at(stage: int, last: int, tag: str, text: str, attributes: str = "") -> str:
    """An element that is seen at one stage; at first the last one is."""
    return f'<{tag} data-at="{stage}"{attributes}{"" if stage == last else " hidden"}>{text}</{tag}>'


def _numbers(results: Results, outcome: Outcome) -> str:
    report, total = outcome.report, results.size.visual
    tokens, cost, seconds = report.tokens, report.flops, report.seconds
    cut = f"\u2212{cost.cut:.0%}" if outcome.kept else ""
    rows = {
        "tokens": (f"{tokens.mean_per_layer:.1f}", f"of {total}", tokens.mean_per_layer / total),
        "FLOPs": (flops(cost.pruned, cost.full, unit=""), cut, cost.pruned / cost.full),
        "prefill": (duration(seconds.prefill), "", None),
        "decode": (duration(seconds.decode), f"{report.decode_steps} steps", None),
    }
    cells = "".join(
        f"<div><dt>{name}</dt><dd><b>{value}</b> {more}{_bar(share)}</dd></div>"
        for name, (value, more, share) in rows.items()
    )
    return f"<dl>{cells}</dl>"


def _bar(share: float | None) -> str:
    return "" if share is None else f'<i class="vp-bar" style="--share: {share:.1%}"></i>'


def _missed(results: Results, column: Column) -> str:
    """What is said of a method that cannot meet the budget."""
    if column.fitted is None or column.fitted.meets:
        return ""
    budget = f"{results.question.budget:g}"
    told = f"Cannot come down to {budget}: some layers see every token. Set so that those behind them have a mean of {budget}."
    return f'<p class="vp-note">{told}</p>'


def _foot(results: Results) -> str:
    """How it was measured, and what to copy."""
    checkpoint = results.question.checkpoint
    how = (
        f"{checkpoint.source} on {checkpoint.device}, {checkpoint.precision}. Greedy, one question at a time. Tokens: visual ones, a "
        f"mean over the inputs of {results.size.layers} layers. FLOPs: of the decoder's prefill, 2 x multiply-adds, counted from "
        f"shapes. Time: median of {TIMED} runs after one that is not timed; prefill includes the choice."
    )
    told = {"command": ("On the command line", command(results)), "Python": ("In Python", python(results))}
    copies = "".join(
        f'<div class="vp-copy"><header><h4>The same {title[0].lower()}{title[1:]}</h4>'
        f'<button type="button" data-copy aria-label="Copy the {what}">Copy</button></header>'
        f'<pre tabindex="0">{escape(text)}</pre></div>'
        for what, (title, text) in told.items()
    )
    return f'<p class="vp-how">{escape(how)}</p><div class="vp-copies">{copies}</div>'
