"""One round's training at a site: from the coordinator's adapter to this site's update."""

import logging
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from client.plan import SitePlan, round_terms
from client.workbench import Workbench, vocabulary_of
from errors import PrivacyRefusal
from privacy.mechanism import Outcome, train
from privacy.probe import choose_engine
from privacy.randomness import Randomness
from protos.manifest import JobManifest
from task.examples import Examples

log = logging.getLogger("offsite.client")


@dataclass(frozen=True)
class Trained:
    """An update with what this site keeps to itself about it.

    Attributes:
      update: adapter after minus before, float32 (d,), each entry within the manifest's bound.
      outcome: event and diagnostics of the mechanism.
      bounded: how many entries were cut to the bound.
      engine: per-example gradient engine used.
    """

    update: np.ndarray
    outcome: Outcome
    bounded: int
    engine: str


def local_update(
    bench: Workbench,
    start: np.ndarray,
    examples: Examples,
    *,
    manifest: JobManifest,
    plan: SitePlan,
    randomness: Randomness,
) -> Trained:
    """Trains the adapter from `start` on a site's examples and returns the update.

    Cutting an entry to the public bound happens after the noise, so it costs no privacy; the bound is far above what
    honest training reaches, and the count is kept.

    Raises:
      PrivacyRefusal: no engine gives right per-example gradients for this model.
      RangeError: the adapter is not one to train from.
    """
    bench.put(start)

    def losses(model: nn.Module, batch: Examples) -> torch.Tensor:
        return bench.task.losses(model, batch)

    if not bench.engine:
        # On no private record: what a refusal says of a gradient would be told without noise.
        invented = Examples.invented(vocabulary_of(bench.model), examples.input_ids.shape[1], seed=bench.seed)
        bench.engine = choose_engine(bench.model, losses, invented)
    terms = round_terms(manifest, plan, bench.engine)
    try:
        outcome = train(bench.model, losses, examples.select, n=len(examples), terms=terms, randomness=randomness)
    except PrivacyRefusal as error:  # its words tell how many records were drawn
        log.warning("training refused: %s", error)
        raise PrivacyRefusal("the gradients cannot be told apart by record; the site's log says where") from None
    update, bounded = within(bench.layout.read(bench.model) - start, manifest.update_bound)
    return Trained(update, outcome, bounded, bench.engine)


def within(update: np.ndarray, bound: float) -> tuple[np.ndarray, int]:
    """Returns an update cut to a bound, float32, and how many entries were cut.

    Whatever came out of the noise leaves, also where it overflowed: to refuse it would be an answer about the records
    that nobody accounts for. A step that makes everything overflow spoils its own round.
    """
    cut = np.clip(np.nan_to_num(update, nan=0.0, posinf=bound, neginf=-bound), -bound, bound).astype(np.float32)
    return cut, int(np.count_nonzero(~(np.abs(update) <= bound)))
