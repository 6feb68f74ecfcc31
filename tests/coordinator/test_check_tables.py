"""The names that a check reads without a model library are those of the tables that hold the code."""

import pytest
import torch
from transformers import AutoModelForCausalLM, BertConfig, BertForSequenceClassification, LlamaConfig

from offsite.adapter.layout import Layout
from offsite.adapter.method_names import NEEDING, OFFERED
from offsite.adapter.methods import METHODS, attach
from offsite.adapter.spec import AdapterSpec
from offsite.coordinator.aggregation.compatibility import CHECKS
from offsite.coordinator.aggregation.rules import AGGREGATORS, SUM
from offsite.coordinator.check.names import PLAIN_RULES
from offsite.coordinator.check.structure import WITH_VALUES
from offsite.emulator.compressors import COMPRESSORS
from offsite.emulator.package.recipe_arguments import ARGUMENTS, FRACTIONS, NOT_PARALLEL
from offsite.emulator.structure.geometry import Geometry
from offsite.errors import OffsiteError
from offsite.task.record_fields import FIELDS
from offsite.task.target_counts import COUNTS
from offsite.task.tasks import TASKS

SIZES = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}


def test_the_light_tables_are_the_tables_of_the_code() -> None:
    assert list(METHODS) == list(OFFERED)
    assert {method.name for method in METHODS.values() if method.task or method.auxiliary} == set(NEEDING)
    assert list(COMPRESSORS) == list(ARGUMENTS)
    assert set(FRACTIONS) | set(NOT_PARALLEL) <= set(COMPRESSORS)
    assert list(TASKS) == list(FIELDS)
    assert {name for name, task in TASKS.items() if name in COUNTS} == set(COUNTS)
    plain = [rule.name for rule in AGGREGATORS.values() if rule.needs == SUM and not (rule.methods or rule.keys)]
    assert [name for name in plain if name not in CHECKS] == list(PLAIN_RULES)


@pytest.mark.parametrize("method", [name for name in OFFERED if name not in WITH_VALUES])
def test_an_empty_model_takes_an_adapter_as_a_full_one_does(method: str) -> None:
    """The same layout, or the same refusal, word by word."""
    outcomes = []
    for device in ("meta", "cpu"):
        with torch.device(device):
            llama = AutoModelForCausalLM.from_config(LlamaConfig(**SIZES))
            bert = BertForSequenceClassification(BertConfig(**SIZES))
        outcomes.append([_outcome(model, method) for model in (llama, bert)])
    assert outcomes[0] == outcomes[1]


def _outcome(model: torch.nn.Module, method: str) -> str:
    spec = AdapterSpec(method, slots=Geometry.of(model, 1, 1).slots(model))
    try:
        return Layout.of(attach(model.requires_grad_(False).eval(), spec)).digest().hex()
    except OffsiteError as error:
        return str(error)
