"""`offsite emulator …`: build, inspect, compare and vet emulators."""

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from offsite.cli.heartbeat import Heartbeat
from offsite.cli.typer_app import command_group
from offsite.errors import ConfigError

if TYPE_CHECKING:
    from offsite.emulator.build.pipeline import Built
    from offsite.emulator.package.manifest import Manifest

app = command_group("emulator", about="The stand-in that is shipped in place of the model.")
UNITS = {"": 1, "k": 10**3, "kb": 10**3, "m": 10**6, "mb": 10**6, "g": 10**9, "gb": 10**9}
Package = Annotated[Path, typer.Argument(help="folder of the package")]


@app.command()
def build(
    model: Annotated[Path, typer.Argument(help="folder of the model, with safetensors")],
    out: Annotated[Path, typer.Option(help="new or empty folder for the package")],
    calibration: Annotated[Path, typer.Option(help="public records of your own: a file, or a folder of text files")],
    task: Annotated[
        str, typer.Option(help="task of the model, for example causal_lm or image_classification")
    ] = "causal_lm",
    columns: Annotated[
        str,
        typer.Option(
            help="columns of the task's fields where the file names them otherwise, for example 'text=body label=spam'"
        ),
    ] = "",
    shape: Annotated[str, typer.Option(help="shape of the emulator: sandwich, parallel or auto")] = "sandwich",
    recipe: Annotated[str, typer.Option(help="compressors in order, for example 'narrow:0.34 gptq4:64'")] = "",
    max_bytes: Annotated[str, typer.Option(help="largest size of the shipped weights, for example 80MB")] = "",
    max_memory: Annotated[str, typer.Option(help="largest memory of the weights at a site, for example 300MB")] = "",
    max_flops: Annotated[
        float | None, typer.Option(help="largest share of the middle's multiply-adds that stays, for example 0.5")
    ] = None,
    max_leak: Annotated[float | None, typer.Option(help="largest leak in a rehearsal, relearning included")] = None,
    first: Annotated[int, typer.Option(help="number of blocks at the input that are shipped unchanged")] = 2,
    last: Annotated[int, typer.Option(help="number of blocks at the output that are shipped unchanged")] = 2,
    embedding: Annotated[str, typer.Option(help="storage of the word tables: verbatim, int8 or int4")] = "int8",
    method: Annotated[str, typer.Option(help="adapter method that will be trained")] = "lora",
    rank: Annotated[int, typer.Option(help="rank of the adapter")] = 8,
    targets: Annotated[
        str, typer.Option(help="layers that carry the adapter, for example 'query value'; the method's own by default")
    ] = "",
    gate: Annotated[
        float, typer.Option(help="smallest cosine between the adapter's gradients on emulator and model, in [-1, 1]")
    ] = 0.3,
    sequences: Annotated[int, typer.Option(help="number of public examples that the compressors look at")] = 64,
    length: Annotated[int, typer.Option(help="largest number of tokens in an example")] = 128,
    rehearse: Annotated[
        bool, typer.Option("--rehearse", help="rehearsal of training and plug-in on public records; takes minutes")
    ] = False,
    relearn: Annotated[
        str, typer.Option(help="number of tokens on which an attacker relearns in a rehearsal")
    ] = "10000",
    device: Annotated[str, typer.Option(help="device that computes: auto, cpu, cuda, cuda:N or xpu")] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="report as JSON, in place of the text")] = False,
) -> None:
    """Build an emulator of a model within limits, and refuse an emulator that would not serve."""
    from transformers.utils.logging import disable_progress_bar

    from offsite.adapter.spec import AdapterSpec
    from offsite.emulator.build.cost import SizeLimits
    from offsite.emulator.build.from_folder import PublicData, build_from_folder
    from offsite.emulator.build.pipeline import Order

    order = Order(
        first=first,
        last=last,
        shape=shape,
        recipe=tuple(recipe.split()),
        limits=SizeLimits(_size("max_bytes", max_bytes), _size("max_memory", max_memory), max_flops, max_leak),
        embedding=embedding,
        adapter=AdapterSpec(method=method, rank=rank, alpha=2.0 * rank, targets=tuple(targets.split())),
        gate=gate,
        rehearse=rehearse,
        relearn=tuple(_whole("relearn", part) for part in relearn.split(",") if part),
    )
    data = PublicData(calibration, task, _columns(columns), sequences, length)
    disable_progress_bar()
    with Heartbeat("read the model") as heartbeat:

        def step(text: str) -> None:
            _step(text)
            heartbeat.now(text)

        built = build_from_folder(model, out, order, data, step, device=device)
    report = out.with_name(f"{out.name}.report.json")
    report.write_text(json.dumps(built.to_dict(), indent=1, allow_nan=False) + "\n", encoding="utf-8")
    typer.echo(json.dumps(built.to_dict(), allow_nan=False) if as_json else _summary(built, out, report))


@app.command()
def inspect(package: Package) -> None:
    """Check every byte of a package and show what it holds."""
    from offsite.emulator.package import package_folder
    from offsite.emulator.package.package_reader import read_manifest

    manifest = read_manifest(package)
    package_folder.check(package, manifest.files)
    typer.echo("\n".join(_facts(manifest)))


@app.command()
def compare(packages: Annotated[list[Path], typer.Argument(help="folders of the packages to compare")]) -> None:
    """Show packages side by side."""
    from rich.console import Console
    from rich.table import Table

    from offsite.emulator.package.package_reader import read_manifest

    table = Table(box=None, pad_edge=False)
    for name in (
        "package",
        "recipe",
        "MB",
        "of the model",
        "middle's bytes",
        "compute",
        "verbatim",
        "cosine",
        "G",
        "leak",
    ):
        table.add_column(name, overflow="fold")
    for package in packages:
        manifest, report = read_manifest(package), _report(package)
        rehearsal = report.get("rehearsal") or {}
        table.add_row(
            package.name,
            " ".join(manifest.recipe) or "whole",
            f"{manifest.shipped_bytes / 1e6:.1f}",
            f"{manifest.shipped_bytes / manifest.full_bytes:.3f}",
            f"{manifest.middle_ratio:.3f}",
            f"{manifest.compute_ratio:.2f}",
            f"{manifest.verbatim:.3f}",
            _number(report.get("gradient_cosine")),
            _number(rehearsal.get("transfer")),
            _number(rehearsal.get("worst_leak")),
        )
    Console(width=160 if not Console().is_terminal else None).print(table)


@app.command()
def vet(
    package: Package,
    seed: Annotated[
        int | None, typer.Option(help="seed of the random draws; the system's randomness by default")
    ] = None,
) -> None:
    """Check a package for traps, as a site does before training."""
    import secrets

    import torch

    from offsite.emulator.package.package_reader import load, read_manifest
    from offsite.emulator.vetting.limits import VettingThresholds
    from offsite.emulator.vetting.vet import vet as vetted

    manifest = read_manifest(package)
    model = load(package, dtype=torch.float32, expected_digest=manifest.digest())
    drawn = secrets.randbits(62) if seed is None else seed
    with Heartbeat("look for traps"):
        report = vetted(package, model, manifest, VettingThresholds(), seed=drawn)
    for check in report.checks:
        typer.echo(f"{check.name:16} {check.value:10.4g}  limit {check.limit:<8g} {check.where}")
    typer.echo(f"no known trap in {package}: {report.measured} numbers measured")


def _summary(built: "Built", out: Path, report: Path) -> str:
    lines = []
    if built.candidates:
        lines += ["candidates:", f"  {'MB':>7} {'compute':>8} {'cosine':>7}  fits  recipe"]
        lines += [
            f"  {candidate.cost.bytes / 1e6:7.1f} {candidate.flops:8.2f} {1 - candidate.damage:7.3f}  "
            f"{'yes' if candidate.fits else 'no ':4}  {' '.join(candidate.recipe)}"
            for candidate in built.candidates
        ]
    lines += [f"package: {out}", *_facts(built.manifest)]
    lines.append(f"gradient cosine: {built.cosine:.3f}")
    lines.append(
        f"public loss: full model {built.losses['full']:.3f}, emulator {built.losses['emulator']:.3f} nats per target"
    )
    last = list(built.similarity.values())[-1]
    lines.append(f"similarity of the last block's outputs: {last:.3f}")
    if (trial := built.rehearsal) is not None:
        leaks = ", ".join(f"{trial.relearned_leak(tokens):.2f} after {tokens} tokens" for tokens in trial.relearned)
        lines.append(
            f"rehearsal on public records: transfer {trial.transfer:.2f}, leak {trial.leak:.2f}, relearned {leaks}"
        )
    return "\n".join([*lines, f"report: {report}"])


def _facts(manifest: "Manifest") -> list[str]:
    geometry = manifest.geometry
    return [
        f"emulator: {manifest.digest()[:16]}…, {geometry.shape}, {geometry.first} + {geometry.last} blocks unchanged",
        f"recipe: {' '.join(manifest.recipe) or 'whole'}; word tables {manifest.embedding}",
        f"bytes: {manifest.shipped_bytes / 1e6:.1f} MB, {manifest.shipped_bytes / manifest.full_bytes:.3f} of the "
        f"model in 16 bits; middle {manifest.middle_ratio:.3f}",
        f"compute of the middle: {manifest.compute_ratio:.2f} of the model's; {len(manifest.skipped)} blocks left out, "
        f"{len(manifest.shared)} shared",
        f"unchanged weights: {manifest.verbatim:.3f} of the model's parameters are shipped bit for bit",
    ]


def _report(package: Path) -> dict[str, Any]:
    """Returns the report beside a package; empty where there is no report."""
    path = package.with_name(f"{package.name}.report.json")
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return report if isinstance(report, dict) else {}


def _number(value: object) -> str:
    return f"{value:.3f}" if isinstance(value, float) else "-"


def _columns(text: str) -> dict[str, str]:
    if wrong := [pair for pair in text.split() if "=" not in pair]:
        raise ConfigError(f"columns={wrong[0]!r}: write field=column, for example 'text=body label=spam'")
    return dict(pair.split("=", 1) for pair in text.split())


def _size(name: str, text: str) -> int | None:
    if not text:
        return None
    parts = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)\s*([a-z]*)", text.strip().lower())
    if parts is None or parts[2] not in UNITS:
        raise ConfigError(f"{name}={text!r} is not a size; write 80MB or 1.5GB")
    return int(float(parts[1]) * UNITS[parts[2]])


def _whole(name: str, text: str) -> int:
    if not (text.strip().isascii() and text.strip().isdecimal() and 0 < int(text) < 10**9):
        raise ConfigError(f"{name}={text!r} is not a number of tokens; write 10000 or 10000,100000")
    return int(text)


def _step(text: str) -> None:
    typer.echo(text, err=True)
