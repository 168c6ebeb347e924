"""The command line, a thin layer over `hpo.api`: its entry and the commands that train; loads no torch, no Optuna."""

from __future__ import annotations

import atexit
import gc
import shlex
import signal
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import click

from hpo._version import __version__
from hpo.cli import reading as cli_reading
from hpo.cli import stores as cli_store
from hpo.cli.options import (
    allow_option,
    command_line,
    devices_option,
    executor_options,
    json_option,
    print_json,
    repeated,
    storage_option,
    worker_arguments,
)
from hpo.errors import StudyStopped, UserError
from hpo.workers.executors import Executor, InProcess, Local

if TYPE_CHECKING:
    from hpo.api.reading import Result
    from hpo.config.study_spec import StudySpec


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
    if "hpo.store.retry" not in sys.modules:
        return False
    from hpo.store.retry import STORE_ERRORS

    return isinstance(error, STORE_ERRORS)


def _fail(message: object, code: int) -> None:
    click.echo(f"hpo: {message}", err=True)
    sys.exit(code)


def _leave_memory_alone() -> None:
    """Keeps Python's end from looking through all that was imported once more, which takes half a second."""
    if "torch" not in sys.modules:  # whose libraries would say that they leak
        gc.freeze()


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="hpo")
def main() -> None:
    """Which learning rate should I train this network with?

    \b
    hpo run studies/quickstart.toml     search, watch, get the answer
    hpo best quickstart                 the answer again
    hpo dashboard                       every trial and its learning curve in the browser
    """
    atexit.register(_leave_memory_alone)


@main.command("run")
@click.argument("spec", metavar="SPEC")
@click.option(
    "--set", "overrides", multiple=True, metavar="SECTION.KEY=VALUE", help="Change a setting of the study file."
)
@click.option("--in-process", is_flag=True, help="Train in this process, without workers: for a debugger.")
@click.option("--detach", is_flag=True, help="Leave the study to the Ray cluster, and return at once.")
@executor_options
@storage_option
def run_command(spec: str, overrides: tuple[str, ...], detach: bool, executor: Executor, storage: str | None) -> None:
    """Run the study file SPEC to its answer, or go on with it where it was interrupted.

    A study that is finished is answered from the store, without training. A study file with [[compare]] holds several
    studies, which are run one after the other and then compared.

    \b
    hpo run studies/quickstart.toml
    hpo run studies/tpe.toml --set search.trials=40 --set training.optimizer=sgd
    hpo run studies/tpe.toml --on auto --resource num_cpus=4 --detach
    """
    from hpo.api import reading, running
    from hpo.cli.display import print_comparison
    from hpo.config.study_spec import StudySpec

    specs = StudySpec.all_from_toml(spec, overrides=overrides)
    folder = str(Path(spec).resolve().parent)
    again = command_line("run", spec, *repeated("--set", overrides), *worker_arguments(executor))
    if detach:
        if isinstance(executor, InProcess):
            raise UserError("--in-process has no meaning with --detach")
        _leave(specs, executor=executor, storage=storage, code_folder=folder)
        return
    for parsed in specs[1:]:  # what is wrong with the last one is not to be found after hours
        running.check(parsed, executor=executor, storage=storage, code_folder=folder)
    answered, unanswered = [], None
    for parsed in specs:
        try:
            train = partial(running.run, parsed, executor=executor, storage=storage, code_folder=folder)
            _train(train, parsed.name, storage, again=again)
            answered.append(parsed.name)
        except StudyStopped as error:
            if error.can_resume:
                raise
            unanswered = error  # it has ended without an answer; the others need not
    if len(answered) > 1:
        print_comparison(reading.compare(answered, storage=storage))
    if unanswered is not None:
        raise unanswered


def _leave(specs: Sequence[StudySpec], *, storage: str | None, **options: Any) -> None:
    """Starts studies on the cluster and says how to find them again."""
    from hpo.api import running

    suffix = f" --storage {shlex.quote(storage)}" if storage else ""
    for spec in specs:
        if running.submit(spec, storage=storage, **options):
            click.echo(f"study {spec.name} trains on the cluster without this command")
            click.echo(f"see hpo status {spec.name}{suffix}, hpo stop {spec.name}{suffix}; hpo run attaches to it")
        else:
            click.echo(f"study {spec.name} is finished: hpo best {spec.name}{suffix}")


@main.command("worker")
@click.argument("study", metavar="[STUDY]", required=False)
@click.option("--stay", is_flag=True, help="Stay when the study is done, for every study of the store.")
@allow_option
@executor_options
@storage_option
def worker_command(
    study: str | None, stay: bool, allow: tuple[str, ...], executor: Executor, storage: str | None
) -> None:
    """Add workers of this machine, or of a Ray cluster, to STUDY until it is done.

    With --stay, workers of this machine join any study of the store, for ever.

    \b
    hpo worker quickstart --workers 2
    hpo worker --stay --storage postgresql+psycopg://hpo@database/hpo
    """
    from hpo.api import running

    if stay and not isinstance(executor, Local):
        raise UserError("--stay is for workers of this machine; give a Ray cluster the study by its name")
    if stay:
        _stay(study, executor=executor, allow=allow, storage=storage)
    if study is None:
        raise UserError("hpo worker needs the name of a study, or --stay for every study of the store")
    again = command_line("worker", study, *repeated("--allow", allow), *worker_arguments(executor))
    train = partial(running.join, study, executor=executor, storage=storage, allow=allow)
    _train(train, study, storage, again=again)


def _stay(study: str | None, *, storage: str | None, **options: Any) -> NoReturn:
    from hpo.api import running
    from hpo.cli.display import LiveDisplay, make_console

    console = make_console()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # while it waits; workers that train are drained
    try:
        with LiveDisplay(console) as progress:
            running.serve(study, storage=storage, say=console.print, watcher=progress.watch, **options)
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
@executor_options
@storage_option
def resume_command(
    study: str, trials: int | None, allow: tuple[str, ...], executor: Executor, storage: str | None
) -> None:
    """Go on with STUDY after `hpo stop` or an interruption.

    \b
    hpo resume quickstart --trials 30
    """
    from hpo.api import running

    again = command_line("resume", study, *repeated("--allow", allow), *worker_arguments(executor))
    train = partial(running.resume, study, executor=executor, storage=storage, trials=trials, allow=allow)
    _train(train, study, storage, again=again)


def _train(train: Callable[..., Result], study: str, storage: str | None, *, again: str) -> None:
    """Trains with live progress (`train` takes the `watcher` that shows it), then prints the answer."""
    from hpo.api import stores
    from hpo.cli.display import LiveDisplay, make_console, print_answer
    from hpo.store.studies import Store

    suffix = f" --storage {shlex.quote(storage)}" if storage else ""
    console = make_console()
    try:
        with LiveDisplay(console) as progress:
            result = train(watcher=progress.watch)
    except StudyStopped as error:
        raise StudyStopped(f"{error}\ngo on with: {again}{suffix}" if error.can_resume else str(error)) from None
    store = Store(stores.storage_url(storage))
    steps = [
        f"every trial in the browser:  hpo dashboard{suffix}",
        f"train the best trial again:  hpo export {study} --output best.toml{suffix}",
    ]
    print_answer(console, store.study(study), result.trials, result.best, next_steps=steps)


@main.command("stop")
@click.argument("study", metavar="STUDY")
@storage_option
def stop_command(study: str, storage: str | None) -> None:
    """Ask every worker of STUDY to let go of its trial after its epoch, and leave.

    \b
    hpo stop quickstart
    """
    from hpo.api import running

    if running.stop(study, storage=storage):
        click.echo(f"study {study} will stop after this epoch; go on with: hpo resume {study}")
    else:
        click.echo(f"study {study} is finished; there is nothing to stop")


@main.command("range-test")
@click.argument("spec", metavar="SPEC")
@click.option(
    "--set", "overrides", multiple=True, metavar="SECTION.KEY=VALUE", help="Change a setting of the study file."
)
@click.option("--output", metavar="FILE", help="Also plot it, in an HTML file.")
@json_option
@devices_option
def range_test_command(
    spec: str, overrides: tuple[str, ...], output: str | None, as_json: bool, devices: str
) -> None:  # fmt: skip
    """Ramp the learning rate of SPEC's network over less than an epoch: where does its loss fall, where does it break?

    Nothing is stored. With lr = "auto" in search.space, hpo run does this by itself and searches the range found.

    \b
    hpo range-test studies/quickstart.toml
    hpo range-test studies/optimizers.toml --output ramps.html
    """
    from rich.progress import Progress

    from hpo.analysis.text import params_text
    from hpo.cli.display import make_console
    from hpo.config.study_spec import StudySpec
    from hpo.lr_range import resolve as ranges
    from hpo.lr_range import text
    from hpo.report import ramp_page

    if output is not None:
        ramp_page.check_ramp_output(output)
    parsed = StudySpec.from_toml(spec, overrides=overrides)
    with Progress(transient=True, disable=as_json or not make_console().is_terminal) as progress:
        task = progress.add_task("checking data and network", total=None)
        tested = ranges.range_test(
            parsed,
            devices=devices,
            code_folder=Path(spec).parent,
            progress=lambda params, done, of: progress.update(
                task, description=f"ramp {params_text(params)}".rstrip(), completed=done, total=of
            ),
        )
    found = [one.as_dict() for one in tested]
    if output is not None:
        ramp_page.write_ramp_page(found, output, title=f"Range test of {parsed.name}")
    if as_json:
        print_json(found)
        return
    for one in found:
        for line in text.range_test_report(one):
            click.echo(line)
    if output is not None:
        click.echo(f"wrote {output}")


for _command in (*cli_reading.COMMANDS, *cli_store.COMMANDS):
    main.add_command(_command)
