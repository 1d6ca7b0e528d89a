"""Tiny folders as transformers saves them: what is read, how, and what is refused."""

import json
import sys

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

from memfit.errors import ConfigError
from memfit.memory.enforcement import process_status, reset_peak
from memfit.memory.simulate import build_on_meta
from memfit.models.experts_language import ExpertsLanguageModel
from memfit.models.language_settings import LanguageSettings
from memfit.workloads.backbone import load_backbone

VOCAB, WIDTH = 61, 16
TOKENS = {"vocab_size": VOCAB, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
SMALL = {"hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32, **TOKENS}
QWEN = {**SMALL, "num_key_value_heads": 1, "head_dim": 8}
MODELS = {
    "qwen3": lambda: transformers.Qwen3Config(**QWEN, tie_word_embeddings=True),
    "llama": lambda: transformers.LlamaConfig(**SMALL, tie_word_embeddings=False),
    "gpt2": lambda: transformers.GPT2Config(n_embd=WIDTH, n_layer=2, n_head=2, n_positions=32, **TOKENS),
}
REFUSED = {
    "scaled logits": lambda: transformers.GraniteConfig(**SMALL, logits_scaling=8.0),
    "a bias": lambda: transformers.PhiConfig(**SMALL),
    "later tokens": lambda: transformers.Qwen3Config(**QWEN, is_causal=False),
}


def save(folder, config, dtype=torch.bfloat16, **settings):
    torch.manual_seed(0)
    causal = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
    for parameter in causal.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    transformers.utils.logging.disable_progress_bar()
    causal.save_pretrained(folder, **settings)
    transformers.utils.logging.enable_progress_bar()
    return causal.eval()


@pytest.fixture(scope="module", params=MODELS)
def saved(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    return folder, save(folder, MODELS[request.param]())


@pytest.fixture
def folder(tmp_path):
    save(tmp_path, MODELS["qwen3"]())
    return tmp_path


def tokens_of(n, length=9):
    return torch.randint(VOCAB, (n, length), generator=torch.Generator().manual_seed(n))


def change_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


# What is read


def test_hidden_rows_times_the_head_are_the_logits(saved):
    folder, causal = saved
    backbone, tokens = load_backbone(folder), tokens_of(3)
    assert torch.equal(F.linear(backbone.hidden(tokens), backbone.head), causal(tokens).logits)
    assert backbone.hidden(tokens).shape == (3, 9, WIDTH)
    assert (backbone.width, backbone.vocab_size, backbone.head.shape) == (WIDTH, VOCAB, (VOCAB, WIDTH))
    assert not any(module.training for module in backbone.modules())


def test_tied_weights_are_stored_once(saved, tmp_path):
    folder, causal = saved
    backbone = load_backbone(folder)
    save_file(backbone.state_dict(), tmp_path / "weights.safetensors")  # refuses tensors that share memory
    tied = causal.config.tie_word_embeddings
    assert sum(tensor.shape == (VOCAB, WIDTH) for tensor in backbone.state_dict().values()) == (1 if tied else 2)
    assert sum(p.numel() for p in backbone.parameters()) == sum(p.numel() for p in causal.parameters())
    again = load_backbone(folder)
    torch.nn.init.zeros_(again.head)
    again.load_state_dict(load_file(tmp_path / "weights.safetensors"))
    assert torch.equal(again.head, backbone.head)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_weights_come_in_the_precision_asked_for(folder, dtype):
    stored, backbone = load_file(folder / "model.safetensors"), load_backbone(folder, dtype)
    assert {parameter.dtype for parameter in backbone.parameters()} == {getattr(torch, dtype)}
    expected = stored["model.embed_tokens.weight"].to(getattr(torch, dtype))
    assert torch.equal(backbone.head, expected)


def test_as_stored_is_what_the_config_names_or_else_the_weights_have(folder):
    assert load_backbone(folder).head.dtype == torch.bfloat16
    change_config(folder, dtype=None)
    assert load_backbone(folder).head.dtype == torch.bfloat16


def test_weights_in_several_files_are_read(tmp_path):
    causal = save(tmp_path, MODELS["llama"](), max_shard_size="4KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    backbone = load_backbone(tmp_path)
    assert torch.equal(F.linear(backbone.hidden(tokens_of(2)), backbone.head), causal(tokens_of(2)).logits)


def test_no_progress_bar_is_shown_and_the_setting_is_kept(folder, capfd):
    load_backbone(folder)
    assert capfd.readouterr() == ("", "")
    assert transformers.utils.logging.is_progress_bar_enabled()


# Memory


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("dtype", ["auto", "float16"])
def test_weights_are_not_held_twice_while_they_are_read(tmp_path, dtype):
    config = transformers.Qwen3Config(
        **{**QWEN, "hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 32}
    )
    num_bytes = sum(parameter.nbytes for parameter in save(tmp_path, config).parameters())
    load_backbone(tmp_path, dtype)  # imports, and starts threads
    reset_peak("cpu")
    before = process_status()["VmRSS"]
    backbone = load_backbone(tmp_path, dtype)
    rise = process_status()["VmHWM"] - before
    assert sum(parameter.nbytes for parameter in backbone.parameters()) == num_bytes
    assert rise < 1.2 * num_bytes


@pytest.mark.parametrize("dtype", ["auto", "float16"])
def test_a_planner_builds_from_the_config_alone(folder, dtype):
    expected = {
        name: (tensor.shape, tensor.dtype) for name, tensor in load_backbone(folder, dtype).state_dict().items()
    }
    (folder / "model.safetensors").unlink()
    settings = LanguageSettings(name="experts", vocab_size=VOCAB, d_model=8, num_layers=1, num_heads=2, num_experts=2)
    model = build_on_meta(lambda: ExpertsLanguageModel(settings, load_backbone(folder, dtype)))
    assert all(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))
    found = {name: (tensor.shape, tensor.dtype) for name, tensor in model.backbone.state_dict().items()}
    assert found == expected


def test_experts_begin_as_the_backbone(saved):
    folder, causal = saved
    settings = LanguageSettings(name="experts", vocab_size=VOCAB, d_model=8, num_layers=1, num_heads=2, num_experts=4)
    model = ExpertsLanguageModel(settings, load_backbone(folder)).train()
    assert torch.equal(model(tokens_of(3)), causal(tokens_of(3)).logits)
    assert sum(name.endswith(("embed_tokens.weight", "wte.weight")) for name in model.state_dict()) == 1


# What is refused


def test_a_folder_that_is_not_there_or_holds_no_config_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"expected a folder with config.json, got no folder"):
        load_backbone(tmp_path / "absent")
    with pytest.raises(ConfigError, match="got a folder without one"):
        load_backbone(tmp_path)


def test_another_task_than_the_next_token_is_refused(folder):
    change_config(folder, architectures=["Qwen3ForSequenceClassification"])
    with pytest.raises(ConfigError, match=r"expected a causal language model.*got Qwen3ForSequenceClassification"):
        load_backbone(folder)
    change_config(folder, architectures=None)
    with pytest.raises(ConfigError, match=r"config.json without architectures"):
        load_backbone(folder)


def test_quantized_models_are_refused(folder):
    change_config(folder, quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True})
    with pytest.raises(ConfigError, match="expected a model that is not quantized"):
        load_backbone(folder)


def test_whole_numbers_as_weights_are_refused(folder):
    weights = load_file(folder / "model.safetensors")
    save_file({name: tensor.to(torch.int8) for name, tensor in weights.items()}, folder / "model.safetensors")
    with pytest.raises(ConfigError, match=r"expected weights in F16, BF16, F32, got \['I8'\]"):
        load_backbone(folder)


def test_pickled_weights_are_refused(folder):
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match=r"expected weights in model.safetensors or .*, got neither"):
        load_backbone(folder)
    torch.save(weights, folder / "pytorch_model.bin")
    with pytest.raises(ConfigError, match=r"got pickled ones \(pytorch_model.bin\): reading them could run code"):
        load_backbone(folder)


def test_code_in_the_folder_is_not_run(folder):
    (folder / "modeling_own.py").write_text("raise SystemExit('run')")
    own = {"AutoConfig": "modeling_own.Own", "AutoModelForCausalLM": "modeling_own.Own"}
    change_config(folder, auto_map=own)
    assert type(load_backbone(folder).body).__module__ == "transformers.models.qwen3.modeling_qwen3"
    change_config(folder, model_type="own")
    with pytest.raises(ConfigError, match=r"config.json cannot be used \(ValueError"):
        load_backbone(folder)


@pytest.mark.parametrize("name", ["../model.safetensors", "weights.bin", "absent.safetensors"])
def test_an_index_names_files_beside_it(folder, name):
    (folder / "model.safetensors").rename(folder / "weights.bin")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"model.norm.weight": name}}))
    with pytest.raises(ConfigError, match=rf"expected names of files beside it, got \['{name}'\]"):
        load_backbone(folder)


def test_missing_and_torn_weights_are_refused(folder):
    path = folder / "model.safetensors"
    weights = load_file(path)
    save_file({name: tensor for name, tensor in weights.items() if "k_proj" not in name}, path)
    with pytest.raises(
        ConfigError, match=r"expected all weights of Qwen3ForCausalLM, without \['model.layers.0.*k_proj"
    ):
        load_backbone(folder)
    save_file({name: tensor[:1] for name, tensor in weights.items()}, path)
    with pytest.raises(ConfigError, match="weights cannot be used"):
        load_backbone(folder)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ConfigError, match="weights cannot be used"):
        load_backbone(folder)


@pytest.mark.parametrize("kind", REFUSED)
def test_models_whose_rows_are_not_what_is_taken_for_granted_are_refused(tmp_path, kind):
    save(tmp_path, REFUSED[kind](), torch.float32)
    said = {"scaled logits": "which scales or caps them", "a bias": "got a bias as well", "later tokens": "these do"}
    with pytest.raises(ConfigError, match=said[kind]):
        load_backbone(tmp_path)


def test_weights_that_overflow_in_half_precision_are_refused(folder):
    path = folder / "model.safetensors"
    save_file({name: tensor * 1e6 for name, tensor in load_file(path).items()}, path)
    with pytest.raises(ConfigError, match=r"expected finite logits in torch.float16, got others. Set bfloat16"):
        load_backbone(folder, "float16")


def test_unknown_precisions_are_refused(folder):
    with pytest.raises(ConfigError, match="backbone dtype: expected auto, float16, bfloat16, float32, got 'int8'"):
        load_backbone(folder, "int8")


def test_says_what_to_install(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ConfigError, match=r"needs transformers. pip install 'memfit\[huggingface\]'"):
        load_backbone(folder)
