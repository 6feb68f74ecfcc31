"""README's tree, drawn from the first line of each file: `python -m tests.tree` writes it, a test compares it."""

import ast
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BEGIN, END = "<!-- tree -->\n```text\n", "```\n<!-- /tree -->"
TOP = ("CHANGELOG.md", "CONTRIBUTING.md", "Dockerfile", "docker-compose.yml", "pyproject.toml", "README.md")
ROOMS = ("errors", "trust", "adapter", "task", "emulator", "privacy", "secagg", "protos", "coordinator", "client")
ROOMS = (*ROOMS, "simulation", "demo", "cli", "bench", "deploy", "docs", "examples", "tests")
# What has no first line of its own to show.
TOLD = {
    "CHANGELOG.md": "What changed, by release.",
    "CONTRIBUTING.md": "Where things go, and how a change is reviewed.",
    "README.md": "This page.",
    "pyproject.toml": "Package, dependencies, and the rules that `make check` enforces.",
    "demo/speeches.toml": "The demo's federation file, without its places.",
    "docs/architecture.md": "The house: parties, rooms, one round.",
    "docs/operations.md": "Running it: the handbook for operators.",
    "docs/sharp-edges.md": "What can go wrong unseen, and what stops it.",
    "protos/depot.proto": "How an encrypted package reaches a site.",
    "protos/round.proto": "The messages of a round, and the letters they travel in.",
    "tests/vectors/frost_p256.json": "Shamir shares published in RFC 9591.",
    "tests/vectors/secagg_transcript.json": "A frozen round of secure aggregation.",
}


def files() -> list[str]:
    """Returns the paths that the tree shows: what git knows or would take, without empty and generated files."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    known = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    shown = [name for name in set(known) if name in TOP or (name.split("/")[0] in ROOMS and (ROOT / name).exists())]
    return sorted(name for name in shown if not name.endswith(("_pb2.py", "_pb2.pyi", "_pb2_grpc.py")) and _holds(name))


def _holds(name: str) -> bool:
    return not name.endswith("__init__.py") or len(ast.parse((ROOT / name).read_text()).body) > 1


def first_line(name: str) -> str:
    """Returns what a file says of itself in its first line."""
    if name in TOLD:
        return TOLD[name]
    text = (ROOT / name).read_text(encoding="utf-8")
    if name.endswith(".py"):
        return (ast.get_docstring(ast.parse(text)) or "").split("\n")[0]
    line = next(line for line in text.split("\n") if line and not line.startswith("#!"))
    return line.lstrip("#/* ").rstrip("*/ ")


def tree() -> str:
    """Returns the tree, one line per file, a room after the other."""
    names = files()
    parts = [[name for name in names if name in TOP]]
    parts += [[name for name in names if name.startswith(f"{room}/")] for room in ROOMS]
    drawn = []
    for part in parts:
        width = max(map(len, part), default=0)
        drawn.append("".join(f"{name:<{width}}   {first_line(name)}\n" for name in part))
    return "\n".join(part for part in drawn if part)


def main() -> None:
    """Writes the tree into README.md."""
    path = ROOT / "README.md"
    before, _, rest = path.read_text(encoding="utf-8").partition(BEGIN)
    path.write_text(before + BEGIN + tree() + END + rest.partition(END)[2], encoding="utf-8")


if __name__ == "__main__":
    main()
