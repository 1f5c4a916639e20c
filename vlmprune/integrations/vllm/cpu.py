"""vLLM's worker of the CPU, asking for positions once more as its other workers do."""

from __future__ import annotations

from typing import Any

from vllm.v1.worker.cpu_worker import CPUWorker


class Worker(CPUWorker):
    """Its runner has a ``load_model`` of its own, which forgets to note that a model prunes; even vLLM's own fails there."""

    def load_model(self, **kwargs: Any) -> None:
        """Load as vLLM does, and note it."""
        super().load_model(**kwargs)
        self.model_runner.is_multimodal_pruning_enabled = True
