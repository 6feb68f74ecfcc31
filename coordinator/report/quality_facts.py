"""The quality of the models of a job: the scores that a report shows."""

from dataclasses import dataclass

from offsite.coordinator.job.score import GeneratedScores, Score
from offsite.coordinator.report.formatting import number

NOISE_ERRORS = 2  # a difference of at least so many standard errors is luck about once in 20 runs


@dataclass(frozen=True)
class FourScores:
    """Scores of full model and emulator, before and after training, on the same records."""

    full_zero_shot: Score
    emulator_zero_shot: Score
    emulator_tuned: Score
    plug_in: Score

    def all(self) -> dict[str, Score]:
        """Returns the scores by name, in the order of every table and plot."""
        return {
            "full_zero_shot": self.full_zero_shot,
            "emulator_zero_shot": self.emulator_zero_shot,
            "emulator_tuned": self.emulator_tuned,
            "plug_in": self.plug_in,
        }


@dataclass(frozen=True)
class Quality:
    """The quality of the models of a job.

    Attributes:
      public: scores on the coordinator's public records.
      private: scores on held-out records of the sites; None where the coordinator cannot know them.
      gain_error: standard error of `gain_nats` over the held-out records, see `job.evaluate.gain_error`; None where it
        is not known: between organisations, of fewer than 2 records, and in a report of an earlier release.
      generated: measures of texts that the full model generated; None where the federation file asks for none.
    """

    public: FourScores
    private: FourScores | None = None
    gain_error: float | None = None
    generated: GeneratedScores | None = None

    @property
    def shown(self) -> FourScores:
        """The scores that say most: the private scores where they are known, otherwise the public scores."""
        return self.public if self.private is None else self.private

    @property
    def gain_nats(self) -> float | None:
        """Fall of the loss on private records from the full model before training to the plug-in; above 0 is better."""
        own = self.private
        return None if own is None else own.full_zero_shot.loss - own.plug_in.loss

    @property
    def within_noise(self) -> bool:
        """Whether other held-out records might as well have shown no gain; see `NOISE_ERRORS`."""
        gain, error = self.gain_nats, self.gain_error
        return gain is not None and error is not None and abs(gain) < NOISE_ERRORS * error

    @property
    def noise_rule(self) -> str:
        """The words of the rule, with the standard error."""
        return (
            f"its standard error over the held-out records is {number(self.gain_error)}, and a gain or a loss of less "
            f"than {NOISE_ERRORS} standard errors may be luck"
        )

    @property
    def forgetting_nats(self) -> float:
        """Rise of the loss on public records from the full model before training to the plug-in; above 0 is worse."""
        return self.public.plug_in.loss - self.public.full_zero_shot.loss
