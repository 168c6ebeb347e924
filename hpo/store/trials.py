"""The trials of a study in their database: claimed, reported on, ended, counted and read."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, cast

import optuna
import sqlalchemy as sa
from optuna.pruners import NopPruner

from hpo.config.study_spec import StudySpec
from hpo.search import proposals, pruners, samplers
from hpo.search.study_views import RoundStudy
from hpo.store.claiming import choose_slot, take_slot
from hpo.store.conditions import is_attempt, is_slot
from hpo.store.database import BufferedStorage, Database
from hpo.store.ledger import ERROR_CHARACTERS, OUT_OF_MEMORY, ClaimLost, Ledger, Verdict, storable_text
from hpo.store.reading import read_rows
from hpo.store.reports import record_epoch
from hpo.store.retry import retry_on_outage
from hpo.store.schema import attempts_table, slots_table, studies_table, trial_values
from hpo.store.slots import add_slots, lock_study, new_slot, num_slots
from hpo.study import stages
from hpo.study.records import ENDED, Claim, EpochReport, StudyRecord, TrialRecord, read_trial


class SlotState(NamedTuple):
    """How far a slot has come."""

    number: int
    kind: str
    state: str


class Trials:
    """The trials of the studies in a database.

    Contract: every method may be called from any thread and any process; what a method has returned from is on disk.
    Methods that take a `Claim` raise `ClaimLost`, and change nothing, where the slot has been given to another attempt.
    """

    def __init__(self, database: Database) -> None:
        self._database = database
        self._ledger = Ledger(database)
        self.retry = database.retry

    @retry_on_outage
    def claim(self, study: StudyRecord, worker_id: str, *, num_held: int = 0) -> Claim | None:
        """Claim the first waiting slot that suits the worker, which holds `num_held` trials already.

        Return None where no such slot waits, or the study should stop. See `claiming.choose_slot` for which slot suits.
        """
        waiting = sa.select(slots_table.c.number).where(
            slots_table.c.study_id == study.study_id, slots_table.c.state == "waiting"
        )
        with self._database.connect() as connection:  # idle workers ask often: no write lock for a no
            if connection.execute(waiting.limit(1)).first() is None:
                return None
        with self._database.transaction() as connection:
            # The lock on the study's row lets one worker claim at a time, so that slot n becomes Optuna's trial n.
            stop = sa.select(studies_table.c.stop).where(studies_table.c.study_id == study.study_id).with_for_update()
            if connection.execute(stop).scalar_one() is not None:
                return None
            at = self._database.now(connection)
            row = choose_slot(connection, study.study_id, worker_id, num_held=num_held, at=at)
            if row is None:
                return None
            trial_id = row.trial_id
            if trial_id is None:
                new_trial = proposals.new_trial(study.spec, row)
                trial_id = self._database.cached.create_new_trial(study.study_id, new_trial)
            return take_slot(connection, row, trial_id=trial_id, worker_id=worker_id, at=at)

    @retry_on_outage
    def begin(self, claim: Claim, *, resumed_from: int, notes: Sequence[str] = ()) -> None:
        """Records from which epoch's checkpoint an attempt goes on, 0 for none, and what was wrong with others."""
        with self._ledger.locked_claim(claim) as connection:
            connection.execute(attempts_table.update().where(is_attempt(claim)).values(resumed_from=resumed_from))
            self._ledger.note(connection, claim, notes)

    @retry_on_outage
    def note(self, claim: Claim, text: str) -> None:
        """Records what went wrong in an attempt without ending it."""
        with self._ledger.locked_claim(claim) as connection:
            self._ledger.note(connection, claim, [text])

    @retry_on_outage
    def suggest(
        self, claim: Claim, spec: StudySpec, *, attributes: Callable[[Mapping[str, Any]], Mapping[str, Any]]
    ) -> dict[str, Any]:
        """The trial's values, sampled now unless an earlier attempt did; records `attributes(values)` with them.

        The sampler thinks before the transaction, which others wait for, and writes in it. It does not hear of a trial
        that confirms what was found.
        """
        if claim.kind != "search":
            values = proposals.values_from_optuna(self._database.cached.get_trial(claim.trial_id).params)
            with self._ledger.locked_claim(claim):
                self._ledger.describe(claim, attributes(values))
            return values
        sampler = samplers.SAMPLERS[spec.search.sampler]
        draft = BufferedStorage(self._database.cached)
        study = sampler.study_view()(
            spec.name, cast(optuna.storages.BaseStorage, draft), samplers.build_sampler(spec, number=claim.number),
            NopPruner(),  # Optuna's Hyperband would show the sampler a study of its own, of one bracket's trials
        )  # fmt: skip
        study.get_trials(deepcopy=False)  # the cache refuses parameters of a trial that it has not seen
        trial = None if sampler.has_counter else optuna.Trial(study, claim.trial_id)
        with self._ledger.locked_claim(claim) as connection:
            if trial is None:  # it reads and writes an attribute of the study's in two steps
                connection.execute(
                    sa.select(studies_table.c.study_id)
                    .where(studies_table.c.study_id == claim.study_id)
                    .with_for_update()
                )
                trial = optuna.Trial(study, claim.trial_id)
            values = proposals.suggest(trial, spec)
            draft.write()
            self._ledger.describe(claim, attributes(values))
        return values

    def report(
        self,
        claim: Claim,
        spec: StudySpec,
        *,
        epoch: int,
        metrics: Mapping[str, float],
        value: float,
        may_prune: bool = True,
    ) -> Verdict:
        """Records an epoch and says how the trial goes on, as `report_all` does of several."""
        (verdict,) = self.report_all([EpochReport(claim, epoch, metrics, value, may_prune)], spec)
        if verdict is None:
            raise ClaimLost(f"trial {claim.number}, attempt {claim.attempt}")
        return verdict

    @retry_on_outage
    def report_all(self, reports: Sequence[EpochReport], spec: StudySpec) -> list[Verdict | None]:
        """Records epochs of trials that were trained together, and says how each goes on; None: it was lost.

        A report replaces what an earlier attempt said of this epoch and of later ones. The pruner is asked once for
        each epoch, when all are recorded, and its word is kept: a kill between a report and what follows from it
        changes nothing.
        """
        verdicts: dict[Claim, Verdict] = {}
        with self._database.transaction() as connection:
            known = {}
            for report in sorted(reports, key=lambda report: report.claim.number):  # as `renew`, lest both wait
                if self._ledger.extend(connection, report.claim):
                    known[report.claim] = record_epoch(self._database, connection, report)
            stop = sa.select(studies_table.c.stop).where(studies_table.c.study_id == reports[0].claim.study_id)
            otherwise: Verdict = "go on" if connection.execute(stop).scalar_one() is None else "stop"
            judge: RoundStudy | None = None  # made where it is needed
            for report in reports:
                claim = report.claim
                if claim not in known:
                    continue
                last_epoch, pruned_at = known[claim]
                pruned = pruned_at == report.epoch
                if report.epoch > last_epoch:
                    if report.may_prune:
                        judge = judge or RoundStudy(spec.name, self._database.cached, pruner=pruners.build_pruner(spec))
                        pruned = judge.should_prune(claim.trial_id)
                    reached = {"last_epoch": report.epoch, "crashes": 0, "pruned_at": report.epoch if pruned else None}
                    connection.execute(slots_table.update().where(is_slot(claim)).values(**reached))
                verdicts[claim] = "prune" if pruned and report.may_prune else otherwise
        return [verdicts.get(report.claim) for report in reports]

    @retry_on_outage
    def last_report(self, claim: Claim) -> tuple[int, float] | None:
        """The last epoch that this or an earlier attempt reported, and its value; None where none did."""
        trial = self._database.cached.get_trial(claim.trial_id)
        return None if trial.last_step is None else (trial.last_step, trial.intermediate_values[trial.last_step])

    @retry_on_outage
    def finish(
        self, claim: Claim, state: str, *, reason: str, error: str | None = None, failure_key: str | None = None
    ) -> None:
        """Ends the slot for good. Its value is its last report, and nothing where it failed.

        Optuna is given that of a diverged trial too (its tools hide a curve without a value); we never show it.
        `failure_key` is equal for two trials that failed the same way; three of them stop the study.
        """
        with self._ledger.locked_claim(claim) as connection:
            self._ledger.end(connection, claim, state, reason, error=error, failure_key=failure_key)

    @retry_on_outage
    def fail(
        self,
        claim: Claim,
        spec: StudySpec,
        *,
        reason: str,
        error: str,
        failure_key: str,
        alongside_others: bool = False,
    ) -> bool:
        """Ends an attempt by an exception; returns whether that was the trial's end too, or it waits for another try.

        `beside` others it counts for nobody, because nobody knows whose it was: the trial is a suspect, tried alone.

        A trial is tried again `search.retries` times, and one that ran out of memory once, alone on its device.
        """
        with self._ledger.locked_claim(claim) as connection:
            mine = is_slot(claim)
            ended = {"error": storable_text(error)[-ERROR_CHARACTERS:]}
            if alongside_others:
                connection.execute(slots_table.update().where(mine, slots_table.c.crashes == 0).values(crashes=1))
                self._ledger.free(connection, claim, f"beside others: {storable_text(reason)}", **ended)
                return False
            row = connection.execute(
                sa.select(slots_table.c.failures, slots_table.c.exclusive.label("exclusive")).where(mine)
            ).one()
            out_of_memory = failure_key == OUT_OF_MEMORY
            if row.exclusive if out_of_memory else row.failures >= spec.search.retries:
                key = None if claim.kind == "test" else failure_key  # the study has its answer all the same
                self._ledger.end(connection, claim, "failed", reason, error=error, failure_key=key)
                return True
            tried = {"exclusive": 1} if out_of_memory else {"failures": row.failures + 1}
            connection.execute(slots_table.update().where(mine).values(**tried))
            self._ledger.free(connection, claim, storable_text(reason), **ended)
            return False

    @retry_on_outage
    def release(self, claim: Claim) -> None:
        """Gives the slot back unfinished, to be claimed again."""
        with self._ledger.locked_claim(claim) as connection:
            self._ledger.free(connection, claim, "released")

    @retry_on_outage
    def get_all(self, study: StudyRecord) -> list[TrialRecord]:
        """Return every slot of the study with what is known of it, in order."""
        with self._database.connect() as connection:
            rows, reports, attempts_by_number = read_rows(connection, study.study_id)
        frozen = {t._trial_id: t for t in self._database.cached.get_all_trials(study.study_id, deepcopy=False)}
        return [
            read_trial(
                row, frozen.get(row.trial_id), reports.get(row.number, []), attempts_by_number.get(row.number, [])
            )
            for row in rows
        ]

    @retry_on_outage
    def counts(self, study_id: int) -> dict[str, int]:
        """How many slots are in each state; states that no slot is in are left out."""
        with self._database.connect() as connection:
            query = (
                sa.select(slots_table.c.state, sa.func.count().label("num"))
                .where(slots_table.c.study_id == study_id)
                .group_by(slots_table.c.state)
            )
            return {row.state: row.num for row in connection.execute(query)}

    @retry_on_outage
    def num_epochs(self, study: StudyRecord) -> int:
        """How many epochs its trials have come to, all together."""
        with self._database.connect() as connection:
            query = sa.select(sa.func.sum(slots_table.c.last_epoch)).where(slots_table.c.study_id == study.study_id)
            return connection.execute(query).scalar_one() or 0

    @retry_on_outage
    def best(self, study: StudyRecord, count: int) -> list[tuple[int, float]]:
        """The complete trials of the search with the best values, at most `count`, in order: numbers and values."""
        value = trial_values.c.value
        order = value.desc() if study.spec.direction == "maximize" else value.asc()
        query = (
            sa.select(slots_table.c.number, value)
            .join(trial_values, trial_values.c.trial_id == slots_table.c.trial_id)
            .where(
                slots_table.c.study_id == study.study_id,
                slots_table.c.state == "complete",
                slots_table.c.kind == "search",
            )
            .order_by(order, slots_table.c.number)
            .limit(count)
        )
        with self._database.connect() as connection:
            return [(number, found) for number, found in connection.execute(query)]

    @retry_on_outage
    def ended_numbers(self, study: StudyRecord) -> set[int]:
        """The numbers of the trials that have ended, in whatever way."""
        query = sa.select(slots_table.c.number).where(
            slots_table.c.study_id == study.study_id, slots_table.c.state.in_(ENDED)
        )
        with self._database.connect() as connection:
            return set(connection.execute(query).scalars())

    @retry_on_outage
    def stage_due(self, study: StudyRecord) -> str | None:
        """Return what follows the trials that the study has: "confirm", "test", or None while any of them is open."""
        return None if study.spec.confirm is None else stages.due(study, self._positions(study))

    @retry_on_outage
    def num_left(self, study: StudyRecord) -> int:
        """How many trials are to end yet, as far as that is known."""
        num_open = sum(count for state, count in self.counts(study.study_id).items() if state not in ENDED)
        return num_open or (stages.num_due(study, self._positions(study)) if study.spec.confirm else 0)

    @retry_on_outage
    def most_at_once(self, study: StudyRecord) -> int:
        """How many trials may come to wait at the same time, now or later."""
        confirm_ = study.spec.confirm
        waiting = self.counts(study.study_id).get("waiting", 0)
        return max(waiting, confirm_.top * confirm_.seeds) if confirm_ and self.num_left(study) else waiting

    @retry_on_outage
    def untested(self, study: StudyRecord) -> set[int]:
        """The numbers of the trials whose networks the test set may yet be measured with."""
        return stages.untested(study, self._positions(study)) if study.spec.confirm else set()

    def _positions(self, study: StudyRecord) -> list[SlotState]:
        columns = (slots_table.c.number, slots_table.c.kind, slots_table.c.state)
        query = sa.select(*columns).where(slots_table.c.study_id == study.study_id).order_by(slots_table.c.number)
        with self._database.connect() as connection:
            return [SlotState(*row) for row in connection.execute(query)]

    @retry_on_outage
    def add_planned(self, study: StudyRecord, planned: Sequence[stages.Planned], *, after: int) -> None:
        """Add the slots of these trials, unless the study has more than `after` slots: somebody else was first."""
        with self._database.transaction() as connection:
            lock_study(connection, study.study_id)
            if num_slots(connection, study.study_id) == after:
                new = [
                    new_slot(study.spec, one.params)
                    | {"kind": one.kind, "replicate": one.replicate, "tested": one.tested}
                    for one in planned
                ]
                add_slots(connection, study.study_id, new)
