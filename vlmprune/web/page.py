"""The page itself: what stands where, what follows on what, and the server that hands it out."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import gradio as gr
from gradio.utils import get_upload_folder
from starlette.middleware import Middleware

from vlmprune.errors import InputError, ModelError, VersionError
from vlmprune.view.fitting import Size
from vlmprune.web.ask import Asked, answers
from vlmprune.web.cards import results_html
from vlmprune.web.controls import EMPTY, examples_html, fault_html, line_html, methods_html, status_html
from vlmprune.web.desk import SHARE, Desk, Offer, offer, size_for
from vlmprune.web.limits import BYTES, LETTERS, read_budget, read_methods, read_picture, read_prompt
from vlmprune.web.look import CSS, EXAMPLES_JS, RESULTS_JS, STOP_JS, STOPPED_JS, THEME, TICKED_JS
from vlmprune.web.upload import Upload

HEAD = """\
<div id="head"><h1>What pruning drops</h1><p>Ask a vision-language model about a picture: once with every visual token, and once
with each method that drops most of them.</p></div>"""
TICKED = ("fastv", "feather", "visionzip", "divprune")
FAILED = "This could not be answered. What went wrong stands where the page was started."
REFUSED = (InputError, ModelError, VersionError)
IDLE = gr.update(interactive=True), gr.update(visible=False)
BUSY = gr.update(interactive=False), gr.update(visible=True)
"""The buttons to ask and to stop: while nothing is asked, and while something is."""
QUIET: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
"""Of events: the page has its own line for progress, and is for people."""
WAITING = 20
"""What may stand in line, questions above all, of which one is answered at a time."""
SWEEP, AGE = 600, 3600
"""Seconds between looks for uploads, and the age at which one is deleted."""
SOURCE = "'self' data: blob: 'unsafe-inline' 'unsafe-eval'"
POLICY = f"default-src {SOURCE}; object-src 'none'; base-uri 'self'; form-action 'self'".encode()
"""Gradio makes code of templates in the browser, hence the two words; nothing is fetched from anywhere else."""


class Controls(NamedTuple):
    """What a visitor asks with, and the line that says what is done."""

    picture: Upload
    prompt: gr.Textbox
    ask: gr.Button
    stop: gr.Button
    status: gr.HTML
    budget: gr.Slider
    methods: gr.HTML
    model: gr.Dropdown


def make_page(desk: Desk) -> gr.Blocks:
    """The page of a desk. Reads the first checkpoint's configuration and processor.

    Raises:
        InputError, ModelError: that checkpoint is not there, or cannot be pruned.
    """
    first = offer(desk.open(desk.sources[0]))
    settings: dict[str, Any] = {"analytics_enabled": False, "delete_cache": (SWEEP, AGE)}
    with gr.Blocks(title="vlmprune show", fill_width=True, **settings) as page:
        gr.HTML(HEAD)
        examples = gr.HTML(examples_html(desk.examples), js_on_load=EXAMPLES_JS, visible=bool(desk.examples))
        with gr.Row():
            with gr.Column(scale=1, min_width=300):
                controls = _controls(desk, first)
            with gr.Column(scale=4, min_width=300):
                results = gr.HTML(EMPTY, js_on_load=RESULTS_JS, elem_id="results")
        _connect(Events(desk), controls, examples, results)
    return page


def _controls(desk: Desk, first: Offer) -> Controls:
    """From top to bottom, as they are made."""
    picture = Upload(
        label="Picture",
        type="filepath",
        image_mode=None,
        sources=["upload"],
        height=230,
        buttons=[],
        placeholder="Drop a picture here, or click\nPNG, JPEG or WebP",
        alt_text="The picture to ask about",
        elem_id="picture",
    )
    hint = "What is in the picture?"
    prompt = gr.Textbox(label="Question", placeholder=hint, max_lines=4, max_length=LETTERS)
    with gr.Row():
        ask = gr.Button("Ask", variant="primary", scale=3)
        stop = gr.Button("Stop", visible=False, scale=1, min_width=80)
    status = gr.HTML(elem_id="status")
    budget = _slider(first.size)
    methods = gr.HTML(methods_html(first, TICKED), container=True, elem_id="methods")
    typed = {"allow_custom_value": desk.any_model, "filterable": desk.any_model}
    model = gr.Dropdown(desk.sources, label="Model", elem_id="model", **typed)
    return Controls(picture, prompt, ask, stop, status, budget, methods, model)


def _connect(on: Events, controls: Controls, examples: gr.HTML, results: gr.HTML) -> None:
    """Say what follows on what: a question waits for its turn, is answered, and may be stopped or fail."""
    picture, prompt, ask, stop, status, budget, methods, model = controls
    waiting, raw = [status, ask, stop], {"preprocess": False, **QUIET}
    asking = {
        "inputs": [picture, prompt, model, methods, budget],
        "outputs": [status, results, ask, stop],
        "js": TICKED_JS,
        "concurrency_limit": 1,
        "concurrency_id": "model",
        "trigger_mode": "multiple",
        **raw,
    }
    asked = gr.on([ask.click, prompt.submit], on.waiting, None, waiting, **QUIET).then(on.answers, **asking)
    tried = examples.click(on.example, None, [picture, prompt, *waiting], **QUIET).then(on.answers, **asking)
    for answered in (asked, tried):
        answered.failure(on.failed, [status], waiting, js=STOPPED_JS, **raw)
    stop.click(on.stopped, None, waiting, cancels=[asked, tried], js=STOP_JS, **QUIET)
    picture.upload(on.uploaded, [picture, model, budget], [picture, budget, status], **raw)
    model.change(on.chosen, [model], [budget, methods, status], **raw)


def start(desk: Desk, host: str = "127.0.0.1", port: int = 7860) -> gr.Blocks:
    """Listen; returns when the page can be opened. ``block_thread()`` of what is returned waits until it is interrupted.

    Raises:
        InputError, ModelError: the first checkpoint is not there, or cannot be pruned.
        OSError: the port is taken.
    """
    page = make_page(desk)
    page.queue(max_size=WAITING, api_open=False).launch(
        server_name=host,
        server_port=port,
        share=False,
        ssr_mode=False,
        quiet=True,
        prevent_thread_lock=True,
        max_file_size=BYTES,
        allowed_paths=[str(example.image.resolve()) for example in desk.examples],
        run_history=False,
        enable_monitoring=False,
        footer_links=[],
        mcp_server=False,
        pwa=False,
        theme=THEME,
        css=CSS,
        app_kwargs={"middleware": [Middleware(_Headers)]},
    )
    return page


class _Headers:
    """Says with every answer what the page may load, so that a browser asks nobody else."""

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        async def with_headers(message: Any) -> None:
            if message["type"] == "http.response.start":
                more = [(b"content-security-policy", POLICY), (b"referrer-policy", b"no-referrer")]
                message = message | {"headers": [*message.get("headers", []), *more]}
            await send(message)

        await self.app(scope, receive, with_headers)


def _slider(size: Size, budget: Any = None) -> gr.Slider:
    """At this budget if the picture has as many tokens."""
    visual = size.visual
    stays = isinstance(budget, int | float) and 1 <= budget <= visual
    return gr.Slider(
        1,
        visual,
        value=budget if stays else round(SHARE * visual),
        step=1,
        label="Budget",
        info=f"visual tokens of {visual}, a mean over the {size.layers} layers",
        interactive=True,
    )


class Events:
    """What follows on what a visitor does. Inputs come as the browser sent them, and are checked here."""

    def __init__(self, desk: Desk) -> None:
        self._desk = desk

    def failed(self, stopped: Any) -> tuple[Any, Any, Any]:
        """An error that nobody expected, whose traceback is the operator's; to be stopped is to fail as well."""
        return self.stopped() if stopped is True else (fault_html(FAILED), *IDLE)

    def waiting(self) -> tuple[Any, Any, Any]:
        """Until it is this visitor's turn."""
        return line_html("Waiting for its turn"), *BUSY

    def answers(
        self, picture: Any, prompt: Any, model: Any, methods: Any, budget: Any
    ) -> Iterator[tuple[Any, Any, Any, Any]]:
        """What the page shows of a question while it is answered."""
        try:
            checkpoint = self._desk.open(model)
            image, path, name = read_picture(picture, Path(get_upload_folder()))
            asked = read_prompt(prompt)
            file = self._desk.path_of(path, name)
            question = Asked(checkpoint, image, file, asked, read_methods(methods), read_budget(budget))
            for results in answers(self._desk, question):
                yield status_html(results), results_html(results), *(BUSY if results.doing else IDLE)
        except REFUSED as error:
            yield fault_html(str(error)), gr.skip(), *IDLE

    def example(self, event: gr.EventData) -> tuple[Any, ...]:
        """Picture and question of the example that was clicked."""
        number = event.number
        if isinstance(number, int) and 0 <= number < len(self._desk.examples):
            image, prompt = self._desk.examples[number]
            return str(image), prompt, *self.waiting()
        return (gr.skip(),) * 5

    def uploaded(self, picture: Any, model: Any, budget: Any) -> tuple[Any, Any, str]:
        """A picture that cannot be used goes at once, with a word why; the budget is one of this picture's tokens."""
        try:
            image, _, _ = read_picture(picture, Path(get_upload_folder()))
            size = size_for(self._desk.open(model), image)
        except REFUSED as error:
            return None, gr.skip(), fault_html(str(error))
        return gr.skip(), _slider(size, budget), ""

    def chosen(self, model: Any) -> tuple[Any, Any, str]:
        """The budget and the methods of another model."""
        try:
            offered = offer(self._desk.open(model))
        except REFUSED as error:
            return gr.skip(), gr.skip(), fault_html(str(error))
        return _slider(offered.size), methods_html(offered, TICKED), ""

    def stopped(self) -> tuple[Any, Any, Any]:
        """Nothing is asked any more; what was found stays."""
        return line_html("Stopped"), *IDLE
