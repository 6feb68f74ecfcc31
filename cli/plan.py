"""`offsite plan`: what a job will need of every machine, from the configuration of a model alone."""

import json
import logging
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from offsite.cli.heartbeat import Heartbeat
from offsite.errors import ConfigError, OffsiteError

if TYPE_CHECKING:
    from offsite.adapter.spec import AdapterSpec
    from offsite.coordinator.plan.device_profile import DeviceProfile
    from offsite.coordinator.plan.request import PlanRequest
    from offsite.task.findings import Findings


def plan(
    model: Annotated[
        Path | None, typer.Argument(help="model folder; its config.json is read and no weights need be there")
    ] = None,
    sites: Annotated[int, typer.Option(help="number of sites")] = 3,
    memory: Annotated[str, typer.Option(help="memory of a site's device, for example 16GB; empty for no limit")] = "",
    own_memory: Annotated[
        str, typer.Option(help="memory of the coordinator's device, for example 80GB; empty for no limit")
    ] = "",
    device: Annotated[str, typer.Option(help="device of the profile: auto, cpu, cuda, cuda:N or xpu")] = "auto",
    profile: Annotated[
        Path | None, typer.Option(help="file with the device's speed; the user's cache folder has one for each device")
    ] = None,
    measure: Annotated[
        bool, typer.Option("--measure", help="measurement of the device, for some seconds; writes the profile")
    ] = False,
    task: Annotated[str, typer.Option(help="task that the model is trained for")] = "causal_lm",
    compress: Annotated[
        str, typer.Option(help="compressors of one emulator, with spaces between; empty compares several emulators")
    ] = "",
    shape: Annotated[str, typer.Option(help="shape of that emulator: sandwich or parallel")] = "sandwich",
    first: Annotated[int, typer.Option(help="number of blocks shipped verbatim at the input end")] = 2,
    last: Annotated[int, typer.Option(help="number of blocks shipped verbatim at the output end")] = 2,
    embedding: Annotated[str, typer.Option(help="storage of the embedding tables: verbatim, int8 or int4")] = "int8",
    weights: Annotated[str, typer.Option(help="frozen weights in a site's memory: widened or stored")] = "stored",
    method: Annotated[str, typer.Option(help="adapter method, see offsite methods")] = "ffa_lora",
    rank: Annotated[int, typer.Option(help="inner width of the adapter")] = 4,
    targets: Annotated[
        str, typer.Option(help="names of the layers with adapters, with commas between; empty for the method's own")
    ] = "",
    length: Annotated[int, typer.Option(help="number of tokens of a record")] = 128,
    physical_batch: Annotated[int, typer.Option(help="number of records in one pass")] = 8,
    batch: Annotated[int, typer.Option(help="expected number of records of a step")] = 16,
    rounds: Annotated[int, typer.Option(help="number of rounds")] = 6,
    local_steps: Annotated[int, typer.Option(help="private steps of a site in one round")] = 1,
    records: Annotated[
        int | None, typer.Option(help="declared number of records of a site, for the noise; none leaves privacy out")
    ] = None,
    epsilon: Annotated[float, typer.Option(help="privacy parameter of the whole job at each site")] = 8.0,
    as_json: Annotated[bool, typer.Option("--json", help="plan as JSON, in place of the text")] = False,
) -> None:
    """Plan a job from a model's config.json alone: emulators that fit, bytes, memory, seconds, rounds and epsilon."""
    if model is None and not measure:
        raise ConfigError("plan: give a model folder, or --measure alone")
    from offsite.coordinator.plan.paper_package import Design
    from offsite.coordinator.plan.request import PlanRequest
    from offsite.coordinator.plan.trial import Batches
    from offsite.task.findings import Findings

    findings = Findings()
    request = PlanRequest(
        sites=sites,
        memory=_size(memory, "memory", findings),
        own_memory=_size(own_memory, "own-memory", findings),
        weights=weights,
        adapter=_adapter(method, rank, targets, findings),
        batches=Batches(length, physical_batch),
        batch=batch,
        rounds=rounds,
        local_steps=local_steps,
        records=records,
        epsilon=epsilon,
        design=Design(first, last, shape, tuple(compress.split()), embedding) if compress else None,
        first=first,
        last=last,
        embedding=embedding,
    )
    request.check(findings)
    place = _place(profile, device, findings)
    speed = _profile(place, device, measure=measure, asked=profile is not None, findings=findings)
    if model is None:
        findings.check()
        typer.echo(f"profile: {place}")
        return
    _plan(model, task, request, speed, findings, as_json=as_json)


def _size(text: str, option: str, findings: "Findings") -> int | None:
    """Returns a size in bytes; None for an empty text, and for a text that becomes a finding."""
    from offsite.coordinator.plan.request import read_size

    with findings.gathering():
        return read_size(text, option) if text else None
    return None


def _adapter(method: str, rank: int, targets: str, findings: "Findings") -> "AdapterSpec":
    """Returns the spec of the adapter; after a finding the default spec, with which nothing is planned."""
    from offsite.adapter.spec import AdapterSpec

    with findings.gathering():
        return AdapterSpec(method, rank, 2.0 * rank, tuple(filter(None, targets.split(","))))
    return AdapterSpec()


def _place(profile: Path | None, device: str, findings: "Findings") -> Path:
    """Returns the file of a device's profile."""
    if profile is not None:
        return profile
    from offsite.demo.speeches import default_cache
    from offsite.task.device import CPU, choose_device

    name = CPU
    with findings.gathering():
        name = str(choose_device(device))
    return default_cache() / "profiles" / f"{name.replace(':', '-')}.json"


def _profile(place: Path, device: str, *, measure: bool, asked: bool, findings: "Findings") -> "DeviceProfile | None":
    """Returns the profile, after a measurement where one was asked for; None where there is no profile."""
    from offsite.coordinator.plan.device_profile import read_profile

    with findings.gathering():
        if measure and not findings.errors:
            from offsite.coordinator.plan.measure import measure_profile

            with Heartbeat("measure the device") as heartbeat:
                profile = measure_profile(device, heartbeat.now)
            profile.write(place)
            return profile
        if asked or place.is_file():
            return read_profile(place)
    return None


def _plan(
    model: Path,
    task: str,
    request: "PlanRequest",
    profile: "DeviceProfile | None",
    findings: "Findings",
    *,
    as_json: bool,
) -> None:
    from offsite.cli.plan_text import show
    from offsite.coordinator.plan.make_plan import Planner
    from offsite.coordinator.plan.model_outline import read_outline

    logging.getLogger("offsite").setLevel(logging.WARNING)  # the choice of an engine logs all engines that do not fit
    outline = result = None
    with Heartbeat("plan the job") as heartbeat, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of libraries about tensors without values
        with findings.gathering():
            outline = read_outline(model, task)
        if outline is not None and not findings.errors:
            with findings.gathering():
                result = Planner(outline, request, profile).plan()
        del heartbeat
    findings.check()
    if result is None:
        raise OffsiteError(f"model={str(model)!r}: no plan could be made")
    typer.echo(json.dumps(result.to_dict(), allow_nan=False)) if as_json else show(result, request, profile)
