"""Trains trials by calling the user's own loop: a function, or what trains a LightningModule."""

from __future__ import annotations

import bdb
import math
import os
from collections.abc import Mapping
from contextlib import chdir
from pathlib import Path
from typing import TYPE_CHECKING

from hpo.config.sections import ObjectiveSpec
from hpo.errors import UserError
from hpo.objective import Trial
from hpo.store.store import Store
from hpo.study.records import Claim, StudyRecord
from hpo.workers.carried_weights import CarriedWeights
from hpo.workers.held_trials import HeldTrials
from hpo.workers.own_loop import find_loop
from hpo.workers.reporting import TrialEnd, complete_end, diverged_end, pruned_end
from hpo.workers.stop_signal import StopSignal

if TYPE_CHECKING:
    from hpo.train.data.loading import DatasetCache
    from hpo.train.recipe import Recipe


class FunctionRunner:
    """Calls the user's function for one trial after the other; a `Runner` (see `hpo.workers.worker`).

    `objective` names it. `torch_device` is the device as torch names it in this process.
    """

    def __init__(
        self,
        store: Store,
        study: StudyRecord,
        held: HeldTrials,
        stop: StopSignal,
        *,
        objective: ObjectiveSpec,
        torch_device: str,
    ) -> None:
        self._store = store
        self._study = study
        self._spec = study.spec
        self._held = held
        self._stop = stop
        self._objective = objective
        self._name = objective.code[objective.setting]
        self._torch_device = torch_device
        self._carried = CarriedWeights()
        self._datasets: DatasetCache | None = None  # of trials that ask for their recipe

    def step(self) -> bool:
        """Claim a trial and call the function for it; return False where there was no trial to claim."""
        claim = self._held.claim()
        if claim is None:
            return False
        with self._held.dropping_lost_claims(claim), self._held.failing_trials_on_error([claim]):
            self._train(claim)
        return True

    def drain(self) -> None:
        """Do nothing: between two steps no trial is in training."""

    def close(self) -> None:
        """Do nothing: there is nothing to free."""

    def _train(self, claim: Claim) -> None:
        attempt = FunctionAttempt(self._store, self._study, self._held, self._stop, claim)
        values, seed = self._held.suggest(claim)
        trial = Trial(
            params=values,
            device=self._torch_device,
            epochs=int(values.get("epochs", self._spec.training.epochs)),
            seed=seed,
            checkpoint_dir=self._make_folder(claim),
            number=claim.number,
            attempt=claim.attempt,
            metric=self._spec.metric,
            kind=claim.kind,
            _on_report=attempt.report,
            _make_recipe=lambda: self._make_recipe(trial),
        )
        loop = find_loop(self._objective)
        try:
            # The folder is back again where the function leaves it: the next trial's paths may be relative.
            with chdir(os.curdir), self._carried.watching(claim.number):
                loop(trial)
        except bdb.BdbQuit as error:
            raise UserError(
                f"{self._name} was left in the debugger, which needs a terminal: remove breakpoint() from it, or "
                "debug it with hpo run --in-process"
            ) from error
        finally:
            attempt.is_over = True
        end = attempt.end or self._end_by_last_report(claim)
        if end is None:
            self._held.release(claim)
        else:
            self._held.finish(claim, end)

    def _make_recipe(self, trial: Trial) -> Recipe:
        if not self._spec.has_recipe:
            raise UserError(
                "trial.recipe needs objective.recipe = true, so that [model], [data] and [training] are read"
            )
        import torch

        from hpo.train.data.loading import DatasetCache
        from hpo.train.recipe import Recipe

        self._datasets = self._datasets or DatasetCache(device=torch.device(self._torch_device))
        config = self._spec.trial_config(trial.params, seed=trial.seed)
        return Recipe(config, device=trial.device, folder=trial.checkpoint_dir, datasets=self._datasets)

    def _make_folder(self, claim: Claim) -> Path:
        """Make the folder of the trial's own, which is the same for each of its attempts."""
        url = self._spec.checkpoints.url
        root = Path(url).expanduser() / self._study.key if url else self._store.folder(self._study) / "trials"
        folder = root / f"{claim.number:04d}"
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def _end_by_last_report(self, claim: Claim) -> TrialEnd | None:
        """Return the end of a trial whose function has returned without having been told to, or None to release it.

        Its last report may be an earlier attempt's, which was killed after it and left nothing to train.
        """
        last = self._store.trials.last_report(claim)
        if last is None:
            raise UserError(f"{self._name} returned without a trial.report(...)")
        epoch, value = last
        if self._held.is_waiting(claim) or (self._stop.is_set() and epoch < self._spec.max_epochs):
            return None
        if not math.isfinite(value):
            return diverged_end(f"{self._spec.metric} = {value}", epoch)
        return complete_end(epoch)


class FunctionAttempt:
    """One call of the user's function for a trial: what it reports, and how it was told to end, if it was."""

    def __init__(self, store: Store, study: StudyRecord, held: HeldTrials, stop: StopSignal, claim: Claim) -> None:
        self._store = store
        self._spec = study.spec
        self._held = held
        self._stop = stop
        self._claim = claim
        self.end: TrialEnd | None = None
        self.is_over = False  # whether the function has returned

    def report(self, epoch: int, metrics: Mapping[str, float], diverged: str | None) -> bool:
        """Report an epoch to the store; return whether the function should return now."""
        if self.is_over:
            number = self._claim.number
            raise UserError(
                f"trial.report was called for trial {number}, whose training has ended: report to the trial that "
                f"your function is called with, not to one that was kept from an earlier call"
            )
        if self.end is not None or self._held.is_waiting(self._claim):
            return True  # it was told to return and reports all the same: nothing more is recorded
        value, is_last = metrics[self._spec.metric], epoch >= self._spec.max_epochs
        judged = {self._spec.metric: value} | {name: one for name, one in metrics.items() if name.endswith("loss")}
        broken = [f"{name} = {one}" for name, one in judged.items() if not math.isfinite(one)]
        broken = broken if diverged is None else [diverged]
        verdict = self._store.trials.report(
            self._claim,
            self._spec,
            epoch=epoch,
            metrics=metrics,
            value=value,
            may_prune=self._claim.kind == "search" and not broken and not is_last,
        )
        self._held.note_verdict(self._claim, verdict)
        if broken:
            self.end = diverged_end(broken[0], epoch)
        elif verdict == "prune" and not is_last:
            self.end = pruned_end(self._spec.pruner.name, epoch)
        must_leave = self._held.is_waiting(self._claim) or (self._stop.is_set() and not is_last)
        return self.end is not None or must_leave
