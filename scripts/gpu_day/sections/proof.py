"""A worker's proof of its device: in this process, in a process of its own, and with no GPU to be seen."""

from __future__ import annotations

import time

from hpo.train.device_proof import DeviceProof, prove_device
from scripts.gpu_day.common import Section, device, on_gpu
from scripts.gpu_day.stand_in import is_here

PRECISIONS = ("auto", "fp32")


def run(section: Section) -> None:
    with section.trying("here"):
        start_s = time.perf_counter()
        prove_device(str(device()), precisions=PRECISIONS)
        first_s = time.perf_counter() - start_s
        prove_device(str(device()), precisions=PRECISIONS)
        section.say("here", {"first_s": first_s, "second_s": time.perf_counter() - start_s - first_s})
    if not is_here("annotated_types"):
        section.say("process", "not run: annotated_types is not here, which `python -m hpo.train.device_proof` needs")
        return
    with section.trying("process"):
        start_s = time.perf_counter()
        problem = problem_in_process(str(device()), section.environment())
        section.say("process", {"problem": problem, "seconds": time.perf_counter() - start_s})
        assert problem is None, problem
    if on_gpu():
        with section.trying("hidden"):  # what a worker whose GPU is gone reads
            section.say(
                "hidden",
                {"problem": problem_in_process("cuda:0", section.environment() | {"CUDA_VISIBLE_DEVICES": ""})},
            )


def problem_in_process(name: str, environment: dict[str, str]) -> str | None:
    """Return why a new process cannot use a device, or None where it computes."""
    with DeviceProof(name, precisions=PRECISIONS, environment=environment) as proof:
        return proof.problem()
