"""docs/methods.md, made from the committed table of `offsite methods`."""

from offsite.cli.method_table import MethodTable, families, read_table, values_of

HEAD = """\
# Adapter methods

What each method trains, sends and costs, measured on tiny models of width {width}, with rank 2, in the first and the
last block. This page is generated from `cli/methods.json` (`make docs`). `offsite methods` prints the same table,
`--family` for another family of models, `--json` for programs; `--probe` measures again on your machine.

- **trained**: numbers that are trained. **bytes up**: one masked upload, 4 bytes for each number.
- **mean**: `exact` where the mean of the sites' uploads is the mean of their effects on the model; otherwise the
  relative distance between the two, over three random adapters.
- **engine**: the first engine whose gradients are those of each record alone, as the start-up probe of every job finds
  it; [architecture.md](architecture.md#one-gradient-for-each-record) says what the engines do.
- **PEFT**: whether the exported adapter is in the format of Hugging Face PEFT.
"""


def page() -> str:
    """Returns the whole page."""
    shown = {family: read_table(family) for family in families()}
    first = next(iter(shown.values()))
    parts = [HEAD.format(width=first.width)]
    parts += [_measured(table) for table in shown.values()]
    parts += [_reasons(first), _options(first), _refused(first)]
    return "\n".join(parts)


def _measured(table: MethodTable) -> str:
    lines = [
        f"## On a {table.family}\n",
        "| method | trained | bytes up | mean | engine | PEFT |",
        "|---|---:|---:|---|---|---|",
    ]
    for finding in table.usable:
        mean = "exact" if finding.linear else f"off {finding.gap:.2f}"
        peft = "yes" if table.facts[finding.method].peft else "no"
        engine = finding.engine or f"none: {finding.no_privacy}"
        numbers = f"{finding.parameters:,} | {finding.bytes_up:,}"
        lines.append(f"| `{finding.method}` | {numbers} | {mean} | {engine} | {peft} |")
    lines += [f"\nNot on a {table.family}:\n"]
    lines += [f"- `{name}`: {reason}" for name, reason in table.unfit.items()]
    return "\n".join(lines) + "\n"


def _reasons(table: MethodTable) -> str:
    rows = [f"| `{name}` | {facts.why} |" for name, facts in table.facts.items()]
    return "\n".join(["## Why the mean is exact, or is not\n", "| method | reason |", "|---|---|", *rows]) + "\n"


def _options(table: MethodTable) -> str:
    rows = [
        f"| {method if ' ' in method else f'`{method}`'} | `{option.name}` | `{str(option.default).lower()}` | "
        f"{values_of(option)} |"
        for method, option in table.options()
    ]
    head = "## Options\n\nIn the federation file, for example: `adapter.options = { head = true }`.\n"
    return "\n".join([head, "| method | option | default | values |", "|---|---|---|---|", *rows]) + "\n"


def _refused(table: MethodTable) -> str:
    rows = [f"| `{name}` | {reason} |" for name, reason in table.refused.items()]
    head = "## Refused\n\nMethods that are known and not offered, each with its reason.\n"
    return "\n".join([head, "| method | reason |", "|---|---|", *rows]) + "\n"
