"""Writes the lock files: the version and the SHA-256 of every file of each package, for `pip --require-hashes`.

  python deploy/lock.py             keeps the versions that are locked, as far as pyproject.toml permits
  python deploy/lock.py --upgrade   takes the newest

torch is left out, with the libraries that only its builds for GPUs bring: which build fits follows from a machine's
processor and driver, and each build lies on an index of its own, under hashes of its own. The Makefile and the
Dockerfile install the build that `TORCH` names. `make lock` runs this beside uv, in an environment of its own.
"""

import re
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TESTED_PYTHON = "3.11.7"
# File, whether the requirements of the program itself belong to it, and extras of pyproject.toml.
LOCKS = (
    ("requirements-dev.lock", True, ("dev", "simulation", "diffusion", "measures", "demo", "docs")),
    ("requirements.lock", True, ("demo",)),
    ("requirements-extra.lock", False, ("bitsandbytes", "bench")),
)
OF_TORCH = re.compile(r"(torch|triton|(nvidia|cuda|pytorch-triton)-[\w-]+)==")
OPTIONS = ("--quiet", "--generate-hashes", "--no-header", "--no-annotate")


def wanted(program: bool, extras: tuple[str, ...]) -> list[str]:
    """Returns requirements of pyproject.toml, the build backend's among those of the program."""
    content = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    project, lines = content["project"], []
    if program:
        lines += [*content["build-system"]["requires"], *project["dependencies"]]
    return lines + [line for extra in extras for line in project["optional-dependencies"][extra]]


def entries(text: str) -> list[str]:
    """Returns the entries of a lock file, each a package with its version and all of its hashes."""
    blocks = re.split(r"(?m)^(?=\S)", text)
    return [block for block in blocks if block.strip() and not block.startswith("#") and not OF_TORCH.match(block)]


def compiled(lines: list[str], pins: list[str], *, alone: bool) -> list[str]:
    """Returns the locked entries of requirements.

    Args:
      lines: requirements.
      pins: versions that are to be kept, as `name==version`.
      alone: whether the requirements of the requirements are left out, since another lock has them.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "wanted.in").write_text("\n".join(lines), encoding="utf-8")
        (folder / "pins.txt").write_text("\n".join(pins), encoding="utf-8")
        command = [sys.executable, "-m", "uv", "pip", "compile", *OPTIONS, "--python-version", TESTED_PYTHON]
        command += ["--constraint", "pins.txt", "--output-file", "locked.txt", "wanted.in"]
        subprocess.run(command, cwd=folder, check=True)  # noqa: S603 - our own interpreter and options
        found = entries((folder / "locked.txt").read_text(encoding="utf-8"))
    names = {re.split(r"[^\w-]", line)[0] for line in lines}
    return [entry for entry in found if not alone or entry.split("==")[0] in names]


def main() -> None:
    """Writes all lock files, each with the versions of those before."""
    pins: list[str] = []
    if "--upgrade" not in sys.argv[1:]:
        pins = [entry.split()[0] for name, *_ in LOCKS if (ROOT / name).exists() for entry in entries(_read(name))]
    for name, program, extras in LOCKS:
        locked = compiled(wanted(program, extras), sorted(set(pins)), alone=not program)
        pins = sorted({*pins, *(entry.split()[0] for entry in locked)})
        (ROOT / name).write_text("".join(locked), encoding="utf-8")


def _read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


if __name__ == "__main__":
    main()
