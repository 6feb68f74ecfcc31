"""Names of devices, and what this machine says of devices that it does not have."""

import pytest
import torch

from offsite.errors import ConfigError
from offsite.task.device import check_device, check_processes, choose_device, choose_devices, device_of, too_many
from offsite.task.offload_setting import check_offload


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


def test_what_names_no_setting_of_offloading() -> None:
    with pytest.raises(ConfigError, match=r"^compute\.offload='disk': must be auto, always or never") as caught:
        check_offload("disk", key="compute.offload")
    assert caught.value.key == "compute.offload"


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


@pytest.mark.parametrize(
    ("device", "processes", "told"),
    [
        ("cpu", 0, "processes=0: must be from 1 to 64; 1 trains in one process"),
        ("cpu", -2, "processes=-2: must be from 1 to 64"),
        ("auto", 65, "processes=65: must be from 1 to 64"),
        (
            "cuda:1",
            2,
            "processes=2 device='cuda:1': each process takes a device of its own, .* set device = 'cuda'",
        ),
    ],
)
def test_numbers_of_processes_that_are_refused(device: str, processes: int, told: str) -> None:
    with pytest.raises(ConfigError, match=f"^{told}"):
        check_processes(device, processes)


def test_processes_share_the_cpu_or_take_an_accelerator_each(monkeypatch: pytest.MonkeyPatch) -> None:
    threads, cpu = torch.get_num_threads(), torch.device("cpu")
    assert choose_devices("cpu", 3) == (cpu, cpu, cpu)
    assert not too_many((cpu,) * threads)
    assert too_many((cpu,) * (threads + 1)).startswith(f"processes={threads + 1}: PyTorch has {threads} processor thr")
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: torch.device("cuda"))
    monkeypatch.setattr(torch.accelerator, "current_device_index", lambda: 0)
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)
    two = torch.device("cuda:0"), torch.device("cuda:1")
    assert choose_devices("auto", 2) == choose_devices("cuda", 2) == two
    assert choose_devices("cuda:1", 1) == two[1:]
    assert choose_devices("cpu", 2) == (cpu, cpu)
    assert not too_many(two)
    with pytest.raises(ConfigError, match=r"processes=3 device='auto': PyTorch finds 2 of cuda here, .*processes = 2"):
        choose_devices("auto", 3)
