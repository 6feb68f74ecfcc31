"""The file `fed.toml`: frozen, checked once at the door; the error on an unknown key names the nearest key."""

import dataclasses
import hashlib
import math
import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from offsite.coordinator.config.aggregation_table import AggregationConfig, SecaggConfig, check_aggregation
from offsite.coordinator.config.compute_table import ComputeConfig
from offsite.coordinator.config.coordinator_table import CoordinatorConfig
from offsite.coordinator.config.data_tables import DataConfig, ModelConfig, SiteConfig
from offsite.coordinator.config.emulator_table import EmulatorConfig, check_emulator, check_stated
from offsite.coordinator.config.training_tables import AdapterConfig, EvaluationConfig, PrivacyConfig, TrainingConfig
from offsite.errors import ConfigError, DataError
from offsite.privacy.ranges import HIGHEST, LOWEST, LOWEST_SPACING, MAX_PHYSICAL_BATCH
from offsite.protos.aggregation import MAX_DIRECTIONS
from offsite.protos.messages import MAX_STEPS, MAX_TOKENS
from offsite.trust.collusion import MIN_SITES, fewest_in_sum, usual_accomplices
from offsite.trust.toml_tables import TableReader


@dataclass(frozen=True)
class FedConfig:
    """A whole federation file.

    Attributes:
      model: table of the full model.
      data: table of the data.
      sites: data owners of a simulation; the signed manifest names the sites of a federation between organisations.
      coordinator: table of a federation between organisations; absent in a simulation.
      seed: seed of everything that may be repeated: the adapter's start, and in a simulation the noise; at least 0.
      emulator: table of the emulator.
      adapter: table of the adapter.
      training: table of rounds and steps.
      aggregation: table of the server rule.
      privacy: table of differential privacy.
      secagg: table of secure aggregation.
      evaluation: table of scores and acceptance.
      compute: table of device and number format.
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
    compute: ComputeConfig = field(default_factory=ComputeConfig)

    def __post_init__(self) -> None:
        """Checks every range that no later room would explain better."""
        training, privacy = self.training, self.privacy
        _at_least("training.rounds", training.rounds, 1)
        _at_least("training.local_steps", training.local_steps, 1)
        _within("training.batch", training.batch, 1, HIGHEST)
        _within("emulator.refresh", self.emulator.refresh, 0, MAX_STEPS)
        _within("training.physical_batch", training.physical_batch, 1, MAX_PHYSICAL_BATCH)
        _at_least("training.spare_rounds", training.spare_rounds, 0)
        _within("training.directions", training.directions, 0, MAX_DIRECTIONS)
        if not LOWEST_SPACING <= training.spacing < 1:
            raise ConfigError(
                f"training.spacing={training.spacing}: must be from {LOWEST_SPACING:g} to below 1; 0.001 is usual",
                key="training.spacing",
            )
        steps = (training.rounds + training.spare_rounds) * training.local_steps
        _within("(training.rounds + training.spare_rounds) * training.local_steps", steps, 1, MAX_STEPS)
        _within("data.length", self.data.length, 2, MAX_TOKENS)
        _at_least("evaluation.examples", self.evaluation.examples, 1)
        _at_least("evaluation.public_examples", self.evaluation.public_examples, 2)
        _at_least("evaluation.generated_records", self.evaluation.generated_records, 1)
        _within("evaluation.new_tokens", self.evaluation.new_tokens, 1, MAX_TOKENS)
        if self.secagg.n_min:
            _at_least("secagg.n_min", self.secagg.n_min, MIN_SITES)
        _at_least("seed", self.seed, 0)
        _within("training.learning_rate", training.learning_rate, LOWEST, HIGHEST)
        check_aggregation(self.aggregation)
        if not (0 <= self.evaluation.tolerance < math.inf):
            raise ConfigError(
                f"evaluation.tolerance={self.evaluation.tolerance}: must be finite and at least 0",
                key="evaluation.tolerance",
            )
        check_emulator(self.emulator)
        self.compute.check()
        if not LOWEST <= privacy.epsilon <= HIGHEST:
            raise ConfigError(
                f"privacy.epsilon={privacy.epsilon}: must be from {LOWEST:g} to {HIGHEST:g}, smaller is more private; "
                "use 8, or privacy.private = false to train without privacy",
                key="privacy.epsilon",
            )
        if privacy.max_grad_norm != 0 and not LOWEST <= privacy.max_grad_norm <= HIGHEST:
            raise ConfigError(
                f"privacy.max_grad_norm={privacy.max_grad_norm}: must be from {LOWEST:g} to {HIGHEST:g}, or 0 for "
                "automatic",
                key="privacy.max_grad_norm",
            )
        if self.coordinator is not None:
            _at_least("coordinator.sites", self.coordinator.sites, 0)
            _at_least("coordinator.attempts", self.coordinator.attempts, 1)
            _within("coordinator.deadline", self.coordinator.deadline, LOWEST, HIGHEST)
            _above_zero("coordinator.patience", self.coordinator.patience)
        _check_sites([site.name for site in self.sites], self)
        if self.coordinator is None:  # the members of a real federation are known when its job is prepared
            self.emulator.kinds([site.name for site in self.sites])

    def on(self, device: str | None, dtype: str | None = None) -> "FedConfig":
        """Returns the settings with another device or number format; None keeps the file's.

        Raises:
          ConfigError: no device or no number format has such a name.
        """
        own = self.compute
        device, dtype = own.device if device is None else device, own.dtype if dtype is None else dtype
        return dataclasses.replace(self, compute=dataclasses.replace(own, device=device, dtype=dtype))

    def to_dict(self) -> dict[str, Any]:
        """Returns the settings as the plain values of a federation file."""
        return dataclasses.asdict(self)


def _check_sites(names: list[str], config: FedConfig) -> None:
    if not names and config.coordinator is not None:
        return  # the federation manifest names them
    n_min = config.secagg.fewest(len(names))
    if len(names) < n_min:
        raise ConfigError(
            f"n_sites={len(names)}: secure aggregation opens no sum of fewer than n_min={n_min} "
            "sites, since each of two sites could compute the other's update; add sites"
        )
    if config.coordinator is None and n_min < (needed := fewest_in_sum(usual_accomplices(len(names)))):
        raise ConfigError(
            f"secagg.n_min={n_min} of n_sites={len(names)}: must be at least {needed}, so that each sum holds two "
            "sites that do not help the coordinator where a third of all do; raise n_min, or leave it out"
        )
    if len(set(names)) != len(names) or not all(names):
        raise ConfigError(f"sites={names}: no name may be empty, and all names must differ; rename a site")
    if not all(name.replace("-", "").replace("_", "").isalnum() for name in names):
        raise ConfigError(f"sites={names}: names may have letters, digits, - and _ only; rename a site")


def _at_least(name: str, value: float, lowest: float) -> None:
    if not value >= lowest:  # True for NaN
        raise ConfigError(f"{name}={value}: must be at least {lowest}", key=name)


def _within(name: str, value: float, lowest: float, highest: float) -> None:
    _at_least(name, value, lowest)
    if value > highest:
        raise ConfigError(f"{name}={value}: must be at most {highest}; no site takes a larger job", key=name)


def _above_zero(name: str, value: float) -> None:
    if not (value > 0 and math.isfinite(value)):
        raise ConfigError(f"{name}={value}: must be finite and above 0", key=name)


def read_config(path: Path) -> tuple[FedConfig, str]:
    """Reads a federation file; relative paths in the file are relative to its folder.

    Returns:
      The configuration and the SHA-256 of the file, hexadecimal.

    Raises:
      DataError: the path names no file.
      ConfigError: the file is not TOML, has an unknown key, misses a key, or has a value of a wrong type or range.
    """
    content, sha256 = _read(path)
    return _checked(content, path.resolve().parent), sha256


def read_with_faults(path: Path) -> tuple[FedConfig | None, list[ConfigError]]:
    """Reads a federation file as far as it can be read, for a check that names all faults at once.

    A key at fault is left out, so that its default stands in its place, and the rest of the file is read again.

    Returns:
      The configuration, None where the faults leave none; and all faults.

    Raises:
      DataError: the path names no file.
      ConfigError: the file is not TOML.
    """
    content, _ = _read(path)
    faults = list[ConfigError]()
    while True:
        try:
            return _checked(content, path.resolve().parent), faults
        except ConfigError as fault:
            faults.append(fault)
            if not _leave_out(content, fault.key):
                return None, faults


def _leave_out(content: dict[str, object], key: str) -> bool:
    """Removes the key at the path `key` from a parsed document, and says whether the key was there."""
    *tables, last = key.split(".")
    for name in tables:
        inner = content.get(name)
        if not isinstance(inner, dict):
            return False
        content = inner
    return content.pop(last, None) is not None


def _read(path: Path) -> tuple[dict[str, Any], str]:
    """Returns a federation file as a parsed document, and its SHA-256."""
    if not path.is_file():
        raise DataError(f"config={str(path)!r}: no such file; `offsite init` writes a file to start from")
    raw = path.read_bytes()
    try:
        content = tomllib.loads(raw.decode("utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"config={str(path)!r} is not valid TOML ({error}); correct that line") from error
    return content, hashlib.sha256(raw).hexdigest()


def _checked(content: dict[str, object], folder: Path) -> FedConfig:
    """Returns the configuration of a federation file, whose stated keys must not contradict each other.

    The copy in a run folder states every key, with defaults, so it is read by `parse_config` alone.
    """
    if isinstance(table := content.get("emulator"), dict):
        check_stated(table)
    return parse_config(content, folder)


def parse_config(content: dict[str, Any], folder: Path, source: str = "config") -> FedConfig:
    """Returns the configuration of a parsed TOML document; see `read_config`.

    Args:
      content: the parsed document.
      folder: folder of relative paths.
      source: name of the document, with which messages about unknown and missing keys begin.
    """
    content = {**content}
    if isinstance(data := content.get("data"), dict) and "owners" in data:
        content["data"] = {k: v for k, v in data.items() if k not in ("owners", "sites_dir")}
        content["sites"] = _owners(data)
    return _absolute(TableReader(source).table(FedConfig, content), folder)


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
        emulator=config.emulator.in_place(full),
    )
