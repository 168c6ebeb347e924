"""What several commands share: their options, JSON as they print it, and a command as a line for the shell."""

from __future__ import annotations

import functools
import json
import shlex
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import click

from hpo.errors import UserError

if TYPE_CHECKING:
    from hpo.workers.ray_cluster import OnRay


def no_password(_context: click.Context, parameter: click.Parameter, url: str | None) -> str | None:
    """Refuses a URL with a password on the command line, where every process of the machine can read it."""
    if url and "@" in url and _has_password(url):
        raise UserError(
            f"{parameter.opts[0]} must not hold a password, which others could read in the list of processes; "
            "leave it out of the URL and give it in HPO_STORAGE_PASSWORD_FILE, PGPASSFILE or PGPASSWORD, "
            "or the whole URL in HPO_STORAGE"
        )
    return url


def _has_password(url: str) -> bool:
    from sqlalchemy.engine import make_url
    from sqlalchemy.exc import ArgumentError

    try:
        return bool(make_url(url).password)
    except (ArgumentError, ValueError):
        return True  # it has a place for one, and cannot be told from one


def storage_option(command: Callable[..., Any]) -> Callable[..., Any]:
    return click.option(
        "--storage",
        metavar="URL",
        callback=no_password,
        help="The store. Default: HPO_STORAGE, else sqlite:///hpo.db.",
    )(command)


def allow_option(command: Callable[..., Any]) -> Callable[..., Any]:
    return click.option(
        "--allow", multiple=True, metavar="MODULE|FOLDER",
        help="Code that the study may import: a module by its name, or a folder (./models).",
    )(command)  # fmt: skip


def json_option(command: Callable[..., Any]) -> Callable[..., Any]:
    return click.option("--json", "as_json", is_flag=True, help="Print JSON.")(command)


def worker_options(command: Callable[..., Any]) -> Callable[..., Any]:
    command = click.option(
        "--workers",
        type=int,
        metavar="N",
        help="Worker processes. Default: one a device, on Ray as many as there is room for.",
    )(command)
    return devices_option(command)


def ray_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Adds --on, --resource and --placement, which the command is called with as one: `on`, an OnRay or None."""

    @functools.wraps(command)
    def with_on(
        *args: Any, on_address: str | None, resources: tuple[str, ...], placement: str | None, **kwargs: Any
    ) -> Any:  # fmt: skip
        from hpo.workers.ray_cluster import OnRay

        if on_address is None and (resources or placement):
            raise UserError(f"{'--resource' if resources else '--placement'} needs --on, a Ray cluster to ask")
        on = on_address and OnRay.parse(on_address, resources=resources, placement=placement or "pack")
        return command(*args, on=on, **kwargs)

    for option in (
        click.option(
            "--placement", metavar="pack|spread", help="Fill one node after the other (default), or spread workers."
        ),
        click.option(
            "--resource", "resources", multiple=True, metavar="NAME=AMOUNT",
            help="What each worker needs: num_cpus, num_gpus, memory, or the cluster's own. Default: 1 CPU; 1 GPU.",
        ),
        click.option(
            "--on", "on_address", metavar="ray|auto|ray://HOST:PORT",
            help="Have Ray place the workers: a Ray of its own here, RAY_ADDRESS's, or one through Ray Client.",
        ),
    ):  # fmt: skip
        with_on = option(with_on)
    return with_on


def devices_option(command: Callable[..., Any]) -> Callable[..., Any]:
    return click.option(
        "--devices", default="auto", show_default=True, metavar="LIST",
        help="auto: every free GPU, else the CPU. Or a list: cpu, mps, cuda, cuda:0,cuda:1.",
    )(command)  # fmt: skip


def worker_arguments(devices: str, workers: int | None, on: OnRay | None = None) -> list[tuple[str, str]]:
    where = [("--devices", devices)] * (devices != "auto") + [("--workers", str(workers))] * (workers is not None)
    if on is None:
        return where
    resources = [("--resource", f"{name}={amount:g}") for name, amount in on.resources.items()]
    return [*where, ("--on", on.address), *resources, *[("--placement", on.placement)] * (on.placement != "pack")]


def allow_arguments(allow: tuple[str, ...]) -> list[tuple[str, str]]:
    return [("--allow", value) for value in allow]


def command_line(*arguments: str | tuple[str, str]) -> str:
    """A command line that can be pasted into a shell as it is."""
    words = [word for argument in arguments for word in ([argument] if isinstance(argument, str) else argument)]
    return shlex.join(["hpo", *words])


def print_json(value: Any) -> None:
    click.echo(json.dumps(value, indent=2, allow_nan=False))
