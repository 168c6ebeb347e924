"""The command line: a thin layer over `hpo.api`. Importing it loads neither torch nor Optuna."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import click

from hpo import __version__
from hpo.errors import StudyStopped, UserError

if TYPE_CHECKING:
    from hpo.api import Result

STATES = ("waiting", "running", "complete", "pruned", "diverged", "failed")


class _Group(click.Group):
    """Turns our errors into one message and an exit code: 1 the study could not finish, 2 the request was wrong."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except UserError as error:
            _fail(error, 2)
        except StudyStopped as error:
            _fail(error, 1)
        except Exception as error:
            if _is_of_the_store(error):
                _fail(f"the store failed: {getattr(error, 'orig', None) or error.__cause__ or error}", 1)
            raise


def _is_of_the_store(error: Exception) -> bool:
    if "hpo.ledger" not in sys.modules:
        return False
    from hpo.ledger import STORE_ERRORS

    return isinstance(error, STORE_ERRORS)


def _fail(message: object, code: int) -> None:
    click.echo(f"hpo: {message}", err=True)
    sys.exit(code)


def _storage_option(command: Callable[..., Any]) -> Callable[..., Any]:
    return click.option("--storage", metavar="URL", help="The store. Default: HPO_STORAGE, else sqlite:///hpo.db.")(
        command
    )


def _json_option(command: Callable[..., Any]) -> Callable[..., Any]:
    return click.option("--json", "as_json", is_flag=True, help="Print JSON.")(command)


def _worker_options(command: Callable[..., Any]) -> Callable[..., Any]:
    command = click.option(
        "--workers",
        type=int,
        metavar="N",
        help="Worker processes. Default: one a device. The CPU's threads are divided.",
    )(command)
    return click.option(
        "--devices", default="auto", show_default=True, metavar="LIST",
        help="auto: every free GPU, else the CPU. Or a list: cpu, mps, cuda, cuda:0,cuda:1.",
    )(command)  # fmt: skip


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
@_worker_options
@_storage_option
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
    again = _command("run", spec, *options, *_worker_arguments(devices, workers), *["--in-process"][: int(in_process)])
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
@click.argument("study", metavar="STUDY")
@_worker_options
@_storage_option
def worker_command(study: str, devices: str, workers: int | None, storage: str | None) -> None:
    """Add workers of this machine to STUDY until it is done.

    \b
    hpo worker quickstart --workers 2
    """
    from hpo import api

    again = _command("worker", study, *_worker_arguments(devices, workers))
    _train(
        lambda watcher: api.join(study, storage=storage, devices=devices, workers=workers, watcher=watcher),
        study, storage, again=again,
    )  # fmt: skip


@main.command("resume")
@click.argument("study", metavar="STUDY")
@click.option("--trials", type=int, metavar="N", help="Enlarge the study to N trials; what was trained stays.")
@_worker_options
@_storage_option
def resume_command(study: str, trials: int | None, devices: str, workers: int | None, storage: str | None) -> None:
    """Go on with STUDY after `hpo stop` or an interruption.

    \b
    hpo resume quickstart --trials 30
    """
    from hpo import api

    again = _command("resume", study, *_worker_arguments(devices, workers))
    _train(
        lambda watcher: api.resume(
            study, storage=storage, trials=trials, devices=devices, workers=workers, watcher=watcher
        ),
        study, storage, again=again,
    )  # fmt: skip


def _train(train: Callable[[Any], Result], study: str, storage: str | None, *, again: str) -> None:
    """Trains with live progress, then prints the answer."""
    from hpo import api
    from hpo.database import masked
    from hpo.display import Progress, make_console, print_answer
    from hpo.store import Store

    suffix = f" --storage {shlex.quote(masked(storage))}" if storage else ""
    console = make_console()
    try:
        with Progress(console) as progress:
            result = train(progress.watch)
    except StudyStopped as error:
        raise StudyStopped(f"{error}\ngo on with: {again}{suffix}" if error.can_go_on else str(error)) from None
    store = Store(api.storage_url(storage))
    steps = [
        f"every trial in the browser:  hpo dashboard{suffix}",
        f"train with it, and only it:  hpo export {study} --output best.toml{suffix}",
    ]
    print_answer(console, store.study(study), result.trials, result.best, next_steps=steps)


@main.command("list")
@_json_option
@_storage_option
def list_command(as_json: bool, storage: str | None) -> None:
    """List the studies in the store.

    \b
    hpo list --json
    """
    from hpo import api

    found = api.studies(storage=storage)
    if as_json:
        _print_json(found)
        return
    _print_table(
        ["study", *STATES, ""],
        ([row["study"], *(row["trials"].get(state, 0) for state in STATES), row["stop"] or ""] for row in found),
    )


@main.command("status")
@click.argument("study", metavar="STUDY")
@_json_option
@_storage_option
def status_command(study: str, as_json: bool, storage: str | None) -> None:
    """Show where STUDY stands: trials by state, the best so far, workers and what they train.

    \b
    hpo status quickstart
    """
    from hpo import api

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
        click.echo(f"best so far: {_values(best['params'])}, value {best['value']:.4f}, trial {best['trial']}")
    if found["workers"]:
        columns = ["host", "pid", "device", "trial", "epoch", "seen_s"]
        _print_table(
            [*columns[:-1], "last sign of life"],
            (
                [*(_text(worker[column]) for column in columns[:-1]), f"{worker['seen_s']} s ago"]
                for worker in found["workers"]
            ),
        )
    else:
        click.echo("no workers")


@main.command("trials")
@click.argument("study", metavar="STUDY")
@_json_option
@_storage_option
def trials_command(study: str, as_json: bool, storage: str | None) -> None:
    """List the trials of STUDY; with --json also their curves.

    \b
    hpo trials quickstart --json
    """
    from hpo import api

    found = api.trials(study, storage=storage)
    if as_json:
        _print_json(found)
        return
    _print_table(
        ["trial", "state", "values", "value", "epochs", "attempt", "seconds", "why it ended"],
        (
            [row["number"], row["state"], _values(row["params"]), _text(row["value"]), len(row["epochs"]),
             row["attempt"], _text(row["duration_s"]), _text(row["reason"])]
            for row in found
        ),
    )  # fmt: skip


@main.command("best")
@click.argument("study", metavar="STUDY")
@_json_option
@_storage_option
def best_command(study: str, as_json: bool, storage: str | None) -> None:
    """Print the best trial of STUDY and the learning rates that did as well.

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
@_storage_option
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
@_storage_option
def stop_command(study: str, storage: str | None) -> None:
    """Ask every worker of STUDY to let go of its trial after its epoch, and leave.

    \b
    hpo stop quickstart
    """
    from hpo import api

    if api.stop(study, storage=storage):
        click.echo(f"study {study} will stop within an epoch; go on with: hpo resume {study}")
    else:
        click.echo(f"study {study} is finished; there is nothing to stop")


@main.command("dashboard")
@click.option("--host", default="127.0.0.1", show_default=True, help="A loopback address: there is no login.")
@click.option("--port", default=8080, show_default=True, help="0 takes a free one.")
@_storage_option
def dashboard_command(host: str, port: int, storage: str | None) -> None:
    """Serve optuna-dashboard for the store, read-only, on this machine.

    \b
    hpo dashboard --port 8080
    """
    from hpo import api, dashboard
    from hpo.store import Store

    def ready(url: str) -> None:
        click.echo(f"dashboard: {url} (Ctrl-C ends it)")

    dashboard.serve(Store(api.storage_url(storage)).storage, host=host, port=port, ready=ready)


@main.command("doctor")
@_json_option
@_storage_option
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


def _worker_arguments(devices: str, workers: int | None) -> list[tuple[str, str]]:
    return [("--devices", devices)] * (devices != "auto") + [("--workers", str(workers))] * (workers is not None)


def _command(*arguments: str | tuple[str, str]) -> str:
    """A command line that can be pasted into a shell as it is."""
    words = [word for argument in arguments for word in ([argument] if isinstance(argument, str) else argument)]
    return shlex.join(["hpo", *words])


def _folder(path: str) -> str:
    from pathlib import Path

    return str(Path(path).resolve().parent)


def _print_json(value: Any) -> None:
    click.echo(json.dumps(value, indent=2, allow_nan=False))


def _print_table(columns: list[str], rows: Iterable[list[Any]]) -> None:
    from rich import box
    from rich.table import Table

    from hpo.display import make_console

    table = Table(*columns, box=box.SIMPLE_HEAD)
    for row in rows:
        table.add_row(*map(str, row))
    make_console().print(table)


def _values(params: dict[str, Any]) -> str:
    return " ".join(
        f"{key}={value:.4g}" if isinstance(value, float) else f"{key}={value}" for key, value in params.items()
    )


def _text(value: Any) -> str:
    return "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)
