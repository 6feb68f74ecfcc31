"""A plan as a person reads it: tables of emulators, phases, and rounds."""

from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from offsite.coordinator.report.formatting import NONE, count, size

if TYPE_CHECKING:
    from offsite.coordinator.plan.device_profile import DeviceProfile
    from offsite.coordinator.plan.make_plan import PlanResult
    from offsite.coordinator.plan.request import PlanRequest
    from offsite.coordinator.plan.site_phases import Phase

WIDTH = 100  # characters where no terminal gives a width
MINUTE, HOUR = 60, 3600


def show(plan: "PlanResult", request: "PlanRequest", profile: "DeviceProfile | None") -> None:
    """Prints a plan."""
    console = Console(width=None if Console().is_terminal else WIDTH, highlight=False)
    console.print(f"{plan.model}: {_big(plan.parameters)} parameters, a checkpoint of {size(plan.stored)}")
    console.print(_options(plan, request))
    chosen = plan.options[plan.chosen]
    console.print(f"\nThe rest is about: {chosen.design}", soft_wrap=True)
    console.print(_phases("A site", plan.site, plan.imports, request.memory))
    console.print(_phases("The coordinator", plan.coordinator, plan.imports, request.own_memory))
    console.print(_traffic(plan, request), soft_wrap=True)
    if plan.privacy:
        console.print(_privacy(plan, request))
    for line in plan.advice:
        console.print(f"does not fit: {line}", soft_wrap=True)
    if profile is None:
        console.print("seconds: not known without a profile of the device; measure one with --measure", soft_wrap=True)
    else:
        console.print(f"seconds: on {profile.device} with {profile.threads} threads, as measured", soft_wrap=True)


def _options(plan: "PlanResult", request: "PlanRequest") -> Table:
    limit = "" if request.memory is None else f" of {size(request.memory)}"
    table = Table(title=f"Emulators, the most faithful first, at a site{limit}, weights {request.weights}")
    table.add_column("emulator")
    for name in ("package", "compute", "memory", "a round"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("fits", no_wrap=True)
    for place, option in enumerate(plan.options):
        name = f"{'> ' if place == plan.chosen else ''}{option.design}"
        if option.refusal:
            table.add_row(f"{name}\n{option.refusal}", NONE, NONE, NONE, NONE, "no")
            continue
        fits = "yes" if option.fits else "no"
        share = f"{option.compute:.2f}"
        table.add_row(name, size(option.bytes), share, size(option.memory), _time(option.seconds), fits)
    return table


def _phases(title: str, phases: "tuple[Phase, ...]", imports: int, limit: int | None) -> Table:
    table = Table(title=f"{title}: memory with {size(imports)} of programs in it")
    table.add_column("phase", no_wrap=True)
    table.add_column("memory", justify="right", no_wrap=True)
    table.add_column("time", justify="right", no_wrap=True)
    table.add_column("what is done")
    for phase in phases:
        total = imports + phase.memory
        over = " !" if limit is not None and total > limit else ""
        table.add_row(phase.name, f"{size(total)}{over}", _time(phase.seconds), phase.says)
    return table


def _traffic(plan: "PlanResult", request: "PlanRequest") -> str:
    package = plan.options[plan.chosen].bytes
    return (
        f"Bytes: to each site {size(package)} once and {size(plan.bytes_down)} each round; from each site "
        f"{size(plan.bytes_up)} each round, masked ({count(plan.upload)} numbers). Over {request.rounds} rounds and "
        f"{request.sites} sites: {size(request.sites * (package + request.rounds * plan.bytes_down))} down, "
        f"{size(request.sites * request.rounds * plan.bytes_up)} up. Engine: {plan.engine}."
    )


def _privacy(plan: "PlanResult", request: "PlanRequest") -> Table:
    table = Table(title=f"Privacy of a site with {count(request.records)} records, batch {request.batch}")
    for name in ("rounds", "steps", "epsilon", "delta", "noise multiplier", "noise of the mean / clip"):
        table.add_column(name, justify="right")
    for row in plan.privacy:
        numbers = (f"{row.epsilon:.2f}", f"{row.delta:.1e}", f"{row.noise_multiplier:.2f}", f"{row.relative_noise:.3f}")
        table.add_row(str(row.rounds), str(row.steps), *numbers)
    return table


def _time(seconds: float | None) -> str:
    if seconds is None:
        return NONE
    if seconds < MINUTE:
        return f"{seconds:.1f} s"
    return f"{seconds / MINUTE:.1f} min" if seconds < HOUR else f"{seconds / HOUR:.1f} h"


def _big(number: int) -> str:
    for unit, word in ((10**12, "trillion"), (10**9, "billion"), (10**6, "million")):
        if number >= unit:
            return f"{number / unit:.2f} {word}"
    return count(number)
