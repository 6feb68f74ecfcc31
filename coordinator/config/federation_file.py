"""The file `fed.toml`: frozen, checked once at the door; an unknown key names the nearest known one."""

import dataclasses
import hashlib
import math
import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from offsite.adapter.options import Scalar
from offsite.adapter.spec import AdapterSpec
from offsite.coordinator.config.aggregation_table import AggregationConfig, SecaggConfig, check_aggregation
from offsite.coordinator.config.emulator_table import EmulatorConfig, check_emulator
from offsite.errors import ConfigError, DataError
from offsite.protos.aggregation import MAX_DIRECTIONS
from offsite.protos.messages import MAX_PHYSICAL_BATCH, MAX_STEPS, MAX_TOKENS
from offsite.trust.toml_tables import TableReader


@dataclass(frozen=True)
class ModelConfig:
    """The table [model]: the full model, and its task.

    Attributes:
      path: Hugging Face folder with safetensors weights; nothing is fetched.
      task: what the model is trained for; a name in `task.tasks.TASKS`.
    """

    path: str
    task: str = "causal_lm"


@dataclass(frozen=True)
class AdapterConfig:
    """The table [adapter]: what is trained.

    Attributes:
      method: name in `adapter.methods.METHODS`; `offsite methods` prints all names with sizes and costs.
      rank: inner width of the adapter, at least 1; methods without an inner width ignore the key.
      alpha: scale of the adapter's effect; methods without a scale ignore the key.
      targets: names of layers inside a block, as `["q_proj", "v_proj"]`; empty takes the method's own names.
      options: the method's own settings, as `{ n_frequency = 64 }`; `head = true` also trains the task head.
      frozen: adapter folders of earlier jobs with method `bottleneck` on the same slots, shipped to the sites and
        never trained: one (a language) below a `madx`, or several mixed by `fusion`, whose option `adapters` says how
        many (default 2).
    """

    method: str = "ffa_lora"
    rank: int = 4
    alpha: float = 8.0
    targets: tuple[str, ...] = ()
    options: dict[str, Scalar] = field(default_factory=dict)
    frozen: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Refuses what no method could use; what this one cannot, `adapter.methods.known` says."""
        self.spec(slots=(), seed=0)

    def spec(self, *, slots: tuple[str, ...], seed: int) -> AdapterSpec:
        """Returns the adapter of these settings in the blocks at these paths."""
        options = tuple(sorted(self.options.items()))
        return AdapterSpec(self.method, self.rank, self.alpha, self.targets, slots, seed, options)


@dataclass(frozen=True)
class DataConfig:
    """The table [data]: the coordinator's public records, and how all records become examples.

    Attributes:
      public: file or folder of public records, with the sites' fields, for gate, clip and acceptance test.
      length: tokens of one record, the unit of privacy; at least 2.
      split: `truncate` makes one record of each text; `blocks` joins texts and cuts them into full records, which no
        single person stands behind and whose number the tokenizer decides.
      reader: name in `task.readers.tables.READERS`: jsonl, csv, parquet, text, npz, images or image_parquet; empty
        picks by file name.
      column: column or key that holds the main field of the task's records, as the text; empty takes the field's
        name.
      columns: column or key of each further field, by the field's name: `{ text = "body", label = "spam" }`.
    """

    public: str
    length: int = 128
    split: str = "truncate"
    reader: str = ""
    column: str = ""
    columns: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class SiteConfig:
    """One entry [[sites]]: a data owner of a simulation.

    Attributes:
      name: the site's name: letters, digits, `-` and `_`.
      train: file or folder of the site's training records.
      heldout: file or folder of records of the same kind, which are scored and never trained on.
    """

    name: str
    train: str
    heldout: str


@dataclass(frozen=True)
class TrainingConfig:
    """The table [training]: rounds, and the sites' steps.

    Attributes:
      rounds: number of rounds of the federation; at least 1.
      local_steps: private steps of a site in one round; at least 1.
      batch: expected number of records in a step, at least 1; the real number is random.
      learning_rate: learning rate of the sites' plain gradient steps; above 0.
      physical_batch: number of records in one forward pass, at least 1; changes memory and speed only.
      spare_rounds: number of rounds beyond `rounds` that the noise is planned for, to repeat rounds that were lost
        after an upload.
      directions: DP-ZO, training by forward passes alone: number of directions that a step looks along; a site
        uploads one number for each direction instead of an adapter, with any method. 0 trains by gradients.
      spacing: distance along a direction at which DP-ZO takes losses; between 0 and 1.
    """

    rounds: int = 6
    local_steps: int = 1
    batch: int = 16
    learning_rate: float = 1.0
    physical_batch: int = 8
    spare_rounds: int = 0
    directions: int = 0
    spacing: float = 1e-3


@dataclass(frozen=True)
class PrivacyConfig:
    """The table [privacy]: record-level differential privacy at every site.

    Attributes:
      private: `false` trains without clip and noise, and the report says so first.
      epsilon: privacy parameter of the whole job at each site; above 0.
      max_grad_norm: clip of one record's gradient; 0 takes the median norm on public text.
      accountant: name in `privacy.accountants.ACCOUNTANTS`: pld, prv or rdp.
    """

    private: bool = True
    epsilon: float = 8.0
    max_grad_norm: float = 0.0
    accountant: str = "pld"


@dataclass(frozen=True)
class EvaluationConfig:
    """The table [evaluation]: how much is scored, and the acceptance test.

    Attributes:
      examples: number of held-out records over all sites; at least 1.
      public_examples: number of public records of the acceptance test; at least 2.
      tolerance: nats by which a round may raise the public loss above the best so far; at least 0.
    """

    examples: int = 48
    public_examples: int = 16
    tolerance: float = 0.05


@dataclass(frozen=True)
class CoordinatorConfig:
    """The table [coordinator]: how a federation between organisations is run; a simulation does not read it.

    Attributes:
      home: folder that `offsite coordinator init` made.
      sites: number of sites that must be ready before the first round; 0 waits for all.
      deadline: seconds that a site has for one stage of a round; above 0.
      patience: seconds, above 0, to wait for sites to connect, be approved and fetch the package, counted from the
        last progress.
      attempts: number of tries, at least 1, of a round that found too few sites, before the job stops and can be gone
        on with.

    All but the deadline, which stands in the signed manifest, may change while a job runs, see `run_folder`.
    """

    home: str
    sites: int = 0
    deadline: float = 3600.0
    patience: float = 3600.0
    attempts: int = 3


@dataclass(frozen=True)
class FedConfig:
    """A whole federation file.

    Attributes:
      model: table of the full model.
      data: table of the data.
      sites: data owners of a simulation; those of a federation between organisations stand in its signed manifest.
      coordinator: table of a federation between organisations; absent in a simulation.
      seed: seed of everything that may be repeated: the adapter's start, and in a simulation the noise.
      emulator: table of the emulator.
      adapter: table of the adapter.
      training: table of rounds and steps.
      aggregation: table of the server rule.
      privacy: table of differential privacy.
      secagg: table of secure aggregation.
      evaluation: table of scores and acceptance.
    """

    model: ModelConfig
    data: DataConfig
    sites: tuple[SiteConfig, ...] = ()
    coordinator: CoordinatorConfig | None = None
    seed: int = 0
    emulator: EmulatorConfig = field(default_factory=EmulatorConfig)
    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    aggregation: AggregationConfig = field(default_factory=AggregationConfig)
    privacy: PrivacyConfig = field(default_factory=PrivacyConfig)
    secagg: SecaggConfig = field(default_factory=SecaggConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)

    def __post_init__(self) -> None:
        """Checks every range that no later room would explain better."""
        training, privacy = self.training, self.privacy
        _at_least("training.rounds", training.rounds, 1)
        _at_least("training.local_steps", training.local_steps, 1)
        _at_least("training.batch", training.batch, 1)
        _within("emulator.refresh", self.emulator.refresh, 0, MAX_STEPS)
        _within("training.physical_batch", training.physical_batch, 1, MAX_PHYSICAL_BATCH)
        _at_least("training.spare_rounds", training.spare_rounds, 0)
        _within("training.directions", training.directions, 0, MAX_DIRECTIONS)
        if not 0 < training.spacing < 1:
            raise ConfigError(f"training.spacing={training.spacing}: must lie between 0 and 1; 0.001 is usual")
        steps = (training.rounds + training.spare_rounds) * training.local_steps
        _within("(training.rounds + training.spare_rounds) * training.local_steps", steps, 1, MAX_STEPS)
        _within("data.length", self.data.length, 2, MAX_TOKENS)
        _at_least("evaluation.examples", self.evaluation.examples, 1)
        _at_least("evaluation.public_examples", self.evaluation.public_examples, 2)
        _at_least("secagg.n_min", self.secagg.n_min, 3)
        _at_least("seed", self.seed, 0)
        _above_zero("training.learning_rate", training.learning_rate)
        check_aggregation(self.aggregation)
        if not (0 <= self.evaluation.tolerance < math.inf):
            raise ConfigError(f"evaluation.tolerance={self.evaluation.tolerance}: must be finite and at least 0")
        check_emulator(self.emulator)
        if not (0 < privacy.epsilon < math.inf):
            raise ConfigError(
                f"privacy.epsilon={privacy.epsilon}: must be finite and above 0, smaller is more private; "
                "use 8, or privacy.private = false to train without privacy"
            )
        if not (0 <= privacy.max_grad_norm < math.inf):
            raise ConfigError(f"privacy.max_grad_norm={privacy.max_grad_norm}: must be above 0, or 0 for automatic")
        if self.coordinator is not None:
            _at_least("coordinator.sites", self.coordinator.sites, 0)
            _at_least("coordinator.attempts", self.coordinator.attempts, 1)
            _above_zero("coordinator.deadline", self.coordinator.deadline)
            _above_zero("coordinator.patience", self.coordinator.patience)
        _check_sites([site.name for site in self.sites], self)
        if self.coordinator is None:  # the members of a real federation are known when its job is prepared
            self.emulator.kinds([site.name for site in self.sites])

    def to_dict(self) -> dict[str, Any]:
        """Returns plain values, as they would stand in the file."""
        return dataclasses.asdict(self)


def _check_sites(names: list[str], config: FedConfig) -> None:
    if not names and config.coordinator is not None:
        return  # the federation manifest names them
    if len(names) < config.secagg.n_min:
        raise ConfigError(
            f"n_sites={len(names)}: secure aggregation opens no sum of fewer than n_min={config.secagg.n_min} "
            "sites, since with two each could compute the other's update; add sites"
        )
    if len(set(names)) != len(names) or not all(names):
        raise ConfigError(f"sites={names}: names must be given and differ; rename one")
    if not all(name.replace("-", "").replace("_", "").isalnum() for name in names):
        raise ConfigError(f"sites={names}: names may have letters, digits, - and _ only; rename one")


def _at_least(name: str, value: float, lowest: float) -> None:
    if value < lowest:
        raise ConfigError(f"{name}={value}: must be at least {lowest}")


def _within(name: str, value: float, lowest: float, highest: float) -> None:
    _at_least(name, value, lowest)
    if value > highest:
        raise ConfigError(f"{name}={value}: must be at most {highest}; no site takes a larger job")


def _above_zero(name: str, value: float) -> None:
    if not (value > 0 and math.isfinite(value)):
        raise ConfigError(f"{name}={value}: must be finite and above 0")


def read_config(path: Path) -> tuple[FedConfig, str]:
    """Reads a federation file; relative paths in it are relative to its folder.

    Returns:
      The configuration and the SHA-256 of the file, hexadecimal.

    Raises:
      DataError: no such file.
      ConfigError: not TOML, an unknown or missing key, a wrong type or range.
    """
    if not path.is_file():
        raise DataError(f"config={str(path)!r}: no such file; `offsite init` writes one to start from")
    raw = path.read_bytes()
    try:
        content = tomllib.loads(raw.decode("utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"config={str(path)!r} is not valid TOML ({error}); correct that line") from error
    return parse_config(content, path.resolve().parent), hashlib.sha256(raw).hexdigest()


def parse_config(content: dict[str, Any], folder: Path) -> FedConfig:
    """Returns the configuration of a parsed TOML document; see `read_config`."""
    content = {**content}
    if isinstance(data := content.get("data"), dict) and "owners" in data:
        content["data"] = {k: v for k, v in data.items() if k not in ("owners", "sites_dir")}
        content["sites"] = _owners(data)
    return _absolute(TableReader("config").table(FedConfig, content), folder)


def _owners(data: dict[str, Any]) -> list[dict[str, str]]:
    """Expands `sites_dir` and `owners` to one site per folder, with `train` and `heldout` inside."""
    folder, owners = data.get("sites_dir"), data["owners"]
    if not isinstance(folder, str) or not isinstance(owners, list):
        raise ConfigError("data.owners needs data.sites_dir: a folder that holds OWNER/train and OWNER/heldout")
    return [{"name": str(o), "train": f"{folder}/{o}/train", "heldout": f"{folder}/{o}/heldout"} for o in owners]


def _absolute(config: FedConfig, folder: Path) -> FedConfig:
    def full(path: str) -> str:
        return str(folder / Path(path).expanduser())

    coordinator = config.coordinator
    if coordinator is not None:
        coordinator = dataclasses.replace(coordinator, home=full(coordinator.home))
    sites = tuple(dataclasses.replace(s, train=full(s.train), heldout=full(s.heldout)) for s in config.sites)
    earlier = tuple(full(folder) for folder in config.aggregation.earlier)
    frozen = tuple(full(folder) for folder in config.adapter.frozen)
    return dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, path=full(config.model.path)),
        data=dataclasses.replace(config.data, public=full(config.data.public)),
        sites=sites,
        coordinator=coordinator,
        aggregation=dataclasses.replace(config.aggregation, earlier=earlier),
        adapter=dataclasses.replace(config.adapter, frozen=frozen),
    )
