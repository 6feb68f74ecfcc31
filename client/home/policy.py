"""The file `policy.toml`: all that the data owner permits, whatever a coordinator asks; the rest is refused."""

import re
from dataclasses import dataclass
from datetime import datetime, time
from pathlib import Path
from typing import TYPE_CHECKING

from offsite.client.home.package_room import PackageRoom
from offsite.errors import ConfigError, PolicyRefusal
from offsite.trust.toml_tables import read_settings

if TYPE_CHECKING:  # a manifest needs torch, and setting a site up does not
    from offsite.protos.job_manifest import JobManifest

APPROVALS = ("manual", "automatic")
ANY = "any"
_REMOVED = {"metrics": "nothing leaves a site but its update, and no key permits more; remove the line"}
_HOURS = re.compile(r"([01]\d|2[0-3]):([0-5]\d)-([01]\d|2[0-3]):([0-5]\d)")
_TEMPLATE = """\
# What this site permits. Only its owner changes this file; a job that asks for more is refused before any training.
epsilon_cap = 8.0          # privacy of the data set over all jobs, spent and set aside, at their smallest delta
delta_cap = 1e-6           # largest delta of a job; where min(1e-6, 1 / (100 records)) is smaller, a job has that
min_cohort = 3             # fewest sites whose sum may be opened
min_records = 100          # do not train on fewer declared records than this
models = []                # permitted base models by name (the coordinator's word) or emulators by digest, or "any"
methods = []               # permitted adapter methods, for example ["ffa_lora", "lora"]; "any" permits every one
splits = ["truncate"]      # how texts become records: truncate, one of each text; blocks, as the tokenizer cuts them
max_length = 4096          # most tokens of a record
max_rank = 16              # largest inner width of an adapter
max_adapter_share = 0.25   # most trained numbers over those of the blocks that carry the adapter; whole blocks need 1.1
hours = "any"              # local time in which training may begin, for example "20:00-06:00"
max_threads = 0            # processor threads; 0 leaves it to the system
max_memory_gb = 0.0        # memory of each process of the site; 0 takes three quarters of the machine's
max_disk_gb = 0.0          # room for packages, older ones make way; 0 takes what the job needs, up to 3/4 of the free
approval = "manual"        # manual: the owner approves each job by its hash; automatic: what fits this file may run
allow_variants = false     # true lets other sites of a job train on other emulators than this site
allow_individual_updates = false # true lets the coordinator see this site's own update, with only its noise before it
allow_seeded_noise = false # true only for tests on invented data: the noise then protects nobody
"""


@dataclass(frozen=True)
class Policy:
    """The permissions of the owner; the fields are the keys of the template, which explains each."""

    epsilon_cap: float
    delta_cap: float
    min_cohort: int
    min_records: int
    models: tuple[str, ...]
    methods: tuple[str, ...]
    splits: tuple[str, ...]
    max_length: int
    max_rank: int
    max_adapter_share: float
    hours: str
    max_threads: int
    max_memory_gb: float
    max_disk_gb: float
    approval: str
    allow_variants: bool
    allow_individual_updates: bool
    allow_seeded_noise: bool

    def __post_init__(self) -> None:
        """Checks every range."""
        for name, lowest in (
            ("min_cohort", 3),
            ("min_records", 1),
            ("max_length", 2),
            ("max_rank", 1),
            ("max_threads", 0),
            ("max_memory_gb", 0),
            ("max_disk_gb", 0),
        ):
            if not lowest <= getattr(self, name) < float("inf"):
                raise ConfigError(f"policy.toml {name}={getattr(self, name)}: must be at least {lowest}")
        for name in ("epsilon_cap", "max_adapter_share"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ConfigError(f"policy.toml {name}={getattr(self, name)}: must be finite and above 0")
        if not 0 < self.delta_cap < 1:
            raise ConfigError(f"policy.toml delta_cap={self.delta_cap}: must lie between 0 and 1")
        if self.approval not in APPROVALS:
            raise ConfigError(f"policy.toml approval={self.approval!r}: must be one of {', '.join(APPROVALS)}")
        if self.hours != ANY and not _HOURS.fullmatch(self.hours):
            raise ConfigError(f"policy.toml hours={self.hours!r}: must be 'any' or like '20:00-06:00'")
        if self.hours != ANY and self.hours[:5] == self.hours[6:]:
            raise ConfigError(f"policy.toml hours={self.hours!r}: begins when it ends; write 'any' for the whole day")

    @classmethod
    def read(cls, path: Path) -> "Policy":
        """Reads a policy; every key must be there, so that nothing is permitted by being forgotten.

        Raises:
          DataError: the file is missing.
          ConfigError: the file is not TOML, or a key is unknown, missing, of a wrong type or out of its range.
        """
        return read_settings(path, cls, removed=_REMOVED)

    @staticmethod
    def template() -> str:
        """Returns a policy to start from: it permits no model and no method, and asks for every approval."""
        return _TEMPLATE


def permit(policy: Policy, manifest: "JobManifest", *, site: str, now: datetime, room: PackageRoom) -> None:
    """Checks a job, its package and the time against the policy, before any part of the package is fetched.

    Args:
      policy: permissions of the owner.
      manifest: manifest of the job.
      site: name of this site; the manifest maps this name to an emulator.
      now: current time, local or aware, for the permitted hours.
      room: disk that the package takes.

    Raises:
      PolicyRefusal: the job breaks a rule; the message names the first broken rule.
    """
    permit_terms(policy, manifest, site=site)
    room.check()
    permit_now(policy, now)


def permit_terms(policy: Policy, manifest: "JobManifest", *, site: str) -> None:
    """Checks the terms of a job against the policy.

    Raises:
      PolicyRefusal: the job breaks a rule; the message names the first broken rule.
    """
    terms, spec = manifest.privacy, manifest.adapter
    if not terms.private:
        raise PolicyRefusal("private=false: no policy permits training without differential privacy; switch it on")
    _listed("models", policy.models, manifest.model, manifest.emulator_of(site))
    _permit_what_shows_more(policy, manifest)
    _listed("methods", policy.methods, spec.method)
    _listed("splits", policy.splits, manifest.split)
    if manifest.metrics:
        raise PolicyRefusal(
            f"metric={manifest.metrics[0]!r}: nothing leaves a site but its update; ask the coordinator for a job "
            "without metrics"
        )
    _at_most("epsilon", terms.epsilon, "epsilon_cap", policy.epsilon_cap)
    _at_most("length", manifest.length, "max_length", policy.max_length)
    _at_most("rank", spec.rank, "max_rank", policy.max_rank)
    if manifest.n_min < policy.min_cohort:
        raise PolicyRefusal(
            f"n_min={manifest.n_min}: policy.toml has min_cohort={policy.min_cohort}; ask the coordinator for more "
            "sites, or lower min_cohort"
        )


def _permit_what_shows_more(policy: Policy, manifest: "JobManifest") -> None:
    """Checks the terms under which one site's update is easier to tell in the sum, or is open to the coordinator."""
    if manifest.emulators and not policy.allow_variants:
        raise PolicyRefusal(
            f"emulators={len(set(dict(manifest.emulators).values())) + 1}: this job gives other sites another emulator "
            "than this site, and policy.toml has allow_variants=false; ask the coordinator why, or let the owner "
            "permit this"
        )
    if manifest.aggregation.individuals and not policy.allow_individual_updates:
        raise PolicyRefusal(
            "secure aggregation=off: in this job the coordinator sees this site's own update, and policy.toml "
            "has allow_individual_updates=false; ask the coordinator for a rule that needs only the sum, or let the "
            "owner permit it"
        )


def permit_now(policy: Policy, now: datetime) -> None:
    """Checks the permitted hours.

    Raises:
      PolicyRefusal: the time lies outside the permitted hours.
    """
    if policy.hours == ANY:
        return
    numbers = [int(part) for part in re.split("[:-]", policy.hours)]
    begin, end, clock = time(numbers[0], numbers[1]), time(numbers[2], numbers[3]), now.astimezone().time()
    inside = begin <= clock < end if begin <= end else clock >= begin or clock < end
    if not inside:
        raise PolicyRefusal(
            f"time={clock:%H:%M}: policy.toml permits training in hours={policy.hours}; wait until then"
        )


def _listed(key: str, permitted: tuple[str, ...], *names: str) -> None:
    if ANY not in permitted and not set(names) & set(permitted):
        raise PolicyRefusal(
            f"{key[:-1]}={names[0]!r}: policy.toml {key} permits {', '.join(permitted) or 'none'}; the owner "
            f"may add {names[0]!r} to {key} there"
        )


def _at_most(name: str, value: float, key: str, cap: float) -> None:
    if not value <= cap:  # also for NaN
        raise PolicyRefusal(
            f"{name}={value:g}: policy.toml has {key}={cap:g}; ask the coordinator for less, or raise {key}"
        )
