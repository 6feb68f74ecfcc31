"""The command `offsite`: the only place that prints, and that turns errors into a line and an exit code."""

import contextlib
import json
import logging
import os
import sys
import warnings
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from offsite.cli import client_run, coordinator_run, emulator, methods
from offsite.errors import ConfigError, OffsiteError, lookup
from offsite.protos.flower_process import QUIET

app = typer.Typer(
    name="offsite",
    help="Fine-tune a model that may not leave its owner on data that may not leave theirs.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

EXIT_REFUSED, EXIT_INTERRUPTED = 2, 130
TEMPLATE = """\
# offsite simulate fed.toml     every key is explained in README.md
seed = 0

[model]
path = "model"                  # a Hugging Face folder with safetensors

[data]
public = "public.txt"           # text of the coordinator's own: gate, clip, acceptance test
sites_dir = "sites"             # one folder per owner, with train and heldout inside
owners = ["north", "south", "west"]

[privacy]
epsilon = 8.0
"""


@app.callback()
def _setup() -> None:
    """Fine-tune a model that may not leave its owner on data that may not leave theirs."""
    os.environ.update(QUIET)  # before anything of Flower's is imported
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    # peft asks transformers under the old name; the person at the terminal can do nothing about it.
    warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning)
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    logging.getLogger("offsite").setLevel(logging.INFO)


@app.command()
def simulate(
    config: Annotated[Path | None, typer.Argument(help="federation file, fed.toml")] = None,
    out: Annotated[Path, typer.Option(help="run folder to write; must be empty")] = Path("runs/latest"),
    resume: Annotated[Path | None, typer.Option(help="run folder to go on with")] = None,
    engine: Annotated[str, typer.Option(help="memory, or flower (Flower's simulation runtime)")] = "memory",
    seed: Annotated[int | None, typer.Option(help="instead of the file's seed")] = None,
    rounds: Annotated[int | None, typer.Option(help="instead of the file's training.rounds")] = None,
    sites: Annotated[int | None, typer.Option(help="only the first N sites of the file")] = None,
    no_privacy: Annotated[bool, typer.Option("--no-privacy", help="train without clip and noise, to compare")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="print the report as JSON on standard output")] = False,
) -> None:
    """Run a whole federation on this machine and write a report."""
    import dataclasses

    from offsite.coordinator.config.federation_file import read_config
    from offsite.simulation.run_folder import Run, with_options

    carry = lookup({"memory": "memory", "flower": "flower"}, engine, "engine")
    if (config is None) == (resume is None):
        raise ConfigError("simulate: give either a federation file or --resume DIR")
    if resume is not None:
        if (seed, rounds, sites) != (None, None, None) or no_privacy:
            raise ConfigError("resume: the run folder fixes seed, rounds, sites and privacy; leave these options out")
        run = Run.open(resume)
    else:
        settings, sha256 = read_config(config or Path())
        settings = with_options(settings, seed=seed, rounds=rounds, sites=sites)
        if no_privacy:
            settings = dataclasses.replace(settings, privacy=dataclasses.replace(settings.privacy, private=False))
        run = Run.create(settings, sha256, out)
    _run(run, carry, as_json)


def _run(run: object, engine: str, as_json: bool) -> None:
    """Loads the heavy libraries, runs, and prints where the result lies."""
    from transformers.utils.logging import disable_progress_bar

    from offsite.cli.display import LiveDisplay, PlainDisplay
    from offsite.simulation.flower_engine import flower_engine
    from offsite.simulation.run_folder import Run
    from offsite.simulation.simulate import Options, memory_engine, simulate

    disable_progress_bar()  # ours says what is loaded, on a terminal and in a log alike
    if not isinstance(run, Run):
        raise TypeError("run must be a Run")
    console = Console(stderr=True)
    display = LiveDisplay(console, run.config.training.rounds) if console.is_terminal else PlainDisplay()
    carry = {"memory": memory_engine, "flower": flower_engine}[engine]
    now = datetime.now(UTC).isoformat(timespec="seconds")
    folder = run.store.folder
    try:
        with display:
            report = simulate(run, Options(carry, engine, display, now))
    except KeyboardInterrupt:
        typer.echo(f"offsite: stopped; go on with: offsite simulate --resume {folder}", err=True)
        raise typer.Exit(EXIT_INTERRUPTED) from None
    if as_json:
        typer.echo(json.dumps(report, allow_nan=False))
        return
    typer.echo((folder / "report.md").read_text(encoding="utf-8").split("\n## ")[0].strip())
    typer.echo(f"\nreport: {folder / 'report.html'}\nadapter: {folder / 'adapter'}")


@app.command()
def prepare(
    cache: Annotated[Path | None, typer.Option(help="cache folder; default: the user's cache")] = None,
    out: Annotated[Path, typer.Option(help="federation file to write")] = Path("runs/demo.toml"),
    data: Annotated[
        Path | None, typer.Option(help="instead of the demo's texts: DIR/public and DIR/sites/OWNER/…")
    ] = None,
    demo: Annotated[
        str,
        typer.Option(
            help="speeches: a language model learns to write them; mail: a classifier, to tell spam; clothes: one of "
            "images, three new kinds"
        ),
    ] = "speeches",
) -> None:
    """Fetch, verify and convert a demo's model and data once, and write its federation file."""
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
    typer.echo(f"wrote {path}; edit it, then: offsite simulate {path}")


app.add_typer(coordinator_run.app)
app.add_typer(client_run.app)
app.add_typer(emulator.app)
app.add_typer(methods.app)


def main() -> None:
    """Runs the command; an `OffsiteError`, or what the system refuses, becomes one line and exit code 2."""
    try:
        app()
    except OffsiteError as error:
        with contextlib.suppress(OSError):  # the disk that is full may be the one this goes to
            typer.echo(f"offsite: {error}", err=True)
        raise SystemExit(EXIT_REFUSED) from None
    except OSError as error:
        with contextlib.suppress(OSError):
            typer.echo(f"offsite: path={error.filename}: {error.strerror or error}; put this right first", err=True)
        raise SystemExit(EXIT_REFUSED) from None


if __name__ == "__main__":
    main()
