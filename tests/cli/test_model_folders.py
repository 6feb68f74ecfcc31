"""What a model's folder holds, length and tokenizer: three commands say the same lines at once."""

import dataclasses
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import GPT2Config, GPT2LMHeadModel, LlamaForCausalLM, PreTrainedTokenizerFast

from offsite.cli import main as command
from offsite.coordinator.check.federation import check_coordinator
from offsite.coordinator.config.coordinator_table import CoordinatorConfig
from offsite.coordinator.config.federation_file import read_with_faults
from offsite.task.findings import Findings


@dataclass(frozen=True)
class Ended:
    """How a command ended: exit code, its last line, and everything that it said."""

    code: int
    last: str
    said: str


Run = Callable[..., Ended]


@pytest.fixture
def world(fed: Path, tmp_path: Path) -> Path:
    """A copy of the tiny world that a test may break."""
    shutil.copytree(fed.parent, tmp_path / "world")
    return tmp_path / "world"


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture) -> Run:
    """Runs a command."""

    def call(*arguments: str) -> Ended:
        caplog.clear()
        monkeypatch.setattr("sys.argv", ["offsite", *arguments])
        with pytest.raises(SystemExit) as stopped:
            command.main()
        said = capsys.readouterr().err
        return Ended(int(stopped.value.code or 0), said.strip().splitlines()[-1], said + caplog.text)

    return call


def both(run: Run, world: Path, length: int) -> list[Ended]:
    """Runs the two commands with a length, and with more examples asked for than a build finds."""
    fed = world / "fed.toml"
    fed.write_text(fed.read_text().replace("length = 16", f"length = {length}"))
    out = world.parent / "out"
    places = ("--calibration", str(world / "data" / "public"), "--out", str(out / "p"), "--first", "1", "--last", "1")
    return [
        run("simulate", str(fed), "--out", str(out / "run")),
        run("emulator", "build", str(world / "model"), *places, "--length", str(length), "--sequences", "500"),
    ]


def said_at_once(ended: list[Ended]) -> str:
    """Returns the line that both commands ended with, before they read a record or a weight."""
    assert [one.code for one in ended] == [2, 2]
    assert not any("load the full model" in one.said or "read " in one.said for one in ended)
    (line,) = {one.last for one in ended}
    return line


def test_more_tokens_than_learnt_positions(world: Path, run: Run) -> None:
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=63, n_positions=16, n_embd=16, n_layer=4, n_head=2, bos_token_id=1, eos_token_id=2)
    GPT2LMHeadModel(config).save_pretrained(world / "model")
    line = said_at_once(both(run, world, 17))
    assert line == "offsite: length=17: must be at most 16, the number of the model's positions; 16 is usual"


def test_a_token_beyond_the_table_of_embeddings(world: Path, run: Run) -> None:
    tokenizer = PreTrainedTokenizerFast.from_pretrained(world / "model")
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    tokenizer.save_pretrained(world / "model")
    line = said_at_once(both(run, world, 16))
    assert line.startswith("offsite: token id=63: the model has rows for the token ids 0 to 62 only (vocab_size=63)")


def test_an_adapter_beside_the_model_and_blocks_that_nobody_counts(world: Path, run: Run) -> None:
    """Both are named, by both commands, and neither is used; at a gate that nothing passes, no time is lost."""
    model = LlamaForCausalLM.from_pretrained(world / "model")
    get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(world / "model")
    config = json.loads((world / "model" / "config.json").read_text())
    (world / "model" / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 4}))
    fed = world / "fed.toml"
    fed.write_text(fed.read_text().replace("gate = 0.1", "gate = 0.9999999"))
    simulated, built = both(run, world, 16)
    assert "gradient_cosine=" in simulated.last
    assert "500" in built.last or "532" in built.last
    for ended in (simulated, built):
        assert "holds an adapter beside the model (adapter_config.json, adapter_model.safetensors)" in ended.said
        assert ended.said.count("18 stored tensors are not used, the first is 'model.layers.4.input_layernorm.wei") == 1
        assert "LOAD REPORT" not in ended.said


Broken = Callable[[Path], None]


def _config(**changes: object) -> Broken:
    def change(model: Path) -> None:
        values = json.loads((model / "config.json").read_text()) | changes
        (model / "config.json").write_text(json.dumps(values))

    return change


def _without(*names: str) -> Broken:
    def change(model: Path) -> None:
        for name in names:
            (model / name).unlink()

    return change


def _written(name: str, content: bytes) -> Broken:
    def change(model: Path) -> None:
        (model / name).write_bytes(content)

    return change


def _cut(model: Path) -> None:
    path = model / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def _pickle(model: Path) -> None:
    (model / "model.safetensors").rename(model / "pytorch_model.bin")


def _shard_missing(model: Path) -> None:
    (model / "model.safetensors").unlink()
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "model-1-of-2.safetensors"}}))


def _only_adapter(model: Path) -> None:
    (model / "config.json").unlink()
    (model / "adapter_config.json").write_text('{"base_model_name_or_path": "other"}')


# Name -> what is done to a model's folder, and what each command says.
FOLDERS: dict[str, tuple[Broken, str]] = {
    "no folder": (shutil.rmtree, "is not a directory"),
    "no configuration": (_without("config.json"), "has no config.json"),
    "damaged configuration": (_written("config.json", b"{"), "has a damaged config.json"),
    "quantised": (_config(quantization_config={"bits": 4}), "quant_method='': read are gptq, awq and bitsandbytes"),
    "pointer": (_written("model.safetensors", b"version https://git-lfs.github.com/spec/v1\n"), "a pointer of Git LFS"),
    "cut": (_cut, "is cut or damaged"),
    "pickle": (_pickle, "has its weights only in a pickle"),
    "no weights": (_without("model.safetensors"), "has no *.safetensors"),
    "shard missing": (_shard_missing, "is not there, and model.safetensors.index.json names it"),
    "adapter alone": (_only_adapter, "for the model 'other', and no model"),
    "no tokenizer": (_without("tokenizer.json"), "has no tokenizer.json"),
    "damaged tokenizer": (_written("tokenizer.json", b"{}"), "cannot be read, or tokenizer_config.json names"),
    "damaged settings": (_written("tokenizer_config.json", b"{"), "has a damaged tokenizer_config.json"),
    "small table": (_config(vocab_size=40), "the model has rows for the token ids 0 to 39 only"),
    "unknown type": (_config(model_type="nobody"), "model_type='nobody' must be a causal language model"),
    "own code": (_config(model_type="own", auto_map={"AutoModel": "own.Model"}), "is never run"),
    "other task": (_config(architectures=["BertForTokenClassification"]), "must be a causal language model"),
    "wrong value": (_config(num_hidden_layers="many"), "has a wrong config.json"),
    "special id": (_config(pad_token_id=99), "pad_token_id=99: must be a token id of the model"),
}


@pytest.mark.parametrize("kind", FOLDERS)
def test_three_commands_say_the_same_of_a_folder(kind: str, world: Path, run: Run) -> None:
    """`simulate`, `emulator build`, and the first step of `coordinator run`; none of them reads a weight before."""
    change, expected = FOLDERS[kind]
    change(world / "model")
    ended = both(run, world, 16)
    said_of_model = [
        {line for line in one.said.splitlines() if line.startswith("offsite: ") and "data=" not in line}
        for one in ended
    ]
    config, _ = read_with_faults(world / "fed.toml")
    assert config is not None
    findings, now = Findings(), datetime.now(UTC)
    federation = dataclasses.replace(config, sites=(), coordinator=CoordinatorConfig(home=str(world / "none")))
    check_coordinator(federation, None, now, findings)
    coordinators = {f"offsite: {line}" for line in findings.errors if "is not a coordinator's folder" not in line}
    assert [one.code for one in ended] == [2, 2]
    assert [line for line in coordinators if expected in line], coordinators
    assert said_of_model == [coordinators, coordinators]
    assert not (world.parent / "out").exists()
    assert not any("load the full model" in one.said for one in ended)
