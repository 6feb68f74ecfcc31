"""How good the models of a job are: the scores that a report shows."""

from dataclasses import dataclass

from offsite.coordinator.job.score import Score


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
    """How good the models are.

    Attributes:
      public: scores on the coordinator's public records.
      private: scores on held-out records of the sites; None where the coordinator cannot know them.
    """

    public: FourScores
    private: FourScores | None = None

    @property
    def shown(self) -> FourScores:
        """The scores that say most: private ones where they are known."""
        return self.public if self.private is None else self.private

    @property
    def gain_nats(self) -> float | None:
        """By how much the plug-in is better on private records than the full model before training."""
        own = self.private
        return None if own is None else own.full_zero_shot.loss - own.plug_in.loss

    @property
    def forgetting_nats(self) -> float:
        """By how much the plug-in is worse on public records than the full model before training."""
        return self.public.plug_in.loss - self.public.full_zero_shot.loss
