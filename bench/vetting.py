"""How often a vetting refuses an honest emulator: packages of all families and compressors, each vetted many times.

Only the vetting's draw varies for one package. Each draw is one whole decision of a site: where it fails, the second
look with `AVERAGED` fresh draws decides, as `emulator.vetting.draws` does. Beside the count of refusals stand two
estimates of the second look alone that assume no normal distribution:

- resampled: the share of means over `AVERAGED` draws, taken again from the package's own draws, that break a limit;
- tail: Chernoff's bound on such a mean, from the package's own draws, one in `1 / UNSEEN` of which is replaced by the
  worst that can be: 1 for a share, 0 for a number with a lower limit.

The bound of a package is the tail times the rate at which its first look fails: the upper end of that rate's interval,
or `UNSEEN` where no draw failed.
"""

import argparse
import json
import math
import random
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers as hf
from scipy.optimize import minimize_scalar
from scipy.special import logsumexp
from scipy.stats import beta

from bench.honest_models import FAMILIES, honest
from offsite.emulator.build.package_writer import EmulatorDesign, write_package
from offsite.emulator.package.package_reader import load, read_manifest
from offsite.emulator.structure.geometry import Geometry
from offsite.emulator.vetting.activation_checks import activation_checks
from offsite.emulator.vetting.draws import AVERAGED, decided
from offsite.emulator.vetting.limits import Check, VettingThresholds, refusal
from offsite.emulator.vetting.structure_checks import check_structure
from offsite.emulator.vetting.weight_checks import weight_checks
from offsite.errors import OffsiteError, UnsupportedModel

DRAWS, RESAMPLES, UNSEEN = 24, 500, 1e-4
LIMITS = VettingThresholds()
RECIPES = (
    "",
    "int8:16",
    "int4:16",
    "int3:16",
    "gptq4:16",
    "int4:16/6",
    "lowrank:0.7",
    "gptq4:16 center",
    "skip_uniform:0.5",
    "skip_uniform:0.5 refit int8:16",
    "skip_uniform:0.5 patch gptq4:16",
    "skip_gradient:0.5",
    "share:0.5 int8:16",
    "narrow:0.5",
    "prune:0.5",
    "prune_2_4",
    "prune_2_4 int4:16",
)
TABLES = ("verbatim", "int8")
RATES = ("resampled", "tail", "bound")
UNBUILT = {("llava", "skip_gradient:0.5")}  # transformers' LLaVA finds no hidden states while its blocks are exchanged
Draw = Callable[[], Iterator[Check]]


def measured(family: str, draw: random.Random, draws: int) -> dict[str, Any] | None:
    """Returns the numbers of a random honest package; None where the family refuses the recipe."""
    what, made = honest(family, draw)
    recipe, table = draw.choice(RECIPES), draw.choice(TABLES)
    if (family, recipe) in UNBUILT:
        return None
    with tempfile.TemporaryDirectory() as folder:
        package = Path(folder) / "p"
        try:
            made.build(package, tuple(recipe.split()), table)
        except OffsiteError:
            return None
        facts = {"family": family, "what": what, "recipe": f"{recipe or 'none'}, table {table}"}
        return facts | vetted(package, draw.randrange(1 << 30), draws)


def vetted(package: Path, seed: int, draws: int) -> dict[str, Any]:
    """Returns the decisions on a package and the worst numbers of its draws."""
    model, manifest = load(package, dtype=torch.float32), read_manifest(package)
    blocks = check_structure(package, model, manifest)
    generator = torch.Generator().manual_seed(seed)
    once: Draw = partial(activation_checks, model, manifest, blocks, LIMITS, generator)
    stored = list(weight_checks(model, LIMITS, generator))
    found, failed = [], 0
    reasons = [str(refusal(check)) for check in stored if not check.passed][:1] * draws
    for _ in range(draws):
        checks = tuple(once())
        found.append(checks)
        if not all(check.passed for check in checks):
            failed += 1
            try:
                decided(once_given(checks, once))
            except UnsupportedModel as error:
                reasons.append(str(error))
    numbers = [(round(_use(check.value, check), 4), check.name) for checks in (*found, stored) for check in checks]
    looks = second_look(found)
    first = upper(failed, draws) if failed else UNSEEN
    return {
        "draws": draws,
        "failed": failed,
        "refused": min(len(reasons), draws),
        "reason": reasons[0] if reasons else "",
        "worst": max(numbers),
        **looks,
        "bound": first * looks["tail"],
    }


def once_given(first: tuple[Check, ...], fresh: Draw) -> Callable[[], Any]:
    """Returns a draw that gives some checks first and fresh ones afterwards, so that no draw is made twice."""
    left = [first]
    return lambda: left.pop() if left else fresh()


def second_look(found: list[tuple[Check, ...]]) -> dict[str, Any]:
    """Returns the estimates of the second look, from single draws that all measure the same numbers."""
    kinds = found[0]
    values = np.array([[check.value for check in checks] for checks in found])
    limits = np.array([[check.limit for check in checks] for checks in found])
    sign = np.array([-1.0 if check.least else 1.0 for check in kinds])
    over = (values - limits) * sign  # above 0 breaks the limit
    worst = np.array([_worst(check) for check in kinds])
    picks = np.random.default_rng(0).multinomial(AVERAGED, np.full(len(found), 1 / len(found)), RESAMPLES) / AVERAGED
    # What is the same in every draw and passes, as `least_finite`, cannot fail by luck.
    moving = values.std(0) > 0
    broken = ((picks @ over)[:, moving] > 0).any(1)
    bounds = [tail(over[:, i], worst[i]) for i in np.flatnonzero(moving)]
    return {"resampled": float(broken.mean()), "tail": min(1.0, float(sum(bounds)))}


def tail(over: Any, worst: float) -> float:
    """Returns Chernoff's bound on the probability that a mean over `AVERAGED` draws is above 0.

    Args:
      over: by how much single draws exceed their limit, (draws,).
      worst: largest excess that is possible; a share `UNSEEN` of draws is taken to have it.
    """
    points = np.append(over, worst)
    logs = np.log(np.append(np.full(len(over), (1 - UNSEEN) / len(over)), UNSEEN))
    scale = max(float(np.abs(points).max()), 1e-300)

    def exponent(rate: float) -> float:
        return float(AVERAGED * logsumexp(logs + math.exp(rate) * points / scale))

    best = minimize_scalar(exponent, bounds=(-10, 12), method="bounded")
    return min(1.0, math.exp(min(best.fun, 0.0)))


def _worst(check: Check) -> float:
    """Returns the largest excess of a number over its limit: 1 is the largest share, and 0 the least number.

    A growth has no largest value, so what nobody saw is taken as the limit ten times over.
    """
    if check.least:
        return check.limit
    return 10 * check.limit if check.limit > 1 else 1 - check.limit


def _use(value: float, check: Check) -> float:
    """Returns the share of its limit that a number uses; above 1 it breaks the limit."""
    if check.name == "least_finite" and value == check.limit:
        return 0.0
    part, whole = (check.limit, value) if check.least else (value, check.limit)
    return part / whole if whole > 0 else float(part > 0) * 1e9


def upper(failures: int, draws: int) -> float:
    """Returns the upper end of the 95 % interval of a rate, one-sided (Clopper and Pearson)."""
    return float(beta.ppf(0.95, failures + 1, draws - failures)) if failures < draws else 1.0


def report(lines: list[dict[str, Any]]) -> str:
    """Returns the table over families, over recipes, and the rates over all."""
    parts = []
    for what in ("family", "recipe"):
        columns = (
            f"{what} | packages | draws | worst number / limit | failed draws | refused | resampled | tail | bound"
        )
        parts += [f"| {columns} |", "|---" * 9 + "|"]
        for name in sorted({_group(line, what) for line in lines}):
            parts.append(_row(name, [line for line in lines if _group(line, what) == name]))
        parts.append("")
    parts.append(_row("all", lines))
    draws, refused = (sum(line[key] for line in lines) for key in ("draws", "refused"))
    packages = sum(line["refused"] > 0 for line in lines)
    parts.append(f"\nrefused: {refused} of {draws} decisions, at most {upper(refused, draws):.2g} (95 %)")
    parts.append(f"packages with a refusal: {packages} of {len(lines)}, at most {upper(packages, len(lines)):.2g}")
    parts.append(f"mean bound of a package: {np.mean([line['bound'] for line in lines]):.2g}")
    parts += [f"refused: {line['what']}, {line['recipe']}: {line['reason']}" for line in lines if line["refused"]]
    return "\n".join(parts)


def _group(line: dict[str, Any], what: str) -> str:
    return str(line[what]).partition(", table")[0]


def _row(name: str, lines: list[dict[str, Any]]) -> str:
    draws, failed, refused = (sum(line[key] for line in lines) for key in ("draws", "failed", "refused"))
    worst = max(lines, key=lambda line: float(line["worst"][0]))["worst"]
    rates = " | ".join(f"{max(float(line[key]) for line in lines):.1g}" for key in RATES)
    return f"| {name} | {len(lines)} | {draws} | {worst[1]} {worst[0]:.2f} | {failed} | {refused} | {rates} |"


def real(folder: Path, seed: int, draws: int) -> Iterator[dict[str, Any]]:
    """Yields the numbers of packages of a real causal language model, with two slots' blocks at each end."""
    model = hf.AutoModelForCausalLM.from_pretrained(str(folder), dtype=torch.float32).eval().requires_grad_(False)
    model.config.use_cache = False
    for recipe in ("int4:128",):
        with tempfile.TemporaryDirectory() as place:
            design = EmulatorDesign(Geometry.of(model, 2, 2), (recipe,), "int8")
            write_package(model, design, None, Path(place) / "p")
            facts = {"family": folder.name, "what": folder.name, "recipe": f"{recipe}, table int8"}
            yield facts | vetted(Path(place) / "p", seed, draws)


def main() -> None:
    """Measures random packages until the time is up, or shows the table of what was measured."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=1, help="draws the same packages from the same code")
    parser.add_argument("--minutes", type=float, default=60.0, help="begin no further package after so long")
    parser.add_argument("--draws", type=int, default=DRAWS, help="draws on each package")
    parser.add_argument("--real", type=Path, help="measure packages of the causal language model in this folder")
    parser.add_argument("--report", action="store_true", help="only show the table of --out")
    parser.add_argument("--out", type=Path, default=Path("vetting.jsonl"), help="file to which a line is added each")
    given = parser.parse_args()
    if given.report:
        print(report([json.loads(line) for line in given.out.read_text(encoding="utf-8").splitlines()]))
        return
    warnings.simplefilter("ignore")
    hf.logging.set_verbosity_error()
    torch.set_num_threads(1)
    until, draw = time.monotonic() + 60 * given.minutes, random.Random(given.seed)
    lines = real(given.real, given.seed, given.draws) if given.real else iter(partial(corpus, draw, given.draws), None)
    with given.out.open("a", encoding="utf-8") as out:
        for line in lines:
            if line:
                out.write(json.dumps(line) + "\n")
                out.flush()
            if time.monotonic() > until:
                break


def corpus(draw: random.Random, draws: int) -> dict[str, Any]:
    """Returns the numbers of the next random package; empty where the family refuses the recipe."""
    return measured(draw.choice(FAMILIES), draw, draws) or {}


if __name__ == "__main__":
    main()
