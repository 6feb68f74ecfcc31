"""The wheel is the same bytes on every build, and its bill of materials lists what was tested."""

import base64
import csv
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


@pytest.fixture(scope="module")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two wheels of the same source: other modes, another folder, another clock, and a left-over."""
    built = []
    for number, mode in enumerate((0o644, 0o600)):
        source, target = tmp_path_factory.mktemp(f"source{number}"), tmp_path_factory.mktemp(f"wheel{number}")
        tracked = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True)
        for name in filter(None, tracked.stdout.split("\0")):
            if name.startswith(("tests/", "docs/", "bench/")) or not (ROOT / name).exists():
                continue
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, source / name, follow_symlinks=False)
            if not (source / name).is_symlink():
                (source / name).chmod(mode)
                os.utime(source / name, (10**9 + number, 10**9 + number))
        if number:
            (source / "build" / "lib" / "offsite").mkdir(parents=True)
            (source / "build" / "lib" / "offsite" / "gone.py").write_text("")
        code = f"import wheel_backend; print(wheel_backend.build_wheel({str(target)!r}))"
        environment = {name: value for name, value in os.environ.items() if name != "SOURCE_DATE_EPOCH"}
        environment |= {"PYTHONPATH": str(source / "deploy"), "TZ": ("UTC", "Asia/Tokyo")[number]}
        subprocess.run([sys.executable, "-c", code], cwd=source, env=environment, capture_output=True, check=True)
        built += list(target.glob("*.whl"))
    return built


def test_two_builds_are_the_same_bytes(wheels: list[Path]) -> None:
    first, second = wheels
    assert first.name == second.name == f"offsite-{PROJECT['version']}-py3-none-any.whl"
    assert first.read_bytes() == second.read_bytes()


def test_the_wheel_holds_every_module_and_a_true_record(wheels: list[Path]) -> None:
    with zipfile.ZipFile(wheels[0]) as wheel:
        contents = {name: wheel.read(name) for name in wheel.namelist()}
    packages = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    for package in packages:
        folder = package.replace(".", "/")
        modules = {f"{folder}/{path.name}" for path in (ROOT / folder).glob("*.py")}
        assert modules <= set(contents)
    assert "offsite/gone.py" not in contents
    (record,) = (name for name in contents if name.endswith(".dist-info/RECORD"))
    rows = {name: (digest, size) for name, digest, size in csv.reader(contents.pop(record).decode().splitlines())}
    assert rows.pop(record) == ("", "")
    assert rows == {
        name: (
            "sha256=" + base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode(),
            str(len(content)),
        )
        for name, content in contents.items()
    }


def test_the_bill_of_materials_lists_what_is_locked(wheels: list[Path]) -> None:
    with zipfile.ZipFile(wheels[0]) as wheel:
        bill = json.loads(wheel.read(f"offsite-{PROJECT['version']}.dist-info/sboms/offsite.cdx.json"))
    assert (bill["bomFormat"], bill["specVersion"]) == ("CycloneDX", "1.6")
    assert bill["metadata"]["component"]["purl"] == f"pkg:pypi/offsite@{PROJECT['version']}"
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    packages = dict(line.split("==") for line in lines)
    parts = {part["name"]: part.get("version") for part in bill["components"]}
    assert parts == packages | {"torch": None}
    (root,) = bill["dependencies"]
    assert set(root["dependsOn"]) == {part["bom-ref"] for part in bill["components"]}
    assert len(root["dependsOn"]) == len(bill["components"])
