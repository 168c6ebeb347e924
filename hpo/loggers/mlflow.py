"""MLflow: an experiment for each study's name, and in it an MLflow run for each run, found again by its tag."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from typing import Any

from mlflow.entities import Metric, Param, RunTag
from mlflow.tracking import MlflowClient

from hpo.errors import UserError
from hpo.loggers.runs import Run
from hpo.store.urls import may_hold_secret

RUN, STUDY, DIGEST = "hpo.run", "hpo.study", "hpo.digest"  # tags: `Run.run_id`, its study's, and what is written of it
MAX_METRICS = 1000  # in a batch, as MLflow's servers take them
STATUSES = {"waiting": "SCHEDULED", "running": "RUNNING", "pruned": "KILLED", "failed": "FAILED"}  # others: FINISHED


class MLflowLogger:
    """An MLflow tracking server, database or folder; by default what MLFLOW_TRACKING_URI names."""

    def __init__(self, target: str) -> None:
        if may_hold_secret(target):
            raise UserError(
                "--to mlflow=URI must not hold a password, which others could read in the list of processes; set "
                "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or give the URI in MLFLOW_TRACKING_URI"
            )
        logging.getLogger("mlflow").setLevel(logging.WARNING)  # it tells of each table that it makes
        logging.getLogger("alembic").setLevel(logging.WARNING)
        self._client = MlflowClient(target or None)

    def write(self, runs: Sequence[Run]) -> int:
        """Write what is not there yet of some runs; see `Logger`."""
        if not runs:
            return 0
        experiment = self._client.get_experiment_by_name(runs[0].study)
        experiment_id = experiment.experiment_id if experiment else self._client.create_experiment(runs[0].study)
        known = {there.data.tags[RUN]: there for there in self._find(experiment_id, runs[0].study_id)}
        is_known = [run.run_id in known and known[run.run_id].data.tags.get(DIGEST) == run.digest for run in runs]
        new = [run for run, known_already in zip(runs, is_known, strict=True) if not known_already]
        for run in new:
            self._write(run, known.get(run.run_id), experiment_id)
        return len(new)

    def _find(self, experiment_id: str, study_id: str) -> Iterator[Any]:
        """Yield the runs of a study that are there."""
        token = None
        while True:
            page = self._client.search_runs([experiment_id], f"tags.`{STUDY}` = '{study_id}'", page_token=token)
            yield from page
            token = page.token
            if not token:
                return

    def _write(self, run: Run, there: Any | None, experiment_id: str) -> None:
        """Bring a run up to date; its digest is written last, and so vouches for the rest."""
        params = {key: str(value) for key, value in run.params.items()}
        points = {(point.metric, point.epoch, point.value) for point in run.points}
        known = set() if there is None else self._points(there)
        if there is not None and not (there.data.params.items() <= params.items() and known <= points):
            self._client.delete_run(there.info.run_id)  # MLflow changes no param and no point
            there, known = None, set()
        if there is None:
            tags = {RUN: run.run_id, STUDY: run.study_id}
            began_ms = int(1000 * run.began)
            there = self._client.create_run(experiment_id, start_time=began_ms, tags=tags, run_name=run.name)
        name = there.info.run_id
        metrics = [
            Metric(point.metric, point.value, int(1000 * point.time), point.epoch)
            for point in run.points
            if (point.metric, point.epoch, point.value) not in known
        ]
        for start in range(0, len(metrics), MAX_METRICS):
            self._client.log_batch(name, metrics=metrics[start : start + MAX_METRICS])
        tags = {**run.tags, "recommended": str(run.is_recommended).lower(), "mlflow.note.content": run.text}
        self._client.log_batch(
            name,
            params=[Param(key, value) for key, value in params.items()],
            tags=[RunTag(key, value) for key, value in tags.items()],
        )
        status = STATUSES.get(run.state, "FINISHED")
        if run.ended is None:
            self._client.update_run(name, status)
        else:
            self._client.set_terminated(name, status, int(1000 * run.ended))
        self._client.set_tag(name, DIGEST, run.digest)

    def _points(self, there: Any) -> set[tuple[str, int, float]]:
        histories = (self._client.get_metric_history(there.info.run_id, key) for key in there.data.metrics)
        return {(metric.key, metric.step, metric.value) for history in histories for metric in history}
