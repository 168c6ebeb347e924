"""Trains a LightningModule of a user's own: reports each validation, saves each epoch, resumes bit for bit on a CPU.

Lightning keeps no state of random generators. They are seeded at the start of each epoch, as our engines do, and in
front of that alike in each attempt, so that what a module draws when it is set up, such as a split, stays the same.
"""

from __future__ import annotations

import inspect
import io
import logging
import math
import signal
import tempfile
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.core.hooks import DataHooks
from lightning.pytorch.plugins import TorchCheckpointIO

from hpo.config.sections import ObjectiveSpec
from hpo.config.study_spec import StudySpec
from hpo.errors import UserError, did_you_mean
from hpo.objective import Trial
from hpo.system.files import replace_file
from hpo.train.checkpoint import storable_copy
from hpo.train.imports import call_own, describe_error
from hpo.train.seeding import generators_kept, seed_generators
from hpo.workers.own_loop import import_named

CHECKPOINT = "last.ckpt"  # in the trial's folder; Lightning's own format
OF_TRIAL = ("epochs", "seed")  # keys of the space that need not be arguments
HYPERPARAMETERS = ("hyper_parameters", "datamodule_hyper_parameters")  # of a checkpoint; nothing resumes from them
# What hpo decides. The module writes no logs of its own: hpo keeps what it logs.
TRAINER = {
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "num_sanity_val_steps": 0,
}


class LightningLoop:
    """Trains trials with a LightningModule that each trial builds anew."""

    def __init__(self, objective: ObjectiveSpec) -> None:
        """Import what the objective names. Raises UserError where that cannot be imported."""
        self._objective = objective
        sides = dict(zip(objective.code, ("model", "data"), strict=False))
        self._settings = {sides[setting]: f"{setting} = {path!r}" for setting, path in objective.code.items()}
        self._makers = {sides[setting]: make for setting, make in import_named(objective).items()}

    def __call__(self, trial: Trial) -> None:
        """Train a trial to its end, or until `trial.report` says so."""
        model, data = self._build(trial.params, seed=trial.seed)
        path = trial.checkpoint_dir / CHECKPOINT
        with _signals_kept() as handlers:
            callback = TrialCallback(trial, path=path, handlers=handlers, name=self._settings["model"])
            trainer = self._trainer(
                device=trial.device,
                max_epochs=trial.epochs,
                callbacks=[callback],
                default_root_dir=trial.checkpoint_dir,
                plugins=[LightningEnvironment(), PlainCheckpointIO(self._settings["model"])],
            )
            trainer.fit(model, datamodule=data, ckpt_path=path if path.exists() else None)
            if trial.kind == "confirm" and trial.epochs in callback.reported and _has_test(model, data):
                (tested,) = trainer.test(model, datamodule=data, verbose=False)
                trial.report(trial.epochs, **callback.reported[trial.epochs], **tested)

    def try_out(self, spec: StudySpec) -> None:
        """Train a step and validate a batch on the CPU. Raises UserError for what would fail in every trial."""
        metric = self._objective.metric
        with generators_kept(), _signals_kept(), warnings.catch_warnings(), tempfile.TemporaryDirectory() as folder:
            warnings.simplefilter("ignore")
            model, data = self._build(next(spec.extreme_points()), seed=0)
            self._trainer(device="cpu", default_root_dir=folder)  # has Lightning judge what is replaced below
            trainer = self._trainer(
                device="cpu",
                max_epochs=1,
                callbacks=[StepCallback()],
                default_root_dir=folder,
                plugins=[LightningEnvironment()],
                **{"limit_val_batches": 1, "check_val_every_n_epoch": 1, "precision": None},
            )
            try:
                trainer.fit(model, datamodule=data)
            except UserError:
                raise
            except (Exception, SystemExit) as error:
                raise UserError(f"{self._settings['model']} cannot be trained: {describe_error(error)}") from error
            _check_logged(metric, trainer.callback_metrics, name=self._settings["model"])

    def _build(self, values: Mapping[str, Any], *, seed: int) -> tuple[LightningModule, LightningDataModule | None]:
        """Build the module and the data module of a trial; a value goes to each of them that takes it by its name."""
        arguments: dict[str, dict[str, Any]] = {side: {} for side in self._makers}
        for key, value in values.items():
            side, dot, name = key.partition(".")
            sides = [side] if dot and side in ("model", "data") else ["model", "data"]
            name = name if len(sides) == 1 else key
            takers = [one for one in sides if one in self._makers and _takes_argument(self._makers[one], name)]
            if not takers and key not in OF_TRIAL:
                raise self._not_taken(key, name)
            for one in takers:
                arguments[one][name] = value
        seed_generators(seed, "model")
        made = {
            side: call_own(make, arguments[side], setting=self._settings[side]) for side, make in self._makers.items()
        }
        for side, kind in (("model", LightningModule), ("data", LightningDataModule)):
            if side in made and not isinstance(made[side], kind):
                is_other = any(one.__module__.startswith("pytorch_lightning.") for one in type(made[side]).__mro__)
                hint = "; import lightning.pytorch in place of pytorch_lightning" if is_other else ""
                found = type(made[side]).__name__
                raise UserError(
                    f"{self._settings[side]} must make a lightning.pytorch.{kind.__name__}, got {found}{hint}"
                )
        return made["model"], made.get("data")

    def _not_taken(self, key: str, name: str) -> UserError:
        known = sorted({one for make in self._makers.values() for one in _parameters(make)})
        return UserError(
            f"search.space.{key} must be an argument of {' or '.join(self._settings.values())}, which takes "
            f"{', '.join(known) or 'none'}{did_you_mean(name, known)}; where its constructor cannot be "
            f"changed, name a function of {name} that returns the module"
        )

    def _trainer(self, *, device: str, **settings: Any) -> Trainer:
        kind, _, index = device.partition(":")
        logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
        place = {"accelerator": "gpu", "devices": [int(index or 0)]} if kind == "cuda" else {"accelerator": kind}
        settings = {"devices": 1, **TRAINER, **self._objective.trainer, **place, **settings}
        try:
            return Trainer(**settings)
        except Exception as error:
            raise UserError(
                f"objective.trainer has settings that Lightning refuses: {describe_error(error)}"
            ) from error


class StepCallback(Callback):
    """Ends the training after one step of the optimizer, as if the epoch ended there: it is validated."""

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Stop where the gradients of enough batches are added up."""
        trainer.should_stop = batch_idx + 1 >= trainer.accumulate_grad_batches


class TrialCallback(Callback):
    """Reports a trial's epochs in which it was validated, and saves the trial after each of its epochs."""

    def __init__(self, trial: Trial, *, path: Path, handlers: Mapping[signal.Signals, Any], name: str) -> None:
        """Make the callback of one attempt at a trial.

        Args:
            trial: The trial.
            path: The trial's checkpoint.
            handlers: Of signals, to be put back where Lightning has replaced them.
            name: The module, for messages.
        """
        self._trial = trial
        self._path = path
        self._handlers = handlers
        self._name = name
        self._first_epoch: int | None = None  # of this attempt, counted from 0
        self._is_validated = False
        self.reported: dict[int, dict[str, float]] = {}  # what was reported last, by the epoch
        self._losses: list[torch.Tensor] = []  # of the epoch's steps; on the device, so that no step waits for it

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take the signals back: at SIGTERM Lightning would leave in the middle of an epoch."""
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save the trial as the epoch before has left it, then seed this epoch, whose batches are drawn after that."""
        epoch = trainer.current_epoch
        if self._first_epoch is not None:
            trainer.save_checkpoint(self._path)
        seed_generators(self._trial.seed, "epoch", epoch)
        if self._first_epoch is None:
            self._first_epoch = epoch
            batches = trainer.fit_loop._data_fetcher
            assert batches is not None
            iter(batches)  # draws them anew: Lightning has drawn the first epoch's already

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Keep the loss of a step; a module that optimizes by itself may return none."""
        loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
        if isinstance(loss, torch.Tensor):
            self._losses.append(loss.detach().float().mean())

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note that the metrics are those of the epoch in training."""
        self._is_validated = True

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Report what was logged, and the loss of the steps, where the epoch was validated; stop where that says so."""
        losses, self._losses = self._losses, []
        is_validated, self._is_validated = self._is_validated, False
        if not is_validated and trainer.enable_validation:
            return
        _check_logged(self._trial.metric, trainer.callback_metrics, name=self._name)
        metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
        if losses:
            mean = float(torch.stack(losses).mean())
            if not math.isfinite(mean):
                metrics["train_loss"] = mean
            metrics.setdefault("train_loss", mean)
        epoch = trainer.current_epoch + 1
        self.reported = {epoch: metrics}
        if self._trial.report(epoch, **metrics):
            trainer.should_stop = True

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save the trial after the last epoch of this attempt."""
        trainer.save_checkpoint(self._path)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Have no epoch begun in what is saved before its first batch, or Lightning takes it for done when it resumes.

        After an epoch is too early to save: schedulers that follow a metric make their step last.
        """
        for progress in checkpoint["loops"]["fit_loop"]["epoch_progress"].values():
            progress["ready"] = progress["started"]


class PlainCheckpointIO(TorchCheckpointIO):
    """Lightning's checkpoints as files that are there whole or not at all, and that are read without unpickling."""

    def __init__(self, name: str) -> None:
        """Make it for the module of this name, which messages show."""
        self._name = name

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Write a checkpoint, but hyperparameters that cannot be read without unpickling.

        Raises:
            UserError: The state of the module, of a callback or of an optimizer cannot be read so.
        """
        plain = {}
        for key, value in checkpoint.items():
            with suppress(*[UserError] if key in HYPERPARAMETERS else []):
                plain[key] = storable_copy(value, setting=self._name, where=key)
        buffer = io.BytesIO()
        torch.save(plain, buffer)
        replace_file(path, buffer.getbuffer())

    def load_checkpoint(self, path: Any, *_: Any, **__: Any) -> dict[str, Any]:
        """Read a checkpoint."""
        checkpoint: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        return checkpoint


def _check_logged(metric: str, logged: Mapping[str, Any], *, name: str) -> None:
    """Raise UserError where a module does not log the study's metric."""
    if metric not in logged and metric != "train_loss":
        raise UserError(
            f"objective.metric = {metric!r} must be logged by {name}, in validation_step for instance; it logs "
            f"{', '.join(sorted(logged)) or 'nothing'}"
        )


def _has_test(model: LightningModule, data: LightningDataModule | None) -> bool:
    """Return whether the module measures a test set, and either of the two has one."""
    holders: list[DataHooks] = [model] if data is None else [model, data]
    has_data = any(type(one).test_dataloader is not DataHooks.test_dataloader for one in holders)
    return has_data and type(model).test_step is not LightningModule.test_step


def _parameters(make: Callable[..., Any]) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(make).parameters


def _takes_argument(make: Callable[..., Any], name: str) -> bool:
    parameters = _parameters(make)
    return name in parameters or any(one.kind is one.VAR_KEYWORD for one in parameters.values())


@contextmanager
def _signals_kept() -> Iterator[dict[signal.Signals, Any]]:
    """Give the handlers of signals that Lightning replaces, and put them back afterwards; Ctrl-C stays what it is."""
    is_main = threading.current_thread() is threading.main_thread()
    numbers = (signal.SIGTERM, signal.SIGINT) if is_main else ()
    handlers = {number: signal.getsignal(number) for number in numbers}
    try:
        yield handlers
    except SystemExit as error:
        if isinstance(error.__context__, KeyboardInterrupt):
            raise error.__context__ from None
        raise
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
