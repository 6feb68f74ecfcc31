"""One round's training at a site: from the coordinator's adapter to this site's update."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from offsite.client.training.emulator_session import EmulatorSession
from offsite.client.training.fedprox import train_near
from offsite.client.training.privacy_plan import SitePlan, round_terms
from offsite.client.training.trainable_subset import only_trainable
from offsite.errors import PrivacyRefusal
from offsite.privacy import zero_order
from offsite.privacy.batches import Losses
from offsite.privacy.mechanism import Outcome
from offsite.privacy.probe import choose_engine
from offsite.privacy.randomness import Randomness
from offsite.protos.job_manifest import JobManifest
from offsite.protos.upload import directions_of, select_uploaded
from offsite.task.spec import Batch

log = logging.getLogger("offsite.client")
ZERO_ORDER = "zero_order"  # what stands in the place of an engine where no gradient is taken


@dataclass(frozen=True)
class Trained:
    """An update with what this site keeps to itself about it.

    Attributes:
      update: adapter after minus before, of what the round uploads, or how far it moved along each direction, float32
        (upload_size,), each entry within the manifest's bound.
      outcome: event and diagnostics of the mechanism.
      bounded: how many entries were cut to the bound.
      engine: per-example gradient engine used.
    """

    update: np.ndarray
    outcome: Outcome
    bounded: int
    engine: str


def local_update(
    session: EmulatorSession,
    start: np.ndarray,
    examples: Batch,
    *,
    manifest: JobManifest,
    plan: SitePlan,
    randomness: Randomness,
    site: str = "",
    number: int = 1,
) -> Trained:
    """Trains the adapter from `start` on a site's examples and returns the update.

    Args:
      session: the opened emulator.
      start: adapter to train from, float32 (d,).
      examples: the site's records.
      manifest: the job.
      plan: the site's DP numbers.
      randomness: of sampling and noise.
      site: its name, by which the job may give it a smaller rank.
      number: of the round, from 1, by which the job may say what of the adapter is trained.

    Cutting an entry to the public bound happens after the noise, so it costs no privacy; the bound is far above what
    honest training reaches, and the count is kept.

    Raises:
      PrivacyRefusal: no engine gives right per-example gradients for this model.
      RangeError: the adapter is not one to train from.
    """
    session.put(start)

    def losses(model: nn.Module, batch: Batch) -> torch.Tensor:
        return session.task.losses(model, batch)

    if manifest.aggregation.directions:
        return _along_directions(session, losses, examples, manifest, plan, randomness, number)
    if not session.engine:
        # On no private record: what a refusal says of a gradient would be told without noise. On the whole adapter,
        # since other rounds, or other sites at this bench, train other parts of it.
        invented = session.task.invented(session.model, manifest.length, seed=session.seed)
        session.engine = choose_engine(session.model, losses, invented)
    terms = round_terms(manifest, plan, session.engine)
    with _telling_nothing(), only_trainable(session.model, manifest, site=site, number=number):
        mu, count = manifest.aggregation.proximal, len(examples)
        outcome = train_near(session.model, losses, examples.select, count, terms, randomness, proximal=mu)
    moved = select_uploaded(manifest, number, session.layout.read(session.model) - start)
    update, bounded = within(moved, manifest.update_bound)
    return Trained(update, outcome, bounded, session.engine)


def _along_directions(
    session: EmulatorSession,
    losses: Losses,
    examples: Batch,
    manifest: JobManifest,
    plan: SitePlan,
    randomness: Randomness,
    number: int,
) -> Trained:
    """Trains by forward passes alone; the update is how far the adapter moved along each of the round's directions."""
    terms, along = round_terms(manifest, plan, "loop"), directions_of(manifest, number)
    with _telling_nothing():
        found = zero_order.train(session.model, losses, examples.select, len(examples), terms, randomness, along)
    outcome, moved = found
    update, bounded = within(moved, manifest.update_bound)
    return Trained(update, outcome, bounded, ZERO_ORDER)


@contextmanager
def _telling_nothing() -> Iterator[None]:
    """Keeps a refusal's words at the site: they tell how many records were drawn."""
    try:
        yield
    except PrivacyRefusal as error:
        log.warning("training refused: %s", error)
        raise PrivacyRefusal("the gradients cannot be told apart by record; the site's log says where") from None


def within(update: np.ndarray, bound: float) -> tuple[np.ndarray, int]:
    """Returns an update cut to a bound, float32, and how many entries were cut.

    Whatever came out of the noise leaves, also where it overflowed: to refuse it would be an answer about the records
    that nobody accounts for. A step that makes everything overflow spoils its own round.
    """
    cut = np.clip(np.nan_to_num(update, nan=0.0, posinf=bound, neginf=-bound), -bound, bound).astype(np.float32)
    return cut, int(np.count_nonzero(~(np.abs(update) <= bound)))
