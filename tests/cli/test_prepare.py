"""The demo's input: verified and made once; any change gives an error of one line."""

import hashlib
import io
import json
import sys
import tarfile
from pathlib import Path

import pytest

from offsite.demo import speeches
from offsite.errors import ConfigError, DataError, DigestMismatch


def npm_archive(path: Path) -> None:
    """Writes an archive with the layout of the real texts: six addresses of two owners, two chapters."""
    files = {"package/moby-dick/data/chapter_1.txt": "Call me", "package/moby-dick/data/chapter_12.txt": "Queequeg"}
    for year in range(1790, 1796):
        name = "George Mc'Test" if year < 1795 else "Ann Other"
        record = {"year": year, "name": name, "party": "none", "text": f"address of {year}"}
        files[f"package/sotu/data/{year}_x_n.json"] = json.dumps(record)
    with tarfile.open(path, "w:gz") as tar:
        for name, text in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(text.encode())
            tar.addfile(entry, io.BytesIO(text.encode()))


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache with an archive that is already downloaded and has the announced hash."""
    place = tmp_path / "downloads" / "texts.tgz"
    place.parent.mkdir()
    npm_archive(place)
    sha256 = hashlib.sha256(place.read_bytes()).hexdigest()
    monkeypatch.setattr(speeches, "CORPORA", speeches.Archive("@x/texts@1", "texts.tgz", sha256))
    return tmp_path


def test_owners_get_folders_and_every_fourth_address_is_held_out(cache: Path) -> None:
    data = speeches.prepare_corpora(cache)
    owner = data / "sites" / "george-mc-test"
    assert sorted(p.stem for p in (owner / "heldout").iterdir()) == ["1792"]
    assert sorted(p.stem for p in (owner / "train").iterdir()) == ["1790", "1791", "1793", "1794"]
    assert sorted(p.name for p in (data / "public").iterdir()) == ["001.txt", "012.txt"]
    assert (owner / "train" / "1790.txt").read_text() == "address of 1790"
    assert speeches.prepare_corpora(cache) == data  # the second call only verifies the model


def test_an_altered_file_is_named(cache: Path) -> None:
    data = speeches.prepare_corpora(cache)
    (data / "public" / "001.txt").write_text("Call him")
    with pytest.raises(DigestMismatch, match=r"public/001\.txt.*altered"):
        speeches.prepare_corpora(cache)


def test_a_missing_file_is_named(cache: Path) -> None:
    data = speeches.prepare_corpora(cache)
    (data / "public" / "012.txt").unlink()
    with pytest.raises(DataError, match=r"public/012\.txt is missing"):
        speeches.prepare_corpora(cache)


def test_another_archive_is_refused(cache: Path) -> None:
    with (cache / "downloads" / "texts.tgz").open("ab") as file:
        file.write(b"\0")
    with pytest.raises(DigestMismatch, match="sha256="):
        speeches.prepare_corpora(cache)
    assert not (cache / "data").exists()


def test_without_npm_the_way_out_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(DataError, match="--data DIR"):
        speeches.prepare_corpora(tmp_path)


def test_the_demos_owners_follow_the_data(tmp_path: Path) -> None:
    for owner in ("b", "a", "c"):
        (tmp_path / "sites" / owner).mkdir(parents=True)
    text = speeches.demo_config(Path("m"), tmp_path)
    assert 'owners = ["a", "b", "c"]' in text
    assert str(tmp_path) in text


def test_without_the_reader_of_its_format_the_model_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in an installation without the extra `demo`, where no module of that name is found."""
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ConfigError, match=r"gguf is not installed.*pip install 'offsite\[demo\]'"):
        speeches.prepare_model(tmp_path)
    assert not (tmp_path / "downloads").exists()
