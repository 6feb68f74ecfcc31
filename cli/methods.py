"""`offsite methods`: what each adapter method trains, sends and costs, measured on a tiny model on the spot."""

import json
import logging
import warnings
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from offsite.errors import lookup

if TYPE_CHECKING:
    from offsite.cli.method_probe import Finding

app = typer.Typer(add_completion=False)
WIDTH = 100  # of the table where no terminal says its own


@app.command()
def methods(
    family: Annotated[str, typer.Option(help="model to probe on: llama, gpt2, bert or vit")] = "llama",
    as_json: Annotated[bool, typer.Option("--json", help="print the findings as JSON")] = False,
) -> None:
    """Print every adapter method: trained numbers, bytes, whether means are exact, engine; and those refused."""
    from offsite.cli.method_probe import FAMILIES, probe_all

    lookup(FAMILIES, family, "family")
    logging.getLogger("offsite").setLevel(logging.WARNING)  # which engines do not fit is told by the one that does
    with Console(stderr=True).status("attach each method to a tiny model and probe it"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of speed and of hooks; what matters here is measured
        findings = list(probe_all(family))
    if as_json:
        typer.echo(json.dumps(_facts(family, findings), allow_nan=False))
        return
    console = Console(width=None if Console().is_terminal else WIDTH)
    console.print(_table(family, [finding for finding in findings if not finding.refused]))
    console.print(_options())
    console.print(_refusals(family, findings))


def _facts(family: str, findings: "list[Finding]") -> dict[str, Any]:
    from offsite.adapter.methods import METHODS
    from offsite.adapter.methods.refused import REFUSED
    from offsite.adapter.methods.task_head import HEAD

    used = [
        asdict(finding)
        | {
            "linear": finding.linear,
            "why": METHODS[finding.method].why,
            "peft": METHODS[finding.method].peft,
            "options": [asdict(option) for option in (HEAD, *METHODS[finding.method].options)],
        }
        for finding in findings
        if not finding.refused
    ]
    unfit = {finding.method: finding.refused for finding in findings if finding.refused}
    return {"family": family, "methods": used, "unfit": unfit, "refused": REFUSED}


def _table(family: str, findings: "list[Finding]") -> Table:
    from offsite.adapter.methods import METHODS
    from offsite.cli.method_probe import SIZES

    table = Table(
        title=f"Adapter methods on a {family} of width {SIZES['hidden_size']}, rank 2, in its first and last block",
        caption="mean: whether the mean of the uploads is the mean of their effects, and how far it is from it. "
        "engine: the first that gave each example's own gradient; DP: whether one did.",
    )
    table.add_column("method", no_wrap=True)
    table.add_column("trained", justify="right", no_wrap=True)
    table.add_column("bytes up", justify="right", no_wrap=True)
    table.add_column("mean", no_wrap=True)
    table.add_column("engine", no_wrap=True)
    table.add_column("DP", no_wrap=True)
    table.add_column("why the mean is exact, or is not")
    for one in findings:
        mean = "exact" if one.linear else f"off {one.gap:.2f}"
        private = "no" if one.no_privacy else "yes"
        reason = f"{METHODS[one.method].why}; no DP: {one.no_privacy}" if one.no_privacy else METHODS[one.method].why
        table.add_row(one.method, f"{one.parameters:,}", f"{one.bytes_up:,}", mean, one.engine, private, reason)
    return table


def _options() -> Table:
    from offsite.adapter.methods import METHODS
    from offsite.adapter.methods.task_head import HEAD

    table = Table(title="Options, for example: options = { head = true }")
    for name in ("method", "option", "default", "values"):
        table.add_column(name)
    rows = [(method.name, option) for method in METHODS.values() for option in method.options]
    for method, option in [("every method", HEAD), *rows]:
        ends = "" if isinstance(option.default, bool) else f"{option.low:,.12g} to {option.high:,.12g}"
        table.add_row(
            method, option.name, str(option.default).lower(), ", ".join(option.choices) or ends or "true, false"
        )
    return table


def _refusals(family: str, findings: "list[Finding]") -> Table:
    from offsite.adapter.methods.refused import REFUSED

    table = Table(title=f"Not on {family}, and not at all")
    table.add_column("method", no_wrap=True)
    table.add_column("reason")
    for one in findings:
        if one.refused:
            table.add_row(one.method, one.refused)
    table.add_section()
    for name, reason in REFUSED.items():
        table.add_row(name, reason)
    return table
