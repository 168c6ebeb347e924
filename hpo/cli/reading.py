"""The commands that read studies: list, status, trials, best, compare, report, export, log."""

from __future__ import annotations

import gc
from typing import Any

import click

from hpo.cli.options import command_line, json_option, storage_option, verbose_option
from hpo.cli.writer import print_json, print_json_list, say
from hpo.errors import UserError
from hpo.system.readable import one_line

MAX_TRIALS = 100  # that `hpo trials` shows, unless it is asked for all


class ShortCommand(click.Command):
    """A command that reads, prints and ends.

    It needs no garbage collection, which would look at all that was read again and again: a quarter of the time where a
    study has 5,000 trials.
    """

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command."""
        was_enabled = gc.isenabled()
        gc.disable()
        try:
            return super().invoke(ctx)
        finally:
            if was_enabled:
                gc.enable()


@click.command("list", cls=ShortCommand, short_help="List the studies in a store.")
@json_option
@storage_option
def list_command(as_json: bool, storage: str | None) -> None:
    """List the studies in the store.

    \b
    hpo list --json
    """
    from hpo.api import reading
    from hpo.display.console import print_table
    from hpo.study.records import STATES

    found = reading.studies(storage=storage)
    if as_json:
        print_json(found)
        return
    print_table(
        ["study", *STATES, ""],
        (
            [
                row["study"],
                *(row["trials"].get(state, 0) for state in STATES),
                "damaged" if row["damaged"] else row["stop"] or "",
            ]
            for row in found
        ),
    )
    for row in found:
        if row["damaged"]:
            say(row["damaged"])


@click.command("status", cls=ShortCommand, short_help="Show where a study stands.")
@click.argument("study", metavar="STUDY")
@json_option
@storage_option
def status_command(study: str, as_json: bool, storage: str | None) -> None:
    """Show where STUDY stands: its trials by state, the best one so far, its workers and what they train.

    \b
    hpo status quickstart
    """
    from hpo.analysis.text import cell_text, metric_text, params_text, peak_text, value_text
    from hpo.api import reading, stores
    from hpo.display.console import print_table
    from hpo.study.records import STATES

    store, record = stores.open_study(study, storage=storage)
    found = reading.status_of(store, record)
    if as_json:
        print_json(found)
        return
    counts = ", ".join(f"{found['trials'][state]} {state}" for state in STATES if state in found["trials"])
    say(f"study {study}: {counts}")
    if found["race"]:
        race = found["race"]
        say(f"race: {race['epochs']} of {race['budget']} epochs; trials wait for each other at its rungs")
    if found["stop"]:
        reason, *others = str(found["stop_reason"]).split("\n")
        say(f"stopped ({reason}); resume with: hpo resume {study}")
        for line in others:
            say(f"  {line}")  # such as a traceback; no line of it can pass for one of ours
    if found["search_end"]:
        say(found["search_end"])
    if found["best"]:
        best, metric = found["best"], metric_text(record)
        if best["confirmation"]:
            confirmed = value_text(best["confirmation"]["value"], record)
            say(f"confirmed: {params_text(best['recommended'])}, {metric} {confirmed}")
        else:
            say(f"recommended so far: {params_text(best['recommended'])}")
        value = value_text(best["value"], record)
        say(f"best trial so far: {params_text(best['params'])}, {metric} {value}, trial {best['trial']}")
    if found["peak"] and found["peak"]["interval"] and found["trials"].keys() & {"waiting", "running"}:
        say(peak_text(found["peak"]["lr"], found["peak"]["interval"]))
    if found["workers"]:
        columns = ["host", "pid", "device", "trial", "epoch", "seen_s"]
        print_table(
            [*columns[:-1], "last seen"],
            (
                [*(cell_text((worker | lane)[column]) for column in columns[:-1]), f"{worker['seen_s']} s ago"]
                for worker in found["workers"]
                for lane in worker["lanes"] or [{}]
            ),
        )
    else:
        say("no workers")
    for failed in found["failed_devices"]:
        say(f"failed device: {failed['device']} of {failed['host']} ({failed['failures']}x): {failed['reason']}")


@click.command("trials", cls=ShortCommand, short_help="List the trials of a study.")
@click.argument("study", metavar="STUDY")
@click.option("--all", "show_all", is_flag=True, help=f"List all trials. Default: the last {MAX_TRIALS} that began.")
@json_option
@storage_option
def trials_command(study: str, show_all: bool, as_json: bool, storage: str | None) -> None:
    """List the latest trials of STUDY; with --json, all trials and their curves.

    \b
    hpo trials quickstart --all
    hpo trials quickstart --json
    """
    from hpo.api import stores
    from hpo.display.terminal import print_trials
    from hpo.study.records import trial_as_dict

    store, record = stores.open_study(study, storage=storage)
    if as_json:
        print_json_list(map(trial_as_dict, store.trials.get_all(record)))
        return
    trials = store.trials.get_all(record, latest=None if show_all else MAX_TRIALS)
    print_trials(record, trials)
    if not show_all and (total := sum(store.trials.counts(record.study_id).values())) > len(trials):
        again = command_line("trials", study, "--all", *(("--storage", storage) if storage else ()))
        say(f"trials {trials[0].number} to {trials[-1].number} of {total}; all of them: {again}")


@click.command("best", cls=ShortCommand, short_help="Print the answer of a study.")
@click.argument("study", metavar="STUDY")
@verbose_option
@json_option
@storage_option
def best_command(study: str, verbose: bool, as_json: bool, storage: str | None) -> None:
    """Print the answer of STUDY: the best learning rate, how sure it is, and the warnings.

    \b
    hpo best quickstart --verbose
    hpo best quickstart --json
    """
    from hpo.analysis.answer_text import answer_lines, source_text
    from hpo.api import reading, stores
    from hpo.display.console import make_console
    from hpo.display.terminal import broken_line

    store, record = stores.open_study(study, storage=storage)
    trials = store.trials.get_all(record)
    found = reading.answer_of(record, trials)
    if as_json:
        print_json(found.as_dict())
        return
    source = source_text(record, trials, storage=str(store.url), is_trained=False)
    width = make_console().width
    for line in answer_lines(record, found, source=source, verbose=verbose):
        for part in broken_line(one_line(line), width):
            say(part)


@click.command("compare", cls=ShortCommand, short_help="Compare studies side by side.")
@click.argument("studies", metavar="STUDY...", nargs=-1, required=True)
@click.option("--output", metavar="FILE", help="Also draw it: .html, .png or .svg.")
@json_option
@storage_option
def compare_command(studies: tuple[str, ...], output: str | None, as_json: bool, storage: str | None) -> None:
    """Compare the best learning rates of studies, and print what can and cannot be concluded.

    The others are compared with the first one. A study that searched lists, such as the optimizer, is one side for
    each combination of them.

    \b
    hpo compare mnist-adam mnist-sgd
    hpo compare mnist-adam mnist-sgd --output compared.html
    """
    from hpo.api import reading
    from hpo.display.terminal import print_comparison
    from hpo.reports import figure_page

    if output is not None:
        figure_page.check_figure_output(output, suffixes=(".html", ".png", ".svg"))
    found = reading.compare(studies, storage=storage)
    if output is not None:
        figure_page.write_comparison(found, output)
    if as_json:
        print_json(found.as_dict())
        return
    print_comparison(found)
    if output is not None:
        say(f"wrote {output}")


@click.command("report", short_help="Write the report of a study.")
@click.argument("study", metavar="STUDY")
@click.option("--output", metavar="FILE", help="Default: STUDY.html, or STUDY with the format's ending.")
@click.option("--format", "form", metavar="FORMAT", help="html, png, svg, md or json. Default: what FILE ends in.")
@click.option(
    "--figure", default="response", show_default=True, metavar="NAME", help="The figure that a png or svg shows."
)
@storage_option
def report_command(study: str, output: str | None, form: str | None, figure: str, storage: str | None) -> None:
    """Write what STUDY has found as one page that needs no network, or as a figure for a paper.

    \b
    hpo report quickstart --output quickstart.html
    hpo report quickstart --output response.svg --figure response
    """
    from hpo.api import exporting

    say(f"wrote {exporting.report(study, output, form=form, figure=figure, storage=storage)}")


@click.command("export", short_help="Export the recommended values.")
@click.argument("study", metavar="STUDY")
@click.option("--output", metavar="FILE", help="A study file (.toml), or that and the answer (.json).")
@click.option("--weights", metavar="FILE", help="The trained weights (.safetensors), with a JSON file next to them.")
@click.option("--trial", type=int, metavar="N", help="Export this trial. Default: what the study recommends.")
@storage_option
def export_command(study: str, output: str | None, weights: str | None, trial: int | None, storage: str | None) -> None:
    """Write what STUDY recommends: a study file that trains only that, or the trained weights.

    \b
    hpo export quickstart --output best.toml
    hpo export quickstart --weights best.safetensors
    hpo export quickstart --output third.toml --trial 3
    """
    if output is None and weights is None:
        raise UserError("hpo export needs --output FILE, --weights FILE, or both")
    if output is not None:
        from hpo.api import exporting

        exporting.write_export(study, output, trial=trial, storage=storage)
        say(f"wrote {output}")
    if weights is not None:
        from hpo.api import trained_weights

        found = trained_weights.write_weights(study, weights, trial=trial, storage=storage)
        say(f"wrote {weights}: the weights of trial {found['trial']} after epoch {found['epoch']}")


@click.command("log", short_help="Log trials to TensorBoard, MLflow, W&B.")
@click.argument("study", metavar="STUDY")
@click.option(
    "--to",
    multiple=True,
    required=True,
    metavar="KIND[=TARGET]",
    help="tensorboard=DIR, mlflow=URI or wandb=PROJECT; may be given several times.",
)
@click.option("--follow", is_flag=True, help="Keep running until the study has ended or was stopped.")
@storage_option
def log_command(study: str, to: tuple[str, ...], follow: bool, storage: str | None) -> None:
    """Write the trials of STUDY as runs to TensorBoard, MLflow or Weights & Biases.

    Only what is not there yet is written, so the command may be given again at any time.

    \b
    hpo log quickstart --to tensorboard=runs
    hpo log quickstart --to mlflow=sqlite:///mlflow.db --to wandb=my-project --follow
    """
    from hpo.api import logging

    logging.log(study, to, storage=storage, follow=follow, say=say)


READING_COMMANDS = (
    list_command,
    status_command,
    trials_command,
    best_command,
    compare_command,
    report_command,
    export_command,
    log_command,
)
