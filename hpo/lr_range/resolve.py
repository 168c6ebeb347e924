"""Range tests of a study's networks: what is tested, what becomes of `lr = "auto"`, and what the study keeps of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hpo.config.import_policy import load_own_spec
from hpo.config.study_spec import StudySpec
from hpo.errors import UserError
from hpo.search.space import AUTO, Categorical, Conditional, Parameter, Range, Scalar, is_auto, value_combinations
from hpo.system.devices import choose_devices
from hpo.train.config import TrialConfig, derive_seed
from hpo.train.optim import SCHEDULES

if TYPE_CHECKING:
    from hpo.study.records import StudyRecord
    from hpo.system.devices import Device
    from hpo.train.lr_ramp import RangeTest
from hpo.analysis.range_text import RANGE_TEST_KEY, active_parameter

MAX_RANGE_TESTS = 8  # of one study: each takes most of an epoch
MAX_STORED_POINTS = 64  # of a ramp, that are kept with the study
# What a ramp does not depend on: it is one epoch with rates of its own.
UNTESTED = frozenset({"lr", "seed", "epochs", "schedule", "warmup_epochs"}).union(*(s.keys for s in SCHEDULES.values()))
# Called after each step with the listed values of the network that is tested, how many steps are done, and of how many.
RampProgress = Callable[[Mapping[str, Any], int, int], None]


@dataclass(frozen=True)
class Ramp:
    """The range test of the network with these values of listed parameters (optimizer, batch size...)."""

    params: Mapping[str, Any]
    test: RangeTest

    def as_dict(self) -> dict[str, Any]:
        """As plain data for JSON; a loss that was not finite is None."""
        found = asdict(self.test)
        return {"params": dict(self.params), **found, "losses": [_finite(loss) for loss in found["losses"]]}


def range_test(
    spec: StudySpec | str | Path,
    *,
    devices: str = "auto",
    code_folder: str | Path | None = None,
    progress: RampProgress = lambda params, done, of: None,
) -> list[Ramp]:
    """Ramps the learning rate of a study's network over less than an epoch (Smith, arXiv 1506.01186), on one device.

    One test for each combination of listed values that changes how the network is trained (optimizer, batch size...),
    MOST_TESTS at most: `params` has those values, and `test` the learning rates and losses (nats) of the ramp, where
    the loss `falls`, is `lowest` and `breaks`, and the range to search, `low` to `high`. `progress(params, done, of)`
    is called after each step. Nothing is written. Raises UserError for a wrong request.
    """
    spec, allowed = load_own_spec(spec, folder=code_folder)
    with allowed.importable():
        return measure_ramps(spec, devices, progress=progress)


def measure_ramps(
    spec: StudySpec, devices: str, *, progress: RampProgress = lambda params, done, of: None
) -> list[Ramp]:
    """Tests the network on the first of these devices, for each combination of listed values that changes its training.

    Other ranges count with their middle, and learning rates and schedules do not count. Raises UserError for a loop of
    the user's own, for more than MOST_TESTS combinations, and for networks that cannot be trained.
    """
    device = choose_devices(devices)[0]
    tested = []
    for values in _values_to_test(spec):
        config = spec.trial_config(values, seed=derive_seed(spec.training.seed, "range test"))
        params = {
            key: value for key, value in values.items() if isinstance(active_parameter(spec, key, values), Categorical)
        }
        tested.append(Ramp(params, _run_range_test(config, device, partial(progress, params))))
    return tested


def _run_range_test(config: TrialConfig, device: Device, progress: Callable[[int, int], None]) -> RangeTest:
    """On a GPU, in a process pinned to it: the process that only supervises is to take none of its memory."""
    if device.kind == "cuda":
        from hpo.lr_range.subprocess import range_test_in_subprocess

        return range_test_in_subprocess(config, device, progress=progress)
    from hpo.train.lr_ramp import run_range_test

    return run_range_test(config, device=device.kind, progress=progress)


def resolve(
    spec: StudySpec, *, measure: Callable[[StudySpec], Sequence[Ramp]], stored: Callable[[], StudyRecord | None]
) -> tuple[StudySpec, dict[str, Any]]:
    """The spec without `"auto"` and the metadata of the tests that were made, none where `stored()` has the study."""
    if not needs_range_test(spec) or not needs_range_test(spec := adopt_stored_ranges(spec, stored())):
        return spec, {}
    tested = measure(spec)
    adopted = adopt_stored_ranges(spec, stored())  # another command may have been faster
    return fill_in_ranges(spec, tested) if needs_range_test(adopted) else (adopted, {})


def fill_in_ranges(spec: StudySpec, tested: Sequence[Ramp]) -> tuple[StudySpec, dict[str, Any]]:
    """The spec with the range that was found in place of each `lr = "auto"`, and the metadata that says so.

    A range holds what each test proposes for it, and the learning rates of `search.try_first`. Raises UserError where a
    test found no learning rate that trains.
    """
    settings = spec.frozen()
    lr = spec.search.parameters["lr"]
    if isinstance(lr, Conditional):
        written = settings["search"]["space"]["lr"]["by"][lr.by]
        for case in [case for case, value in written.items() if value == AUTO]:
            alike = [one for one in tested if str(one.params.get(lr.by)) == case]
            first = [point for point in spec.search.try_first if str(point.get(lr.by)) == case]
            written[case] = _covering_range(f"search.space.lr.by.{lr.by}.{case}", alike, first)
    else:
        settings["search"]["space"]["lr"] = _covering_range("search.space.lr", tested, spec.search.try_first)
    return StudySpec.from_dict(settings), {RANGE_TEST_KEY: [_thin_ramp(one.as_dict()) for one in tested]}


def adopt_stored_ranges(spec: StudySpec, study: StudyRecord | None) -> StudySpec:
    """The spec with the stored study's ranges in place of `"auto"`, where range tests found those; no test is made."""
    if study is None or RANGE_TEST_KEY not in study.metadata or not needs_range_test(spec):
        return spec
    settings = spec.frozen()
    here, there = settings["search"]["space"], study.spec.frozen()["search"]["space"].get("lr")
    if here["lr"] == AUTO:
        if isinstance(there, dict) and "by" not in there:
            here["lr"] = there
    else:
        ((by, cases),) = here["lr"]["by"].items()
        known = there.get("by", {}).get(by, {}) if isinstance(there, dict) else {}
        cases |= {case: known[case] for case, value in cases.items() if value == AUTO and case in known}
    try:
        return StudySpec.from_dict(settings)
    except UserError:  # such as a learning rate to try first that is outside: the difference is what is to be said
        return spec


def needs_range_test(spec: StudySpec) -> bool:
    """Whether a range test has to be made before the study can be created."""
    return is_auto(spec.search.parameters.get("lr"))


def _values_to_test(spec: StudySpec) -> list[dict[str, Scalar]]:
    """The values of each network to be tested."""
    if spec.objective:
        raise UserError(
            f"a range test needs [model] and [data]; study {spec.name!r} has a loop of its own, objective.function"
        )
    parameters = spec.search.parameters
    lr = parameters.get("lr")
    needed = {parameter.by for parameter in parameters.values() if isinstance(parameter, Conditional)}
    kept = {
        key: _with_middle_only(parameter)
        for key, parameter in parameters.items()
        if key not in UNTESTED or key in needed
    }
    points = list(value_combinations(kept, lambda choice: choice.grid_values()))
    if isinstance(lr, Conditional) and is_auto(lr):
        points = [point for point in points if is_auto(lr.cases.get(str(point[lr.by])))]
    if len(points) > MAX_RANGE_TESTS:
        lists = ", ".join(key for key, parameter in parameters.items() if key in kept and not _is_range(parameter))
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


def _is_range(parameter: Parameter) -> bool:
    return not isinstance(parameter, Categorical | Conditional)


def _covering_range(setting: str, tested: Sequence[Ramp], first: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The range that holds those of these tests, and the learning rates that are to be tried first."""
    lows, highs = [], []
    for one in tested:
        if one.test.low is None or one.test.high is None:
            raise UserError(
                f"{setting} cannot be 'auto': the range test{f' with {dict(one.params)}' if one.params else ''} "
                "found no learning rate at which the loss stays finite; give low and high"
            )
        lows.append(float(f"{one.test.low:.2g}"))
        highs.append(float(f"{one.test.high:.2g}"))
    asked = [float(point["lr"]) for point in first if "lr" in point]
    return {"low": min(lows + asked), "high": max(highs + asked), "log": True}


def _thin_ramp(found: Mapping[str, Any]) -> dict[str, Any]:
    """With so many points of the ramp that a plot needs, and no more digits than that."""
    every = math.ceil(len(found["lrs"]) / MAX_STORED_POINTS)
    lrs = [float(f"{lr:.4g}") for lr in found["lrs"][::every]]
    losses = [None if loss is None else float(f"{loss:.4g}") for loss in found["losses"][::every]]
    return {**found, "lrs": lrs, "losses": losses}


def _finite(loss: float) -> float | None:
    return loss if math.isfinite(loss) else None
