"""The file `coordinator.toml`: frozen, checked once at the door."""

import dataclasses
from dataclasses import dataclass

from offsite.errors import ConfigError
from offsite.trust import canonical, certificates
from offsite.trust.addresses import check_host
from offsite.trust.certificates import DAYS
from offsite.trust.collusion import MIN_SITES, fewest_in_sum, usual_accomplices
from offsite.trust.federation_manifest import MAX_SITES
from offsite.trust.sealing import HYBRID, PUBLIC_BYTES
from offsite.trust.toml_tables import quote
from offsite.trust.welcome import MAX_PORT


@dataclass(frozen=True)
class HomeSettings:
    """The file `coordinator.toml`, which `offsite coordinator init` writes.

    Attributes:
      name: name of the federation.
      host: host name or address under which sites reach the coordinator.
      link_port: TCP port of the SuperLink, for messages.
      depot_port: TCP port of the depot, for packages; it differs from `link_port`.
      suite: suite of the sites' sealing keys: 1 is X25519, 2 is X-Wing.
      n_min: smallest number of sites whose sum a job may open, at least `accomplices` + 2 and at least 3; 0 takes the
        smallest allowed number.
      max_epsilon: largest epsilon that a job may plan, at a delta of at most 1e-6; above 0.
      clip: largest `update_bound` that a job may set; above 0.
      days: number of days for which certificates and an epoch are valid; at least 1.
      bind: address to listen on, "0.0.0.0" for all of IPv4 and "::" for all of IPv6; empty takes `host`.
      accomplices: number of sites that may help the coordinator without any other site's update being open to it; a
        third of all members where the key is left out. Fewer is weaker, and every owner signs a sentence that says so.
    """

    name: str
    host: str
    link_port: int
    depot_port: int
    suite: int = HYBRID
    n_min: int = 0
    max_epsilon: float = 8.0
    clip: float = 100.0
    days: int = DAYS
    bind: str = ""
    accomplices: int | None = None

    def __post_init__(self) -> None:
        """Checks every range."""
        canonical.check_name(self.name, "name")
        check_host("host", self.host)
        if self.bind:
            check_host("bind", self.bind, listens=True)
        for name in ("link_port", "depot_port"):
            _in_range(name, getattr(self, name), 1, MAX_PORT)
        if self.link_port == self.depot_port:
            raise ConfigError(f"depot_port={self.depot_port}: must differ from link_port; choose another")
        if self.suite not in PUBLIC_BYTES:
            raise ConfigError(f"suite={self.suite}: must be one of {sorted(PUBLIC_BYTES)}")
        if self.n_min:
            _in_range("n_min", self.n_min, MIN_SITES, MAX_SITES)
        if self.accomplices is not None:
            _in_range("accomplices", self.accomplices, 0, MAX_SITES)
            self.cohort(0)
        _in_range("days", self.days, 1, certificates.AUTHORITY_DAYS)
        for name in ("max_epsilon", "clip"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ConfigError(f"{name}={getattr(self, name)}: must be finite and above 0")

    def cohort(self, members: int) -> tuple[int, int]:
        """Returns n_min and the number of accomplices of an epoch with so many members.

        Raises:
          ConfigError: n_min is too small for the accomplices.
        """
        accomplices = usual_accomplices(members) if self.accomplices is None else self.accomplices
        needed = fewest_in_sum(accomplices)
        if 0 < self.n_min < needed:
            raise ConfigError(
                f"n_min={self.n_min} with accomplices={accomplices}: must be at least {needed}, so that each sum holds "
                f"two sites that do not help the coordinator; set n_min = {needed} in coordinator.toml, or 0 for the "
                "smallest allowed number"
            )
        return self.n_min or needed, accomplices

    def to_toml(self) -> str:
        """Returns the file's content."""
        lines = ["# The coordinator of one federation. A change counts from the next approve or revoke on.\n"]
        for name, value in dataclasses.asdict(self).items():
            if value is None:
                continue
            lines.append(f"{name} = {quote(value) if isinstance(value, str) else value}\n")
        if self.accomplices is None:
            lines.append("# accomplices = 0   # weaker than the usual third of all members; every owner signs that\n")
        return "".join(lines)


def _in_range(name: str, value: int, lowest: int, highest: int) -> None:
    if not lowest <= value <= highest:
        raise ConfigError(f"{name}={value}: must be from {lowest} to {highest}")
