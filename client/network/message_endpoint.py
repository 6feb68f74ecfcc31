"""A site's end of the signed exchange: opens letters of its coordinator, each at most once, and signs the answers."""

import json
from collections.abc import Callable
from pathlib import Path

from offsite.client.home.redact import for_peer
from offsite.errors import DataError, MalformedMessage, OffsiteError, ProtocolViolation
from offsite.protos import codec, signed_messages
from offsite.trust import files
from offsite.trust.identity import Identity

Handler = Callable[[str, bytes], bytes]


class SignedEndpoint:
    """Turns letters into calls of a handler.

    Args:
      site: name of this site.
      identity: signing key of this site.
      coordinator: Ed25519 key of the coordinator, pinned when the site joined.
      federation: SHA-256 of the federation manifest that the owner signed.
      memory: file that holds the number of the newest letter.
      handle: function from stage and body to the body of the answer.
      on_refused: function that gets the reason why a letter was not opened.
    """

    def __init__(
        self,
        site: str,
        identity: Identity,
        *,
        coordinator: bytes,
        federation: bytes,
        memory: Path,
        handle: Handler,
        on_refused: Callable[[str], None],
    ) -> None:
        self._site, self._identity, self._coordinator, self._federation = site, identity, coordinator, federation
        self._memory, self._handle, self._on_refused = memory, handle, on_refused

    def answer(self, stage: str, data: bytes) -> bytes:
        """Returns the signed answer to a letter; a letter that may not be opened gets the kind of the refusal alone."""
        number = 0
        try:
            letter = signed_messages.read(
                data, self._federation, sender=signed_messages.COORDINATOR, key=self._coordinator, recipient=self._site
            )
            number = letter.number
            if letter.stage != stage:
                raise ProtocolViolation(
                    f"stage={stage!r}: the letter inside is about {letter.stage!r}; drop the letter"
                )
            self._claim(number)
            body = self._handle(stage, letter.body)
        except OffsiteError as error:
            self._on_refused(f"{type(error).__name__}: {error}")
            body = codec.encode(for_peer(codec.Refusal(type(error).__name__, str(error))))
        return signed_messages.write(
            self._identity,
            self._federation,
            sender=self._site,
            recipient=signed_messages.COORDINATOR,
            stage=stage,
            number=number,
            body=body,
        )

    def _claim(self, number: int) -> None:
        last = self._last()
        if number <= last:
            raise ProtocolViolation(
                f"letter number={number}: {last} was opened already, and numbers only go up; drop this copy"
            )
        try:
            files.write_atomically(self._memory, json.dumps({"last": number}).encode())
        except DataError as error:
            raise DataError(
                f"state={self._memory.name}: cannot be written ({files.why(error)}); free disk space"
            ) from error

    def _last(self) -> int:
        if not self._memory.exists():
            return 0
        try:
            return int(json.loads(self._memory.read_text(encoding="ascii"))["last"])
        except (ValueError, KeyError, TypeError) as error:
            raise MalformedMessage(
                f"state={self._memory.name}: damaged; sign a new epoch, then remove this file of the old one"
            ) from error
