"""The build backend: setuptools', with wheels that are the same bytes on every build and carry a bill of materials.

A wheel of setuptools alone depends on the clock, on the modes of the checked-out files, on the machine's zlib, and on
what an earlier build left in `build/lib`. Here every entry has the date of `SOURCE_DATE_EPOCH`, by default 1980, one
mode, and no compression. The bill of materials lies where PEP 770 wants it, `.dist-info/sboms`, in CycloneDX 1.6.
"""

import base64
import hashlib
import json
import os
import re
import shutil
import time
import tomllib
import uuid
import zipfile
from pathlib import Path
from typing import Any

from setuptools import build_meta
from setuptools.build_meta import (
    build_editable,
    build_sdist,
    get_requires_for_build_editable,
    get_requires_for_build_sdist,
    get_requires_for_build_wheel,
    prepare_metadata_for_build_editable,
    prepare_metadata_for_build_wheel,
)

__all__ = [
    "build_editable",
    "build_sdist",
    "build_wheel",
    "get_requires_for_build_editable",
    "get_requires_for_build_sdist",
    "get_requires_for_build_wheel",
    "prepare_metadata_for_build_editable",
    "prepare_metadata_for_build_wheel",
]
ROOT = Path(__file__).resolve().parents[1]
EARLIEST = 315_532_800  # 1980-01-01, the first date that a zip file can say
MODE = 0o100644 << 16
SBOM = "sboms/offsite.cdx.json"
LOCK = "requirements.lock"


def build_wheel(
    wheel_directory: str, config_settings: dict[str, Any] | None = None, metadata_directory: str | None = None
) -> str:
    """Builds a wheel and returns its file name; the hook of PEP 517."""
    shutil.rmtree(ROOT / "build" / "lib", ignore_errors=True)  # a module that is gone would come along from there
    name: str = build_meta.build_wheel(wheel_directory, config_settings, metadata_directory)
    path = Path(wheel_directory) / name
    with zipfile.ZipFile(path) as wheel:
        contents = {entry: wheel.read(entry) for entry in wheel.namelist() if not entry.endswith("/")}
    (record,) = (entry for entry in contents if entry.endswith(".dist-info/RECORD"))
    folder = record.removesuffix("RECORD")
    contents[folder + SBOM] = bill_of_materials((ROOT / LOCK).read_text(encoding="utf-8"))
    del contents[record]
    lines = [f"{entry},sha256={_digest(content)},{len(content)}" for entry, content in sorted(contents.items())]
    contents = dict(sorted(contents.items())) | {record: "\n".join([*lines, f"{record},,", ""]).encode()}
    _write(path, contents, int(os.environ.get("SOURCE_DATE_EPOCH", EARLIEST)))
    return name


def bill_of_materials(lock: str) -> bytes:
    """Returns the bill of materials as CycloneDX JSON: the program, and each package that it is tested with.

    Args:
      lock: content of a lock file. torch is in none, since its build follows from the machine, and stands here without
        a version.
    """
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    locked = [*re.findall(r"(?m)^([\w.-]+)==([^\s\\;]+)", lock), ("torch", "")]
    parts = [_component("library", name, version) for name, version in sorted(locked)]
    program = _component("application", project["name"], project["version"])
    program["licenses"] = [{"license": {"id": project["license"]}}]
    content = {
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "version": 1,
        "metadata": {"component": program},
        "components": parts,
        "dependencies": [{"ref": program["bom-ref"], "dependsOn": [part["bom-ref"] for part in parts]}],
    }
    number = uuid.uuid5(uuid.NAMESPACE_OID, json.dumps(content, sort_keys=True))
    return json.dumps(content | {"serialNumber": f"urn:uuid:{number}"}, indent=1, sort_keys=True).encode() + b"\n"


def _component(kind: str, name: str, version: str) -> dict[str, Any]:
    purl = f"pkg:pypi/{name}" + (f"@{version}" if version else "")
    return {"type": kind, "bom-ref": purl, "name": name, "purl": purl} | ({"version": version} if version else {})


def _digest(content: bytes) -> str:
    return base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()


def _write(path: Path, contents: dict[str, bytes], epoch: int) -> None:
    date = time.gmtime(max(epoch, EARLIEST))[:6]
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as wheel:
        for entry, content in contents.items():
            info = zipfile.ZipInfo(entry, date)
            info.external_attr, info.create_system = MODE, 3  # Unix, whatever the machine
            wheel.writestr(info, content)
