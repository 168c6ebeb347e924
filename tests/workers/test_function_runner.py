"""A user's own function: what it is given, and how its trials end, whatever it does."""

from __future__ import annotations

import contextlib
import os
import socket
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from hpo.analysis.answer import find_best
from hpo.config.study_spec import StudySpec
from hpo.store.store import Store
from tests.workers.training import work

MakeSpec = Callable[..., StudySpec]
WriteLoop = Callable[[str], None]


def test_an_exception_fails_its_trial_with_the_traceback_and_the_study_goes_on(
    store: Store, make_spec: MakeSpec, loop: WriteLoop
) -> None:
    loop("""
if trial.params["lr"] == 0.1:
    raise ValueError("no such\\nluck")
trial.report(1, val_accuracy=0.5)
""")
    study = store.studies.create(make_spec(0.1, 0.2), metadata={})
    failed, fine = work(store, study)
    assert (failed.state, failed.reason, failed.value) == ("failed", "ValueError: no such", None)
    assert failed.error is not None
    assert 'loop.py", line 4, in train' in failed.error
    assert (fine.state, fine.value) == ("complete", 0.5)


def test_a_trial_that_goes_on_with_the_weights_of_another_fails(
    store: Store, make_spec: MakeSpec, loop: WriteLoop
) -> None:
    loop("""
import torch
train.network = getattr(train, "network", None) or torch.nn.Linear(2, 1)
train.network(torch.ones(1, 2)).sum().backward()
torch.optim.SGD(train.network.parameters(), lr=trial.params["lr"]).step()
trial.report(1, val_accuracy=0.5)
""")
    study = store.studies.create(make_spec(0.1, 0.2, search={"retries": 0}), metadata={})
    first, second = work(store, study)
    assert (first.state, second.state) == ("complete", "failed")
    assert str(second.reason).startswith("UserError: this trial continues with weights that trial 0 ended with")


@pytest.mark.parametrize(
    ("statement", "reason"),
    [
        ("sys.exit('enough')", "SystemExit: enough"),
        ("sys.exit(0)", "SystemExit: 0"),
        ("raise MemoryError", "out of memory"),
        ("return", "UserError: loop:train returned without a trial.report(...)"),
        ("trial.report(1)", "UserError: trial.report must be given val_accuracy=..."),
        ("trial.report(0, val_accuracy=1)", "UserError: trial.report: epoch must be an integer of at least 1, got 0"),
        ("trial.report(1, val_accuracy='high')", "ValueError: could not convert string to float: 'high'"),
    ],
)
def test_whatever_a_function_does_wrong_fails_its_trial_and_not_the_worker(
    store: Store, make_spec: MakeSpec, loop: WriteLoop, statement: str, reason: str
) -> None:
    loop(statement)
    (failed,) = work(store, store.studies.create(make_spec(0.1), metadata={}))
    assert failed.state == "failed"
    assert failed.reason is not None
    assert failed.reason.startswith(reason)
    if reason.startswith("UserError: "):  # the mistake in a sentence, and where in the user's code
        assert str(failed.error).rstrip().split("\n")[-1].startswith(reason.removeprefix("UserError: "))
        assert "function_runner.py" not in str(failed.error)
        assert ('loop.py", line' in str(failed.error)) == (statement != "return")


def test_a_value_that_is_not_finite_ends_the_trial_as_diverged(
    store: Store, make_spec: MakeSpec, loop: WriteLoop
) -> None:
    loop("""
assert not trial.report(1, val_accuracy=0.5)
assert trial.report(2, val_accuracy=math.nan)
assert trial.report(3, val_accuracy=0.9)
""")
    (diverged,) = work(store, store.studies.create(make_spec(0.1), metadata={}))
    assert (diverged.state, diverged.reason) == ("diverged", "val_accuracy = nan in epoch 2")
    assert (diverged.value, diverged.curves["val_accuracy"]) == (None, [0.5, None])


def test_a_loss_that_is_not_finite_ends_the_trial_as_diverged_whatever_the_metric_is(
    store: Store, make_spec: MakeSpec, loop: WriteLoop
) -> None:
    loop("""
assert not trial.report(1, val_accuracy=0.5, train_loss=2.0, gradient_norm=math.inf)
assert trial.report(2, val_accuracy=0.1, train_loss=math.nan)
""")
    (diverged,) = work(store, store.studies.create(make_spec(0.1), metadata={}))
    assert (diverged.state, diverged.reason, diverged.value) == ("diverged", "train_loss = nan in epoch 2", None)


def test_the_test_set_is_measured_in_the_last_epoch_of_a_confirmation_alone(
    store: Store, make_spec: MakeSpec, loop: WriteLoop
) -> None:
    loop("""
def measure():
    assert trial.kind == "confirm"
    return trial.params["lr"] + 0.01
for epoch in range(1, trial.epochs + 1):
    trial.report(epoch, val_accuracy=trial.params["lr"], test_accuracy=measure)
""")
    study = store.studies.create(make_spec(0.1, 0.5, epochs=2, confirm={"top": 2, "seeds": 2}), metadata={})
    trials = work(store, study)
    measured = [trial.curves["test_accuracy"] for trial in trials if "test_accuracy" in trial.curves]
    assert measured == [[None, trial.params["lr"] + 0.01] for trial in trials if trial.kind == "confirm"]
    best = find_best(study, trials)
    assert best is not None
    confirmation = best.confirmation
    assert confirmation is not None
    assert confirmation.winner.params == {"lr": 0.5}
    assert confirmation.test_value == pytest.approx(0.51)


def test_a_loop_that_is_told_to_end_and_goes_on_records_nothing_more(
    store: Store, make_spec: MakeSpec, loop: WriteLoop
) -> None:
    loop("""
for epoch in range(1, trial.epochs + 1):
    trial.report(epoch, val_accuracy=epoch / 100)
""")
    pruner = {"name": "threshold", "lower": 0.5, "warmup_epochs": 2}
    (pruned,) = work(store, store.studies.create(make_spec(0.1, epochs=9, pruner=pruner), metadata={}))
    assert pruned.state == "pruned"
    assert pruned.reason == f"threshold pruner after epoch {pruned.epochs[-1]}"
    assert pruned.epochs[-1] < 5
    assert pruned.value == pruned.epochs[-1] / 100


@pytest.mark.parametrize(("last", "state", "value"), [(0.7, "complete", 0.7), (float("nan"), "diverged", None)])
def test_a_trial_that_was_killed_after_its_last_report_ends_with_it(
    store: Store, make_spec: MakeSpec, loop: WriteLoop, last: float, state: str, value: float | None
) -> None:
    loop("return  # the checkpoint says that nothing is left to train")
    study = store.studies.create(make_spec(0.1, epochs=2), metadata={})
    killed = store.trials.claim(study, store.workers.add(study.study_id, device="cpu"))
    assert killed is not None
    store.trials.suggest(killed, study.spec, attributes=lambda _: {})
    for epoch, number in ((1, 0.6), (2, last)):
        store.trials.report(killed, study.spec, epoch=epoch, metrics={"val_accuracy": number}, value=number)
    store.trials.release(killed)
    (ended,) = work(store, study)
    assert (ended.state, ended.value, ended.attempt) == (state, value, 2)


def test_a_trial_is_given_and_recorded_with_what_it_depends_on(
    store: Store, make_spec: MakeSpec, loop: WriteLoop, tmp_path: Path
) -> None:
    loop("""
assert (trial.device, trial.epochs, trial.attempt) == ("cpu", 3, 1)
assert trial.checkpoint_dir.is_dir() and not list(trial.checkpoint_dir.iterdir())
(trial.checkpoint_dir / "seed").write_text(str(trial.seed))
trial.report(1, val_accuracy=trial.params["lr"])
""")
    study = store.studies.create(make_spec(0.1, 0.2), metadata={})
    trials = work(store, study)
    for trial in trials:
        folder = store.folder(study) / "trials" / f"{trial.number:04d}"
        assert (folder / "seed").read_text() == str(trial.attributes["seed"])
        assert (trial.attributes["device"], trial.attributes["pid"]) == ("cpu", os.getpid())
        assert trial.attributes["host"] == socket.gethostname()
        assert {"python", "optuna", "torch"} <= trial.attributes["versions"].keys()
        assert "git_revision" in trial.attributes
    assert len({trial.attributes["seed"] for trial in trials}) == 2


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("raise KeyboardInterrupt", "KeyboardInterrupt: "),
        ("raise GeneratorExit", "GeneratorExit: "),
        ("raise __import__('sqlalchemy').exc.OperationalError('mine', {}, Exception('mine'))", "OperationalError: "),
        ("raise type('Mute', (Exception,), {'__str__': lambda self: 1 / 0})", "Mute: "),
    ],
)
def test_whatever_a_loop_raises_ends_its_trial_and_not_the_study(
    store: Store, make_spec: MakeSpec, loop: WriteLoop, line: str, reason: str
) -> None:
    loop(f"if trial.number == 0: {line}\ntrial.report(1, val_accuracy=0.5)")
    first, second = work(store, store.studies.create(make_spec(0.1, 0.2), metadata={}))
    assert (first.state, second.state) == ("failed", "complete")
    assert str(first.reason).startswith(reason)


def test_a_loop_is_never_given_another_studys_checkpoints(tmp_path: Path, make_spec: MakeSpec, loop: WriteLoop) -> None:
    """Check it for a study of the same name in another database alongside, and for one that was deleted."""
    loop("""
assert not list(trial.checkpoint_dir.iterdir())
(trial.checkpoint_dir / "last.pt").touch()
trial.report(1, val_accuracy=0.5)
""")
    for name in ("a", "b", "a"):
        (tmp_path / f"{name}.db").unlink(missing_ok=True)
        store = Store(f"sqlite:///{tmp_path}/{name}.db", create=True)
        (trial,) = work(store, store.studies.create(make_spec(0.1), metadata={}))
        assert trial.state == "complete", trial.error


def test_a_report_to_a_trial_that_was_kept_from_an_earlier_call_fails_the_trial_that_makes_it(
    store: Store, make_spec: MakeSpec, loop: WriteLoop
) -> None:
    """As a callback does that is made once."""
    loop("""
kept = sys.modules[__name__].__dict__.setdefault("kept", trial)
kept.report(1, val_accuracy=0.5)
""")
    first, *others = work(store, store.studies.create(make_spec(0.1, 0.2, 0.3, search={"retries": 0}), metadata={}))
    assert first.state == "complete"
    for trial in others:
        assert (trial.state, trial.attempt) == ("failed", 1)
        assert str(trial.reason).startswith("UserError: trial.report was called for trial 0, whose training has ended")
    assert first.curves == {"val_accuracy": [0.5]}


def test_a_loop_that_leaves_its_folder_does_not_take_the_next_trial_along(
    store: Store, make_spec: MakeSpec, loop: WriteLoop, tmp_path: Path
) -> None:
    (tmp_path / "elsewhere").mkdir()
    loop("""
import os
assert pathlib.Path("elsewhere").is_dir()
os.chdir("elsewhere")
assert trial.checkpoint_dir.is_dir()
trial.report(1, val_accuracy=0.5)
""")
    with contextlib.chdir(tmp_path):
        trials = work(store, store.studies.create(make_spec(0.1, 0.2), metadata={}))
    assert [trial.state for trial in trials] == ["complete", "complete"], trials[1].error


def test_a_forgotten_breakpoint_fails_its_trial_in_a_sentence(
    store: Store, make_spec: MakeSpec, loop: WriteLoop
) -> None:
    """The debugger raises this at the end of its input, or when it is told to quit."""
    loop("raise __import__('bdb').BdbQuit")
    (failed,) = work(store, store.studies.create(make_spec(0.1, search={"retries": 0}), metadata={}))
    assert failed.state == "failed"
    assert str(failed.reason).startswith("UserError: loop:train was left in the debugger, which needs a terminal")
    assert 'loop.py", line' in str(failed.error)


def test_a_loop_in_a_race_goes_on_from_what_it_saved_or_else_from_its_start(
    store: Store, make_spec: MakeSpec, loop: WriteLoop
) -> None:
    loop("""
saved = trial.checkpoint_dir / "epoch"
first = 1 + (int(saved.read_text()) if saved.exists() else 0)
with (pathlib.Path(__file__).parent / "trained").open("a") as trained:
    for epoch in range(first, trial.epochs + 1):
        trained.write(f"{trial.number} ")
        if trial.params["lr"] < 0.5:
            saved.write_text(str(epoch))
        if trial.report(epoch, val_accuracy=(0.9 - abs(trial.params["lr"] - 0.5)) * epoch / 9):
            return
""")
    search = {"sampler": "race", "space": {"lr": {"low": 0.1, "high": 1.0}}}
    study = store.studies.create(make_spec(search=search, epochs=5), metadata={})
    trials = work(store, study)
    assert [(trial.state, list(trial.epochs)) for trial in trials] == [
        ("pruned", [1]),
        ("pruned", [1, 2]),
        ("complete", [1, 2, 3, 4, 5]),
        ("pruned", [1]),
        ("pruned", [1]),
    ]
    trained = (Path(sys.modules["loop"].__file__ or "").parent / "trained").read_text().split()
    assert [trained.count(str(number)) for number in range(5)] == [1, 2, 6, 1, 1], "trial 2 began again after it waited"
