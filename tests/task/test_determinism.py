"""Determinism on an accelerator, and memory before a load: flags that one function sets, and refusals with numbers."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from offsite.errors import ConfigError, TrainingFault
from offsite.task.checkpoint import check_memory
from offsite.task.determinism import compute_deterministically, refusal_of
from offsite.task.device_memory import check_fits, free_memory

CPU = torch.device("cpu")
FLAGS = """
import os, torch
from offsite.task.determinism import compute_deterministically, refusal_of
os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":16:8"
compute_deterministically(torch.device("cuda"))
print(os.environ["CUBLAS_WORKSPACE_CONFIG"], end=" ")
del os.environ["CUBLAS_WORKSPACE_CONFIG"]
compute_deterministically(torch.device("cuda:1"))
print(os.environ["CUBLAS_WORKSPACE_CONFIG"], torch.are_deterministic_algorithms_enabled())
matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
print(matmul.allow_tf32, matmul.allow_bf16_reduced_precision_reduction, cudnn.allow_tf32, cudnn.benchmark)
try:
    torch.zeros(3).put_(torch.tensor([0, 0]), torch.tensor([1.0, 2.0]))
except RuntimeError as error:
    print(refusal_of(error))
"""


def test_an_accelerator_computes_deterministically_or_refuses() -> None:
    """The last line: an operation without a deterministic algorithm, as the person at the terminal reads of it."""
    done = subprocess.run([sys.executable, "-c", FLAGS], capture_output=True, text=True, check=True)
    flags, products, refusal = done.stdout.splitlines()
    assert flags == ":16:8 :4096:8 True"
    assert products == "False False False False"
    assert refusal.startswith("operation=put_: PyTorch has no deterministic algorithm")
    assert "set device = 'cpu'" in refusal


def test_a_cpu_keeps_its_settings_and_other_errors_their_words() -> None:
    compute_deterministically(CPU)
    assert not torch.are_deterministic_algorithms_enabled()
    assert refusal_of(RuntimeError("no kernel image is available")) is None
    assert refusal_of(ValueError("put_ does not have a deterministic implementation")) is None
    assert isinstance(refusal_of(RuntimeError("put_ does not have a deterministic implementation")), TrainingFault)


def test_what_cannot_fit_says_how_much_it_needs(fed: Path, tmp_path: Path) -> None:
    check_memory(fed.parent / "model", CPU)
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.truncate(2**43)  # no byte of it is on the disk
    with pytest.raises(ConfigError, match=r"device='cpu': the full model needs 8192\.00 GiB of this process or more"):
        check_memory(tmp_path, CPU)
    check_fits("it", 1, CPU, "")
    with pytest.raises(ConfigError, match="take another"):
        check_fits("it", 2 * free_memory(CPU), CPU, "take another")
