"""The four files of a run's report: for programs, as text, for the browser, and the privacy statement."""

import json
import math
import re
from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import Any

from offsite.coordinator.report.json_report import FILE, report_to_json
from offsite.coordinator.report.model import Report
from offsite.coordinator.report.plots import plots
from offsite.coordinator.report.privacy_statement import privacy_statement
from offsite.coordinator.report.section import Section
from offsite.coordinator.report.summary import Summary, summarise
from offsite.trust.files import write_atomically


def write_report(folder: Path, report: Report) -> None:
    """Writes `report.json`, `privacy.json`, `report.md` and `report.html`, each whole or not at all.

    Args:
      folder: existing run folder.
      report: the report; a number that is not finite becomes null in the JSON files.
    """
    summary = summarise(report)
    files = {
        FILE: to_json(report_to_json(report)),
        "privacy.json": to_json(privacy_statement(report)),
        "report.md": to_markdown(summary),
        "report.html": to_html(summary, plots(report)),
    }
    for name, content in files.items():
        write_atomically(folder / name, content.encode("utf-8"))


def to_json(content: Mapping[str, object]) -> str:
    """Returns strict JSON, with null for infinity and NaN."""
    return json.dumps(_finite(content), indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def one_line(report: Report) -> str:
    """Returns the content of `report.json` on one line, for `--json`."""
    return json.dumps(_finite(report_to_json(report)), allow_nan=False)


def to_markdown(summary: Summary) -> str:
    """Returns the report as Markdown: the answer, then warnings, then tables."""
    parts = [f"# {_plain(summary.title)}", *map(_plain, summary.answer)]
    if summary.warnings:
        parts.append(
            "\n".join(f"> **Warning:** {_plain(warning)}" for warning in summary.warnings).replace("\n", "\n>\n")
        )
    for section in summary.sections:
        parts += [f"## {_plain(section.heading)}", *map(_plain, section.text)]
        if section.rows:
            parts.append(_markdown_table(section))
    return "\n\n".join(parts) + "\n"


def to_html(summary: Summary, drawn: Mapping[str, tuple[str, str]]) -> str:
    """Returns the report as one HTML page that loads nothing.

    Args:
      summary: words of the report; every word is escaped.
      drawn: SVG and description of each plot, by key.
    """
    warnings = "".join(
        f'<p class="warning"><strong>Warning:</strong> {_words(text)}</p>\n' for text in summary.warnings
    )
    answer = "".join(f"<p>{_words(text)}</p>\n" for text in summary.answer)
    body = "".join(_html_section(section, drawn) for section in summary.sections)
    title = escape(summary.title)
    return PAGE.format(title=title, css=CSS, answer=answer, warnings=warnings, body=body)


PAGE = """\
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>{title}</title>
<style>
{css}</style>
</head>
<body>
<main>
<h1>{title}</h1>
<div class="answer">
{answer}</div>
{warnings}{body}</main>
</body>
</html>
"""
CSS = """\
:root { --ink: #1b1f24; --quiet: #57606a; --paper: #ffffff; --band: #f3f5f7; --edge: #d5dae0;
  color-scheme: light dark; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e9ed; --quiet: #a3adb8; --paper: #15181c; --band: #1f242a; --edge: #3a424b; }
}
body { margin: 0; background: var(--paper); color: var(--ink); font: 16px/1.5 system-ui, sans-serif; }
main { max-width: 50rem; margin: 0 auto; padding: 1.5rem 1rem 4rem; }
h1 { font-size: 1.5rem; line-height: 1.25; }
h2 { font-size: 1.2rem; margin: 2.5rem 0 .5rem; border-top: 1px solid var(--edge); padding-top: 1rem; }
p { margin: .6rem 0; max-width: 44rem; }
.answer { background: var(--band); border-left: 4px solid #0072B2; padding: .3rem 1rem; }
.answer p:first-child { font-weight: 600; }
.warning { border-left: 4px solid #D55E00; padding: .3rem 1rem; background: var(--band); }
.wide { overflow-x: auto; }
table { border-collapse: collapse; margin: .8rem 0; font-size: .9rem; }
th, td { padding: .3rem .7rem; border-bottom: 1px solid var(--edge); text-align: left; vertical-align: top; }
thead th { color: var(--quiet); font-weight: 600; vertical-align: bottom; }
tbody th { font-weight: 400; white-space: pre-wrap; }
td { overflow-wrap: anywhere; }
.numbers td, .numbers tbody th { white-space: nowrap; }
.numbers td, .numbers thead th:not(:first-child) { text-align: right; font-variant-numeric: tabular-nums; }
figure { margin: 1rem 0; }
figure svg { width: 100%; height: auto; display: block; }
"""


def _html_section(section: Section, drawn: Mapping[str, tuple[str, str]]) -> str:
    text = "".join(f"<p>{_words(paragraph)}</p>\n" for paragraph in section.text)
    figure = ""
    if section.plot in drawn:
        svg, words = drawn[section.plot]
        figure = f'<figure role="img" aria-label="{_words(words)}">{svg}</figure>\n'
    return f"<section>\n<h2>{escape(section.heading)}</h2>\n{text}{_html_table(section)}{figure}</section>\n"


def _html_table(section: Section) -> str:
    if not section.rows:
        return ""
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in section.head)
    rows = "".join(
        f'<tr><th scope="row">{escape(first)}</th>{"".join(f"<td>{_words(cell)}</td>" for cell in rest)}</tr>\n'
        for first, *rest in section.rows
    )
    kind = ' class="numbers"' if section.numbers else ""
    return f'<div class="wide"><table{kind}>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{rows}</tbody>\n</table></div>\n'


def _words(text: str) -> str:
    """Returns text for HTML; a number and its unit stay on one line."""
    return re.sub(r"(?<=\d) (?=%|[kMGT]?B\b)", "\N{NO-BREAK SPACE}", escape(text))


def _markdown_table(section: Section) -> str:
    rule = "|".join([" --- ", *([" ---: "] if section.numbers else [" --- "]) * (len(section.head) - 1)])
    lines = [section.head, *section.rows]
    cells = ["| " + " | ".join(_plain(cell).replace("|", "\\|") for cell in line) + " |" for line in lines]
    return "\n".join([cells[0], f"|{rule}|", *cells[1:]])


def _plain(text: str) -> str:
    """Returns text that Markdown shows as it is, on one line; markup in a name stays visible and has no effect."""
    for sign, instead in (("&", "&amp;"), ("<", "&lt;"), ("`", "&#96;"), ("*", "\\*"), ("_", "\\_"), ("[", "\\[")):
        text = text.replace(sign, instead)
    return " ".join(text.split())


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return value
