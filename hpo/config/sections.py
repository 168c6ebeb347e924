"""The tables of a study file beside [model], [data] and [training], as frozen models, and what holds of their keys."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field

from hpo.errors import Rule
from hpo.search.config import PrunerSpec, SearchSpec, Section
from hpo.train.config import TRIAL_NEUTRAL_KEYS

DIRECTIONS = ("maximize", "minimize")
OBJECTIVE_TRAINING_KEYS = ("epochs", "seed")  # those of [training] that a user's own loop is given
# Settings that may differ between two runs of one study without changing a single number of its trials.
STUDY_NEUTRAL_KEYS = TRIAL_NEUTRAL_KEYS | {
    "search.retries",
    "search.until",
    "search.hours",
    "search.grow",
    "engine.lanes",
    "checkpoints.url",
    "checkpoints.keep_best",
}
# Arguments of Lightning's Trainer that a study may set; hpo decides the others.
TRAINER_KEYS = (
    "accumulate_grad_batches",
    "benchmark",
    "check_val_every_n_epoch",
    "detect_anomaly",
    "deterministic",
    "gradient_clip_algorithm",
    "gradient_clip_val",
    "inference_mode",
    "limit_train_batches",
    "limit_val_batches",
    "overfit_batches",
    "precision",
    "val_check_interval",
)
BUDGET_KEYS = frozenset({"search.trials"})  # of a sampled study: trials can be added to those that there are


class ObjectiveSpec(Section):
    """A training loop of your own. Without `recipe` the space may have any keys, [training] only epochs and seed."""

    function: Annotated[str | None, Field(description="Your own training loop, as package.module:function.")] = None
    lightning: Annotated[
        str | None,
        Field(description="In its place, your LightningModule, or a function that makes it: package.module:Class."),
    ] = None
    datamodule: Annotated[
        str | None, Field(description="lightning: your LightningDataModule. By default the module has its own loaders.")
    ] = None
    trainer: Annotated[
        Mapping[str, Any], Field(description="lightning: arguments of its Trainer, such as precision = 'bf16-mixed'.")
    ] = {}
    metric: Annotated[str, Field(description="Which of the numbers that the loop reports is optimized.")] = (
        "val_accuracy"
    )
    direction: Annotated[
        str,
        Field(description="Whether more or less of the metric is better.", json_schema_extra={"enum": [*DIRECTIONS]}),
    ] = "maximize"
    guess: Annotated[
        float | None,
        Field(
            allow_inf_nan=False,
            description=(
                "What the metric is worth without having learned anything, such as 0.1 for the accuracy of ten "
                "classes. Needed to tell networks that only guess; with recipe it is known."
            ),
        ),
        Rule("a finite number"),
    ] = None
    recipe: Annotated[
        bool, Field(description="The function trains what [model], [data] and [training] say, through trial.recipe.")
    ] = False

    @property
    def code(self) -> dict[str, str]:
        """The users' code that the study names, by the setting that names it; the loop comes first."""
        named = {key: getattr(self, key) for key in ("function", "lightning", "datamodule")}
        return {f"objective.{key}": path for key, path in named.items() if path is not None}

    @property
    def setting(self) -> str:
        """The setting that names the loop."""
        return next(iter(self.code), "objective.function")


class EngineSpec(Section):
    """How a device is shared among trials."""

    lanes: Annotated[
        Literal["auto"] | Annotated[int, Field(strict=True, ge=1, le=1024)],
        Rule("'auto' or an integer between 1 and 1024"),
        Field(
            description="Trials that a worker trains at once on its device; auto: as many as should be fastest there."
        ),
    ] = "auto"
    devices_per_trial: Annotated[
        int,
        Field(
            strict=True,
            ge=1,
            le=64,
            description=(
                "Devices of one machine that train each trial together, each on its slice of every batch. On a CPU as "
                "many processes share its cores."
            ),
        ),
    ] = 1


class ConfirmSpec(Section):
    """How the best learning rates are trained again after the search, on fresh seeds. By default they are not."""

    top: Annotated[
        int,
        Field(
            ge=1,
            description=(
                "How many learning rates are trained again: the recommended one, then those of the best trials, at "
                "least a tenth of a decade apart."
            ),
        ),
    ] = 3
    seeds: Annotated[
        int,
        Field(
            ge=2,
            le=1000,
            description=(
                "On how many fresh seeds at most, the same for all rates. All rates are trained on three, then on one "
                "after the other as long as one of them may still be the best."
            ),
        ),
    ] = 5


class CheckpointsSpec(Section):
    """Where trials in training are saved, so that another worker can resume them, and how many of the best stay."""

    url: Annotated[
        str | None,
        Field(
            pattern="^[/~]|://",
            description=(
                "Where trials in training are saved: a folder that all machines see, s3://... (extra s3) or gs://... "
                "(extra gs). By default hpo_files/ on the worker's machine."
            ),
        ),
        Rule("an absolute folder or a URL such as s3://bucket/folder, which every machine can reach"),
    ] = None
    keep_best: Annotated[
        int,
        Field(
            ge=0,
            description=(
                "Of how many of the best trials the last checkpoint is kept. With any, that of the best trial of each "
                "confirmed rate is kept as well."
            ),
        ),
    ] = 1


SECTIONS: dict[str, type[Section]] = {
    "search": SearchSpec,
    "pruner": PrunerSpec,
    "objective": ObjectiveSpec,
    "engine": EngineSpec,
    "checkpoints": CheckpointsSpec,
    "confirm": ConfirmSpec,
}
