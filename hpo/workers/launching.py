"""The launcher that an executor describes."""

from __future__ import annotations

from hpo.config.study_spec import StudySpec
from hpo.errors import UserError
from hpo.store.urls import parse_url
from hpo.train.imports import ImportAllowlist
from hpo.workers.executors import Executor, InProcess, Local, Ray
from hpo.workers.launcher import Launcher
from hpo.workers.local import InProcessLauncher, LocalLauncher


def make_launcher(executor: Executor, spec: StudySpec, allowed: ImportAllowlist, *, url: str) -> Launcher:
    """Return what runs the workers of this study of the store at `url`.

    Raises:
        UserError: The executor asks for devices, or a kind of store, that it cannot have; or it is no executor. Or the
            study has functions that its workers could not import.
    """
    if allowed.objects and not isinstance(executor, InProcess):
        setting = spec.names_of_code()[next(iter(allowed.objects))]
        raise UserError(
            f"{setting} is a function that worker processes cannot import (a lambda, or one of a notebook, of the "
            "running script or of another function): put it into a module of its own, or train in this process, with "
            "executor=hpo.InProcess()"
        )
    if spec.engine.devices_per_trial > 1 and not isinstance(executor, Local):
        raise UserError(
            f"engine.devices_per_trial = {spec.engine.devices_per_trial} needs worker processes of this machine: "
            "hpo run without --in-process and --on, or executor=hpo.Local()"
        )
    match executor:
        case Local():
            return LocalLauncher(executor, spec, allowed=allowed, url=parse_url(url))
        case InProcess():
            return InProcessLauncher(executor, spec)
        case Ray():
            from hpo.workers.ray_cluster import RayLauncher

            return RayLauncher(executor, spec, allowed=allowed, url=parse_url(url))
    raise UserError(f"executor must be an hpo.Local(), hpo.InProcess() or hpo.Ray(), got {executor!r}")
