"""What a served model is pruned by: read from its configuration, refused where vLLM cannot do it, counted ahead."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from functools import lru_cache
from logging import getLogger
from reprlib import repr as short
from typing import Any

from vlmprune.errors import check
from vlmprune.integrations.vllm import ARCHITECTURES
from vlmprune.models.host.families import FAMILIES
from vlmprune.policies import PruningPolicy, policy_from
from vlmprune.policies.checks import check_keep, is_number, plain

OVERRIDE = "vlmprune"
"""What the configuration calls the policy: a dict as ``policy_from`` reads it, and perhaps ``max_keep``."""

ASKED = "vlmprune_keep"
"""What a request's ``mm_processor_kwargs`` call its own budget: tokens per image, or a share."""

MOST = "max"
"""What a request says instead that wants as much as it may ask for; so does the image that vLLM measures itself with."""

KEPT = "vlmprune_kept"
"""The field of an image's data that says how many of its tokens stay."""

ENDLESS = 1 << 30
"""More tokens than any image has."""


@dataclass(frozen=True)
class Settings:
    """A policy, and what a request may ask of it.

    Args:
        policy: chooses by the image alone.
        max_keep: tokens per image (int) or share (float) that a request may ask for; None = what the policy keeps.

    Raises:
        InputError: a policy that vLLM cannot run, with the reason; or a setting out of range.
    """

    policy: PruningPolicy
    max_keep: int | float | None = None

    def __post_init__(self) -> None:
        check_image_only(self.policy)
        if self.max_keep is not None:
            object.__setattr__(self, "max_keep", plain(self.max_keep))
            check_keep(self.max_keep, "max_keep")

    @classmethod
    def of(cls, config: Any) -> Settings:
        """Those of a configuration, ``config.vlmprune``. Raises InputError where it has none, or of an unknown family."""
        family = config.model_type
        known = f"one of {', '.join(ARCHITECTURES)} (vlmprune prunes no others in vLLM)"
        check(family in ARCHITECTURES, "model_type", known, repr(family))
        given = vars(config).get(OVERRIDE)
        named = isinstance(given, dict) and "policy" in given
        here = "pack" if FAMILIES[family].packs else "keep"
        expected = f"""a dict as in {{"policy": "divprune", "keep": 128, "positions": "{here}"}}"""
        check(named, f"hf_overrides[{OVERRIDE!r}]", expected, repr(given))
        assert given is not None
        settings = dict(given)
        most = settings.pop("max_keep", None)
        read = cls(policy_from(settings), most)
        check_placed(read.policy, here)
        return read

    def default(self, tokens: int) -> int:
        """How many of an image's tokens stay where a request asks for nothing."""
        return self.policy.kept(tokens, 1, 0)

    def most(self, tokens: int) -> int:
        """How many of them may stay."""
        usual = self.default(tokens)
        if self.max_keep is None:
            return usual
        return max(usual, min(tokens, self._counted(self.max_keep, tokens)))

    @property
    def by_share(self) -> bool:
        """Whether the same share of any image may stay, rather than the same number of tokens."""
        return self.most(2 * ENDLESS) == 2 * self.most(ENDLESS)

    def kept(self, tokens: int, asked: object = None) -> int:
        """How many stay of an image for which a request asked ``vlmprune_keep``; None = it did not.

        Raises:
            InputError: no budget, one above what is allowed, or one that the policy cannot keep. All that a worker could
                refuse is refused here: there it would end the engine, here it ends the request.
        """
        if asked is None:
            wanted = self.default(tokens)
        elif isinstance(asked, str) and asked == MOST:
            wanted = self.most(tokens)
        else:
            wanted = self._asked(tokens, plain(asked))
        check(0 < wanted <= tokens, repr(self.policy), f"to keep some of an image's {tokens} tokens", wanted)
        self.policy_for(tokens, wanted)
        return wanted

    def policy_for(self, tokens: int, kept: int) -> PruningPolicy:
        """The policy, keeping so many of an image's tokens. Raises InputError where it cannot."""
        return _keeping(self.policy, tokens, kept)

    def check_room(self, tokens: int) -> None:
        """Raise InputError where more is to be kept than the largest image has, so many tokens, or no request may ask for that."""
        wanted = self.default(ENDLESS)
        if wanted == self.default(2 * ENDLESS):  # so it is a number of tokens, and no share
            expected = f"at most the {tokens} tokens of this model's largest image"
            check(wanted <= tokens, OVERRIDE, expected, f"{wanted} with {self.policy!r}")
        most = self.max_keep
        if most is not None:
            usual = self.default(tokens)
            expected = f"{usual} (what the policy keeps itself) to {tokens}, the tokens of this model's largest image"
            check(usual <= self._counted(most, tokens) <= tokens, "max_keep", expected, most)
        self.kept(tokens, MOST)

    def _asked(self, tokens: int, asked: Any) -> int:
        known = "a share in (0, 1] or a whole number of tokens per image >= 1"  # as check_keep has it
        check(is_number(asked), ASKED, known, short(asked))  # a client's text may be of any length
        check_keep(asked, ASKED)
        wanted, most = self._counted(asked, tokens), self.most(tokens)
        check(wanted <= tokens, ASKED, f"at most the {tokens} tokens of this image", asked)
        allowed = f"at most {most} of this image's {tokens} tokens (more only with a larger max_keep)"
        check(wanted <= most, ASKED, allowed, asked)
        return wanted

    def _counted(self, budget: float, tokens: int) -> int:
        """A number of tokens is itself, and a share what the policy makes of it."""
        return budget if isinstance(budget, int) else self.policy.at(budget).kept(tokens, 1, 0)


def check_image_only(policy: PruningPolicy) -> None:
    """Raise InputError unless a policy chooses before the language model, by the image alone, as many as it says."""
    name = type(policy).__name__
    before = "a policy that prunes at layer 0 alone, before the language model (in vLLM all layers share one sequence)"
    check(policy.layers == (0,), name, before, f"one that prunes at {', '.join(map(str, policy.layers))}")
    needs = policy.needs(0)
    by_image = "a choice by the image alone (vLLM caches encoded images and prefixes by the image)"
    check(needs.attention is None, name, by_image, "one by the language model's attention")
    check(not (needs.reads_text or needs.tokens), name, by_image, "one that reads the prompt")
    check(not policy.inserts, name, by_image, "one that writes into the prompt")
    check(not policy.rectify, "rectify", "False (vLLM's attention takes no weights)", policy.rectify)
    ahead = "a count known before an image is encoded (vLLM's scheduler reserves it)"
    check(policy.fixed_count, name, ahead, "one that depends on the image")
    check(_hashable(policy), name, "settings that hash, as those of every policy", repr(policy))


def check_vision_layers(policy: PruningPolicy, depth: int, loaded: int) -> None:
    """Raise InputError where a policy reads a vision layer that the tower of ``depth`` has not, or vLLM does not load."""
    for layer in policy.needs(0).vision:
        number = layer + depth if layer < 0 else layer
        expected = (
            f"{-depth} to {loaded - depth - 1}, or 0 to {loaded - 1} (of {depth} layers vLLM loads {loaded})"
        )
        check(0 <= number < loaded, "vision_layer", expected, layer)


def _hashable(policy: PruningPolicy) -> bool:
    try:
        return isinstance(hash(policy), int)
    except TypeError:
        return False


def check_placed(policy: PruningPolicy, here: str) -> None:
    """Raise InputError where a setting ``positions`` says otherwise than vLLM places this model's tokens, a default too.

    Args:
        policy: with those it is made of.
        here: "pack", or "keep" those they had.
    """
    why = "images are packed" if here == "pack" else "image tokens keep the positions they had"
    expected = f"{here!r} with this model in vLLM, where {why}"
    for said in _said(policy):
        check(said == here, "positions", expected, f"{said!r} in {policy!r}")


def warn_packed(policy: PruningPolicy) -> None:
    """Say that a LLaVA's tokens are packed where the policy has no setting for it, so that none could be refused."""
    if not _said(policy):
        text = "vlmprune: what %r keeps stands at 0, 1, 2, ... (packed) with this model in vLLM; docs/vllm.md says why"
        getLogger(__name__).warning(text, policy)


def _said(policy: PruningPolicy) -> list[str]:
    """What settings ``positions`` of a policy, and of those it is made of, say."""
    made_of = (policy, *_members(policy))
    return [vars(one)["positions"] for one in made_of if "positions" in one.__dataclass_fields__]


def _members(policy: PruningPolicy) -> Iterator[PruningPolicy]:
    """The policies of which one is made, and theirs."""
    for field in fields(policy):
        held = vars(policy).get(field.name)
        for one in held if isinstance(held, tuple) else (held,):
            if isinstance(one, PruningPolicy):
                yield one
                yield from _members(one)


@lru_cache(maxsize=1024)
def _keeping(policy: PruningPolicy, tokens: int, kept: int) -> PruningPolicy:
    if policy.kept(tokens, 1, 0) == kept:
        return policy
    other = policy.at(kept / tokens)
    found = other.kept(tokens, 1, 0)
    check(found == kept, ASKED, f"a count that {policy!r} can keep of an image's {tokens} tokens", kept)
    return other
