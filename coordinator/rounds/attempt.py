"""One attempt at a round, kept on disk stage by stage, so that a coordinator that was killed goes on inside the round.

A round is a fixed computation on the answers of the sites. With the answers of every whole stage on disk, running it
again asks the sites only for missing answers; a site gives the same answer twice or refuses. A round that cannot go on
is tried afresh: new nonce, new keys, new masks.
"""

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from offsite.coordinator.rounds.counter import MonotonicCounter
from offsite.coordinator.rounds.exchange import Exchange
from offsite.coordinator.rounds.round import SECRET_BYTES, RoundPlan
from offsite.errors import DataError, MalformedMessage
from offsite.trust.files import PRIVATE, write_atomically
from offsite.trust.wire import Reader, Writer

MAX_STAGE_BYTES = 1 << 40
MAX_REPLY_BYTES = 1 << 30
DIGEST_BYTES = 32
PLAN = "plan.json"
MASKED_UPLOAD_STAGE = "masked"  # the stage in which updates leave their sites
PLAINTEXT_UPLOAD_STAGE = "update"  # the same stage in a job without secure aggregation


@dataclass(frozen=True)
class Count:
    """Numbers that are kept over a whole job.

    Attributes:
      spent: number of attempts in which updates may have left their sites.
    """

    spent: int = 0


class Attempts:
    """The attempts of one run.

    Args:
      folder: run folder.
      nonce: returns 32 fresh random bytes.
      counter: source of aggregation numbers; a site refuses an aggregation that is not newer than its last.
    """

    def __init__(self, folder: Path, nonce: Callable[[], bytes], counter: MonotonicCounter) -> None:
        self._counts, self._folder, self._nonce = folder / "attempts.json", folder / "attempt", nonce
        self._counter = counter

    @property
    def count(self) -> Count:
        """The numbers as they stand now.

        Raises:
          DataError: the file is damaged.
        """
        if not self._counts.exists():
            return Count()
        try:
            return Count(**json.loads(self._counts.read_text(encoding="utf-8")))
        except (ValueError, TypeError) as error:
            raise DataError(f"run={str(self._folder.parent)!r}: attempts.json is damaged; start a new run") from error

    def open(self, number: int, cohort: Callable[[], tuple[str, ...]], exchange: Exchange) -> "Attempt":
        """Returns the attempt at a round that a killed process left, or else a new attempt.

        Args:
          number: number of the round, from 1.
          cohort: returns the sites of a new attempt.
          exchange: exchange with the sites.

        Raises:
          DataError: the attempt on disk is damaged, or a new attempt cannot be written.
        """
        plan = self._left(number)
        resumed = plan is not None
        if plan is None:
            self.close()
            plan = RoundPlan(number, self._counter.next(), self._nonce(), cohort())
            _make(self._folder)
            # private: the plan holds the secret that opens single updates
            write_atomically(self._folder / PLAN, _write_plan(plan), mode=PRIVATE)
        return Attempt(plan, exchange, self._folder, resumed=resumed, on_spend=self._spend)

    def close(self) -> None:
        """Forgets the open attempt, because its round is stored or given up."""
        if self._folder.exists():
            # the plan first: a kill in between must not leave a plan without the answers of its stages
            (self._folder / PLAN).unlink(missing_ok=True)
            shutil.rmtree(self._folder)

    def _left(self, number: int) -> RoundPlan | None:
        path = self._folder / PLAN
        if not path.exists():
            return None
        plan = _read_plan(path)
        return plan if plan.number == number else None

    def _spend(self) -> None:
        write_atomically(self._counts, json.dumps({"spent": self.count.spent + 1}).encode())


class Attempt:
    """An exchange that keeps the answers of each whole stage.

    Args:
      plan: plan of the round.
      exchange: exchange with the sites.
      folder: folder with a file for each whole stage.
      resumed: whether some stages may be whole already.
      on_spend: called once, before the first update can leave a site.
    """

    def __init__(
        self, plan: RoundPlan, exchange: Exchange, folder: Path, *, resumed: bool, on_spend: Callable[[], None]
    ) -> None:
        self.plan, self.resumed = plan, resumed
        self._exchange, self._folder, self._on_spend = exchange, folder, on_spend

    def send(self, stage: str, payloads: Mapping[str, bytes]) -> dict[str, bytes]:
        """Returns the answers to a stage: from disk if the stage was whole, else from the sites."""
        path, asked = self._folder / f"{stage}.replies", _digest(stage, payloads)
        if path.exists():
            return _read(path, asked)
        if stage in (MASKED_UPLOAD_STAGE, PLAINTEXT_UPLOAD_STAGE) and not (mark := self._folder / "spent").exists():
            self._on_spend()
            write_atomically(mark, b"")
        replies = self._exchange.send(stage, payloads)
        writer = Writer().field(asked)
        for site, body in sorted(replies.items()):
            writer.text(site).field(body)
        content = writer.done()
        write_atomically(path, content + hashlib.sha256(content).digest())
        return replies


def _make(folder: Path) -> None:
    try:
        folder.mkdir()
    except OSError as error:
        raise DataError(
            f"folder={str(folder)!r}: cannot be made ({error.strerror}); free disk space, then run again"
        ) from error


def _write_plan(plan: RoundPlan) -> bytes:
    content = {"number": plan.number, "sequence": plan.sequence, "cohort": list(plan.cohort)}
    return json.dumps(content | {"nonce": plan.nonce.hex(), "secret": plan.secret.hex()}).encode()


def _read_plan(path: Path) -> RoundPlan:
    content = path.read_bytes()
    try:
        plan = json.loads(content)
        nonce, secret = bytes.fromhex(plan["nonce"]), bytes.fromhex(plan["secret"])
        read = RoundPlan(plan["number"], plan["sequence"], nonce, tuple(plan["cohort"]), secret)
        if _write_plan(read) != content or (len(nonce), len(secret)) != (DIGEST_BYTES, SECRET_BYTES):
            raise ValueError("not as it was written")
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"attempt={path.name} is damaged; remove {path.parent}, and the round is tried anew") from error
    return read


def _digest(stage: str, payloads: Mapping[str, bytes]) -> bytes:
    writer = Writer().text(stage)
    for site, body in sorted(payloads.items()):
        writer.text(site).field(hashlib.sha256(body).digest())
    return hashlib.sha256(writer.done()).digest()


def _read(path: Path, asked: bytes) -> dict[str, bytes]:
    stored = path.read_bytes()
    content, checksum = memoryview(stored)[:-DIGEST_BYTES], stored[-DIGEST_BYTES:]
    try:
        if hashlib.sha256(content).digest() != checksum:
            raise MalformedMessage("damaged")
        reader = Reader(bytes(content), "stage", limit=MAX_STAGE_BYTES)
        if reader.field(exactly=DIGEST_BYTES) != asked:
            raise MalformedMessage("answers to another question")
        replies = {}
        while reader.more():
            site = reader.text()
            replies[site] = reader.field(limit=MAX_REPLY_BYTES)
    except MalformedMessage as error:
        raise DataError(
            f"attempt={path.name}: not the answers of this round ({error}); remove {path.parent}, "
            "and the round is tried anew"
        ) from error
    return replies
