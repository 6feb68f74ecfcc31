"""The one seam between a round and its transport: send a stage to sites, gather their answers."""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Protocol, TypeVar

from offsite.errors import MalformedMessage, OffsiteError, TooFewSurvivors
from offsite.protos import codec
from offsite.protos.messages import printable

M = TypeVar("M")
MAX_REASON_LENGTH = 500


class Exchange(Protocol):
    """Carries one stage to a cohort; a site that does not answer is missing from the replies."""

    def send(self, stage: str, payloads: Mapping[str, bytes]) -> dict[str, bytes]:
        """Returns the answers of the sites that gave one, by site."""


class MemoryExchange:
    """Calls the sites of the same process, one after the other, with the bytes that a network would carry.

    Args:
      sites: function (stage, body) -> answer, by site.
      on_call: called with (stage, site) before each call, for progress displays.
    """

    def __init__(
        self,
        sites: Mapping[str, Callable[[str, bytes], bytes]],
        on_call: Callable[[str, str], None] = lambda stage, site: None,
    ) -> None:
        self._sites, self._on_call = sites, on_call

    def send(self, stage: str, payloads: Mapping[str, bytes]) -> dict[str, bytes]:
        """Returns every addressed site's answer."""
        replies = {}
        for site, body in payloads.items():
            self._on_call(stage, site)
            replies[site] = self._sites[site](stage, body)
        return replies


@dataclass
class Traffic:
    """Bytes on the wire, over all sites.

    Attributes:
      down: bytes that went to sites.
      up: bytes that came back.
    """

    down: int = 0
    up: int = 0


@dataclass(frozen=True)
class Refused:
    """A site that left a round.

    Attributes:
      site: name of the site.
      stage: stage in which it left.
      reason: one printable line.
    """

    site: str
    stage: str
    reason: str


def cut(text: str) -> str:
    """Returns another party's text as one printable line of at most `MAX_REASON_LENGTH` characters."""
    return printable(text, MAX_REASON_LENGTH)


class Conversation:
    """An exchange behind the codec: messages instead of bytes; counts traffic and collects refusals.

    Args:
      exchange: exchange with the sites.
    """

    def __init__(self, exchange: Exchange) -> None:
        self._exchange = exchange
        self.traffic = Traffic()
        self.refused: list[Refused] = []

    def ask(self, stage: str, messages: Mapping[str, codec.Message], answer: type[M]) -> dict[str, M]:
        """Sends one message to each site and returns the answers of the expected type, by site.

        A refusal, or an answer that does not decode, drops the site from this round and is kept in `refused`.

        Args:
          stage: name of the stage.
          messages: message by site.
          answer: type of the expected answers.
        """
        payloads = {site: codec.encode(message) for site, message in messages.items()}
        self.traffic.down += sum(map(len, payloads.values()))
        answers: dict[str, M] = {}
        for site, body in sorted(self._exchange.send(stage, payloads).items()):
            self.traffic.up += len(body)
            try:
                message = codec.decode(body)
            except MalformedMessage as error:
                self.drop(site, stage, str(error))
                continue
            if isinstance(message, answer):
                answers[site] = message
            elif isinstance(message, codec.Refusal):
                self.drop(site, stage, f"{message.kind}: {message.reason}")
            else:
                self.drop(site, stage, f"answered with {type(message).__name__} instead of {answer.__name__}")
        for site in sorted(set(messages) - set(answers) - {r.site for r in self.refused}):
            self.drop(site, stage, "did not answer")
        return answers

    def drop(self, site: str, stage: str, reason: str) -> None:
        """Notes that a site is out of this round, and the reason, which may be the site's own words."""
        self.refused.append(Refused(site, stage, cut(reason)))

    def guard(self, site: str, stage: str, action: Callable[[], None]) -> None:
        """Takes in one site's answer; a bad answer costs its site the round, and no other."""
        try:
            action()
        except OffsiteError as error:
            self.drop(site, stage, str(error))

    def alive(self, answers: Collection[str]) -> list[str]:
        """Returns the sites that answered and are still in the round."""
        gone = {refused.site for refused in self.refused}
        return [site for site in answers if site not in gone]

    def enough(self, alive: Collection[str], needed: int, stage: str) -> None:
        """Checks that enough sites are left for the round to go on.

        Raises:
          TooFewSurvivors: fewer than `needed` sites are left; the message names the first refusal.
        """
        if len(alive) < needed:
            first = f"; first refusal: {self.refused[0].site}: {self.refused[0].reason}" if self.refused else ""
            raise TooFewSurvivors(f"sites={len(alive)} after {stage}: {needed} are needed in a round{first}")
