"""The hashes of a full model are those of its bytes, whatever happened to its files; unchanged files are not read."""

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO

import pytest

from offsite.coordinator.config.federation_file import read_config
from offsite.coordinator.job.model_hashes import SETTLED, model_hashes
from offsite.coordinator.job.store import MODEL_FILES, Store
from offsite.errors import DigestMismatch
from offsite.simulation.run_folder import Run

Read = Callable[[Path, Store], list[str]]
FILES = {"a.safetensors": b"one", "b.safetensors": b"two", "config.json": b"{}"}


@pytest.fixture(autouse=True)
def hashed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the weights that were read for a hash."""
    names, plain = list[str](), hashlib.file_digest

    def counted(file: BinaryIO, *arguments: Any) -> Any:
        names.extend([Path(file.name).name] if file.name.endswith(".safetensors") else [])
        return plain(file, *arguments)

    monkeypatch.setattr(hashlib, "file_digest", counted)
    return names


def settle() -> None:
    time.sleep(SETTLED + 0.1)


def right(folder: Path) -> dict[str, str]:
    return {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in sorted(FILES)}


@pytest.fixture
def read(hashed: list[str]) -> Callable[[Path, Store], list[str]]:
    """Returns a function that gives the names of the weights that were read for hashes that are right."""

    def names(folder: Path, store: Store) -> list[str]:
        hashed.clear()
        assert model_hashes(folder, store) == right(folder)
        return list(hashed)

    return names


@pytest.fixture(scope="module")
def old(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model's folder that was written a while ago."""
    folder = tmp_path_factory.mktemp("model")
    for name, content in FILES.items():
        (folder / name).write_bytes(content)
    (folder / "tokenizer.json").write_bytes(b"{}")
    settle()
    return folder


def test_an_unchanged_file_is_read_once(old: Path, tmp_path: Path, read: Read) -> None:
    store = Store(tmp_path)
    assert read(old, store) == ["a.safetensors", "b.safetensors"]
    assert read(old, store) == []
    (tmp_path / MODEL_FILES).write_text("{")
    assert len(read(old, store)) == 2
    assert read(old, store) == []


def test_every_change_is_seen(old: Path, tmp_path: Path, read: Read) -> None:
    store, path = Store(tmp_path), old / "a.safetensors"
    read(old, store)
    before = path.stat()
    path.write_bytes(b"eno")  # as many bytes
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))  # and the same time of writing
    assert read(old, store) == ["a.safetensors"]
    assert read(old, store) == ["a.safetensors"]  # it was changed just now, and may change again unseen
    settle()
    assert read(old, store) == ["a.safetensors"]
    assert read(old, store) == []
    (old / "c").write_bytes(b"new")
    os.utime(old / "c", ns=(before.st_atime_ns, before.st_mtime_ns))
    (old / "c").rename(path)
    assert read(old, store) == ["a.safetensors"]
    moved = shutil.copytree(old, tmp_path / "moved")
    assert read(moved, store) == ["a.safetensors", "b.safetensors"]


def test_a_job_is_opened_without_reading_its_packages_or_hashing_its_model(
    fed: Path, tmp_path: Path, hashed: list[str]
) -> None:
    settle()  # the model may have been written just now
    config, sha256 = read_config(fed)
    run = Run.create(config, sha256, tmp_path / "run")
    made = run.open_job()
    hashed.clear()
    again = Run.open(tmp_path / "run").open_job()
    assert hashed == []  # the model is read once, by the loader
    assert again.hashes == made.hashes
    kept = json.loads((tmp_path / "run" / MODEL_FILES).read_text())
    assert set(kept["files"]) == set(made.hashes) == {"model.safetensors", "config.json"}
    shutil.copytree(fed.parent / "model", tmp_path / "model")
    weights = tmp_path / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\0")
    elsewhere = replace(config, model=replace(config.model, path=str(tmp_path / "model")))
    with pytest.raises(DigestMismatch, match=r"^model="):
        replace(run, config=elsewhere).open_job()
