"""The emulator bench's table and plot, and the rank correlation of the gate's numbers with the real transfer."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from scipy.stats import spearmanr

RESAMPLES = 2000


def write_report(out: Path, title: str, lines: list[dict[str, Any]]) -> None:
    """Writes report.json, report.md and report.png from the lines of a run."""
    emulators = {line["name"]: line for line in lines if line["key"].startswith("emulator|")}
    cases = [line for line in lines if line["key"].startswith("case|")]
    rows = [_row(emulator, [c for c in cases if c["name"] == name]) for name, emulator in emulators.items()]
    rows = [row for row in rows if row["cases"]]
    document = {"rows": rows, "predictor": _predictors(emulators, cases), "harm": _harm(cases)}
    (out / "report.json").write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    (out / "report.md").write_text(_markdown(title, document), encoding="utf-8")
    _plot(out / "report.png", rows)


def transfer(cases: Sequence[dict[str, Any]], what: str = "plug_in") -> float:
    """Returns G over cases: the ratio of the losses' means, so that a case with a small gain cannot blow it up."""
    zero, tuned, loss = (float(np.mean([case[name] for case in cases])) for name in ("zero_shot", "slot_tuned", what))
    return (zero - loss) / (zero - tuned)


def interval(cases: Sequence[dict[str, Any]], what: str = "plug_in") -> tuple[float, float]:
    """Returns the 95 % bootstrap interval of G over cases."""
    rng = np.random.default_rng(0)
    draws = [transfer([cases[i] for i in rng.integers(0, len(cases), len(cases))], what) for _ in range(RESAMPLES)]
    low, high = np.quantile(draws, (0.025, 0.975))
    return float(low), float(high)


def _row(emulator: dict[str, Any], cases: list[dict[str, Any]]) -> dict[str, Any]:
    row = {name: emulator.get(name) for name in ("name", "shape", "recipe", "cosine", "public", "cpu_seconds")}
    row |= {name: emulator[name] for name in ("middle_ratio", "compute_ratio", "verbatim")}
    row["size"] = emulator["bytes"] / emulator["full_bytes"]
    row["cases"] = len(cases)
    if not cases:
        return row
    row |= {"G": transfer(cases), "interval": interval(cases), "worst": min(transfer([case]) for case in cases)}
    row |= {"taken": transfer(cases, "taken"), "L": transfer(cases, "emulator_tuned")}
    if all("corrected" in case for case in cases):
        row["corrected"] = transfer(cases, "corrected")
    row["relearned"] = {}
    for tokens in sorted({t for case in cases for t in case.get("relearned", {})}, key=int):
        some = [{**case, "loss": case["relearned"][tokens]} for case in cases if tokens in case.get("relearned", {})]
        row["relearned"][tokens] = transfer(some, "loss")
    return row


def _predictors(emulators: dict[str, dict[str, Any]], cases: list[dict[str, Any]]) -> dict[str, Any]:
    """Returns Spearman's rank correlation with G of each number known before training, by domain, over emulators."""
    correlations: dict[str, Any] = {}
    for name, sign in (("cosine", 1), ("public_loss", -1), ("public", 1)):
        by_domain = {}
        for domain in sorted({case["domain"] for case in cases}):
            pairs = [
                (sign * emulator[name], transfer(some))
                for key, emulator in emulators.items()
                if name in emulator and (some := [c for c in cases if c["name"] == key and c["domain"] == domain])
            ]
            if len(pairs) >= 4:
                by_domain[domain] = float(spearmanr(*zip(*pairs, strict=True)).statistic)
        correlations[name] = by_domain
    return correlations


def _harm(cases: list[dict[str, Any]]) -> dict[str, Any]:
    """Returns the cases in which the model became worse than untrained by over half a per cent, plugged in or taken."""
    worse = {
        what: [case["key"] for case in cases if case[what] > 1.005 * case["zero_shot"]] for what in ("plug_in", "taken")
    }
    return {"cases": len(cases), **worse}


def _markdown(title: str, document: dict[str, Any]) -> str:
    head = (
        "| emulator | of the model | middle | compute | cosine | G | 95 % | worst | taken | L | relearned | CPU s |\n"
        "|---|---|---|---|---|---|---|---|---|---|---|---|\n"
    )
    rows = "".join(_line(row) for row in sorted(document["rows"], key=lambda row: row["G"]))
    ranks = "\n".join(
        f"- {name}: " + ", ".join(f"{domain} {value:.2f}" for domain, value in by_domain.items())
        for name, by_domain in document["predictor"].items()
        if by_domain
    )
    harm = document["harm"]
    return (
        f"# Emulators of {title}\n\n{head}{rows}\nRank correlation with G (Spearman):\n\n{ranks}\n\n"
        f"Worse than untrained by over 0.5 %: {len(harm['plug_in'])} of {harm['cases']} as they came, "
        f"{len(harm['taken'])} as the coordinator takes them.\n"
    )


def _line(row: dict[str, Any]) -> str:
    low, high = row["interval"]
    relearned = ", ".join(f"{int(tokens) // 1000}k {value:.2f}" for tokens, value in row["relearned"].items()) or "-"
    corrected = f" (corrected {row['corrected']:.2f})" if "corrected" in row else ""
    seconds = f"{row['cpu_seconds']:.0f}" if row["cpu_seconds"] else "-"
    return (
        f"| {row['name']} | {row['size']:.3f} | {row['middle_ratio']:.3f} | {row['compute_ratio']:.2f} | "
        f"{row['cosine']:.2f} | {row['G']:.3f}{corrected} | {low:.2f} to {high:.2f} | {row['worst']:.2f} | "
        f"{row['taken']:.2f} | {row['L']:.2f} | {relearned} | {seconds} |\n"
    )


def _plot(path: Path, rows: list[dict[str, Any]]) -> None:
    """Draws transfer over leak, with marks as large as the emulators; good emulators are at the upper left."""
    figure, axes = plt.subplots(figsize=(8, 5))
    for place, row in enumerate(sorted(rows, key=lambda row: row["G"])):
        leak = max(-6, row["L"], *row["relearned"].values())
        axes.scatter(leak, row["G"], s=20 + 200 * row["size"], alpha=0.5, color="#3465a4")
        # Alike emulators lie close together, so names stand to the left and to the right in turn.
        side, x = ("left", 8) if place % 2 else ("right", -8)
        axes.annotate(row["name"], (leak, row["G"]), fontsize=7, xytext=(x, -2), textcoords="offset points", ha=side)
    axes.axvline(0, color="grey", linewidth=0.8)
    axes.axhline(0, color="grey", linewidth=0.8)
    axes.set_xlabel("largest leak L, relearning included (cut at -6)")
    axes.set_ylabel("transfer G")
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)
