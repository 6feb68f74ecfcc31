"""The records of the simulated sites as examples, with the privacy plan of each site."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from offsite.client.training.emulator_session import EmulatorSession
from offsite.client.training.privacy_plan import SitePlan, plan_for
from offsite.coordinator.config.data_tables import SiteConfig
from offsite.coordinator.job.public_records import passed_over
from offsite.coordinator.report.data_facts import DataFacts
from offsite.errors import DataError, OffsiteError
from offsite.protos.job_manifest import JobManifest
from offsite.simulation.run_folder import Run
from offsite.task.nothing_to_learn import HELD_OUT, TRAINING, Encoder, counted, learnt
from offsite.task.selection import spread_rows
from offsite.task.spec import Batch, Record


@dataclass(frozen=True)
class SiteData:
    """What a simulation knows of the records of its sites.

    Attributes:
      plans: privacy plan of each site, by site.
      heldout: held-out examples of each site that are scored, as many of each site where it has enough.
      asked: records of `heldout` that have a target, of each site; () where texts are cut into blocks.
      facts: numbers of records and targets of each file.
    """

    plans: Mapping[str, SitePlan]
    heldout: tuple[Batch, ...]
    asked: tuple[tuple[Record, ...], ...]
    facts: tuple[DataFacts, ...]


def site_data(
    run: Run, manifest: JobManifest, session: EmulatorSession, on_step: Callable[[str], None] = lambda text: None
) -> SiteData:
    """Reads the records of every site, before any site trains.

    Args:
      run: run folder.
      manifest: manifest of the job.
      session: emulator session of any site, since all sites encode alike.
      on_step: function that takes a text about what is being done.

    Raises:
      OffsiteError: a site's records cannot be read, are too few, or have nothing to learn from; the message begins with
        the site's name.
    """
    share = max(1, run.config.evaluation.examples // len(run.config.sites))
    plans, heldout, facts = dict[str, SitePlan](), list[Batch](), list[DataFacts]()
    asked = list[tuple[Record, ...]]()
    for site in run.config.sites:
        on_step(f"read the records of {site.name}, and plan the noise there")
        try:
            examples, own, _ = _read(run, site, TRAINING, manifest, session)
            plans[site.name] = plan_for(manifest, len(examples))
            facts.append(own)
            examples, own, records = _read(run, site, HELD_OUT, manifest, session)
        except OffsiteError as error:
            raise type(error)(f"site={site.name}: {error}") from error
        rows = spread_rows(np.arange(len(examples)), share)
        heldout.append(examples.select(rows))
        # A block of texts is no record.
        asked.append(_with_targets(records, examples, rows) if manifest.split == "truncate" else ())
        facts.append(own)
    return SiteData(plans, tuple(heldout), tuple(asked), tuple(facts))


def _read(
    run: Run, site: SiteConfig, part: str, manifest: JobManifest, session: EmulatorSession
) -> tuple[Batch, DataFacts, list[Record]]:
    """Returns the examples of one file of a site, and its records.

    Raises:
      DataError: no record has anything to learn from.
    """
    path = site.train if part == TRAINING else site.heldout
    records = run.records(path)
    examples = run.encoded(path, records, manifest, session)
    encoder = Encoder(session.task, session.processor, manifest.length, manifest.split, session.model.config)
    outcome = learnt(encoder, records, counted(examples))
    if outcome.nothing:
        raise DataError(f"{part} data: {outcome}")
    return examples, DataFacts.of(part, site.name, outcome, passed_over(run.config, path)), records


def _with_targets(records: list[Record], examples: Batch, rows: NDArray[np.int64]) -> tuple[Record, ...]:
    """Returns the records at the indices `rows` whose examples have a target."""
    targets = examples.targets.tolist()
    return tuple(records[row] for row in rows.tolist() if targets[row] > 0)
