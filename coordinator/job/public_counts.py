"""How many public examples a job needs; needs no model library."""

from offsite.coordinator.config.federation_file import FedConfig
from offsite.errors import DataError
from offsite.task.nothing_to_learn import Learnt

CLIP_EXAMPLES = 16  # for the norms from which the clip follows


def check_public(config: FedConfig, usable: int, outcome: Learnt) -> None:
    """Checks that there are enough public examples with a target.

    Args:
      config: the federation file.
      usable: number of public examples with a target.
      outcome: what can be learnt from the public records.

    Raises:
      DataError: there are too few; where records have no target, the message says why the first has none.
    """
    needed = 2 * max(CLIP_EXAMPLES, config.evaluation.public_examples)
    if usable >= needed:
        return
    if outcome.left_out:
        raise DataError(f"public records={usable} with something to learn: at least {needed} are needed; {outcome}")
    raise DataError(f"public records={usable}: at least {needed} are needed; give more public data")
