"""Fine-tune a model that may not leave its owner on data that may not leave theirs.

The names in `__all__` are the public interface. Each function loads its libraries at its first call, so importing this
package costs nothing. A coordinator or a client between organisations is run with the command `offsite`.

Example, in a folder with a federation file, a model and public text:

  >>> import offsite
  >>> report = offsite.simulate("fed.toml", "run", rounds=1)
  >>> report.finished_rounds
  1
  >>> offsite.read_report("run") == report
  True
  >>> from transformers import AutoModelForCausalLM
  >>> model = offsite.load_adapter(AutoModelForCausalLM.from_pretrained("model"), "run/adapter")
  >>> built = offsite.build_emulator("model", "emulator", public="data/public", recipe=["int8:32"], length=16, gate=0.1)
  >>> built.manifest.recipe
  ('int8:32',)
"""

from collections.abc import Callable as _Callable
from collections.abc import Mapping as _Mapping
from collections.abc import Sequence as _Sequence
from os import PathLike as _PathLike
from typing import TYPE_CHECKING as _TYPE_CHECKING

if _TYPE_CHECKING:
    from torch import nn as _nn

    from offsite.coordinator.report.model import Report
    from offsite.emulator.build.pipeline import Built

__all__ = ["Report", "build_emulator", "load_adapter", "read_report", "simulate"]

_Path = str | _PathLike[str]


def simulate(
    federation: _Path,
    out: _Path,
    *,
    engine: str = "memory",
    seed: int | None = None,
    rounds: int | None = None,
    sites: int | None = None,
    device: str | None = None,
    on_step: _Callable[[str], None] = lambda text: None,
) -> "Report":
    """Runs a whole federation on this machine, writes its run folder and returns its report.

    Args:
      federation: the federation file, see docs/configuration.md.
      out: run folder to write; missing, empty, or of a run without a whole round, which is taken over.
      engine: "memory", or "flower" for Flower's simulation runtime.
      seed: seed in place of the file's.
      rounds: number of rounds in place of the file's.
      sites: number of sites, the first in the file; None for all.
      device: device in place of the file's: "auto", "cpu", "cuda", "cuda:N" or "xpu".
      on_step: function that receives a sentence about each step.

    Raises:
      offsite.errors.OffsiteError: what is wrong and what to change; a run folder then stands at its last whole round.
    """
    from datetime import UTC, datetime
    from pathlib import Path

    from offsite.errors import lookup
    from offsite.simulation.begin import begin
    from offsite.simulation.engine_table import ENGINES
    from offsite.simulation.run_folder import Origin
    from offsite.simulation.simulate import Options
    from offsite.simulation.simulate import simulate as run_simulation
    from offsite.simulation.step_display import StepDisplay

    carry = lookup(ENGINES, engine, "engine")
    origin = Origin(seed=seed, rounds=rounds, sites=sites)
    run = begin(Path(federation), Path(out), origin, lambda line: on_step(f"WARNING {line}"), device=device)
    now = datetime.now(UTC).isoformat(timespec="seconds")
    return run_simulation(run, Options(carry, engine, StepDisplay(on_step), now))


def build_emulator(
    model: _Path,
    out: _Path,
    *,
    public: _Path,
    task: str = "causal_lm",
    columns: _Mapping[str, str] | None = None,
    recipe: _Sequence[str] = (),
    max_bytes: int | None = None,
    max_flops: float | None = None,
    max_leak: float | None = None,
    first: int = 2,
    last: int = 2,
    method: str = "lora",
    rank: int = 8,
    gate: float = 0.3,
    sequences: int = 64,
    length: int = 128,
    device: str = "auto",
    on_step: _Callable[[str], None] = lambda text: None,
) -> "Built":
    """Builds an emulator of a model as a package, by a recipe or within limits; what fails its checks is not kept.

    Args:
      model: folder of the full model, with safetensors.
      out: package folder to write; missing or empty.
      public: file or folder of the model owner's own records.
      task: name in `offsite.task.tasks.TASKS`.
      columns: column of each field of the records, where the column is not named as the field.
      recipe: compressors in order, for example ["narrow:0.34", "gptq4:64"]; empty to search within the limits.
      max_bytes: bytes of the shipped weights, at most.
      max_flops: share of the middle's multiply-adds, at most.
      max_leak: leak in a rehearsal, at most; None rehearses nothing.
      first: number of blocks that are shipped unchanged at the input side.
      last: number of blocks that are shipped unchanged at the output side.
      method: adapter method that will be trained, a name in `offsite.adapter.methods.METHODS`.
      rank: rank of the adapter.
      gate: cosine of the adapter's gradients through emulator and full model, at least; in [-1, 1].
      sequences: number of public examples that compressors look at.
      length: number of tokens of an example, at most.
      device: device that computes: "auto", "cpu", "cuda", "cuda:N" or "xpu".
      on_step: function that receives a sentence about each step.

    Returns:
      The package's manifest, and what was measured: `gradient_cosine`, losses, similarity, leak.

    Raises:
      offsite.errors.OffsiteError: what is wrong and what to change; the folder is then left as it was.
    """
    from pathlib import Path

    from offsite.adapter.spec import AdapterSpec
    from offsite.emulator.build.cost import SizeLimits
    from offsite.emulator.build.from_folder import PublicData, build_from_folder
    from offsite.emulator.build.pipeline import Order

    order = Order(
        first=first,
        last=last,
        recipe=tuple(recipe),
        limits=SizeLimits(bytes=max_bytes, flops=max_flops, leak=max_leak),
        adapter=AdapterSpec(method=method, rank=rank, alpha=2.0 * rank),
        gate=gate,
    )
    data = PublicData(Path(public), task, dict(columns or {}), sequences, length)
    return build_from_folder(Path(model), Path(out), order, data, on_step, device=device)


def load_adapter(model: "_nn.Module", folder: _Path) -> "_nn.Module":
    """Attaches the adapter of a run folder to a full model, in place and frozen, and returns the model to use.

    Args:
      model: the full model that the job was made for.
      folder: the folder `adapter` of a run folder.

    Raises:
      offsite.errors.OffsiteError: the folder holds no adapter, or an adapter of another model.
    """
    from pathlib import Path

    from offsite.adapter.export import load

    return load(model, Path(folder))


def read_report(folder: _Path) -> "Report":
    """Reads the report of a run folder, of a simulation or of a job between organisations.

    Args:
      folder: the run folder; its report.json is read.

    Raises:
      offsite.errors.DataError: the folder holds no report.
    """
    from pathlib import Path

    from offsite.coordinator.report.json_report import read_report as read

    return read(Path(folder))


def __getattr__(name: str) -> object:
    if name == "Report":
        from offsite.coordinator.report.model import Report

        return Report
    raise AttributeError(f"module 'offsite' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
