"""The folder of a run between organisations: named by the settings that make the job, and by no others gone on with."""

import hashlib
import json
import os
from pathlib import Path

from offsite.coordinator.config.federation_file import FedConfig
from offsite.coordinator.home.provision import CoordinatorHome
from offsite.coordinator.job.store import Store
from offsite.errors import ConfigError

SETTINGS = "settings.json"


def run_folder(home: CoordinatorHome, config: FedConfig, out: Path | None) -> Path:
    """Returns the folder of a run: the one asked for, or the one of these settings in this home."""
    return out if out is not None else home.runs / settings_sha256(config)[:12]


def settings_sha256(config: FedConfig) -> str:
    """Returns the SHA-256 of the settings that make a job, hexadecimal; those of how it is run may change meanwhile.

    Places count as they are seen from the coordinator's folder, so that all of it may be moved together.
    """
    content = config.to_dict() | {"sites": []}  # a simulation's
    if config.coordinator is not None:
        home = config.coordinator.home
        content["coordinator"] = {"deadline": config.coordinator.deadline}
        content["model"]["path"] = os.path.relpath(config.model.path, home)
        content["data"]["public"] = os.path.relpath(config.data.public, home)
        content["adapter"]["frozen"] = [os.path.relpath(one, home) for one in config.adapter.frozen]
        content["aggregation"]["earlier"] = [os.path.relpath(one, home) for one in config.aggregation.earlier]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def keep_settings(store: Store, config: FedConfig) -> None:
    """Writes down under which settings a run begins."""
    store.write_json(SETTINGS, {"sha256": settings_sha256(config)})


def check_settings(store: Store, config: FedConfig) -> None:
    """Refuses to go on with a run under settings that its sites did not agree to.

    Raises:
      ConfigError: the run began with others.
      DataError: it did not write down with which.
    """
    now, began = settings_sha256(config), store.read_json(SETTINGS).get("sha256")
    if began != now:
        raise ConfigError(
            f"settings={now[:12]}: run {str(store.folder)!r} began with {str(began)[:12]}; restore the federation "
            "file, or give another --out"
        )
