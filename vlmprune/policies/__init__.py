"""Pruning methods: tensors in, kept positions out. One short file each; ``registry`` knows their names."""

from vlmprune.policies.base import AttentionInputs, Grid, Needs, PruningPolicy, TokenContext
from vlmprune.policies.compose import Stages, Union
from vlmprune.policies.custom import Custom
from vlmprune.policies.fastv import FastV
from vlmprune.policies.feather import Feather
from vlmprune.policies.random import Random
from vlmprune.policies.registry import fields_of, list_policies, parse_policy, policies, policy_class
from vlmprune.policies.uniform import Uniform

__all__ = [
    "AttentionInputs",
    "Custom",
    "FastV",
    "Feather",
    "Grid",
    "Needs",
    "PruningPolicy",
    "Random",
    "Stages",
    "TokenContext",
    "Uniform",
    "Union",
    "fields_of",
    "list_policies",
    "parse_policy",
    "policies",
    "policy_class",
]
