"""The running site: keeps a SuperNode alive and answers the messages that come through it, until a signal."""

import logging
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import httpx
from flwr.supercore.inflatable.inflatable_utils import ObjectPullError
from flwr.supercore.run import RunNotRunningException

from offsite.client.home.redact import local_message
from offsite.client.network.executor import Executor, Handler
from offsite.protos.flower_process import FlowerProcess
from offsite.protos.guard import VARIABLE, new_secret
from offsite.protos.proxies import VARIABLE as PROXY

log = logging.getLogger("offsite.client")
IDLE_SECONDS = 0.2
# A node that came back is refused until the coordinator has seen it gone: twice `client.network.supernode`'s heartbeat.
BACKOFF_SECONDS = (1.0, 15.0)
# Flower's last words when the SuperNode ends, and their meaning for the owner.
MEANINGS = {
    "Failed to activate SuperNode": "the coordinator does not let this site in yet, which passes within 20 s where one "
    "of the two has just started; if it lasts: the owner signs the newest welcome, another copy of this site is "
    "connected, or the site was revoked",
    "terminated gracefully": "the coordinator refused this site's node key (401): is the clock off, or was the site "
    "revoked? run offsite client doctor",
    "SSL/TLS handshake error": "the coordinator does not show the pinned authority's certificate; is a proxy breaking "
    "TLS open?",
    "ProxyError": "the proxy that site.toml names does not let this site through; run offsite client doctor",
}


@dataclass(frozen=True)
class SuperNodeConfig:
    """Files and addresses of a Flower SuperNode.

    Attributes:
      folder: folder for log, secrets and Flower's own files.
      superlink: host:port of the coordinator's SuperLink.
      ca: PEM file of the coordinator's authority.
      key: file of the P-384 private key, OpenSSH format.
      port: port of the local interface, on loopback.
      proxy: address of the proxy on the way to the coordinator; empty for the straight way.
    """

    folder: Path
    superlink: str
    ca: Path
    key: Path
    port: int
    proxy: str = field(default="", repr=False)


class Node:
    """A SuperNode with our executor behind it.

    Args:
      config: files and addresses of the SuperNode.
      handle: function from stage and bytes to this site's answer, bytes.
      largest: function that returns the bytes of the longest honest message now.
      note: function that writes a kind and a reason to the owner's audit log.
      stopping: function that says whether to end.
    """

    def __init__(
        self,
        config: SuperNodeConfig,
        handle: Handler,
        *,
        largest: Callable[[], int],
        note: Callable[[str, str], None],
        stopping: Callable[[], bool],
    ) -> None:
        self._note, self._stopping = note, stopping
        folder = config.folder
        guard, secret = new_secret(folder / "guard"), new_secret(folder / "superexec")
        local = f"127.0.0.1:{config.port}"
        self._process = FlowerProcess(
            "offsite.client.network.supernode",
            [
                *("--superlink", config.superlink, "--root-certificates", str(config.ca.resolve())),
                *("--auth-supernode-private-key", str(config.key.resolve())),
                *("--host", "127.0.0.1", "--port", str(config.port), "--isolation", "process"),
                *("--superexec-auth-secret-file", str((folder / "superexec").resolve())),
            ],
            log=folder / "supernode.log",
            home=folder / "home",
            environment={VARIABLE: str((folder / "guard").resolve()), PROXY: config.proxy},
        )
        self._executor = Executor(
            local,
            guard=guard,
            secret=secret.encode(),
            handle=handle,
            largest=largest,
            on_refused=note,
            stopping=stopping,
        )
        self._wait = BACKOFF_SECONDS[0]
        self._started = 0.0
        self._last_reason = ""
        self._faults: set[str] = set()  # each fault is noted once

    def run(self) -> None:
        """Answers messages until `stopping`, and starts the SuperNode again whenever it has ended."""
        try:
            while not self._stopping():
                self._keep_alive()
                if not self._step():
                    time.sleep(IDLE_SECONDS)
        finally:
            self._executor.close()
            self._process.stop()

    def _step(self) -> bool:
        try:
            return self._executor.step()
        except (httpx.HTTPError, ObjectPullError, RuntimeError, RunNotRunningException) as error:
            # The SuperNode is starting, or a coordinator was killed and its run is gone; both pass.
            log.debug("no message could be answered (%s)", type(error).__name__)
        except Exception as error:  # no message of the other side may end this site
            if (reason := local_message(error)) not in self._faults:
                self._faults.add(reason)
                self._note("message not understood", reason)
                log.warning("a message could not be answered: %s", reason)
        return False

    def _keep_alive(self) -> None:
        if self._process.running:
            if time.monotonic() - self._started > BACKOFF_SECONDS[1]:
                self._wait = BACKOFF_SECONDS[0]
            return
        if self._started:
            self._note_end(self._process.reason(MEANINGS))
            pause = self._wait * (1 + secrets.randbelow(1000) / 2000)  # all sites lost it at the same moment
            self._wait = min(2 * self._wait, BACKOFF_SECONDS[1])
            self._sleep(pause)
            if self._stopping():
                return
        self._process.start()
        self._started = time.monotonic()

    def _note_end(self, reason: str) -> None:
        """Writes down why the SuperNode ended, once for each reason, since the SuperNode starts again and again."""
        reason = next((meaning for sign, meaning in MEANINGS.items() if sign in reason), reason)
        if reason != self._last_reason:
            self._last_reason = reason
            self._note("supernode ended", reason)
            log.warning("not connected yet: %s; trying again", reason)

    def _sleep(self, seconds: float) -> None:
        until = time.monotonic() + seconds
        while time.monotonic() < until and not self._stopping():
            time.sleep(IDLE_SECONDS)
