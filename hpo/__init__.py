"""Which learning rate should I train this network with? Optuna studies of PyTorch vision networks.

Importing this loads neither torch nor Optuna: each public name is loaded when it is first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from hpo._version import __version__ as __version__

if TYPE_CHECKING:
    from hpo.analysis.answer import Best as Best
    from hpo.analysis.comparison import Comparison as Comparison
    from hpo.api.exporting import export as export
    from hpo.api.exporting import report as report
    from hpo.api.reading import Result as Result
    from hpo.api.reading import best as best
    from hpo.api.reading import compare as compare
    from hpo.api.reading import status as status
    from hpo.api.reading import studies as studies
    from hpo.api.reading import trials as trials
    from hpo.api.running import join as join
    from hpo.api.running import resume as resume
    from hpo.api.running import run as run
    from hpo.api.running import stop as stop
    from hpo.api.running import submit as submit
    from hpo.api.trained_weights import load_model as load_model
    from hpo.config.study_spec import StudySpec as StudySpec
    from hpo.errors import StudyStopped as StudyStopped
    from hpo.errors import UserError as UserError
    from hpo.lr_range.resolve import range_test as range_test
    from hpo.objective import Trial as Trial
    from hpo.study.records import TrialRecord as TrialRecord
    from hpo.workers.executors import InProcess as InProcess
    from hpo.workers.executors import Local as Local
    from hpo.workers.executors import Ray as Ray

_MODULES = {
    "Best": "hpo.analysis.answer",
    "Comparison": "hpo.analysis.comparison",
    "InProcess": "hpo.workers.executors",
    "Local": "hpo.workers.executors",
    "Ray": "hpo.workers.executors",
    "Result": "hpo.api.reading",
    "StudySpec": "hpo.config.study_spec",
    "StudyStopped": "hpo.errors",
    "Trial": "hpo.objective",
    "TrialRecord": "hpo.study.records",
    "UserError": "hpo.errors",
    "best": "hpo.api.reading",
    "compare": "hpo.api.reading",
    "export": "hpo.api.exporting",
    "join": "hpo.api.running",
    "load_model": "hpo.api.trained_weights",
    "range_test": "hpo.lr_range.resolve",
    "report": "hpo.api.exporting",
    "resume": "hpo.api.running",
    "run": "hpo.api.running",
    "status": "hpo.api.reading",
    "stop": "hpo.api.running",
    "studies": "hpo.api.reading",
    "submit": "hpo.api.running",
    "trials": "hpo.api.reading",
}

__all__ = sorted(_MODULES)  # noqa: PLE0605


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'hpo' has no attribute {name!r}")
    return getattr(import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
