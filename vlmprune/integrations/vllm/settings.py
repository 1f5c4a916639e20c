"""What a served model is pruned by: read from its configuration, refused where vLLM cannot do it, counted ahead."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

from vlmprune.errors import check
from vlmprune.integrations.vllm import ARCHITECTURES
from vlmprune.models.host.families import FAMILIES
from vlmprune.policies import PruningPolicy, policy_from
from vlmprune.policies.checks import check_keep
from vlmprune.policies.counts import keep_count

OVERRIDE = "vlmprune"
"""What the configuration calls the policy: a dict as ``policy_from`` reads it, and perhaps ``max_keep``."""

ASKED = "vlmprune_keep"
"""What a request's ``mm_processor_kwargs`` call its own budget: tokens per image, or a share."""

KEPT = "vlmprune_kept"
"""The field of an image's data that says how many of its tokens stay."""


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
            check_keep(self.max_keep, "max_keep")

    @classmethod
    def of(cls, config: Any) -> Settings:
        """Those of a configuration, ``config.vlmprune``. Raises InputError where it has none, or of an unknown family."""
        family = config.model_type
        known = ", ".join(ARCHITECTURES)
        check(family in ARCHITECTURES, "architectures", f"one whose checkpoint is of {known}", repr(family))
        given = vars(config).get(OVERRIDE)
        named = isinstance(given, dict) and "policy" in given
        check(named, "hf_overrides", f"{OVERRIDE!r}: a dict with a policy's name under 'policy'", repr(given))
        assert given is not None
        settings = dict(given)
        most = settings.pop("max_keep", None)
        return cls(_placed(settings, FAMILIES[family].packs), most)

    def default(self, tokens: int) -> int:
        """How many of an image's tokens stay where a request asks for nothing."""
        return self.policy.kept(tokens, 1, 0)

    def most(self, tokens: int) -> int:
        """How many of them may stay."""
        usual = self.default(tokens)
        return usual if self.max_keep is None else max(usual, keep_count(self.max_keep, tokens))

    def kept(self, tokens: int, asked: object = None) -> int:
        """How many stay of an image for which a request asked ``vlmprune_keep``; None = it did not.

        Raises:
            InputError: no budget, or one above what is allowed.
        """
        if asked is None:
            return self.default(tokens)
        check_keep(asked, ASKED)
        assert isinstance(asked, int | float)
        wanted, most = asked if isinstance(asked, int) else keep_count(asked, tokens), self.most(tokens)
        check(wanted <= most, ASKED, f"at most {most} of this image's {tokens} tokens", repr(asked))
        return int(wanted)

    def policy_for(self, tokens: int, kept: int) -> PruningPolicy:
        """The policy, keeping so many of an image's tokens."""
        return _keeping(self.policy, tokens, kept)


def check_image_only(policy: PruningPolicy) -> None:
    """Raise InputError unless a policy chooses before the language model, by the image alone, as many as it says."""
    name = type(policy).__name__
    inside = (
        "a stage before the language model, at layer 0 (in vLLM all layers share one length of a sequence)"
    )
    check(policy.layers == (0,), name, inside, f"stages at {', '.join(map(str, policy.layers))}")
    needs = policy.needs(0)
    by_image = "a choice by the image alone (vLLM caches images and prefixes by the image)"
    check(not (needs.reads_text or needs.tokens), name, by_image, "one that reads the prompt")
    check(needs.attention is None, name, by_image, "one by the language model's attention")
    check(not policy.inserts, name, by_image, "one that writes into the prompt")
    check(not policy.rectify, "rectify", "False (vLLM's attention takes no weights)", policy.rectify)
    ahead = "counts that are known before the image is encoded (the scheduler reserves them)"
    check(policy.fixed_count, name, ahead, "as many as it finds")


def _placed(settings: dict[str, Any], packs: bool) -> PruningPolicy:
    """The policy, with the positions that this family's tokens have in vLLM: packed, or where they were."""
    policy = policy_from(settings)
    if "positions" not in policy.__dataclass_fields__:
        return policy
    here = "pack" if packs else "keep"
    why = "positions of one dimension are counted" if packs else "its positions have three dimensions"
    asked = settings.get("positions", here)
    check(asked == here, "positions", f"{here!r} with this model in vLLM ({why})", repr(asked))
    return replace(policy, positions=here)  # type: ignore[call-arg]


@lru_cache(maxsize=1024)
def _keeping(policy: PruningPolicy, tokens: int, kept: int) -> PruningPolicy:
    if policy.kept(tokens, 1, 0) == kept:
        return policy
    other = policy.at(kept / tokens)
    found = other.kept(tokens, 1, 0)
    check(found == kept, ASKED, f"a count that {policy!r} can keep of {tokens}", kept)
    return other
