"""What every worker of a chaos study runs before anything else, as the sitecustomize.py of the study's folder.

It keeps a record of what the worker does, a line of JSON each, and dies or stops at exact moments: for each such fault
the harness puts a file into orders/, and the first worker that passes that moment takes it. Imported anywhere else it
does nothing.
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
    line = json.dumps({"what": what, "pid": os.getpid(), "at": time.time(), **fields}) + "\n"
    descriptor = os.open(FOLDER / "record.jsonl", os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(descriptor, line.encode())  # one call: lines of several processes do not mix
    os.close(descriptor)


def take(order: str) -> bool:
    """Whether there was such an order, which is now this process's alone; it is recorded before it is carried out."""
    try:
        os.unlink(FOLDER / "orders" / order)
    except FileNotFoundError:
        return False
    record("fault", fault=order, **current)
    return True


def moment(name: str) -> None:
    for number in (signal.SIGKILL, signal.SIGSTOP):
        if take(f"{number.name} {name}"):
            os.kill(os.getpid(), number)


def digest(state: Mapping[str, Any], results: Sequence[Any]) -> str:
    """Of every bit of a trial's parameters, optimizer and curve, without the seconds that its epochs took."""
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
    """A file that is written in two halves, with a moment in between; and a disk that is full while harness says so."""

    def __init__(self, path: str, mode: str) -> None:
        self._file = builtins.open(path, mode)  # noqa: SIM115

    def __enter__(self) -> HalfWay:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def write(self, data: memoryview) -> None:
        self._file.write(data[: len(data) // 2])
        self._file.flush()
        moment("half of a checkpoint written")
        if (FOLDER / "full").exists():  # where no small disk could be mounted, to be filled in earnest
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self._file.write(data[len(data) // 2 :])


def install() -> None:  # noqa: PLR0915
    import sqlalchemy as sa

    from hpo.store.database import JoinedStorage
    from hpo.store.trials import Trials
    from hpo.train import checkpoint
    from hpo.train.checkpoint import CheckpointFolder
    from hpo.train.engines.plain import PlainEngine

    transaction = JoinedStorage.transaction

    @contextmanager
    def transaction_with_faults(self: Any) -> Iterator[Any]:
        with transaction(self) as connection:
            yield connection
            moment("in a transaction")
        if self.engine.dialect.name == "postgresql" and take("a commit's answer is lost"):
            raise sa.exc.OperationalError("COMMIT", {}, ConnectionError("chaos: the answer to a commit was lost"))

    claim = Trials.claim

    def claim_with_faults(self: Any, study: Any, worker_id: str, **rest: Any) -> Any:
        claimed = claim(self, study, worker_id, **rest)
        if claimed is not None:
            current.update(number=claimed.number, attempt=claimed.attempt)
            moment("claimed, not begun")
        return claimed

    begin = Trials.begin

    def begin_recorded(self: Any, claimed: Any, *, resumed_from: int, **rest: Any) -> None:
        begin(self, claimed, resumed_from=resumed_from, **rest)
        record("began", **current, epoch=resumed_from)

    report_all = Trials.report_all

    def report_all_with_faults(self: Any, reports: Any, spec: Any) -> Any:
        verdicts = report_all(self, reports, spec)
        for report, verdict in zip(reports, verdicts, strict=True):
            event = "refused" if verdict is None else "reported"
            record(event, number=report.claim.number, attempt=report.claim.attempt, epoch=report.epoch)
        if verdicts != [None]:
            moment("reported, not saved")
        return verdicts

    finish = Trials.finish

    def finish_with_faults(self: Any, claimed: Any, state: str, **rest: Any) -> None:
        moment("reported, not finished")
        finish(self, claimed, state, **rest)
        record("finished", number=claimed.number, attempt=claimed.attempt)
        moment("finished, not cleaned up")

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

    step, run_epoch = PlainEngine.step, PlainEngine.run_epoch

    def step_with_faults(self: Any, *batch: Any) -> Any:
        moment("mid-epoch")
        return step(self, *batch)

    def run_epoch_recorded(self: Any) -> Any:
        results = run_epoch(self)
        for result in results:
            trained = self.checkpoint(result.lane)
            record("trained", **current, epoch=result.epoch, digest=digest(trained.state, trained.results))
        return results

    JoinedStorage.transaction = transaction_with_faults
    Trials.claim, Trials.begin, Trials.report_all = claim_with_faults, begin_recorded, report_all_with_faults
    Trials.finish, CheckpointFolder.save = finish_with_faults, save_recorded
    PlainEngine.step, PlainEngine.run_epoch = step_with_faults, run_epoch_recorded
    checkpoint.open = HalfWay
    checkpoint.os = types.SimpleNamespace(**{**vars(os), "replace": replace})
    with suppress(FileNotFoundError):
        exec((FOLDER / "sabotage.py").read_text(), {})


if "HPO_WORKER" in os.environ:  # the workers', and not the command's that supervises them
    install()
