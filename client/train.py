"""One round's training at a site: from the coordinator's adapter to this site's update."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from client.plan import SitePlan, round_terms
from client.workbench import Workbench, vocabulary_of
from errors import RangeError
from privacy.mechanism import Outcome, train
from privacy.probe import choose_engine
from privacy.randomness import Randomness
from protos.manifest import JobManifest
from task.examples import Examples


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
      RangeError: the adapter is not one to train from, or the update is not finite.
    """
    bench.put(start)

    def losses(model: nn.Module, batch: Examples) -> torch.Tensor:
        return bench.task.losses(model, batch)

    if not bench.engine:
        # On no private record: what a refusal says of a gradient would be told without noise.
        invented = Examples.invented(vocabulary_of(bench.model), examples.input_ids.shape[1])
        bench.engine = choose_engine(bench.model, losses, invented)
    terms = round_terms(manifest, plan, bench.engine)
    outcome = train(bench.model, losses, examples.select, n=len(examples), terms=terms, randomness=randomness)
    update = bench.layout.read(bench.model) - start
    if not np.isfinite(update).all():
        raise RangeError("update has entries that are not finite; lower the learning rate")
    bound = manifest.update_bound
    bounded = int(np.count_nonzero(np.abs(update) > bound))
    return Trained(np.clip(update, -bound, bound).astype(np.float32), outcome, bounded, bench.engine)
