"""The device of a worker: proven before its first claim, and judged after an error that it may have caused."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Collection

from hpo.config.study_spec import StudySpec
from hpo.errors import UserError
from hpo.train.device_proof import PROOF_S, DeviceProof, prove_device
from hpo.train.failures import failure_kind, first_line

logger = logging.getLogger(__name__)


class DeviceFailed(Exception):
    """A worker's device cannot be used, which is no failure of the trials on it. The text is one sentence, for people.

    `is_given_up` is true where it has failed so often that no worker should try it again.
    """

    def __init__(self, device: str, reason: str, *, is_given_up: bool = False) -> None:
        super().__init__(f"the device {device} cannot be used: {reason}")
        self.reason = reason
        self.is_given_up = is_given_up


class WorkerDevice:
    """A device that a worker trains on.

    `name` is what users type, `torch_device` what torch calls it in this process. `precisions` are those of
    `precisions_to_prove`; without any it needs no proof.
    """

    def __init__(self, name: str, *, torch_device: str, precisions: Collection[str]) -> None:
        self.name = name
        self._torch_device = torch_device
        self._precisions = precisions
        self._environment = dict(os.environ)  # as it pins this process: a user's loop may change it

    def prove(self) -> None:
        """Prove that the device computes; raise DeviceFailed where it does not, or hangs."""
        error = self._try_here() if self._precisions else None
        if error is not None:
            reason = str(error) if isinstance(error, UserError) else first_line(error)
            raise DeviceFailed(self.name, reason) from error

    def failure_behind(self, error: BaseException) -> DeviceFailed | None:
        """Return the failure of the device that caused an exception in training, or None where the trial is to blame.

        A kernel that fails leaves its whole process unable to compute, whoever is to blame. A new process that computes
        on the device shows that the device is not. Where the new process only finds the device taken, by this process,
        that shows nothing, and the exception stays the trial's.
        """
        kind = failure_kind(error)
        if kind in (None, "memory") or self._torch_device == "cpu":
            return None
        if kind == "broken":
            return DeviceFailed(self.name, first_line(error))
        logger.warning("%s failed: trying it in a new process", self.name)
        with DeviceProof(self._torch_device, precisions=self._precisions, environment=self._environment) as proof:
            problem = proof.problem()
        if problem is None or failure_kind(RuntimeError(problem)) == "memory" or "busy or unavailable" in problem:
            return None
        return DeviceFailed(self.name, f"{problem} (after {first_line(error)})")

    def is_lost_to_process(self, error: BaseException) -> bool:
        """Return whether this process cannot compute on the device any more after an exception in training."""
        kind = failure_kind(error)
        if self._torch_device == "cpu":
            return kind in ("broken", "poisoned")  # of a device that the user's loop has taken by itself
        if kind == "memory":
            later = self._try_here()
            return later is not None and failure_kind(later) != "memory"
        return kind is not None

    def _try_here(self) -> Exception | None:
        """Compute on the device in this process; return what was raised, also where nothing comes back in time."""
        errors: list[Exception] = []

        def prove() -> None:
            try:
                prove_device(self._torch_device, precisions=self._precisions)
            except Exception as error:
                errors.append(error)

        if self._torch_device == "cpu":
            prove()
        else:  # in a thread, since a device that hangs would keep the worker for ever
            thread = threading.Thread(target=prove, daemon=True, name="device proof")
            thread.start()
            thread.join(PROOF_S)
            if thread.is_alive():
                return TimeoutError(f"it computed nothing in {PROOF_S:g} s")
        return errors[0] if errors else None


def precisions_to_prove(spec: StudySpec, torch_device: str) -> tuple[str, ...]:
    """Return the precisions, as `training.precision` names them, in which a study's trials compute on a device.

    It is none for a user's own loop on a CPU, which may do without torch, whose import takes seconds.
    """
    if not spec.has_recipe:
        return () if torch_device == "cpu" else ("fp32",)
    searched = spec.search.parameters.get("precision")
    return tuple(sorted({spec.training.precision, *(map(str, searched.extreme_values()) if searched else [])}))
