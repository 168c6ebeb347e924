"""Executors, what a launcher for Ray refuses, and what it packs: these tests need no Ray."""

from __future__ import annotations

import socket
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner

from hpo.cli.app import main
from hpo.cli.options import executor_options, make_executor, worker_arguments
from hpo.config.import_policy import load_own_spec
from hpo.config.study_spec import StudySpec
from hpo.errors import UserError
from hpo.train.imports import ImportAllowlist
from hpo.workers import ray_cluster
from hpo.workers.executors import Executor, InProcess, Local, Ray
from hpo.workers.launcher import Launcher
from hpo.workers.launching import make_launcher

MakeSpec = Callable[..., StudySpec]

POSTGRES = "postgresql+psycopg://hpo@database/hpo"


def launcher(spec: StudySpec, executor: Ray, *, url: str = POSTGRES) -> Launcher:
    return make_launcher(executor, spec, ImportAllowlist(), url=url)


def executor_of(
    *,
    address: str = "auto",
    resources: Sequence[str] = (),
    placement: str | None = None,
    in_process: bool = False,
    threads: int | None = None,
) -> Executor:
    """Return what the options of a command make."""
    return make_executor(
        devices="auto",
        workers=None,
        threads=threads,
        in_process=in_process,
        address=address,
        resources=resources,
        placement=placement,
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"address": "local"}, r"^--on must be ray, auto or ray://HOST:PORT, got 'local'$"),
        ({"address": "ray://u:hunter2@h:1"}, r"HOST:PORT, got one with a login, which is not shown$"),
        ({"threads": 4}, r"^--threads cannot be used with --on: --resource num_cpus=4 gives a worker its threads$"),
        ({"placement": "strict"}, r"^--placement must be one of pack, spread, got 'strict'$"),
        ({"resources": ("num_cpus",)}, r"^--resource must be NAME=AMOUNT, such as num_cpus=4, got 'num_cpus'$"),
        ({"resources": ("=4",)}, r"^--resource must be NAME=AMOUNT, such as num_cpus=4, got '=4'$"),
        ({"resources": ("num_cpus=many",)}, r"^--resource must be NAME=AMOUNT, .* got 'num_cpus=many'$"),
        ({"resources": ("fast=0",)}, r"^--resource fast must be above 0, got 0$"),
        ({"resources": ("num_cpus=-1",)}, r"^--resource num_cpus must not be below 0, got -1$"),
        ({"resources": ("num_cpus=nan",)}, r"^--resource num_cpus must not be below 0, got nan$"),
        ({"resources": ("memory=inf",)}, r"^--resource memory must be above 0, got inf$"),
        ({"resources": ("num_gpus=2",)}, r"^--resource num_gpus must be at most 1, .*one GPU, got 2$"),
    ],
)
def test_a_wrong_request_is_one_sentence(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        executor_of(**arguments)


def test_what_is_asked_for_is_kept_as_it_was_given() -> None:
    made = executor_of(address="ray://head:10001", resources=("num_gpus=0.5", "fast_disk=2"), placement="spread")
    assert made == Ray("ray://head:10001", resources={"num_gpus": 0.5, "fast_disk": 2.0}, placement="spread")


EXECUTORS: dict[str, Executor] = {
    "": Local(),
    "--devices cuda:0,cuda:1 --workers 4": Local("cuda:0,cuda:1", workers=4),
    "--devices cpu --in-process": InProcess("cpu"),
    "--workers 2 --threads 1": Local(workers=2, threads=1),
    "--threads 3 --in-process": InProcess(threads=3),
    "--on auto": Ray(),
    "--devices cpu --workers 2 --on ray --resource num_cpus=4 --resource fast=0.5 --placement spread": Ray(
        "ray", "cpu", 2, resources={"num_cpus": 4, "fast": 0.5}, placement="spread"
    ),
}


@pytest.mark.parametrize(("arguments", "executor"), EXECUTORS.items())
def test_the_arguments_of_an_executor_make_it_again(arguments: str, executor: Executor) -> None:
    made: list[Executor] = []

    @click.command()
    @click.option("--in-process", is_flag=True)
    @executor_options
    def command(executor: Executor) -> None:
        made.append(executor)

    assert worker_arguments(executor) == arguments.split()
    command.main(arguments.split(), standalone_mode=False)
    assert made == [executor]


@pytest.mark.parametrize("address", ["auto", "ray://head:10001"])
def test_a_cluster_needs_a_store_that_its_nodes_reach(make_spec: MakeSpec, tmp_path: Path, address: str) -> None:
    with pytest.raises(UserError, match=rf"^--on {address} needs a Postgres store, got sqlite:.*file of one machine"):
        launcher(make_spec(), Ray(address), url=f"sqlite:///{tmp_path}/hpo.db")
    launcher(make_spec(), Ray("ray"), url=f"sqlite:///{tmp_path}/hpo.db")


def test_a_share_of_a_gpu_needs_a_number_of_lanes() -> None:
    settings = {"name": "s", "search": {"space": {"lr": [0.1, 0.2]}, "sampler": "grid"}}
    with pytest.raises(UserError, match=r"^--resource num_gpus=0.5 shares a GPU, .*engine.lanes = N"):
        launcher(StudySpec.from_dict(settings), Ray("auto", resources={"num_gpus": 0.5}))
    for fits in (Ray("auto", resources={"num_gpus": 1}), Ray("auto", resources={"num_gpus": 0}), Ray("auto")):
        launcher(StudySpec.from_dict(settings), fits)
    launcher(StudySpec.from_dict({**settings, "engine": {"lanes": 4}}), Ray("auto", resources={"num_gpus": 0.5}))


def test_devices_are_kinds_where_their_numbers_are_rays(make_spec: MakeSpec) -> None:
    with pytest.raises(UserError, match=r"^--devices must be auto, cpu or cuda with --on auto, got 'cuda:0'$"):
        launcher(make_spec(), Ray("auto", devices="cuda:0"))


def test_a_cluster_and_this_process_exclude_each_other() -> None:
    with pytest.raises(UserError, match=r"^--on cannot be used with --in-process$"):
        executor_of(in_process=True)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("run", "study.toml", "--detach"), "--detach needs a Ray that outlives this command"),
        (("run", "study.toml", "--detach", "--on", "ray"), "--detach needs a Ray that outlives this command"),
        (("run", "study.toml", "--detach", "--in-process"), "--in-process cannot be used with --detach"),
        (("run", "study.toml", "--resource", "num_cpus=2"), "--resource needs --on, a Ray cluster to ask"),
        (("run", "study.toml", "--placement", "spread"), "--placement needs --on, a Ray cluster to ask"),
        (("worker", "--stay", "--on", "auto"), "--stay is for workers of this machine"),
        (("run", "study.toml", "--on", "auto"), "needs a Postgres store"),
    ],
)
def test_the_command_line_refuses_what_has_no_meaning(
    arguments: tuple[str, ...], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("HPO_STORAGE", raising=False)
    Path("study.toml").write_text('name = "s"\n[search.space]\nlr = { low = 0.1, high = 1.0 }\n')
    result = CliRunner().invoke(main, arguments)
    assert (result.exit_code, message in result.output) == (2, True), result.output
    assert not Path("hpo.db").exists()


def test_without_ray_it_says_what_to_install(make_spec: MakeSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with (
        pytest.raises(UserError, match=r"^--on needs Ray: pip install 'hpo-studies\[ray\]'$"),
        launcher(make_spec(), Ray("auto")),
    ):
        pass


def test_a_cluster_that_wants_a_token_is_told_from_one_that_is_not_there() -> None:
    error = ConnectionError("Failed to connect to Ray cluster at 192.0.2.1:6379")
    assert ray_cluster.connection_hint(error) == ""
    error.__cause__ = RuntimeError("RPC error: InvalidAuthToken: Authentication token is missing or incorrect")
    assert "RAY_AUTH_MODE=token" in ray_cluster.connection_hint(error)


def test_the_cluster_is_the_one_named_or_the_one_that_runs_here_or_there_is_none_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    with pytest.raises(
        UserError, match=r"^--on auto: RAY_ADDRESS is not set and no Ray runs on this machine; start one"
    ):
        ray_cluster.find_cluster("auto")
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        address = f"127.0.0.1:{listening.getsockname()[1]}"
        (tmp_path / "ray").mkdir()
        (tmp_path / "ray" / "ray_current_cluster").write_text(f"{address}\n")
        assert ray_cluster.find_cluster("auto") == address
        assert ray_cluster.find_cluster(f"ray://{address}") == f"ray://{address}"
        monkeypatch.setenv("RAY_ADDRESS", f"ray://{address}")
        assert ray_cluster.find_cluster("auto") == f"ray://{address}"
    with pytest.raises(UserError, match=rf"^--on auto: RAY_ADDRESS ray://{address} does not answer: .*refused"):
        ray_cluster.find_cluster("auto")
    with pytest.raises(UserError, match=rf"^--on ray://{address} does not answer: .*refused"):
        ray_cluster.find_cluster(f"ray://{address}")


# The study's own code


def packed(folders: list[Path]) -> set[str]:
    with ray_cluster.packed(folders) as folder:
        assert (folder is None) == (not folders)
        return {str(path.relative_to(folder)) for path in Path(folder or "").rglob("*") if folder and path.is_file()}


def test_the_folders_of_the_studys_modules_are_packed_and_what_is_installed_is_not(
    make_spec: MakeSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours, here = tmp_path / "ours", tmp_path / "here"
    for folder, module in ((ours, "my_loop"), (here, "my_data")):
        folder.mkdir()
        (folder / f"{module}.py").write_text("raise RuntimeError('nobody imports it to find it')")
    package = ours / "my_models"
    package.mkdir()
    (package / "__init__.py").touch()
    monkeypatch.chdir(here)

    def code(**settings: Any) -> list[Path]:
        spec = StudySpec.from_dict({"name": "s", "search": {"space": {"lr": {"low": 0.1, "high": 1.0}}}, **settings})
        return ray_cluster.find_code_folders(spec, load_own_spec(spec, folder=ours)[1])

    assert code(objective={"function": "my_loop:train"}) == [ours]
    assert code(model={"name": "my_models.net:build"}) == [ours]
    assert code(data={"name": "my_data:load"}) == [here]
    assert code(data={"name": "my_data:load"}, model={"name": "my_models:build"}) == [ours, here]
    assert code(model={"name": "sklearn.datasets:load_digits"}) == []
    assert code() == []


def test_code_travels_and_what_lies_beside_it_does_not(tmp_path: Path) -> None:
    for name in (
        "loop.py",
        "names.txt",
        "package/__init__.py",
        "hpo.db",
        "hpo.db-wal",
        "hpo_files/s/checkpoints/0",
        ".git/config",
        "venv/pyvenv.cfg",
        "venv/lib/torch.py",
        "__pycache__/loop.pyc",
        ".env",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    (tmp_path / "gone").symlink_to(tmp_path / "nowhere")
    (tmp_path / "package" / "around").symlink_to(tmp_path)
    assert packed([tmp_path]) == {"0/loop.py", "0/names.txt", "0/package/__init__.py"}
    assert packed([]) == set()


def test_a_folder_too_large_for_code_is_refused_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_cluster, "MAX_CODE_BYTES", 2**20)
    (tmp_path / "pictures.bin").write_bytes(bytes(2**20 + 1))
    with pytest.raises(UserError, match=rf"^the folder {tmp_path}, .*holds more than 1 MiB .*a folder of its own$"):
        packed([tmp_path])
