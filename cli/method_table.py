"""The table behind `offsite methods`: measurements of each method on tiny models, committed as `methods.json`."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from offsite.adapter.options import Option
from offsite.errors import lookup

MEASURED = Path(__file__).with_name("methods.json")
EXACT = 1e-5  # a gap below it is rounding
DIGITS = 4  # decimals of a committed gap


@dataclass(frozen=True)
class MethodFinding:
    """The measurements of one method on one family.

    Attributes:
      method: the method's name.
      parameters: number of trained numbers in two blocks of the tiny model.
      bytes_up: bytes of one masked upload of these numbers.
      gap: relative distance between the effect of the mean upload and the mean of the effects; below `EXACT` the two
        are the same.
      engine: name of the first per-example gradient engine that passed the privacy probe, or "".
      refused: reason why the method cannot be used on this family, or "" where it can.
      no_privacy: reason why no engine may be used, or "" where one may.
    """

    method: str
    parameters: int = 0
    bytes_up: int = 0
    gap: float = 0.0
    engine: str = ""
    refused: str = ""
    no_privacy: str = ""

    @property
    def linear(self) -> bool:
        """Whether the mean of the uploads is the mean of their effects."""
        return self.gap < EXACT


@dataclass(frozen=True)
class MethodFacts:
    """The facts of one method in the table of methods.

    Attributes:
      why: reason why the mean is exact, or is not.
      peft: whether the export is in Hugging Face PEFT's format.
      options: the method's own options, without the option that every method takes.
    """

    why: str
    peft: bool
    options: tuple[Option, ...] = ()


@dataclass(frozen=True)
class MethodTable:
    """All that `offsite methods` shows for one family of models.

    Attributes:
      family: name of the family of tiny models.
      width: hidden size of these models.
      findings: one entry for each method, in the order of the table of methods.
      facts: facts from the table of methods, by the method's name.
      refused: reason for each known method that is not offered, by the method's name.
      head: the option that every method takes.
    """

    family: str
    width: int
    findings: tuple[MethodFinding, ...]
    facts: Mapping[str, MethodFacts]
    refused: Mapping[str, str]
    head: Option

    @property
    def usable(self) -> tuple[MethodFinding, ...]:
        """The findings of the methods that fit the family."""
        return tuple(finding for finding in self.findings if not finding.refused)

    @property
    def unfit(self) -> dict[str, str]:
        """The reason for each method that does not fit the family, by the method's name."""
        return {finding.method: finding.refused for finding in self.findings if finding.refused}

    def options(self) -> tuple[tuple[str, Option], ...]:
        """Returns the name of a method and an option of this method, for all options."""
        own = [(name, option) for name, facts in self.facts.items() for option in facts.options]
        return (("every method", self.head), *own)

    def to_json(self) -> str:
        """Returns the table as JSON, for programs."""
        used = []
        for finding in self.usable:
            facts = self.facts[finding.method]
            options = [asdict(option) for option in (self.head, *facts.options)]
            own = {"linear": finding.linear, "why": facts.why, "peft": facts.peft, "options": options}
            used.append(asdict(finding) | own)
        content = {"family": self.family, "methods": used, "unfit": self.unfit, "refused": dict(self.refused)}
        return json.dumps(content, allow_nan=False)


def values_of(option: Option) -> str:
    """Returns the values that an option takes, in words."""
    if option.choices:
        return ", ".join(option.choices)
    return "true, false" if isinstance(option.default, bool) else f"{option.low:,.12g} to {option.high:,.12g}"


def read_table(family: str, path: Path = MEASURED) -> MethodTable:
    """Returns the committed table of a family.

    Raises:
      UnknownName: no such family.
    """
    content = json.loads(path.read_text(encoding="utf-8"))
    findings = lookup(content["families"], family, "family")
    facts = {
        name: MethodFacts(entry["why"], entry["peft"], tuple(map(_option, entry["options"])))
        for name, entry in content["methods"].items()
    }
    rows = tuple(MethodFinding(**row) for row in findings)
    return MethodTable(family, content["width"], rows, facts, content["refused"], _option(content["head"]))


def families(path: Path = MEASURED) -> tuple[str, ...]:
    """Returns the names of the families that were measured."""
    return tuple(json.loads(path.read_text(encoding="utf-8"))["families"])


def write_tables(tables: Iterable[MethodTable], path: Path = MEASURED) -> None:
    """Writes the tables of all families, one line for each method, so that a change is easy to read."""
    tables = tuple(tables)
    first = tables[0]
    measured = {table.family: [_row(finding) for finding in table.findings] for table in tables}
    parts = {
        "width": json.dumps(first.width),
        "head": json.dumps(asdict(first.head)),
        "methods": _lines({name: asdict(facts) for name, facts in first.facts.items()}),
        "refused": _lines(dict(first.refused)),
        "families": "{\n" + ",\n".join(f"{json.dumps(f)}: {_list(rows)}" for f, rows in measured.items()) + "\n}",
    }
    text = ",\n".join(f"{json.dumps(name)}: {value}" for name, value in parts.items())
    path.write_text(f"{{\n{text}\n}}\n", encoding="utf-8")


def _row(finding: MethodFinding) -> dict[str, object]:
    values = {name: value for name, value in asdict(finding).items() if value}
    return values | ({"gap": round(finding.gap, DIGITS)} if "gap" in values else {})


def _option(values: Mapping[str, object]) -> Option:
    return Option(**{**values, "choices": tuple(values["choices"])})  # type: ignore[arg-type]


def _lines(entries: Mapping[str, object]) -> str:
    return "{\n" + ",\n".join(f"{json.dumps(name)}: {json.dumps(entry)}" for name, entry in entries.items()) + "\n}"


def _list(rows: Iterable[object]) -> str:
    return "[\n" + ",\n".join(map(json.dumps, rows)) + "\n]"
