"""Prove that a device computes: train a convolution and multiply matrices on it, whose results are known.

Run as a program, it proves the device in a process of its own, which takes no memory of the caller's, and can be given
up where the device hangs.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from typing import Self

from hpo.errors import UserError
from hpo.system.devices import Device, torch_device, worker_environment
from hpo.system.readable import prepare_output
from hpo.system.safe_path import SAFE_PATH
from hpo.train.config import TrainingConfig

PROOF_S = 120.0  # how long a proof may take with its imports; a device that takes longer hangs
FAILED_PREFIX = "hpo device proof: "  # begins the line with the error: drivers write to the output, too
# Sums of ones: exact in every precision, up to the rounding of a Winograd transform.
TOLERANCE = 1e-2


def prove_device(device: str, *, precisions: Iterable[str]) -> None:
    """Compute on a device in each of these precisions of a study ("auto", "fp32", "bf16"), and wait for the results.

    It draws no random number and changes no setting of torch.

    Raises:
        UserError: The device does not compute in one of the precisions.
        Exception: Whatever torch raises, or RuntimeError where a result is wrong.
    """
    import torch

    from hpo.train.engines.lane_state import mixed_precision

    place = torch.device(device)
    torch.zeros(1, device=place)  # or torch says why it cannot; autocast would only warn
    for precision in sorted(set(precisions)):
        dtype = mixed_precision(TrainingConfig(precision=precision), device=place)  # type: ignore[arg-type]
        with torch.autocast(place.type, dtype=dtype or torch.bfloat16, enabled=dtype is not None):
            _compute(device)


def _compute(device: str) -> None:
    """Train a convolution for a step and multiply two matrices; raise RuntimeError where a result is wrong."""
    import torch
    from torch.nn import functional

    images_BCHW = torch.ones(2, 4, 8, 8, device=device)
    weights = torch.ones(8, 4, 3, 3, device=device, requires_grad=True)
    features_BCHW = functional.conv2d(images_BCHW, weights)
    features_BCHW.float().sum().backward()  # type: ignore[no-untyped-call]
    assert weights.grad is not None
    product = torch.ones(64, 64, device=device) @ torch.ones(64, 64, device=device)
    # Read to the host: until then, nothing need have been computed.
    for name, results, expected in [
        ("a convolution", features_BCHW, 36.0),
        ("the gradient of a convolution", weights.grad, 72.0),
        ("a matrix product", product, 64.0),
    ]:
        worst = float((results.detach().float() - expected).abs().max())
        if not worst <= TOLERANCE * expected:  # also for NaN
            raise RuntimeError(f"{name} is wrong by {worst:g}, where {expected:g} is right")


class DeviceProof:
    """A proof of a device in a process of its own, which has begun when this is made.

    A context manager, which ends the process.
    """

    def __init__(self, device: str, *, precisions: Iterable[str], environment: Mapping[str, str]) -> None:
        """Begin a proof.

        Args:
            device: The device, as torch names it in the new process.
            precisions: As in `prove_device`.
            environment: All environment variables of the process, among them those that pin it to a device.
        """
        self._process = subprocess.Popen(
            [sys.executable, *SAFE_PATH, "-m", "hpo.train.device_proof", device, *sorted(set(precisions))],
            env=dict(environment),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            encoding="utf-8",
            errors="replace",
            start_new_session=True,
        )
        self._deadline_s = time.monotonic() + PROOF_S

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        assert self._process.stdout is not None
        self._process.stdout.close()
        with suppress(subprocess.TimeoutExpired):  # a process that hangs in its driver cannot even be killed
            self._process.wait(1.0)

    def problem(self) -> str | None:
        """Wait for the proof, and return in a line why the device cannot be used, or None where it computes."""
        try:
            output, _ = self._process.communicate(timeout=max(0.0, self._deadline_s - time.monotonic()))
        except subprocess.TimeoutExpired:
            return f"it computed nothing in {PROOF_S:g} s"
        if self._process.returncode == 0:
            return None
        failed = [line.removeprefix(FAILED_PREFIX) for line in output.splitlines() if line.startswith(FAILED_PREFIX)]
        return failed[-1] if failed else f"the process that tried it ended with exit code {self._process.returncode}"


@contextmanager
def proofs_of(devices: Iterable[Device], *, precisions: Iterable[str]) -> Iterator[dict[str, DeviceProof]]:
    """Begin to prove each of these devices but the CPU, all at the same time, and give the proofs by device name."""
    precisions = set(precisions)
    with ExitStack() as begun:
        yield {
            device.name: begun.enter_context(
                DeviceProof(
                    torch_device(device),
                    precisions=precisions,
                    environment={**os.environ, **worker_environment(device, threads=1)},
                )
            )
            for device in devices
            if device.kind != "cpu"
        }


def _run() -> int:
    """Prove the device and the precisions that the command line names, and return the exit code."""
    device, *precisions = sys.argv[1:]
    try:
        prove_device(device, precisions=precisions)
    except Exception as error:
        text = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
        print(f"\n{FAILED_PREFIX}{text.splitlines()[0]}", flush=True)
        return 1
    return 0


if __name__ == "__main__":
    prepare_output(encoding="utf-8")
    exit_code = _run()
    sys.stdout.flush()
    os._exit(exit_code)  # a driver that fails at the end of a process must not turn the result over
