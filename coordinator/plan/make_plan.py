"""The plan of a job: emulators that fit a site, bytes both ways, memory and seconds by phase, rounds and epsilon."""

from dataclasses import asdict, dataclass, field, replace

from offsite.coordinator.plan.candidates import candidates
from offsite.coordinator.plan.coordinator_phases import Coordinator
from offsite.coordinator.plan.device_profile import DeviceProfile
from offsite.coordinator.plan.model_outline import Outline
from offsite.coordinator.plan.paper_package import Design, PaperPackage, make_package
from offsite.coordinator.plan.privacy_table import PrivacyRow, Terms, privacy_rows
from offsite.coordinator.plan.request import STORED, WIDENED, PlanRequest
from offsite.coordinator.plan.site_phases import Phase, Site
from offsite.coordinator.plan.trial import (
    Batches,
    Lines,
    Trials,
    scaled,
    try_emulator,
    try_full,
    try_lines,
    with_widening,
)
from offsite.coordinator.report.formatting import size
from offsite.errors import ConfigError, OffsiteError

IMPORTS = 450 * 10**6  # resident bytes of a process without a model, where no profile tells


@dataclass(frozen=True)
class Option:
    """One emulator of the comparison.

    Attributes:
      design: the emulator.
      bytes: size of the package.
      compute: multiply-adds of the emulator's middle over the full model's.
      memory: peak of a site in bytes, imports included.
      seconds: time of a round's training; None without a profile.
      fits: whether the site's memory is enough.
      refusal: reason why the model cannot have this emulator; empty where it can.
    """

    design: Design
    bytes: int = 0
    compute: float = 0.0
    memory: int = 0
    seconds: float | None = None
    fits: bool = False
    refusal: str = ""


@dataclass(frozen=True)
class PlanResult:
    """A plan.

    Attributes:
      model: name of the model.
      parameters: number of its parameters.
      stored: bytes of its checkpoint.
      imports: bytes of a process without a model.
      options: emulators, the most faithful first.
      chosen: number of the option that the rest of the plan is about.
      site: phases of a site; memory over the imports.
      coordinator: phases of the coordinator; memory over the imports.
      upload: number of entries of an update.
      bytes_up: bytes of one masked update.
      bytes_down: bytes of the adapter that a site gets each round.
      engine: name of the per-example gradient engine.
      privacy: rows about rounds and noise; () where no number of records was given.
      advice: sentences on what does not fit, and on what would make it fit.
      measured: whether seconds come from a profile.
    """

    model: str
    parameters: int
    stored: int
    imports: int
    options: tuple[Option, ...]
    chosen: int
    site: tuple[Phase, ...]
    coordinator: tuple[Phase, ...]
    upload: int
    bytes_up: int
    bytes_down: int
    engine: str
    privacy: tuple[PrivacyRow, ...]
    advice: tuple[str, ...]
    measured: bool

    def to_dict(self) -> dict[str, object]:
        """Returns the JSON form; the recipe of an option as text."""
        return asdict(self)


@dataclass(frozen=True)
class Planner:
    """Makes the parts of a plan for one model.

    Attributes:
      outline: the full model.
      request: the job and the machines.
      profile: speed of the device; None leaves seconds out.
    """

    outline: Outline
    request: PlanRequest
    profile: DeviceProfile | None = None
    _known: dict[object, Lines] = field(default_factory=dict, init=False, repr=False)

    @property
    def imports(self) -> int:
        """Resident bytes of a process without a model."""
        return self.profile.imports if self.profile else IMPORTS

    def plan(self) -> PlanResult:
        """Returns the plan.

        Raises:
          OffsiteError: the one emulator that was asked for does not fit the model, or no emulator does.
        """
        request = self.request
        designs = (request.design,) if request.design else candidates(request.first, request.last, request.embedding)
        options = [self._quick(design) for design in designs]
        chosen, site = self._chosen(options)
        coordinator = self.coordinator(site)
        phases = site.phases(self.profile), coordinator.phases(self.profile)
        advice = () if options[chosen].fits else (self._advice(options[chosen], site),)
        return PlanResult(
            model=self.outline.name,
            parameters=self.outline.parameters,
            stored=self.outline.stored.itemsize * self.outline.parameters,
            imports=self.imports,
            options=tuple(options),
            chosen=chosen,
            site=phases[0],
            coordinator=phases[1],
            upload=site.trials.upload,
            bytes_up=site.bytes_up,
            bytes_down=site.bytes_down,
            engine=site.trials.engine,
            privacy=self._privacy(),
            advice=(*advice, *self._own_advice(phases[1])),
            measured=self.profile is not None,
        )

    def site(self, design: Design, *, batches: Batches | None = None, weights: str = "", quick: bool = False) -> Site:
        """Returns a site with an emulator.

        Args:
          design: the emulator.
          batches: sizes of the examples; None takes those of the request.
          weights: form of the frozen weights; empty takes the request's.
          quick: whether work is shared between emulators with blocks of one shape, and estimated where storage counts.

        Raises:
          OffsiteError: the emulator or the adapter does not fit the model.
        """
        request = self.request
        own, stored = batches or request.batches, (weights or request.weights) == STORED
        package = make_package(self.outline, design)
        trials = self._quick_trials(package, own, stored=stored) if quick else None
        trials = trials or try_emulator(package, request.adapter, own, stored=stored)
        return Site(package, trials, stored, request.batch, own.physical, request.local_steps, request.sites)

    def peak(self, site: Site) -> int:
        """Returns the peak of a site in bytes, imports included."""
        return self.imports + max(phase.memory for phase in site.phases(None))

    def _quick_trials(self, package: PaperPackage, batches: Batches, *, stored: bool) -> Trials:
        key, ends = (package.structure, batches, stored), (package.slots, batches, stored)
        if key not in self._known:
            self._known[key] = try_lines(package, self.request.adapter, batches, self._known.get(ends), head=stored)
            self._known.setdefault(ends, self._known[key])
        trials = scaled(*self._known[key], package.running)
        return with_widening(trials, package) if stored else trials

    def _quick(self, design: Design) -> Option:
        try:
            return self._option(self.site(design, quick=True))
        except OffsiteError as error:
            return Option(design, refusal=str(error))

    def _option(self, site: Site) -> Option:
        memory, step, package = self.peak(site), site.step(self.profile), site.package
        fits = self.request.memory is None or memory <= self.request.memory
        return Option(package.design, package.bytes, package.compute, memory, step.seconds, fits)

    def _chosen(self, options: list[Option]) -> tuple[int, Site]:
        """Returns the most faithful option that fits, or else the smallest, and replaces it by its exact numbers."""
        usable = [place for place, option in enumerate(options) if not option.refusal]
        if not usable:
            raise ConfigError(options[-1].refusal)
        for place in [place for place in usable if options[place].fits]:
            site = self.site(options[place].design)
            options[place] = self._option(site)
            if options[place].fits:
                return place, site
        place = min(usable, key=lambda place: options[place].memory)
        site = self.site(options[place].design)
        options[place] = self._option(site)
        return place, site

    def coordinator(self, site: Site) -> Coordinator:
        """Returns the coordinator of a job whose sites have this emulator."""
        request = self.request
        full = try_full(site.package, request.adapter, request.batches)
        return Coordinator(
            site.package,
            full,
            site.trials,
            request.batches.length,
            request.batches.physical,
            request.scored,
            request.sites,
        )

    def _privacy(self) -> tuple[PrivacyRow, ...]:
        request = self.request
        if request.records is None:
            return ()
        return privacy_rows(
            Terms(request.records, request.sites, request.rounds, request.local_steps, request.batch, request.epsilon)
        )

    def _advice(self, smallest: Option, site: Site) -> str:
        """Says how much the smallest emulator needs, and what would make an emulator fit."""
        limit, request = self.request.memory or 0, self.request
        begin = (
            f"--memory={size(limit)} is too little: the smallest emulator, {smallest.design}, needs "
            f"{size(smallest.memory)} in its phase {max(site.phases(None), key=lambda phase: phase.memory).name}"
        )
        ways, sites = [], dict[str, Site]()
        if request.batches.physical > 1:
            step = site.trials.step
            one = replace(site.trials, step=replace(step, peak=round(step.peak / request.batches.physical)))
            sites["--physical-batch 1"] = replace(site, trials=one)
        if request.weights == WIDENED:
            sites["--weights stored"] = replace(site, stored=True)
        if smallest.design.first + smallest.design.last > 2:
            ends = make_package(self.outline, replace(smallest.design, first=1, last=1))
            sites["--first 1 --last 1"] = replace(site, package=ends)
        for words, changed in sites.items():
            memory = self.peak(changed)
            ways.append(f"{words} needs about {size(memory)}{' and fits' if memory <= limit else ''}")
        return f"{begin}; {'; '.join([*ways, f'or give a site {size(smallest.memory)}'])}"

    def _own_advice(self, phases: tuple[Phase, ...]) -> tuple[str, ...]:
        limit = self.request.own_memory
        most = max(phases, key=lambda phase: phase.memory)
        if limit is None or self.imports + most.memory <= limit:
            return ()
        return (
            f"--own-memory={size(limit)} is too little: the coordinator's phase {most.name} needs "
            f"{size(self.imports + most.memory)}; give the coordinator so much, or take a smaller model",
        )
