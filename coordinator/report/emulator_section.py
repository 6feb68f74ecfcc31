"""The sections of a report on the emulators: what was shipped, how faithful it is, and which site got which."""

from offsite.coordinator.report.emulator_facts import EmulatorFacts
from offsite.coordinator.report.formatting import number, percent, size
from offsite.coordinator.report.section import FACTS, Section


def emulator(emulators: EmulatorFacts) -> Section:
    """Returns the section on what was shipped and how faithful it is."""
    default, parts = emulators.default, emulators.composition
    rows = (
        ("shipped in all", size(default.shipped_bytes)),
        ("  of it the blocks that carry the adapter, unchanged", size(parts.slot_bytes)),
        ("  of it the word tables (embeddings)", size(parts.embedding_bytes)),
        ("  of it the blocks between, compressed", size(parts.middle_bytes)),
        ("full model at 16 bits", size(parts.full_bytes)),
        ("share of the blocks between that is shipped", percent(parts.middle_ratio)),
        ("share of the full model shipped unchanged", percent(parts.verbatim_share)),
        ("compression of the blocks between", ", then ".join(default.recipe) or "none"),
        ("storage of the word tables", default.embedding),
        ("gradient cosine (1 is perfect)", number(default.gradient_cosine)),
        ("least cosine allowed", number(parts.gate, 2)),
    )
    text = (
        "The emulator keeps the first and last blocks as they are, where the adapter sits, and compresses those "
        "between. The gradient cosine compares the directions in which full model and emulator would change the "
        "adapter, on public records; an emulator below the least cosine is refused before any site trains."
    )
    return Section("Emulator", (text,), FACTS, rows)


def emulators_of_sites(emulators: EmulatorFacts) -> tuple[Section, ...]:
    """Returns the section on which site got which emulator; nothing where all got the same."""
    if not emulators.variants:
        return ()
    rows = tuple(
        (
            ", ".join(one.sites),
            size(one.package_bytes),
            ", then ".join(one.recipe) or "none",
            one.embedding,
            number(one.gradient_cosine),
            number(one.public_loss),
            one.sha256[:16],
        )
        for one in emulators.all
    )
    text = (
        "Not all sites got the same emulator. Geometry and adapter are the same for all, so that their updates can be "
        "added. What is said of the emulator elsewhere in this report is said of the first one here; public loss is "
        "the emulator's before any training. Every site was told who got which."
    )
    head = ("sites", "package", "compression", "word tables", "gradient cosine", "public loss", "SHA-256")
    return (Section("Emulators of the sites", (text,), head, rows),)
