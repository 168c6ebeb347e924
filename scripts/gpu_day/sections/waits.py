"""Whether a step waits for the GPU: of the plain engine, of a stack and of captured lanes, batches included.

torch raises where one of its operations waits, so the first one is named. What is read once in an epoch may wait.
"""

from __future__ import annotations

from collections.abc import Callable

from hpo.train.config import TrialConfig
from hpo.train.data.loading import SplitDataset
from hpo.train.engines.captured_lanes import CapturedLanes
from hpo.train.engines.plain import build_lane
from hpo.train.engines.stack import TrialStack
from scripts.gpu_day.common import Section, device, load, must_not_wait, on_gpu, plain_engine, small_trial, wait


def run(section: Section) -> None:
    if not on_gpu():
        section.say("gpu", "nothing waits on a CPU; the steps below ran unwatched")
    config = small_trial(section, num_images=2000)
    data = load(config)
    ways: dict[str, Callable[[TrialConfig, SplitDataset], int]] = {
        "plain": plain_steps,
        "captured": captured_steps,
        "stack": stack_steps,
    }
    for name, steps in ways.items():
        with section.trying(name):
            try:
                section.say(name, {"num_waiting": 0, "num_steps": steps(config, data)})
            except RuntimeError as error:
                if "called a synchronizing CUDA operation" not in str(error):
                    raise
                section.say(name, {"num_waiting": 1, "first": where_raised(error)})


def where_raised(error: BaseException) -> str:
    """Return the last lines of this repository in a traceback, innermost last."""
    lines, traceback = [], error.__traceback__
    while traceback is not None:
        lines.append(f"{traceback.tb_frame.f_code.co_filename}:{traceback.tb_lineno}")
        traceback = traceback.tb_next
    return " > ".join(lines[-4:])


def plain_steps(config: TrialConfig, data: SplitDataset) -> int:
    """Train an epoch but for its first step; return the number of steps that were watched."""
    engine, lane = plain_engine(), build_lane(config, data=data, device=device())
    batches = data.train.batches(config.training.batch_size, seed=0, epoch=0)
    engine.step(lane, *next(batches))
    wait()
    num_steps = 0
    with must_not_wait():
        for images_BCHW, labels_B in batches:
            engine.step(lane, images_BCHW, labels_B)
            num_steps += 1
    wait()
    return num_steps


def captured_steps(config: TrialConfig, data: SplitDataset) -> int:
    """Replay the steps of an epoch of four lanes but for the first one."""
    engine = CapturedLanes(device=device())
    engine.fill(config, 4)
    engine.issue_step()
    wait()
    num_steps = data.train.num_batches(config.training.batch_size) - 1
    with must_not_wait():
        for _ in range(num_steps):
            engine.issue_step()
    wait()
    return num_steps


def stack_steps(config: TrialConfig, data: SplitDataset) -> int:
    """Train an epoch of a stack of four but for its first step."""
    stack = TrialStack(config, data=data, device=device(), convolution="grouped")
    for _ in range(4):
        stack.admit(config)
    factors = stack.factors(stack.num_steps)
    batches = enumerate(stack.batches())
    index, batch = next(batches)
    stack.step(*batch, factors[index])
    wait()
    with must_not_wait():
        for index, batch in batches:
            stack.step(*batch, factors[index])
    wait()
    return index
