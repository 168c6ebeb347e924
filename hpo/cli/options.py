"""What several commands share: options, the executor that options describe, command lines to copy."""

from __future__ import annotations

import functools
import re
import shlex
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import click

from hpo.errors import UserError
from hpo.workers.executors import Executor, InProcess, Local, Ray


def refuse_password(_context: click.Context, parameter: click.Parameter, url: str | None) -> str | None:
    """Refuse a URL with a password, which every process of the machine could read on the command line."""
    if url and re.search("[@?=]", url) and _may_hold_secret(url):
        raise UserError(
            f"{parameter.opts[0]} must not hold a password, which others could read in the list of processes; "
            "leave it out of the URL and give it in HPO_STORAGE_PASSWORD_FILE, PGPASSFILE or PGPASSWORD, "
            "or the whole URL in HPO_STORAGE"
        )
    return url


def _may_hold_secret(url: str) -> bool:
    from hpo.store.urls import may_hold_secret  # it loads SQLAlchemy

    return may_hold_secret(url)


def storage_option(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add --storage."""
    return click.option(
        "--storage",
        metavar="URL",
        callback=refuse_password,
        help="The store. Default: HPO_STORAGE, else sqlite:///hpo.db.",
    )(command)


def overrides_option(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add --set, which the command gets as `overrides`."""
    return click.option(
        "--set",
        "overrides",
        multiple=True,
        metavar="SECTION.KEY=VALUE",
        help="Change a setting of the study file.",
    )(command)


def allow_option(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add --allow."""
    return click.option(
        "--allow",
        multiple=True,
        metavar="MODULE|FOLDER",
        help="Code that the study may import: a module by its name, or a folder (./models).",
    )(command)


def json_option(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add --json, which the command gets as `as_json`."""
    return click.option("--json", "as_json", is_flag=True, help="Print JSON.")(command)


def yes_option(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add --yes."""
    return click.option("--yes", is_flag=True, help="Do not ask.")(command)


def verbose_option(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add --verbose."""
    return click.option("--verbose", is_flag=True, help="Print the details of the answer, too.")(command)


def devices_option(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add --devices."""
    return click.option(
        "--devices",
        default="auto",
        show_default=True,
        metavar="LIST",
        help="auto: every free GPU, else the CPU. Or a list: cpu, mps, cuda, cuda:0,cuda:1.",
    )(command)


EXECUTOR_OPTIONS = (  # in the order in which the help shows them
    devices_option,
    click.option(
        "--workers",
        type=int,
        metavar="N",
        help="Worker processes. Default: one per device; on Ray, as many as there is room for.",
    ),
    click.option(
        "--threads",
        type=int,
        metavar="N",
        help="CPU threads of each worker. Default: OMP_NUM_THREADS, else its share of the cores.",
    ),
    click.option(
        "--on",
        "address",
        metavar="ray|auto|ray://HOST:PORT",
        help="Let Ray place the workers: a new Ray on this machine, RAY_ADDRESS's, or one through Ray Client.",
    ),
    click.option(
        "--resource",
        "resources",
        multiple=True,
        metavar="NAME=AMOUNT",
        help="What each worker needs: num_cpus, num_gpus, memory, or the cluster's own. Default: 1 CPU; 1 GPU.",
    ),
    click.option(
        "--placement", metavar="pack|spread", help="Fill one node after the other (default), or spread workers."
    ),
)


def executor_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add --devices, --workers, --threads, --on, --resource and --placement; the command gets them as one `executor`.

    A command that has --in-process as well gets it as part of the executor.
    """

    @functools.wraps(command)
    def with_executor(
        *args: Any,
        devices: str,
        workers: int | None,
        threads: int | None,
        address: str | None,
        resources: tuple[str, ...],
        placement: str | None,
        in_process: bool = False,
        **kwargs: Any,
    ) -> Any:
        executor = make_executor(
            devices=devices,
            workers=workers,
            threads=threads,
            in_process=in_process,
            address=address,
            resources=resources,
            placement=placement,
        )
        return command(*args, executor=executor, **kwargs)

    for option in reversed(EXECUTOR_OPTIONS):
        with_executor = option(with_executor)
    return with_executor


def make_executor(
    *,
    devices: str,
    workers: int | None,
    threads: int | None,
    in_process: bool,
    address: str | None,
    resources: Sequence[str],
    placement: str | None,
) -> Executor:
    """Return the executor that these options describe.

    Raises:
        UserError: A value is wrong, or two options exclude each other.
    """
    if address is None and resources:
        raise UserError("--resource needs --on, a Ray cluster to ask")
    if address is None and placement:
        raise UserError("--placement needs --on, a Ray cluster to ask")
    if in_process and workers is not None:
        raise UserError(f"--workers cannot be used with --in-process, got {workers}")
    if in_process and address is not None:
        raise UserError("--on cannot be used with --in-process")
    if address is not None and threads is not None:
        raise UserError(f"--threads cannot be used with --on: --resource num_cpus={threads} gives a worker its threads")
    if in_process:
        return InProcess(devices, threads)
    if address is None:
        return Local(devices, workers, threads)
    return Ray(address, devices, workers, resources=_amounts(resources), placement=placement or "pack")


def _amounts(resources: Sequence[str]) -> dict[str, float]:
    """Return the amounts of --resource NAME=AMOUNT by their names."""
    amounts = {}
    for text in resources:
        name, _, amount = text.partition("=")
        try:
            amounts[name] = float(amount)
        except ValueError:
            name = ""
        if not name:
            raise UserError(f"--resource must be NAME=AMOUNT, such as num_cpus=4, got {text!r}")
    return amounts


def worker_arguments(executor: Executor) -> list[str]:
    """Return the arguments of a command line that give this executor again."""
    arguments = []
    if executor.devices != "auto":
        arguments += ["--devices", executor.devices]
    if not isinstance(executor, InProcess) and executor.workers is not None:
        arguments += ["--workers", str(executor.workers)]
    if not isinstance(executor, Ray) and executor.threads is not None:
        arguments += ["--threads", str(executor.threads)]
    if isinstance(executor, InProcess):
        return [*arguments, "--in-process"]
    if isinstance(executor, Ray):
        arguments += ["--on", executor.address]
        for name, amount in executor.resources.items():
            arguments += ["--resource", f"{name}={amount:g}"]
        if executor.placement != "pack":
            arguments += ["--placement", executor.placement]
    return arguments


def confirm(question: str, *, yes: bool, command: str) -> None:
    """Ask a question that ends the command unless it is answered with y; `yes` is the answer of --yes."""
    if yes:
        return
    if not sys.stdin.isatty():
        raise UserError(f"{command} needs --yes where nobody can be asked")
    click.confirm(question, abort=True)


def repeated(option: str, values: Iterable[str]) -> list[str]:
    """Return the arguments of an option that is given once for each value."""
    return [argument for value in values for argument in (option, value)]


def command_line(*arguments: str) -> str:
    """Return the command line `hpo ARGUMENTS`, quoted for a shell."""
    return shlex.join(["hpo", *arguments])
