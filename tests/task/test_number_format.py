"""Names of number formats, what `auto` takes, and a model that changes its format in place."""

from typing import Any

import pytest
import torch

from offsite.errors import ConfigError
from offsite.task import number_format
from offsite.task.number_format import LARGE, choose_dtype, dtype_of, has_fast_bfloat16, in_dtype
from offsite.task.tasks import TASKS
from tests.task_samples import first_of

CPU = torch.device("cpu")


def test_an_unknown_format_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=r"dtype='half': must be auto, float32, bfloat16 or float16"):
        choose_dtype("half", CPU, LARGE)


def test_float16_on_the_cpu_is_refused_with_its_reason() -> None:
    with pytest.raises(ConfigError, match=r"dtype='float16' on the CPU takes four to ten times as long .* 'bfloat16'"):
        choose_dtype("float16", CPU, LARGE)
    assert choose_dtype("float16", torch.device("cuda", 0), 1) == torch.float16


def test_auto_takes_bfloat16_where_the_device_is_fast_and_the_model_gains(monkeypatch: pytest.MonkeyPatch) -> None:
    for fast in (True, False):
        monkeypatch.setattr(number_format, "has_fast_bfloat16", lambda _, fast=fast: fast)
        assert choose_dtype("auto", CPU, LARGE - 1) == torch.float32
        assert choose_dtype("auto", CPU, LARGE) == (torch.bfloat16 if fast else torch.float32)
        assert choose_dtype("bfloat16", CPU, 1) == torch.bfloat16
        assert choose_dtype("float32", CPU, LARGE) == torch.float32


def test_the_flags_of_a_cpu_decide(monkeypatch: pytest.MonkeyPatch) -> None:
    for flags, fast in (
        ({"avx512_bf16": True}, True),
        ({"amx_bf16": True}, True),
        ({"avx2": True}, False),
        ({}, False),
    ):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda flags=flags: flags, raising=False)
        assert has_fast_bfloat16(CPU) == fast
    monkeypatch.delattr(torch.cpu, "get_capabilities")
    assert not has_fast_bfloat16(CPU)  # an older release of PyTorch


@pytest.mark.parametrize("task", ["causal_lm", "image_classification"])
def test_a_model_in_another_format_is_the_model_as_it_loads_in_that_format(task: str, tmp_path: Any) -> None:
    folder = first_of(task).save(tmp_path / "model")
    loaded = TASKS[task].load(folder, dtype=torch.bfloat16)
    model = in_dtype(TASKS[task].load(folder, dtype=torch.float32), torch.bfloat16)
    assert dtype_of(model) == torch.bfloat16
    right = dict(loaded.named_parameters()) | dict(loaded.named_buffers())
    for name, tensor in (dict(model.named_parameters()) | dict(model.named_buffers())).items():
        assert tensor.dtype == right[name].dtype, name
        assert torch.equal(tensor, right[name]), name
    assert dtype_of(in_dtype(model, torch.float32)) == torch.float32
