"""`--engine flower`: the same rounds over Flower's simulation runtime, sites behind a ClientApp in a Ray actor."""

import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from offsite.client.site.round_handler import Site
from offsite.client.training.emulator_session import EmulatorSession
from offsite.coordinator.job.store import Progress
from offsite.coordinator.rounds.exchange import Exchange
from offsite.errors import ConfigError, OffsiteError
from offsite.protos.flower_process import QUIET
from offsite.protos.job_manifest import JobManifest
from offsite.protos.proxies import forget_proxies
from offsite.simulation.engine import Display, Sessions
from offsite.simulation.run_folder import Run, simulated_sessions

STAGE_DEADLINE = 3600.0

_SITES: dict[tuple[str, str], Site] = {}
_SESSIONS: dict[str, dict[str, EmulatorSession]] = {}


def open_site(folder: str, name: str) -> Site:
    """Returns a site of a run folder, opened once in this process; a site keeps a round's keys between messages."""
    if (folder, name) not in _SITES:
        run = Run.open(Path(folder))
        manifest = run.store.job()
        if manifest is None:
            raise ConfigError(f"run={folder!r}: no prepared job; start the run again")
        if folder not in _SESSIONS:
            _SESSIONS[folder] = simulated_sessions(run, manifest)
        _SITES[folder, name] = run.site(name, manifest, _SESSIONS[folder][name])
    return _SITES[folder, name]


def flower_engine(
    run: Run,
    manifest: JobManifest,
    sessions: Sessions,
    display: Display,
    rounds: Callable[[Exchange], Progress],
) -> Progress:
    """Runs the rounds over Flower's simulation runtime.

    One Ray actor serves all sites, so that a site still has its keys at its next message. The actor loads the emulator
    from the package, as a real site does.

    Raises:
      ConfigError: the extra `simulation` is not installed.
    """
    os.environ.update(QUIET)
    forget_proxies()  # Ray's processes talk over loopback, and each has libraries of its own
    try:
        import ray  # noqa: F401
    except ImportError as error:
        raise ConfigError("engine='flower': Ray is not installed; run pip install 'offsite[simulation]'") from error
    from flwr.serverapp import Grid, ServerApp
    from flwr.simulation import run_simulation

    from offsite.client.network.flower_app import client_app
    from offsite.coordinator.network.flower_exchange import GridExchange, meet

    folder = str(run.store.folder.resolve())
    names = list(manifest.sites)
    outcome: list[Progress | BaseException] = []
    coordinator = ServerApp()

    @coordinator.main()
    def main(grid: Grid, context: Any) -> None:
        try:
            nodes = meet(grid, sites=len(names), deadline=STAGE_DEADLINE)
            outcome.append(rounds(GridExchange(grid, nodes=lambda: nodes, deadline=STAGE_DEADLINE)))
        except (OffsiteError, KeyboardInterrupt) as error:
            outcome.append(error)

    display.step("start Flower's simulation runtime")
    logging.getLogger("flwr").setLevel(logging.ERROR)
    cores = os.cpu_count() or 1
    run_simulation(
        server_app=coordinator,
        client_app=client_app(lambda context: open_site(folder, names[int(context.node_config["partition-id"])])),
        num_supernodes=len(names),
        backend_config={"client_resources": {"num_cpus": cores, "num_gpus": 0.0}, "init_args": {"num_cpus": cores}},
    )
    if not outcome:
        raise ConfigError("engine='flower': the runtime ended before the first round; see its messages above")
    if isinstance(outcome[0], BaseException):
        raise outcome[0]
    return outcome[0]
