"""docs/configuration.md, made from the dataclasses that read each file: keys, types, defaults, and their docstrings."""

import dataclasses
import inspect
import re
import types
from collections.abc import Iterator
from typing import Any, get_args, get_origin, get_type_hints

from offsite.client.home.policy import Policy
from offsite.client.home.settings import SiteSettings
from offsite.coordinator.config.federation_file import FedConfig
from offsite.coordinator.home.settings import HomeSettings

Row = tuple[str, str, str, str]  # key, type, default, meaning
WORDS = {str: "string", int: "integer", float: "number", bool: "true or false"}
HEAD = """\
# Configuration

Four files hold all settings. This page is generated from the code that reads them (`make docs`); a test compares both.
Paths are relative to the file that holds them. An unknown key is refused, and the message names the nearest known key.

| file | who writes it | read by |
|---|---|---|
| [the federation file](#the-federation-file), `fed.toml` | the model's owner | `offsite simulate`, `coordinator run` |
| [`coordinator.toml`](#coordinatortoml) | `offsite coordinator init`, then the coordinator | `offsite coordinator` |
| [`site.toml`](#sitetoml) | `offsite client init`, then the data owner | `offsite client` |
| [`policy.toml`](#policytoml) | `offsite client init`, then the data owner | `offsite client` |

## The federation file

Required are `model.path`, `data.public` and the sites: for a simulation either `[[sites]]`, or `data.sites_dir` with
`data.owners`; between organisations `[coordinator]`, since the signed manifest names the sites. Tasks and the fields of
their records: [data.md](data.md). Compressors and variants: [emulators.md](emulators.md). Methods and their options:
[methods.md](methods.md).
"""
SHORT_FORM = (
    ("data.sites_dir", "string", "", "short form of `[[sites]]`: folder that holds `OWNER/train` and `OWNER/heldout`."),
    ("data.owners", "list of strings", "", "short form of `[[sites]]`: names of the owners' folders."),
)
OTHERS = """
## coordinator.toml

In the folder that `offsite coordinator init` made. A change counts from the next `approve` or `revoke` on.

{home}
## site.toml

In the folder that `offsite client init` made. Restart the client after a change.

{site}
## policy.toml

The data owner's own; the coordinator cannot change it. Every key must stand there, so the column "default" is what the
template says, which permits no model and no method. Restart the client after a change. More words on each key:
[operations.md](operations.md#policytoml).

{policy}"""


def texts(kind: type) -> dict[str, str]:
    """Returns the Attributes entries of a dataclass's docstring, by field name."""
    section = (inspect.getdoc(kind) or "").partition("\nAttributes:\n")[2].partition("\n\n")[0]
    entries = re.split(r"(?m)^  (?=\w+: )", section)
    pairs = (entry.partition(": ") for entry in entries if entry.strip())
    return {name: " ".join(text.split()) for name, _, text in pairs}


def tables(kind: type, prefix: str = "", title: str = "") -> Iterator[tuple[str, type, list[Row]]]:
    """Yields heading, dataclass and rows of each table of a file, its own keys first."""
    words, hints, inner = texts(kind), get_type_hints(kind), []
    rows: list[Row] = []
    for field in dataclasses.fields(kind):
        many, table = _table(hints[field.name])
        path = f"{prefix}{field.name}"
        if table is None:
            rows.append((path, word_of(hints[field.name]), _default(field), words[field.name]))
        else:
            brackets = ("[[", "]]") if many else ("[", "]")
            inner.append((table, f"{path}{'[]' if many else ''}.", path.join(brackets)))
    yield title, kind, rows
    for table, path, name in inner:
        yield from tables(table, path, name)


def _table(hint: Any) -> tuple[bool, type | None]:
    """Returns whether a field holds several tables, and the dataclass of these; None for a plain value."""
    if isinstance(hint, types.UnionType):
        return _table(get_args(hint)[0])
    if get_origin(hint) is tuple and dataclasses.is_dataclass(get_args(hint)[0]):
        return True, get_args(hint)[0]
    return False, hint if dataclasses.is_dataclass(hint) else None


def word_of(hint: Any) -> str:
    """Returns a field's type in the words of a TOML file."""
    if isinstance(hint, types.UnionType) and type(None) in get_args(hint):
        return word_of(get_args(hint)[0])
    if get_origin(hint) is tuple:
        return f"list of {word_of(get_args(hint)[0])}s"
    return "table" if get_origin(hint) is dict else WORDS[hint]


def literal(value: object) -> str:
    """Returns a value as it stands in a TOML file."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple | list):
        return f"[{', '.join(map(literal, value))}]"
    return "{}" if value == {} else f'"{value}"' if isinstance(value, str) else str(value)


def _default(field: "dataclasses.Field[Any]") -> str:
    if field.default_factory is not dataclasses.MISSING:
        return f"`{literal(field.default_factory())}`"
    if field.default is dataclasses.MISSING:
        return "required"
    return "" if field.default is None else f"`{literal(field.default)}`"


def table_of(rows: list[Row]) -> str:
    """Returns rows as a Markdown table."""
    lines = [
        f"| `{key}` | {kind} | {default} | {meaning[0].upper() + meaning[1:]} |" for key, kind, default, meaning in rows
    ]
    return "\n".join(["| key | type | default | meaning |", "|---|---|---|---|", *lines]) + "\n"


def policy_rows() -> list[Row]:
    """Returns the keys of `policy.toml` as its template has and explains them."""
    hints = get_type_hints(Policy)
    lines = re.findall(r"(?m)^(\w+) = (.+?)\s+# (.+)$", Policy.template())
    return [(key, word_of(hints[key]), f"`{value}`", f"{text}.") for key, value, text in lines]


def page() -> str:
    """Returns the whole page."""
    parts = [HEAD]
    for title, kind, rows in tables(FedConfig):
        extra = list(SHORT_FORM) if title == "[data]" else []
        said = (inspect.getdoc(kind) or "").split("\n")[0].partition(": ")[2]
        heading = f"\n### {title}\n\n{said[:1].upper()}{said[1:]}\n" if title else ""
        parts.append(f"{heading}\n{table_of(rows + extra)}")
    home, site = ([row for _, _, rows in tables(kind) for row in rows] for kind in (HomeSettings, SiteSettings))
    parts.append(OTHERS.format(home=table_of(home), site=table_of(site), policy=table_of(policy_rows())))
    return "".join(parts)
