"""Texts that the full model generates from scored records, before and after training, and their measures."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn

from offsite.adapter.layout import Layout
from offsite.adapter.methods.soft_prompt import SoftPrompt
from offsite.coordinator.config.federation_file import FedConfig
from offsite.coordinator.job.score import GeneratedScores
from offsite.emulator.runtime.plug_in import plug
from offsite.errors import ConfigError, lookup
from offsite.task.generation import GeneratingTask, Prompt, generate
from offsite.task.selection import spread_rows
from offsite.task.spec import Record
from offsite.task.tasks import TASKS
from offsite.task.text_measures import KEY, compare

TRIAL_TOKENS = 2


@dataclass(frozen=True)
class Writer:
    """Writes the texts of one job.

    Attributes:
      config: the federation file.
      full: full model with the adapter attached.
      task: task of the job.
      processor: processor of the model.
    """

    config: FedConfig
    full: Any
    task: GeneratingTask
    processor: Any

    @classmethod
    def of(cls, config: FedConfig, full: nn.Module) -> "Writer":
        """Returns the writer of a job.

        Raises:
          ConfigError: the task's models generate no text.
        """
        task = lookup(TASKS, config.model.task, "model.task")
        if not isinstance(task, GeneratingTask):
            raise ConfigError(f"{KEY}: the task {config.model.task!r} generates no text; leave the key out", key=KEY)
        return cls(config, full, task, task.load_processor(config.model.path))

    def prompts(self, groups: Sequence[Sequence[Record]]) -> list[Prompt | None]:
        """Returns the prompts of at most `generated_records` records, as many of each group where it has enough."""
        share = max(1, self.config.evaluation.generated_records // max(len(groups), 1))
        chosen = [[group[int(row)] for row in spread_rows(np.arange(len(group)), share)] for group in groups]
        length, model_config = self.config.data.length, self.full.config
        return [
            prompt
            for records in chosen
            if records
            for prompt in self.task.prompts(self.processor, records, length=length, model_config=model_config)
        ]

    def texts(self, prompts: Iterable[Prompt], new_tokens: int) -> tuple[list[str], int]:
        """Returns the model's text for each prompt, and the number of texts that came to `new_tokens` without an end.

        One record at a time, so that memory does not grow with their number, and no record moves another's digits.
        """
        words = getattr(self.processor, "words", self.processor)
        # Learned tokens in front of a block's hidden states would enter a cache anew with each call.
        cache = not any(isinstance(module, SoftPrompt) for module in self.full.modules())
        written = [
            generate(self.full, prompt, new_tokens=new_tokens, end=words.eos_token_id, cache=cache)
            for prompt in prompts
        ]
        return words.texts([ids for ids, _ in written]), sum(not ended for _, ended in written)


def try_generation(config: FedConfig, full: nn.Module, records: Sequence[Record]) -> None:
    """Generates a few tokens for one record, if texts are asked for; a model that cannot fails before any round.

    Raises:
      ConfigError: the task's models generate no text.
      UnsupportedModel: the model with its adapter does not.
    """
    if config.evaluation.measures:
        writer = Writer.of(config, full)
        asked = [prompt for prompt in writer.prompts([records]) if prompt is not None][:1]
        writer.texts(asked, min(TRIAL_TOKENS, config.evaluation.new_tokens))


def generated_scores(
    config: FedConfig,
    full: nn.Module,
    layout: Layout,
    adapters: tuple[NDArray[Any], NDArray[Any]],
    part: str,
    groups: Sequence[Sequence[Record]],
) -> GeneratedScores | None:
    """Returns the measures of generated texts; None where the federation file asks for none.

    Args:
      config: the federation file.
      full: full model with the adapter attached; holds the second adapter afterwards.
      layout: layout of the adapter.
      adapters: adapter before training, and adapter that is plugged in after training.
      part: part of the records, see `GeneratedScores`.
      groups: scored records, for example those of each site.
    """
    asked = config.evaluation
    if not asked.measures:
        return None
    writer = Writer.of(config, full)
    prompts = writer.prompts(groups)
    kept = [prompt for prompt in prompts if prompt is not None]
    written = []
    for adapter in adapters:
        plug(full, layout, adapter)
        written.append(writer.texts(kept, asked.new_tokens))
    (before, cut_before), (after, cut_after) = written
    found = compare(asked.measures, before, after, [prompt.text for prompt in kept]) if kept else {}
    return GeneratedScores(part, len(kept), len(prompts) - len(kept), asked.new_tokens, cut_before, cut_after, found)
