"""The settings that make a job between organisations, and the run folder that is named by them."""

import hashlib
import json
import os
from pathlib import Path

from offsite.coordinator.config.federation_file import FedConfig
from offsite.coordinator.home.provision import CoordinatorHome


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
