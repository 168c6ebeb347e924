"""`hpo run` as users run it, with the faults that they meet: kills, interruptions, crashes, two runs at once."""

from __future__ import annotations

import os
import signal
from collections import Counter
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import optuna
import psutil
import pytest
from optuna.trial import TrialState

from hpo.config.study_spec import StudySpec
from hpo.errors import StudyStopped
from hpo.store.ledger import MAX_TRIAL_CRASHES, MAX_TRIAL_KILLS
from hpo.store.store import Store
from hpo.store.urls import parse_url
from hpo.store.workers import MAX_DEVICE_FAILURES
from hpo.study.records import DeviceFailures, TrialRecord
from hpo.system.devices import Device, worker_environment
from hpo.train.imports import ImportAllowlist
from hpo.workers.executors import InProcess, Local
from hpo.workers.local import InProcessLauncher, LocalLauncher
from hpo.workers.worker_handle import WorkerTask
from tests.rows import slow_except
from tests.workers.sick_gpu import needs_no_gpu, tells_why, write_sick_gpu

if TYPE_CHECKING:
    from tests.conftest import Hpo

MakeSpec = Callable[..., StudySpec]
WaitFor = Callable[..., Any]

TWELVE = tuple(index / 100 for index in range(1, 13))

QUICK = """
def train(trial):
    for epoch in range(1, trial.epochs + 1):
        if trial.report(epoch, val_accuracy=trial.params["lr"]):
            return
"""

# Stays in its second epoch, reporting it again and again, until there is a file "go".
HELD = """
import pathlib, time

def train(trial):
    for epoch in range(1, trial.epochs + 1):
        while True:
            if trial.report(epoch, val_accuracy=trial.params["lr"]):
                return
            if epoch != 2 or pathlib.Path("go").exists():
                break
            time.sleep(0.02)
"""

RUN = ("run", "study.toml", "--devices", "cpu")


def trials(hpo: Hpo) -> list[TrialRecord]:
    store = Store(hpo.url)
    return store.trials.get_all(store.studies.get("s"))


def states(hpo: Hpo) -> Counter[str]:
    return Counter(trial.state for trial in trials(hpo))


def optuna_states(hpo: Hpo) -> Counter[TrialState]:
    return Counter(trial.state for trial in optuna.load_study(study_name="s", storage=hpo.url).trials)


def num_held(hpo: Hpo) -> int:
    """Return how many trials have reached the epoch in which HELD keeps them."""
    if not (hpo.folder / "hpo.db").exists():
        return 0
    store = Store(hpo.url, create=True)
    if not store.studies.get_all():
        return 0
    return sum(trial.state == "running" and 2 in trial.epochs for trial in store.trials.get_all(store.studies.get("s")))


def go(hpo: Hpo) -> None:
    (hpo.folder / "go").touch()


def is_finished(hpo: Hpo, num_trials: int) -> bool:
    """Return whether every trial is complete, in the ledger and for Optuna, and no process is left."""
    complete = states(hpo) == {"complete": num_trials}
    return complete and optuna_states(hpo) == {TrialState.COMPLETE: num_trials} and not hpo.worker_pids()


# Counts


@pytest.mark.slow
def test_a_grid_of_12_points_and_4_workers_is_12_trials_each_point_once(hpo: Hpo, make_spec: MakeSpec) -> None:
    hpo.write(make_spec(*TWELVE), QUICK)
    exit_code, output = hpo.here(*RUN, "--workers", "4")
    assert exit_code == 0, output
    assert is_finished(hpo, 12)
    assert sorted(trial.params["lr"] for trial in trials(hpo)) == list(TWELVE)
    assert "best learning rate: 0.12" in output


@pytest.mark.slow
def test_tpe_with_4_workers_and_20_trials_is_20_trials(hpo: Hpo, make_spec: MakeSpec) -> None:
    hpo.write(make_spec(search={"sampler": "tpe", "trials": 20}), QUICK)
    exit_code, output = hpo.here(*RUN, "--workers", "4")
    assert exit_code == 0, output
    assert is_finished(hpo, 20)
    assert len({trial.params["lr"] for trial in trials(hpo)}) == 20


@pytest.mark.slow
def test_two_runs_of_one_study_at_the_same_time_share_its_trials(
    hpo: Hpo, make_spec: MakeSpec, wait_for: WaitFor
) -> None:
    hpo.write(make_spec(*TWELVE), HELD)
    runs = [hpo.start(*RUN, "--workers", "2") for _ in range(2)]
    wait_for(lambda: num_held(hpo) == 4)
    go(hpo)
    outputs = [run.communicate(timeout=500)[0] for run in runs]
    assert [run.returncode for run in runs] == [0, 0], outputs
    assert is_finished(hpo, 12)
    assert {trial.attempt for trial in trials(hpo)} == {1}


def test_a_finished_study_is_answered_without_training(hpo: Hpo, make_spec: MakeSpec) -> None:
    hpo.write(make_spec(0.1, 0.2), QUICK)
    assert hpo.here(*RUN)[0] == 0
    before = trials(hpo)
    (hpo.folder / "loop.py").unlink()
    exit_code, output = hpo.here(*RUN)
    assert (exit_code, trials(hpo)) == (0, before)
    assert "best learning rate: 0.2" in output


# The whole command is killed


@pytest.mark.parametrize(
    ("sampler", "workers_too"),
    slow_except([("tpe", False), ("grid", True)], ("grid", True)),
    ids=["the command alone", "the command and its workers"],
)
def test_a_study_whose_command_was_killed_goes_on_to_the_same_counts(
    hpo: Hpo, make_spec: MakeSpec, wait_for: WaitFor, sampler: str, workers_too: bool
) -> None:
    spec = make_spec(*TWELVE[:6]) if sampler == "grid" else make_spec(search={"sampler": "tpe", "trials": 6})
    hpo.write(spec, HELD)
    run = hpo.start(*RUN, "--workers", "2")
    wait_for(lambda: num_held(hpo) == 2)
    pids = hpo.worker_pids()
    assert len(pids) == 2
    if workers_too:
        run.send_signal(signal.SIGSTOP)  # it would replace them
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
    run.kill()
    run.wait()
    wait_for(lambda: not hpo.worker_pids())
    assert states(hpo) == ({"running": 2, "waiting": 4} if workers_too else {"waiting": 6})
    chosen = [trial.params for trial in trials(hpo)[:2]]
    go(hpo)
    exit_code, output = hpo.here(*RUN)
    assert exit_code == 0, output
    assert is_finished(hpo, 6)
    assert [(trial.params, trial.attempt) for trial in trials(hpo)[:2]] == [(params, 2) for params in chosen]


# Workers that die


@pytest.mark.slow
def test_a_worker_that_is_killed_is_replaced_and_its_trial_trained_again(
    hpo: Hpo, make_spec: MakeSpec, wait_for: WaitFor
) -> None:
    hpo.write(make_spec(0.1, 0.2), HELD)
    run = hpo.start(*RUN)
    wait_for(lambda: num_held(hpo) == 1)
    (pid,) = hpo.worker_pids()
    os.kill(pid, signal.SIGKILL)
    go(hpo)
    output, _ = run.communicate(timeout=500)
    assert run.returncode == 0, output
    assert is_finished(hpo, 2)
    assert [trial.attempt for trial in trials(hpo)] == [2, 1]


@pytest.mark.slow
def test_trials_that_crash_their_process_fail_and_the_others_finish(hpo: Hpo, make_spec: MakeSpec) -> None:
    """Check it with two workers, which die of both trials in turn: more often in a row than one worker may."""
    hpo.write(
        make_spec(0.1, 0.2, 0.3, 0.4),
        "import os, signal\n"
        "def train(trial):\n"
        "    if trial.params['lr'] < 0.25:\n"
        "        os.abort()\n"
        "    trial.report(1, val_accuracy=1)\n",
    )
    exit_code, output = hpo.here(*RUN, "--workers", "2")
    assert exit_code == 0, output
    assert [trial.state for trial in trials(hpo)] == ["failed"] * 2 + ["complete"] * 2
    # At least so often, because a slot that somebody else frees before the supervisor does is not counted.
    assert all(MAX_TRIAL_CRASHES <= trial.attempt <= 3 * MAX_TRIAL_CRASHES for trial in trials(hpo)[:2])
    assert hpo.worker_pids() == []


@pytest.mark.slow
def test_a_trial_that_gets_its_worker_killed_keeps_the_study_neither_from_the_others_nor_for_ever(
    hpo: Hpo, make_spec: MakeSpec
) -> None:
    """Kill it as the kernel does when memory runs out; a kill may also have nothing to do with the trial."""
    hpo.write(
        make_spec(0.1, 0.2),
        "import os, signal\n"
        "def train(trial):\n"
        "    if trial.params['lr'] < 0.15:\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "    trial.report(1, val_accuracy=1)\n",
    )
    exit_code, output = hpo.here(*RUN)
    assert exit_code == 0, output
    assert [(trial.state, trial.reason) for trial in trials(hpo)] == [
        ("failed", f"its worker died {MAX_TRIAL_KILLS} times"),
        ("complete", "trained for 1 epoch"),
    ]


@pytest.mark.slow
def test_a_loop_may_have_processes_of_its_own_and_leaves_none_behind(
    hpo: Hpo, make_spec: MakeSpec, wait_for: WaitFor
) -> None:
    hpo.write(
        make_spec(0.1),
        "import multiprocessing, subprocess\n"
        "context = multiprocessing.get_context('fork')\n"
        "def train(trial):\n"
        "    forgotten = subprocess.Popen(['sleep', '1000'])\n"
        "    open('forgotten', 'w').write(str(forgotten.pid))\n"
        "    with context.Pool(2) as pool:\n"
        "        trial.report(1, val_accuracy=sum(pool.map(abs, [1, -1])))\n",
    )
    exit_code, output = hpo.here(*RUN)
    assert exit_code == 0, output
    assert is_finished(hpo, 1)
    pid = int((hpo.folder / "forgotten").read_text())
    wait_for(lambda: not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE)


def test_workers_that_die_at_their_start_stop_the_study_with_the_end_of_their_log(
    hpo: Hpo, make_spec: MakeSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    hpo.write(make_spec(0.1), QUICK)
    monkeypatch.setenv("PYTHONPATH", str(hpo.folder))
    ends = "import os\nif 'HPO_WORKER' in os.environ:\n    print('no licence', flush=True)\n    os._exit(3)\n"
    (hpo.folder / "sitecustomize.py").write_text(ends)
    exit_code, output = hpo.here(*RUN)
    assert exit_code == 1
    assert "workers died 5 times without finishing another epoch, the last one with exit code 3" in output
    assert "worker-0.log:\nno licence" in output
    assert states(hpo) == {"waiting": 1}


def test_three_trials_that_fail_the_same_way_end_the_command_with_the_traceback(hpo: Hpo, make_spec: MakeSpec) -> None:
    hpo.write(make_spec(*TWELVE), "def train(trial):\n    raise ZeroDivisionError('of mine')\n")
    exit_code, output = hpo.here(*RUN)
    assert exit_code == 1
    assert "3 trials failed the same way" in output
    assert output.count("ZeroDivisionError: of mine\n") >= 1
    assert 'loop.py", line 2, in train' in output
    assert states(hpo) == {"failed": 3, "waiting": 9}


# Devices that cannot be used

SICK = Device("cuda:0", "cuda", "NVIDIA H100", None, uuid="GPU-aaaa0000")
ON_ITS_DEVICE = """
import pathlib, time

def train(trial):
    import torch
    torch.zeros(1, device=trial.device)
    while trial.device == "cpu" and not pathlib.Path("go").exists():
        time.sleep(0.02)
    trial.report(trial.epochs, val_accuracy=trial.params["lr"])
"""


def device_failures(hpo: Hpo) -> list[DeviceFailures]:
    if not (hpo.folder / "hpo.db").exists():
        return []
    store = Store(hpo.url, create=True)
    return [one for study in store.studies.get_all() for one in store.workers.device_failures(study).values()]


@needs_no_gpu
@pytest.mark.slow
def test_a_sick_worker_beside_a_healthy_one_fails_no_trial_and_the_study_completes(
    hpo: Hpo, make_spec: MakeSpec, wait_for: WaitFor
) -> None:
    hpo.write(make_spec(*TWELVE[:6]), ON_ITS_DEVICE)
    hpo.environment = {"PYTHONPATH": str(write_sick_gpu(hpo.folder))}
    run = hpo.start("run", "study.toml", "--devices", "cpu,cuda:0", "--workers", "2")
    wait_for(lambda: run.poll() is not None or any(one.count == MAX_DEVICE_FAILURES for one in device_failures(hpo)))
    go(hpo)
    output, _ = run.communicate(timeout=500)
    assert run.returncode == 0, output
    assert is_finished(hpo, 6)
    assert {trial.attempt for trial in trials(hpo)} == {1}
    assert "the device cuda:0 cannot be used, so the others train its trials" in output
    assert [(one.device, one.count) for one in device_failures(hpo)] == [("cuda:0", MAX_DEVICE_FAILURES)]
    (log,) = hpo.folder.glob("hpo_files/*/logs/worker-1.log")
    said = [line for line in log.read_text().splitlines() if "the device cuda:0 cannot be used" in line]
    assert len(said) == MAX_DEVICE_FAILURES
    assert all(map(tells_why, said))
    assert "Traceback" not in log.read_text()


@pytest.mark.slow
@needs_no_gpu
def test_where_no_device_can_be_used_the_command_says_so_before_it_writes_anything(
    hpo: Hpo, make_spec: MakeSpec
) -> None:
    hpo.write(make_spec(0.1), QUICK)
    hpo.environment = {"PYTHONPATH": str(write_sick_gpu(hpo.folder))}
    exit_code, output = hpo.run("run", "study.toml", "--devices", "cuda:0")
    assert exit_code == 2, output
    assert "--devices must name a device that can be used, and none can: cuda:0: " in output
    assert tells_why(output)
    assert not (hpo.folder / "hpo.db").exists()
    assert hpo.worker_pids() == []


@pytest.mark.slow
@needs_no_gpu
def test_where_every_worker_has_lost_its_device_the_study_stops_with_one_sentence(
    hpo: Hpo, make_spec: MakeSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Check it after the preflight, which a device may pass that fails later."""
    monkeypatch.setattr("hpo.workers.local.choose_devices", lambda _: [SICK])
    store = Store(hpo.url, create=True)
    study = store.studies.create(make_spec(0.1, 0.2, 0.3), metadata={})
    allowed = ImportAllowlist(("loop",), path=(str(hpo.folder),))
    launcher = LocalLauncher(Local("cuda:0", workers=2), study.spec, allowed=allowed, url=store.url)
    with pytest.raises(StudyStopped) as caught:
        launcher.run(store, study, on_tick=lambda _: None)
    assert caught.value.can_resume
    assert str(caught.value).startswith("no worker has a usable device left: cuda:0 of ")
    assert tells_why(str(caught.value))
    assert "\n" not in str(caught.value)
    assert [(trial.state, trial.attempt) for trial in trials(hpo)] == [("waiting", 0)] * 3
    assert store.studies.get("s").stop is None  # it is not over for workers elsewhere


@pytest.mark.parametrize(
    ("device", "are_kept"), [(SICK, False), (Device("cpu", "cpu", "a CPU", None), True)], ids=["cuda", "cpu"]
)
def test_a_range_test_has_a_gpu_to_itself(
    device: Device,
    are_kept: bool,
    hpo: Hpo,
    make_spec: MakeSpec,
    wait_for: WaitFor,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Check that no worker that was started early holds one that is exclusive to one process."""
    monkeypatch.setattr("hpo.workers.local.choose_devices", lambda _: [device])
    url, allowed = parse_url(hpo.url), ImportAllowlist(("loop",), path=(str(hpo.folder),))
    with LocalLauncher(Local(device.name, workers=2), make_spec(0.1, 0.2), allowed=allowed, url=url) as launcher:
        launcher.start_early()
        wait_for(lambda: len(hpo.worker_pids()) == 2)
        assert launcher.call(lambda: len(hpo.worker_pids()), on_device=True) == (2 if are_kept else 0)


@pytest.mark.parametrize(
    ("executor", "threads"), [(Local("cpu", workers=2), 3), (Local("cpu", workers=2, threads=5), 5)]
)
def test_every_worker_has_the_threads_that_were_asked_for(
    executor: Local, threads: int, make_spec: MakeSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[int] = []

    class Process:
        def __init__(self, task: WorkerTask, device: Device) -> None:
            started.append(task.threads)
            assert worker_environment(device, threads=task.threads)["OMP_NUM_THREADS"] == str(threads)

        def start_early(self) -> None:
            pass

    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    monkeypatch.setattr("hpo.workers.local.WorkerProcess", Process)
    launcher = LocalLauncher(executor, make_spec(0.1, 0.2), allowed=ImportAllowlist(), url=parse_url("sqlite:///x.db"))
    launcher.start_early()
    assert started == [threads, threads]


@needs_no_gpu
def test_in_process_a_device_that_cannot_be_used_is_said_in_one_sentence_and_nothing_is_left_set(
    hpo: Hpo, make_spec: MakeSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hpo.workers.local.choose_devices", lambda _: [SICK])
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    store = Store(hpo.url, create=True)
    study = store.studies.create(make_spec(0.1), metadata={})
    with pytest.raises(StudyStopped, match=r"^the device cuda:0 cannot be used: ") as caught:
        InProcessLauncher(InProcess("cuda:0"), study.spec).run(store, study, on_tick=lambda _: None)
    assert caught.value.can_resume
    assert tells_why(str(caught.value))
    assert "CUDA_VISIBLE_DEVICES" not in os.environ
    assert [(trial.state, trial.attempt) for trial in trials(hpo)] == [("waiting", 0)]


# Interruptions


@pytest.mark.parametrize("number", slow_except([signal.SIGINT, signal.SIGTERM], signal.SIGINT))
def test_an_interrupted_command_ends_by_itself_says_how_to_go_on_and_does(
    hpo: Hpo, make_spec: MakeSpec, wait_for: WaitFor, number: signal.Signals
) -> None:
    hpo.write(make_spec(*TWELVE[:4]), HELD)
    run = hpo.start(*RUN, "--workers", "2")
    wait_for(lambda: num_held(hpo) == 2)
    run.send_signal(number)
    output, _ = run.communicate(timeout=500)
    assert run.returncode == 1
    assert "hpo: interrupted\nresume with: hpo run study.toml" in output
    assert hpo.worker_pids() == []
    assert states(hpo) == {"waiting": 4}
    # Nobody was killed: the workers left at their next report.
    assert {attempt.outcome for trial in trials(hpo) for attempt in trial.attempts} == {"released"}
    go(hpo)
    assert hpo.here(*RUN)[0] == 0
    assert is_finished(hpo, 4)


def test_hpo_stop_ends_the_command_and_resume_goes_on(hpo: Hpo, make_spec: MakeSpec, wait_for: WaitFor) -> None:
    hpo.write(make_spec(*TWELVE[:3]), HELD)
    run = hpo.start(*RUN)
    wait_for(lambda: num_held(hpo) == 1)
    assert hpo.here("stop", "s")[0] == 0
    output, _ = run.communicate(timeout=500)
    assert run.returncode == 1
    assert "study 's' was stopped with 3 trials left" in output
    assert hpo.worker_pids() == []
    go(hpo)
    exit_code, output = hpo.here("resume", "s", "--devices", "cpu", "--allow", "loop")
    assert exit_code == 0, output
    assert is_finished(hpo, 3)


@pytest.mark.parametrize("number", slow_except([signal.SIGTERM, signal.SIGKILL], signal.SIGTERM))
def test_a_trial_that_never_comes_to_its_next_report_is_left_and_given_back(
    hpo: Hpo, make_spec: MakeSpec, wait_for: WaitFor, number: signal.Signals
) -> None:
    hpo.write(
        make_spec(0.1),
        "import sys, threading\n"
        "def train(trial):\n"
        "    sys.modules['__main__'].DRAIN_S = 0.5  # instead of half a minute\n"
        "    trial.report(1, val_accuracy=1)\n"
        "    trial.report(2, val_accuracy=1)\n"
        "    threading.Event().wait()\n",
    )
    run = hpo.start(*RUN)
    wait_for(lambda: num_held(hpo) == 1)
    run.send_signal(number)
    run.communicate(timeout=500)
    wait_for(lambda: not hpo.worker_pids())
    assert states(hpo) == {"waiting": 1}


# Reproducibility, with the engine


@pytest.mark.slow
def test_two_runs_with_one_seed_are_identical_digit_for_digit(hpo: Hpo) -> None:
    (hpo.folder / "study.toml").write_text("""
name = "s"
search = { sampler = "tpe", trials = 5, space = { lr = { low = 1e-4, high = 1e-2, log = true } } }
model = { name = "article_cnn", width = 0.05 }
data = { name = "digits", train_samples = 200, validation_fraction = 0.2 }
training = { epochs = 1, batch_size = 50 }
""")
    urls = [f"sqlite:///{hpo.folder}/{name}.db" for name in ("first", "second")]
    for url in urls:
        exit_code, output = hpo.here(*RUN, "--storage", url)
        assert exit_code == 0, output
    found = [Store(url).trials.get_all(Store(url).studies.get("s")) for url in urls]
    first, second = ([(t.state, t.params, t.value, t.attributes["seed"], t.epochs) for t in ts] for ts in found)
    assert first == second
    assert len({str(trial.params) for trial in found[0]}) == 5
    for one, other in zip(*found, strict=True):
        assert {**one.curves, "seconds": None} == {**other.curves, "seconds": None}


# The second process of a trial is killed in the middle of its second epoch of ten steps, where there is a file "kill".
MORTAL = """
import os, pathlib, signal
from torch import distributed, nn

class Mortal(nn.Sequential):
    steps = 0

    def forward(self, images):
        if self.training and distributed.is_initialized() and distributed.get_rank() == 1:
            self.steps += 1
            if self.steps == 15 and (order := pathlib.Path("kill")).exists():
                order.unlink()
                os.kill(os.getpid(), signal.SIGKILL)
        return super().forward(images)

def network(channels, num_classes):
    return Mortal(nn.AvgPool2d(4), nn.Flatten(), nn.Dropout(0.1), nn.Linear(64 * channels, num_classes))
"""


@pytest.mark.slow
def test_a_killed_process_of_a_trial_on_two_devices_costs_an_attempt_and_no_digit(hpo: Hpo) -> None:
    (hpo.folder / "mortal.py").write_text(MORTAL)
    (hpo.folder / "study.toml").write_text("""
name = "s"
search = { sampler = "grid", space = { lr = [1e-3] } }
model = { name = "mortal:network" }
data = { name = "digits", train_samples = 200, validation_fraction = 0.2 }
training = { epochs = 3, batch_size = 16, checkpoint_epochs = 1 }
engine = { devices_per_trial = 2 }
""")
    exit_code, output = hpo.here(*RUN, "--storage", whole_url := f"sqlite:///{hpo.folder}/whole.db")
    assert exit_code == 0, output
    (hpo.folder / "kill").touch()
    exit_code, output = hpo.here(*RUN)
    assert exit_code == 0, output
    [killed], [whole] = (Store(url).trials.get_all(Store(url).studies.get("s")) for url in (hpo.url, whole_url))
    first, second = killed.attempts
    assert first.outcome == "RankFailed: rank 1 of 2 has ended, with code -9"
    assert second.resumed_from == 1
    assert killed.epochs == [1, 2, 3]
    assert {**killed.curves, "seconds": None} == {**whole.curves, "seconds": None}
