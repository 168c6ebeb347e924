"""A worker's process as its supervisor sees it: its task, and what its end says of its trials."""

from __future__ import annotations

import signal

import pytest

from hpo.config.import_policy import ImportAllowlist
from hpo.workers.worker_handle import EXIT_RESTART, WorkerTask, cause_of_death, describe_exit_code


def test_a_worker_is_given_its_task_whole() -> None:
    allowed = ImportAllowlist(("loop",), ("/studies",))
    task = WorkerTask("sqlite:///hpo.db", "s", "cuda:1", "cuda:0", 3, allowed, host="node-1", outlives=False)
    assert WorkerTask.from_json(task.to_json()) == task


@pytest.mark.parametrize(
    ("exit_code", "cause"),
    [
        (None, "gone"),
        (EXIT_RESTART, "gone"),
        (-signal.SIGTERM, "gone"),
        (-signal.SIGKILL, "killed"),
        (-signal.SIGSEGV, "crashed"),
        (1, "crashed"),
    ],
)
def test_only_an_end_that_nobody_asked_for_counts_against_the_trials(exit_code: int | None, cause: str) -> None:
    assert cause_of_death(exit_code) == cause


def test_an_end_is_described_by_its_signal_or_its_exit_code() -> None:
    assert describe_exit_code(-signal.SIGKILL) == "by SIGKILL"
    assert describe_exit_code(3) == "with exit code 3"
