"""The tables [search] and [pruner] of a study file, as frozen models: types, defaults, bounds and descriptions."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Annotated, Any, NamedTuple, Protocol

from pydantic import BaseModel, ConfigDict, Field

from hpo.errors import Rule
from hpo.search.space import Categorical, Conditional, Parameter, Scalar, grid_points, parse_space

DEFAULT_TRIALS = 20
DEFAULT_TRAININGS = 2.0  # of a race
MAX_HOURS = 100_000
UNTIL_PATTERN = r"^(\d+(\.\d*)?|\.\d+) (decades?|points?)$"


class Section(BaseModel):
    """A table of the study file: frozen, with known keys only and finite numbers only."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Goal(NamedTuple):
    """How sure the answer should be before a search ends: its doubt is at most `amount` of the `unit`."""

    amount: float
    unit: str  # decade: of the interval | point: a percentage point by which the recommended rate falls short


class SearchSpec(Section):
    """What is searched: the sampler, the number of trials, and the search space.

    `space` is as in the study file; `parameters` is the space, parsed.
    """

    sampler: Annotated[str, Field(description="The sampler: how values are drawn.")] = "tpe"
    trials: Annotated[
        int | None,
        Field(
            ge=1,
            le=10**6,
            description="The budget: the largest number of trials, 20 by default. A grid and a race have their own.",
        ),
    ] = None
    trainings: Annotated[
        float | None,
        Field(
            gt=0,
            le=10**6,
            description="race: the epochs of all trials together, counted in complete trials; 2 by default.",
        ),
    ] = None
    until: Annotated[
        str | None,
        Field(
            pattern=UNTIL_PATTERN,
            description=(
                "End the search early, once its answer is sure enough: '0.3 decades' is the width of the 90 % interval "
                "of the best learning rate, '0.5 points' the percentage points of accuracy that the recommended rate "
                "is expected to fall short by."
            ),
        ),
        Rule("a width of the interval or an expected shortfall, such as '0.3 decades' or '0.5 points'"),
    ] = None
    hours: Annotated[
        float | None,
        Field(
            gt=0,
            le=MAX_HOURS,
            description=(
                "Begin no new trial once the search has trained for this many hours. Pauses do not count, and several "
                "workers at once count once."
            ),
        ),
    ] = None
    grow: Annotated[
        bool,
        Field(
            description=(
                "Widen the range of learning rates by a decade where the best ones lie at an end of it: three times at "
                "most, and never upwards where a trial diverged. For one range on a log scale."
            )
        ),
    ] = False
    seed: Annotated[int, Field(ge=0, description="Seed of the sampler.")] = 0
    retries: Annotated[
        int,
        Field(ge=0, le=100, description="How often a trial is retried after an exception, from its last checkpoint."),
    ] = 1
    space: Annotated[
        dict[str, Any],
        Field(
            description=(
                "The parameters to search: for each a list of values, a range { low, high, log, step, points }, or a "
                "table by.KEY with one of these for each value of another parameter. lr = 'auto' has a range test "
                "find the range."
            )
        ),
    ] = Field(default_factory=dict)
    try_first: Annotated[
        list[dict[str, Any]],
        Field(description="Points to evaluate before anything is sampled, such as [{ lr = 1e-3 }]."),
    ] = Field(default_factory=list)
    learn_from: Annotated[
        list[str],
        Field(
            description=(
                "Earlier studies of the same store, whose recommended learning rates are tried first. Their trials are "
                "no evidence for this study's answer."
            )
        ),
    ] = Field(default_factory=list)

    @cached_property
    def parameters(self) -> dict[str, Parameter]:
        """The space, parsed; raises UserError for a parameter that is none."""
        return parse_space(self.space, grid=self.sampler == "grid")

    @property
    def num_trials(self) -> int:
        """The number of trials: a grid's own size, else what was given, else 20; a race's depends on its epochs."""
        return len(self.grid) if self.sampler == "grid" else self.trials or DEFAULT_TRIALS

    @property
    def num_trainings(self) -> float:
        """The budget of a race, in complete trials."""
        return self.trainings or DEFAULT_TRAININGS

    @property
    def goal(self) -> Goal | None:
        """What `until` says."""
        if self.until is None:
            return None
        amount, unit = self.until.split()
        return Goal(float(amount), unit.removesuffix("s"))

    @property
    def limits(self) -> tuple[str | None, float | None]:
        """What may end the search before it has had all of its trials."""
        return self.until, self.hours

    @cached_property
    def grid(self) -> list[dict[str, Scalar]]:
        """Every combination of a grid, in the order of the study file, with `try_first` in front."""

        def rank(point: dict[str, Scalar]) -> int:
            ranks = (index for index, first in enumerate(self.try_first) if first.items() <= point.items())
            return next(ranks, len(self.try_first))

        return sorted(grid_points(self.parameters), key=rank)

    def listed_values(self, params: Mapping[str, Any]) -> dict[str, Any]:
        """Return those of a trial's values that come from a list, without its learning rate and its seed."""
        listed = {}
        for key, parameter in self.parameters.items():
            case: Parameter | None = parameter
            if isinstance(parameter, Conditional):
                case = parameter.cases.get(str(params.get(parameter.by)))
            if isinstance(case, Categorical) and key not in ("lr", "seed"):
                listed[key] = params.get(key)
        return listed


class PrunerSpec(Section):
    """Which trials are stopped early.

    None means the pruner's own default, listed in `hpo.search.pruners.PRUNERS`.
    """

    name: Annotated[str, Field(description="The pruner: which trials are dropped early.")] = "none"
    startup_trials: Annotated[
        int | None, Field(ge=0, description="Prune nothing before this many trials are complete.")
    ] = None
    warmup_epochs: Annotated[int | None, Field(ge=0, description="Do not prune a trial in its first epochs.")] = None
    percentile: Annotated[
        float | None, Field(ge=0, le=100, description="Keep the trials among this best percentage.")
    ] = None
    min_epochs: Annotated[int | None, Field(ge=1, description="Epochs before the first rung.")] = None
    reduction_factor: Annotated[
        int | None, Field(ge=2, description="At each rung, one trial in this many is trained further.")
    ] = None
    patience: Annotated[int | None, Field(ge=1, description="Epochs without an improvement to wait for.")] = None
    min_delta: Annotated[float | None, Field(ge=0, description="The least change that is an improvement.")] = None
    lower: Annotated[float | None, Field(description="Prune what is below this value.")] = None
    upper: Annotated[float | None, Field(description="Prune what is above this value.")] = None


class SearchSettings(Protocol):
    """What samplers and pruners read of a study's settings; a StudySpec has it."""

    @property
    def name(self) -> str:
        """The study's name."""

    @property
    def search(self) -> SearchSpec:
        """The table [search]."""

    @property
    def pruner(self) -> PrunerSpec:
        """The table [pruner]."""

    @property
    def num_trials(self) -> int:
        """The number of trials of the search."""

    @property
    def max_epochs(self) -> int:
        """The most epochs that a trial can have."""
