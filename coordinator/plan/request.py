"""What a plan is asked for: the sizes of a job and of its machines."""

import math
import re
from dataclasses import dataclass, field

from offsite.adapter.spec import AdapterSpec
from offsite.coordinator.plan.paper_package import Design
from offsite.coordinator.plan.trial import Batches
from offsite.errors import ConfigError
from offsite.privacy.ranges import MAX_PHYSICAL_BATCH
from offsite.secagg.params import MAX_SITES
from offsite.task.findings import Findings
from offsite.trust.collusion import MIN_SITES

WIDENED, STORED = "widened", "stored"
UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
_SIZE = re.compile(r"([0-9]+(?:\.[0-9]+)?)\s*([kmgt]?)i?b?", re.IGNORECASE)


@dataclass(frozen=True)
class PlanRequest:
    """The job and the machines of a plan.

    Attributes:
      sites: number of sites.
      memory: memory of a site's device in bytes; None for no limit.
      own_memory: memory of the coordinator's device in bytes; None for no limit.
      weights: form of a site's frozen weights, `widened` or `stored`.
      adapter: spec of the adapter, without slots.
      batches: length of an example, and examples in one pass.
      batch: expected number of records of a step.
      rounds: number of rounds.
      local_steps: private steps of a site in one round.
      records: declared number of records of a site; None leaves privacy out.
      epsilon: privacy parameter of the whole job at each site.
      design: emulator to plan for; None compares several.
      first: number of blocks shipped verbatim at the input end, where several are compared.
      last: number of blocks shipped verbatim at the output end, where several are compared.
      embedding: storage of the embedding tables, where several are compared.
      scored: number of public records of the acceptance test.
    """

    sites: int = 3
    memory: int | None = None
    own_memory: int | None = None
    weights: str = STORED
    adapter: AdapterSpec = field(default_factory=AdapterSpec)
    batches: Batches = field(default_factory=Batches)
    batch: int = 16
    rounds: int = 6
    local_steps: int = 1
    records: int | None = None
    epsilon: float = 8.0
    design: Design | None = None
    first: int = 2
    last: int = 2
    embedding: str = "int8"
    scored: int = 16

    def check(self, findings: Findings) -> None:
        """Adds a finding for each number that no job can have."""
        numbers = {
            "sites": (self.sites, MIN_SITES, MAX_SITES),
            "physical-batch": (self.batches.physical, 1, MAX_PHYSICAL_BATCH),
            "length": (self.batches.length, 2, 1 << 20),
            "batch": (self.batch, 1, 10**9),
            "rounds": (self.rounds, 1, 10**6),
            "local-steps": (self.local_steps, 1, 10**6),
            "records": (1 if self.records is None else self.records, 1, 10**9),
        }
        for name, (value, low, high) in numbers.items():
            if not low <= value <= high:
                findings.add(f"--{name}={value}: must be from {low} to {high}")
        if not (math.isfinite(self.epsilon) and self.epsilon > 0):
            findings.add(f"--epsilon={self.epsilon}: must be above 0; 8 is loose and 1 is strict")
        if self.weights not in (WIDENED, STORED):
            findings.add(f"--weights={self.weights!r}: must be {WIDENED} or {STORED}; other forms are not planned")


def read_size(text: str, name: str) -> int:
    """Returns the bytes of a size, for example "16 GB", "500MB" or "8g"; units are decimal.

    Raises:
      ConfigError: the text is no size above 0.
    """
    match = _SIZE.fullmatch(text.strip())
    size = round(float(match[1]) * UNITS[match[2].lower()]) if match else 0
    if size < 1:
        raise ConfigError(f"--{name}={text!r}: no size; write for example 16GB or 500MB")
    return size
