"""`offsite emulator …`: an emulator is built, looked at, compared and vetted."""

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from offsite.errors import ConfigError, DataError

if TYPE_CHECKING:
    from offsite.emulator.build.pipeline import Built, Order
    from offsite.emulator.calibration.source import Source
    from offsite.emulator.package.manifest import Manifest
    from offsite.task.spec import Batch, Task

app = typer.Typer(
    name="emulator",
    help="The stand-in that is shipped in place of the model.",
    no_args_is_help=True,
    add_completion=False,
)
UNITS = {"": 1, "k": 10**3, "kb": 10**3, "m": 10**6, "mb": 10**6, "g": 10**9, "gb": 10**9}
Package = Annotated[Path, typer.Argument(help="folder of a package")]


@app.command()
def build(
    model: Annotated[Path, typer.Argument(help="the model's folder, with safetensors")],
    out: Annotated[Path, typer.Option(help="package folder to write; must be empty")],
    calibration: Annotated[Path, typer.Option(help="public records of your own: a file, or a folder of text files")],
    task: Annotated[str, typer.Option(help="what the model does: a name in task.tasks.TASKS")] = "causal_lm",
    columns: Annotated[
        str, typer.Option(help="columns of the task's fields where named otherwise: 'text=body label=spam'")
    ] = "",
    shape: Annotated[str, typer.Option(help="sandwich, parallel or auto")] = "sandwich",
    recipe: Annotated[str, typer.Option(help="compressors in order, for example 'narrow:0.34 gptq4:64'")] = "",
    max_bytes: Annotated[str, typer.Option(help="most bytes of the shipped weights, for example 80MB")] = "",
    max_memory: Annotated[str, typer.Option(help="most memory of its weights at a site, for example 300MB")] = "",
    max_flops: Annotated[
        float | None, typer.Option(help="share of the middle's multiply-adds, for example 0.5")
    ] = None,
    max_leak: Annotated[float | None, typer.Option(help="largest leak in a rehearsal, relearning included")] = None,
    first: Annotated[int, typer.Option(help="blocks shipped unchanged at the input side")] = 2,
    last: Annotated[int, typer.Option(help="blocks shipped unchanged at the output side")] = 2,
    embedding: Annotated[str, typer.Option(help="storage of the word tables: verbatim, int8 or int4")] = "int8",
    method: Annotated[str, typer.Option(help="adapter method that will be trained")] = "lora",
    rank: Annotated[int, typer.Option(help="of the adapter")] = 8,
    targets: Annotated[
        str, typer.Option(help="layers that carry it, for example 'query value'; default: its own")
    ] = "",
    gate: Annotated[float, typer.Option(help="least cosine of the adapter's gradients, in [-1, 1]")] = 0.3,
    sequences: Annotated[int, typer.Option(help="public examples that compressors look at")] = 64,
    length: Annotated[int, typer.Option(help="most tokens of an example")] = 128,
    rehearse: Annotated[
        bool, typer.Option("--rehearse", help="train and plug in on public records; takes minutes")
    ] = False,
    relearn: Annotated[str, typer.Option(help="tokens an attacker relearns on in a rehearsal")] = "10000",
    as_json: Annotated[bool, typer.Option("--json", help="print the report as JSON")] = False,
) -> None:
    """Build an emulator of a model within limits, and refuse one that would not serve."""
    from offsite.adapter.spec import AdapterSpec
    from offsite.emulator.build.cost import SizeLimits
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
    task_of = _task(task)
    source = _source(task_of, model)
    examples = _examples(task_of, source.model.config, model, calibration, columns, length)
    built = _build(task_of, source, examples, model, out, order, sequences, length)
    report = out.with_name(f"{out.name}.report.json")
    report.write_text(json.dumps(built.to_dict(), indent=1, allow_nan=False) + "\n", encoding="utf-8")
    typer.echo(json.dumps(built.to_dict(), allow_nan=False) if as_json else _summary(built, out, report))


@app.command()
def inspect(package: Package) -> None:
    """Show what a package holds, after every byte of it was checked."""
    from offsite.emulator.package import files
    from offsite.emulator.package.package_reader import read_manifest

    manifest = read_manifest(package)
    files.check(package, manifest.files)
    typer.echo("\n".join(_facts(manifest)))


@app.command()
def compare(packages: Annotated[list[Path], typer.Argument(help="folders of packages")]) -> None:
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
    seed: Annotated[int | None, typer.Option(help="of what is drawn; default: the system's randomness")] = None,
) -> None:
    """Check a package for traps, as a site does before it trains."""
    import secrets

    import torch

    from offsite.emulator.package.package_reader import load, read_manifest
    from offsite.emulator.vetting.limits import VettingThresholds
    from offsite.emulator.vetting.vet import vet as vetted

    manifest = read_manifest(package)
    model = load(package, dtype=torch.float32, expected_digest=manifest.digest())
    drawn = secrets.randbits(62) if seed is None else seed
    report = vetted(package, model, manifest, VettingThresholds(), seed=drawn)
    for check in report.checks:
        typer.echo(f"{check.name:16} {check.value:10.4g}  limit {check.limit:<8g} {check.where}")
    typer.echo(f"no known trap in {package}: {report.measured} numbers measured")


def _task(name: str) -> "Task":
    from offsite.errors import lookup
    from offsite.task.tasks import TASKS

    return lookup(TASKS, name, "task")


def _examples(task: "Task", model_config: Any, model: Path, calibration: Path, columns: str, length: int) -> "Batch":
    """Returns public records as the task's examples; plain texts are joined and cut, so that none is mostly padding."""
    from offsite.task.readers.columns import columns_of
    from offsite.task.readers.tables import read

    if wrong := [pair for pair in columns.split() if "=" not in pair]:
        raise ConfigError(f"columns={wrong[0]!r}: write field=column, for example 'text=body label=spam'")
    names = dict(pair.split("=", 1) for pair in columns.split())
    _step(f"read {calibration}")
    return task.encode(
        task.load_processor(model),
        read(calibration, reader=None, columns=columns_of(task.columns, names=names)),
        length=length,
        split="blocks" if tuple(task.columns) == ("text",) else "truncate",
        model_config=model_config,
    )


def _build(
    task: "Task",
    source: "Source",
    examples: "Batch",
    model: Path,
    out: Path,
    order: "Order",
    sequences: int,
    length: int,
) -> "Built":
    from transformers.utils.logging import disable_progress_bar

    from offsite.coordinator.job.evaluate import spread
    from offsite.emulator.build.pipeline import BuildPipeline, Public
    from offsite.emulator.calibration.public_examples import PublicExamples
    from offsite.emulator.evaluation.rehearse import Text

    disable_progress_bar()
    needed = sequences + 4 * 8
    if len(examples) < needed:
        raise DataError(
            f"calibration: {len(examples)} examples of {length} tokens, {needed} are needed; give more public data, or "
            "smaller --sequences or --length"
        )
    # Every fifth one each, so that no example is both learnt from and tested on.
    parts = [
        PublicExamples(task, spread(examples, count, offset=i, stride=5))
        for i, count in enumerate((sequences, 16, 128, 32, 1024))
    ]
    public = Public(parts[0], parts[1], Text(train=parts[2], test=parts[3], attack=parts[4], length=length))
    return BuildPipeline(source, order, public, model, _step).build(out)


def _source(task: "Task", model: Path) -> "Source":
    """Reads the model block by block where its checkpoint allows it, and says so where it does not."""
    import torch

    from offsite.emulator.calibration.source import MemorySource, ShardSource
    from offsite.errors import UnsupportedModel

    try:
        return ShardSource(model, torch.float32)
    except UnsupportedModel as error:
        _step(f"the whole model is loaded: {error}")
        return MemorySource(task.load(model, dtype=torch.float32))


def _summary(built: "Built", out: Path, report: Path) -> str:
    lines = []
    if built.candidates:
        lines += ["candidates:", f"  {'MB':>7} {'compute':>8} {'cosine':>7}  fits  recipe"]
        lines += [
            f"  {one.cost.bytes / 1e6:7.1f} {one.flops:8.2f} {1 - one.damage:7.3f}  {'yes' if one.fits else 'no ':4}  "
            f"{' '.join(one.recipe)}"
            for one in built.candidates
        ]
    lines += [f"package: {out}", *_facts(built.manifest)]
    lines.append(f"gradient cosine: {built.cosine:.3f}")
    lines.append(
        f"public loss: full model {built.losses['full']:.3f}, emulator {built.losses['emulator']:.3f} nats per target"
    )
    last = list(built.similarity.values())[-1]
    lines.append(f"similarity of what leaves the last block: {last:.3f}")
    if (found := built.rehearsal) is not None:
        leaks = ", ".join(f"{found.relearned_leak(tokens):.2f} after {tokens} tokens" for tokens in found.relearned)
        lines.append(
            f"rehearsal on public records: transfer {found.transfer:.2f}, leak {found.leak:.2f}, relearned {leaks}"
        )
    return "\n".join([*lines, f"report: {report}"])


def _facts(manifest: "Manifest") -> list[str]:
    geometry = manifest.geometry
    return [
        f"emulator: {manifest.digest()[:16]}…, {geometry.shape}, {geometry.first} + {geometry.last} blocks unchanged",
        f"recipe: {' '.join(manifest.recipe) or 'whole'}; word tables {manifest.embedding}",
        f"bytes: {manifest.shipped_bytes / 1e6:.1f} MB, {manifest.shipped_bytes / manifest.full_bytes:.3f} of it "
        f"in 16 bits; middle {manifest.middle_ratio:.3f}",
        f"compute of the middle: {manifest.compute_ratio:.2f} of the model's; {len(manifest.skipped)} blocks left out, "
        f"{len(manifest.shared)} shared",
        f"unchanged weights: {manifest.verbatim:.3f} of the model's parameters are shipped bit for bit",
    ]


def _report(package: Path) -> dict[str, Any]:
    """Returns the report that was written beside a package, or an empty one."""
    path = package.with_name(f"{package.name}.report.json")
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _number(value: object) -> str:
    return f"{value:.3f}" if isinstance(value, float) else "-"


def _size(name: str, text: str) -> int | None:
    if not text:
        return None
    found = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)\s*([a-z]*)", text.strip().lower())
    if found is None or found[2] not in UNITS:
        raise ConfigError(f"{name}={text!r} is no size; write 80MB or 1.5GB")
    return int(float(found[1]) * UNITS[found[2]])


def _whole(name: str, text: str) -> int:
    if not (text.strip().isascii() and text.strip().isdecimal() and 0 < int(text) < 10**9):
        raise ConfigError(f"{name}={text!r} is no number of tokens; write 10000 or 10000,100000")
    return int(text)


def _step(text: str) -> None:
    typer.echo(text, err=True)
