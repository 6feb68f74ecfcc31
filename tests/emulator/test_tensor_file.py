"""A file written tensor by tensor is an ordinary safetensors file, whatever the order, and a failure leaves no rest."""

import pytest
import torch
from safetensors import safe_open

from offsite.emulator.package.tensor_file import NAMES, TensorFile
from offsite.errors import DataError


def tensors():
    generator = torch.Generator().manual_seed(0)
    found = {f"t{i}": (torch.rand(i, 3, generator=generator) * 9).to(dtype) for i, dtype in enumerate(NAMES)}
    return found | {"scalar": torch.tensor(2.5), "empty": torch.zeros(0, 4), "name#codes": torch.ones(5).byte()}


def written(path, order):
    file, found = TensorFile(path), tensors()
    for name in order:
        file.add(name, found[name])
    file.finish()
    return path.read_bytes()


def test_it_reads_as_it_was_written(tmp_path):
    written(tmp_path / "f.safetensors", list(tensors()))
    with safe_open(tmp_path / "f.safetensors", framework="pt") as stored:
        assert set(stored.keys()) == set(tensors())
        for name, tensor in tensors().items():
            read = stored.get_tensor(name)
            assert read.dtype == tensor.dtype
            assert torch.equal(read, tensor)
    assert [path.name for path in tmp_path.iterdir()] == ["f.safetensors"]


def test_the_order_of_writing_does_not_show(tmp_path):
    names = list(tensors())
    assert written(tmp_path / "a", names) == written(tmp_path / "b", names[::-1])


def test_every_tensor_is_aligned(tmp_path):
    content = written(tmp_path / "a", list(tensors()))
    assert int.from_bytes(content[:8], "little") % 8 == 0


def test_what_fails_is_one_line_and_leaves_nothing(tmp_path):
    with pytest.raises(DataError, match="cannot be written"):
        TensorFile(tmp_path / "missing" / "f.safetensors")
    file = TensorFile(tmp_path / "f.safetensors")
    file.add("t", torch.ones(3))
    file.drop()
    assert list(tmp_path.iterdir()) == []
