"""Weights & Biases: a group for each study, and in it a W&B run for each run that has ended.

W&B keeps no two values of a step, and a run that is offline has no server to ask what is there. So a run is written
once it has ended, whole, and a file beside W&B's own says which ones are. On a server a run that was written in part
is resumed after its last step; what is offline is written anew.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path

import wandb

from hpo.loggers.runs import Run
from hpo.study.records import ENDED
from hpo.system.files import replace_file

MARK = "recommended"  # the tag of the runs of the recommended values


class WandbLogger:
    """A project, `PROJECT` or `ENTITY/PROJECT`; by default what WANDB_PROJECT names."""

    def __init__(self, target: str) -> None:
        self._entity, _, self._project = target.rpartition("/")
        settings = wandb.setup().settings
        self._folder = Path(settings.wandb_dir)
        self._where = "/".join(filter(None, [settings.mode, target]))  # what is offline is nowhere else

    def write(self, runs: Sequence[Run]) -> int:
        """Write what is not there yet of some runs that have ended; see `Logger`."""
        num_new = 0
        for run in runs:
            path = self._folder / "hpo" / f"{run.study_id}.json"
            digests = json.loads(path.read_text()) if path.exists() else {}
            key = f"{self._where}/{run.name}"
            if run.state in ENDED and digests.get(key) != run.digest:
                self._write(run)
                path.parent.mkdir(exist_ok=True)
                replace_file(path, json.dumps({**digests, key: run.digest}, indent=1).encode())
                num_new += 1
        return num_new

    def _write(self, run: Run) -> None:
        for earlier in self._folder.glob(f"offline-run-*_*-{run.run_id}"):
            shutil.rmtree(earlier)
        settings = wandb.Settings(  # what it would find out about this process is nothing about the trial
            console="off",
            silent=True,
            disable_code=True,
            disable_git=True,
            x_disable_machine_info=True,
            x_disable_stats=True,
            x_save_requirements=False,
        )
        there = wandb.init(
            entity=self._entity or None,
            project=self._project or None,
            id=run.run_id,
            name=run.name,
            group=run.study,
            job_type=run.kind,
            config=dict(run.params),
            notes=run.text,
            tags=[MARK] if run.is_recommended else [],
            resume="allow",
            reinit="finish_previous",
            settings=settings,
        )
        for epoch, points in groupby(run.points, key=lambda point: point.epoch):
            if epoch >= there.step:
                there.log({point.metric: point.value for point in points}, step=epoch)
        there.summary.update({**run.tags, MARK: run.is_recommended})
        there.finish(exit_code=int(run.state == "failed"))
