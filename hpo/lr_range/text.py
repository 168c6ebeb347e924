"""A range test drawn: in a terminal, and as one self-contained HTML file."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from hpo.analysis.range_text import clip_losses

WIDTH, HEIGHT = 64, 10  # characters
BLOCKS = " ▁▂▃▄▅▆▇█"


def ramp_chart(found: Mapping[str, Any]) -> list[str]:
    """The smoothed loss over the learning rate in columns of a terminal, with the range to search underneath.

    `found` is a range test as plain data; columns where the loss was not finite reach to the top.
    """
    lrs, losses = found["lrs"], clip_losses(found["losses"])
    if not losses or lrs[0] >= lrs[-1]:
        return []
    left, right = math.log10(lrs[0]), math.log10(lrs[-1])

    def column(lr: float) -> int:
        return min(WIDTH - 1, max(0, int((math.log10(lr) - left) / (right - left) * WIDTH)))

    heights = [math.nan] * WIDTH
    for lr, loss in zip(lrs, losses, strict=True):
        at = column(lr)
        heights[at] = loss if math.isnan(heights[at]) else max(heights[at], loss)
    for at in range(1, WIDTH):  # a ramp of few steps leaves columns out
        heights[at] = heights[at - 1] if math.isnan(heights[at]) else heights[at]
    low, high = min(losses), max(losses)
    low -= 0.1 * (high - low) or 0.1
    eighths = [round((height - low) / (high - low or 1) * HEIGHT * 8) for height in heights]
    lines = []
    for row in reversed(range(HEIGHT)):
        label = f"{high:8.3g} " if row == HEIGHT - 1 else f"{low:8.3g} " if row == 0 else " " * 9
        lines.append(label + "│" + "".join(BLOCKS[min(8, max(0, eighth - 8 * row))] for eighth in eighths))
    lines.append(" " * 9 + "└" + "─" * WIDTH)
    if found["low"] is not None:
        first, last = column(found["low"]), column(found["high"])
        lines.append(" " * 10 + " " * first + "━" * (last - first + 1))
    ends = f"{lrs[0]:.2g}", f"{lrs[-1]:.2g}"
    lines.append(" " * 10 + ends[0] + ends[1].rjust(WIDTH - len(ends[0])))
    return lines


def range_test_report(found: Mapping[str, Any]) -> list[str]:
    """A range test for a terminal; `found` as `Ramp.as_dict` gives it."""
    from hpo.train.lr_ramp import DIVERGENCE_OVER_LOW, FALL_OVER_LOW, HIGH_OVER_DIVERGENCE, LEAP_CHANGE

    listed = ", ".join(f"{key} {value}" for key, value in found["params"].items())
    lines = [f"with {listed}:"] if listed else []
    lines += ramp_chart(found)
    not_seen = "not seen in this ramp"
    rows = [
        ("the loss starts to fall at", found["falls"]),
        ("it is lowest at", found["lowest"]),
        ("it explodes, or loses half of its fall, at", found["breaks"]),
        (f"steps change {LEAP_CHANGE:.0%} of the weights from", found["leaps"]),
    ]
    lines += [f"{what} {not_seen if lr is None else f'{lr:.2g}'}" for what, lr in rows]
    cost = f"{found['epochs']:.2g} epochs in batches of {found['batch_size']}, {found['seconds']:.1f} s"
    if found["low"] is None:
        return [*lines, f"no learning rate was seen at which the loss stays finite ({cost})"]
    sign = "the first of these signs" if found["breaks"] or found["leaps"] else "where steps are longest"
    lines.append(
        f"search from {found['low']:.2g} to {found['high']:.2g}: from "
        f"{DIVERGENCE_OVER_LOW:g} times below {found['edge']:.2g}, {sign}, or {FALL_OVER_LOW:g} times below the fall, "
        f"to {HIGH_OVER_DIVERGENCE:g} times above ({cost})"
    )
    lines.append(f"lr = {{ low = {found['low']:.2g}, high = {found['high']:.2g}, log = true }}")
    return lines
