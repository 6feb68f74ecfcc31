"""Names of devices, and what this machine says of devices that it does not have."""

import pytest
import torch

from offsite.errors import ConfigError
from offsite.task.device import check_device, choose_device, device_of


@pytest.mark.parametrize("name", ["auto", "cpu", "cuda", "cuda:0", "cuda:15", "xpu", "mps"])
def test_names_of_devices(name: str) -> None:
    check_device(name)


@pytest.mark.parametrize(
    "name", ["", "CPU", "cpu:0", "cuda:", "cuda:-1", "cuda:x", "cuda 0", "gpu0", "cuda:0,1", "cuda:²"]
)
def test_what_names_no_device(name: str) -> None:
    with pytest.raises(ConfigError, match=r"^compute\.device='.*': must be auto, cpu, cuda, cuda:N or xpu") as caught:
        check_device(name, key="compute.device")
    assert caught.value.key == "compute.device"


@pytest.mark.skipif(torch.accelerator.is_available(), reason="this machine has an accelerator")
def test_without_an_accelerator_auto_is_the_cpu_and_others_are_refused() -> None:
    assert choose_device("auto") == choose_device("cpu") == torch.device("cpu")
    for name in ("cuda", "cuda:1", "xpu", "gpu", "mps"):
        with pytest.raises(ConfigError, match=f"device='{name}': PyTorch .* finds no such device here, but cpu; name"):
            choose_device(name)


def test_the_device_of_a_model_is_that_of_its_first_parameter() -> None:
    assert device_of(torch.nn.Linear(2, 2)) == torch.device("cpu")
    assert device_of(torch.nn.Identity()) == torch.device("cpu")
    assert device_of(torch.nn.Linear(2, 2, device="meta")) == torch.device("meta")
