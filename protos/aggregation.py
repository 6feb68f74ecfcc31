"""What the sites of a job do for the coordinator's rule, as everybody reads it in the manifest."""

import dataclasses
import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from offsite.adapter.layout import Layout
from offsite.adapter.spec import AdapterSpec
from offsite.errors import MalformedMessage
from offsite.trust import canonical

MAX_DIRECTIONS = 4096  # of one step; beyond, a gradient is cheaper
RANKED, ALTERNATED = "ffa_lora", "lora"
DOWN, UP = ".lora_A.", ".lora_B."  # of a parameter's name: the factor that is applied first, and the second


@dataclass(frozen=True)
class AggregationTerms:
    """What of a job's rule concerns its sites; what the coordinator then makes of a sum does not.

    Attributes:
      individuals: whether updates leave their sites as they are, so that the coordinator sees each one; False is secure
        aggregation.
      proximal: mu of FedProx, >= 0: how hard each step pulls back to where the round began. Li et al. 2020
        (arXiv 1812.06127), equation 2. It sees parameters only, so it costs no privacy.
      alternate: whether B and A of LoRA are trained in turn, B in the odd rounds. arXiv 2502.01755.
      ranks: (site, rank) of the sites that train fewer than the adapter's `rank` columns of B, sorted by site.
      directions: of DP-ZO: how many directions each step of a site looks along, by forward passes alone; it uploads one
        number for each of them. 0 trains by gradients.
      spacing: of DP-ZO: how far along a direction losses are taken; 0 where there is none.
    """

    individuals: bool = False
    proximal: float = 0.0
    alternate: bool = False
    ranks: tuple[tuple[str, int], ...] = ()
    directions: int = 0
    spacing: float = 0.0

    def part(self, layout: Layout, number: int) -> Layout:
        """Returns what of an adapter is trained and leaves a site in a round.

        B comes first: as long as it is zero, A has no gradient. Both sides take it from the round's number and the
        manifest, so no message can ask for another part.

        Args:
          layout: of the adapter.
          number: of the round, from 1.
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
          TypeError, ValueError, KeyError: it is not one of `to_dict`.
        """
        return cls(**{**values, "ranks": tuple((str(site), rank) for site, rank in values["ranks"])})

    def check(self, adapter: AdapterSpec, sites: Collection[str], learning_rate: float) -> None:
        """Checks types, ranges, and that an adapter and its sites can do this.

        Args:
          adapter: of the job.
          sites: its roster.
          learning_rate: of the sites; above 1 / proximal a step would overshoot where it is pulled back to.

        Raises:
          MalformedMessage: they cannot.
        """
        if type(self.individuals) is not bool or type(self.alternate) is not bool:
            raise MalformedMessage("job aggregation individuals, alternate: must be true or false; refuse the job")
        if type(self.proximal) is not float or not (0 <= self.proximal < math.inf):
            raise MalformedMessage("job aggregation proximal: must be a finite number, at least 0; refuse the job")
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
        if type(self.spacing) is not float or not 0 <= self.spacing < 1 or (self.spacing > 0) != (self.directions > 0):
            raise MalformedMessage("job spacing: must be from 0 to 1, and 0 without directions; refuse the job")
        if self.directions and (self.alternate or self.ranks or self.proximal):
            raise MalformedMessage("job directions: fit no alternate, ranks or proximal; refuse the job")
