"""The check of the names in a federation file, and of the fit of method and rule; slow imports only where needed."""

from offsite.coordinator.config.aggregation_table import AggregationConfig
from offsite.coordinator.config.federation_file import FedConfig
from offsite.coordinator.config.training_tables import AdapterConfig
from offsite.errors import lookup
from offsite.privacy.accountants import ACCOUNTANTS
from offsite.task.encode import SPLITS
from offsite.task.findings import Findings
from offsite.task.readers.tables import READERS


def check_names(config: FedConfig, sites: list[str], n_min: int, findings: Findings) -> None:
    """Looks up every name of a federation file, and checks that rule and method fit.

    A table with no other names than the defaults needs no look, and spares a second or more of imports.

    Args:
      config: the federation file.
      sites: names of the sites.
      n_min: smallest number of sites whose sum may be opened.
      findings: findings so far.
    """
    with findings.gathering():
        lookup(ACCOUNTANTS, config.privacy.accountant, "privacy.accountant")
    with findings.gathering():
        lookup(SPLITS, config.data.split, "data.split")
    with findings.gathering():
        if config.data.reader:
            lookup(READERS, config.data.reader, "data.reader")
    with findings.gathering():
        kinds = config.emulator.kinds(sites)
        if any(kind.compress for kind in kinds):
            from offsite.emulator.compressors import steps_of

            for kind in kinds:
                steps_of(kind.compress)
    _check_method(config, sites, n_min, findings)


def _check_method(config: FedConfig, sites: list[str], n_min: int, findings: Findings) -> None:
    """Checks adapter method and server rule, whose modules import peft."""
    numbers = AggregationConfig(learning_rate=config.aggregation.learning_rate, momentum=config.aggregation.momentum)
    plain_rule = config.aggregation == numbers and not config.training.directions
    if config.adapter == AdapterConfig(alpha=config.adapter.alpha, rank=config.adapter.rank) and plain_rule:
        return
    from offsite.adapter.methods import check_task, known
    from offsite.coordinator.aggregation.compatibility import check_rule
    from offsite.coordinator.job.auxiliary_tensors import check_frozen, check_mask

    before = len(findings.errors)
    with findings.gathering():
        known(config.adapter.spec(slots=(), seed=config.seed))
        check_task(config.adapter.method, config.model.task)
    if len(findings.errors) == before:
        for check in (check_frozen, check_mask):
            with findings.gathering():
                check(config)
    with findings.gathering():
        check_rule(config, sites, n_min)
