"""Quantised checkpoints are read as the dense model with the widened weights; what is not read is refused by name."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from offsite.emulator.calibration.source import ShardSource
from offsite.errors import DataError, UnsupportedModel
from offsite.task.checkpoint import load, stored_dtype
from offsite.task.model_fit import check_fit
from offsite.task.packed_format import packed_format
from offsite.task.tasks import TASKS
from tests.task.packers import awq, coded, gptq, in_order, linear_names, shuffled, write

IDS = torch.arange(30).reshape(3, 10)
V1, V2 = {"quant_method": "gptq", "bits": 4, "group_size": 16}, {"checkpoint_format": "gptq_v2"}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 16, "zero_point": True, "version": "gemm"}
Layer = Callable[[Tensor], tuple[np.ndarray, dict[str, Tensor]]]


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}
    config = LlamaConfig(**sizes, vocab_size=50, num_key_value_heads=2, tie_word_embeddings=False)
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def of_gptq(bits: int = 4, *, less: int = 1, group: Any = in_order, index: bool = True) -> Layer:
    def layer(weight: Tensor) -> tuple[np.ndarray, dict[str, Tensor]]:
        own = coded(weight, bits, group(weight.shape[1]))
        return own.dense, gptq(own, bits, less=less, with_index=index)

    return layer


def of_awq(weight: Tensor) -> tuple[np.ndarray, dict[str, Tensor]]:
    own = coded(weight, 4, in_order(weight.shape[1]))
    return own.dense, awq(own)


def positive(weight: Tensor) -> tuple[np.ndarray, dict[str, Tensor]]:
    """A layer of no negative weight has the zero point 0, which the first layout stores as its highest code."""
    dense, pieces = of_gptq()(weight.abs())
    assert (pieces["qzeros"] == -1).any()
    return dense, pieces


CASES: dict[str, tuple[dict[str, Any], Layer]] = {
    "gptq": (V1, of_gptq()),
    "gptq without g_idx": (V1, of_gptq(index=False)),
    "gptq in the order of activations": (V1 | {"desc_act": True}, of_gptq(group=shuffled)),
    "gptq, second layout": (V1 | V2, of_gptq(less=0)),
    "gptq of 8 bits": (V1 | {"bits": 8}, of_gptq(8)),
    "gptq of 2 bits": (V1 | {"bits": 2}, of_gptq(2)),
    "gptq, no negative weight": (V1, positive),
    "awq": (AWQ, of_awq),
}


@pytest.mark.parametrize("name", CASES)
def test_a_packed_model_is_the_dense_model_with_the_widened_weights(llama: Path, tmp_path: Path, name: str) -> None:
    dense, packed = write(llama, tmp_path, *CASES[name])
    assert stored_dtype(packed) == torch.float16
    for dtype in (torch.float16, torch.float32):
        own, other = (load(folder, dtype=dtype, kind="causal_lm") for folder in (packed, dense))
        assert own.state_dict().keys() == other.state_dict().keys()
        for key, tensor in own.state_dict().items():
            assert torch.equal(tensor, other.state_dict()[key]), key
        assert getattr(own.config, "quantization_config", None) is None
    assert torch.equal(own(input_ids=IDS).logits, other(input_ids=IDS).logits)
    plain = load(llama, dtype=torch.float32, kind="causal_lm")
    assert not torch.equal(own(input_ids=IDS).logits, plain(input_ids=IDS).logits)


def test_a_packed_model_is_read_block_by_block(llama: Path, tmp_path: Path) -> None:
    dense, packed = write(llama, tmp_path, *CASES["awq"])
    own, other = (ShardSource(folder, torch.float16) for folder in (packed, dense))
    with own.open("model.layers.1") as left, other.open("model.layers.1") as right:
        assert left.state_dict().keys() == right.state_dict().keys()
        assert all(torch.equal(tensor, right.state_dict()[key]) for key, tensor in left.state_dict().items())
    with own.passing(), other.passing():
        assert torch.equal(own.model(input_ids=IDS).logits, other.model(input_ids=IDS).logits)


def test_pieces_of_a_layer_may_lie_in_several_shards(llama: Path, tmp_path: Path) -> None:
    dense, packed = write(llama, tmp_path, *CASES["gptq"])
    tensors = load_file(packed / "model.safetensors")
    (packed / "model.safetensors").unlink()
    place = {name: f"{'a' if name.endswith(('qweight', 'norm.weight')) else 'b'}.safetensors" for name in tensors}
    for file in ("a.safetensors", "b.safetensors"):
        save_file({name: tensor for name, tensor in tensors.items() if place[name] == file}, packed / file)
    (packed / "model.safetensors.index.json").write_text(json.dumps({"weight_map": place}))
    own, other = (load(folder, dtype=torch.float16, kind="causal_lm") for folder in (packed, dense))
    assert all(torch.equal(tensor, other.state_dict()[name]) for name, tensor in own.state_dict().items())
    assert torch.equal(
        ShardSource(packed, torch.float16).model.state_dict()["lm_head.weight"], other.state_dict()["lm_head.weight"]
    )


def changed(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def test_zero_biases_of_a_packer_are_nothing_and_others_are_refused(
    llama: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    _, packed = write(llama, tmp_path, *CASES["gptq"])
    changed(packed, lambda tensors: tensors.update({f"{p}.bias": torch.zeros(4) for p in list(heads(tensors))}))
    load(packed, dtype=torch.float16, kind="causal_lm")
    ShardSource(packed, torch.float16)
    assert not caplog.records
    name = "model.layers.1.mlp.down_proj.bias"
    changed(packed, lambda tensors: tensors[name].add_(1))
    for read in (
        lambda: load(packed, dtype=torch.float16, kind="causal_lm"),
        lambda: ShardSource(packed, torch.float16),
    ):
        with pytest.raises(DataError, match=f"tensor={name}: a bias that is not zero"):
            read()


def heads(tensors: dict[str, Tensor]) -> list[str]:
    return [name.removesuffix(".qweight") for name in tensors if name.endswith(".qweight")]


@pytest.mark.parametrize(
    ("piece", "change", "match"),
    [
        ("scales", lambda piece: None, r"tensor=model\.layers\.1\.mlp\.up_proj\.scales is missing beside"),
        ("g_idx", lambda piece: piece + 9, r"up_proj\.weight"),
        ("g_idx", lambda piece: piece[:5], r"up_proj\.weight"),
        ("g_idx", lambda piece: piece - 1, r"up_proj\.weight"),
        ("qzeros", lambda piece: piece[:, :2], r"up_proj\.weight"),
        ("qweight", lambda piece: piece.float(), r"up_proj\.weight"),
        ("scales", lambda piece: piece * torch.inf, r"up_proj\.weight' holds NaN or Inf"),
    ],
)
def test_pieces_that_do_not_belong_together_are_refused(
    llama: Path, tmp_path: Path, piece: str, change: Callable[[Tensor], Tensor | None], match: str
) -> None:
    _, packed = write(llama, tmp_path, *CASES["gptq"])
    name = f"model.layers.1.mlp.up_proj.{piece}"

    def spoil(tensors: dict[str, Tensor]) -> None:
        new = change(tensors.pop(name))
        if new is not None:
            tensors[name] = new.contiguous()

    changed(packed, spoil)
    with pytest.raises(DataError, match=match):
        load(packed, dtype=torch.float16, kind="causal_lm")


def test_a_configuration_without_packed_weights_is_refused(llama: Path, tmp_path: Path) -> None:
    dense, _ = write(llama, tmp_path, *CASES["gptq"])
    config = json.loads((dense / "config.json").read_text()) | {"quantization_config": V1}
    (dense / "config.json").write_text(json.dumps(config))
    with pytest.raises(DataError, match=r"config\.json names gptq, and no tensor of the weights is packed so"):
        load(dense, dtype=torch.float16, kind="causal_lm")


def test_the_check_of_a_folder_says_what_is_scored(llama: Path, tmp_path: Path) -> None:
    dense, packed = write(llama, tmp_path, *CASES["awq"])
    task = TASKS["causal_lm"]
    assert check_fit(task, dense, 8, None) == []
    (note,) = check_fit(task, packed, 8, None)
    assert "the model is scored with its 4-bit weights widened to float16 (awq)" in note


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"bits": 4}, "quant_method='': read are gptq, awq and bitsandbytes"),
        ({"quant_method": "fp8"}, "quant_method='fp8'"),
        ({"quant_method": "hqq"}, "quant_method='hqq'"),
        ({"quant_method": "compressed-tensors"}, "quant_method='compressed-tensors'"),
        ("gptq", "must be a table"),
        (V1 | {"bits": 3}, "bits=3: read are 2, 4, 8"),
        (V1 | {"bits": True}, "bits=True"),
        (V1 | {"checkpoint_format": "marlin"}, "checkpoint_format='marlin': a layout for one kernel"),
        (V1 | {"format": "bitblas"}, "checkpoint_format='bitblas'"),
        (V1 | {"dynamic": {"-:lm_head": {}, "+:layers.1": {"bits": 8}}}, r"dynamic='\+:layers.1'"),
        (V1 | {"model_type": "gpt2"}, "model_type='gpt2' lie the other way round"),
        (AWQ | {"version": "gemv"}, "version='gemv': a layout for one kernel; read is gemm"),
        (AWQ | {"version": "exllama"}, "version='exllama'"),
        (AWQ | {"zero_point": False}, "zero_point=False"),
        (AWQ | {"bits": 8}, "bits=8: read are 4"),
        ({"quant_method": "bitsandbytes"}, "neither load_in_4bit nor load_in_8bit"),
    ],
)
def test_what_is_not_read_is_refused_with_the_reason_and_the_next_step(settings: Any, match: str) -> None:
    document = {"model_type": "llama", "quantization_config": settings}
    if isinstance(settings, dict) and "model_type" in settings:
        document["model_type"] = settings["model_type"]
    with pytest.raises(UnsupportedModel, match=match) as refused:
        packed_format(Path("folder"), document)
    assert str(refused.value).endswith("take the plain checkpoint of this model, or save a dequantised copy")


def test_which_dtype_holds_a_packed_checkpoint(llama: Path, tmp_path: Path) -> None:
    _, packed = write(llama, tmp_path, *CASES["gptq"])
    config = json.loads((packed / "config.json").read_text())
    (packed / "config.json").write_text(json.dumps(config | {"dtype": "bfloat16"}))
    assert stored_dtype(packed) == torch.float32  # bfloat16 does not hold what is widened to float16
    assert len(list(linear_names(load_file(llama / "model.safetensors")))) == 21
