"""The command line: a thin layer over `hpo.api`. Importing it loads neither torch nor Optuna."""

from __future__ import annotations

import json
import shlex
import signal
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NoReturn

import click

from hpo import __version__
from hpo.errors import StudyStopped, UserError
from hpo.options import (
    allow_arguments,
    allow_option,
    command_line,
    json_option,
    no_password,
    storage_option,
    worker_arguments,
    worker_options,
)

if TYPE_CHECKING:
    from hpo.api import Result

STATES = ("waiting", "running", "complete", "pruned", "diverged", "failed")


class _Group(click.Group):
    """Turns our errors into one message and an exit code: 1 the study could not finish, 2 the request was wrong."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except UserError as error:
            _fail(error, error.exit_code)
        except StudyStopped as error:
            _fail(error, 1)
        except Exception as error:
            if _is_of_the_store(error):
                _fail(f"the store failed: {getattr(error, 'orig', None) or error.__cause__ or error}", 1)
            raise


def _is_of_the_store(error: Exception) -> bool:
    if "hpo.outage" not in sys.modules:
        return False
    from hpo.outage import STORE_ERRORS

    return isinstance(error, STORE_ERRORS)


def _fail(message: object, code: int) -> None:
    click.echo(f"hpo: {message}", err=True)
    sys.exit(code)


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="hpo")
def main() -> None:
    """Which learning rate should I train this network with?

    \b
    hpo run studies/quickstart.toml     search, watch, get the answer
    hpo best quickstart                 the answer again
    hpo dashboard                       every trial and its learning curve in the browser
    """


@main.command("run")
@click.argument("spec", metavar="SPEC")
@click.option(
    "--set", "overrides", multiple=True, metavar="SECTION.KEY=VALUE", help="Change a setting of the study file."
)
@click.option("--in-process", is_flag=True, help="Train in this process, without workers: for a debugger.")
@worker_options
@storage_option
def run_command(
    spec: str, overrides: tuple[str, ...], in_process: bool, devices: str, workers: int | None, storage: str | None
) -> None:
    """Run the study file SPEC to its answer, or go on with it where it was interrupted.

    A study that is finished is answered from the store, without training.

    \b
    hpo run studies/quickstart.toml
    hpo run studies/tpe.toml --set search.trials=40 --set training.optimizer=sgd
    """
    from hpo import api
    from hpo.spec import StudySpec

    parsed = StudySpec.from_toml(spec, overrides=overrides)
    options = [("--set", override) for override in overrides]
    again = command_line(
        "run", spec, *options, *worker_arguments(devices, workers), *["--in-process"][: int(in_process)]
    )
    _train(
        lambda watcher: api.run(
            parsed, storage=storage, devices=devices, workers=workers, in_process=in_process, watcher=watcher,
            code_folder=_folder(spec),
        ),
        parsed.name,
        storage,
        again=again,
    )  # fmt: skip


@main.command("worker")
@click.argument("study", metavar="[STUDY]", required=False)
@click.option("--stay", is_flag=True, help="Stay when the study is done, for every study of the store.")
@allow_option
@worker_options
@storage_option
def worker_command(
    study: str | None, stay: bool, allow: tuple[str, ...], devices: str, workers: int | None, storage: str | None
) -> None:
    """Add workers of this machine to STUDY until it is done; with --stay, to any study of the store, for ever.

    \b
    hpo worker quickstart --workers 2
    hpo worker --stay --storage postgresql+psycopg://hpo@database/hpo
    """
    from hpo import api

    if stay:
        _stay(study, allow=allow, devices=devices, workers=workers, storage=storage)
    if study is None:
        raise UserError("hpo worker needs the name of a study, or --stay for every study of the store")
    again = command_line("worker", study, *allow_arguments(allow), *worker_arguments(devices, workers))
    _train(
        lambda watcher: api.join(
            study, storage=storage, devices=devices, workers=workers, allow=allow, watcher=watcher
        ),
        study, storage, again=again,
    )  # fmt: skip


def _stay(study: str | None, *, storage: str | None, **options: Any) -> NoReturn:
    from hpo import api
    from hpo.display import Progress, make_console

    console = make_console()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # while it waits; workers that train are drained
    try:
        with Progress(console) as progress:
            api.serve(study, storage=storage, say=console.print, watcher=progress.watch, **options)
    except StudyStopped as error:
        if not error.interrupted:
            raise
    except KeyboardInterrupt:
        pass
    sys.exit(0)


@main.command("resume")
@click.argument("study", metavar="STUDY")
@click.option("--trials", type=int, metavar="N", help="Enlarge the study to N trials; what was trained stays.")
@allow_option
@worker_options
@storage_option
def resume_command(
    study: str, trials: int | None, allow: tuple[str, ...], devices: str, workers: int | None, storage: str | None
) -> None:
    """Go on with STUDY after `hpo stop` or an interruption.

    \b
    hpo resume quickstart --trials 30
    """
    from hpo import api

    again = command_line("resume", study, *allow_arguments(allow), *worker_arguments(devices, workers))
    _train(
        lambda watcher: api.resume(
            study, storage=storage, trials=trials, devices=devices, workers=workers, allow=allow, watcher=watcher
        ),
        study, storage, again=again,
    )  # fmt: skip


def _train(train: Callable[[Any], Result], study: str, storage: str | None, *, again: str) -> None:
    """Trains with live progress, then prints the answer."""
    from hpo import api
    from hpo.display import Progress, make_console, print_answer
    from hpo.store import Store

    suffix = f" --storage {shlex.quote(storage)}" if storage else ""
    console = make_console()
    try:
        with Progress(console) as progress:
            result = train(progress.watch)
    except StudyStopped as error:
        raise StudyStopped(f"{error}\ngo on with: {again}{suffix}" if error.can_go_on else str(error)) from None
    store = Store(api.storage_url(storage))
    steps = [
        f"every trial in the browser:  hpo dashboard{suffix}",
        f"train the best trial again:  hpo export {study} --output best.toml{suffix}",
    ]
    print_answer(console, store.study(study), result.trials, result.best, next_steps=steps)


@main.command("list")
@json_option
@storage_option
def list_command(as_json: bool, storage: str | None) -> None:
    """List the studies in the store.

    \b
    hpo list --json
    """
    from hpo import api
    from hpo.display import print_table

    found = api.studies(storage=storage)
    if as_json:
        _print_json(found)
        return
    print_table(
        ["study", *STATES, ""],
        ([row["study"], *(row["trials"].get(state, 0) for state in STATES), row["stop"] or ""] for row in found),
    )


@main.command("status")
@click.argument("study", metavar="STUDY")
@json_option
@storage_option
def status_command(study: str, as_json: bool, storage: str | None) -> None:
    """Show where STUDY stands: trials by state, the best so far, workers and what they train.

    \b
    hpo status quickstart
    """
    from hpo import api
    from hpo.display import as_text, in_words, peak_in_words, print_table

    found = api.status(study, storage=storage)
    if as_json:
        _print_json(found)
        return
    counts = ", ".join(f"{found['trials'][state]} {state}" for state in STATES if state in found["trials"])
    click.echo(f"study {study}: {counts}")
    if found["stop"]:
        click.echo(f"stopped ({found['stop_reason']}); go on with: hpo resume {study}")
    if found["best"]:
        best = found["best"]
        click.echo(f"best so far: {in_words(best['params'])}, value {best['value']:.4f}, trial {best['trial']}")
    if found["peak"] and found["peak"]["fitted"] and found["trials"].keys() & {"waiting", "running"}:
        click.echo(peak_in_words(found["peak"]["lr"], found["peak"]["epochs"]))
    if found["workers"]:
        columns = ["host", "pid", "device", "trial", "epoch", "seen_s"]
        print_table(
            [*columns[:-1], "last sign of life"],
            (
                [*(as_text((worker | lane)[column]) for column in columns[:-1]), f"{worker['seen_s']} s ago"]
                for worker in found["workers"]
                for lane in worker["lanes"] or [{}]
            ),
        )
    else:
        click.echo("no workers")


@main.command("trials")
@click.argument("study", metavar="STUDY")
@json_option
@storage_option
def trials_command(study: str, as_json: bool, storage: str | None) -> None:
    """List the trials of STUDY; with --json also their curves.

    \b
    hpo trials quickstart --json
    """
    from hpo import api
    from hpo.display import as_text, in_words, print_table

    found = api.trials(study, storage=storage)
    if as_json:
        _print_json(found)
        return
    print_table(
        ["trial", "state", "values", "value", "epochs", "attempt", "seconds", "why it ended"],
        (
            [row["number"], row["state"], in_words(row["params"]), as_text(row["value"]), len(row["epochs"]),
             row["attempt"], as_text(row["duration_s"]), as_text(row["reason"])]
            for row in found
        ),
    )  # fmt: skip


@main.command("best")
@click.argument("study", metavar="STUDY")
@json_option
@storage_option
def best_command(study: str, as_json: bool, storage: str | None) -> None:
    """Print the answer of STUDY: the best learning rate, how sure that is, and what to beware of.

    \b
    hpo best quickstart --json
    """
    from hpo import api
    from hpo.display import answer_lines
    from hpo.store import Store

    found = api.best(study, storage=storage)
    if as_json:
        _print_json(found.as_dict())
        return
    for line in answer_lines(Store(api.storage_url(storage)).study(study), found):
        click.echo(line)


@main.command("export")
@click.argument("study", metavar="STUDY")
@click.option("--output", required=True, metavar="FILE", help="A study file (.toml), or that and the answer (.json).")
@storage_option
def export_command(study: str, output: str, storage: str | None) -> None:
    """Write the best trial of STUDY as a study file that trains it alone.

    \b
    hpo export quickstart --output best.toml
    """
    from hpo import api

    api.write_export(study, output, storage=storage)
    click.echo(f"wrote {output}")


@main.command("stop")
@click.argument("study", metavar="STUDY")
@storage_option
def stop_command(study: str, storage: str | None) -> None:
    """Ask every worker of STUDY to let go of its trial after its epoch, and leave.

    \b
    hpo stop quickstart
    """
    from hpo import api

    if api.stop(study, storage=storage):
        click.echo(f"study {study} will stop after this epoch; go on with: hpo resume {study}")
    else:
        click.echo(f"study {study} is finished; there is nothing to stop")


@main.command("copy")
@click.argument("study", metavar="STUDY")
@click.option("--to", required=True, metavar="URL", callback=no_password, help="The other store.")
@storage_option
def copy_command(study: str, to: str, storage: str | None) -> None:
    """Copy STUDY with its trials, curves and checkpoints into another store, where it can go on.

    \b
    hpo copy quickstart --to postgresql+psycopg://hpo@database/hpo
    """
    from rich.progress import Progress

    from hpo import api

    with Progress(transient=True) as progress:
        task = progress.add_task("copying trials", total=None)
        url = api.copy(
            study, to=to, storage=storage, progress=lambda done, of: progress.update(task, completed=done, total=of)
        )
    click.echo(f"copied to {url}; go on there with: hpo resume {study} --storage {shlex.quote(to)}")


@main.group("storage")
def storage_command() -> None:
    """Look after the store itself.

    \b
    hpo storage check
    hpo storage upgrade
    """


@storage_command.command("upgrade")
@storage_option
def storage_upgrade_command(storage: str | None) -> None:
    """Bring a store of an older version to this one; make the tables of an empty one."""
    from hpo import api

    for line in api.upgrade_storage(storage=storage):
        click.echo(line)


@storage_command.command("check")
@storage_option
def storage_check_command(storage: str | None) -> None:
    """Say what the store is, and whether everything in it agrees; exit code 1 where it does not."""
    from hpo import api

    lines, problems = api.check_storage(storage=storage)
    for line in [*lines, *problems]:
        click.echo(line)
    if problems:
        sys.exit(1)
    click.echo("no problem found")


@main.command("dashboard")
@click.option("--host", default="127.0.0.1", show_default=True, help="Where to listen; beyond loopback with a login.")
@click.option("--port", default=8080, show_default=True, help="0 takes a free one.")
@click.option("--auth-file", metavar="FILE", help="Who may log in: an htpasswd file with bcrypt hashes.")
@click.option("--add-user", metavar="NAME", help="Ask for NAME's password, write it to --auth-file, and end.")
@click.option(
    "--allow-host", "allow_hosts", multiple=True, metavar="NAME", help="A name that it is reached by from elsewhere."
)
@storage_option
def dashboard_command(
    host: str, port: int, auth_file: str | None, add_user: str | None, allow_hosts: tuple[str, ...], storage: str | None
) -> None:
    """Serve optuna-dashboard for the store, read-only; to other machines, only behind a login.

    The password travels unencrypted: where the network is not trusted, put a proxy with TLS in front.

    \b
    hpo dashboard --port 8080
    hpo dashboard --auth-file logins --add-user ada
    hpo dashboard --auth-file logins --host 0.0.0.0
    """
    from pathlib import Path

    from hpo import api, dashboard

    if add_user is not None:
        if auth_file is None:
            raise UserError("--add-user needs --auth-file FILE, which the login is written to")
        dashboard.check_login_name(add_user)
        if sys.stdin.isatty():
            password = click.prompt(f"password of {add_user}", hide_input=True, confirmation_prompt=True)
        else:
            password = sys.stdin.buffer.readline().decode("utf-8", "surrogateescape").rstrip("\r\n")
        dashboard.add_login(Path(auth_file), add_user, password)
        click.echo(f"{auth_file}: {add_user} can log in; a dashboard that runs already must be started again")
        return

    from hpo.store import Store

    def ready(url: str) -> None:
        click.echo(f"dashboard: {url} (Ctrl-C ends it)")
        if auth_file is not None:
            click.echo(f"log in as in {auth_file}; the password travels unencrypted, unless a TLS proxy is in front")

    dashboard.serve(
        Store(api.storage_url(storage)).storage,
        host=host,
        port=port,
        auth_file=auth_file,
        allow_hosts=allow_hosts,
        ready=ready,
    )


@main.command("doctor")
@json_option
@storage_option
def doctor_command(as_json: bool, storage: str | None) -> None:
    """Say what is here of devices, versions, data and the store, and what to do about it.

    \b
    hpo doctor
    """
    from dataclasses import asdict

    from hpo.doctor import examine

    findings = examine(storage=storage)
    if as_json:
        _print_json([asdict(finding) for finding in findings])
        return
    width = max(len(finding.subject) for finding in findings)
    for finding in findings:
        click.echo(f"{finding.subject:<{width}}  {finding.found}")
        if finding.advice:
            click.echo(f"{'':<{width}}  -> {finding.advice}")


def _folder(path: str) -> str:
    from pathlib import Path

    return str(Path(path).resolve().parent)


def _print_json(value: Any) -> None:
    click.echo(json.dumps(value, indent=2, allow_nan=False))
