"""The table [emulator] of the federation file: one emulator for all sites, or other emulators for some sites."""

import dataclasses
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

from offsite.errors import ConfigError, nearest

BUILD = ("compress", "embedding")  # keys of a build, which a package that was built before contradicts


@dataclass(frozen=True)
class VariantConfig:
    """One entry [[emulator.variants]]: another emulator for some sites, of the same geometry.

    Attributes:
      sites: names of the sites that get this emulator, from `[[sites]]` or `data.owners` in a simulation, and from the
        approved members between organisations; a site is in one variant at most, and at least one site is in no
        variant.
      compress: compressors of the blocks between, as in [emulator]; absent takes the value of [emulator].
      embedding: storage of the embedding tables, as in [emulator]; absent takes the value of [emulator].
      gate: smallest gradient cosine, from -1 to 1; absent takes the value of [emulator].
      package: folder of a package that was built before, in place of `compress` and `embedding`; absent takes the
        value of [emulator], unless the entry has a `compress` of its own.
    """

    sites: tuple[str, ...]
    compress: tuple[str, ...] | None = None
    embedding: str | None = None
    gate: float | None = None
    package: str | None = None


@dataclass(frozen=True)
class EmulatorVariant:
    """One emulator of a job: its settings, and its sites.

    Attributes:
      sites: names of the sites that get the emulator, sorted.
      compress, embedding, gate: settings as in `EmulatorConfig`; no compressors and no storage with a package.
      package: folder of a package that was built before; empty where the package is built for the job.
    """

    sites: tuple[str, ...]
    compress: tuple[str, ...]
    embedding: str
    gate: float
    package: str = ""

    @property
    def settings(self) -> tuple[tuple[str, ...], str, str]:
        """The settings that make the package; variants with equal settings are one emulator."""
        return self.compress, self.embedding, self.package

    def joined(self, other: "EmulatorVariant") -> "EmulatorVariant":
        """Returns the variant for the sites of both variants; it keeps to both gates."""
        return dataclasses.replace(self, sites=tuple(sorted(self.sites + other.sites)), gate=max(self.gate, other.gate))


@dataclass(frozen=True)
class EmulatorConfig:
    """The table [emulator]: how the emulator is built.

    Attributes:
      first: number of blocks kept unchanged at the input side; these blocks are slots of the adapter.
      last: number of blocks kept unchanged at the output side; these blocks are slots of the adapter.
      shape: place of the adapters; `sandwich` puts adapters into the unchanged blocks, `parallel` into every block.
      compress: compressors of the blocks between, in order, each `name:argument`.
      embedding: storage of the embedding tables (verbatim, int8 or int4); for a U-net, storage of all matrices and
        kernels around its blocks.
      gate: smallest cosine between the slots' gradients through the emulator and through the full model, from -1 to
        1.
      refresh: number of rounds after which the biases of the blocks between are aligned anew to the tuned adapter; 0
        never aligns them anew.
      package: folder of a package that `offsite emulator build` made of this model, in place of `compress` and
        `embedding`; the run takes a copy. Empty builds a package for the job.
      variants: entries of other emulators for some sites.
    """

    first: int = 2
    last: int = 2
    shape: str = "sandwich"
    compress: tuple[str, ...] = ("int4:64",)
    embedding: str = "int8"
    gate: float = 0.6
    refresh: int = 0
    package: str = ""
    variants: tuple[VariantConfig, ...] = ()

    def kinds(self, sites: Collection[str]) -> tuple[EmulatorVariant, ...]:
        """Returns the emulators of a job: the default first, then the others, sorted by their first site.

        Variants with equal settings give one emulator, for the sites of both and with the higher of both gates.

        Args:
          sites: names of the federation's sites.

        Raises:
          ConfigError: a variant names a site that the federation does not have, or no site is left for the default.
        """
        _check_known(self, sites)
        default = self._default(sites)
        kinds = {default.settings: default}
        for kind in map(self._kind, self.variants):
            known = kinds.get(kind.settings)
            kinds[kind.settings] = kind if known is None else known.joined(kind)
        first = kinds.pop(default.settings)
        if not first.sites:
            raise ConfigError(
                "emulator.variants name every site, so that nobody gets the emulator of [emulator]; remove a variant, "
                "and put its settings into [emulator]"
            )
        return (first, *sorted(kinds.values(), key=lambda kind: kind.sites))

    def only(self, sites: Collection[str]) -> "EmulatorConfig":
        """Returns the settings for some of the sites, without the variants that belong to other sites alone."""
        kept = [
            dataclasses.replace(variant, sites=tuple(site for site in variant.sites if site in sites))
            for variant in self.variants
        ]
        return dataclasses.replace(self, variants=tuple(variant for variant in kept if variant.sites))

    @property
    def packages(self) -> tuple[str, ...]:
        """The folders of packages that were built before, each once, in the order of the file."""
        named = (self.package, *(variant.package or "" for variant in self.variants))
        return tuple(dict.fromkeys(folder for folder in named if folder))

    def in_place(self, place: Callable[[str], str]) -> "EmulatorConfig":
        """Returns the settings with `place` of each package's folder."""
        variants = tuple(
            dataclasses.replace(variant, package=place(variant.package)) if variant.package else variant
            for variant in self.variants
        )
        return dataclasses.replace(self, package=self.package and place(self.package), variants=variants)

    def _default(self, sites: Collection[str]) -> EmulatorVariant:
        others = {site for variant in self.variants for site in variant.sites}
        return self._made(set(sites) - others, self.compress, self.embedding, self.gate, self.package)

    def _kind(self, variant: VariantConfig) -> EmulatorVariant:
        inherited = self.package if variant.compress is None else ""
        return self._made(
            variant.sites,
            self.compress if variant.compress is None else variant.compress,
            self.embedding if variant.embedding is None else variant.embedding,
            self.gate if variant.gate is None else variant.gate,
            inherited if variant.package is None else variant.package,
        )

    @staticmethod
    def _made(
        sites: Collection[str], compress: tuple[str, ...], embedding: str, gate: float, package: str
    ) -> EmulatorVariant:
        built = ((), "") if package else (compress, embedding)
        return EmulatorVariant(tuple(sorted(sites)), *built, gate, package)


def check_stated(table: Mapping[str, object]) -> None:
    """Checks the keys that the table [emulator] states: a package that was built before has its recipe already.

    Args:
      table: the parsed table.

    Raises:
      ConfigError: a package stands beside a key of a build, or an entry takes from [emulator] what a package replaces.
    """
    _check_beside_package(table, "emulator", "emulator.{}")
    variants = table.get("variants")
    for place, entry in enumerate(variants if isinstance(variants, list) else ()):
        if isinstance(entry, Mapping):
            where = f"emulator.variants[{place}]"
            _check_beside_package(entry, where, "emulator.variants")
            if table.get("package") and "embedding" in entry and not ("compress" in entry or "package" in entry):
                raise ConfigError(
                    f"{where}.embedding={entry['embedding']!r}: [emulator] has a package and no recipe; state compress "
                    "in this entry too, or leave embedding out",
                    key="emulator.variants",
                )


def _check_beside_package(table: Mapping[str, object], where: str, at_fault: str) -> None:
    for key in BUILD:
        if table.get("package") and table.get(key) is not None:
            raise ConfigError(
                f"{where}.{key}={table[key]!r} beside {where}.package={table['package']!r}: a package that was built "
                f"before has its recipe already; remove {key}, or remove package and build anew",
                key=at_fault.format(key),
            )


def check_emulator(emulator: EmulatorConfig) -> None:
    """Checks the settings that need no knowledge of the sites.

    Raises:
      ConfigError: a gate is not a cosine, a variant names no site, a site is in two variants, or the table has both a
        refresh and variants.
    """
    if emulator.refresh and emulator.variants:
        raise ConfigError(
            f"emulator.refresh={emulator.refresh}: only a single emulator can be aligned to the adapter of all sites; "
            "set emulator.refresh to 0, or leave emulator.variants out"
        )
    _check_gate("emulator.gate", emulator.gate)
    taken: set[str] = set()
    for place, variant in enumerate(emulator.variants):
        where = f"emulator.variants[{place}]"
        if variant.gate is not None:
            _check_gate(f"{where}.gate", variant.gate)
        if not variant.sites:
            raise ConfigError(f"{where}.sites=[]: a variant is for one site or more; name sites, or remove the variant")
        for site in variant.sites:
            if site in taken:
                raise ConfigError(f"{where}.sites={site!r}: named before; a site has one emulator, name the site once")
            taken.add(site)


def _check_known(emulator: EmulatorConfig, sites: Collection[str]) -> None:
    for place, variant in enumerate(emulator.variants):
        for site in variant.sites:
            if site not in sites:
                raise ConfigError(
                    f"emulator.variants[{place}].sites={site!r}: no site of this federation; "
                    f"{nearest(site, sorted(sites))}"
                )


def _check_gate(name: str, gate: float) -> None:
    if not -1 <= gate <= 1:
        raise ConfigError(f"{name}={gate}: a cosine lies in [-1, 1]; 0.6 is the default", key=name)
