"""An exchange that writes the awaited sites into the coordinator's status."""

from collections.abc import Mapping

from offsite.coordinator.home.status import Status
from offsite.coordinator.rounds.exchange import Exchange


class StatusReportingExchange:
    """An exchange around another exchange.

    Args:
      exchange: exchange that carries the stages.
      status: status of the coordinator.
    """

    def __init__(self, exchange: Exchange, status: Status) -> None:
        self._exchange, self._status = exchange, status

    def send(self, stage: str, payloads: Mapping[str, bytes]) -> dict[str, bytes]:
        """Writes the stage and the awaited sites into the status, then sends the stage."""
        self._status.set("in a round", stage=stage, awaited=sorted(payloads))
        return self._exchange.send(stage, payloads)
