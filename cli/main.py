"""The command `offsite`: the only place that prints, and that turns errors into a line and an exit code."""

import contextlib
import logging
import os
import shlex
import sys
import warnings
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from offsite.cli import check, client_run, coordinator_run, emulator, methods, plan
from offsite.cli.heartbeat import Heartbeat
from offsite.cli.typer_app import command_group
from offsite.errors import ConfigError, OffsiteError, lookup
from offsite.protos.flower_process import QUIET, forbid_core_dumps
from offsite.task.determinism import refusal_of

if TYPE_CHECKING:  # needs torch, and most commands do not
    from offsite.simulation.run_folder import Run

ABOUT = "Fine-tune a model that may not leave its owner on data that may not leave theirs."
app = command_group("offsite", about=ABOUT, completion=True)

EXIT_REFUSED, EXIT_INTERRUPTED = 2, 130
TEMPLATE = """\
# offsite simulate fed.toml     every key is explained in docs/configuration.md
seed = 0

[model]
path = "model"                  # a Hugging Face folder with safetensors

[data]
public = "public.jsonl"         # records of the coordinator's own: gate, clip, acceptance test
sites_dir = "sites"             # one folder per owner, with train and heldout inside
owners = ["north", "south", "west"]

[privacy]
epsilon = 8.0
"""


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"offsite {version('offsite')}")
        raise typer.Exit


@app.callback(help=ABOUT)
def _setup(
    _: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Quietens the libraries before a command loads them."""
    os.environ.update(QUIET)  # before anything of Flower's is imported
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    # peft asks transformers under the old name; the person at the terminal can do nothing about it.
    warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning)
    handler = logging.StreamHandler(sys.stderr)
    handler.addFilter(_is_for_people)
    logging.basicConfig(level=logging.WARNING, format="%(message)s", handlers=[handler])
    logging.getLogger("offsite").setLevel(logging.INFO)


def _is_for_people(record: logging.LogRecord) -> bool:
    """Says whether a record is shown; a library that sets its own logger's level would show its steps here."""
    return record.levelno >= logging.WARNING or record.name.partition(".")[0] == "offsite"


@app.command()
def simulate(
    config: Annotated[Path | None, typer.Argument(help="federation file, for example fed.toml")] = None,
    out: Annotated[
        Path, typer.Option(help="run folder for the results: new, empty, or of a run without a whole round")
    ] = Path("runs/latest"),
    resume: Annotated[Path | None, typer.Option(help="run folder of a stopped run, to continue")] = None,
    engine: Annotated[
        str, typer.Option(help="carrier of the messages: memory, or flower for Flower's simulation runtime")
    ] = "memory",
    seed: Annotated[int | None, typer.Option(help="seed in place of the file's")] = None,
    rounds: Annotated[int | None, typer.Option(help="number of training rounds in place of the file's")] = None,
    sites: Annotated[
        int | None, typer.Option(help="number of sites to keep, counted from the first in the file")
    ] = None,
    no_privacy: Annotated[
        bool, typer.Option("--no-privacy", help="training without clipping and noise, for comparison only")
    ] = False,
    device: Annotated[
        str | None, typer.Option(help="device in place of the file's: auto, cpu, cuda, cuda:N or xpu")
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help="number format in place of the file's: auto, float32, bfloat16 or float16")
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="report as JSON on standard output, in place of the text")
    ] = False,
) -> None:
    """Run a whole federation on this machine and write a report."""
    if (config is None) == (resume is None):
        raise ConfigError("simulate: give either a federation file or --resume DIR")
    from offsite.simulation.begin import begin
    from offsite.simulation.begin import resume as resume_run
    from offsite.simulation.engine_table import ENGINES
    from offsite.simulation.run_folder import Origin

    lookup(ENGINES, engine, "engine")
    if resume is not None:
        if (seed, rounds, sites) != (None, None, None) or no_privacy:
            raise ConfigError("resume: the run folder fixes seed, rounds, sites and privacy; leave these options out")
        with Heartbeat("open the run") as heartbeat:
            run = resume_run(resume, _warn, heartbeat.now, device=device, dtype=dtype)
    else:
        origin = Origin(seed=seed, rounds=rounds, sites=sites, private=not no_privacy)
        with Heartbeat("check the federation file") as heartbeat:
            run = begin(config or Path(), out, origin, _warn, heartbeat.now, device=device, dtype=dtype)
    _run(run, engine, as_json)


def _warn(line: str) -> None:
    typer.echo(f"warning: {line}", err=True)


def _run(run: "Run", engine: str, as_json: bool) -> None:
    """Runs a simulation, and prints the place of its result."""
    from transformers.utils.logging import disable_progress_bar

    from offsite.cli.display import LiveDisplay, PlainDisplay
    from offsite.coordinator.report.write import one_line
    from offsite.simulation.engine_table import ENGINES
    from offsite.simulation.simulate import Options, simulate

    disable_progress_bar()  # our display names each step, on a terminal and in a log alike
    console = Console(stderr=True)
    display = LiveDisplay(console, run.config.training.rounds) if console.is_terminal else PlainDisplay()
    now = datetime.now(UTC).isoformat(timespec="seconds")
    folder = run.store.folder
    try:
        with display:
            report = simulate(run, Options(lookup(ENGINES, engine, "engine"), engine, display, now))
    except KeyboardInterrupt:
        more = (["--engine", engine] if engine != "memory" else []) + (["--json"] if as_json else [])
        command = shlex.join(["offsite", "simulate", "--resume", str(folder), *more])
        typer.echo(f"offsite: stopped; go on with: {command}", err=True)
        raise typer.Exit(EXIT_INTERRUPTED) from None
    if as_json:
        typer.echo(one_line(report))
        return
    typer.echo((folder / "report.md").read_text(encoding="utf-8").split("\n## ")[0].strip())
    typer.echo(f"\nreport: {folder / 'report.html'}\nadapter: {folder / 'adapter'}")


@app.command()
def prepare(
    cache: Annotated[
        Path | None, typer.Option(help="folder for the fetched files; the user's cache folder by default")
    ] = None,
    out: Annotated[Path, typer.Option(help="federation file to write")] = Path("runs/demo.toml"),
    data: Annotated[
        Path | None, typer.Option(help="folder of own texts in place of the demo's, as DIR/public and DIR/sites/OWNER")
    ] = None,
    demo: Annotated[
        str,
        typer.Option(
            help="demo to prepare: speeches, for a language model; mail, for a classifier of spam; clothes, for a "
            "classifier of images"
        ),
    ] = "speeches",
) -> None:
    """Fetch, check and convert the model and data of a demo once, and write its federation file."""
    from offsite.demo import clothes, mail
    from offsite.demo import speeches as room

    demos = {"speeches": room.prepare_speeches, "mail": mail.prepare_mail, "clothes": clothes.prepare_clothes}
    model, texts, content = lookup(demos, demo, "demo")(cache or room.default_cache(), data)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(content, encoding="utf-8")
    typer.echo(f"model: {model}\ndata: {texts}\nfederation file: {out}")


@app.command()
def init(path: Annotated[Path, typer.Argument(help="file to write")] = Path("fed.toml")) -> None:
    """Write a federation file to start from."""
    if path.exists():
        raise ConfigError(f"path={str(path)!r} exists; choose another name")
    path.write_text(TEMPLATE, encoding="utf-8")
    typer.echo(f"wrote {path}; edit it, then: offsite check {path}, and offsite simulate {path}")


app.command()(check.check)
app.command()(plan.plan)
app.add_typer(coordinator_run.app)
app.add_typer(client_run.app)
app.add_typer(emulator.app)
app.add_typer(methods.app)


def main() -> None:
    """Runs the command; an `OffsiteError` or an error of the system becomes one line and exit code 2."""
    forbid_core_dumps()  # every command holds keys, records or the model
    try:
        app()
    except OffsiteError as error:
        with contextlib.suppress(OSError):  # this line may go to the very disk that is full
            for line in str(error).splitlines():  # a check before any work names all faults at once
                typer.echo(f"offsite: {line}", err=True)
        raise SystemExit(EXIT_REFUSED) from None
    except RuntimeError as error:
        if (refusal := refusal_of(error)) is None:
            raise
        typer.echo(f"offsite: {refusal}", err=True)
        raise SystemExit(EXIT_REFUSED) from None
    except OSError as error:
        with contextlib.suppress(OSError):
            typer.echo(f"offsite: path={error.filename}: {error.strerror or error}; put this right first", err=True)
        raise SystemExit(EXIT_REFUSED) from None


if __name__ == "__main__":
    main()
