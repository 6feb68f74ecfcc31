"""All that needs a GPU, in one command of 8 minutes at most: tests, steps, emulator, and an 8B-shaped job.

`python -m bench.gpu` takes the accelerator that PyTorch finds, runs each section in a process of its own, prints a
table and writes JSON. Without an accelerator it says so and ends with code 2. `--device cpu --small` runs the same code
at toy sizes, which tests this script and measures nothing.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

SECONDS = 470.0  # of the whole command
EXIT_NO_DEVICE = 2
ROOT = Path(__file__).resolve().parents[1]
LARGE = {"length": 256, "batch": 8}
TOY = {"length": 16, "batch": 4}
SMALL_TESTS = "causal_lm or sequence_classification or test_session or int8"


def tests(device: torch.device, folder: Path, *, small: bool) -> dict[str, Any]:
    """Runs tests/devices on the device: each task with each engine, session, gate, clip, vetting, refresh, plug-in."""
    environment = os.environ | {"OFFSITE_TEST_DEVICE": str(device), "HF_HUB_OFFLINE": "1"}
    chosen = ["-k", SMALL_TESTS] if small else ["-n", "6", "--dist", "loadscope"]
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "tests/devices", *chosen]
    done = subprocess.run(command, check=False, cwd=ROOT, env=environment, capture_output=True, text=True)
    counted = {word: int(number) for number, word in re.findall(r"(\d+) (passed|failed|error|skipped)", done.stdout)}
    failed = [line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
    return {**counted, "failures": failed, "bar": done.returncode == 0}


def equal(device: torch.device, folder: Path, *, small: bool) -> dict[str, Any]:
    """Runs a small job on the CPU and twice on the device: the same adapter to rounding, and twice the same bits."""
    from bench import gpu_job

    path = gpu_job.write_world(folder / "small", gpu_job.TINY, torch.device("cpu"), **TOY)
    found = gpu_job.same_adapters(path, folder / "runs", device)
    return {**found, "bar": found["equal"] and found["deterministic"]}


def step(device: torch.device, folder: Path, *, small: bool) -> dict[str, Any]:
    """Times a private step against a plain one and against Opacus."""
    from bench.gpu_step import private_steps

    return private_steps(device, small=small)


def emulator(device: torch.device, folder: Path, *, small: bool) -> dict[str, Any]:
    """Times a private step on an emulator against LoRA on the full model."""
    from bench.gpu_step import emulator_steps

    found = emulator_steps(device, folder, small=small)
    return {**found, "bar": found.get("time", 9) <= 1 / 2.5 and found.get("memory", 9) <= 1 / 3}


def job(device: torch.device, folder: Path, *, small: bool) -> dict[str, Any]:
    """Runs a whole job of an 8B-shaped model, both sides, with peak memory by step."""
    from bench import gpu_job

    shape, sizes = (gpu_job.TINY, TOY) if small else (gpu_job.LLAMA_8B, LARGE)
    began = time.monotonic()
    path = gpu_job.write_world(folder / "large", shape, device, **sizes)
    written = time.monotonic() - began
    return {"write_seconds": round(written, 1), **gpu_job.run_job(path, folder / "large" / "run", device)}


def site(device: torch.device, folder: Path, *, small: bool) -> dict[str, Any]:
    """Opens the package of section `job` as one site, alone on the device."""
    from bench.gpu_job import site_alone

    return site_alone(folder / "large" / "run", device)


SECTIONS: dict[str, Callable[..., dict[str, Any]]] = {
    "tests": tests,
    "equal": equal,
    "step": step,
    "emulator": emulator,
    "job": job,
    "site": site,
}


def chosen_device(name: str) -> torch.device | None:
    """Returns the device, deterministic from here on; None where there is no accelerator and none other is named."""
    from offsite.task.device import AUTO, CPU, choose_device

    device = choose_device(name)
    return None if name == AUTO and device.type == CPU else device


def run_section(name: str, arguments: argparse.Namespace, device: str, folder: Path, left: float) -> dict[str, Any]:
    """Runs a section in a process of its own, within the seconds that are left."""
    command = [sys.executable, "-W", "ignore", "-m", "bench.gpu", "--section", name, "--device", device]
    command += ["--folder", str(folder), *(["--small"] if arguments.small else [])]
    began = time.monotonic()
    try:
        done = subprocess.run(command, check=False, cwd=ROOT, capture_output=True, text=True, timeout=max(left, 1.0))
    except subprocess.TimeoutExpired:
        return {"not_finished": f"within {left:.0f} s", "bar": False}
    lines = done.stdout.splitlines()
    if done.returncode or not lines:
        words = (done.stderr.strip().splitlines() or ["no word"])[-1]
        return {"failed": words[:300], "bar": False, "wall_seconds": round(time.monotonic() - began, 1)}
    result: dict[str, Any] = json.loads(lines[-1])
    return {**result, "wall_seconds": round(time.monotonic() - began, 1)}


def table(results: dict[str, Any]) -> str:
    """Returns the results as lines: section, seconds, whether its bar is met, and its numbers."""
    lines = [f"{'section':<10} {'seconds':>8}  bar    what"]
    for name, found in results.items():
        bar = {True: "met", False: "MISSED"}.get(found.get("bar"), "-")  # type: ignore[call-overload]
        lines.append(f"{name:<10} {found.get('wall_seconds', 0):>8}  {bar:<6} {_words(name, found)}")
    return "\n".join(lines)


def _words(name: str, found: dict[str, Any]) -> str:
    if "failed" in found and isinstance(found["failed"], str):
        return f"failed: {found['failed']}"
    if "not_finished" in found:
        return f"not finished {found['not_finished']}"
    if name == "step":
        ways = {adapter: part["time"] for adapter, part in found.items() if isinstance(part, dict)}
        return "; ".join(f"{adapter}: {json.dumps(times)} times the plain step" for adapter, times in ways.items())
    kept = {key: value for key, value in found.items() if not isinstance(value, dict | list) and key != "wall_seconds"}
    return json.dumps(kept)


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="all that needs a GPU, in one command")
    parser.add_argument("--device", default="auto", help="cuda, cuda:N or xpu; cpu with --small tries the script")
    parser.add_argument("--small", action="store_true", help="toy sizes, which measure nothing")
    parser.add_argument("--only", nargs="*", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument("--seconds", type=float, default=SECONDS, help="limit of the whole command")
    parser.add_argument("--out", type=Path, default=Path("gpu.json"))
    parser.add_argument("--section", choices=SECTIONS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Runs all sections and returns 0, or 1 where a bar is missed, or 2 without an accelerator."""
    arguments, began = _arguments(argv), time.monotonic()
    device = chosen_device(arguments.device)
    if device is None:
        print("bench/gpu.py: PyTorch finds no GPU here, so nothing was run; --device cpu --small tries the script")
        return EXIT_NO_DEVICE
    if arguments.section is not None:
        print(json.dumps(SECTIONS[arguments.section](device, arguments.folder, small=arguments.small)))
        return 0
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in arguments.only:
            left = arguments.seconds - (time.monotonic() - began)
            results[name] = run_section(name, arguments, str(device), Path(folder), left)
            print(f"{name}: {results[name].get('wall_seconds', '-')} s", flush=True)
    facts = {"device": str(device), "name": _name(device), "torch": torch.__version__, "small": arguments.small}
    arguments.out.write_text(json.dumps({**facts, "sections": results}, indent=1) + "\n", encoding="utf-8")
    print(table(results))
    return 0 if arguments.small or all(found.get("bar", True) for found in results.values()) else 1


def _name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


if __name__ == "__main__":
    raise SystemExit(main())
