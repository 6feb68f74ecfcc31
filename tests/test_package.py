"""One importable name: what `import offsite` gives, what the wheel installs, and why a user's files shadow nothing."""

import ast
import doctest
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import offsite

ROOT = Path(__file__).resolve().parent.parent
ROOMS = sorted(path.name for path in (ROOT / "offsite").iterdir() if path.is_symlink())
HEAVY = ("torch", "transformers", "peft", "opacus", "flwr", "matplotlib", "pyarrow", "numpy")


def python(code: str, folder: Path) -> str:
    """Runs code in a fresh interpreter whose working folder is first on the path, as `python -c` has it."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": f".:{ROOT}"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_every_public_name_is_there_and_documented() -> None:
    assert sorted(offsite.__all__) == list(offsite.__all__)
    for name in offsite.__all__:
        assert (getattr(offsite, name).__doc__ or "").strip(), name
    assert set(offsite.__all__) <= set(dir(offsite))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        offsite.nothing  # noqa: B018


def test_the_public_names_are_all_that_a_user_sees() -> None:
    """What stands in `__all__` is what is defined or promised at the top of the file, besides the rooms."""
    tree = ast.parse((ROOT / "offsite" / "__init__.py").read_text())
    functions = {node.name for node in tree.body if isinstance(node, ast.FunctionDef) and not node.name.startswith("_")}
    assert functions <= set(offsite.__all__)
    assert {name for name in vars(offsite) if not name.startswith("_")} <= set(offsite.__all__) | set(ROOMS)


@pytest.mark.slow
def test_the_example_of_the_package_runs(fed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("fed.toml", "model", "data"):
        (tmp_path / name).symlink_to(fed.parent / name)
    monkeypatch.chdir(tmp_path)
    failed, ran = doctest.testmod(offsite)
    assert (failed, ran > 5) == (0, True)


def test_importing_the_package_loads_nothing_heavy(tmp_path: Path) -> None:
    printed = python(f"import offsite, sys; print([name for name in {HEAVY} if name in sys.modules])", tmp_path)
    assert printed.strip() == "[]"


@pytest.mark.slow
def test_files_of_a_user_with_the_names_of_our_rooms_change_nothing(fed: Path, tmp_path: Path) -> None:
    """A whole simulation beside `task.py`, `errors.py` and the like, each of which would end it."""
    for name in ROOMS:
        (tmp_path / f"{name}.py").write_text("raise SystemExit('a file of the user was run')\n")
    code = (
        "import sys; from offsite.cli.main import app; "
        f"app(['simulate', {str(fed)!r}, '--out', 'run', '--rounds', '1'], standalone_mode=False); "
        f"print(sorted(set({ROOMS}) & set(sys.modules)))"
    )
    assert python(code, tmp_path).splitlines()[-1] == "[]"
    assert (tmp_path / "run" / "report.json").is_file()


def test_no_file_of_ours_imports_a_room_by_its_bare_name() -> None:
    known = subprocess.run(["git", "ls-files", "*.py"], cwd=ROOT, capture_output=True, text=True, check=True)
    for name in filter(lambda name: (ROOT / name).exists(), known.stdout.split()):
        for node in ast.walk(ast.parse((ROOT / name).read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not {one.partition(".")[0] for one in names} & set(ROOMS), f"{name}:{getattr(node, 'lineno', 0)}"


@pytest.mark.slow
def test_the_wheel_installs_one_name(tmp_path: Path) -> None:
    """Plain files and no links: every module of the checkout, and nothing beside `offsite`."""
    source = tmp_path / "source"
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    known = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\0")[:-1]
    for name in filter(lambda name: (ROOT / name).exists() or (ROOT / name).is_symlink(), known):
        place = source / name
        place.parent.mkdir(parents=True, exist_ok=True)
        if (ROOT / name).is_symlink():
            place.symlink_to((ROOT / name).readlink())
        else:
            place.write_bytes((ROOT / name).read_bytes())
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(tmp_path), str(source)]
    subprocess.run(command, check=True, capture_output=True, text=True)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if ".dist-info/" not in name]
        assert all(info.external_attr >> 16 & 0o170000 != 0o120000 for info in archive.infolist())
    assert {name.partition("/")[0] for name in names} == {"offsite"}
    modules = {f"offsite/{p.relative_to(ROOT)}" for room in ROOMS for p in (ROOT / room).rglob("*.py")}
    assert modules | {"offsite/__init__.py", "offsite/py.typed"} <= set(names)
