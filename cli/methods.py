"""`offsite methods`: the trained numbers, bytes and costs of each adapter method; `--probe` measures them here."""

import logging
import warnings
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from offsite.cli.method_table import MethodTable, families, read_table, values_of
from offsite.cli.typer_app import command_group
from offsite.errors import lookup

app = command_group()
WIDTH = 100  # characters of the table where no terminal gives a width


@app.command()
def methods(
    family: Annotated[str, typer.Option(help="tiny model that was measured: llama, gpt2, bert or vit")] = "llama",
    probe: Annotated[
        bool,
        typer.Option(
            "--probe",
            help="measurement on this machine, which takes some seconds, in place of the table that is shipped",
        ),
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="table as JSON")] = False,
) -> None:
    """Show for every adapter method its trained numbers, its bytes, its mean and its engine, and which are refused."""
    lookup(dict.fromkeys(families()), family, "family")
    table = _measured(family) if probe else read_table(family)
    if as_json:
        typer.echo(table.to_json())
        return
    console = Console(width=None if Console().is_terminal else WIDTH)
    console.print(_methods(table))
    console.print(_options(table))
    console.print(_refusals(table))


def _measured(family: str) -> MethodTable:
    from offsite.cli.method_probe import probe_table

    logging.getLogger("offsite").setLevel(logging.WARNING)  # the choice of an engine logs all engines that do not fit
    with Console(stderr=True).status("attach each method to a tiny model and probe it"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about speed and hooks; the probe measures what matters here
        return probe_table(family)


def _methods(shown: MethodTable) -> Table:
    table = Table(
        title=f"Adapter methods on a {shown.family} of width {shown.width}, rank 2, in its first and last block",
        caption="mean: whether the mean of the uploads is the mean of their effects, and the distance of the two. "
        "engine: the first engine that gave each example's own gradient; DP: whether an engine did.",
    )
    table.add_column("method", no_wrap=True)
    table.add_column("trained", justify="right", no_wrap=True)
    table.add_column("bytes up", justify="right", no_wrap=True)
    table.add_column("mean", no_wrap=True)
    table.add_column("engine", no_wrap=True)
    table.add_column("DP", no_wrap=True)
    table.add_column("why the mean is exact, or is not")
    for finding in shown.usable:
        mean = "exact" if finding.linear else f"off {finding.gap:.2f}"
        why = shown.facts[finding.method].why
        reason = f"{why}; no DP: {finding.no_privacy}" if finding.no_privacy else why
        numbers = (f"{finding.parameters:,}", f"{finding.bytes_up:,}")
        table.add_row(finding.method, *numbers, mean, finding.engine, "no" if finding.no_privacy else "yes", reason)
    return table


def _options(shown: MethodTable) -> Table:
    table = Table(title="Options, for example: options = { head = true }")
    for name in ("method", "option", "default", "values"):
        table.add_column(name)
    for method, option in shown.options():
        table.add_row(method, option.name, str(option.default).lower(), values_of(option))
    return table


def _refusals(shown: MethodTable) -> Table:
    table = Table(title=f"Not on {shown.family}, and not at all")
    table.add_column("method", no_wrap=True)
    table.add_column("reason")
    for name, reason in shown.unfit.items():
        table.add_row(name, reason)
    table.add_section()
    for name, reason in shown.refused.items():
        table.add_row(name, reason)
    return table
