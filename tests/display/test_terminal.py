"""What a terminal shows while a study runs, on a real (pseudo-)terminal driven by tmux."""

from __future__ import annotations

import io
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from hpo.analysis.answer import find_best
from hpo.analysis.answer_text import answer_lines, describe_answer, source_text
from hpo.config.study_spec import StudySpec
from hpo.display import terminal
from hpo.display.console import PlainConsole
from hpo.display.terminal import LiveDisplay, _trials_table, broken_line, print_trials
from hpo.store.store import Store
from tests.analysis.examples import LOG_LR, SEARCHED, complete, hill, make_study, numbered, trained
from tests.conftest import Hpo

LOOP = """
import pathlib, time
def train(trial):
    for epoch in range(1, trial.epochs + 1):
        if trial.report(epoch, val_accuracy=0.5 + 0.04 * epoch, train_loss=1 / epoch):
            return
        while trial.number == 1 and epoch == 3 and not pathlib.Path("go").exists():
            time.sleep(0.02)
"""
STUDY = """
name = "live"
[search]
sampler = "grid"
[search.space]
lr = [1e-3, 1e-2]
[training]
epochs = 8
[objective]
function = "loop:train"
"""


@pytest.mark.skipif(shutil.which("tmux") is None, reason="tmux is not installed")
def test_a_terminal_shows_the_study_each_running_trial_the_best_and_then_the_answer(
    tmp_path: Path, wait_for: Callable[..., Any]
) -> None:
    (tmp_path / "loop.py").write_text(LOOP)
    (tmp_path / "live.toml").write_text(STUDY)
    tmux = ["tmux", "-L", f"hpo-test-{os.getpid()}"]
    command = f"{sys.executable} -m hpo run live.toml --devices cpu; echo exit code $?; sleep 60"
    subprocess.run(
        [*tmux, "-f", "/dev/null", "new-session", "-d", "-x", "120", "-y", "40", "-c", tmp_path, command], check=True
    )

    def screen() -> str:
        return subprocess.run([*tmux, "capture-pane", "-p"], capture_output=True, text=True, check=True).stdout

    def shown(pattern: str) -> str:
        return str(wait_for(lambda: text if re.search(pattern, text := screen()) else ""))

    try:
        text = shown(r"1 +0\.01 .*3/8")
        assert "1/2 trials" in text
        row = next(line for line in text.splitlines() if "3/8" in line).split()
        assert row[:6] == ["1", "0.01", "3/8", f"{1 / 3:.4g}", "62.00", "%"]
        assert "best trial so far: lr=0.001, val_accuracy 82.00 %, trial 0" in text
        (tmp_path / "go").touch()
        text = shown("exit code")
        assert "exit code 0" in text
        assert "best learning rate: 0.001, the best of those tried" in text
        assert "so far" not in text, "the live lines are gone when the answer is there"
        assert text.count("trial 0 complete") == text.count("trial 1 complete") == 1
    finally:
        subprocess.run([*tmux, "kill-server"], check=False)


def test_a_race_is_shown_by_its_epochs(hpo: Hpo) -> None:
    search = {"sampler": "race", "space": {"lr": LOG_LR}}
    spec = StudySpec.from_dict({"name": "s", "search": search, "training": {"epochs": 5}})
    store = Store(hpo.url, create=True)
    study = store.studies.create(spec, metadata={})
    worker = store.workers.add(study.study_id, device="cpu")
    for _ in range(5):
        claim = store.trials.claim(study, worker)
        assert claim is not None
        store.trials.suggest(claim, spec, attributes=lambda _: {})
        store.trials.report(claim, spec, epoch=1, metrics={"val_accuracy": 0.5}, value=0.5)
        store.trials.release(claim)
    console = PlainConsole(file=io.StringIO(), force_terminal=True, width=120)
    with LiveDisplay(console) as display:
        display.watch(store, study)(store)
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert "5 trials in 10 epochs, race over lr" in shown
    assert "resuming: 5 of 10 epochs are done already" in shown
    assert "5/10 epochs" in shown
    exit_code, output = hpo.here("status", "s")
    assert exit_code == 0
    assert "study s: 5 waiting\nrace: 5 of 10 epochs; trials wait for each other at its rungs\n" in output


def test_an_answer_says_the_best_rate_how_sure_that_is_where_it_breaks_and_what_to_beware_of() -> None:
    study = make_study(search={"trials": 32, "space": {"lr": LOG_LR, "optimizer": ["adam", "sgd"]}})
    diverging = [trained(lr, 0.1, state="diverged", optimizer="adam") for lr in (3e-2, 5e-2, 9e-2)]
    adam = [trial for trial in complete(optimizer="adam") if trial.params["lr"] < 2e-2]
    sgd = complete(lambda lr: hill(lr, 1e-2) - 0.1, optimizer="sgd")
    found = find_best(study, numbered(*adam, *diverging, *sgd))
    assert found is not None
    assert found.response is not None
    assert found.response.divergence_lr is not None
    text = describe_answer(study, found)
    assert text.headline == f"best learning rate: {found.response.best:.2g} (optimizer adam)"
    interval, expected, other = text.lines
    assert (interval.label, interval.fact) == ("90 % interval", "{:.2g} to {:.2g}".format(*found.response.interval))
    assert expected.fact == f"{100 * found.response.value:.2f} %"
    assert re.fullmatch(r"validation accuracy of a trial, ± [\d.]+ percentage points from seed to seed", expected.note)
    (_, sgd_response) = found.responses[1]
    assert (other.label, other.fact) == ("with optimizer=sgd", f"{sgd_response.best:.2g}")
    edge, gain, trial = text.details
    assert (edge.label, edge.fact) == ("half diverge at", f"{found.response.divergence_lr.lr:.2g}")
    assert gain.label == "one more trial"
    assert re.fullmatch(r"\+[\d.e-]+ percentage points", gain.fact)
    assert trial.fact == f"#{found.trial}, lr={found.params['lr']:.4g} optimizer=adam"
    assert trial.note.startswith(f"validation accuracy {100 * found.value:.2f} %, optimistic")


def test_the_lines_of_an_answer_are_aligned_and_the_details_are_asked_for() -> None:
    study, trials = make_study(search={"trials": 16, "space": {"lr": LOG_LR}}), numbered(*complete())
    found = find_best(study, trials)
    assert found is not None
    source = source_text(study, trials, storage="sqlite:////x/hpo.db", is_trained=False)
    short, long = (answer_lines(study, found, source=source, verbose=verbose) for verbose in (False, True))
    assert short[4].strip() == f"weights:         of trial {found.trial}: hpo export s --weights best.safetensors"
    assert len(short) == 1 + 3 + 2 < len(long) or len(describe_answer(study, found).details) == 0
    assert len({re.match(r"  [^:]+: +", line).end() for line in long[1:]}) == 1  # type: ignore[union-attr]
    assert long[-1].endswith("s in sqlite:////x/hpo.db (16 complete; answered from the store, nothing trained)")


@pytest.mark.parametrize("width", [80, 100, 120])
def test_no_state_is_broken_over_lines_for_what_another_column_says(width: int) -> None:
    output = io.StringIO()
    trials = [*complete()[:8], *(trained(lr, 0.5, state="pruned", epochs=4) for lr in (0.02, 0.04))]
    trials = numbered(*(replace(trial, reason=f"median pruner after epoch {len(trial.epochs)}") for trial in trials))
    found = find_best(study := make_study(**SEARCHED), trials)
    assert found is not None
    PlainConsole(file=output, width=width).print(_trials_table(study, trials, found, width=width))
    assert output.getvalue().count("pruned: median pruner  ") == 2
    assert "after epoch" not in output.getvalue()


@pytest.mark.parametrize("width", [60, 80, 200])
def test_no_learning_rate_of_the_trials_is_broken_over_lines(
    monkeypatch: pytest.MonkeyPatch, make_spec: Callable[..., StudySpec], store: Store, width: int
) -> None:
    output = io.StringIO()
    monkeypatch.setattr(terminal, "make_console", lambda: PlainConsole(file=output, width=width))
    study = store.studies.create(make_spec(1.234e-05, 0.0004016), metadata={})
    searched = store.trials.get_all(study)
    reason = "collapsed: every input gets the same output in epoch 2"
    ended = [
        replace(searched[0], state="diverged", reason=reason),
        replace(searched[1], state="complete", value=0.9861),
    ]
    print_trials(study, ended)
    shown = output.getvalue()
    assert {"1.234e-05", "0.0004016"} <= set(shown.split())
    assert "98.61 %" in shown
    assert max(map(len, shown.splitlines())) <= width
    assert "kind" not in shown
    print_trials(study, [*ended, replace(searched[0], kind="confirm", attempt=2)])
    assert {"kind", "attempt"} <= set(output.getvalue().split())


def test_the_warnings_of_an_answer_come_last() -> None:
    found = find_best(make_study(), numbered(*complete()[5:8]))
    assert found is not None
    assert answer_lines(make_study(), found)[-1].strip().startswith("warning: ")


def test_a_line_of_the_answer_is_broken_between_words_and_goes_on_below_its_text() -> None:
    line = "  90 % interval:  0.044 to 0.067 (in the search, 0.045 to 0.065 did equally well)"
    assert broken_line(line, 60) == [
        "  90 % interval:  0.044 to 0.067 (in the search, 0.045 to",
        "                  0.065 did equally well)",
    ]
    assert broken_line(line, 100_000) == [line]
    command = "`hpo resume own-loop --widen lr=0.0001:100`"
    assert broken_line(f"  warning:  it may lie beyond 10: go on with {command} if it pays", 50) == [
        "  warning:  it may lie beyond 10: go on with",
        f"            {command}",
        "            if it pays",
    ]
    assert broken_line("  study:  sqlite:////a/path\\n", 10)[-1].endswith("sqlite:////a/path\\n")
