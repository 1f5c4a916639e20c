"""What a type checker sees of the package: `make typecheck` fails if a mistake below is no longer an error to mypy."""

import vlmprune
import vlmprune.policies
import vlmprune.testing
from vlmprune import FastV, Stages, policy_from
from vlmprune import Fetaher  # type: ignore[attr-defined]
from vlmprune.policies import RandomDeep, VisionZip

policy: vlmprune.PruningPolicy = Stages([FastV(layer=2, keep=0.5), RandomDeep(20, keep=64)]) | VisionZip()
again: vlmprune.PruningPolicy = policy_from(policy.to_dict())
layers: tuple[int, ...] = FastV(earlier_kv="compact").layers
check = vlmprune.testing.check_policy
select = vlmprune.ops.select_topk

FastV(layr=2)  # type: ignore[call-arg]
FastV(layer="two")  # type: ignore[arg-type]
FastV(rows="all")  # type: ignore[arg-type]
FastV(earlier_kv="less")  # type: ignore[arg-type]
policy_from(3)  # type: ignore[arg-type]
layer: str = FastV().layer  # type: ignore[assignment]
vlmprune.Fetaher  # type: ignore[attr-defined]
vlmprune.policies.Fetaher  # type: ignore[attr-defined]
vlmprune.testing.check_polcy  # type: ignore[attr-defined]
