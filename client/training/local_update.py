"""One round's training at a site: from the coordinator's adapter to this site's update."""

import dataclasses
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np

from offsite.client.training.emulator_session import EmulatorSession
from offsite.client.training.fedprox import proximal_pull
from offsite.client.training.privacy_plan import SitePlan, round_terms
from offsite.client.training.trainable_subset import only_trainable
from offsite.client.training.worker_messages import Beginning
from offsite.errors import PrivacyRefusal
from offsite.privacy import zero_order
from offsite.privacy.mechanism import DpTraining, Outcome, train
from offsite.privacy.probe import choose_engine
from offsite.privacy.randomness import Randomness
from offsite.protos.job_manifest import JobManifest
from offsite.protos.upload import directions_of, select_uploaded
from offsite.task.spec import Batch

log = logging.getLogger("offsite.client")
ZERO_ORDER = "zero_order"  # stands in the place of an engine where no gradient is taken


@dataclass(frozen=True)
class SiteJob:
    """One job as one site trains it.

    Attributes:
      site: name of the site in the roster.
      manifest: job that the data owner accepted.
      session: opened emulator; sites of one simulation share a session.
      examples: records of this site; they never leave this object.
      plan: DP numbers of this site.
    """

    site: str
    manifest: JobManifest
    session: EmulatorSession = field(repr=False)
    examples: Batch = field(repr=False)
    plan: SitePlan


@dataclass(frozen=True)
class Trained:
    """An update with the site's own diagnostics, which stay at the site.

    Attributes:
      update: adapter after minus adapter before, of the part that the round uploads, or the distance moved along each
        direction; float32 (upload_size,), each entry within the manifest's bound.
      outcome: event and diagnostics of the mechanism.
      bounded: number of entries that were cut to the bound.
      engine: name of the per-example gradient engine.
    """

    update: np.ndarray
    outcome: Outcome
    bounded: int
    engine: str


def local_update(job: SiteJob, start: np.ndarray, *, randomness: Randomness, number: int = 1) -> Trained:
    """Trains the adapter from `start` on a site's examples, and returns the update.

    Each entry of the update is cut to the public bound after the noise, so the cut costs no privacy. The bound is far
    above what honest training reaches, and the number of cuts is kept.

    Args:
      job: job of the site.
      start: adapter to train from, float32 (d,).
      randomness: source of sampling and noise.
      number: number of the round, from 1; the manifest may name another part of the adapter for each round.

    Raises:
      PrivacyRefusal: no engine gives right per-example gradients for this model.
      MemoryError: memory is too short for a single example.
      TrainingFault: the model fails on invented records as well.
      RangeError: the adapter is too large or not finite, so that training cannot start from it.
    """
    session, manifest = job.session, job.manifest
    session.put(start)
    if manifest.aggregation.directions:
        return _along_directions(job, start, randomness, number)
    if not session.engine:
        # The probe sees no private record: a refusal would tell of its gradient without noise. The probe sees the whole
        # adapter: other rounds, and other sites with this session, train other parts of it.
        batch = session.task.dummy_batch(session.model, manifest.length, seed=session.seed)
        session.engine = choose_engine(session.model, session.task.losses, batch)
    with (
        _refusals_without_reason(),
        only_trainable(session.model, manifest, site=job.site, number=number),
        _training(job, start, randomness, session.engine, number) as training,
    ):
        mu = manifest.aggregation.proximal
        outcome = train(training, proximal_pull(training, mu)) if mu else train(training)
    moved = select_uploaded(manifest, number, session.layout.read(session.model) - start)
    update, bounded = within(moved, manifest.update_bound)
    return Trained(update, outcome, bounded, session.engine)


def _along_directions(job: SiteJob, start: np.ndarray, randomness: Randomness, number: int) -> Trained:
    """Trains by forward passes alone; the update is the distance moved along each of the round's directions."""
    with _refusals_without_reason(), _training(job, start, randomness, "loop", number) as training:
        outcome, moved = zero_order.train(training, directions_of(job.manifest, number))
    update, bounded = within(moved, job.manifest.update_bound)
    return Trained(update, outcome, bounded, ZERO_ORDER)


@contextmanager
def _training(
    job: SiteJob, start: np.ndarray, randomness: Randomness, engine: str, number: int
) -> Iterator[DpTraining]:
    """Yields one round's training on all records of the site, begun at the session's workers."""
    terms = round_terms(job.manifest, job.plan, engine)
    session = job.session
    invented = session.task.dummy_batch(session.model, job.manifest.length, seed=session.seed).select([0])
    training = DpTraining(session.model, session.task.losses, job.examples, terms, randomness, invented)
    if session.workers is None:
        yield training
        return
    along = directions_of(job.manifest, number) if job.manifest.aggregation.directions else None
    beginning = Beginning(job.site, number, start, session.refreshed, terms, along)
    with session.workers.own_threads():
        yield dataclasses.replace(training, workers=session.workers.begin(beginning))


@contextmanager
def _refusals_without_reason() -> Iterator[None]:
    """Keeps the words of a refusal at the site, because they tell how many records were drawn."""
    try:
        yield
    except PrivacyRefusal as error:
        log.warning("training refused: %s", error)
        raise PrivacyRefusal("the gradients cannot be told apart by record; the site's log says where") from None


def within(update: np.ndarray, bound: float) -> tuple[np.ndarray, int]:
    """Returns an update cut to a bound, float32, and the number of entries that were cut.

    Every noisy update leaves, also an update that overflowed: a refusal would be an answer about the records that
    nobody accounts for. A step that makes everything overflow spoils its own round.
    """
    cut = np.clip(np.nan_to_num(update, nan=0.0, posinf=bound, neginf=-bound), -bound, bound).astype(np.float32)
    return cut, int(np.count_nonzero(~(np.abs(update) <= bound)))
