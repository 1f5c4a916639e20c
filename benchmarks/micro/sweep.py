"""The loop of the microbenchmarks: every case at every setting by every provider, gated, timed, one row each."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch

from .cases import CASES, Case
from .ceilings import Ceilings
from .clock import measure
from .gate import FAILURES, failed
from .inputs import Inputs
from .providers import Provider
from .restart import DeviceLostError, Journal, device_lost
from .rows import Row, refused, result
from .shapes import Setting, Shape


@dataclass(frozen=True)
class Sweep:
    """What is measured.

    Attributes:
        device: where.
        shapes: prompts.
        dtypes: of the operands; cases that are float32 only run once.
        rows: scoring rows; cases that do not score run once.
        modes: of ``clock.measure``.
        seconds: per provider and mode.
        cases: names, all if empty.
        providers: names, all if empty.
        slow_providers: also torch.compile on a CPU, and on a GPU at more than the first number of rows: it compiles for seconds.
        most_pairs: visual tokens up to which the cases run that compare all pairs of them.
        journal: what it names is not measured again.
    """

    device: torch.device
    shapes: Sequence[Shape]
    dtypes: Sequence[torch.dtype]
    rows: Sequence[int]
    modes: Sequence[str]
    seconds: float
    cases: Sequence[str] = ()
    providers: Sequence[str] = ()
    slow_providers: bool = False
    most_pairs: int = 4096
    journal: Journal = field(default_factory=lambda: Journal(None))

    def settings(self) -> Iterator[tuple[Case, Setting]]:
        """Each case where it says something new."""
        for shape in self.shapes:
            for case in CASES:
                if self.cases and case.name not in self.cases and case.op not in self.cases:
                    continue
                if case.all_pairs and shape.visual > self.most_pairs:
                    continue
                for dtype in self.dtypes[:1] if case.float32_only else self.dtypes:
                    for rows in self.rows if case.scored else self.rows[:1]:
                        yield case, Setting(shape, dtype, rows, self.device)

    def run(self, ceilings: Ceilings) -> Iterator[Row]:
        """Rows as they come. A provider that is wrong, fails, or is out of memory gives a row that says so.

        Raises DeviceLostError behind the row of a provider that lost the device.
        """
        for case, setting in self.settings():
            x = Inputs(setting)
            for provider in case.providers():
                if self.wanted(provider, setting) and self.journal.begin(title(case, x, provider)):
                    yield from self._rows(case, x, provider, ceilings)

    def wanted(self, provider: Provider, setting: Setting) -> bool:
        """Whether this provider is measured at this setting."""
        if self.providers:
            return provider.name in self.providers
        if provider.name != "torch.compile" or self.slow_providers:
            return True
        return self.device.type == "cuda" and setting.rows == self.rows[0]

    def _rows(self, case: Case, x: Inputs, provider: Provider, ceilings: Ceilings) -> Iterator[Row]:
        reason = provider.why_not(x)
        if reason is not None:
            yield refused(case, x, provider.name, reason)
            return
        try:
            case.gate(x, provider.run)
            for mode in self.modes:
                timing = measure(lambda: provider.run(x), self.device, mode, self.seconds)
                yield result(case, x, provider.name, timing, ceilings)
        except torch.OutOfMemoryError:
            yield refused(case, x, provider.name, "out of memory")
        except FAILURES as error:
            yield refused(case, x, provider.name, failed(error))
            if device_lost(error):
                raise DeviceLostError from error


def title(case: Case, x: Inputs, provider: Provider) -> str:
    """How a provider at a setting is named in a line."""
    return f"{case.name}, {x.shape.name}, {x.dtype}, R={x.setting.n_rows}, {provider.name}"
