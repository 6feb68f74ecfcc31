"""The sites' part in a job's aggregation rule, as everybody reads it in the manifest."""

import dataclasses
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from offsite.adapter.layout import Layout
from offsite.adapter.spec import AdapterSpec
from offsite.errors import MalformedMessage
from offsite.privacy.ranges import HIGHEST, LOWEST, LOWEST_SPACING
from offsite.trust import canonical

MAX_DIRECTIONS = 4096  # per step; beyond this number a gradient is cheaper
RANKED, ALTERNATED = "ffa_lora", "lora"
NO_SECAGG_WARNING = (
    "secure aggregation is OFF: the coordinator sees each site's own update in every round. What protects a site's "
    "records from it is the noise that the site adds, if any, and nothing else"
)
DOWN, UP = ".lora_A.", ".lora_B."  # in a parameter's name: LoRA's factor A, applied first, and B


@dataclass(frozen=True)
class AggregationTerms:
    """The sites' part in a job's rule; how the coordinator then uses a sum does not concern them.

    Attributes:
      individuals: whether updates leave their sites unmasked, so that the coordinator sees each update; False is secure
        aggregation.
      proximal: mu of FedProx, 0 or in [1e-9, 1e9], the strength with which each step pulls back to the round's start.
        Li et al. 2020 (arXiv 1812.06127), equation 2. The pull sees parameters only, so it costs no privacy.
      alternate: whether B and A of LoRA are trained in turn, B in the odd rounds. arXiv 2502.01755.
      ranks: (site, rank) of the sites that train fewer than the adapter's `rank` columns of B, sorted by site.
      directions: number of directions per step of DP-ZO, from 0 to `MAX_DIRECTIONS`. A site takes losses along each by
        forward passes alone and uploads one number per direction. 0 trains by gradients.
      spacing: distance along a direction at which DP-ZO takes losses, in [1e-5, 1); 0 without directions.
    """

    individuals: bool = False
    proximal: float = 0.0
    alternate: bool = False
    ranks: tuple[tuple[str, int], ...] = ()
    directions: int = 0
    spacing: float = 0.0

    @property
    def secure_aggregation(self) -> bool:
        """Whether the coordinator sees sums of updates only."""
        return not self.individuals

    def part(self, layout: Layout, number: int) -> Layout:
        """Returns the part of an adapter that is trained and leaves a site in a round.

        B comes first: as long as B is zero, A has no gradient. Both sides derive the part from the round's number and
        the manifest, so no message can ask for another part.

        Args:
          layout: layout of the whole adapter.
          number: number of the round, from 1.
        """
        if not self.alternate:
            return layout
        resting = DOWN if number % 2 else UP
        kept = [(n, s) for n, s in zip(layout.names, layout.shapes, strict=True) if resting not in n]
        return Layout(tuple(name for name, _ in kept), tuple(shape for _, shape in kept))

    def to_dict(self) -> dict[str, Any]:
        """Returns the JSON form."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "AggregationTerms":
        """Returns the terms of a JSON object; `check` says whether they fit a job.

        Raises:
          TypeError, ValueError, KeyError: the object is no output of `to_dict`.
        """
        return cls(**{**values, "ranks": tuple((str(site), rank) for site, rank in values["ranks"])})

    def check(self, adapter: AdapterSpec, sites: Collection[str], learning_rate: float) -> None:
        """Checks types and ranges, and that the terms fit an adapter and its sites.

        Args:
          adapter: the job's adapter.
          sites: names in the job's roster.
          learning_rate: the sites' learning rate; above 1 / proximal a step would overshoot the round's start.

        Raises:
          MalformedMessage: a value has the wrong type or range, or does not fit the adapter or the roster.
        """
        if type(self.individuals) is not bool or type(self.alternate) is not bool:
            raise MalformedMessage("job aggregation individuals, alternate: must be true or false; refuse the job")
        if self.proximal != 0 or type(self.proximal) is not float:
            canonical.real(self.proximal, "job aggregation proximal", lowest=LOWEST, highest=HIGHEST)
        if learning_rate * self.proximal > 1:
            raise MalformedMessage(f"job proximal={self.proximal:g}: with this learning_rate at most 1; refuse the job")
        self._check_directions()
        if self.alternate and adapter.method != ALTERNATED:
            raise MalformedMessage(f"job alternate: method must be {ALTERNATED}; refuse the job")
        if self.ranks and adapter.method != RANKED:
            raise MalformedMessage(f"job ranks: method must be {RANKED}; refuse the job")
        names = [site for site, _ in self.ranks]
        if names != sorted(set(names)) or not set(sites).issuperset(names):
            raise MalformedMessage("job ranks: must name sites of the roster, sorted, each once; refuse the job")
        for _, rank in self.ranks:
            canonical.whole(rank, "job ranks", lowest=1, highest=max(1, adapter.rank - 1))
        if self.ranks and adapter.rank == 1:
            raise MalformedMessage("job ranks: the adapter's rank is 1, so no site can have a smaller one; refuse it")

    def _check_directions(self) -> None:
        canonical.whole(self.directions, "job directions", lowest=0, highest=MAX_DIRECTIONS)
        if type(self.spacing) is not float or not (
            LOWEST_SPACING <= self.spacing < 1 if self.directions else self.spacing == 0
        ):
            raise MalformedMessage(
                f"job spacing: must be from {LOWEST_SPACING:g} to below 1, and 0 without directions; refuse the job"
            )
        if self.directions and (self.alternate or self.ranks or self.proximal):
            raise MalformedMessage("job directions: fit no alternate, ranks or proximal; refuse the job")
