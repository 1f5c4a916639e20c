"""Prune a model inside a block, or until further notice."""

from __future__ import annotations

from contextlib import AbstractContextManager, ContextDecorator
from types import MethodType

from torch import nn

from vlmprune.errors import check
from vlmprune.models.engine import Engine
from vlmprune.models.graphs.store import Graphs
from vlmprune.models.host.parts import Parts, find_parts
from vlmprune.models.report import Run
from vlmprune.policies.base import PruningPolicy


def find_engine(parts: Parts) -> Engine | None:
    """The engine attached to a model: its hooks are the only trace it leaves there."""
    for hook in parts.base._forward_pre_hooks.values():
        if isinstance(hook, MethodType) and isinstance(hook.__self__, Engine):
            return hook.__self__
    return None


class Scope(AbstractContextManager[Run], ContextDecorator):
    """A block in which a model runs with hooks; may be entered again once it was left."""

    def __init__(self, model: nn.Module, policy: PruningPolicy | None, graphs: Graphs | None) -> None:
        check(graphs is None or isinstance(graphs, Graphs), "graphs", "a Graphs, or None", repr(graphs))
        self._model, self._policy, self._graphs = model, policy, graphs
        self._engine: Engine | None = None

    def __enter__(self) -> Run:
        parts = find_parts(self._model)
        active = find_engine(parts)
        if active is not None:
            expected = "no policy attached yet (compose policies with | or Stages)"
            got = "one that is measured in another block" if active.policy is None else repr(active.policy)
            check(False, "model", expected, got)
        self._engine = Engine(parts, self._policy, self._graphs)
        self._engine.attach()
        return self._engine.run

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        engine, self._engine = self._engine, None
        assert engine is not None
        engine.remove()
        if kind is None:
            engine.raise_if_lost()


def prune(model: nn.Module, policy: PruningPolicy, graphs: Graphs | None = None) -> Scope:
    """Prune this model's visual tokens inside the block.

    Only this instance is touched, by forward hooks that are gone when the block ends, also after an error.

    Every way of generating goes on as it does unpruned. What is worth knowing:
        The scoring row is the last one of the prompt. With ``logits_to_keep=n`` the last n - 1 tokens are an answer (or
        candidates of assisted decoding) that the choice must not see; with padding on the right the mask tells.
        Chunked prefill prunes the visual tokens of each chunk when it runs, scored by the chunk's last row; a part of an
        image keeps its share of a budget. Methods that read the prompt's text or the vision tower need one chunk.
        ``output_hidden_states``: entry i is what enters layer i before a stage there; later ones, the last one too, hold
        the surviving rows only. A second wave (``Scout``) runs layers again: what they give stands behind what the first gave.
        Code that ``torch.compile`` made of the model before the scope has no hooks in it: ``torch.compiler.reset()`` first.

    Args:
        model: a vision-language model of a family in ``vlmprune.models.host.families.FAMILIES``, with its head, whatever its
            ``attn_implementation``; a PEFT wrapper of one is looked through.
        policy: what to keep, e.g. ``FastV(layer=2, keep=0.5)``.
        graphs: where prefills are captured as CUDA graphs and replayed; None (default) = they run as ever.

    Yields:
        The ``Run``: stages, kept tokens and a report of the latest prefill.

    Raises:
        ModelError: the model, its decoder or its cache cannot be pruned.
        ValueError: the policy has a stage beyond the decoder's depth, or the model already has a policy.
        VersionError: this transformers calls something by a name that is not known here.
        NotPrunedError: at a call that is not pruned as asked; on leaving, if other code took the hooks off.

    Example, with a ``model`` and ``inputs`` as in the README (here: one image of 16 visual tokens):
        >>> from vlmprune import FastV, prune
        >>> with prune(model, FastV(layer=2, keep=0.5)) as run:
        ...     output = model.generate(**inputs, max_new_tokens=4)
        >>> [(stage.layer, stage.tokens_in, stage.tokens_kept) for stage in run.stages]
        [(2, 16, 8)]
        >>> run.report().tokens.after_last_stage
        8.0
    """
    check(isinstance(policy, PruningPolicy), "policy", "a PruningPolicy, e.g. FastV(layer=2)", repr(policy))
    return Scope(model, policy, graphs)


def meter(model: nn.Module, graphs: Graphs | None = None) -> Scope:
    """Measure an unpruned run the way ``prune`` measures a pruned one: same ``Run``, no stages.

    Example:
        >>> from vlmprune import meter
        >>> with meter(model) as run:
        ...     output = model.generate(**inputs, max_new_tokens=4)
        >>> run.report().visual_tokens, run.report().flops.cut
        (16.0, 0.0)
    """
    return Scope(model, None, graphs)


def attach(model: nn.Module, policy: PruningPolicy, graphs: Graphs | None = None) -> Run:
    """Prune this model until ``detach``: for pipelines and servers. Arguments and errors as for ``prune``.

    Example:
        >>> from vlmprune import DivPrune, attach, detach
        >>> run = attach(model, DivPrune(keep=4))
        >>> output = model.generate(**inputs, max_new_tokens=4)
        >>> detach(model)
        >>> len(run.kept())
        4
    """
    return prune(model, policy, graphs).__enter__()


def detach(model: nn.Module) -> None:
    """Stop pruning this model.

    Raises:
        ValueError: no policy is attached.
        NotPrunedError: other code took the hooks off while it was attached.

    Example:
        >>> from vlmprune import FastV, attach, detach
        >>> run = attach(model, FastV())
        >>> detach(model)  # the model is as it was before
    """
    engine = find_engine(find_parts(model))
    check(engine is not None, "model", "a model with a policy attached", "none attached")
    assert engine is not None
    engine.remove()
    engine.raise_if_lost()
