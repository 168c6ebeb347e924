"""A range test as text: its ramp drawn with characters, its signs, and the range to search."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from hpo.analysis.range_text import clip_losses

CHART_WIDTH, CHART_HEIGHT = 64, 10  # characters
BLOCKS = " ▁▂▃▄▅▆▇█"


def ramp_chart(test: Mapping[str, Any]) -> list[str]:
    """Draw the smoothed loss over the learning rate in columns of a terminal, with the range to search underneath.

    `test` is a range test as plain data. Columns where the loss was not finite reach to the top.
    """
    lrs, losses = test["lrs"], clip_losses(test["losses"])
    if not losses or lrs[0] >= lrs[-1]:
        return []
    left, right = math.log10(lrs[0]), math.log10(lrs[-1])

    def column(lr: float) -> int:
        return min(CHART_WIDTH - 1, max(0, int((math.log10(lr) - left) / (right - left) * CHART_WIDTH)))

    heights = [math.nan] * CHART_WIDTH
    for lr, loss in zip(lrs, losses, strict=True):
        at = column(lr)
        heights[at] = loss if math.isnan(heights[at]) else max(heights[at], loss)
    for at in range(1, CHART_WIDTH):  # a ramp of few steps leaves columns out
        heights[at] = heights[at - 1] if math.isnan(heights[at]) else heights[at]
    low, high = min(losses), max(losses)
    low -= 0.1 * (high - low) or 0.1
    eighths = [round((height - low) / (high - low or 1) * CHART_HEIGHT * 8) for height in heights]
    labels = {CHART_HEIGHT - 1: f"{high:8.3g} ", 0: f"{low:8.3g} "}
    lines = []
    for row in reversed(range(CHART_HEIGHT)):
        label = labels.get(row, " " * 9)
        lines.append(label + "│" + "".join(BLOCKS[min(8, max(0, eighth - 8 * row))] for eighth in eighths))
    lines.append(" " * 9 + "└" + "─" * CHART_WIDTH)
    if test["low"] is not None:
        first, last = column(test["low"]), column(test["high"])
        lines.append(" " * 10 + " " * first + "━" * (last - first + 1))
    ends = f"{lrs[0]:.2g}", f"{lrs[-1]:.2g}"
    lines.append(" " * 10 + ends[0] + ends[1].rjust(CHART_WIDTH - len(ends[0])))
    return lines


def range_test_report(test: Mapping[str, Any]) -> list[str]:
    """Return a range test as lines of a terminal; `test` is the plain data that `Ramp.as_dict` returns."""
    from hpo.train import lr_ramp

    listed = ", ".join(f"{key} {value}" for key, value in test["params"].items())
    lines = [f"with {listed}:"] if listed else []
    lines += ramp_chart(test)
    rows = [
        ("the loss starts to fall at", test["falls"]),
        ("it is lowest at", test["lowest"]),
        ("it explodes, or loses half of its fall, at", test["breaks"]),
    ]
    is_linear = test.get("is_linear")  # the tests that older versions stored do not say
    if is_linear:
        lines.append("only the last layer is trained, which no step destroys: only the loss counts")
    elif test.get("from_zero"):
        lines.append("the weights start near zero, so the size of steps says nothing: only the loss counts")
    else:
        rows.append((f"steps change {lr_ramp.LEAP_CHANGE:.0%} of the weights from", test["leaps"]))
    for what, lr in rows:
        rate = "not seen in this ramp" if lr is None else f"{lr:.2g}"
        lines.append(f"{what} {rate}")
    cost = f"{test['epochs']:.2g} epochs in batches of {test['batch_size']}, {test['seconds']:.1f} s"
    if test["low"] is None:
        return [*lines, f"no learning rate was seen at which the loss stays finite ({cost})"]
    above = lr_ramp.LINEAR_HIGH_OVER_DIVERGENCE if is_linear else lr_ramp.HIGH_OVER_DIVERGENCE
    sign = "the first of these signs" if test["breaks"] or test["leaps"] else "where steps are longest"
    below, below_fall = lr_ramp.DIVERGENCE_OVER_LOW, lr_ramp.FALL_OVER_LOW
    lines.append(
        f"search from {test['low']:.2g} to {test['high']:.2g}: from {below:g} times below {test['edge']:.2g}, {sign}, "
        f"or {below_fall:g} times below the fall, to {above:g} times above ({cost})"
    )
    lines.append(f"lr = {{ low = {test['low']:.2g}, high = {test['high']:.2g}, log = true }}")
    return lines
