"""The SuperLink process: Flower's own program behind our guard; `python -m offsite.coordinator.network.superlink`."""

from importlib import import_module
from types import SimpleNamespace
from typing import Any

from offsite.protos.flower_process import allow_open_files, die_with_parent
from offsite.protos.guard import MAX_OBJECT_BYTES, Guard, RequestLimits, secret_of_environment

UPLOAD_IDLE_SECONDS = 60  # an upload that moved no piece for so long is dead; until then the others wait for it
# Paths that a SuperNode needs; all others on this port start runs, hand out tasks or describe the interface.
PUBLIC = ("/v1/fleet/", "/health")
LIMITS = RequestLimits(longer={"/v1/fleet/push-object": MAX_OBJECT_BYTES})


def main() -> None:
    """Runs Flower's SuperLink; peers reach its fleet interface only."""
    die_with_parent()
    allow_open_files()
    import flwr.supercore.corestate.sql_corestate as state
    import flwr.superlink.main as program
    import uvicorn

    command: Any = import_module("flwr.superlink.cli.flower_superlink")  # a function of this name hides it
    original, secret = program.create_app, secret_of_environment()

    def create_app(*arguments: Any, **named: Any) -> Any:
        app = original(*arguments, **named)
        app.add_middleware(Guard, secret=secret, public=PUBLIC, limits=LIMITS)
        return app

    program.create_app = create_app
    state.OBJECT_PUSH_SESSION_TTL_SECONDS = UPLOAD_IDLE_SECONDS

    def serve(**named: Any) -> None:
        # the access log would list failed requests, in any number and with the path as a stranger wrote it
        uvicorn.run(**(named | {"access_log": False}))

    command.uvicorn = SimpleNamespace(run=serve)
    command.flower_superlink()


if __name__ == "__main__":
    main()
