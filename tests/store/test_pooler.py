"""A store behind PgBouncer in transaction mode: each transaction may run in another session of the server."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from hpo.store.store import Store
from tests.store.helpers import MakeSpec, begin, claim, only_postgres

NUM_SERVER_CONNECTIONS = 2


@pytest.fixture
def pooled_url(url: str, tmp_path: Path, wait_for: Callable[..., Any]) -> Iterator[str]:
    """Serve the database by a PgBouncer of this test's own, and return the URL."""
    program = shutil.which("pgbouncer")
    if program is None:
        pytest.skip("there is no PgBouncer here (apt-get install pgbouncer)")
    server = sa.make_url(url)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    login = {"host": server.host or str(server.query["host"]), "port": server.port, "user": server.username}
    login["password"] = server.password
    known = " ".join(f"{key}={value}" for key, value in login.items() if value)
    settings = tmp_path / "pgbouncer.ini"
    settings.write_text(
        f"""[databases]
{server.database} = {known}
[pgbouncer]
pool_mode = transaction
default_pool_size = {NUM_SERVER_CONNECTIONS}
auth_type = any
listen_addr = 127.0.0.1
listen_port = {port}
unix_socket_dir =
"""
    )
    with (tmp_path / "pgbouncer.log").open("w") as log:
        as_user = ["-u", Path(str(server.query["host"])).owner()] if os.getuid() == 0 else []  # it does not run as root
        with subprocess.Popen([program, *as_user, str(settings)], stderr=log, stdin=subprocess.DEVNULL) as process:

            def answers() -> bool:
                assert process.poll() is None, Path(log.name).read_text()
                with socket.socket() as client:
                    return client.connect_ex(("127.0.0.1", port)) == 0

            try:
                wait_for(answers)
                yield server.set(host="127.0.0.1", port=port, query={}).render_as_string(hide_password=False)
            finally:
                process.terminate()


@only_postgres
def test_workers_share_a_few_sessions_and_every_trial_ends_once(pooled_url: str, make_spec: MakeSpec) -> None:
    store = Store(pooled_url, create=True)
    spec = make_spec(search={"trials": 24, "sampler": "tpe"}, pruner={"name": "median", "startup_trials": 2}, epochs=6)
    study, _ = begin(store, spec)

    def work(index: int) -> list[int]:
        mine, numbers = Store(pooled_url), []
        worker = mine.workers.add(study.study_id, device=f"cpu:{index}")
        while mine.trials.counts(study.study_id).get("waiting"):
            held = claim(mine, study, worker)
            verdict, epoch = "go on", 0
            while verdict == "go on" and epoch < 6:
                epoch += 1
                value = held.number % 7 / 7 + epoch / 100
                verdict = mine.trials.report(held, spec, epoch=epoch, metrics={}, value=value, may_prune=epoch < 6)
            mine.trials.finish(held, "pruned" if verdict == "prune" else "complete", reason="")
            numbers.append(held.number)
        return numbers

    with ThreadPoolExecutor(6) as threads:
        numbers = [number for of_worker in threads.map(work, range(6)) for number in of_worker]
    assert sorted(numbers) == list(range(24))
    assert store.problems(study) == []
    assert {trial.state for trial in store.trials.get_all(study)} == {"complete", "pruned"}


@only_postgres
@pytest.mark.parametrize("pooled", [False, True])
def test_the_server_ends_a_transaction_that_is_left_open(
    url: str, pooled: bool, request: pytest.FixtureRequest
) -> None:
    store = Store(request.getfixturevalue("pooled_url") if pooled else url, create=True)
    with store.database.transaction() as connection:
        limits = [
            connection.exec_driver_sql(f"SHOW {name}").scalar()
            for name in ("idle_in_transaction_session_timeout", "lock_timeout")
        ]
    assert limits == ["1min", "1min"]
