"""What a benchmark found: the same for people and as JSON, definitions and machine included."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass, field

from vmcell_tools.bench.machine import Machine, load_1m, this_machine
from vmcell_tools.bench.samples import QUANTILES, Series

TITLES = ("what", "who", "n", "failures", *QUANTILES, "max", "unit")
FAILURES_SHOWN = 3


@dataclass(kw_only=True)
class Ratio:
    """`value` is None where one of its parts has not been measured. `bound` is what it is held
    against, a sentence or ""."""

    what: str
    value: float | None
    bound: str = ""


@dataclass(kw_only=True)
class Report:
    """One run of `vmcell bench <name>`; `notes` say what was left out, and why."""

    name: str
    machine: Machine = field(default_factory=this_machine)
    series: list[Series] = field(default_factory=list)
    ratios: list[Ratio] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    load_1m_after: float = 0.0

    def add(self, what: str, who: str, meaning: str, unit: str = "ms") -> Series:
        """A new series of this report."""
        made = Series(what=what, who=who, meaning=meaning, unit=unit)
        self.series.append(made)
        return made

    def compare(self, what: str, part: Series, whole: Series, bound: str = "") -> None:
        """The ratio of two medians."""
        value = part.p50 / whole.p50 if part.p50 is not None and whole.p50 else None
        self.ratios.append(Ratio(what=what, value=value, bound=bound))

    def finish(self) -> Report:
        """Notes the load at the end; the report itself."""
        self.load_1m_after = load_1m()
        return self

    def rows(self) -> list[tuple[str, ...]]:
        """The table under TITLES."""
        return [_row(series) for series in self.series]

    def lines(self) -> list[str]:
        """What stands below the table."""
        machine = self.machine
        lines = [f"{what}: {meaning}" for what, meaning in self._meanings().items()]
        lines += [_ratio_line(ratio) for ratio in self.ratios]
        for series in self.series:
            counted = Counter(series.failures).most_common(FAILURES_SHOWN)
            lines += [f"failed, {series.who} {series.what}: {n} × {text}" for text, n in counted]
        lines += self.notes
        lines.append(
            f"machine: Linux {machine.kernel}, {machine.cpus} × {machine.cpu}, "
            f"{machine.memory_mib} MiB, Python {machine.python}"
        )
        lines.append(f"lane: {machine.lane}; /dev/kvm: {machine.kvm}; clock: {machine.clock}")
        lines.append(f"load: {machine.load_1m:.2f} before, {self.load_1m_after:.2f} after")
        return lines

    def json(self) -> dict[str, object]:
        """Everything, each value of each series too."""
        series = [{**asdict(row), **numbers(row)} for row in self.series]
        return {**asdict(self), "series": series}

    def _meanings(self) -> dict[str, str]:
        return {series.what: series.meaning for series in reversed(self.series)}


def numbers(series: Series) -> dict[str, float | int | None]:
    """n, failures' number, quantiles and the largest."""
    found: dict[str, float | int | None] = {
        "n": len(series.values),
        "failure_count": len(series.failures),
    }
    found |= {name: series.quantile(share) for name, share in QUANTILES.items()}
    return {**found, "max": series.largest}


def _row(series: Series) -> tuple[str, ...]:
    n, failures, *rest = numbers(series).values()
    cells = ["–" if value is None else f"{value:.2f}" for value in rest]
    return (series.what, series.who, str(n), str(failures), *cells, series.unit)


def _ratio_line(ratio: Ratio) -> str:
    value = "not measured" if ratio.value is None else f"{ratio.value:.2f}"
    return f"ratio, {ratio.what}: {value}" + (f" ({ratio.bound})" if ratio.bound else "")
