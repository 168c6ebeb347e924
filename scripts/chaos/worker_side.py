"""The sitecustomize.py of a chaos study's folder, which every worker runs before anything else.

It records what the worker does, a line of JSON each, and dies or stops at exact moments. For each such fault, the
harness puts a file into orders/, and the first worker that passes that moment takes it. Elsewhere it does nothing.
"""

from __future__ import annotations

import builtins
import errno
import hashlib
import json
import os
import signal
import time
import types
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent
current: dict[str, int] = {}  # the number and the attempt of the trial that this process trains


def record(what: str, **fields: Any) -> None:
    """Add a line to the record that all workers share."""
    line = json.dumps({"what": what, "pid": os.getpid(), "at": time.time(), **fields}) + "\n"
    descriptor = os.open(FOLDER / "record.jsonl", os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(descriptor, line.encode())  # one call: lines of several processes do not mix
    os.close(descriptor)


def take(order: str) -> bool:
    """Return whether there was such an order, which only this process has now; record it before it is carried out."""
    try:
        os.unlink(FOLDER / "orders" / order)
    except FileNotFoundError:
        return False
    record("fault", fault=order, **current)
    return True


def moment(name: str) -> None:
    """Kill or stop this process, if there is an order to do so at this moment."""
    for number in (signal.SIGKILL, signal.SIGSTOP):
        if take(f"{number.name} {name}"):
            signal.raise_signal(number)  # not os.kill, which a worker refuses to training code


def digest(state: Mapping[str, Any], results: Sequence[Any]) -> str:
    """Return a digest of every bit of a trial's parameters, optimizer and curve, without the seconds of its epochs."""
    content = hashlib.sha256()

    def add(value: Any) -> None:
        if isinstance(value, Mapping):
            add([[key, value[key]] for key in sorted(value, key=repr)])
        elif isinstance(value, list | tuple):
            content.update(f"{len(value)}[".encode())
            for item in value:
                add(item)
        elif hasattr(value, "numpy"):
            content.update(f"{value.dtype}{tuple(value.shape)}".encode() + value.contiguous().numpy().tobytes())
        else:
            content.update(repr(value).encode() + b",")

    add(state)
    add([[result.epoch, {k: v for k, v in result.metrics().items() if k != "seconds"}] for result in results])
    return content.hexdigest()


class HalfWay:
    """A file that is written in two halves, with a moment between, on a disk that is full if the harness says so."""

    def __init__(self, path: str | int, mode: str) -> None:
        self._file = builtins.open(path, mode)  # noqa: SIM115

    def __enter__(self) -> HalfWay:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def write(self, data: memoryview) -> None:
        """Write the first half, then the second."""
        self._file.write(data[: len(data) // 2])
        self._file.flush()
        moment("half of a checkpoint written")
        if (FOLDER / "full").exists():  # where no small disk could be mounted, to be filled in earnest
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self._file.write(data[len(data) // 2 :])


def put_faults_into_transactions() -> None:
    """Die within transactions, and lose the answer to a commit of Postgres."""
    import sqlalchemy as sa

    from hpo.store.database import JoinedStorage

    transaction = JoinedStorage.transaction

    @contextmanager
    def transaction_with_faults(self: Any) -> Iterator[Any]:
        with transaction(self) as connection:
            yield connection
            moment("in a transaction")
        if self.engine.dialect.name == "postgresql" and take("a commit's answer is lost"):
            raise sa.exc.OperationalError("COMMIT", {}, ConnectionError("chaos: the answer to a commit was lost"))

    patch(JoinedStorage, transaction=transaction_with_faults)


def put_faults_around_trials() -> None:
    """Record claims, reports and ends of trials, and die between them."""
    from hpo.store.trials import Trials

    claim, begin, report_all, finish = Trials.claim, Trials.begin, Trials.report_all, Trials.finish

    def claim_with_faults(self: Any, study: Any, worker_id: str, **rest: Any) -> Any:
        claimed = claim(self, study, worker_id, **rest)
        if claimed is not None:
            current.update(number=claimed.number, attempt=claimed.attempt)
            moment("claimed, not begun")
        return claimed

    def begin_recorded(self: Any, claimed: Any, *, resumed_from: int, **rest: Any) -> None:
        begin(self, claimed, resumed_from=resumed_from, **rest)
        record("began", **current, epoch=resumed_from)

    def report_all_with_faults(self: Any, reports: Any, spec: Any) -> Any:
        verdicts = report_all(self, reports, spec)
        for report, verdict in zip(reports, verdicts, strict=True):
            event = "refused" if verdict is None else "reported"
            record(event, number=report.claim.number, attempt=report.claim.attempt, epoch=report.epoch)
        if verdicts != [None]:
            moment("reported, not saved")
        return verdicts

    def finish_with_faults(self: Any, claimed: Any, state: str, **rest: Any) -> None:
        moment("reported, not finished")
        finish(self, claimed, state, **rest)
        record("finished", number=claimed.number, attempt=claimed.attempt)
        moment("finished, not cleaned up")

    patch(Trials, claim=claim_with_faults, begin=begin_recorded)
    patch(Trials, report_all=report_all_with_faults, finish=finish_with_faults)


def put_faults_into_training() -> None:
    """Record each epoch that is trained, and die in the middle of one."""
    from hpo.train.engines.plain import PlainEngine

    step, run_epoch = PlainEngine.step, PlainEngine.run_epoch

    def step_with_faults(self: Any, *batch: Any, **mixed: Any) -> Any:
        moment("mid-epoch")
        return step(self, *batch, **mixed)

    def run_epoch_recorded(self: Any) -> Any:
        results = run_epoch(self)
        for result in results:
            trained = self.checkpoint(result.lane)
            bits = digest(trained.state, trained.results)
            record("trained", **current, epoch=result.epoch, digest=bits, seconds=result.seconds)
        return results

    patch(PlainEngine, step=step_with_faults, run_epoch=run_epoch_recorded)


def record_when_to_save() -> None:
    """Record after which epochs the product chooses to save, and what it knew of the cost when it chose."""
    from hpo.workers.checkpoints import StudyCheckpoints
    from hpo.workers.saving import SavingSchedule

    save, is_due = StudyCheckpoints.save, SavingSchedule.is_due

    def save_recorded(self: Any, claimed: Any, snapshot: Any) -> None:
        record("chosen", number=claimed.number, attempt=claimed.attempt, epoch=snapshot.epoch)
        save(self, claimed, snapshot)

    def is_due_recorded(self: Any) -> bool:
        cost_s = self._cost.seconds()
        record("judged", **current, epoch=self._epoch, cost_s=cost_s)
        return bool(is_due(self))

    patch(StudyCheckpoints, save=save_recorded)
    patch(SavingSchedule, is_due=is_due_recorded)


def put_faults_into_checkpoints() -> None:
    """Record checkpoints, and die while one is written, or before or after it is renamed."""
    from hpo.system import files
    from hpo.train.checkpoint import CheckpointFolder

    def replace(source: str, target: str) -> None:
        moment("checkpoint written, not renamed")
        os.replace(source, target)
        moment("checkpoint renamed, older ones there")

    save = CheckpointFolder.save

    def save_recorded(self: Any, saved: Any) -> None:
        whose = {"number": self.identity["trial"], "attempt": current["attempt"], "epoch": saved.epoch}
        try:
            save(self, saved)
        except OSError as error:
            record("unsaved", **whose, why=str(error))
            raise
        record("saved", **whose)

    patch(CheckpointFolder, save=save_recorded)
    patch(files, open=HalfWay, os=types.SimpleNamespace(**{**vars(os), "replace": replace}))


def patch(owner: Any, **replacements: Any) -> None:
    """Put these functions in the place of a class's or a module's own."""
    for name, replacement in replacements.items():
        setattr(owner, name, replacement)


def install() -> None:
    """Put the faults into the product, and the sabotage if there is any."""
    put_faults_into_transactions()
    put_faults_around_trials()
    put_faults_into_training()
    record_when_to_save()
    put_faults_into_checkpoints()
    with suppress(FileNotFoundError):
        exec((FOLDER / "sabotage.py").read_text(), {})


if "HPO_WORKER" in os.environ:  # the workers', and not the command's that supervises them
    install()
