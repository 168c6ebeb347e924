"""The worker's loop: claim -> admit -> run an epoch -> report -> keep, drop or finish.

One process, one device. It lives across trials, renews its leases from a thread, and leaves when no slot of the study
is left, when it is told to (SIGTERM, the death of its supervisor, `hpo stop`), or when its device is no longer usable.
"""

from __future__ import annotations

import logging
import math
import os
import socket
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hpo.errors import UserError
from hpo.objective import Trial
from hpo.search.pruners import INTERLEAVED_TRIALS, PRUNERS, may_prune_after
from hpo.store.ledger import LEASE_S, OUT_OF_MEMORY, ClaimLost, Verdict
from hpo.store.retry import StoreFailed
from hpo.store.studies import Store
from hpo.study.records import Claim, StudyRecord
from hpo.system import provenance
from hpo.system.processes import heartbeat
from hpo.train.config import EpochResult, TrialConfig, derive_seed
from hpo.workers.failures import failure_key, is_out_of_memory, message
from hpo.workers.reporting import End, EpochOutcome, Reporter, complete_end, diverged_end
from hpo.workers.stages import add_due_trials
from hpo.workers.worker_handle import EXIT_RESTART

if TYPE_CHECKING:
    from hpo.train.checkpoint import Checkpoint
    from hpo.train.engines.lanes import LaneEngine, LanePlan
    from hpo.workers.checkpoints import StudyCheckpoints

logger = logging.getLogger(__name__)

POLL_S, LONGEST_POLL_S = 0.3, 5.0  # between looks for a slot while others hold the last ones: longer and longer
REAP_S = 5.0  # between looks for workers that died
EPOCH_S = 20.0  # how long an epoch may go on once the worker was told to leave, to be saved at its end
STALL = 0.05  # of an epoch's time: how long its reports may keep the next one waiting


class Worker:
    """Trains trials of one study on one device until there are none left or `should_stop()` is true."""

    def __init__(
        self, store: Store, study: StudyRecord, *, device: str, torch_device: str, should_stop: Callable[[], bool],
        host: str | None = None,
    ) -> None:  # fmt: skip
        self._store = store
        self._study = study
        self._spec = study.spec
        self._device = device
        self._host = host or socket.gethostname()
        self._torch_device = torch_device
        self._told_to_stop = should_stop
        self._draining = False
        self._told_at: float | None = None  # when it was first seen that the worker is to leave
        self._lanes: dict[int, tuple[Claim, TrialConfig]] = {}
        self._engine: LaneEngine | None = None
        self._checkpoints: StudyCheckpoints | None = None
        self._reporter = Reporter()
        self._held: set[Claim] = set()  # what the heartbeat renews
        self._suspects: set[Claim] = set()  # of those, the ones that have the device to themselves for an epoch
        self._worker_id = ""
        self._pid = os.getpid()

    def run(self) -> None:
        self._worker_id = self._store.add_worker(self._study.study_id, device=self._device, host=self._host)
        work = self._call_function if self._spec.objective else self._engine_loop()
        next_reap, pause_s = 0.0, POLL_S
        try:
            with heartbeat(lambda: self._store.renew(list(self._held), self._worker_id), every_s=LEASE_S / 4):
                while not self._should_stop():
                    if work():
                        pause_s = POLL_S
                        continue
                    if not add_due_trials(self._store, self._study):
                        break
                    if time.monotonic() > next_reap:
                        self._store.reap(self._study)
                        next_reap = time.monotonic() + REAP_S
                    self._draining = self._store.is_stopping(self._study.study_id)
                    self._pause(pause_s)
                    pause_s = min(2 * pause_s, LONGEST_POLL_S)
                self._reporter.check()
                if self._checkpoints is not None:
                    self._save_rest()
                    self._checkpoints.tidy()
        finally:
            self._reporter.close()
            if self._checkpoints is not None:
                self._checkpoints.close()
            self.leave()

    def leave(self) -> None:
        """Gives back what is held and signs off; from any thread, where a trial does not come to its next report."""
        for claim in list(self._held):
            self.release(claim)
        self._store.remove_worker(self._worker_id)

    def _pause(self, seconds: float) -> None:
        until = time.monotonic() + seconds
        while not self._should_stop() and (left := until - time.monotonic()) > 0:
            time.sleep(min(left, POLL_S))

    def _should_stop(self) -> bool:
        return self._draining or self._told_to_stop()

    def _must_abort(self) -> bool:
        """Whether an epoch is to be left in its middle: the process is to end, and the epoch does not."""
        if not self._told_to_stop():
            return False
        self._told_at = self._told_at or time.monotonic()
        return time.monotonic() - self._told_at > EPOCH_S

    # Trials of ours, trained by an engine

    def _engine_loop(self) -> Callable[[], bool]:
        from hpo.train.engines.lanes import MAX_LANES, LaneEngine, free_memory
        from hpo.train.engines.protocol import Stopped
        from hpo.workers.checkpoints import StudyCheckpoints

        wanted, compares_early = self._spec.engine.lanes, PRUNERS[self._spec.pruner.name].compares_early
        engine = self._engine = LaneEngine(
            device=self._torch_device,
            lanes=None if wanted == "auto" else wanted,
            max_lanes=1 if self._has_many_kinds() else min(MAX_LANES, self._spec.num_trials),
            num_interleaved=min(INTERLEAVED_TRIALS, self._spec.num_trials) if compares_early else 1,
            should_stop=self._must_abort,
            get_or_set_plan=self._agree,
        )
        checkpoints = self._checkpoints = StudyCheckpoints(self._store, self._study)
        checkpoints.tidy()

        def work() -> bool:
            """Fills the free lanes and trains an epoch; False where there was nothing to train."""
            self._fill_lanes(engine, checkpoints)
            if not self._lanes:
                return False
            results: list[EpochResult] = []
            turn = [self._lanes[lane][0] for lane in engine.next_lanes]
            with (
                self.failing_trials_on_error(turn),
                self._memory_limits(turn, to=len(self._lanes) // 2),
                suppress(Stopped),
            ):
                try:
                    results = engine.run_epoch()
                finally:
                    if os.getpid() == self._pid:  # in a process that the user's code forked nobody reports
                        self._reporter.wait()  # before the trials are given up
            self._reporter.check()
            for claim in turn if results else ():
                self._wait_until_saved(claim)
            trained = [self._taken(result) for result in results if self._lanes[result.lane][0] in self._held]
            decides = any(
                one.ends or one.claim in self._suspects or may_prune_after(one.result.epoch, self._spec)
                for one in trained
            )
            if trained:
                self._reporter.begin(partial(self._report, trained))
                if self._reporter.wait(None if decides else STALL * max(one.result.seconds for one in trained)):
                    self._reporter.check()
            if not results:  # it was stopped in the middle of an epoch, where it did not fail
                for claim in self._held.intersection(turn):
                    self.release(claim)
            for lane, (claim, _) in list(self._lanes.items()):
                if claim not in self._held:
                    engine.evict(lane)
                    del self._lanes[lane]
            if len(results) < len(turn):
                free_memory()  # what failed may have filled the device, which other processes share
            return True

        return work

    def _fill_lanes(self, engine: LaneEngine, checkpoints: StudyCheckpoints) -> None:
        while engine.free_lanes and self._may_take_more() and (claim := self._claim()):
            num_lanes = len(self._lanes)
            with (
                self.dropping_lost_claims(claim),
                self.failing_trials_on_error([claim]),
                self._memory_limits([claim], to=num_lanes),
            ):
                values, seed = self._suggest(claim)
                config = self._spec.trial_config(values, seed=seed)
                checkpoint = checkpoints.begin(claim, config)
                if checkpoint is not None and checkpoint.epoch >= config.training.epochs:
                    if claim.kind == "test":
                        self._measure_test(claim, config, checkpoint)
                    self._finish(claim, *complete_end(checkpoint.epoch))  # or killed between its last epoch and its end
                else:
                    lane = engine.admit(config, checkpoint, may_stack=not claim.is_suspect)
                    self._lanes[lane] = (claim, config)

    def _agree(self, device: str, measure: Callable[[], LanePlan]) -> LanePlan:
        """What the study's workers do on devices of this name: as the first of them chose."""
        from hpo.train.engines.lanes import LanePlan

        key = f"lanes {self._spec.engine.lanes} on {device}"
        known = self._store.shared_values(self._study).get(key)
        if known is None:
            chosen = measure()
            if chosen.is_passing:
                return chosen
            known = self._store.agree(self._study, key, asdict(chosen))
        return LanePlan(**known)

    def _has_many_kinds(self) -> bool:
        """Whether the search varies what trials that are trained as one must share."""
        from hpo.train.engines.stack import stack_key

        return len({stack_key(self._spec.trial_config(corner, seed=0)) for corner in self._spec.extreme_points()}) > 1

    def _may_take_more(self) -> bool:
        """Whether another trial may join those in the lanes: not a suspect's, and no more than this worker's share."""
        if not self._lanes:
            return True
        if self._suspects & self._held:
            return False
        counts = self._store.counts(self._study.study_id)
        if not counts.get("waiting"):
            return False
        num_open = counts.get("waiting", 0) + counts.get("running", 0)
        if self._engine is not None and self._engine.is_interleaving:
            num_open = min(num_open, INTERLEAVED_TRIALS)  # trials of all workers are compared
        num_workers = sum(worker.alive for worker in self._store.workers(self._study))
        return len(self._lanes) < math.ceil(num_open / max(1, num_workers))

    def _taken(self, result: EpochResult) -> EpochOutcome:
        """A trial's epoch and, where it is to be saved, the trial as it is after it."""
        assert self._engine is not None
        assert self._checkpoints is not None
        claim, config = self._lanes[result.lane]
        is_last = result.epoch >= config.training.epochs
        is_due = (
            claim.kind != "search" or self._checkpoints.may_be_kept(claim.number, result.val_accuracy)
            if is_last
            else result.epoch % config.training.checkpoint_epochs == 0
        )
        checkpoint = None
        if is_due and not result.diverged:
            with self.failing_trials_on_error([claim]):  # a network's state may be such that it cannot be saved
                checkpoint = self._engine.checkpoint(result.lane)
        return EpochOutcome(claim, config, result, is_last, checkpoint)

    def _report(self, trained: Sequence[EpochOutcome]) -> None:
        """Reports what was trained together, in a thread: a slow store keeps training waiting only for a verdict.

        A trial is saved after it is reported, so that a worker that has lost it does not come to write, and what was
        saved of it is on disk before its next epoch is reported.
        """
        trained = [one for one in trained if one.claim in self._held]
        if not trained:  # none of them could be saved
            return
        verdicts = self._store.report_all([one.report() for one in trained], self._spec)
        for one, verdict in zip(trained, verdicts, strict=True):
            with self.dropping_lost_claims(one.claim):
                self._settle(one, verdict)

    def _settle(self, one: EpochOutcome, verdict: Verdict | None) -> None:
        """Ends the trial after an epoch's report, where it is done, dropped or diverged, or saves it."""
        assert self._checkpoints is not None
        if verdict is None:
            raise ClaimLost
        end = self._end(
            one.claim, verdict, epoch=one.result.epoch, diverged=one.result.diverged, last=one.is_last
        )  # fmt: skip
        if one.checkpoint is not None and (end is None or end[0] == "complete"):
            self._checkpoints.save(one.claim, one.checkpoint)
        if end is not None:
            self._wait_until_saved(one.claim)
            if one.claim in self._held and one.claim.kind == "test" and one.checkpoint is not None:
                with self.failing_trials_on_error([one.claim]):
                    self._measure_test(one.claim, one.config, one.checkpoint)
            if one.claim in self._held:
                self._finish(one.claim, *end)

    def _measure_test(self, claim: Claim, config: TrialConfig, checkpoint: Checkpoint) -> None:
        """Adds the test set's accuracy of a trial that has had its epochs to what is known of the last one."""
        assert self._engine is not None
        last = checkpoint.results[-1]
        metrics = last.metrics() | {"test_accuracy": self._engine.test_accuracy(config, checkpoint)}
        self._store.report(
            claim, self._spec, epoch=last.epoch, metrics=metrics, value=last.val_accuracy, may_prune=False
        )

    def _save_rest(self) -> None:
        """Saves the trials that it still holds, as far as they have come since they were last saved."""
        assert self._engine is not None
        assert self._checkpoints is not None
        for lane, (claim, config) in self._lanes.items():
            if claim not in self._held:
                continue
            with self.dropping_lost_claims(claim), self.failing_trials_on_error([claim]):
                checkpoint = self._engine.checkpoint(lane)
                if checkpoint.epoch % config.training.checkpoint_epochs:
                    self._checkpoints.save(claim, checkpoint)
            self._wait_until_saved(claim)

    def _wait_until_saved(self, claim: Claim) -> None:
        """What a trial's checkpoint was begun with is on disk from here on, or the trial has failed."""
        assert self._checkpoints is not None
        with (
            self.dropping_lost_claims(claim),
            self.failing_trials_on_error([claim]),
        ):  # its state may be such that it cannot be written
            self._checkpoints.wait(claim.number)

    # Trials of the user's own function

    def _call_function(self) -> bool:
        from hpo.train.imports import import_object

        assert self._spec.objective is not None
        claim = self._claim()
        if claim is None:
            return False
        with self.dropping_lost_claims(claim), self.failing_trials_on_error([claim]):
            told: list[End] = []  # how the trial ends, once it has been told
            trial = self._user_trial(claim, told)
            import_object(self._spec.objective.function, setting="objective.function")(trial)
            # An earlier attempt may have been killed after its last report, and have left nothing to train.
            last = self._store.last_report(claim)
            if told:
                self._finish(claim, *told[0])
            elif self._should_stop() and last is not None and last[0] < self._spec.max_epochs:
                self.release(claim)
            elif last is None:
                raise UserError(f"{self._spec.objective.function} returned without a trial.report(...)")
            elif not math.isfinite(last[1]):
                self._finish(claim, *diverged_end(f"{self._spec.metric} = {last[1]}", last[0]))
            else:
                self._finish(claim, *complete_end(last[0]))
        return True

    def _user_trial(self, claim: Claim, told: list[End]) -> Trial:
        values, seed = self._suggest(claim)
        root = self._spec.checkpoints.url
        base = Path(root).expanduser() / self._study.key if root else self._store.folder(self._study) / "trials"
        folder = base / f"{claim.number:04d}"
        folder.mkdir(parents=True, exist_ok=True)

        def on_report(epoch: int, metrics: dict[str, float]) -> bool:
            if told:
                return True  # it was told to end and reports all the same: nothing more is recorded
            value = metrics[self._spec.metric]
            diverged = None if math.isfinite(value) else f"{self._spec.metric} = {value}"
            last = epoch >= self._spec.max_epochs
            verdict = self._store.report(
                claim,
                self._spec,
                epoch=epoch,
                metrics=metrics,
                value=value,
                may_prune=claim.kind == "search" and not (diverged or last),
            )
            end = self._end(claim, verdict, epoch=epoch, diverged=diverged, last=last)
            if end is not None and not (last and end[0] == "complete"):
                told.append(end)
            return bool(told) or (self._should_stop() and not last)

        return Trial(
            params=values,
            device=self._torch_device,
            epochs=self._spec.training.epochs,
            seed=seed,
            checkpoint_dir=folder,
            number=claim.number,
            attempt=claim.attempt,
            _metric=self._spec.metric,
            _on_report=on_report,
        )

    # Both

    def _claim(self) -> Claim | None:
        if self._should_stop():
            return None
        self._reporter.check()  # the sampler is to know it
        claim = self._store.claim(self._study, self._worker_id, beside=len(self._lanes))
        if claim is not None:
            self._held.add(claim)
            if claim.is_suspect:
                self._suspects.add(claim)
        return claim

    def _suggest(self, claim: Claim) -> tuple[dict[str, Any], int]:
        """The trial's values and its seed: the searched one, else one drawn from training.seed.

        That is its own, or to confirm learning rates the same for each of them.
        """

        def seed(values: Mapping[str, Any]) -> int:
            which = ("trial", claim.number) if claim.replicate is None else ("confirm", claim.replicate)
            return int(values.get("seed", derive_seed(self._spec.training.seed, *which)))

        values = self._store.suggest(
            claim,
            self._spec,
            attributes=lambda values: provenance.trial_metadata(
                device=self._device, host=self._host, seed=seed(values)
            ),
        )
        logger.info("%s, on %s: %s", self._name(claim), self._device, dict(values))
        return values, seed(values)

    def _name(self, claim: Claim) -> str:
        return f"study {self._study.name}, trial {claim.number}, attempt {claim.attempt}"

    def _end(self, claim: Claim, verdict: Verdict, *, epoch: int, diverged: str | None, last: bool) -> End | None:
        """How the trial ends with the epoch that it has reported, if it does."""
        self._draining = self._draining or verdict == "stop"
        self._suspects.discard(claim)
        if diverged:
            return diverged_end(diverged, epoch)
        if last:
            return complete_end(epoch)
        if verdict == "prune":
            return "pruned", f"{self._spec.pruner.name} pruner after epoch {epoch}"
        return None

    def _finish(self, claim: Claim, state: str, reason: str) -> None:
        self._store.finish(claim, state, reason=reason)
        logger.info("%s: %s, %s", self._name(claim), state, reason)
        self._held.discard(claim)
        if self._checkpoints is not None:
            self._checkpoints.forget(claim.number)

    def release(self, claim: Claim) -> None:
        self._end_writing(claim)
        self._held.discard(claim)
        with suppress(ClaimLost):
            self._store.release(claim)

    def _end_writing(self, claim: Claim) -> None:
        """Whoever goes on with the trial finds what is being written of it."""
        if self._checkpoints is not None:
            with suppress(Exception):  # or else it goes on from the checkpoint before
                self._checkpoints.wait(claim.number)

    @contextmanager
    def dropping_lost_claims(self, claim: Claim) -> Iterator[None]:
        """A trial that turns out to be another worker's by now is dropped without a trace."""
        try:
            yield
        except ClaimLost:
            logger.warning("trial %d is another worker's now; dropped", claim.number)
            self._held.discard(claim)

    @contextmanager
    def failing_trials_on_error(self, claims: list[Claim]) -> Iterator[None]:
        """An exception in training ends its trial as failed, with the traceback, and not the study.

        Of several trials it ends none: each goes on alone, where it is that trial's or does not come again.
        """
        try:
            yield
        except (ClaimLost, StoreFailed):
            raise  # the trial is another's, or the store is at fault: not the trial's failure
        except BaseException as error:  # a user's loop that calls sys.exit() ends its trial, not the worker
            if os.getpid() != self._pid:
                os._exit(1)  # a process that the user's code forked has come back to us: it has no business here
            if isinstance(error, KeyboardInterrupt) and self._should_stop():
                raise  # Ctrl-C, insisted on, where the worker is the command itself
            out_of_memory = is_out_of_memory(error)
            reason = (
                OUT_OF_MEMORY if out_of_memory else f"{type(error).__name__}: {message(error)}".split("\n")[0][:500]
            )
            text = "".join(traceback.format_exception(error))
            for claim in claims:
                self._end_writing(claim)
                with self.dropping_lost_claims(claim):
                    ended = self._store.fail(
                        claim,
                        self._spec,
                        reason=reason,
                        error=text,
                        failure_key=failure_key(error),
                        beside=len(claims) > 1,
                    )
                    self._held.discard(claim)
                    if ended and self._checkpoints is not None:
                        self._checkpoints.forget(claim.number)
            if "CUDA error" in message(error) and not out_of_memory:
                raise SystemExit(EXIT_RESTART) from error  # no later kernel of this process would run

    @contextmanager
    def _memory_limits(self, claims: list[Claim], *, to: int) -> Iterator[None]:
        """Running out of memory is no trial's failure where there are others: these are given back, to go on from their
        checkpoints, and so many are trained at once from now on. With `to` = 0 it is."""
        try:
            yield
        except Exception as error:
            if to == 0 or not is_out_of_memory(error):
                raise
            assert self._engine is not None
            logger.warning("out of memory with %d trials; at most %d at once from now on", len(self._lanes), to)
            self._engine.limit_lanes(to)
            for claim in claims:
                self.release(claim)
