"""The settings that make a job between organisations, and the run folder that these settings name."""

import hashlib
import json
import os
from pathlib import Path

from offsite.coordinator.config.federation_file import FedConfig
from offsite.coordinator.home.provision import CoordinatorHome


def run_folder(home: CoordinatorHome, config: FedConfig, out: Path | None) -> Path:
    """Returns the folder of a run: `out`, or the folder that the settings name in this home."""
    return out if out is not None else home.runs / settings_sha256(config)[:12]


def settings_sha256(config: FedConfig) -> str:
    """Returns the SHA-256 (hexadecimal) of the settings that make a job; settings that may change later do not count.

    A path counts as seen from the coordinator's folder, so that this folder, models and data may be moved together.
    """
    content = config.to_dict() | {"sites": []}  # only a simulation reads the sites of the file
    if config.coordinator is not None:
        home = config.coordinator.home
        content["coordinator"] = {"deadline": config.coordinator.deadline}
        content["model"]["path"] = os.path.relpath(config.model.path, home)
        content["data"]["public"] = os.path.relpath(config.data.public, home)
        content["adapter"]["frozen"] = [os.path.relpath(folder, home) for folder in config.adapter.frozen]
        content["aggregation"]["earlier"] = [os.path.relpath(folder, home) for folder in config.aggregation.earlier]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
