"""The settings that make a job between organisations, and the run folder that these settings name."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from offsite.coordinator.config.federation_file import FedConfig
from offsite.coordinator.home.provision import CoordinatorHome
from offsite.trust.files import write_atomically

JOB = "job.json"  # the file that makes a folder the folder of a job


def run_folder(home: CoordinatorHome, config: FedConfig, out: Path | None) -> Path:
    """Returns the folder of a run.

    A second job with the same settings would ask every owner for a new approval, and spend privacy a second time. So
    the same settings without `out` find the job that `keep_place` noted, wherever its folder is.

    Args:
      home: folder of the coordinator.
      config: the federation file.
      out: folder that the command names, or None.
    """
    own = home.runs / settings_sha256(config)[:12]
    if out is not None:
        return out
    noted = _note(own)
    try:
        place = Path(noted.read_text(encoding="utf-8"))
    except OSError:
        return own
    return place if (place / JOB).is_file() else own


def keep_place(home: CoordinatorHome, config: FedConfig, folder: Path) -> None:
    """Notes the last folder of a job that lies elsewhere than its settings say, for a later command without `--out`.

    Raises:
      DataError: the note cannot be written.
    """
    own = home.runs / settings_sha256(config)[:12]
    if folder.absolute() == own.absolute():
        _note(own).unlink(missing_ok=True)
    else:
        write_atomically(_note(own), str(folder.absolute()).encode())


def _note(own: Path) -> Path:
    return own.with_name(f"{own.name}.place")


def settings_sha256(config: FedConfig) -> str:
    """Returns the SHA-256 (hexadecimal) of the settings that make a job; settings that may change later do not count.

    A path counts as seen from the coordinator's folder, so that this folder, models and data may be moved together.
    """
    content = config.to_dict() | {"sites": []}  # only a simulation reads the sites of the file
    del content["compute"]
    if config.coordinator is not None:
        home = config.coordinator.home
        content["coordinator"] = {"deadline": config.coordinator.deadline}
        del content["model"]["base"]
        for key in ("measures", "generated_records", "new_tokens"):  # of the report alone
            del content["evaluation"][key]
        content["model"]["path"] = os.path.relpath(config.model.path, home)
        content["data"]["public"] = os.path.relpath(config.data.public, home)
        content["adapter"]["frozen"] = [os.path.relpath(folder, home) for folder in config.adapter.frozen]
        _place_packages(content["emulator"], home)
        content["aggregation"]["earlier"] = [os.path.relpath(folder, home) for folder in config.aggregation.earlier]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _place_packages(table: dict[str, Any], home: str) -> None:
    """Makes the places of packages relative; an absent package has no key, as in releases that lack the key."""
    for own in (table, *(entry for entry in table["variants"] if isinstance(entry, dict))):
        if folder := own.pop("package"):
            own["package"] = os.path.relpath(folder, home)
