"""The tables [adapter], [training], [privacy] and [evaluation] of the federation file: how a job trains and scores."""

from dataclasses import dataclass, field

from offsite.adapter.options import Scalar
from offsite.adapter.spec import AdapterSpec


@dataclass(frozen=True)
class AdapterConfig:
    """The table [adapter]: the numbers that are trained.

    Attributes:
      method: name in `adapter.methods.METHODS`; `offsite methods` prints all names with sizes and costs.
      rank: inner width of the adapter, at least 1; methods without an inner width ignore the key.
      alpha: scale of the adapter's effect, from 1e-9 to 1e9; methods without a scale ignore the key.
      targets: names of layers inside a block, as `["q_proj", "v_proj"]`; empty takes the method's own names.
      options: settings of the method itself, as `{ n_frequency = 64 }`; `head = true` also trains the task head.
      frozen: adapter folders of earlier jobs with method `bottleneck` on the same slots, shipped to the sites and
        never trained. `madx` takes one folder (a language). `fusion` mixes several folders; the option `adapters` of
        `fusion` sets their number, by default 2.
    """

    method: str = "ffa_lora"
    rank: int = 4
    alpha: float = 8.0
    targets: tuple[str, ...] = ()
    options: dict[str, Scalar] = field(default_factory=dict)
    frozen: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Refuses settings that no method could use; `adapter.methods.known` refuses settings for this method."""
        self.spec(slots=(), seed=0)

    def spec(self, *, slots: tuple[str, ...], seed: int) -> AdapterSpec:
        """Returns the specification of the adapter in the blocks at the paths `slots`."""
        options = tuple(sorted(self.options.items()))
        return AdapterSpec(self.method, self.rank, self.alpha, self.targets, slots, seed, options)


@dataclass(frozen=True)
class TrainingConfig:
    """The table [training]: rounds, and the sites' steps.

    Attributes:
      rounds: number of rounds of the federation; at least 1.
      local_steps: private steps of a site in one round; at least 1.
      batch: expected number of records in a step, from 1 to 1e9; the number of each step is random.
      learning_rate: learning rate of the sites' plain gradient steps; from 1e-9 to 1e9.
      physical_batch: number of records in one forward pass, from 1 to 1024; changes memory and speed only.
      spare_rounds: number of rounds beyond `rounds` that the noise is planned for, to repeat rounds that were lost
        after an upload.
      directions: number of directions that a step of DP-ZO (training by forward passes alone) looks along; a site
        uploads one number for each direction instead of an adapter, with any method. 0 trains by gradients.
      spacing: distance along a direction at which DP-ZO takes losses; from 1e-5 to below 1.
    """

    rounds: int = 6
    local_steps: int = 1
    batch: int = 16
    learning_rate: float = 1.0
    physical_batch: int = 8
    spare_rounds: int = 0
    directions: int = 0
    spacing: float = 1e-3


@dataclass(frozen=True)
class PrivacyConfig:
    """The table [privacy]: record-level differential privacy at every site.

    Attributes:
      private: switch of differential privacy; `false` trains without clip and noise, and the report says so first.
      epsilon: privacy parameter of the whole job at each site, at delta min(1e-6, 1 / (100 records)); from 1e-9 to 1e9.
      max_grad_norm: clip of one record's gradient, from 1e-9 to 1e9; 0 takes the median norm on public records.
      accountant: name in `privacy.accountants.ACCOUNTANTS`: pld (the smaller of the bounds of PLD and RDP), prv or rdp.
    """

    private: bool = True
    epsilon: float = 8.0
    max_grad_norm: float = 0.0
    accountant: str = "pld"


@dataclass(frozen=True)
class EvaluationConfig:
    """The table [evaluation]: number of scored records, and the acceptance test.

    Attributes:
      examples: number of held-out records over all sites; at least 1.
      public_examples: number of public records of the acceptance test; at least 2.
      tolerance: largest rise of the public loss above the best so far that a round may cause, in nats; at least 0.
      measures: measures of texts that the full model generates before and after training, as `["rouge", "chrf"]`; names
        in `task.text_measures.MEASURES`: rouge, chrf (needs the extra `measures`) or exact_match. Empty generates no
        text, which costs far more than a loss. For the tasks prompt_completion, chat, seq2seq and image_text.
      generated_records: largest number of scored records for which text is generated: held-out records in a simulation,
        public records between organisations; at least 1.
      new_tokens: largest number of tokens of a generated text; at least 1.
    """

    examples: int = 48
    public_examples: int = 16
    tolerance: float = 0.05
    measures: tuple[str, ...] = ()
    generated_records: int = 32
    new_tokens: int = 64
