"""The rounds of one job, from the start or from where a run stopped."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from adapter.layout import Layout
from coordinator.aggregate import AGGREGATORS, Rates, ServerState
from coordinator.evaluate import score
from coordinator.exchange import Exchange
from coordinator.rounds import RoundPlan, RoundResult, run_round
from coordinator.store import Progress, Store
from emulator.plug import accept, plug
from errors import lookup
from protos.manifest import JobManifest
from task.examples import Examples
from task.spec import Task


@dataclass(frozen=True)
class Federation:
    """What stays the same over all rounds of a job.

    Attributes:
      manifest: the job.
      rule: name in `AGGREGATORS`.
      rates: of the rule.
      full: full model with the adapter attached.
      layout: of the adapter.
      task: scores the full model.
      public: public examples of the acceptance test.
      tolerance: nats by which public loss may rise.
      store: where the run is kept.
      nonce: gives 32 fresh random bytes.
    """

    manifest: JobManifest
    rule: str
    rates: Rates
    full: Any
    layout: Layout
    task: Task
    public: Examples
    tolerance: float
    store: Store
    nonce: Callable[[], bytes]

    def public_loss(self, adapter: np.ndarray) -> float:
        """Plugs an adapter into the full model and returns its loss on public text, nats per token."""
        plug(self.full, self.layout, adapter)
        return score(self.task, self.full, self.public, batch=self.manifest.physical_batch).loss

    def start(self) -> Progress:
        """Returns the resume point, or the state before the first round, which it stores."""
        if (progress := self.store.load_state()) is not None:
            self.store.drop_rounds_after(progress.round)
            return progress
        initial = self.layout.read(self.full)
        progress = Progress(ServerState.start(initial), 0, self.public_loss(initial))
        self.store.save_state(progress)
        return progress

    def run(self, exchange: Exchange, on_round: Callable[[dict[str, Any]], None]) -> Progress:
        """Runs all rounds that are left and returns where the job stands.

        Args:
          exchange: transport to the sites.
          on_round: told each whole round's line.

        Raises:
          TooFewSurvivors: a round had no sum; the run folder stands at the round before.
        """
        progress = self.start()
        for number in range(progress.round + 1, self.manifest.rounds + 1):
            progress, line = self.advance(progress, number, exchange)
            self.store.save(progress, line)
            on_round(line)
        return progress

    def advance(self, progress: Progress, number: int, exchange: Exchange) -> tuple[Progress, dict[str, Any]]:
        """Runs one round and its acceptance test; nothing is stored."""
        began = time.monotonic()
        cohort = tuple(site for site, _ in self.manifest.roster)
        plan = RoundPlan(number, sequence=number, nonce=self.nonce(), cohort=cohort)
        result = run_round(self.manifest, plan, progress.server.adapter, exchange)
        candidate = lookup(AGGREGATORS, self.rule, "rule")(progress.server, result.update, self.rates)
        loss = self.public_loss(candidate.adapter)
        verdict = accept(progress.public_loss, loss, self.tolerance)
        line = _line(number, result, time.monotonic() - began) | {
            "accepted": verdict.accepted,
            "reason": verdict.reason,
            "public_loss": loss if np.isfinite(loss) else None,
        }
        if verdict.accepted:
            return Progress(candidate, number, loss), line
        return Progress(progress.server, number, progress.public_loss), line


def _line(number: int, result: RoundResult, seconds: float) -> dict[str, Any]:
    return {
        "round": number,
        "members": list(result.members),
        "threshold": result.threshold,
        "dropped": [{"site": r.site, "stage": r.stage, "reason": r.reason} for r in result.refused],
        "update_norm": float(np.linalg.norm(result.update)),
        "bytes_down": result.traffic.down,
        "bytes_up": result.traffic.up,
        "upload_bytes": result.upload_bytes,
        "payload_bytes": result.payload_bytes,
        "seconds": round(seconds, 3),
    }
