"""The rounds of one job, from the start or from the last whole round."""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property, partial

import numpy as np

from offsite.coordinator.aggregation.factor_rules import read_earlier
from offsite.coordinator.aggregation.rules import AGGREGATORS, INDIVIDUALS, Aggregator, RuleSettings, ServerState
from offsite.coordinator.config.federation_file import FedConfig
from offsite.coordinator.job.evaluate import score
from offsite.coordinator.job.prepare import Job
from offsite.coordinator.job.round_record import Dropped, RoundRecord
from offsite.coordinator.job.store import Progress, Store
from offsite.coordinator.rounds.attempt import Attempt, Attempts
from offsite.coordinator.rounds.emulator_refresh import DeployedEmulator
from offsite.coordinator.rounds.exchange import Exchange
from offsite.coordinator.rounds.plug_in_choice import PlugIn, corrected, plainly
from offsite.coordinator.rounds.round import OnLedger, RoundResult, run_round, send_abort
from offsite.emulator.runtime.correction import correctable
from offsite.emulator.runtime.plug_in import plug, take
from offsite.emulator.runtime.refresh_state import size_of
from offsite.errors import ConfigError, TooFewSurvivors, lookup
from offsite.protos.upload import scatter_uploaded


@dataclass(frozen=True)
class _Judged:
    """Verdict of the acceptance test; the fields have the meanings of the same fields of `RoundRecord`."""

    accepted: bool
    reason: str
    scale: float
    correction: float
    public_loss: float | None


@dataclass(frozen=True)
class TrainingLoop:
    """The rounds of one job, with everything that is the same in all rounds.

    Attributes:
      job: full model, adapter and manifest.
      config: federation file, with the server rule and the tolerance of the acceptance test.
      store: the run folder.
      attempts: attempts at the rounds of this run.
      tries: number of tries of a round that found too few sites; at least 1.
      on_ledger: function that takes each site's newest ledger entry, see `run_round`.
    """

    job: Job
    config: FedConfig
    store: Store
    attempts: Attempts
    tries: int = 1
    on_ledger: OnLedger = lambda site, head: None

    def public_loss(self, adapter: np.ndarray) -> float:
        """Plugs an adapter into the full model and returns the model's loss on public records, in the task's unit."""
        job = self.job
        plug(job.full, job.layout, adapter)
        return score(job.task, job.full, job.public.test, batch=job.manifest.physical_batch).loss

    @property
    def rule(self) -> Aggregator:
        """The server rule."""
        return lookup(AGGREGATORS, self.config.aggregation.rule, "rule")

    @cached_property
    def rule_settings(self) -> RuleSettings:
        """The settings of the server rule, with the earlier adapters that the federation file names."""
        config, layout = self.config.aggregation, self.job.layout
        earlier = tuple(read_earlier(folder, layout) for folder in config.earlier)
        return RuleSettings(config.learning_rate, config.momentum, config.faulty, config.penalty, layout, earlier)

    @cached_property
    def shipped(self) -> DeployedEmulator:
        """The emulator that the sites have; it is loaded at the first use."""
        return DeployedEmulator.open(self.store.package, self.job)

    def plug_in(self, adapter: np.ndarray) -> PlugIn:
        """Returns the best plug-in for the full model from an adapter that was tuned on the emulator."""
        job, plain = self.job, plainly(adapter, self.public_loss)
        # The repair that an adapter learnt is known only where the adapter was tuned on a single emulator.
        single = len(job.emulators) == 1
        if not single or not correctable(job.emulator.facts.geometry, job.manifest.adapter.method):
            return plain
        return corrected(plain, job.full, job.layout, self.shipped.model, self.public_loss)

    def start(self) -> Progress:
        """Returns the resume point; without one, stores and returns the state before the first round."""
        if (progress := self.store.load_state()) is not None:
            self.store.drop_rounds_after(progress.round)
            return progress
        initial = self.job.layout.read(self.job.full)
        progress = Progress(ServerState.start(initial), 0, self.public_loss(initial))
        self.store.save_state(progress)
        return progress

    def run(
        self,
        exchange: Exchange,
        on_round: Callable[[RoundRecord], None],
        cohort: Callable[[], tuple[str, ...]] | None = None,
        farewell: Exchange | None = None,
    ) -> Progress:
        """Runs all rounds that are left and returns the job's progress.

        Args:
          exchange: transport to the sites.
          on_round: function that takes the record of each whole round.
          cohort: function that returns the sites of the next attempt; all sites by default.
          farewell: transport to the sites for messages that need no answer and no long wait; `exchange` by default.

        Raises:
          TooFewSurvivors: no try of a round gave a sum; the run folder stands at the last whole round.
        """
        progress = self.start()
        manifest = self.job.manifest
        everyone = manifest.sites
        for number in range(progress.round + 1, manifest.rounds + 1):
            open_attempt = partial(self.attempts.open, number, cohort or (lambda: everyone), exchange)
            progress, record = self._round(progress, open_attempt, farewell or exchange)
            self.store.save(progress, record)
            self.attempts.close()
            on_round(record)
        return progress

    def _round(
        self, progress: Progress, open_attempt: Callable[[], Attempt], farewell: Exchange
    ) -> tuple[Progress, RoundRecord]:
        """Tries a round until a try gives a sum; an attempt that a crash left behind does not count as a try."""
        failed = 0
        while True:
            attempt = open_attempt()
            try:
                return self.advance(progress, attempt)
            except TooFewSurvivors as error:
                failed += not attempt.resumed
                self.attempts.close()
                send_abort(farewell, attempt.plan.cohort, str(error))
                if failed >= self.tries or self.attempts.count.spent >= self.job.manifest.releases:
                    raise

    def advance(self, progress: Progress, attempt: Attempt) -> tuple[Progress, RoundRecord]:
        """Runs one attempt at a round, the acceptance test, and a refresh where it is due; stores nothing."""
        began, number = time.monotonic(), attempt.plan.number
        manifest, server = self.job.manifest, progress.server
        result = run_round(manifest, attempt.plan, server.adapter, attempt, self.on_ledger, refresh=progress.refresh)
        after, judged = self._judge(replace(progress, round=number), self._uploads(number, result))
        record = _record(number, result, judged, seconds=time.monotonic() - began)
        if manifest.refresh:
            carried = size_of(progress.refresh)
            share = carried / self.job.emulator.facts.package_bytes
            record = replace(record, refresh_bytes=carried, refresh_share=share)
        if judged.accepted and self._refresh_due(number):
            refresh, trial = self.shipped.refreshed(after)
            return replace(after, refresh=refresh), replace(record, refreshed=trial.kept, emulator_loss=trial.losses)
        return after, record

    def _uploads(self, number: int, result: RoundResult) -> np.ndarray:
        """Returns the rule's input in the adapter's layout, float64: the mean, (d,), or each member's own, (n, d)."""
        uploads = result.update
        if self.rule.needs == INDIVIDUALS:
            if result.individuals is None:
                raise ConfigError(
                    f"rule={self.rule.name!r}: needs each site's update, which secure aggregation hid; start a new run"
                )
            uploads = result.individuals
        return scatter_uploaded(self.job.manifest, number, uploads)

    def _judge(self, progress: Progress, uploads: np.ndarray) -> tuple[Progress, _Judged]:
        """Returns the progress after the largest share of the uploads that does no harm, and the verdict."""
        tried: dict[float, tuple[ServerState, PlugIn]] = {}

        def loss_at(scale: float) -> float:
            server = self.rule.step(progress.server, uploads * scale, self.rule_settings)
            tried[scale] = server, self.plug_in(server.adapter)
            return tried[scale][1].loss

        scale, loss, verdict = take(progress.public_loss, loss_at, self.config.evaluation.tolerance)
        server, plugged = tried[scale]
        known = loss if np.isfinite(loss) else None
        judged = _Judged(verdict.accepted, verdict.reason, scale, plugged.correction, known)
        if not verdict.accepted:
            return progress, judged
        # The test compares with the best loss so far, so that many small losses cannot add up.
        best = min(loss, progress.public_loss)
        plugged_in = replace(progress, correction=plugged.correction, corrected=plugged.corrected)
        return replace(plugged_in, server=server, public_loss=best), judged

    def _refresh_due(self, number: int) -> bool:
        """Whether the emulator is refreshed after a round; after the last round no site trains on it."""
        every = self.job.manifest.refresh
        return every > 0 and number % every == 0 and number < self.job.manifest.rounds


def _record(number: int, result: RoundResult, judged: _Judged, *, seconds: float) -> RoundRecord:
    return RoundRecord(
        round=number,
        members=tuple(result.members),
        threshold=result.threshold,
        dropped=tuple(Dropped(refusal.site, refusal.stage, refusal.reason) for refusal in result.refused),
        faulty=tuple(result.faulty),
        update_norm=float(np.linalg.norm(result.update)),
        bytes_down=result.traffic.down,
        bytes_up=result.traffic.up,
        upload_bytes=result.upload_bytes,
        payload_bytes=result.payload_bytes,
        individuals=result.individuals is not None,
        seconds=round(seconds, 3),
        accepted=judged.accepted,
        reason=judged.reason,
        scale=judged.scale,
        correction=judged.correction,
        public_loss=judged.public_loss,
    )
