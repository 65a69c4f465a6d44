"""Curves of a few series over rounds or along a line: as text for a terminal, as a PNG by matplotlib."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from crdtmerge.errors import OutputError, UsageError

MARKS = "o*x+#@"


@dataclass(frozen=True)
class Panel:
    """Curves in one frame: values of each series at common positions."""

    title: str
    across: str
    positions: Sequence[float]
    series: Mapping[str, Sequence[float]]


def text(panel: Panel, *, width: int = 60, height: int = 12) -> str:
    """A frame of characters, a mark for each series; where two meet, the first one's is seen.

    >>> print(text(Panel("accuracy", "round", [0, 1, 2], {"a": [0, 1, 2], "b": [0, 0, 0]}), width=9, height=3))
    accuracy
     2.0 |        o
     1.0 |    o
     0.0 |o   *   *
         +---------
          round 0 to 2: o a, * b
    """
    values = [value for one in panel.series.values() for value in one]
    low, high = min(values), max(values)
    step, reach = (high - low) / (height - 1) or 1.0, (panel.positions[-1] - panel.positions[0]) or 1.0
    digits = max(0, 1 - math.floor(math.log10(step * (height - 1))))
    rows = [[" "] * width for _ in range(height)]
    for mark, one in reversed(list(zip(MARKS, panel.series.values(), strict=False))):
        for position, value in zip(panel.positions, one, strict=True):
            column = round((position - panel.positions[0]) / reach * (width - 1))
            rows[height - 1 - round((value - low) / step)][column] = mark
    labels = [f"{high - i * step:.{digits}f}" for i in range(height)]
    margin = max(map(len, labels)) + 1
    lines = [f"{label:>{margin}} |{''.join(row)}".rstrip() for label, row in zip(labels, rows, strict=True)]
    legend = ", ".join(f"{mark} {name}" for mark, name in zip(MARKS, panel.series, strict=False))
    span = f"{panel.across} {panel.positions[0]:g} to {panel.positions[-1]:g}"
    return "\n".join([panel.title, *lines, f"{'':>{margin}} +{'-' * width}", f"{'':>{margin}}  {span}: {legend}"])


def png(path: Path, panels: Sequence[Panel]) -> None:
    """Panels side by side. Raises UsageError without matplotlib, OutputError where nothing can be written."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UsageError("a plot needs matplotlib: pip install 'crdtmerge[demo]'.") from None
    figure = Figure(figsize=(6.0 * len(panels), 4.5), layout="constrained")
    for at, panel in enumerate(panels):
        axes = figure.add_subplot(1, len(panels), at + 1)
        for name, values in panel.series.items():
            axes.plot(panel.positions, values, marker="o", markersize=3, label=name)
        axes.set(title=panel.title, xlabel=panel.across)
        axes.grid(alpha=0.3)
        axes.legend()
    try:
        figure.savefig(path, format="png")
    except OSError as fault:
        raise OutputError(f"{path}: cannot be written: {fault.strerror or fault}.") from fault
