"""What several tests start from: an empty store, a study whose loop needs no torch, and `hpo` run as users run it."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
import tomli_w

from hpo.spec import StudySpec
from hpo.store import Store

REPOSITORY = Path(__file__).parents[1]


@pytest.fixture
def url(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path}/hpo.db"


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
        self._started: list[subprocess.Popen[str]] = []

    def write(self, spec: StudySpec, loop: str) -> None:
        (self.folder / "loop.py").write_text(loop)
        (self.folder / "study.toml").write_text(tomli_w.dumps(spec.frozen()))

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [Path(sys.executable).parent / "hpo", *arguments],
            cwd=self.folder, env={**os.environ, "HPO_STORAGE": self.url}, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
        self._started.append(process)
        return process

    def run(self, *arguments: str) -> tuple[int, str]:
        """Exit code and everything that was printed."""
        process = self.start(*arguments)
        output, _ = process.communicate(timeout=120)
        return process.returncode, output

    def worker_pids(self) -> list[int]:
        """Of worker processes that run, read from /proc: also of those that no longer appear in the store."""
        found = []
        for entry in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                is_worker = b"hpo.worker" in (entry / "cmdline").read_bytes()
                if is_worker and self.url.encode() in (entry / "environ").read_bytes():
                    found.append(int(entry.name))
        return found

    def end(self) -> None:
        for process in self._started:
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
def change() -> Callable[..., None]:
    """Changes a store behind its back, as the passing of time or another machine would."""

    def execute(store: Store, statement: sa.Update) -> None:
        with store.storage.engine.begin() as connection:  # type: ignore[attr-defined]
            connection.execute(statement)

    return execute
