"""What the answers to a task cost, so that no score stands without it: visual tokens, FLOPs, prefill time."""

from __future__ import annotations

from dataclasses import dataclass

from vlmprune.models import Report


@dataclass
class Cost:
    """Sums over the requests of one task that this process answered."""

    requests: int = 0
    visual: float = 0.0
    mean: float = 0.0
    last: float = 0.0
    resident: float = 0.0
    prefill: float = 0.0
    full: int = 0
    pruned: int = 0

    def add(self, report: Report, requests: int) -> None:
        """Count a batch of ``requests``."""
        self.requests += requests
        self.visual += requests * report.visual_tokens
        self.mean += requests * report.tokens.mean_per_layer
        self.last += requests * report.tokens.after_last_stage
        self.resident += requests * report.tokens.resident_kv
        self.prefill += report.seconds.prefill
        self.full += report.flops.full
        self.pruned += report.flops.pruned

    def means(self, task: str) -> dict[str, float]:
        """Means per request, and the share of the decoder's prefill FLOPs saved (padding included), by name."""
        values = {
            "requests": float(self.requests),
            "visual_tokens": self.visual / self.requests,
            "visual_tokens_mean_over_layers": self.mean / self.requests,
            "visual_tokens_after_last_stage": self.last / self.requests,
            "visual_tokens_in_kv_cache": self.resident / self.requests,
            "flops_cut": 1 - self.pruned / self.full,
            "prefill_ms": self.prefill / self.requests * 1000,
        }
        return {f"{task}/{name}": value for name, value in values.items()}
