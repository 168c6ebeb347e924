"""The table of loggers, and what `--to` says of one.

A logger's packages are imported where it is opened: each is an extra of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

from hpo.errors import UserError, unknown_name
from hpo.loggers.runs import Run


class Logger(Protocol):
    """A place that runs are written to.

    Whatever is killed, and however often the same runs are given, each of them is there once, as it was given last.
    """

    def write(self, runs: Sequence[Run]) -> int:
        """Write what is not there yet of some runs of one study; return how many were new or have changed."""


def open_logger(to: str) -> Logger:
    """Return the logger that a text such as `tensorboard=runs` names, by its kind and its target.

    Raises UserError where there is none of this kind, or its packages are not installed.
    """
    kind, _, target = to.partition("=")
    if kind not in LOGGERS:
        raise unknown_name("--to", kind, LOGGERS)
    try:
        return LOGGERS[kind](target)
    except ModuleNotFoundError as error:
        raise UserError(f"--to {kind} needs the package {error.name}: pip install 'hpo-studies[{kind}]'") from None


def _open_tensorboard(target: str) -> Logger:
    from hpo.loggers.tensorboard import TensorBoardLogger

    return TensorBoardLogger(target)


def _open_mlflow(target: str) -> Logger:
    from hpo.loggers.mlflow import MLflowLogger

    return MLflowLogger(target)


def _open_wandb(target: str) -> Logger:
    from hpo.loggers.wandb import WandbLogger

    return WandbLogger(target)


LOGGERS: Mapping[str, Callable[[str], Logger]] = {
    "tensorboard": _open_tensorboard,
    "mlflow": _open_mlflow,
    "wandb": _open_wandb,
}
