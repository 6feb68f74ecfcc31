"""adapter.targets: the modules that a spec matches."""

import pytest
import torch
from torch import nn
from transformers import (
    BertConfig,
    BertModel,
    DistilBertConfig,
    DistilBertModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from offsite.adapter.methods import attach
from offsite.adapter.spec import AdapterSpec
from offsite.adapter.targets import hidden_size, in_slots, is_linear, is_norm, matches, sublayers
from offsite.errors import ConfigError, UnsupportedModel
from tests.families import tiny

SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 12, "num_attention_heads": 4}
DISTIL = DistilBertConfig(dim=32, hidden_dim=48, n_layers=2, n_heads=4, vocab_size=97)
OPT = OPTConfig(
    hidden_size=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=4, vocab_size=97, word_embed_proj_dim=32
)


def llama():
    return LlamaForCausalLM(LlamaConfig(**SIZES, num_key_value_heads=2, vocab_size=97)).eval()


class Block(nn.Module):
    """A block of a model that is in no table."""

    def __init__(self):
        super().__init__()
        self.read = nn.Linear(6, 10)
        self.write = nn.Linear(10, 6)

    def forward(self, x):
        return x + self.write(torch.relu(self.read(x)))


def own():
    torch.manual_seed(0)
    return nn.Sequential(*(Block() for _ in range(4)))


def test_a_slot_does_not_take_in_its_namesakes():
    """model.layers.1 does not count as a prefix of model.layers.10."""
    found = in_slots(llama(), ("model.layers.1",), is_linear)
    assert len(found) == 7
    assert all(name.startswith("model.layers.1.") for name in found)
    model = attach(llama(), AdapterSpec("lora", targets=("q_proj",), slots=("model.layers.1",)))
    assert [name for name, p in model.named_parameters() if p.requires_grad] == [
        f"base_model.model.model.layers.1.self_attn.q_proj.lora_{factor}.default.weight" for factor in "AB"
    ]


def test_no_slot_is_refused():
    with pytest.raises(ConfigError, match="slots="):
        attach(llama(), AdapterSpec("lora"))


def test_an_unknown_slot_names_the_nearest():
    with pytest.raises(UnsupportedModel, match=r"slot='model\.layer\.0'.*did you mean model\.layers\.0"):
        attach(llama(), AdapterSpec("lora", slots=("model.layer.0",)))


def test_a_wrong_target_names_the_nearest_and_leaves_the_model_as_it_was():
    model = llama()
    before = set(model.state_dict())
    with pytest.raises(UnsupportedModel, match=r"target='q_prj'.*did you mean q_proj"):
        attach(model, AdapterSpec("ffa_lora", targets=("v_proj", "q_prj"), slots=("model.layers.0",)))
    assert set(model.state_dict()) == before


@pytest.mark.parametrize("method", ["lora", "ffa_lora", "ia3", "miss"])
def test_a_model_no_table_knows_lists_its_dense_layers(method):
    with pytest.raises(UnsupportedModel, match=r"no default targets for this model; set targets from: read, write"):
        attach(own(), AdapterSpec(method, slots=("0",)))


@pytest.mark.parametrize("method", ["lora", "ffa_lora", "ia3", "miss", "bitfit"])
def test_named_targets_work_in_a_model_no_table_knows(method):
    model = attach(own(), AdapterSpec(method, targets=("write",), slots=("0", "3")))
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    assert names
    assert all("0.write." in name or "3.write." in name for name in names)
    x = torch.ones(2, 6)
    assert torch.equal(model(x), own()(x))


def test_a_target_may_be_a_dotted_end():
    assert matches("h.0.mlp.c_proj", ["mlp.c_proj"])
    assert not matches("h.0.attn.c_proj", ["mlp.c_proj"])
    assert not matches("h.0.mlp.xc_proj", ["c_proj"])


def test_a_regular_expression_of_peft_is_a_target_too():
    assert matches("model.language_model.layers.0.q_proj", r".*language_model\..*\.(q_proj|v_proj)")
    assert not matches("model.vision.layers.0.q_proj", r".*language_model\..*\.(q_proj|v_proj)")


@pytest.mark.parametrize(
    ("block", "width"),
    [
        (lambda: llama().model.layers[0], 32),
        (lambda: GPT2LMHeadModel(GPT2Config(n_embd=24, n_layer=2, n_head=4, vocab_size=97)).transformer.h[0], 24),
        (lambda: Qwen3ForCausalLM(Qwen3Config(**SIZES, head_dim=16, vocab_size=97)).model.layers[0], 32),
        (lambda: BertModel(BertConfig(**SIZES, vocab_size=97)).encoder.layer[0], 32),
        (Block, 6),
    ],
)
def test_the_width_of_a_block_is_found_from_its_layers(block, width):
    assert hidden_size(block()) == width


def test_a_block_without_dense_layers_has_no_known_width():
    with pytest.raises(UnsupportedModel, match="dense layers=0"):
        hidden_size(nn.Sequential(nn.Conv2d(3, 3, 1)))


def test_norms_are_found_whatever_their_class():
    found = in_slots(Qwen3ForCausalLM(Qwen3Config(**SIZES, vocab_size=97)), ("model.layers.0",), is_norm)
    assert {name.rpartition(".")[2] for name in found} == {
        "input_layernorm",
        "post_attention_layernorm",
        "q_norm",
        "k_norm",
    }
    assert not is_norm(nn.LayerNorm(4, elementwise_affine=False))


@pytest.mark.parametrize(
    ("block", "found"),
    [
        (lambda: llama().model.layers[0], ("self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj")),
        (lambda: tiny("gpt2").transformer.h[0], ("attn.c_proj", "mlp.c_fc", "mlp.c_proj")),
        (lambda: tiny("bert").bert.encoder.layer[0], ("attention.output.dense", "intermediate.dense", "output.dense")),
        (lambda: tiny("vit").vit.layers[0], ("attention.o_proj", "mlp.fc1", "mlp.fc2")),
        (lambda: OPTForCausalLM(OPT).model.decoder.layers[0], ("self_attn.out_proj", "fc1", "fc2")),
        (
            lambda: Qwen3ForCausalLM(Qwen3Config(**SIZES, vocab_size=97)).model.layers[0],
            ("self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj"),
        ),
    ],
)
def test_the_two_sublayers_of_a_block_are_found_from_its_layers(block, found):
    parts = sublayers(block())
    assert (parts.attention, parts.reader, parts.writer) == found


def test_a_block_of_another_kind_has_no_two_sublayers():
    with pytest.raises(UnsupportedModel, match="sublayers=1 of a Block"):
        sublayers(Block())
    experts = llama().model.layers[0]
    experts.mlp.experts = nn.ModuleList([nn.Linear(32, 32), nn.Linear(32, 32)])
    with pytest.raises(UnsupportedModel, match="holds a list of layers, for example of experts"):
        sublayers(experts)


@pytest.mark.parametrize(
    ("make", "slot", "leaves"),
    [
        (lambda: DistilBertModel(DISTIL), "transformer.layer.0", {"q_lin", "v_lin"}),
        (lambda: tiny("vit"), "vit.layers.0", {"q_proj", "v_proj"}),
    ],
)
def test_attention_is_the_default_where_no_table_knows_the_model(make, slot, leaves):
    names = [
        name for name, p in attach(make(), AdapterSpec("ffa_lora", slots=(slot,))).named_parameters() if p.requires_grad
    ]
    assert {name.split(".lora_")[0].rpartition(".")[2] for name in names} == leaves
