"""The job manifest: every public fact of one fine-tuning job, the same bytes at the coordinator and at each site."""

import dataclasses
import hashlib
import json
from dataclasses import dataclass, field

from offsite.adapter.layout import Layout
from offsite.adapter.spec import AdapterSpec
from offsite.errors import ConfigError, MalformedMessage
from offsite.protos.aggregation import AggregationTerms
from offsite.protos.messages import MAX_PHYSICAL_BATCH, MAX_STEPS, MAX_TOKENS
from offsite.trust import canonical
from offsite.trust.federation_manifest import MAX_SITES
from offsite.trust.identity import KEY_BYTES

FORMAT, MAX_BYTES = 3, 1 << 20
DIGEST_BYTES = 32
_MANY = 1 << 31


@dataclass(frozen=True)
class PrivacyTerms:
    """What each site promises its records, by record-level DP-SGD.

    Attributes:
      private: False trains without clipping and noise; the report then says so in its first line.
      epsilon: target for the whole job (all rounds), per site; each site computes its own noise from it.
      max_grad_norm: clipping bound C of one record's gradient, measured on public text.
      accountant: name in `privacy.ACCOUNTANTS`.
      batch: expected number of records in a Poisson batch.
    """

    private: bool
    epsilon: float
    max_grad_norm: float
    accountant: str
    batch: int


@dataclass(frozen=True)
class JobManifest:
    """One job: who takes part, what is trained, on which terms.

    Attributes:
      federation: name of the federation.
      epoch: number of the roster; a changed roster is a new epoch.
      roster: (site, Ed25519 public key in hexadecimal), sorted by site.
      n_min: smallest number of sites whose sum may be opened.
      task: name in `task.TASKS`.
      emulator: SHA-256 of the emulator package's manifest, hexadecimal; of all sites that are not in `emulators`.
      base: SHA-256 over the full model's configuration and weights, hexadecimal; only the coordinator can check it.
      tokenizer: SHA-256 over the tokenizer's files, hexadecimal.
      adapter: what is trained, and where.
      layout: names and shapes of the trained tensors, as `Layout.to_dict()`.
      length: tokens in a record, at most `MAX_TOKENS`.
      split: how texts become records, `blocks` or `truncate`.
      rounds: training rounds in all.
      local_steps: DP-SGD steps of a site per round; over all rounds and spare ones at most `MAX_STEPS`.
      learning_rate: of the sites' SGD.
      update_bound: largest absolute entry of an update; sets the step of the secure sum.
      privacy: the terms above.
      physical_batch: records in one forward pass, at most `MAX_PHYSICAL_BATCH`; changes memory and speed, not the
        result's privacy.
      spare_rounds: rounds beyond `rounds` that the noise is planned for, to repeat some that were lost after an upload.
      model: name of the full model, for the data owner to know and to permit.
      release: version of offsite that wrote this.
      metrics: names of what sites are asked to tell beside their update; nothing by default.
      deadline: seconds that a site has to answer one stage of a round.
      refresh: after how many rounds biases of the emulator may move, as a training request says; 0 is never.
      identifier: 32 random bytes in hexadecimal, so that two jobs with the same terms are two jobs in the sites'
        ledgers; empty in a simulation.
      emulators: (site, SHA-256 of its package's manifest) of the sites that get another emulator, sorted by site. It
        stands here for everybody to see, so that nobody can be given one of his own unseen.
      aggregation: what the sites do for the coordinator's rule, and whether it sees each site's update.
    """

    federation: str
    epoch: int
    roster: tuple[tuple[str, str], ...]
    n_min: int
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
        """Returns names and shapes of what each site uploads in a round, from 1.

        It may be a part of the adapter, or how far the adapter moved along each of the round's directions.
        """
        if self.aggregation.directions:
            return Layout(("directions",), ((self.local_steps * self.aggregation.directions,),))
        return self.aggregation.part(self.layout, number)

    def upload_size(self, number: int) -> int:
        """Returns the number of scalars that each site uploads in a round, from 1."""
        return self.upload_layout(number).size

    def rank_of(self, site: str) -> int:
        """Returns how many columns of each B a site trains: the adapter's rank, or its own smaller one."""
        return dict(self.aggregation.ranks).get(site, self.adapter.rank)

    def emulator_of(self, site: str) -> str:
        """Returns the SHA-256 of the package that a site gets, hexadecimal."""
        return dict(self.emulators).get(site, self.emulator)

    def shipped(self) -> dict[str, tuple[str, ...]]:
        """Returns whom each emulator is for, by its SHA-256: `emulator` first, then by the first of their sites."""
        sites: dict[str, list[str]] = {self.emulator: []}
        for site in self.sites:
            sites.setdefault(self.emulator_of(site), []).append(site)
        return {digest: tuple(names) for digest, names in sites.items()}

    @property
    def releases(self) -> int:
        """Updates that one site may send over the whole job."""
        return self.rounds + self.spare_rounds

    @property
    def steps(self) -> int:
        """DP-SGD steps of one site over the whole job, which its noise is planned for."""
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
          MalformedMessage: not JSON, another format, missing or unknown fields, not in canonical form, or a field of
            another type or out of its range.
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
        except (ValueError, TypeError, KeyError, AttributeError, ConfigError, RecursionError) as error:
            raise MalformedMessage(f"job manifest does not parse ({type(error).__name__}); ask for it again") from error
        if not same:
            raise MalformedMessage("job manifest is not in canonical form; was it altered on the way")
        _check(manifest)
        return manifest


def _check(manifest: JobManifest) -> None:
    """Checks types and ranges of everything that is not checked by a class of its own."""
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
    canonical.whole(terms.batch, "job batch", lowest=1, highest=_MANY)
    if type(terms.private) is not bool or len(manifest.roster) > MAX_SITES or len(manifest.metrics) > MAX_SITES:
        raise MalformedMessage("job private, roster or metrics: not what this release knows; refuse the job")
    for name in ("learning_rate", "update_bound", "deadline"):
        canonical.positive(getattr(manifest, name), f"job {name}")
    canonical.positive(terms.epsilon, "job epsilon")
    canonical.positive(terms.max_grad_norm, "job max_grad_norm")
    for site, key in manifest.roster:
        canonical.text(site, "job roster", limit=1 << 10)
        canonical.hexadecimal(key, "job roster", size=KEY_BYTES)
    manifest.aggregation.check(manifest.adapter, list(manifest.sites), manifest.learning_rate)
    _check_emulators(manifest)


def _check_emulators(manifest: JobManifest) -> None:
    """Checks that what is said of other emulators is said in one way: each site once, and `emulator` is somebody's."""
    sites, roster = [site for site, _ in manifest.emulators], set(manifest.sites)
    if sites != sorted(set(sites)) or not roster.issuperset(sites) or (sites and len(sites) == len(roster)):
        raise MalformedMessage(
            "job emulators: must name sites of the roster, sorted, each once and not all of them; refuse the job"
        )
    for _, digest in manifest.emulators:
        canonical.hexadecimal(digest, "job emulators", size=DIGEST_BYTES)
        if digest == manifest.emulator:
            raise MalformedMessage("job emulators: must differ from the one that all others get; refuse the job")
