"""The pages of docs/ against the code: generated pages are fresh, every key has a text, every link leads somewhere."""

import ast
import dataclasses
import importlib
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from offsite.client.home.policy import Policy
from offsite.client.home.settings import SiteSettings
from offsite.coordinator.config.federation_file import FedConfig
from offsite.coordinator.home.settings import HomeSettings
from offsite.emulator.compressors import COMPRESSORS
from offsite.task.readers.tables import READERS
from offsite.task.record_fields import FIELDS
from tests.docs import configuration, methods
from tests.docs.blocks import PAGES

ROOT = Path(__file__).resolve().parents[2]
README = ROOT / "README.md"
ROOMS = (
    "adapter|bench|cli|client|coordinator|demo|deploy|emulator|errors|examples|privacy|protos|secagg|simulation|task"
)
ROOMS += "|tests|trust"


@pytest.mark.parametrize("module", [configuration, methods])
def test_a_generated_page_is_fresh(module) -> None:
    """`make docs` writes it; tests/test_house.py compares docs/tree.md."""
    page = ROOT / "docs" / f"{module.__name__.rpartition('.')[2]}.md"
    assert module.page() == page.read_text(encoding="utf-8")


@pytest.mark.parametrize("file", [FedConfig, HomeSettings, SiteSettings])
def test_every_key_has_a_text_and_every_text_a_key(file) -> None:
    for _, kind, _ in configuration.tables(file):
        texts = configuration.texts(kind)
        assert list(texts) == [field.name for field in dataclasses.fields(kind)], kind
        assert all(text.endswith(".") and len(text.split()) > 2 for text in texts.values()), kind


def test_every_key_of_the_policy_has_a_text() -> None:
    keys = [key for key, *_ in configuration.policy_rows()]
    assert sorted(keys) == sorted(field.name for field in dataclasses.fields(Policy))


def test_every_key_stands_on_the_page() -> None:
    """By another route than the generator's: the fields as they stand in the source."""
    page = (ROOT / "docs" / "configuration.md").read_text()
    names = [
        line.target.id
        for path in (ROOT / "coordinator" / "config").glob("*.py")
        for kind in ast.parse(path.read_text()).body
        if isinstance(kind, ast.ClassDef) and kind.name.endswith("Config")
        for line in kind.body
        if isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name)
    ]
    assert len(names) > 60
    for name in names:
        assert re.search(rf"`(\w+(\[\])?\.)*{name}`|### \[+(\w+\.)*{name}\]+", page), name


def test_the_tasks_with_their_fields() -> None:
    page = (ROOT / "docs" / "data.md").read_text()
    rows = re.findall(r"(?m)^\| `(\w+)`[^|]*\| (.+) \|$", page)
    first = reversed(rows)  # a later table says what is measured for each task
    shown = {task: set(re.findall(r"`(\w+)`", cell)) for task, cell in first if task in FIELDS}
    assert {task: set(fields) for task, fields in FIELDS.items()} == shown


def test_the_readers() -> None:
    page = (ROOT / "docs" / "data.md").read_text().split("| `data.reader` |")[1].split("\n\n")[0]
    assert set(re.findall(r"`(\w+)`", "".join(re.findall(r"(?m)^\| ([^|]+) \|", page)))) == set(READERS)


def test_the_compressors() -> None:
    page = (ROOT / "docs" / "emulators.md").read_text()
    assert [name for name in COMPRESSORS if not re.search(rf"`{name}\b", page)] == []


def test_the_floors_are_those_of_the_import_contract() -> None:
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    layers = next(contract["layers"] for contract in contracts if contract["type"] == "layers")
    drawn = (ROOT / "docs" / "architecture.md").read_text().split("## Rooms and floors")[1].split("```text\n")[1]
    floors = [line.split("  ")[0] for line in drawn.split("```")[0].splitlines()]
    assert floors == [layer.replace("offsite.", "") for layer in layers]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_paths_that_a_page_names_are_there(page: Path) -> None:
    """Files of this repository, and names in its tables, by their places."""
    text = page.read_text(encoding="utf-8")
    for path in re.findall(rf"(?<![\w./-])((?:{ROOMS})/[\w/*-]+\.(?:py|c|proto|sh|json|yml))\b", text):
        assert list(ROOT.glob(path)), f"{page.name}: {path}"
    for name in re.findall(rf"`(?:offsite\.)?((?:{ROOMS})(?:\.[a-z_]+)*\.[A-Z][A-Z_]+)`", text):
        module, _, table = name.rpartition(".")
        assert hasattr(importlib.import_module(f"offsite.{module}"), table), f"{page.name}: {name}"


def test_the_readme_is_short() -> None:
    text = README.read_text(encoding="utf-8")
    assert text.count("\n") <= 200
    assert len(text.encode()) <= 14_000


def test_links_of_the_pages_outside_the_site() -> None:
    """Those of docs/ are followed by the builder."""
    for page in (README, ROOT / "CONTRIBUTING.md", ROOT / "SECURITY.md", ROOT / "CHANGELOG.md"):
        for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text(encoding="utf-8")):
            assert target.startswith("https://") or (ROOT / target).exists(), f"{page.name}: {target}"


def test_the_site_builds_without_a_broken_link(tmp_path: Path) -> None:
    (tmp_path / "mkdocs.yml").write_bytes((ROOT / "mkdocs.yml").read_bytes())
    shutil.copytree(ROOT / "docs", tmp_path / "docs")
    command = [str(Path(sys.executable).with_name("zensical")), "build", "--strict", "--config-file", "mkdocs.yml"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    pages = {str(path.relative_to(ROOT / "docs").with_suffix(".html")) for path in (ROOT / "docs").rglob("*.md")}
    site = tmp_path / "build" / "site"
    assert pages <= {str(path.relative_to(site)) for path in site.rglob("*.html")}


def test_a_broken_link_fails_the_build(tmp_path: Path) -> None:
    (tmp_path / "mkdocs.yml").write_text("site_name: x\nsite_dir: site\n")
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "index.md").write_text("# x\n\n[gone](gone.md)\n")
    command = [str(Path(sys.executable).with_name("zensical")), "build", "--strict", "--config-file", "mkdocs.yml"]
    assert subprocess.run(command, cwd=tmp_path, capture_output=True, check=False).returncode != 0
