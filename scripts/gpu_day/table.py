"""The table and the JSON of a GPU day, made of the figures that are there, and what the goals say of them."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scripts.gpu_day.figures import read_figures

Found = Mapping[str, Any]
JSON_FILE = "gpu_day.json"
WIDTH = 40  # characters of the column of keys
LONGEST_VALUE = 300  # characters that the table shows of a value


@dataclass(frozen=True)
class Goal:
    """A goal: a number that follows from the figures, and where it should lie. None: a figure is missing."""

    text: str
    number: Callable[[Found], float | None]
    least: float | None = None
    most: float | None = None

    def verdict(self, figures: Found) -> str:
        """Return "reached", "missed" or "open", with the number that decides."""
        number = self.number(figures)
        if number is None:
            return "open"
        is_reached = (self.least is None or number >= self.least) and (self.most is None or number <= self.most)
        return f"{'reached' if is_reached else 'missed'}: {number:.3g}"


def images_per_s(figures: Found, key: str) -> float | None:
    """Return the rate under a key."""
    value = figures.get(key)
    rate = value.get("images_per_s") if isinstance(value, Mapping) else None
    return rate if isinstance(rate, int | float) else None


def ratio(top: float | None, bottom: float | None) -> float | None:
    """Return a quotient, or None where either is missing."""
    return None if top is None or not bottom else top / bottom


def matrix_share(figures: Found, key: str) -> float | None:
    """Return a rate's FLOP/s as a share of what the matrix product reaches."""
    rate, flops = images_per_s(figures, key), figures.get("facts.flops_per_image")
    return None if rate is None or flops is None else ratio(rate * flops, figures.get("facts.matmul_flops"))


def best_of_processes(figures: Found) -> float | None:
    """Return the highest rate of 2, 4 and 8 processes."""
    rates = [images_per_s(figures, f"processes.{count}") for count in (2, 4, 8)]
    return max((rate for rate in rates if rate is not None), default=None)


def article_s(figures: Found) -> float | None:
    """Return the seconds of the article's study: those of `hpo run` where it was measured, else of its training."""
    for key in ("product.article", "article.captured"):
        value = figures.get(key)
        if isinstance(value, Mapping) and value.get("is_whole"):
            return float(value["total_s"])
    return None


def largest(figures: Found, prefix: str, name: str) -> float | None:
    """Return the largest number called `name` among the figures whose keys begin with `prefix`."""
    found = [value for key, value in figures.items() if key.startswith(prefix) and isinstance(value, Mapping)]
    numbers = [float(value[name]) for value in found if name in value]  # "nan" and "inf" are texts
    return max((math.inf if math.isnan(number) else number for number in numbers), default=None)


def on_gpu(number: Callable[[Found], float | None]) -> Callable[[Found], float | None]:
    """Return the number only where the figures are those of a GPU: the goals are not meant for a CPU."""
    return lambda figures: number(figures) if figures.get("facts.gpu") else None


GOALS = [
    Goal(
        "steps of each engine that wait for the GPU: none",
        on_gpu(lambda figures: largest(figures, "waits.", "num_waiting")),
        most=0,
    ),
    Goal(
        "sixteen captured lanes of one seed: one result, bit for bit",
        on_gpu(lambda figures: largest(figures, "captured.one_seed.", "num_results")),
        most=1,
    ),
    Goal(
        "captured lanes against the plain engine: weights within 1 %",
        on_gpu(lambda figures: largest(figures, "captured.same.", "weights")),
        most=0.01,
    ),
    Goal(
        "trials that move between GPU and CPU, and between engines: weights within 1 %",
        on_gpu(lambda figures: largest(figures, "resume.", "weights")),
        most=0.01,
    ),
    Goal(
        "16 captured lanes: at least 8 times the plain engine",
        on_gpu(lambda figures: ratio(images_per_s(figures, "rates.captured.16"), images_per_s(figures, "rates.plain"))),
        least=8,
    ),
    Goal(
        "16 captured lanes: at least 2 times the best of 2, 4, 8 processes",
        on_gpu(lambda figures: ratio(images_per_s(figures, "rates.captured.16"), best_of_processes(figures))),
        least=2,
    ),
    Goal(
        "16 captured lanes: at least 40 % of the measured bf16 matrix rate",
        on_gpu(lambda figures: matrix_share(figures, "rates.captured.16")),
        least=0.4,
    ),
    Goal("the article's 4 rates x 20 epochs: at most 15 s", on_gpu(article_s), most=15),
]


def write_table(folder: Path) -> str:
    """Write gpu_day.json and return the table, both of the figures that are on disk now."""
    figures = read_figures(folder)
    content = {"goals": {goal.text: goal.verdict(figures) for goal in GOALS}, "figures": figures}
    temporary = folder / f"{JSON_FILE}.new"
    temporary.write_text(json.dumps(content, indent=1) + "\n")
    temporary.replace(folder / JSON_FILE)
    return "\n".join(_lines(figures))


LONGEST_GOAL = max(len(goal.text) for goal in GOALS)


def _lines(figures: Found) -> Iterator[str]:
    yield "=== goals ==="
    for goal in GOALS:
        yield f"{goal.text:<{LONGEST_GOAL}}  {goal.verdict(figures)}"
    yield "=== rates ==="
    rates = [key for key in figures if images_per_s(figures, key) is not None]
    alone = images_per_s(figures, "rates.plain")
    for key in rates:
        times, share = ratio(images_per_s(figures, key), alone), matrix_share(figures, key)
        yield (
            f"{key:<{WIDTH}}{images_per_s(figures, key):>13,.0f} images/s"
            f"{_or_dash(times, '.2f'):>8} x plain{_or_dash(share, '.1%'):>8} of the matrix rate"
        )
    yield "=== errors ==="
    for key, value in figures.items():
        if key.endswith(".error"):
            yield f"{key:<{WIDTH}}{str(value)[-LONGEST_VALUE:]}"
    yield "=== all others ==="
    for key, value in figures.items():
        if key not in rates and not key.endswith((".error", ".wall_s", ".began", ".end")):
            yield f"{key:<{WIDTH}}{str(value)[:LONGEST_VALUE]}"
    for key, value in figures.items():
        if key.endswith(".end"):
            yield f"--- {key}\n{value}"


def _or_dash(number: float | None, form: str) -> str:
    return "-" if number is None else format(number, form)
