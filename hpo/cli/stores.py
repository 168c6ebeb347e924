"""The commands for stores and for the machine: copy, storage, dashboard, doctor."""

from __future__ import annotations

import shlex
import sys

import click

from hpo.cli.options import confirm, json_option, refuse_password, storage_option, yes_option
from hpo.cli.writer import print_json, say
from hpo.errors import UserError


@click.command("copy", short_help="Copy a study to another store.")
@click.argument("study", metavar="STUDY")
@click.option("--to", required=True, metavar="URL", callback=refuse_password, help="The other store.")
@storage_option
def copy_command(study: str, to: str, storage: str | None) -> None:
    """Copy STUDY with its trials, curves and checkpoints into another store, where it can be resumed.

    \b
    hpo copy quickstart --to postgresql+psycopg://hpo@database/hpo
    """
    from hpo.api import stores
    from hpo.display.console import make_progress

    with make_progress() as progress:
        task = progress.add_task("copying trials", total=None)
        url = stores.copy(
            study, to=to, storage=storage, progress=lambda done, of: progress.update(task, completed=done, total=of)
        )
    say(f"copied to {url}; resume there with: hpo resume {study} --storage {shlex.quote(to)}")


@click.command("delete", short_help="Delete a study.")
@click.argument("study", metavar="STUDY")
@yes_option
@storage_option
def delete_command(study: str, yes: bool, storage: str | None) -> None:
    """Delete STUDY with its trials, logs and checkpoints, after a question.

    \b
    hpo delete quickstart
    """
    from hpo.api import stores

    confirm(f"delete study {study} with its trials, logs and checkpoints?", yes=yes, command="hpo delete")
    stores.delete(study, storage=storage)
    say(f"deleted study {study}")


@click.group("storage", short_help="Upgrade or check a store.")
def storage_command() -> None:
    """Upgrade or check the store itself.

    \b
    hpo storage check
    hpo storage upgrade
    """


@storage_command.command("upgrade", short_help="Upgrade the tables of a store.")
@storage_option
def storage_upgrade_command(storage: str | None) -> None:
    """Upgrade a store of an older version, or make the tables of an empty database."""
    from hpo.api import stores

    for line in stores.upgrade_storage(storage=storage):
        say(line)


@storage_command.command("check", short_help="Check a store for problems.")
@storage_option
def storage_check_command(storage: str | None) -> None:
    """Describe the store and check that everything in it agrees; exit with code 1 where it does not."""
    from hpo.api import stores

    lines, problems = stores.check_storage(storage=storage)
    for line in [*lines, *problems]:
        say(line)
    if problems:
        sys.exit(1)
    say("no problem found")


@click.command("dashboard", short_help="Show a store in the browser.")
@click.option(
    "--host", default="127.0.0.1", show_default=True, help="Where to listen; other than loopback needs a login."
)
@click.option("--port", default=8080, show_default=True, help="0 takes a free port.")
@click.option("--auth-file", metavar="FILE", help="Who may log in: an htpasswd file with bcrypt hashes.")
@click.option("--add-user", metavar="NAME", help="Ask for NAME's password, write it to --auth-file, and end.")
@click.option(
    "--allow-host", "allow_hosts", multiple=True, metavar="NAME", help="A name by which other machines reach it."
)
@storage_option
def dashboard_command(
    host: str, port: int, auth_file: str | None, add_user: str | None, allow_hosts: tuple[str, ...], storage: str | None
) -> None:
    """Serve optuna-dashboard for the store, read-only; other machines need a login.

    The password travels unencrypted. On a network that you do not trust, put a proxy with TLS in front.

    \b
    hpo dashboard --port 8080
    hpo dashboard --auth-file logins --add-user ada
    hpo dashboard --auth-file logins --host 0.0.0.0
    """
    from pathlib import Path

    from hpo.api import stores
    from hpo.dashboard import logins
    from hpo.dashboard import server as dashboard

    if add_user is not None:
        if auth_file is None:
            raise UserError("--add-user needs --auth-file FILE, which the login is written to")
        logins.check_login_name(add_user)
        if sys.stdin.isatty():
            password = click.prompt(f"password of {add_user}", hide_input=True, confirmation_prompt=True)
        else:
            password = sys.stdin.buffer.readline().decode("utf-8", "surrogateescape").rstrip("\r\n")
        logins.add_login(Path(auth_file), add_user, password)
        say(f"{auth_file}: {add_user} can log in; a dashboard that runs already must be started again")
        return

    from hpo.store.store import Store

    def ready(url: str) -> None:
        say(f"dashboard: {url} (Ctrl-C ends it)")
        if auth_file is not None:
            say(f"log in as in {auth_file}; the password travels unencrypted, unless a TLS proxy is in front")

    dashboard.serve_dashboard(
        Store(stores.storage_url(storage)).storage,
        host=host,
        port=port,
        auth_file=auth_file,
        allow_hosts=allow_hosts,
        ready=ready,
    )


@click.command("doctor", short_help="Check this machine and its store.")
@json_option
@storage_option
def doctor_command(as_json: bool, storage: str | None) -> None:
    """Print what this machine has of devices, versions, data and stores, and what to do where something is missing.

    \b
    hpo doctor
    """
    from dataclasses import asdict

    from hpo.doctor import examine

    findings = examine(storage=storage)
    if as_json:
        print_json([asdict(finding) for finding in findings])
        return
    width = max(len(finding.subject) for finding in findings)
    for finding in findings:
        say(f"{finding.subject:<{width}}  {finding.found}")
        if finding.advice:
            say(f"{'':<{width}}  -> {finding.advice}")


STORE_COMMANDS = (copy_command, delete_command, storage_command, dashboard_command, doctor_command)
