"""The check of a simulation before any work: every file of every site, the model, the names, and the plan."""

from pathlib import Path

from offsite.client.training.privacy_plan import check_batch
from offsite.coordinator.check.federation import EVERYTHING, Parties, Scope, check_records
from offsite.coordinator.check.machine import check_room
from offsite.coordinator.check.packages import check_packages
from offsite.coordinator.config.federation_file import FedConfig
from offsite.privacy.calibrate import check_reachable, public_delta
from offsite.protos.job_manifest import PrivacyTerms
from offsite.task.findings import Findings
from offsite.task.label_agreement import disagreement, only_numbers
from offsite.task.learning_check import DataFile
from offsite.task.nothing_to_learn import HELD_OUT, PUBLIC, TRAINING


def check_simulation(
    config: FedConfig, out: Path, findings: Findings, scope: Scope = EVERYTHING, *, prepared: bool = False
) -> None:
    """Checks everything that a simulation reads; writes nothing.

    Args:
      config: the federation file.
      out: run folder, which may not exist yet.
      findings: findings so far, to which all findings are added.
      scope: what can be checked.
      prepared: whether the run folder holds the prepared job, with its copies of packages that were built before.
    """
    if not config.sites:
        findings.add("sites: a simulation needs [[sites]], or data.sites_dir with data.owners; add them")
        return
    names = [site.name for site in config.sites]
    check_room(config, out, 1 + len(config.emulator.variants), findings)
    parts = [(f"site={site.name}", TRAINING, site.train) for site in config.sites]
    parts += [(f"site={site.name}", HELD_OUT, site.heldout) for site in config.sites]
    parties = Parties(names, config.secagg.fewest(len(names)))
    checked = check_records(config, parties, (("", PUBLIC, config.data.public), *parts), findings, scope)
    if scope.packages and not prepared:
        check_packages(config, out, findings)
    labels = {_owner(file): only_numbers(file.records) for file in checked.read}
    for warning in disagreement(labels, checked.model_config):
        findings.warn(warning)
    counts = {file.where: len(file.records) for file in checked.read if file.part == TRAINING}
    if config.data.split != "truncate":
        counts = {own.file.where: own.examples for own in checked.tried if own.file.part == TRAINING}
    if scope.plans:
        _check_plans(config, counts, findings)


def _owner(file: DataFile) -> str:
    return f"{file.where} ({HELD_OUT})" if file.part == HELD_OUT else file.where or PUBLIC


def _check_plans(config: FedConfig, counts: dict[str, int], findings: Findings) -> None:
    """Checks each site's number of records against batch and epsilon.

    The plan itself takes a second for each number of records, and is made later. Its refusal of a target that needs
    too little noise comes first at the most records.
    """
    privacy, training = config.privacy, config.training
    # The clip is measured on public records later, and no plan depends on it.
    terms = PrivacyTerms(privacy.private, privacy.epsilon, 1.0, privacy.accountant, training.batch)
    steps = (training.rounds + training.spare_rounds) * training.local_steps
    for where, count in counts.items():
        with findings.gathering(where):
            check_batch(terms, count)
    for where, count in sorted(counts.items(), key=lambda pair: -pair[1]) if privacy.private else ():
        before = len(findings.errors)
        if count >= 2 * training.batch:
            with findings.gathering(where):
                check_reachable(privacy.epsilon, public_delta(count), training.batch / count, steps)
            if len(findings.errors) == before:
                return
