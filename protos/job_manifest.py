"""The job manifest: every public fact of one fine-tuning job, the same bytes at the coordinator and at each site."""

import dataclasses
import hashlib
import json
from dataclasses import dataclass, field

from offsite.adapter.layout import Layout
from offsite.adapter.spec import AdapterSpec
from offsite.errors import ConfigError, MalformedMessage
from offsite.privacy.ranges import HIGHEST, HIGHEST_UPDATE, LOWEST, LOWEST_UPDATE, MAX_PHYSICAL_BATCH
from offsite.protos.aggregation import AggregationTerms
from offsite.protos.messages import MAX_STEPS, MAX_TOKENS
from offsite.trust import canonical
from offsite.trust.federation_manifest import MAX_SITES
from offsite.trust.identity import KEY_BYTES

FORMAT, MAX_BYTES = 3, 1 << 20
DIGEST_BYTES = 32
_MANY, _MOST_RECORDS = 1 << 31, 10**9


@dataclass(frozen=True)
class PrivacyTerms:
    """The promise of each site to its records, by record-level DP-SGD.

    Attributes:
      private: whether sites clip and add noise; the report of a job without says so in its first line.
      epsilon: target for the whole job (all rounds), per site, in [1e-9, 1e9]; each site computes its own noise from
        this target.
      max_grad_norm: clipping bound C of one record's gradient, measured on public text, in [1e-9, 1e9].
      accountant: name in `privacy.accountants.ACCOUNTANTS`.
      batch: expected number of records in a Poisson batch, from 1 to 10**9.
    """

    private: bool
    epsilon: float
    max_grad_norm: float
    accountant: str
    batch: int


@dataclass(frozen=True)
class JobManifest:
    """One job: its sites, its training and its terms.

    Attributes:
      federation: name of the federation.
      epoch: number of the roster; a changed roster is a new epoch.
      roster: pairs (site, Ed25519 public key in hexadecimal), sorted by site.
      n_min: smallest number of sites whose sum may be opened.
      accomplices: number of the roster's sites that may help the coordinator; at least as many as the owners signed.
      task: name in `task.tasks.TASKS`.
      emulator: SHA-256 of the emulator package's manifest, hexadecimal, for all sites that are not in `emulators`.
      base: SHA-256 over the full model's configuration and weights, hexadecimal; only the coordinator can check it.
      tokenizer: SHA-256 over the tokenizer's files, hexadecimal.
      adapter: method, rank, options and places of the trained adapter.
      layout: names and shapes of the trained tensors, as `Layout.to_dict()`.
      length: number of tokens in a record, at most `MAX_TOKENS`.
      split: how texts become records, `blocks` or `truncate`.
      rounds: number of training rounds in all.
      local_steps: number of DP-SGD steps of a site per round; over all rounds and spare ones at most `MAX_STEPS`.
      learning_rate: step size of the sites' SGD, in [1e-9, 1e9].
      update_bound: largest absolute entry of an update, in [1e-27, 1e27]; it sets the step of the secure sum.
      privacy: privacy terms of each site.
      physical_batch: number of records in one forward pass, at most `MAX_PHYSICAL_BATCH`; it changes memory and speed,
        not the result's privacy.
      spare_rounds: number of further rounds in the plan of the noise, to repeat rounds that were lost after an upload.
      model: name of the full model, for the data owner to know and to permit.
      release: version of offsite that wrote this manifest.
      metrics: names of the values that sites send beside their update; empty by default.
      deadline: seconds that a site has to answer one stage of a round, in [1e-9, 1e9].
      refresh: number of rounds after which biases of the emulator may move, as a training request says; 0 is never.
      identifier: 32 random bytes in hexadecimal, so that two jobs with the same terms are two jobs in the sites'
        ledgers; empty in a simulation.
      emulators: pairs (site, SHA-256 of its package's manifest) for the sites that get another emulator, sorted by
        site. Every site sees this list, so that no site can get an emulator of its own unseen.
      aggregation: the sites' duties under the coordinator's rule, and whether the coordinator sees each update.
    """

    federation: str
    epoch: int
    roster: tuple[tuple[str, str], ...]
    n_min: int
    accomplices: int
    task: str
    emulator: str
    base: str
    tokenizer: str
    adapter: AdapterSpec
    layout: Layout
    length: int
    split: str
    rounds: int
    local_steps: int
    learning_rate: float
    update_bound: float
    privacy: PrivacyTerms
    physical_batch: int
    spare_rounds: int = 0
    model: str = ""
    release: str = ""
    metrics: tuple[str, ...] = ()
    deadline: float = 3600.0
    identifier: str = ""
    refresh: int = 0
    emulators: tuple[tuple[str, str], ...] = ()
    aggregation: AggregationTerms = field(default_factory=AggregationTerms)

    @property
    def sites(self) -> tuple[str, ...]:
        """Names of the roster's sites, in its order."""
        return tuple(site for site, _ in self.roster)

    def upload_layout(self, number: int) -> Layout:
        """Returns the names and shapes of each site's upload in a round; `number` counts from 1.

        An upload may be a part of the adapter, or how far the adapter moved along each of the round's directions.
        """
        if self.aggregation.directions:
            return Layout(("directions",), ((self.local_steps * self.aggregation.directions,),))
        return self.aggregation.part(self.layout, number)

    def upload_size(self, number: int) -> int:
        """Returns the number of scalars that each site uploads in a round; `number` counts from 1."""
        return self.upload_layout(number).size

    def rank_of(self, site: str) -> int:
        """Returns how many columns of each B a site trains: the adapter's rank, or the site's own smaller rank."""
        return dict(self.aggregation.ranks).get(site, self.adapter.rank)

    def emulator_of(self, site: str) -> str:
        """Returns the SHA-256 of the package that a site gets, hexadecimal."""
        return dict(self.emulators).get(site, self.emulator)

    def shipped(self) -> dict[str, tuple[str, ...]]:
        """Returns the sites of each emulator, by SHA-256: `emulator` first, then in the order of their first sites."""
        sites: dict[str, list[str]] = {self.emulator: []}
        for site in self.sites:
            sites.setdefault(self.emulator_of(site), []).append(site)
        return {digest: tuple(names) for digest, names in sites.items()}

    @property
    def releases(self) -> int:
        """Number of updates that one site may send over the whole job."""
        return self.rounds + self.spare_rounds

    @property
    def steps(self) -> int:
        """Number of DP-SGD steps of one site over the whole job, for which its noise is planned."""
        return self.releases * self.local_steps

    def to_bytes(self) -> bytes:
        """Returns the canonical JSON; equal manifests give equal bytes."""
        content = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        content |= {
            "format": FORMAT,
            "adapter": self.adapter.to_dict(),
            "aggregation": self.aggregation.to_dict(),
            "layout": self.layout.to_dict(),
            "privacy": dataclasses.asdict(self.privacy),
        }
        return json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()

    def digest(self) -> bytes:
        """Returns the SHA-256 of the canonical bytes, 32 bytes."""
        return hashlib.sha256(self.to_bytes()).digest()

    @classmethod
    def from_bytes(cls, data: bytes) -> "JobManifest":
        """Reads a manifest strictly.

        Raises:
          MalformedMessage: the data are not JSON, of another format or not in canonical form, or a field is missing,
            unknown, of another type or out of its range.
        """
        if len(data) > MAX_BYTES:
            raise MalformedMessage(f"job manifest has {len(data)} bytes; at most {MAX_BYTES} are read; refuse the job")
        try:
            content = json.loads(data)
            if content.pop("format") != FORMAT:
                raise MalformedMessage("job manifest has another format; install the same release on both sides")
            content["roster"] = tuple((str(site), str(key)) for site, key in content["roster"])
            content["emulators"] = tuple((str(site), str(digest)) for site, digest in content["emulators"])
            content["metrics"] = tuple(str(name) for name in content["metrics"])
            content["adapter"] = AdapterSpec.from_dict(content["adapter"])
            content["aggregation"] = AggregationTerms.from_dict(content["aggregation"])
            content["layout"] = Layout.from_dict(content["layout"])
            content["privacy"] = PrivacyTerms(**content["privacy"])
            manifest = cls(**content)
            same = manifest.to_bytes() == data
        except (ValueError, TypeError, KeyError, AttributeError, ArithmeticError, ConfigError, RecursionError) as error:
            raise MalformedMessage(f"job manifest does not parse ({type(error).__name__}); ask for it again") from error
        if not same:
            raise MalformedMessage("job manifest is not in canonical form; was it altered on the way?")
        _check(manifest)
        return manifest


def _check(manifest: JobManifest) -> None:
    """Checks types and ranges of every field that no class of its own checks."""
    terms = manifest.privacy
    for name in ("federation", "task", "split", "model", "release"):
        canonical.text(getattr(manifest, name), f"job {name}", limit=1 << 10)
    for name in ("emulator", "base", "tokenizer"):
        canonical.hexadecimal(getattr(manifest, name), f"job {name}", size=DIGEST_BYTES)
    canonical.hexadecimal(manifest.identifier, "job identifier", size=DIGEST_BYTES if manifest.identifier else 0)
    canonical.text(terms.accountant, "job accountant", limit=1 << 10)
    for name in (manifest.adapter.method, *manifest.adapter.slots, *manifest.adapter.targets, *manifest.metrics):
        canonical.text(name, "job adapter or metrics", limit=1 << 10)  # an owner reads them before approving
    for name, lowest, highest in (
        ("epoch", 0, _MANY),
        ("rounds", 1, MAX_STEPS),
        ("spare_rounds", 0, MAX_STEPS),
        ("local_steps", 1, MAX_STEPS),
        ("refresh", 0, MAX_STEPS),
        ("length", 2, MAX_TOKENS),
        ("physical_batch", 1, MAX_PHYSICAL_BATCH),
    ):
        canonical.whole(getattr(manifest, name), f"job {name}", lowest=lowest, highest=highest)
    canonical.whole(
        manifest.steps, "job steps (rounds and spare rounds, times local_steps)", lowest=1, highest=MAX_STEPS
    )
    canonical.whole(manifest.n_min, "job n_min", lowest=1, highest=MAX_SITES)
    canonical.whole(manifest.accomplices, "job accomplices", lowest=0, highest=MAX_SITES)
    canonical.whole(terms.batch, "job batch", lowest=1, highest=_MOST_RECORDS)
    if type(terms.private) is not bool or len(manifest.roster) > MAX_SITES or len(manifest.metrics) > MAX_SITES:
        raise MalformedMessage("job private, roster or metrics: unknown to this release; refuse the job")
    for name, value in (
        ("learning_rate", manifest.learning_rate),
        ("deadline", manifest.deadline),
        ("epsilon", terms.epsilon),
        ("max_grad_norm", terms.max_grad_norm),
    ):
        canonical.real(value, f"job {name}", lowest=LOWEST, highest=HIGHEST)
    canonical.real(manifest.update_bound, "job update_bound", lowest=LOWEST_UPDATE, highest=HIGHEST_UPDATE)
    for site, key in manifest.roster:
        canonical.text(site, "job roster", limit=1 << 10)
        canonical.hexadecimal(key, "job roster", size=KEY_BYTES)
    manifest.aggregation.check(manifest.adapter, list(manifest.sites), manifest.learning_rate)
    _check_emulators(manifest)


def _check_emulators(manifest: JobManifest) -> None:
    """Checks that `emulators` has one form only: each site once, and at least one site trains on `emulator`."""
    sites, roster = [site for site, _ in manifest.emulators], set(manifest.sites)
    if sites != sorted(set(sites)) or not roster.issuperset(sites) or (sites and len(sites) == len(roster)):
        raise MalformedMessage(
            "job emulators: must name sites of the roster, sorted, each once and not all of them; refuse the job"
        )
    for _, digest in manifest.emulators:
        canonical.hexadecimal(digest, "job emulators", size=DIGEST_BYTES)
        if digest == manifest.emulator:
            raise MalformedMessage("job emulators: must differ from the emulator of all other sites; refuse the job")
