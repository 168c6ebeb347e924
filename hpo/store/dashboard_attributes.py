"""The attributes of a study that optuna-dashboard shows as figures and as a note."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

FIGURE_PREFIX, NOTE_PREFIX = "dashboard:plot_data:", "dashboard:note_"  # begin optuna-dashboard's own names
EMPTY_FIGURE = '{"data":[],"layout":{}}'


def changed_attributes(known: Mapping[str, Any], figures: Mapping[str, str | None], *, note: str) -> dict[str, Any]:
    """Return the attributes to set so that these figures (JSON of Plotly by title) and this note are shown.

    `known` are the study's attributes. A figure is kept whole: optuna-dashboard's own functions cut it into pieces of
    2,045 characters for MySQL, a transaction each, which another writer's pieces could come between. Pieces that were
    written so are emptied, because an attribute can be changed but not removed.
    """
    wanted: dict[str, Any] = {f"{NOTE_PREFIX}str:0": note}
    for title, figure in figures.items():
        if figure is not None or f"{FIGURE_PREFIX}{title}:0" in known:
            wanted[f"{FIGURE_PREFIX}{title}:0"] = figure or EMPTY_FIGURE
    prefixes = (f"{NOTE_PREFIX}str:", *(f"{FIGURE_PREFIX}{title}:" for title in figures))
    wanted |= dict.fromkeys((key for key in known if key.startswith(prefixes) and key not in wanted), "")
    changed = {key: value for key, value in wanted.items() if known.get(key) != value}
    if changed:
        changed[f"{NOTE_PREFIX}ver"] = known.get(f"{NOTE_PREFIX}ver", 0) + 1
    return changed
