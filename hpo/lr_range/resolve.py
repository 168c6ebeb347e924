"""Range tests of a study's networks: which are tested, what replaces `lr = "auto"`, and what the study keeps of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hpo.analysis.range_text import RANGE_TEST_KEY, active_parameter
from hpo.config.import_policy import GivenStudy, load_own_spec
from hpo.config.study_spec import StudySpec
from hpo.errors import UserError
from hpo.search.space import AUTO, Categorical, Conditional, Parameter, Range, Scalar, is_auto, value_combinations
from hpo.system.devices import choose_devices, pinned_here, threads_per_worker
from hpo.train.config import TrialConfig, derive_seed
from hpo.train.imports import open_allowlists
from hpo.train.schedules import SCHEDULES

if TYPE_CHECKING:
    from hpo.study.records import StudyRecord
    from hpo.system.devices import Device
    from hpo.train.lr_ramp import RangeTest

MAX_RANGE_TESTS = 8  # of one study: each takes most of an epoch
MAX_STORED_POINTS = 64  # of a ramp, in the store
# Parameters that a ramp does not depend on: it is one epoch with rates of its own.
NO_PART_OF_RAMP = frozenset({"lr", "seed", "epochs", "schedule", "warmup_epochs", "mixup", "cutmix", "ema"}).union(
    *(schedule.keys for schedule in SCHEDULES.values())
)
# Called after each step with the listed values of the tested network, the number of steps done, and that of all steps.
RampProgress = Callable[[Mapping[str, Any], int, int], None]


@dataclass(frozen=True)
class Ramp:
    """The range test of the network with these values of listed parameters (optimizer, batch size...)."""

    params: Mapping[str, Any]
    test: RangeTest

    def as_dict(self) -> dict[str, Any]:
        """Return the test as plain data for JSON; a loss that was not finite is None."""
        losses = [loss if math.isfinite(loss) else None for loss in self.test.losses]
        return {"params": dict(self.params), **asdict(self.test), "losses": losses}


def range_test(
    spec: GivenStudy,
    *,
    devices: str = "auto",
    code_folder: str | Path | None = None,
    progress: RampProgress = lambda params, done, of: None,
) -> list[Ramp]:
    """Ramp the learning rate of a study's network over less than an epoch (Smith, arXiv 1506.01186), on one device.

    There is one test for each combination of listed values that changes how the network is trained (optimizer, batch
    size...), at most MAX_RANGE_TESTS. Nothing is written.

    Args:
        spec: As in `hpo.run`.
        devices: The devices to choose from, such as "auto" or "cuda:1"; the first one is used.
        code_folder: The folder of the user's own modules; by default that of the study file.
        progress: Called after each step with the values of the tested network, the steps done, and the number of steps.

    Returns:
        The tests. `params` has the listed values. `test` has the learning rates and losses (nats) of the ramp, where
        the loss `falls`, is `lowest` and `breaks`, and the range to search, `low` to `high`.

    Raises:
        UserError: The request is wrong, or the network cannot be trained.
    """
    spec, allowed = load_own_spec(spec, folder=code_folder)
    with allowed.importable():
        return measure_ramps(spec, devices, progress=progress)


def measure_ramps(
    spec: StudySpec,
    devices: str,
    threads: int | None = None,
    *,
    progress: RampProgress = lambda params, done, of: None,
) -> list[Ramp]:
    """Run a range test on the first of these devices for each combination of listed values that changes the training.

    Other ranges count with their middle, and learning rates and schedules do not count.

    Args:
        spec: The study.
        devices: The devices to choose from, as --devices names them.
        threads: CPU threads. Default: those of a worker that has the machine to itself.
        progress: As in `range_test`.

    Raises:
        UserError: The study has a loop of its own, more than MAX_RANGE_TESTS combinations, or a network that cannot be
            trained.
    """
    device = choose_devices(devices)[0]
    ramps = []
    for values in _values_to_test(spec):
        config = spec.trial_config(values, seed=derive_seed(spec.training.seed, "range test"))
        listed = [key for key in values if isinstance(active_parameter(spec, key, values), Categorical)]
        params = {key: values[key] for key in listed}
        ramps.append(Ramp(params, _run_on_device(config, device, threads, partial(progress, params))))
    return ramps


def _run_on_device(
    config: TrialConfig, device: Device, threads: int | None, progress: Callable[[int, int], None]
) -> RangeTest:
    """Run a range test, on a GPU in a process pinned to it, so that this process takes none of the GPU's memory.

    What only this process can call is tested in this process.
    """
    threads = threads or threads_per_worker(1)
    if device.kind == "cuda" and not any(allowlist.objects for allowlist in open_allowlists()):
        from hpo.lr_range.subprocess import range_test_in_subprocess

        return range_test_in_subprocess(config, device, threads=threads, progress=progress)
    import torch

    from hpo.train.lr_ramp import run_range_test

    before = torch.get_num_threads()
    torch.set_num_threads(threads)  # as in a worker: the same sums, digit for digit
    try:
        with pinned_here(device) as place:
            return run_range_test(config, device=place, progress=progress)
    finally:
        torch.set_num_threads(before)


def resolve(
    spec: StudySpec, *, measure: Callable[[StudySpec], Sequence[Ramp]], stored: Callable[[], StudyRecord | None]
) -> tuple[StudySpec, dict[str, Any]]:
    """Return the spec without `"auto"`, and the metadata of the tests that were run, if the study is not stored yet."""
    if not needs_range_test(spec) or not needs_range_test(spec := adopt_stored_ranges(spec, stored())):
        return spec, {}
    ramps = measure(spec)
    adopted = adopt_stored_ranges(spec, stored())  # another command may have been faster
    return fill_in_ranges(spec, ramps) if needs_range_test(adopted) else (adopted, {})


def fill_in_ranges(spec: StudySpec, ramps: Sequence[Ramp]) -> tuple[StudySpec, dict[str, Any]]:
    """Return the spec with a range in place of each `lr = "auto"`, and the metadata that records the tests.

    A range holds the ranges that its tests propose, and the learning rates of `search.try_first`.

    Raises:
        UserError: A test found no learning rate that trains.
    """
    settings = spec.frozen()
    lr = spec.search.parameters["lr"]
    if isinstance(lr, Conditional):
        written = settings["search"]["space"]["lr"]["by"][lr.by]
        for case in [case for case, value in written.items() if value == AUTO]:
            of_case = [ramp for ramp in ramps if str(ramp.params.get(lr.by)) == case]
            first = [point for point in spec.search.try_first if str(point.get(lr.by)) == case]
            written[case] = _covering_range(f"search.space.lr.by.{lr.by}.{case}", of_case, first)
    else:
        settings["search"]["space"]["lr"] = _covering_range("search.space.lr", ramps, spec.search.try_first)
    return StudySpec.from_dict(settings), {RANGE_TEST_KEY: [_thin_ramp(ramp.as_dict()) for ramp in ramps]}


def adopt_stored_ranges(spec: StudySpec, study: StudyRecord | None) -> StudySpec:
    """Return the spec with the ranges that the stored study has from its own range tests in place of `"auto"`."""
    if study is None or RANGE_TEST_KEY not in study.metadata or not needs_range_test(spec):
        return spec
    settings = spec.frozen()
    space, stored_lr = settings["search"]["space"], study.spec.frozen()["search"]["space"].get("lr")
    if space["lr"] == AUTO:
        if isinstance(stored_lr, dict) and "by" not in stored_lr:
            space["lr"] = stored_lr
    else:
        ((by, cases),) = space["lr"]["by"].items()
        known = stored_lr.get("by", {}).get(by, {}) if isinstance(stored_lr, dict) else {}
        cases |= {case: known[case] for case, value in cases.items() if value == AUTO and case in known}
    try:
        return StudySpec.from_dict(settings)
    except UserError:  # such as a learning rate to try first that is outside; the caller reports the difference
        return spec


def needs_range_test(spec: StudySpec) -> bool:
    """Return whether a range test must run before the study can be created."""
    return is_auto(spec.search.parameters.get("lr"))


def _values_to_test(spec: StudySpec) -> list[dict[str, Scalar]]:
    """Return the values of each network to test."""
    if spec.objective is not None and not spec.has_recipe:
        raise UserError(
            f"a range test needs [model] and [data]; study {spec.name!r} has a loop of its own, "
            f"{spec.objective.setting}"
        )
    parameters = spec.search.parameters
    lr = parameters.get("lr")
    needed = {parameter.by for parameter in parameters.values() if isinstance(parameter, Conditional)}
    kept = {
        key: _with_middle_only(parameter)
        for key, parameter in parameters.items()
        if key not in NO_PART_OF_RAMP or key in needed
    }
    points = list(value_combinations(kept, lambda choice: choice.grid_values()))
    if isinstance(lr, Conditional) and is_auto(lr):
        points = [point for point in points if is_auto(lr.cases.get(str(point[lr.by])))]
    if len(points) > MAX_RANGE_TESTS:
        lists = ", ".join(key for key in kept if not isinstance(parameters[key], Range))
        raise UserError(
            f"search.space must have at most {MAX_RANGE_TESTS} combinations of listed values for range tests, "
            f"got {len(points)} (of {lists}); give search.space.lr low and high"
        )
    return points


def _with_middle_only(parameter: Parameter) -> Parameter:
    """Return the parameter with each range replaced by its middle."""
    if isinstance(parameter, Conditional):
        return Conditional(by=parameter.by, cases={name: _middle(case) for name, case in parameter.cases.items()})
    return _middle(parameter)


def _middle(parameter: Range | Categorical) -> Categorical:
    return parameter if isinstance(parameter, Categorical) else Categorical((parameter.value_at(0.5),))


def _covering_range(setting: str, ramps: Sequence[Ramp], first: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the range that holds those of these tests, and the learning rates to try first."""
    lows, highs = [], []
    for ramp in ramps:
        if ramp.test.low is None or ramp.test.high is None:
            network = f" with {dict(ramp.params)}" if ramp.params else ""
            raise UserError(
                f"{setting} cannot be 'auto': the range test{network} found no learning rate at which the loss stays "
                "finite; give low and high"
            )
        lows.append(float(f"{ramp.test.low:.2g}"))
        highs.append(float(f"{ramp.test.high:.2g}"))
    given = [float(point["lr"]) for point in first if "lr" in point]
    return {"low": min(lows + given), "high": max(highs + given), "log": True}


def _thin_ramp(test: Mapping[str, Any]) -> dict[str, Any]:
    """Return a range test with no more points of the ramp, and no more digits, than a plot needs."""
    every = math.ceil(len(test["lrs"]) / MAX_STORED_POINTS)
    lrs = [float(f"{lr:.4g}") for lr in test["lrs"][::every]]
    losses = [None if loss is None else float(f"{loss:.4g}") for loss in test["losses"][::every]]
    return {**test, "lrs": lrs, "losses": losses}
