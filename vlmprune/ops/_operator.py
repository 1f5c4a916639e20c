"""Make a custom op of one function: its signature is the schema, its body the fake, its name finds the backends."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import wraps
from itertools import islice
from typing import Any, get_type_hints

import torch
from torch import Tensor

from vlmprune.ops._dispatch import choose, register
from vlmprune.ops.scoring import Scoring
from vlmprune.ops.selection import Selection

Function = Callable[..., Any]
RECORDS = (Scoring, Selection)


def operator(
    reference: Function,
    call: Function = lambda run, *args: run(*args),
    *,
    kernels: str | None = None,
    cuda: bool = False,
    mutates_args: tuple[str, ...] = (),
) -> Callable[[Function], Any]:
    """Decorates ``_name``, which returns outputs that are not filled (the fake), and makes it the op ``vlmprune::name``.

    Args:
        reference, kernels, cuda: the backends, as for ``register``.
        call: ``(backend, *arguments)`` to the outputs, where a backend takes other arguments than the op, or where entries
            of tensors on the CPU must be looked at first. Those of a Scoring always are.
        mutates_args: the arguments that the op writes to.
    """

    def made(fake: Function) -> Any:
        name = fake.__name__.removeprefix("_")
        register(name, reference, kernels=kernels, cuda=cuda)

        @wraps(fake)
        def run(*args: Any) -> Any:
            scoring = args[-1]
            if not isinstance(scoring, Scoring):
                return call(choose(name, next(x for x in args if isinstance(x, Tensor))), *args)
            scoring.check_values()
            return call(choose(name, scoring.query), *args)

        op = torch.library.custom_op(f"vlmprune::{name}", _flattened(run), mutates_args=mutates_args)
        op.register_fake(_flattened(fake))
        return op

    return made


def _flattened(run: Function) -> Function:
    """``run`` as a custom op can take it: of an argument that is a record (Scoring, Selection) its fields, one by one."""
    signature = inspect.signature(run, eval_str=True)
    kind, flat, sizes = inspect.Parameter.POSITIONAL_OR_KEYWORD, [], []
    for p in signature.parameters.values():
        hints = get_type_hints(p.annotation) if p.annotation in RECORDS else {}
        fields = [inspect.Parameter(x, kind, annotation=hint) for x, hint in hints.items()] or [p]
        flat += fields
        sizes.append((p.annotation if hints else None, len(fields)))

    @wraps(run)
    def from_fields(*args: Any) -> Any:
        given = iter(args)
        whole: list[Any] = []
        for record, n in sizes:
            own = tuple(islice(given, n))
            whole += own if record is None else [record(*own)]  # nothing for an argument left at its default
        return run(*whole)

    from_fields.__signature__ = signature.replace(parameters=flat)  # type: ignore[attr-defined]
    return from_fields
