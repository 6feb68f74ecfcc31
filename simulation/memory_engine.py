"""`--engine memory`: all sites in this process, one after the other."""

from collections.abc import Callable
from functools import partial

from offsite.client.site.round_handler import answer
from offsite.coordinator.job.store import Progress
from offsite.coordinator.rounds.exchange import Exchange, MemoryExchange
from offsite.protos.job_manifest import JobManifest
from offsite.simulation.engine import Display, Sessions
from offsite.simulation.run_folder import Run


def memory_engine(
    run: Run, manifest: JobManifest, sessions: Sessions, display: Display, rounds: Callable[[Exchange], Progress]
) -> Progress:
    """Runs the rounds with all sites in this process; sites with the same emulator share its session."""
    sites = {name: run.site(name, manifest, session) for name, session in sorted(sessions.items())}
    return rounds(MemoryExchange({name: partial(answer, site) for name, site in sites.items()}, display.call))
