"""The loop of a user's own that trains a study's trials: a function, or a LightningModule with Lightning's Trainer."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from hpo.config.sections import ObjectiveSpec
from hpo.config.study_spec import StudySpec
from hpo.errors import UserError
from hpo.train.imports import import_loop, import_object

if TYPE_CHECKING:
    from hpo.workers.lightning_loop import LightningLoop


def find_loop(objective: ObjectiveSpec) -> Callable[[Any], Any]:
    """Return what trains a trial when it is called with it. Raises UserError where it cannot be imported."""
    return _lightning_loop(objective) if objective.function is None else import_loop(objective.function)


def try_loop(spec: StudySpec, objective: ObjectiveSpec) -> None:
    """Raise UserError where a loop cannot be imported, or a LightningModule cannot train a batch."""
    if objective.function is None:
        _lightning_loop(objective).try_out(spec)
    else:
        find_loop(objective)


def import_named(objective: ObjectiveSpec) -> dict[str, Callable[..., Any]]:
    """Return the users' code that an objective names, by its setting. Raises UserError as `import_object`."""
    return {setting: import_object(path, setting=setting) for setting, path in objective.code.items()}


def _lightning_loop(objective: ObjectiveSpec) -> LightningLoop:
    needed = "objective.lightning needs Lightning: pip install 'hpo-studies[lightning]'"
    if importlib.util.find_spec("lightning") is None:  # told before torch is loaded, which takes seconds
        raise UserError(needed)
    try:
        from hpo.workers.lightning_loop import LightningLoop
    except ImportError as error:
        raise UserError(f"{needed} ({error})") from None
    return LightningLoop(objective)
