"""Which learning rate should I train this network with? Optuna studies of PyTorch vision networks.

Importing this loads neither torch nor Optuna; what is named here is loaded when it is first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hpo.analysis import Best as Best
    from hpo.api import Result as Result
    from hpo.api import best as best
    from hpo.api import export as export
    from hpo.api import join as join
    from hpo.api import resume as resume
    from hpo.api import run as run
    from hpo.api import status as status
    from hpo.api import stop as stop
    from hpo.api import studies as studies
    from hpo.api import submit as submit
    from hpo.api import trials as trials
    from hpo.errors import StudyStopped as StudyStopped
    from hpo.errors import UserError as UserError
    from hpo.objective import Trial as Trial
    from hpo.on_ray import OnRay as OnRay
    from hpo.ranges import range_test as range_test
    from hpo.spec import StudySpec as StudySpec

__version__ = "0.1.0"

_MODULES = {
    "Best": "hpo.analysis",
    "OnRay": "hpo.on_ray",
    "Result": "hpo.api",
    "StudySpec": "hpo.spec",
    "StudyStopped": "hpo.errors",
    "Trial": "hpo.objective",
    "UserError": "hpo.errors",
    "best": "hpo.api",
    "export": "hpo.api",
    "join": "hpo.api",
    "range_test": "hpo.ranges",
    "resume": "hpo.api",
    "run": "hpo.api",
    "status": "hpo.api",
    "stop": "hpo.api",
    "studies": "hpo.api",
    "submit": "hpo.api",
    "trials": "hpo.api",
}

__all__ = sorted(_MODULES)  # noqa: PLE0605


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'hpo' has no attribute {name!r}")
    return getattr(import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
