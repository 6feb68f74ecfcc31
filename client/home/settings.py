"""The file `site.toml`: the place of a site's records, and the way to read them."""

import dataclasses
import re
from dataclasses import dataclass, field

from offsite.emulator.runtime.weight_forms import AUTO as RECOMPUTE_AUTO
from offsite.emulator.runtime.weight_forms import RECOMPUTATIONS, STORED, WEIGHT_FORMS
from offsite.errors import ConfigError, lookup
from offsite.protos.proxies import check_proxy
from offsite.task.device import AUTO, check_device, check_processes
from offsite.task.number_format import check_dtype
from offsite.trust import canonical
from offsite.trust.certificates import digits_of
from offsite.trust.request import MAX_CONTACT
from offsite.trust.toml_tables import quote
from offsite.trust.welcome import MAX_PORT

SETTINGS = "site.toml"
MAX_RECORDS = 10**9
_FINGERPRINT = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class SiteSettings:
    """The file `site.toml`, which `offsite client init` writes; `policy.toml` beside it says what is permitted.

    Attributes:
      name: the site's name in the federation.
      data: file or folder of the records; relative to the site's folder.
      reader: name in `task.readers.tables.READERS`: jsonl, json, csv, tsv, parquet, arrow, text, npz, images or
        image_parquet; empty picks by file name.
      column: column or key that holds the main field of a task's records, for example the text; empty takes the field's
        name.
      columns: column or key of each further field, by the field's name, as `{ text = "body", label = "spam" }`.
      labels: name of the model's label for each value in the data, as `{ 1 = "benign", M80 = "malignant" }`; a value
        that is not in it is itself a name. Empty where the data hold the model's own labels.
      dataset: name under which the privacy ledger counts what was spent on these records; one data set has one name
        for ever.
      records: public number of the records, from which noise and sample rate follow; the data must hold exactly so
        many. 0 counts them once, at `offsite client sign` or at the first approval, and keeps that number.
      blocks: public number of blocks for jobs with split `blocks`, which take so many of the texts' blocks and fill up
        with empty blocks; 0 refuses such jobs.
      proxy: proxy on the way to the coordinator, as `http://proxy.example:3128`, with `user:password@` before the host
        where it asks for them; empty for the straight way. The environment's proxies are never used.
      runtime_port: port of the SuperNode's own interface on this machine; 0 takes a free port.
      simulation_seed: seed of repeatable noise, for tests on invented data only; needs `allow_seeded_noise` of the
        policy.
      weights: storage of frozen weights in memory. `widened`: in `dtype`. `stored`: as in the package, widened where
        they run; a fraction of the memory, some percent more time, the same results. `int8` and `nf4`: in the numbers
        of bitsandbytes where the package has wider ones; less memory, nearly the same results, see
        `emulator.runtime.bitsandbytes_layers`.
      recompute: whether frozen blocks compute their activations again in the backward pass, which takes less memory
        and about a third more time, for the same results: `always`, `never`, or `auto`, where the activations of one
        physical batch would take more memory than the emulator's weights.
      device: device on which the emulator trains: `auto` takes the accelerator that PyTorch finds, or the CPU where
        there is none; else `cpu`, `cuda`, `cuda:N` or `xpu`.
      processes: number of processes that share the records of each training step, from 1 to 64; on accelerators each
        has a device of its own, on the CPU they share the cores. Each holds the emulator.
      dtype: number format of frozen weights and activations while the emulator trains: `auto` takes bfloat16 where that
        is faster, else float32; or `float32`, `bfloat16` or `float16`.
      contact: person or office, and telephone number, that the other owners see when they sign; at most 100 printable
        ASCII characters.
      known: fingerprints of the requests of those members whom this owner knows; where any stands here,
        `offsite client sign` refuses every other member until the owner confirms that member.
    """

    name: str
    data: str
    reader: str = ""
    column: str = ""
    columns: dict[str, str] = field(default_factory=dict)
    labels: dict[str, str] = field(default_factory=dict)
    dataset: str = "main"
    records: int = 0
    blocks: int = 0
    proxy: str = ""
    runtime_port: int = 0
    simulation_seed: int | None = None
    weights: str = STORED
    recompute: str = RECOMPUTE_AUTO
    device: str = AUTO
    processes: int = 1
    dtype: str = AUTO
    contact: str = ""
    known: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Checks every range."""
        canonical.check_name(self.name, "name")
        canonical.check_name(self.dataset, "dataset")
        if not self.data:
            raise ConfigError("data='': must be the file or folder of the site's records")
        for name in ("records", "blocks"):
            if not 0 <= getattr(self, name) <= MAX_RECORDS:
                raise ConfigError(f"{name}={getattr(self, name)}: must be from 0 to {MAX_RECORDS}")
        if not 0 <= self.runtime_port <= MAX_PORT:
            raise ConfigError(f"runtime_port={self.runtime_port}: must be from 0 to {MAX_PORT}; 0 takes a free one")
        check_proxy(self.proxy)
        if len(self.contact) > MAX_CONTACT or not (self.contact.isascii() and self.contact.isprintable()):
            raise ConfigError(
                f"contact={self.contact!r}: must be at most {MAX_CONTACT} printable ASCII characters; write letters "
                "with accents without them"
            )
        for known in self.known:
            if not _FINGERPRINT.fullmatch(digits_of(known)):
                raise ConfigError(f"known={known!r}: must be the 16 groups of a member's fingerprint, as sign shows it")
        lookup(WEIGHT_FORMS, self.weights, "weights")
        lookup(RECOMPUTATIONS, self.recompute, "recompute")
        check_device(self.device)
        check_processes(self.device, self.processes)
        check_dtype(self.dtype)
        if self.simulation_seed is not None and self.simulation_seed < 0:
            raise ConfigError(f"simulation_seed={self.simulation_seed}: must be at least 0, or left out")

    def to_toml(self) -> str:
        """Returns the text of a new `site.toml`."""
        return (
            "# Settings of this site; policy.toml says what the site permits.\n"
            + "".join(
                f"{name} = {_toml_value(value)}\n"
                for name, value in dataclasses.asdict(self).items()
                if value is not None
            )
            + "# simulation_seed = 1   # repeatable noise, for tests on invented data only\n"
        )


def _toml_value(value: object) -> str:
    if isinstance(value, tuple):
        return f"[{', '.join(map(_toml_value, value))}]"
    if isinstance(value, dict):
        pairs = ", ".join(f"{quote(name)} = {quote(text)}" for name, text in value.items())
        return f"{{ {pairs} }}" if pairs else "{}"
    return quote(value) if isinstance(value, str) else str(value)
