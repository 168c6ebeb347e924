"""The command line, a thin layer over `hpo.api`: its entry point and the commands that train.

It loads neither torch nor Optuna before a command needs them.
"""

from __future__ import annotations

import atexit
import gc
import shlex
import signal
import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, NoReturn

import click

from hpo._version import __version__
from hpo.cli.first_steps import init_command
from hpo.cli.options import (
    allow_option,
    command_line,
    confirm,
    devices_option,
    executor_options,
    json_option,
    overrides_option,
    repeated,
    storage_option,
    verbose_option,
    worker_arguments,
    yes_option,
)
from hpo.cli.reading import READING_COMMANDS
from hpo.cli.stores import STORE_COMMANDS
from hpo.cli.streams import outlive_readers
from hpo.cli.writer import print_json, say, say_error
from hpo.errors import StudyStopped, UserError
from hpo.system.readable import prepare_output
from hpo.workers.executors import Executor, InProcess, Local

if TYPE_CHECKING:
    from hpo.api.reading import Result
    from hpo.config.study_spec import StudySpec


class MainGroup(click.Group):
    """The group of all commands, which turns our errors into one message and an exit code.

    The exit code is 1 where a study cannot finish, and 2 where the request is wrong.
    """

    def main(self, *args: Any, **options: Any) -> Any:
        """Run the command line of this process."""
        outlive_readers()
        prepare_output()
        try:
            return super().main(*args, **options)
        except UserError as error:
            _exit_with(error, error.exit_code)
        except StudyStopped as error:
            _exit_with(error, 1)
        except Exception as error:
            if _is_store_error(error):
                _exit_with(f"the store failed: {getattr(error, 'orig', None) or error.__cause__ or error}", 1)
            raise


def _is_store_error(error: Exception) -> bool:
    if "hpo.store.retry" not in sys.modules:
        return False
    from hpo.store.retry import STORE_ERRORS

    return isinstance(error, STORE_ERRORS)


def _exit_with(message: object, code: int) -> None:
    say_error(f"hpo: {message}")
    sys.exit(code)


def _skip_last_collection() -> None:
    """Keep Python from one last garbage collection at its end, which takes half a second.

    With torch it must collect: otherwise the libraries of torch report leaks.
    """
    if "torch" not in sys.modules:
        gc.freeze()


@click.group(cls=MainGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="hpo")
def main() -> None:
    """Which learning rate should I train this network with?

    \b
    hpo run quickstart      search, watch, get the answer
    hpo best quickstart     the answer again
    hpo init flowers        write a study of your own, flowers.toml
    hpo dashboard           every trial and its curves in the browser
    """
    atexit.register(_skip_last_collection)


@main.command("run", short_help="Run a study to its answer.")
@click.argument("spec", metavar="SPEC")
@overrides_option
@click.option("--in-process", is_flag=True, help="Train in this process, without workers: for a debugger.")
@click.option("--detach", is_flag=True, help="Leave the study to the Ray cluster, and return at once.")
@click.option("--fresh", is_flag=True, help="Delete the study of that name first, and start anew.")
@yes_option
@verbose_option
@executor_options
@storage_option
def run_command(
    spec: str,
    overrides: tuple[str, ...],
    detach: bool,
    fresh: bool,
    yes: bool,
    verbose: bool,
    executor: Executor,
    storage: str | None,
) -> None:
    """Run the study file SPEC to its answer, or resume it.

    SPEC may also be the name of a study that comes with hpo. A finished study is answered from the store, without
    training. A study file with [[compare]] holds several studies: they run one after the other, and are then compared.

    \b
    hpo run quickstart
    hpo run studies/tpe.toml --set search.trials=40 --set training.optimizer=sgd
    hpo run studies/tpe.toml --on auto --resource num_cpus=4 --detach
    """
    from hpo.api import reading, running
    from hpo.config.study_file import find_study_file
    from hpo.config.study_spec import StudySpec
    from hpo.display.terminal import print_comparison

    specs = StudySpec.all_from_toml(spec, overrides=overrides)
    folder = str(find_study_file(spec).resolve().parent)
    again = command_line("run", spec, *repeated("--set", overrides), *worker_arguments(executor))
    if detach:
        if isinstance(executor, InProcess):
            raise UserError("--in-process cannot be used with --detach")
        _confirm_fresh(specs if fresh else [], storage=storage, yes=yes)
        _submit_all(specs, executor=executor, storage=storage, code_folder=folder, fresh=fresh)
        return
    for parsed in specs[1:]:  # a mistake in the last one must not show up only after hours
        running.check(parsed, executor=executor, storage=storage, code_folder=folder)
    _confirm_fresh(specs if fresh else [], storage=storage, yes=yes)
    answered, unanswered = [], None
    for parsed in specs:
        try:
            train = partial(running.run, parsed, executor=executor, storage=storage, code_folder=folder, fresh=fresh)
            _train_and_print_answer(train, parsed.name, storage, verbose=verbose, again=again)
            answered.append(parsed.name)
        except StudyStopped as error:
            if error.can_resume:
                raise
            unanswered = error  # this study has ended without an answer; the others may have one
    if len(answered) > 1:
        print_comparison(reading.compare(answered, storage=storage))
    if unanswered is not None:
        raise unanswered


def _confirm_fresh(specs: Sequence[StudySpec], *, storage: str | None, yes: bool) -> None:
    """Say what --fresh deletes of these studies, and ask."""
    from hpo.analysis.text import counts_text
    from hpo.api import stores

    for spec in specs:
        try:
            store, study = stores.open_study(spec.name, storage=storage)
        except UserError:  # there is no such study, or no store
            continue
        counts = counts_text(store.trials.get_all(study))
        say(f"study {spec.name} will be deleted, with its logs and checkpoints: {counts}")
        confirm("delete it and start anew?", yes=yes, command="hpo run --fresh")


def _submit_all(
    specs: Sequence[StudySpec], *, executor: Executor, storage: str | None, code_folder: str, fresh: bool
) -> None:
    """Start studies on the cluster, and print how to find them again."""
    from hpo.api import running

    suffix = f" --storage {shlex.quote(storage)}" if storage else ""
    for spec in specs:
        if running.submit(spec, executor=executor, storage=storage, code_folder=code_folder, fresh=fresh):
            say(f"study {spec.name} trains on the cluster without this command")
            say(f"see hpo status {spec.name}{suffix}, hpo stop {spec.name}{suffix}; hpo run attaches to it")
        else:
            say(f"study {spec.name} is finished: hpo best {spec.name}{suffix}")


@main.command("worker", short_help="Add workers to a study.")
@click.argument("study", metavar="[STUDY]", required=False)
@click.option("--stay", is_flag=True, help="Stay when the study is done, for every study of the store.")
@allow_option
@verbose_option
@executor_options
@storage_option
def worker_command(
    study: str | None, stay: bool, allow: tuple[str, ...], verbose: bool, executor: Executor, storage: str | None
) -> None:
    """Add workers of this machine, or of a Ray cluster, to STUDY until it is done.

    With --stay, workers of this machine join every study of the store, until interrupted.

    \b
    hpo worker quickstart --workers 2
    hpo worker --stay --storage postgresql+psycopg://hpo@database/hpo
    """
    from hpo.api import running

    if stay:
        if not isinstance(executor, Local):
            raise UserError("--stay is for workers of this machine; give a Ray cluster the study by its name")
        _serve_until_interrupted(study, executor=executor, allow=allow, storage=storage)
    if study is None:
        raise UserError("hpo worker needs the name of a study, or --stay for every study of the store")
    again = command_line("worker", study, *repeated("--allow", allow), *worker_arguments(executor))
    train = partial(running.join, study, executor=executor, storage=storage, allow=allow)
    _train_and_print_answer(train, study, storage, verbose=verbose, again=again)


def _serve_until_interrupted(
    study: str | None, *, executor: Local, allow: Sequence[str], storage: str | None
) -> NoReturn:
    from hpo.api import running
    from hpo.display.console import make_console
    from hpo.display.terminal import LiveDisplay

    console = make_console()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # while it waits; workers that train are drained
    try:
        with LiveDisplay(console) as progress:
            running.serve(
                study, executor=executor, storage=storage, allow=allow, watcher=progress.watch, say=console.print
            )
    except StudyStopped as error:
        if not error.interrupted:
            raise
    except KeyboardInterrupt:
        pass
    sys.exit(0)


@main.command("resume", short_help="Resume a stopped study.")
@click.argument("study", metavar="STUDY")
@click.option("--trials", type=int, metavar="N", help="Enlarge the study to N trials; finished trials stay.")
@click.option("--until", metavar="TEXT", help="A new search.until, such as '0.2 decades'.")
@click.option("--hours", type=float, metavar="H", help="A new search.hours.")
@click.option("--widen", multiple=True, metavar="KEY=LOW:HIGH", help="Widen a range, such as lr=1e-6:10.")
@click.option("--retry-failed", is_flag=True, help="Train failed trials again, each from its start.")
@allow_option
@verbose_option
@executor_options
@storage_option
def resume_command(
    study: str,
    trials: int | None,
    until: str | None,
    hours: float | None,
    widen: tuple[str, ...],
    retry_failed: bool,
    allow: tuple[str, ...],
    verbose: bool,
    executor: Executor,
    storage: str | None,
) -> None:
    """Resume STUDY after `hpo stop` or an interruption, or give its search other bounds.

    \b
    hpo resume quickstart --trials 30
    hpo resume quickstart --until "0.2 decades"
    hpo resume quickstart --widen lr=1e-6:10
    hpo resume quickstart --retry-failed
    """
    from hpo.api import running

    again = command_line("resume", study, *repeated("--allow", allow), *worker_arguments(executor))
    train = partial(
        running.resume,
        study,
        executor=executor,
        storage=storage,
        trials=trials,
        until=until,
        hours=hours,
        widen=widen,
        retry_failed=retry_failed,
        allow=allow,
    )
    _train_and_print_answer(train, study, storage, verbose=verbose, again=again)


def _train_and_print_answer(
    train: Callable[..., Result], study: str, storage: str | None, *, verbose: bool, again: str
) -> None:
    """Train with a live display, then print the answer.

    Args:
        train: Called with the display's `watcher`.
        study: The study.
        storage: The value of --storage.
        verbose: Whether to print the details of the answer.
        again: The command line that resumes the study, without --storage.
    """
    from hpo.api import stores
    from hpo.display.console import make_console
    from hpo.display.terminal import LiveDisplay, print_answer

    suffix = f" --storage {shlex.quote(storage)}" if storage else ""
    console = make_console()
    try:
        with LiveDisplay(console) as progress:
            result = train(watcher=progress.watch)
    except StudyStopped as error:
        raise StudyStopped(f"{error}\nresume with: {again}{suffix}" if error.can_resume else str(error)) from None
    store, record = stores.open_study(study, storage=storage)
    steps = [
        f"all of it as one page:  hpo report {study}{suffix}",
        f"every trial in the browser:  hpo dashboard{suffix}",
        f"train the recommended values:  hpo export {study} --output best.toml{suffix}",
    ]
    if not verbose:
        steps.insert(0, f"the details:  hpo best {study} --verbose{suffix}")
    if any(trial.state == "failed" and trial.attempt for trial in result.trials):
        steps.append(f"train the failed trials again:  hpo resume {study} --retry-failed{suffix}")
    print_answer(
        console,
        record,
        result.trials,
        result.best,
        storage=str(store.url),
        is_trained=progress.has_watched,
        verbose=verbose,
        next_steps=steps,
    )


@main.command("stop", short_help="Stop a study.")
@click.argument("study", metavar="STUDY")
@storage_option
def stop_command(study: str, storage: str | None) -> None:
    """Stop STUDY: its workers save after the current epoch and exit.

    \b
    hpo stop quickstart
    """
    from hpo.api import running

    if running.stop(study, storage=storage):
        say(f"study {study} will stop after this epoch; resume with: hpo resume {study}")
    else:
        say(f"study {study} is finished; there is nothing to stop")


@main.command("range-test", short_help="Find learning rates worth searching.")
@click.argument("spec", metavar="SPEC")
@overrides_option
@click.option("--output", metavar="FILE", help="Also plot it, in an HTML file.")
@json_option
@devices_option
def range_test_command(spec: str, overrides: tuple[str, ...], output: str | None, as_json: bool, devices: str) -> None:
    """Ramp the learning rate of SPEC's network within an epoch, to see where its loss falls and where it breaks.

    Nothing is stored. With lr = "auto" in search.space, hpo run does this by itself and searches the range found.

    \b
    hpo range-test studies/quickstart.toml
    hpo range-test studies/optimizers.toml --output ramps.html
    """
    from hpo.analysis.text import params_text
    from hpo.config.study_file import find_study_file
    from hpo.config.study_spec import StudySpec
    from hpo.display.console import make_progress
    from hpo.lr_range import resolve as ranges
    from hpo.lr_range import text
    from hpo.reports import figure_page

    if output is not None:
        figure_page.check_figure_output(output)
    parsed, folder = StudySpec.from_toml(spec, overrides=overrides), find_study_file(spec).parent
    with make_progress(disable=as_json) as progress:
        task = progress.add_task("checking data and network", total=None)
        ramps = ranges.range_test(
            parsed,
            devices=devices,
            code_folder=folder,
            progress=lambda params, done, of: progress.update(
                task, description=f"ramp {params_text(params)}".rstrip(), completed=done, total=of
            ),
        )
    found = [ramp.as_dict() for ramp in ramps]
    if output is not None:
        figure_page.write_ramp_page(found, output, title=f"Range test of {parsed.name}")
    if as_json:
        print_json(found)
        return
    for ramp in found:
        for line in text.range_test_report(ramp):
            say(line)
    if output is not None:
        say(f"wrote {output}")


for _command in (init_command, *READING_COMMANDS, *STORE_COMMANDS):
    main.add_command(_command)
