"""Trains trials of our networks in the lanes of an engine, an epoch at a time."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from functools import partial
from typing import NamedTuple

from hpo.config.study_spec import StudySpec
from hpo.search.pruners import INTERLEAVED_TRIALS, PRUNERS, is_rung, may_prune_after
from hpo.store.ledger import ClaimLost, Verdict
from hpo.store.store import Store
from hpo.study.records import Claim, StudyRecord
from hpo.train.checkpoint import Checkpoint
from hpo.train.config import EpochResult, TrialConfig
from hpo.train.engines.lanes import LaneEngine
from hpo.train.engines.planning import MAX_LANES, LanePlan, free_memory
from hpo.train.engines.protocol import Stopped
from hpo.train.engines.stack import stack_key
from hpo.train.failures import is_out_of_memory
from hpo.workers.checkpoints import StudyCheckpoints
from hpo.workers.held_trials import HeldTrials
from hpo.workers.reporting import EpochOutcome, Reporter, TrialEnd, complete_end, diverged_end, pruned_end
from hpo.workers.saving import SavingSchedule
from hpo.workers.stop_signal import StopSignal

logger = logging.getLogger(__name__)

MAX_REPORT_SHARE = 0.05  # of an epoch's time: how long its report may keep the next epoch waiting


class LaneTrial(NamedTuple):
    """A trial in a lane of the engine."""

    claim: Claim
    config: TrialConfig
    saving: SavingSchedule


class LaneRunner:
    """Trains as many trials at once as the engine has lanes; a `Runner` (see `hpo.workers.worker`).

    While an epoch trains, a thread reports the one before, and another one writes its checkpoints. `torch_device` is
    the device as torch names it in this process.
    """

    def __init__(
        self, store: Store, study: StudyRecord, held: HeldTrials, stop: StopSignal, *, torch_device: str
    ) -> None:
        self._store, self._study, self._spec = store, study, study.spec
        self._held, self._stop = held, stop
        self._reporter = Reporter()
        self._lanes: dict[int, LaneTrial] = {}
        wanted, compares_early = self._spec.engine.lanes, PRUNERS[self._spec.pruner.name].compares_early
        self._engine = LaneEngine(
            device=torch_device,
            lanes=None if wanted == "auto" else wanted,
            max_lanes=min(MAX_LANES, self._spec.num_trials),
            num_interleaved=min(INTERLEAVED_TRIALS, self._spec.num_trials) if compares_early else 1,
            is_one_kind=_is_one_kind(self._spec),
            num_ranks=self._spec.engine.devices_per_trial,
            should_stop=stop.must_abort,
            get_or_set_plan=partial(_agree_on_plan, store, study),
        )
        self._checkpoints = StudyCheckpoints(store, study)
        held.look_after(self._checkpoints)
        self._checkpoints.tidy()

    def step(self) -> bool:
        """Fill the free lanes and train an epoch; return False where there was nothing to train."""
        self._fill_lanes()
        if not self._lanes:
            return False
        turn = [self._lanes[lane].claim for lane in self._engine.next_lanes]
        results = self._train_epoch(turn)
        self._reporter.check()
        if results:
            for claim in turn:
                self._wait_until_saved(claim)
        self._report_alongside_training(
            [
                self._outcome(result, num_together=len(results))
                for result in results
                if self._lanes[result.lane].claim in self._held
            ]
        )
        if not results:  # the epoch was left in its middle, and the trials that did not fail are released
            for claim in [claim for claim in turn if claim in self._held]:
                self._held.release(claim)
        self._evict_dropped()
        if len(results) < len(turn):
            free_memory()  # what failed may have filled the device, which other processes share
        return True

    def drain(self) -> None:
        """Wait for the last report and save the trials still held, so that they resume where they are."""
        self._reporter.check()
        for lane in self._lanes:
            self._save_unsaved(lane)
        self._checkpoints.tidy()

    def close(self) -> None:
        """Wait for what is being reported and written, and end the threads."""
        self._reporter.close()
        self._checkpoints.close()
        self._engine.close()

    # Filling the lanes

    def _fill_lanes(self) -> None:
        while not self._stop.is_set() and self._engine.free_lanes and self._may_take_more():
            self._reporter.check()  # so that the sampler knows the last epoch
            claim = self._held.claim(num_held=len(self._lanes))
            if claim is None:
                return
            with (
                self._held.dropping_lost_claims(claim),
                self._held.failing_trials_on_error([claim]),
                self._limiting_lanes([claim], to=len(self._lanes)),
            ):
                self._admit(claim)

    def _admit(self, claim: Claim) -> None:
        """Resume a trial in a free lane, or end it where an earlier attempt was killed between last epoch and end."""
        values, seed = self._held.suggest(claim)
        config = self._spec.trial_config(values, seed=seed)
        checkpoint = self._checkpoints.resume(claim, config)
        if checkpoint is not None and checkpoint.epoch >= config.training.epochs:
            if claim.kind == "test":
                self._measure_test(claim, config, checkpoint)
            self._held.finish(claim, complete_end(checkpoint.epoch))
        else:
            lane = self._engine.admit(config, checkpoint, may_share=not claim.is_suspect)
            saving = SavingSchedule(
                config.training.checkpoint_epochs,
                cost=self._checkpoints.cost,
                epoch=checkpoint.epoch if checkpoint else 0,
                is_rung=lambda epoch: claim.kind == "search" and is_rung(epoch, self._spec),
            )
            self._lanes[lane] = LaneTrial(claim, config, saving)

    def _may_take_more(self) -> bool:
        """Return whether another trial may join those in the lanes.

        None may join a suspect, and a worker takes no more than its share of the trials that are left.
        """
        if not self._lanes:
            return True
        num_claimable = self._store.workers.num_claimable(self._study)
        if self._held.has_suspect() or not num_claimable:
            return False
        num_open = num_claimable + self._store.trials.counts(self._study.study_id).get("running", 0)
        if self._engine.is_interleaving:
            num_open = min(num_open, INTERLEAVED_TRIALS)  # trials of all workers are compared
        num_workers = sum(worker.alive for worker in self._store.workers.get_all(self._study))
        return len(self._lanes) < math.ceil(num_open / max(1, num_workers))

    def _save_unsaved(self, lane: int) -> None:
        """Save a trial that is held as it is now, and return when that is on disk."""
        claim, _, saving = self._lanes[lane]
        if claim not in self._held:
            return
        if saving.has_unsaved:
            with self._held.dropping_lost_claims(claim), self._held.failing_trials_on_error([claim]):
                self._checkpoints.save(claim, self._engine.snapshot(lane))
        self._wait_until_saved(claim)

    def _evict_dropped(self) -> None:
        """Free the lanes of trials that are no longer held, and give back those that wait for others of their race."""
        for lane, (claim, _, _) in list(self._lanes.items()):
            if self._held.is_waiting(claim):
                self._save_unsaved(lane)
                self._held.release(claim)
            if claim not in self._held:
                self._engine.evict(lane)
                del self._lanes[lane]

    # Training an epoch and reporting it

    def _train_epoch(self, turn: Sequence[Claim]) -> list[EpochResult]:
        """Train an epoch of the trials whose turn it is; return nothing where it failed or was left in its middle."""
        with (
            self._held.failing_trials_on_error(turn),
            self._limiting_lanes(turn, to=len(self._lanes) // 2),
            suppress(Stopped),
        ):
            try:
                return self._engine.run_epoch()
            finally:
                # Nobody reports in a process that the user's code forked. Elsewhere the epoch before is reported before
                # the trials are given up.
                if not self._held.is_in_fork():
                    self._reporter.wait()
        return []

    def _outcome(self, result: EpochResult, *, num_together: int) -> EpochOutcome:
        """Return a trial's epoch, with a snapshot of the trial where it should be saved."""
        claim, config, saving = self._lanes[result.lane]
        saving.add_epoch(result.epoch, seconds=result.seconds / num_together)
        is_last = result.epoch >= config.training.epochs
        if is_last:
            is_due = claim.kind != "search" or self._checkpoints.may_be_kept(
                claim.number, result.value_of(config.training.metric)
            )
        else:
            is_due = saving.is_due()
        snapshot = None
        if is_due and not result.diverged:
            # A network's state may be impossible to save.
            with self._held.failing_trials_on_error([claim]), self._checkpoints.cost.timing_snapshot():
                snapshot = self._engine.snapshot(result.lane)
            saving.note_saved()
        return EpochOutcome(claim, config, result, is_last, snapshot)

    def _report_alongside_training(self, outcomes: Sequence[EpochOutcome]) -> None:
        """Begin to report an epoch, and wait for the answer where it may end a trial or change who trains next."""
        if not outcomes:
            return
        is_decisive = any(  # asked before the reports' thread changes who is a suspect
            outcome.is_final
            or self._held.is_suspect(outcome.claim)
            or may_prune_after(outcome.result.epoch, self._spec)
            for outcome in outcomes
        )
        self._reporter.begin(partial(self._report, outcomes))
        longest_s = max(outcome.result.seconds for outcome in outcomes)
        if self._reporter.wait(None if is_decisive else MAX_REPORT_SHARE * longest_s):
            self._reporter.check()

    def _report(self, outcomes: Sequence[EpochOutcome]) -> None:
        """Report the epochs of trials trained together, then save the trials or end them; runs in the reports' thread.

        A trial is saved after it is reported, so that a worker that has lost it writes nothing. What was saved of it is
        on disk before its next epoch is reported.
        """
        outcomes = [outcome for outcome in outcomes if outcome.claim in self._held]
        if not outcomes:  # none of them could be saved
            return
        verdicts = self._store.trials.report_all([outcome.report() for outcome in outcomes], self._spec)
        for outcome, verdict in zip(outcomes, verdicts, strict=True):
            with self._held.dropping_lost_claims(outcome.claim):
                self._settle(outcome, verdict)

    def _settle(self, outcome: EpochOutcome, verdict: Verdict | None) -> None:
        """Save a trial after its epoch was reported, and end it where it is complete, pruned or diverged."""
        if verdict is None:
            raise ClaimLost
        claim, snapshot = outcome.claim, outcome.snapshot
        self._held.note_verdict(claim, verdict)
        end = _end_after(outcome, verdict, pruner=self._spec.pruner.name)
        if snapshot is not None and (end is None or end.state == "complete"):
            self._checkpoints.save(claim, snapshot)
        if end is None:
            return
        self._wait_until_saved(claim)
        if claim in self._held and claim.kind == "test" and snapshot is not None:
            with self._held.failing_trials_on_error([claim]):
                self._measure_test(claim, outcome.config, snapshot.checkpoint())
        if claim in self._held:
            self._held.finish(claim, end)

    def _measure_test(self, claim: Claim, config: TrialConfig, checkpoint: Checkpoint) -> None:
        """Measure a trial that has had its epochs on the test set, and add what that says to the last one."""
        last = checkpoint.results[-1]
        metrics = last.metrics() | self._engine.test_metrics(config, checkpoint)
        value = last.value_of(config.training.metric)
        self._store.trials.report(claim, self._spec, epoch=last.epoch, metrics=metrics, value=value, may_prune=False)

    def _wait_until_saved(self, claim: Claim) -> None:
        """Wait until the trial's checkpoint is on disk; the trial fails where its state cannot be written."""
        with self._held.dropping_lost_claims(claim), self._held.failing_trials_on_error([claim]):
            self._checkpoints.wait(claim.number)

    @contextmanager
    def _limiting_lanes(self, claims: Sequence[Claim], *, to: int) -> Iterator[None]:
        """On out-of-memory, release the trials, which resume from their checkpoints, and have `to` lanes from now on.

        With `to` = 0 no other trial is there to blame: the error is the trial's own, and is raised.
        """
        try:
            yield
        except Exception as error:
            if to == 0 or not is_out_of_memory(error):
                raise
            logger.warning("out of memory with %d trials; from now on at most %d at once", len(self._lanes), to)
            self._engine.limit_lanes(to)
            for claim in claims:
                self._held.release(claim)


def _is_one_kind(spec: StudySpec) -> bool:
    """Return whether the search leaves alone what trials must share to be trained as one stack."""
    configs = (spec.trial_config(values, seed=0) for values in spec.extreme_points())
    return len({stack_key(config) for config in configs}) == 1


def _agree_on_plan(store: Store, study: StudyRecord, device: str, measure: Callable[[], LanePlan]) -> LanePlan:
    """Return the plan of all of the study's workers on devices of this name, which the first of them measured."""
    key = f"lanes {study.spec.engine.lanes} on {device}"
    known = store.studies.shared_values(study).get(key)
    if known is None:
        plan = measure()
        if plan.is_passing:
            return plan
        known = store.studies.get_or_set_shared(study, key, asdict(plan))
    return LanePlan(**known)


def _end_after(outcome: EpochOutcome, verdict: Verdict, *, pruner: str) -> TrialEnd | None:
    """Return how the trial ends with the epoch that was reported, or None where it has more to train."""
    epoch = outcome.result.epoch
    if outcome.result.diverged:
        return diverged_end(outcome.result.diverged, epoch)
    if outcome.is_last:
        return complete_end(epoch)
    return pruned_end(pruner, epoch) if verdict == "prune" else None
