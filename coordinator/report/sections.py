"""The last sections of a report: the adapter, the cost, and the origin of the numbers."""

from offsite.coordinator.report.formatting import count, number, size
from offsite.coordinator.report.model import AdapterFacts, Report
from offsite.coordinator.report.section import FACTS, Section

COST_HEAD = ("phase", "seconds", "peak memory", "to sites", "from sites")
CARRIED = {"superlink": "over Flower's SuperLink"}


def adapter(adapter: AdapterFacts) -> Section:
    """Returns the section on the adapter."""
    mean = "exact" if adapter.exact_mean else "not exact"
    rows = (
        ("method", adapter.method),
        ("trained numbers", count(adapter.parameters)),
        ("rank", str(adapter.rank)),
        ("alpha", str(adapter.alpha)),
        ("layers inside a block", ", ".join(adapter.targets) or "the method's default"),
        *((f"option {name}", str(value)) for name, value in adapter.options.items()),
        ("blocks that carry it", ", ".join(adapter.slots)),
        ("mean of the sites' adapters", f"{mean}: {adapter.why}"),
        ("folder", f"{adapter.directory}/"),
        ("loads with Hugging Face PEFT", "yes" if adapter.peft else "no, with offsite only"),
    )
    return Section("Adapter", (), FACTS, rows)


def cost(report: Report) -> Section:
    """Returns the section on time, memory and bytes of each phase, or on the known costs of a real job."""
    if report.cost is None:
        return Section("Cost", (_cost_of_sites(report),))
    rows = tuple(
        (
            phase,
            number(spent.seconds, 1),
            size(spent.peak_rss_bytes),
            size(spent.bytes_down),
            size(spent.bytes_up),
        )
        for phase, spent in report.cost.items()
    )
    text = "Bytes are summed over all sites. Peak memory is the most that the process held at once."
    return Section("Cost", (text,), COST_HEAD, rows, numbers=True)


def _cost_of_sites(report: Report) -> str:
    sizes = sorted({emulator.package_bytes for emulator in report.emulators.all})
    package = size(sizes[0]) if len(sizes) == 1 else f"{size(sizes[0])} to {size(sizes[-1])}"
    return (
        f"Each site fetched its emulator's package once, {package}. The table of the rounds has the bytes and seconds "
        "of each round; the seconds are the coordinator's, and include its waits for sites. The coordinator cannot "
        "know what a round costs a site in time and memory; the site's owner can measure that on the site's machine."
    )


def provenance(report: Report) -> Section:
    """Returns the section on seed, hashes and versions."""
    facts = report.provenance
    rows = (
        ("mode", f"{report.mode}, {CARRIED.get(report.engine, f'engine {report.engine}')}"),
        ("started", facts.started),
        ("platform", facts.platform),
        ("seed", str(facts.seed)),
        ("config sha256", facts.config_sha256),
        ("model sha256", facts.model_sha256),
        ("job sha256", facts.job_sha256),
        *sorted(facts.versions.items()),
    )
    return Section("Where it comes from", (), FACTS, rows)
