"""Checks that the stubs are what the .proto files generate, or writes the stubs, with `--write`."""

import subprocess
import sys
import tempfile
from pathlib import Path

ROOM = Path(__file__).resolve().parent
STUBS = (
    "round_pb2.py",
    "round_pb2.pyi",
    "depot_pb2.py",
    "depot_pb2.pyi",
    "depot_pb2_grpc.py",
)


def generate(root: Path) -> None:
    """Generates the stubs below `root`/protos with the installed compiler."""
    command = [sys.executable, "-m", "grpc_tools.protoc", f"-I{ROOM.parent}", f"--python_out={root}"]
    command += [f"--pyi_out={root}"]
    subprocess.run([*command, str(ROOM / "round.proto")], check=True)  # noqa: S603 - our own interpreter and file
    service = [*command, f"--grpc_python_out={root}", str(ROOM / "depot.proto")]
    subprocess.run(service, check=True)  # noqa: S603 - our own interpreter and file
    stub = root / "protos" / "depot_pb2_grpc.py"  # the compiler names the package after the folder of the .proto file
    stub.write_text(stub.read_text().replace("from protos import", "from offsite.protos import"))


def stale() -> list[str]:
    """Returns the names of the committed stubs that differ from the compiler's output now."""
    with tempfile.TemporaryDirectory() as folder:
        generate(Path(folder))
        fresh = {name: (Path(folder) / "protos" / name).read_bytes() for name in STUBS}
    return [name for name, content in fresh.items() if (ROOM / name).read_bytes() != content]


def main() -> None:
    """Exits with 1 when a stub is stale."""
    if "--write" in sys.argv[1:]:
        generate(ROOM.parent)
    elif names := stale():
        sys.exit(f"stale stubs: {', '.join(names)}; run make protos")


if __name__ == "__main__":
    main()
