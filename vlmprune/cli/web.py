"""The ``show`` command: opens the page and keeps it open until it is interrupted."""

from __future__ import annotations

import signal
import socket
from collections.abc import Sequence
from importlib.util import find_spec

from vlmprune.cli.console import waiting
from vlmprune.cli.options import silence_transformers
from vlmprune.errors import InputError, VersionError, check


def execute(
    models: Sequence[str],
    host: str,
    port: int,
    device: str,
    dtype: str,
    max_new_tokens: int,
    any_model: bool,
) -> None:
    """Run the command. Raises one of ``vlmprune.errors`` without Gradio, a free port, or a checkpoint that can be pruned."""
    if find_spec("gradio") is None:
        raise VersionError("vlmprune show needs Gradio: pip install 'gradio>=6.31,<7'")
    _check_free(host, port)
    with waiting("opening the page"):
        from vlmprune.web.desk import Desk, shipped
        from vlmprune.web.page import start

        silence_transformers()
        ours, examples = shipped()
        sources = list(dict.fromkeys(models)) or ours
        check(bool(sources), "model", "a checkpoint (only a checkout has one of its own)", "none")
        desk = Desk(sources, examples, device=device, dtype=dtype, limit=max_new_tokens, any_model=any_model)
        page = start(desk, host, port)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a service is ended so: uploads go then too
    print(f"{page.local_url} (Ctrl-C ends it)", flush=True)  # noqa: T201
    page.block_thread()


def _check_free(host: str, port: int) -> None:
    """Before anything slow: Gradio would say it last, and without the reason."""
    try:
        socket.create_server((host, port)).close()
    except OSError as error:
        raise InputError(f"--port: expected a free port of {host}, got {port} ({error.strerror})") from error
