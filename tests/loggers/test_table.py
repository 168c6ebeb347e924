"""Each logger holds what a study has, by the logger's own reader: whatever was there, and wherever it was killed."""

from __future__ import annotations

import os
import shutil
import signal
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from hpo.errors import UserError
from hpo.loggers.runs import Point, Run
from hpo.loggers.table import LOGGERS, Logger, open_logger
from tests.rows import slow_except

Shown = dict[str, Any]  # of a run: its `params`, its `curves` by metric as {epoch: value}, whether it is `recommended`
TARGETS = {"tensorboard": "tensorboard={}/runs", "mlflow": "mlflow=sqlite:///{}/mlflow.db", "wandb": "wandb=vision"}


def make_run(number: int, *, epochs: int, state: str = "complete", **changes: Any) -> Run:
    points = [
        Point(metric, epoch, size * epoch, 100.0 + epoch)
        for epoch in range(1, epochs + 1)
        for metric, size in (("val_accuracy", 0.125), ("train_loss", 0.5))
    ]
    run = Run(
        study="s",
        study_id="s-1234abcd",
        name=f"trial-{number}",
        kind="search",
        state=state,
        params={"lr": 0.25 / (1 + number), "optimizer": "adam", "eps": 0.5, "beta1": 0.25, "beta2": 0.75, "gamma": 2.0},
        points=points,
        is_recommended=False,
        tags={"state": state},
        began=100.0,
        ended=None if state == "running" else 200.0,
    )
    return replace(run, **changes)


def expected(*runs: Run) -> dict[str, Shown]:
    return {run.name: _shown(run.params, run.points, run.is_recommended) for run in runs}


def _shown(params: Any, points: Any, is_recommended: bool) -> Shown:
    curves: dict[str, dict[int, float]] = {}
    for point in points:
        curves.setdefault(point.metric, {})[point.epoch] = point.value
    return {"params": dict(params), "curves": curves, "recommended": is_recommended}


def read_tensorboard(folder: Path) -> dict[str, Shown]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.plugins.hparams.metadata import (
        PLUGIN_NAME,
        SESSION_START_INFO_TAG,
        parse_session_start_info_plugin_data,
    )

    found = {}
    for path in (folder / "runs" / "s-1234abcd").iterdir():
        events = EventAccumulator(str(path), size_guidance={"scalars": 0}).Reload()
        start = parse_session_start_info_plugin_data(events.PluginTagToContent(PLUGIN_NAME)[SESSION_START_INFO_TAG])
        params = {
            key: value.string_value if value.HasField("string_value") else value.number_value
            for key, value in start.hparams.items()
        }
        curves: dict[str, dict[int, float]] = {}
        for tag in events.Tags()["scalars"]:
            scalars = events.Scalars(tag)
            curves[tag] = {scalar.step: scalar.value for scalar in scalars}
            assert len(curves[tag]) == len(scalars), f"{tag} has an epoch twice"
        marked = bool(curves.pop("recommended", None))
        found[path.name] = {"params": params, "curves": curves, "recommended": marked}
    return found


def read_mlflow(folder: Path) -> dict[str, Shown]:
    from mlflow.tracking import MlflowClient

    client = MlflowClient(f"sqlite:///{folder}/mlflow.db")
    experiment = client.get_experiment_by_name("s")
    found: dict[str, Shown] = {}
    for run in client.search_runs([experiment.experiment_id]):
        curves = {}
        for key in run.data.metrics:
            history = client.get_metric_history(run.info.run_id, key)
            curves[key] = {metric.step: metric.value for metric in history}
            assert len(curves[key]) == len(history), f"{key} has an epoch twice"
        assert run.info.run_name not in found, "a trial is two runs"
        params = {key: value if key == "optimizer" else float(value) for key, value in run.data.params.items()}
        marked = run.data.tags["recommended"] == "true"
        found[run.info.run_name] = {"params": params, "curves": curves, "recommended": marked}
    return found


def read_wandb(folder: Path) -> dict[str, Shown]:
    """Read the records of runs that are offline; those of a server would be read with `wandb.Api`."""
    import json

    from wandb.proto.wandb_internal_pb2 import Record

    found: dict[str, Shown] = {}
    for path in folder.glob("wandb/offline-run-*/*.wandb"):
        run: Any = None
        curves: dict[str, dict[int, float]] = {}
        for content in _leveldb_records(path.read_bytes()[7:]):
            record = Record.FromString(content)
            if record.WhichOneof("record_type") == "run":
                run = record.run
            elif record.WhichOneof("record_type") == "history":
                items = {item.key or item.nested_key[0]: json.loads(item.value_json) for item in record.history.item}
                for key, value in items.items():
                    if not key.startswith("_"):
                        curves.setdefault(key, {})[int(items["_step"])] = value
        params = {item.key: json.loads(item.value_json) for item in run.config.update if not item.key.startswith("_")}
        assert run.display_name not in found, "a trial is two runs"
        assert (run.run_group, run.project) == ("s", "vision")
        found[run.display_name] = {"params": params, "curves": curves, "recommended": "recommended" in run.tags}
    return found


def _leveldb_records(content: bytes) -> Iterator[bytes]:
    """Yield the records of a LevelDB log: blocks of 32 KiB with chunks of (checksum, length, type)."""
    begun, at = b"", 0
    header = 7  # W&B's own, at the start of the first block
    while at + 7 <= len(content):
        left = 32768 - (at + header) % 32768
        if left < 7:
            at += left
            continue
        _, length, kind = struct.unpack("<IHB", content[at : at + 7])
        begun += content[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield begun
            begun = b""


@dataclass(frozen=True)
class Backend:
    """A logger in the test's folder, and its reader."""

    kind: str
    folder: Path
    read: Callable[[Path], dict[str, Shown]]

    @property
    def to(self) -> str:
        return TARGETS[self.kind].format(self.folder)

    def open(self) -> Logger:
        return open_logger(self.to)

    def shown(self) -> dict[str, Shown]:
        return self.read(self.folder)


READERS = {"tensorboard": read_tensorboard, "mlflow": read_mlflow, "wandb": read_wandb}
QUIET = {"MLFLOW_DISABLE_TELEMETRY": "true", "WANDB_MODE": "offline", "WANDB_ERROR_REPORTING": "false"}


@pytest.fixture(scope="module")
def empty_mlflow(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a database of MLflow's without a run: its 40 tables take five seconds to make."""
    folder = tmp_path_factory.mktemp("mlflow")
    open_logger(TARGETS["mlflow"].format(folder)).write([make_run(0, epochs=1, study="other")])
    return folder / "mlflow.db"


@pytest.fixture(params=slow_except(LOGGERS, "tensorboard", "wandb"))  # MLflow's database takes ten seconds
def backend(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Backend:
    pytest.importorskip(request.param)
    for name, value in {**QUIET, "WANDB_DIR": str(tmp_path)}.items():
        monkeypatch.setenv(name, value)
    if request.param == "wandb":
        import wandb

        wandb.teardown()  # it reads the environment once
    if request.param == "mlflow":
        shutil.copyfile(request.getfixturevalue("empty_mlflow"), tmp_path / "mlflow.db")
    monkeypatch.chdir(tmp_path)
    return Backend(request.param, tmp_path, READERS[request.param])


def test_what_is_written_is_there_once_and_follows_the_study(backend: Backend) -> None:
    first = [make_run(0, epochs=3), make_run(1, epochs=5, state="pruned", is_recommended=True)]
    assert backend.open().write(first) == 2
    assert backend.shown() == expected(*first)
    assert backend.open().write(first) == 0
    # Of the first trial an epoch was trained again, a third has ended, and the mark has moved.
    changed = [
        replace(first[0], points=[*first[0].points[:4], Point("val_accuracy", 3, 0.75, 103.0)], is_recommended=True),
        replace(first[1], is_recommended=False),
        make_run(2, epochs=2, state="failed"),
    ]
    logger = backend.open()
    assert logger.write(changed) == 3
    assert logger.write(changed) == 0
    assert backend.shown() == expected(*changed)


@pytest.mark.parametrize("backend", slow_except(["tensorboard", "mlflow"], "tensorboard"), indirect=True)
def test_a_trial_in_training_is_followed_epoch_by_epoch(backend: Backend) -> None:
    logger = backend.open()
    for run in (*(make_run(0, epochs=epochs, state="running") for epochs in (1, 2)), make_run(0, epochs=3)):
        assert logger.write([run]) == 1
        assert backend.shown() == expected(run)


@pytest.mark.parametrize("backend", ["wandb"], indirect=True)
def test_a_trial_in_training_waits_for_its_end_where_nothing_can_be_added(backend: Backend) -> None:
    assert backend.open().write([make_run(0, epochs=2, state="running")]) == 0


KILLED = """
import os, signal, sys
from tests.loggers.test_table import make_run
from hpo.loggers.table import open_logger
to, owner, method, after = sys.argv[1:]
module, name = owner.split(":")
logger = open_logger(to)
owner = getattr(__import__(module, fromlist=[name]), name)
called, call = 0, getattr(owner, method)
def dying(*arguments, **named):
    global called
    called += 1
    if called == int(after):
        os.kill(os.getpid(), signal.SIGKILL)
    return call(*arguments, **named)
setattr(owner, method, dying)
logger.write([make_run(number, epochs=3) for number in range(3)])
"""
DEATHS = [
    ("tensorboard", "hpo.loggers.tensorboard:TensorBoardLogger", "_write", 2),
    ("mlflow", "mlflow.tracking:MlflowClient", "log_batch", 4),
    ("mlflow", "mlflow.tracking:MlflowClient", "set_tag", 2),
    ("wandb", "wandb.sdk.wandb_run:Run", "log", 5),
    ("wandb", "wandb.sdk.wandb_run:Run", "finish", 2),
]


# The first row also shows that another process makes the same bytes of the same run.
@pytest.mark.parametrize(("backend", "owner", "method", "after"), slow_except(DEATHS, DEATHS[0]), indirect=["backend"])
def test_a_logger_that_is_killed_goes_on_where_it_was(backend: Backend, owner: str, method: str, after: int) -> None:
    root = Path(__file__).parents[2]
    command = [sys.executable, "-c", KILLED, backend.to, owner, method, str(after)]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    assert subprocess.run(command, env=environment, check=False).returncode == -signal.SIGKILL
    runs = [make_run(number, epochs=3) for number in range(3)]
    assert backend.open().write(runs) == 2
    assert backend.shown() == expected(*runs)


@pytest.mark.parametrize("backend", ["tensorboard"], indirect=True)
def test_a_file_of_events_that_ends_anywhere_is_completed(backend: Backend) -> None:
    run = make_run(0, epochs=2)
    logger = backend.open()
    logger.write([run])
    (path,) = backend.folder.glob("runs/*/*/*")
    whole = path.read_bytes()
    for length in range(0, len(whole), 7):
        path.write_bytes(whole[:length])
        assert logger.write([run]) == 1
        assert path.read_bytes() == whole


@pytest.mark.parametrize("kind", LOGGERS)
def test_a_logger_whose_package_is_missing_names_the_extra(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(sys.modules):
        if name == f"hpo.loggers.{kind}" or name.partition(".")[0] == kind:
            monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setitem(sys.modules, kind, None)
    monkeypatch.delitem(sys.modules, f"hpo.loggers.{kind}", raising=False)
    with pytest.raises(
        UserError, match=rf"--to {kind} needs the package {kind}.*: pip install 'hpo-studies\[{kind}\]'"
    ):
        open_logger(f"{kind}=x")


def test_a_logger_that_there_is_not_is_told_with_those_that_there_are() -> None:
    with pytest.raises(
        UserError, match=r"--to must be one of mlflow, tensorboard, wandb; got 'tensorbord'.*did you mean"
    ):
        open_logger("tensorbord=runs")


def test_a_password_is_not_given_on_the_command_line() -> None:
    pytest.importorskip("mlflow")
    with pytest.raises(UserError, match="MLFLOW_TRACKING_PASSWORD"):
        open_logger("mlflow=https://ada:secret@mlflow.example")
