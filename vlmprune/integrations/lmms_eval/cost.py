"""What the answers to a task cost, so that no score stands without it: visual tokens, FLOPs, prefill time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from vlmprune.models import Report


@dataclass
class Cost:
    """The batches of one task that this process answered: a report and a number of requests each."""

    batches: list[tuple[Report, int]] = field(default_factory=list)

    def add(self, report: Report, requests: int) -> None:
        """Count a batch of ``requests``."""
        self.batches.append((report, requests))

    def means(self, task: str) -> dict[str, float]:
        """Means per request, and the share of the decoder's prefill FLOPs saved (padding included), by name."""
        reports, requests = [report for report, _ in self.batches], sum(n for _, n in self.batches)

        def mean(tokens: Callable[[Report], float]) -> float:
            return sum(n * tokens(report) for report, n in self.batches) / requests

        values = {
            "requests": float(requests),
            "visual_tokens": mean(lambda report: report.visual_tokens),
            "visual_tokens_mean_over_layers": mean(lambda report: report.tokens.mean_per_layer),
            "visual_tokens_after_last_stage": mean(lambda report: report.tokens.after_last_stage),
            "visual_tokens_in_kv_cache": mean(lambda report: report.tokens.resident_kv),
            "flops_cut": 1 - sum(r.flops.pruned for r in reports) / sum(r.flops.full for r in reports),
            "prefill_ms": sum(r.seconds.prefill for r in reports) / requests * 1000,
        }
        return {f"{task}/{name}": value for name, value in values.items()}
