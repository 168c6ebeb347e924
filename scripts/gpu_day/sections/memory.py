"""Where memory runs out: what is planned with little of it left, and what each way raises and is taken for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from hpo.train.engines.captured_lanes import CapturedLanes
from hpo.train.engines.plain import build_lane
from hpo.train.engines.planning import plan_lanes
from hpo.train.failures import failure_kind
from scripts.gpu_day.common import Section, article_trial, device, free_memory, in_child, load, plain_engine, wait

TIMEOUT_S = 25.0


def run(section: Section) -> None:
    with section.trying("host"):
        section.say("host", what_is_raised(lambda: torch.empty(2**60, dtype=torch.uint8)))
    if not section.needs_gpu("gpu"):
        return
    for left_mb in (2000, 600):
        with section.trying(f"plan.{left_mb}_mb"):
            section.say(f"plan.{left_mb}_mb", planned(section, left_mb))
        free_memory()
    for left_mb in (600, 300, 150, 80):
        with section.trying(f"step.{left_mb}_mb"):
            section.say(f"step.{left_mb}_mb", stepped(section, left_mb))
        free_memory()
    for way in FIRST_USES:
        with section.trying(f"first_use.{way}"):
            section.say(f"first_use.{way}", in_child(first_use, way, timeout_s=TIMEOUT_S))
    with section.trying("limit"):
        section.say("limit", in_child(beyond_limit, timeout_s=TIMEOUT_S))
    with section.trying("pinned"):
        section.say("pinned", in_child(pinned, timeout_s=TIMEOUT_S))


def fill(left_mb: float) -> torch.Tensor:
    """Take the GPU's memory but for so much of it."""
    free_memory()
    free_bytes, _ = torch.cuda.mem_get_info()
    return torch.empty(max(0, int(free_bytes - left_mb * 1e6)), dtype=torch.uint8, device=device())


def planned(section: Section, left_mb: float) -> str:
    """Return what is planned where so much memory is left."""
    config = article_trial(section, 2000)
    data = load(config)
    held = fill(left_mb)
    try:
        captured = CapturedLanes(device=device())
        return plan_lanes(config, data=data, captured=captured, device=device(), max_lanes=64).reason
    finally:
        del held


def stepped(section: Section, left_mb: float) -> dict[str, Any]:
    """Return what a training step raises where so much memory is left."""
    config = article_trial(section, 2000)
    data = load(config)
    held = fill(left_mb)

    def step() -> None:
        lane = build_lane(config, data=data, device=device())
        plain_engine().step(lane, *next(data.train.batches(config.training.batch_size)))
        wait()

    try:
        return what_is_raised(step)
    finally:
        del held


def _product() -> None:
    matrix = torch.ones(512, 512, device=device())
    matrix @ matrix


def _convolution() -> None:
    images = torch.ones(8, 16, 32, 32, device=device())
    torch.nn.functional.conv2d(images, torch.ones(16, 16, 3, 3, device=device()), padding=1)


def _capture() -> None:
    numbers = torch.zeros(2**20, device=device())
    wait()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        torch.cat([numbers] * 64)
    graph.replay()


# What a library sets up when it is first used, here with nearly no memory left.
FIRST_USES: dict[str, Callable[[], None]] = {"product": _product, "convolution": _convolution, "capture": _capture}


def first_use(way: str) -> dict[str, Any]:
    """Return what the first use of a library raises in this process where 8 MB are left."""
    small = torch.zeros(2**18, device=device())  # so that the tensors of the use itself find room
    held = fill(8)

    def use() -> None:
        FIRST_USES[way]()
        wait()

    raised = what_is_raised(use)
    del small, held
    return raised


def beyond_limit() -> dict[str, Any]:
    """Return what torch raises beyond the share of the memory that a process was given."""
    torch.cuda.set_per_process_memory_fraction(0.01)
    return what_is_raised(lambda: torch.empty(torch.cuda.mem_get_info()[1] // 20, dtype=torch.uint8, device=device()))


def pinned() -> dict[str, Any]:
    """Return what too much pinned memory of the host raises."""
    return what_is_raised(lambda: torch.empty(2**50, dtype=torch.uint8, pin_memory=True))


def what_is_raised(function: Callable[[], object]) -> dict[str, Any]:
    """Return the type and the words of what a function raises, and how the product classifies it."""
    try:
        function()
    except Exception as error:
        names = [kind.__name__ for kind in type(error).__mro__[:3]]
        return {"raises": names, "words": str(error)[:400], "classified": failure_kind(error)}
    return {"raises": None}
