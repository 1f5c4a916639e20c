"""What a person sees of an expected error of any command: one line, and exit code 2. The one place where that is decided."""

from __future__ import annotations

import re
from typing import Any

import typer
from typer.core import TyperGroup

from vlmprune import env
from vlmprune.errors import BackendError, InputError, ModelError, NotPrunedError, VersionError, first_line

EXPECTED = (InputError, ModelError, NotPrunedError, BackendError, VersionError)
"""What bad input raises. Anything else is our bug and keeps its traceback, unless the operating system refused."""

OPTIONS = {
    "attention": "attn",
    "baselines": "baseline",
    "checkpoint": "model",
    "dpo": "beta",
    "families": "family",
}
ALIKE = (
    "baseline|batch|batch_size|budget|budgets|captioner_lm|captioner_rate|clip|data|device|dtype|epochs|family|images|init|max_new_tokens|model"
    "|new_tokens|oracle|out|profile|prompt|questions|resume|rounds|seeds|selector_rate|shape|text_encoder|train_mapper"
)
"""Arguments of the library that are called otherwise on the command line, and those that are not."""
ARGUMENT = re.compile(rf"\b(?:{'|'.join(OPTIONS)}|{ALIKE})(?=: expected)|(?<=one per )image(?=,)")


class Commands(TyperGroup):
    """All commands, with an expected error of any of them turned into ``error: ...`` on stderr and exit code 2."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command that was typed."""
        try:
            return super().invoke(ctx)
        except (*EXPECTED, OSError) as error:
            # A full disk or a missing right has a number; an OSError without one was made up by some library. A reader
            # of our output who has gone is no error.
            ours = isinstance(error, OSError) and (error.errno is None or isinstance(error, BrokenPipeError))
            if env.TRACEBACKS or ours:
                raise
            # A BackendError lists one reason a line.
            reasons = isinstance(error, BackendError)
            text = "; ".join(map(str.strip, str(error).splitlines())) if reasons else first_line(error)
            if isinstance(error, InputError):
                text = ARGUMENT.sub(lambda m: "--" + OPTIONS.get(m[0], m[0].replace("_", "-")), text)
            typer.echo(f"error: {text}", err=True)
            raise typer.Exit(2) from error
