"""The sections of a run report: sentences and tables of rounded numbers."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from offsite.coordinator.report import metrics
from offsite.coordinator.report.formatting import count, number, percent, short, signed, size
from offsite.coordinator.report.privacy_statement import WITHOUT_PRIVACY

Report = Mapping[str, Any]
Rows = tuple[tuple[str, ...], ...]

FOUR = {
    "full_zero_shot": "full model, before training",
    "emulator_zero_shot": "emulator, before training",
    "emulator_tuned": "emulator, tuned adapter",
    "plug_in": "full model, tuned adapter (plug-in)",
}
"""The four models that are compared, in the order of every table and plot."""


@dataclass(frozen=True)
class Section:
    """One heading with what stands below it.

    Attributes:
      heading: of the section.
      text: paragraphs before the table.
      head: column names.
      rows: as many cells each as there are column names.
      plot: key of the plot that belongs here, or empty.
      numbers: whether all columns but the first hold numbers.
    """

    heading: str
    text: tuple[str, ...]
    head: tuple[str, ...] = ()
    rows: Rows = ()
    plot: str = ""
    numbers: bool = False


def quality(report: Report) -> Section:
    """Returns the section on how good the four models are, on private and public records."""
    scores = report["quality"]
    private, public = (scores[kind]["plug_in"] for kind in ("private", "public"))
    shown = metrics.names(private)
    rows = tuple(
        (words, *_scored(scores["private"][name], scores["public"][name], shown)) for name, words in FOUR.items()
    )
    heads = tuple(f"{kind} {title}" for kind in ("private", "public") for title in ("loss", *map(metrics.title, shown)))
    return Section(
        "How good the model is",
        _meaning(private, public, signed(scores["forgetting_nats"])),
        ("model", *heads),
        rows,
        "fidelity",
        numbers=True,
    )


def _scored(private: Mapping[str, Any], public: Mapping[str, Any], shown: Sequence[str]) -> tuple[str, ...]:
    return tuple(
        cell
        for score in (private, public)
        for cell in (number(score["loss"]), *(metrics.value(score, name) for name in shown))
    )


def _meaning(private: Mapping[str, Any], public: Mapping[str, Any], forgetting: str) -> tuple[str, ...]:
    loss = metrics.loss_of(private)
    held, shown = (count(score["targets"]) for score in (private, public))
    words = (
        *(loss.meaning, *metrics.meanings(private)),
        "An adapter is the small set of trained numbers; an emulator is the smaller stand-in for the full model on "
        "which the sites train it.",
    )
    if loss.kind == "text":
        return (
            " ".join(words),
            f"Private text is text of the sites that was held out from training ({held} tokens). Public text is of "
            f"another kind ({shown} tokens) and shows what was forgotten: its loss changed by {forgetting} "
            f"{loss.unit}.",
        )
    return (
        " ".join(words),
        f"Private records are records of the sites that were held out from training ({held} targets). Public records "
        f"are the coordinator's own ({shown} targets) and show what was forgotten: their loss changed by {forgetting} "
        f"{loss.unit}.",
    )


def rounds(report: Report) -> Section:
    """Returns the section on the rounds, and why one was not taken over."""
    rows = tuple(
        (
            f"{line['round']}",
            "yes" if line["accepted"] else "no",
            number(line["public_loss"], 4),
            short(line["update_norm"]),
            f"{len(line['members'])}",
            number(line["seconds"], 1),
            size(line["bytes_down"]),
            size(line["bytes_up"]),
        )
        for line in report["rounds"]
    )
    refused = tuple(f"Round {line['round']}: {line['reason']}." for line in report["rounds"] if not line["accepted"])
    return Section(
        "Rounds",
        (
            f"{report['finished_rounds']} of {report['rounds_planned']} rounds were run. After each, the new adapter "
            "is tried in the full model on public records, and taken over only if the loss there is no worse than the "
            "best so far, within a tolerance. Update length is how far the sites' mean moved the adapter.",
            *refused,
            *_corrected(report),
            *refreshes(report["rounds"]),
        ),
        ("round", "taken over", "public loss", "update length", "sites", "seconds", "to sites", "from sites"),
        rows,
        "rounds" if rows else "",
        numbers=True,
    )


def _corrected(report: Report) -> tuple[str, ...]:
    found = [str(line["round"]) for line in report["rounds"] if line["accepted"] and line.get("correction")]
    if not found:
        return ()
    return (
        f"In round {', '.join(found)} what the adapter had learnt to repair in the emulator was taken out, wholly "
        "or by half, before it was plugged in: the full model was better so on public records.",
    )


def refreshes(lines: Sequence[Mapping[str, Any]]) -> tuple[str, ...]:
    """Returns a sentence on what became of the emulator between rounds; none for a job without refreshes."""
    tried = [line for line in lines if "refreshed" in line]
    kept = [line for line in tried if line["refreshed"]]
    if not tried:
        return ()
    if not kept:
        return (f"The emulator was to be refreshed {len(tried)} times; it was no better by any, and stayed as it was.",)
    before, after = (number(sum(line["emulator_loss"][i] for line in kept) / len(kept), 4) for i in (0, 1))
    most = max(lines, key=lambda line: int(line["refresh_bytes"]))
    return (
        f"The emulator was refreshed after round {', '.join(str(line['round']) for line in kept)}: biases of its "
        f"middle moved, by which its loss with the adapter went from {before} to {after} on public records in the "
        "mean. "
        f"With each later round a site got {size(most['refresh_bytes'])} of them, {short(100 * most['refresh_share'])} "
        "% of the package.",
    )


def privacy(report: Report) -> Section:
    """Returns the section on each site's privacy numbers."""
    terms = report["privacy"]
    rows = tuple(
        (
            str(site["site"]),
            count(site["records"]),
            number(site["epsilon"], 2),
            short(site["delta"]),
            short(site["noise_multiplier"]),
            short(site["max_grad_norm"]),
            short(site["sample_rate"]),
            count(site["steps"]),
        )
        for site in terms["sites"]
    )
    if not terms["private"]:
        return Section("Privacy", (f"This run was {WITHOUT_PRIVACY}.",), _PRIVACY_HEAD, rows, numbers=True)
    return Section(
        "Privacy",
        (
            f"What is protected: {terms['unit']}. The promise compares two data sets of which one has one record "
            'more. In each step a record is drawn with the probability in the column "sample rate", its gradient is '
            'cut to the length "clip", and Gaussian noise of "noise multiplier" times "clip" is added.',
            f"Epsilon and delta hold for all rounds together, computed by the accountant {terms['accountant']}. "
            f"{_engines(terms['sites'])}Noise: {terms['noise_source']}. What is not protected stands in privacy.json.",
        ),
        _PRIVACY_HEAD,
        rows,
        "epsilon" if rows else "",
        numbers=True,
    )


def _engines(sites: Sequence[Mapping[str, Any]]) -> str:
    """Returns a sentence on how each record's own contribution was found; a real site keeps that to itself."""
    found = sorted({str(site["engine"]) for site in sites if site.get("engine")})
    if not found:
        return ""
    if found == ["zero_order"]:
        return "No gradients were taken: each record's losses along public directions were clipped instead. "
    return f"Each record's own gradient comes from the engine {' or '.join(found)}, which the start-up probe chose. "


_PRIVACY_HEAD = ("site", "records", "epsilon", "delta", "noise multiplier", "clip", "sample rate", "steps")


def emulator(emulator: Mapping[str, Any]) -> Section:
    """Returns the section on what was shipped and how faithful it is."""
    rows = (
        ("shipped in all", size(emulator["shipped_bytes"])),
        ("  of it the blocks that carry the adapter, unchanged", size(emulator["slot_bytes"])),
        ("  of it the word tables (embeddings)", size(emulator["embedding_bytes"])),
        ("  of it the blocks between, compressed", size(emulator["middle_bytes"])),
        ("full model at 16 bits", size(emulator["full_bytes"])),
        ("share of the blocks between that is shipped", percent(emulator["middle_ratio"])),
        ("share of the full model shipped unchanged", percent(emulator["verbatim_share"])),
        ("compression of the blocks between", ", then ".join(map(str, emulator["recipe"])) or "none"),
        ("storage of the word tables", str(emulator["embedding"])),
        ("gradient cosine (1 is perfect)", number(emulator["gradient_cosine"])),
        ("least cosine allowed", number(emulator["gate"], 2)),
    )
    text = (
        "The emulator keeps the first and last blocks as they are, where the adapter sits, and compresses those "
        "between. The gradient cosine compares the directions in which full model and emulator would change the "
        "adapter, on public records; an emulator below the least cosine is refused before any site trains."
    )
    return Section("Emulator", (text,), ("fact", "value"), rows)


def emulators(emulator: Mapping[str, Any]) -> tuple[Section, ...]:
    """Returns the section on which site got which emulator; none where all got the same."""
    if not emulator.get("variants"):
        return ()
    rows = tuple(
        (
            ", ".join(map(str, one["sites"])),
            size(one["package_bytes"]),
            ", then ".join(map(str, one["recipe"])) or "none",
            str(one["embedding"]),
            number(one["gradient_cosine"]),
            number(one["public_loss"]),
            str(one["sha256"])[:16],
        )
        for one in (emulator, *emulator["variants"])
    )
    text = (
        "Not all sites got the same emulator. Geometry and adapter are the same for all, so that their updates can be "
        "added. What is said of the emulator elsewhere in this report is said of the first one here; public loss is "
        "the emulator's before any training. Every site was told who got which."
    )
    head = ("sites", "package", "compression", "word tables", "gradient cosine", "public loss", "SHA-256")
    return (Section("Emulators of the sites", (text,), head, rows),)


def adapter(adapter: Mapping[str, Any]) -> Section:
    """Returns the section on what was trained."""
    mean = "exact" if adapter["exact_mean"] else "not exact"
    rows = (
        ("method", str(adapter["method"])),
        ("trained numbers", count(adapter["parameters"])),
        ("rank", str(adapter["rank"])),
        ("alpha", str(adapter["alpha"])),
        ("layers inside a block", ", ".join(map(str, adapter["targets"])) or "the method's default"),
        *((f"option {name}", str(value)) for name, value in adapter.get("options", {}).items()),
        ("blocks that carry it", ", ".join(map(str, adapter["slots"]))),
        ("mean of the sites' adapters", f"{mean}: {adapter['why']}"),
        ("folder", f"{adapter['directory']}/"),
        ("loads with Hugging Face PEFT", "yes" if adapter["peft"] else "no, with offsite only"),
    )
    return Section("Adapter", (), ("fact", "value"), rows)


def cost(cost: Mapping[str, Mapping[str, Any]]) -> Section:
    """Returns the section on time, memory and bytes of each phase."""
    rows = tuple(
        (
            phase,
            number(facts["seconds"], 1),
            size(facts["peak_rss_bytes"]),
            size(facts["bytes_down"]),
            size(facts["bytes_up"]),
        )
        for phase, facts in cost.items()
    )
    return Section(
        "Cost",
        ("Bytes are summed over all sites. Peak memory is the most that the process held at once.",),
        ("phase", "seconds", "peak memory", "to sites", "from sites"),
        rows,
        numbers=True,
    )


def provenance(report: Report) -> Section:
    """Returns the section on seed, hashes and versions."""
    facts = report["provenance"]
    rows = (
        ("mode", f"{report['mode']}, engine {report['engine']}"),
        *((name.replace("_", " "), str(facts[name])) for name in ("started", "platform", "seed")),
        *((name.replace("_", " "), str(facts[name])) for name in ("config_sha256", "model_sha256", "job_sha256")),
        *((package, str(version)) for package, version in sorted(facts["versions"].items())),
    )
    return Section("Where it comes from", (), ("fact", "value"), rows)
