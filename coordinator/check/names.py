"""The check of the names in a federation file, and of the fit of method and rule; slow imports only where needed."""

from offsite.adapter.method_names import NEEDING, OFFERED, check_name
from offsite.coordinator.config.aggregation_table import AggregationConfig
from offsite.coordinator.config.federation_file import FedConfig
from offsite.coordinator.config.training_tables import AdapterConfig
from offsite.emulator.package.recipe_arguments import check_recipe
from offsite.emulator.structure.ends import PARALLEL, check_ends
from offsite.errors import lookup
from offsite.privacy.accountants import ACCOUNTANTS
from offsite.task.findings import Findings
from offsite.task.readers.tables import READERS
from offsite.task.splits import SPLITS
from offsite.task.text_measures import check_measures

PLAIN_RULES = ("mean", "fedavgm", "fedadam", "fedyogi")  # rules that fit every method and need no key of their own


def check_names(config: FedConfig, sites: list[str] | None, findings: Findings) -> None:
    """Looks up the names of a federation file that can be looked up without a model library.

    Args:
      config: the federation file.
      sites: names of the sites; None where they are not known.
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
        check_measures(config.evaluation.measures, config.model.task)
    with findings.gathering():
        if sites is not None:
            config.emulator.kinds(sites)
    for recipe in (config.emulator.compress, *(variant.compress or () for variant in config.emulator.variants)):
        with findings.gathering():
            check_recipe(recipe, parallel=config.emulator.shape == PARALLEL)
    with findings.gathering():
        check_ends(config.emulator.first, config.emulator.last, config.emulator.shape)
    with findings.gathering():
        check_name(config.adapter.method)


def is_plain(config: FedConfig) -> bool:
    """Whether adapter method and server rule need no look beyond their names."""
    numbers, own = config.aggregation, config.adapter
    plain_rule = config.aggregation == AggregationConfig(
        rule=numbers.rule, learning_rate=numbers.learning_rate, momentum=numbers.momentum
    )
    plain_method = own == AdapterConfig(own.method, own.rank, own.alpha, own.targets) and own.method not in NEEDING
    return plain_method and plain_rule and numbers.rule in PLAIN_RULES and not config.training.directions


def check_method(config: FedConfig, sites: list[str] | None, n_min: int, findings: Findings) -> None:
    """Checks the options of adapter method and server rule, whose modules load peft.

    Args:
      config: the federation file.
      sites: names of the sites; None where they are not known.
      n_min: smallest number of sites whose sum may be opened.
      findings: findings so far.
    """
    if is_plain(config) or config.adapter.method not in OFFERED:
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
        if sites is not None:
            check_rule(config, sites, n_min)
