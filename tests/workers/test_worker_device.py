"""A worker's device: proven before the first claim, judged after errors, counted, and given up in the end."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from hpo.config.study_spec import StudySpec
from hpo.store.store import Store
from hpo.store.workers import MAX_DEVICE_FAILURES
from hpo.study.records import StudyRecord, TrialRecord
from hpo.system.processes import machine_id
from hpo.workers import worker_device
from hpo.workers.worker import Worker
from hpo.workers.worker_device import DeviceFailed, WorkerDevice, precisions_to_prove
from hpo.workers.worker_handle import EXIT_RESTART
from tests.workers.sick_gpu import needs_no_gpu, tells_why
from tests.workers.training import engine_study, work

MakeSpec = Callable[..., StudySpec]
WriteLoop = Callable[[str], None]

ECC = "CUDA error: uncorrectable ECC error encountered"
ASSERT = "CUDA error: device-side assert triggered"
pytestmark = pytest.mark.parametrize("url", ["sqlite"], indirect=True)


class Gpu:
    """A GPU that is emulated: what it answers to a proof in the worker's process, and to one in a new process."""

    def __init__(self) -> None:
        self.error_here: Exception | None = None
        self.problem: str | None = None
        self.num_proofs = 0

    def prove(self, *_: Any, **__: Any) -> None:
        self.num_proofs += 1
        if self.error_here is not None:
            raise self.error_here


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Gpu:
    """Have workers take "cuda:0" for a GPU that computes."""
    emulated = Gpu()

    class Proof:
        def __init__(self, *_: Any, **__: Any) -> None: ...

        def __enter__(self) -> Proof:
            return self

        def __exit__(self, *_: object) -> None: ...

        def problem(self) -> str | None:
            return emulated.problem

    monkeypatch.setattr(worker_device, "prove_device", emulated.prove)
    monkeypatch.setattr(worker_device, "DeviceProof", Proof)
    return emulated


def work_on_gpu(store: Store, study: StudyRecord) -> list[TrialRecord]:
    Worker(store, study, device="cuda:0", torch_device="cuda:0", should_stop=lambda: False).run()
    return store.trials.get_all(study)


def num_failures(store: Store, study: StudyRecord) -> int:
    failures = store.workers.device_failures(study).get((machine_id(), "cuda:0"))
    return 0 if failures is None else failures.count


@needs_no_gpu
@pytest.mark.parametrize("own_loop", [True, False], ids=["own loop", "engine"])
def test_a_device_that_cannot_be_used_ends_the_worker_before_it_claims_a_trial(
    store: Store, make_spec: MakeSpec, loop: WriteLoop, own_loop: bool
) -> None:
    loop("raise ValueError('called')")
    study = store.studies.create(make_spec(0.1), metadata={}) if own_loop else engine_study(store, 1e-3)
    with pytest.raises(DeviceFailed) as caught:
        work_on_gpu(store, study)
    assert str(caught.value).startswith("the device cuda:0 cannot be used: ")
    assert tells_why(str(caught.value))
    assert "\n" not in str(caught.value)
    assert not caught.value.is_given_up
    (trial,) = store.trials.get_all(study)
    assert (trial.state, trial.attempt) == ("waiting", 0)
    assert store.workers.get_all(study) == []
    assert num_failures(store, study) == 1


def test_a_device_that_fails_again_and_again_is_given_up_without_another_proof_until_the_study_is_started_again(
    store: Store, make_spec: MakeSpec, loop: WriteLoop, gpu: Gpu
) -> None:
    loop("trial.report(trial.epochs, val_accuracy=1)")
    study = store.studies.create(make_spec(0.1), metadata={})
    gpu.error_here = RuntimeError("No CUDA GPUs are available")
    for count in range(1, MAX_DEVICE_FAILURES + 1):
        with pytest.raises(DeviceFailed, match="No CUDA GPUs are available") as caught:
            work_on_gpu(store, study)
        assert caught.value.is_given_up == (count == MAX_DEVICE_FAILURES)
    assert gpu.num_proofs == num_failures(store, study) == MAX_DEVICE_FAILURES
    with pytest.raises(DeviceFailed, match="given up after 3 failures in this study") as caught:
        work_on_gpu(store, study)
    assert caught.value.is_given_up
    assert gpu.num_proofs == MAX_DEVICE_FAILURES
    gpu.error_here = None
    store.studies.start(study)
    assert [trial.state for trial in work_on_gpu(store, study)] == ["complete"]


def test_a_broken_device_gives_its_trial_back_un_failed_and_the_next_attempt_is_the_trials(
    store: Store, make_spec: MakeSpec, loop: WriteLoop, gpu: Gpu
) -> None:
    loop(f"""
if trial.attempt == 1:
    raise RuntimeError({ECC!r})
trial.report(trial.epochs, val_accuracy=1)
""")
    study = store.studies.create(make_spec(0.1, search={"retries": 0}), metadata={})
    with pytest.raises(DeviceFailed, match="uncorrectable ECC error"):
        work_on_gpu(store, study)
    assert num_failures(store, study) == 1
    (trial,) = store.trials.get_all(study)
    assert trial.state == "waiting"
    (attempt,) = trial.attempts
    assert (attempt.outcome, attempt.error) == ("released", None)
    assert "given back: the device cuda:0 cannot be used" in str(attempt.note)
    claim = store.trials.claim(study, store.workers.add(study.study_id, device="cpu"))
    assert claim is not None
    assert not claim.is_suspect  # it counts as no crash


def test_a_device_with_one_error_after_the_other_does_not_restart_for_ever(
    store: Store, make_spec: MakeSpec, loop: WriteLoop, gpu: Gpu
) -> None:
    loop(f"raise RuntimeError({ECC!r})")
    study = store.studies.create(make_spec(0.1), metadata={})
    for _ in range(MAX_DEVICE_FAILURES):
        with pytest.raises(DeviceFailed) as caught:
            work_on_gpu(store, study)
    assert caught.value.is_given_up
    (trial,) = store.trials.get_all(study)
    assert (trial.state, trial.attempt) == ("waiting", MAX_DEVICE_FAILURES)


@pytest.mark.parametrize(
    "problem",
    [
        None,
        "OutOfMemoryError: CUDA out of memory. Tried to allocate",
        "CUDA-capable device(s) is/are busy or unavailable",
    ],
    ids=["computes", "full", "exclusive to this process"],
)
def test_an_assertion_of_a_trials_own_kernel_is_the_trials_failure_and_leaves_the_process(
    store: Store, make_spec: MakeSpec, loop: WriteLoop, gpu: Gpu, problem: str | None
) -> None:
    gpu.problem = problem
    loop(f"raise RuntimeError({ASSERT!r})")
    study = store.studies.create(make_spec(0.1, search={"retries": 0}), metadata={})
    with pytest.raises(SystemExit) as caught:
        work_on_gpu(store, study)
    assert caught.value.code == EXIT_RESTART
    (trial,) = store.trials.get_all(study)
    assert (trial.state, trial.reason) == ("failed", f"RuntimeError: {ASSERT}")
    assert num_failures(store, study) == 0


def test_an_error_of_a_kernel_is_the_devices_where_a_new_process_cannot_compute_either(
    store: Store, make_spec: MakeSpec, loop: WriteLoop, gpu: Gpu
) -> None:
    gpu.problem = "RuntimeError: CUDA error: unspecified launch failure"
    loop("raise RuntimeError('CUDA error: an illegal memory access was encountered')")
    study = store.studies.create(make_spec(0.1, search={"retries": 0}), metadata={})
    with pytest.raises(DeviceFailed, match=r"unspecified launch failure \(after RuntimeError: CUDA error: an illegal"):
        work_on_gpu(store, study)
    assert [trial.state for trial in store.trials.get_all(study)] == ["waiting"]


def test_an_error_of_the_device_outside_of_a_trial_is_no_crash_of_the_worker(
    store: Store, make_spec: MakeSpec, loop: WriteLoop, gpu: Gpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_: object) -> None:
        raise RuntimeError(ECC)

    monkeypatch.setattr("hpo.workers.function_runner.FunctionRunner.drain", fail)
    loop("trial.report(trial.epochs, val_accuracy=1)")
    study = store.studies.create(make_spec(0.1), metadata={})
    with pytest.raises(DeviceFailed, match="uncorrectable ECC"):
        work_on_gpu(store, study)


@pytest.mark.parametrize("is_poisoned", [True, False])
def test_after_an_allocation_that_failed_the_process_goes_on_unless_the_device_answers_no_more(
    store: Store, make_spec: MakeSpec, loop: WriteLoop, gpu: Gpu, monkeypatch: pytest.MonkeyPatch, is_poisoned: bool
) -> None:
    def prove(*_: Any, **__: Any) -> None:
        gpu.num_proofs += 1
        if gpu.num_proofs > 1 and is_poisoned:
            raise RuntimeError("CUDA error: unspecified launch failure")

    monkeypatch.setattr(worker_device, "prove_device", prove)
    loop("""
if trial.attempt == 1 and trial.number == 0:
    raise RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`")
trial.report(trial.epochs, val_accuracy=1)
""")
    study = store.studies.create(make_spec(0.1, 0.2), metadata={})
    if is_poisoned:
        with pytest.raises(SystemExit):
            work_on_gpu(store, study)
    else:
        work_on_gpu(store, study)
    found = store.trials.get_all(study)
    assert found[0].attempts[0].outcome == "out of memory"
    assert [trial.state for trial in found] == (["waiting"] * 2 if is_poisoned else ["complete"] * 2)
    assert num_failures(store, study) == 0


def test_an_error_of_cuda_on_a_worker_of_the_cpu_is_the_trials_own(
    store: Store, make_spec: MakeSpec, loop: WriteLoop
) -> None:
    loop("raise RuntimeError('No CUDA GPUs are available')")
    study = store.studies.create(make_spec(0.1, search={"retries": 0}), metadata={})
    assert [trial.state for trial in work(store, study)] == ["failed"]
    assert store.workers.device_failures(study) == {}


def test_a_hanging_device_is_given_up_by_its_worker(
    store: Store, make_spec: MakeSpec, loop: WriteLoop, monkeypatch: pytest.MonkeyPatch
) -> None:
    import threading

    hangs = threading.Event()
    monkeypatch.setattr(worker_device, "prove_device", lambda *_, **__: hangs.wait())
    monkeypatch.setattr(worker_device, "PROOF_S", 0.1)
    loop("")
    with pytest.raises(DeviceFailed, match=r"it computed nothing in 0\.1 s"):
        work_on_gpu(store, store.studies.create(make_spec(0.1), metadata={}))
    hangs.set()


def test_a_users_own_loop_on_the_cpu_needs_no_proof_and_our_networks_do(
    store: Store, make_spec: MakeSpec, gpu: Gpu
) -> None:
    for spec, num_proofs in ((make_spec(0.1), 0), (engine_study(store, 1e-3).spec, 1)):
        WorkerDevice("cpu", torch_device="cpu", precisions=precisions_to_prove(spec, "cpu")).prove()
        assert gpu.num_proofs == num_proofs


def test_a_device_is_proven_in_every_precision_that_the_study_asks_for(store: Store, make_spec: MakeSpec) -> None:
    assert precisions_to_prove(make_spec(0.1), "cuda:0") == ("fp32",)
    assert precisions_to_prove(engine_study(store, 1e-3).spec, "cpu") == ("auto",)
    searched = StudySpec.from_dict(
        {"name": "s", "search": {"space": {"lr": {"low": 1e-4, "high": 1e-2}, "precision": ["fp32", "bf16"]}}}
    )
    assert precisions_to_prove(searched, "cuda:0") == ("auto", "bf16", "fp32")
