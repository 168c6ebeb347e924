"""The line on which values are compared: equal steps of it mean about the same everywhere, and it has no ends."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, np.dtype[np.float64]]

MARGIN = 0.01  # past 0 and 1, so that these are not infinitely far away
WORST = 3.0  # a value counts as no worse than this many times as far below the median as the best is above it


@dataclass(frozen=True)
class Scale:
    """How values, of which the higher ones are better, become numbers on the line, and back.

    Attributes:
        kind: "share" of values between 0 and 1 (an accuracy): the log of the odds. "cost" of values below 0 (a loss
            with its sign changed): minus the log of their size. "any": the values as they are.
        size: What values are divided by first.
    """

    kind: str
    size: float

    def to_line(self, values: Any) -> Array:
        """Return the numbers on the line of values."""
        import numpy as np

        values = np.asarray(values, dtype=float) / self.size
        if self.kind == "share":
            line: Array = np.log((values + MARGIN) / (1 + MARGIN - values))
        else:
            line = -np.log(-values) if self.kind == "cost" else values
        return line

    def from_line(self, line: Any) -> Array:
        """Return the values of numbers on the line."""
        import numpy as np
        from scipy.special import expit

        if self.kind == "share":
            values: Array = np.clip((1 + 2 * MARGIN) * expit(line) - MARGIN, 0, 1)
        else:
            values = -np.exp(-np.asarray(line)) if self.kind == "cost" else np.asarray(line)
        return values * self.size

    def clip_worst(self, line: Array) -> Array:
        """Return numbers on the line without the worst ones: a loss may be of any size, and would hide the others."""
        import numpy as np

        if self.kind == "share":
            return line
        clipped: Array = np.maximum(line, (1 + WORST) * np.median(line) - WORST * line.max())
        return clipped


def choose_scale(values: Any, *, is_share: bool) -> Scale:
    """Return the scale of finite values; `is_share` says that they are meant to lie between 0 and 1."""
    import numpy as np

    values = np.asarray(values, dtype=float)
    if is_share and values.min() >= 0 and values.max() <= 1:
        return Scale("share", 1.0)
    # Squares of very large values would be infinite.
    return Scale("cost" if values.max() < 0 else "any", float(np.abs(values).max()) or 1.0)
