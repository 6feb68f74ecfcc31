"""The sections of a report on the emulators: the shipped sizes, the fidelity, and the emulator of each site."""

from offsite.coordinator.report.emulator_facts import EmulatorFacts
from offsite.coordinator.report.formatting import number, percent, size
from offsite.coordinator.report.section import FACTS, Section


def emulator(emulators: EmulatorFacts) -> Section:
    """Returns the section on the shipped sizes of the default emulator and its fidelity."""
    default, parts = emulators.default, emulators.composition
    rows = (
        ("shipped in all", size(default.shipped_bytes)),
        ("  in the blocks that carry the adapter, unchanged", size(parts.slot_bytes)),
        ("  in the word tables (embeddings)", size(parts.embedding_bytes)),
        ("  in the blocks between, compressed", size(parts.middle_bytes)),
        ("full model at 16 bits", size(parts.full_bytes)),
        ("shipped share of the blocks between", percent(parts.middle_ratio)),
        ("shipped share of the full model, unchanged", percent(parts.verbatim_share)),
        ("compression of the blocks between", ", then ".join(default.recipe) or "none"),
        ("storage of the word tables", default.embedding),
        ("gradient cosine (1 is perfect)", number(default.gradient_cosine)),
        ("least cosine allowed", number(parts.gate, 2)),
    )
    text = (
        "The adapter sits in the first and last blocks. The emulator keeps these blocks as they are, and compresses "
        "the blocks between. The gradient cosine compares the directions in which full model and emulator would change "
        "the adapter, on public records; an emulator below the least cosine is refused before any site trains."
    )
    return Section("Emulator", (text,), FACTS, rows)


def emulators_of_sites(emulators: EmulatorFacts) -> tuple[Section, ...]:
    """Returns the section on the emulator of each site; empty in a job with one emulator."""
    if not emulators.variants:
        return ()
    rows = tuple(
        (
            ", ".join(shipped.sites),
            size(shipped.package_bytes),
            ", then ".join(shipped.recipe) or "none",
            shipped.embedding,
            number(shipped.gradient_cosine),
            number(shipped.public_loss),
            shipped.sha256[:16],
        )
        for shipped in emulators.all
    )
    text = (
        "Not all sites got the same emulator. Geometry and adapter are the same at all sites, so that the updates can "
        "be added. Elsewhere in this report, the emulator is the first emulator of this table. Public loss is the loss "
        "of the emulator before any training. Every site knows which site got which emulator."
    )
    head = ("sites", "package", "compression", "word tables", "gradient cosine", "public loss", "SHA-256")
    return (Section("Emulators of the sites", (text,), head, rows),)
