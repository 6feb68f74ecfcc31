"""The lock files, the wheel and its bill of materials: what is installed is what was tested."""

import base64
import csv
import hashlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from importlib.metadata import version
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
ASKED = {
    "requirements.lock": [*PROJECT["dependencies"], *EXTRAS["demo"]],
    "requirements-dev.lock": [
        *PROJECT["dependencies"],
        *(line for name in ("dev", "simulation", "diffusion", "measures", "demo", "docs") for line in EXTRAS[name]),
    ],
    "requirements-extra.lock": [*EXTRAS["bitsandbytes"], *EXTRAS["bench"]],
}
LOCKS = tuple(ASKED)


def locked(name: str) -> dict[str, tuple[str, set[str]]]:
    """Returns version and hashes of each package of a lock file, which has nothing else in it."""
    found = {}
    text = (ROOT / name).read_text().replace("\\\n", " ")
    for line in text.splitlines():
        pin, *hashes = line.split()
        package, _, number = pin.partition("==")
        assert all(re.fullmatch(r"--hash=sha256:[0-9a-f]{64}", one) for one in hashes), line
        found[canonicalize_name(package)] = (number, set(hashes))
    return found


@pytest.mark.parametrize("name", LOCKS)
def test_every_package_has_one_version_and_its_hashes(name: str) -> None:
    packages = locked(name)
    assert all(number and hashes for number, hashes in packages.values())
    assert not [one for one in packages if re.match(r"torch$|triton|nvidia|cuda", one)]
    assert "://" not in (ROOT / name).read_text()


@pytest.mark.parametrize("name", LOCKS)
def test_every_requirement_of_the_program_is_locked(name: str) -> None:
    packages = locked(name)
    for requirement in map(Requirement, ASKED[name]):
        if requirement.name != "torch":
            assert requirement.specifier.contains(packages[canonicalize_name(requirement.name)][0]), requirement


def test_the_locks_agree_with_each_other_and_with_what_is_tested() -> None:
    small, large = locked("requirements.lock"), locked("requirements-dev.lock")
    assert all(large[name] == entry for name, entry in small.items())
    for name, (number, _) in large.items():
        assert version(name) == number


def test_every_way_to_install_asks_for_hashes() -> None:
    for name, lock in (("Dockerfile", "requirements.lock"), ("README.md", "requirements.lock")):
        assert re.search(
            rf"pip install --require-hashes --no-deps (-r|--requirement) {lock}", (ROOT / name).read_text()
        )
    makefile = (ROOT / "Makefile").read_text()
    assert "LOCKED := --require-hashes --no-deps --requirement" in makefile
    installs = re.findall(r"pip install (.*)", makefile + (ROOT / "Dockerfile").read_text())
    free = [line for line in installs if "--require-hashes" not in line and "$(LOCKED)" not in line]
    assert all(re.search(r"\$[({]TORCH[)}]|--no-index --no-deps|uv==\$\(UV\)", line) for line in free), free
    assert len(free) == 5


def test_a_file_with_another_hash_is_not_installed(tmp_path: Path) -> None:
    """pip itself, with a lock of one package whose file was changed by a byte."""
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        archive.writestr("locked-1.dist-info/METADATA", "Metadata-Version: 2.1\nName: locked\nVersion: 1\n")
        archive.writestr("locked-1.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr("locked-1.dist-info/RECORD", "")
    (tmp_path / "locked-1-py3-none-any.whl").write_bytes(content.getvalue())
    right, wrong = (hashlib.sha256(content.getvalue() + more).hexdigest() for more in (b"", b"\0"))
    command = [sys.executable, "-m", "pip", "install", "--no-index", "--find-links", str(tmp_path), "--dry-run"]
    for digest, code in ((right, 0), (wrong, 1)):
        (tmp_path / "lock").write_text(f"locked==1 --hash=sha256:{digest}\n")
        command_of = [*command, "--require-hashes", "--no-deps", "--requirement", str(tmp_path / "lock")]
        done = subprocess.run(command_of, capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == code, done.stderr
    assert "DO NOT MATCH THE HASHES" in done.stderr


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
    parts = {part["name"]: part.get("version") for part in bill["components"]}
    assert parts == {name: number for name, (number, _) in locked("requirements.lock").items()} | {"torch": None}
    (root,) = bill["dependencies"]
    assert set(root["dependsOn"]) == {part["bom-ref"] for part in bill["components"]}
    assert len(root["dependsOn"]) == len(bill["components"])
