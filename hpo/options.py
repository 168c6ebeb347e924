"""What several commands share: their options, JSON as they print it, and a command as a line for the shell."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from typing import Any

import click

from hpo.errors import UserError


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
        help="Worker processes. Default: one a device. The CPU's threads are divided.",
    )(command)
    return devices_option(command)


def devices_option(command: Callable[..., Any]) -> Callable[..., Any]:
    return click.option(
        "--devices", default="auto", show_default=True, metavar="LIST",
        help="auto: every free GPU, else the CPU. Or a list: cpu, mps, cuda, cuda:0,cuda:1.",
    )(command)  # fmt: skip


def worker_arguments(devices: str, workers: int | None) -> list[tuple[str, str]]:
    return [("--devices", devices)] * (devices != "auto") + [("--workers", str(workers))] * (workers is not None)


def allow_arguments(allow: tuple[str, ...]) -> list[tuple[str, str]]:
    return [("--allow", value) for value in allow]


def command_line(*arguments: str | tuple[str, str]) -> str:
    """A command line that can be pasted into a shell as it is."""
    words = [word for argument in arguments for word in ([argument] if isinstance(argument, str) else argument)]
    return shlex.join(["hpo", *words])


def print_json(value: Any) -> None:
    click.echo(json.dumps(value, indent=2, allow_nan=False))
