"""`--engine flower`: the same rounds over Flower's simulation runtime, sites behind a ClientApp in a Ray actor."""

import logging
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from cli.run import Run, simulated_benches
from client.site import Site
from client.workbench import Workbench
from coordinator.exchange import Exchange
from coordinator.store import Progress
from errors import ConfigError, OffsiteError
from protos.flower_process import QUIET
from protos.manifest import JobManifest

STAGE_DEADLINE = 3600.0

_SITES: dict[tuple[str, str], Site] = {}
_BENCHES: dict[str, dict[str, Workbench]] = {}


def open_site(folder: str, name: str) -> Site:
    """Returns the site of a run folder, opened once in this process; a round's keys live in it between messages."""
    if (folder, name) not in _SITES:
        run = Run.open(Path(folder))
        manifest = run.job()
        if manifest is None:
            raise ConfigError(f"run={folder!r}: no prepared job; start the run again")
        if folder not in _BENCHES:
            _BENCHES[folder] = simulated_benches(run, manifest)
        _SITES[folder, name] = run.site(name, manifest, _BENCHES[folder][name])
    return _SITES[folder, name]


def flower_engine(
    run: Run,
    manifest: JobManifest,
    benches: Mapping[str, Workbench],
    display: Any,
    rounds: Callable[[Exchange], Progress],
) -> Progress:
    """Runs the rounds over Flower's simulation runtime.

    One Ray actor serves all sites, so that a site finds its keys again at its next message; the emulator is loaded in
    that actor, from the package, as at a real site.

    Raises:
      ConfigError: the extra `simulation` is not installed.
    """
    os.environ.update(QUIET)
    try:
        import ray  # noqa: F401
    except ImportError as error:
        raise ConfigError("engine='flower': Ray is not installed; run pip install 'offsite[simulation]'") from error
    from flwr.serverapp import Grid, ServerApp
    from flwr.simulation import run_simulation

    from client.flower_edge import client_app
    from coordinator.flower_edge import GridExchange, meet

    folder = str(run.store.folder.resolve())
    names = [name for name, _ in manifest.roster]
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
