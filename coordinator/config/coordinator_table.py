"""The table [coordinator] of the federation file: how a federation between organisations is run."""

from dataclasses import dataclass


@dataclass(frozen=True)
class CoordinatorConfig:
    """The table [coordinator]: how a federation between organisations is run; a simulation does not read this table.

    Attributes:
      home: folder that `offsite coordinator init` made.
      sites: number of sites that must be ready before the first round; 0 waits for all sites.
      deadline: time in seconds that a site has for one stage of a round; above 0.
      patience: time in seconds, counted from the last progress, to wait for sites to connect, be approved and fetch the
        package; above 0.
      attempts: number of tries of a round that found too few sites; at least 1. After the last try the job stops; the
        same command continues the job.

    The deadline stands in the signed manifest. All other keys may change while a job runs, see `run_folder`.
    """

    home: str
    sites: int = 0
    deadline: float = 3600.0
    patience: float = 3600.0
    attempts: int = 3
