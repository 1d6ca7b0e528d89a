import subprocess
import sys
import warnings

import numpy as np
import onnxruntime
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

from memfit.models.decoder_language import BLOCKS, DecoderLanguageModel, rotary_angles, rotate
from memfit.models.language import EPS_SUM
from memfit.models.language_settings import LanguageSettings
from memfit.step import checkpoint_blocks

VOCAB, D_MODEL = 31, 16


def make_model(**changes):
    torch.manual_seed(0)
    settings = {"vocab_size": VOCAB, "d_model": D_MODEL, "num_layers": 2, "num_heads": 2}
    model = DecoderLanguageModel(LanguageSettings(name="decoder", **{**settings, **changes}))
    with torch.no_grad():
        for name, parameter in model.named_parameters():  # larger weights, so that all parts show in the outputs
            parameter.mul_(1 if "norm" in name else 5).add_(0.1 * torch.randn_like(parameter))
    return model


def tokens_of(n, length):
    return torch.randint(VOCAB, (n, length), generator=torch.Generator().manual_seed(n * length))


def test_agrees_with_the_llama_of_transformers():
    model = make_model()
    config = transformers.LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=D_MODEL,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=model.settings.inner_width,
        rms_norm_eps=EPS_SUM / D_MODEL,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=None,
    )
    renamed = {
        "embedding": "embed_tokens", "blocks": "layers", "mixer_norm": "input_layernorm", "mixer": "self_attn",
        "query": "q_proj", "key": "k_proj", "value": "v_proj", "out": "o_proj", "ff_norm": "post_attention_layernorm",
        "ff": "mlp", "gate": "gate_proj", "up": "up_proj", "down": "down_proj",
    }  # fmt: skip
    weights = {
        "model." + ".".join(renamed.get(part, part) for part in name.split(".")): tensor
        for name, tensor in model.state_dict().items()
    }
    llama = transformers.LlamaForCausalLM(config).eval()
    llama.load_state_dict(weights | {"lm_head.weight": model.head})
    tokens = tokens_of(3, 11)
    torch.testing.assert_close(model(tokens), llama(tokens).logits)


def test_a_token_changes_no_row_before_it():
    model = make_model()
    tokens = tokens_of(2, 9)
    changed = tokens.clone()
    changed[:, 5] = (changed[:, 5] + 1) % VOCAB
    before, after = model.hidden(tokens), model.hidden(changed)
    torch.testing.assert_close(after[:, :5], before[:, :5], atol=0, rtol=0)
    assert ((after[:, 5:] - before[:, 5:]).abs().amax(dim=-1) > 1e-4).all()


def test_turned_rows_keep_their_length_and_their_products_depend_on_the_distance():
    torch.manual_seed(0)
    query, key = torch.randn(2, 1, 1, 1, 8).expand(-1, 1, 1, 12, 8)
    angles = rotary_angles(12, 8, torch.device("cpu"))
    turned, against = rotate(query, angles)[0, 0], rotate(key, angles)[0, 0]
    torch.testing.assert_close(turned.norm(dim=-1), query[0, 0].norm(dim=-1))
    products = turned @ against.T
    for distance in (-7, -1, 0, 3):
        along = products.diagonal(distance)
        torch.testing.assert_close(along, along[:1].expand_as(along))
    assert products.diagonal(3)[0] != pytest.approx(float(products.diagonal(0)[0]), abs=1e-3)


def test_far_positions_are_turned_exactly_in_half_precision_too():
    torch.manual_seed(0)
    angles = rotary_angles(4096, 8, torch.device("cpu"))
    rows = torch.randn(1, 1, 4096, 8).bfloat16()
    turned = rotate(rows, angles)
    assert turned.dtype == torch.bfloat16
    torch.testing.assert_close(turned, rotate(rows.float(), angles).bfloat16(), atol=0, rtol=0)


def test_dropout_acts_in_training_only():
    model, tokens = make_model(dropout=0.5), tokens_of(2, 7)
    assert not torch.allclose(model(tokens), model(tokens))
    model.eval()
    torch.testing.assert_close(model(tokens), make_model()(tokens), atol=0, rtol=0)


def test_checkpointed_blocks_give_the_same_gradients():
    plain, checkpointed, tokens = make_model(), make_model(), tokens_of(2, 7)
    checkpoint_blocks(checkpointed, BLOCKS)
    for model in (plain, checkpointed):
        F.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten()).backward()
    for one, other in zip(plain.parameters(), checkpointed.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, atol=0, rtol=0)
        assert one.grad.abs().max() > 0


def test_an_empty_model_runs_on_tensors_without_memory():
    with torch.device("meta"):
        model = DecoderLanguageModel(
            LanguageSettings(name="decoder", vocab_size=50_000, d_model=4096, num_layers=2, num_heads=32)
        )
        logits = model(torch.zeros(4, 2048, dtype=torch.long))
    assert logits.is_meta
    assert logits.shape == (4, 2048, 50_000)
    assert all(parameter.is_meta for parameter in model.parameters())


def test_weights_are_stored_once_under_the_names_that_growing_goes_by(tmp_path):
    model = make_model(num_layers=1)
    block = (
        "mixer_norm",
        "mixer.query",
        "mixer.key",
        "mixer.value",
        "mixer.out",
        "ff_norm",
        "ff.gate",
        "ff.up",
        "ff.down",
    )
    expected = {"embedding.weight", "norm.weight", *(f"blocks.0.{part}.weight" for part in block)}
    assert set(model.state_dict()) == expected
    save_file(model.state_dict(), tmp_path / "weights.safetensors")
    assert set(load_file(tmp_path / "weights.safetensors")) == expected
    assert (model.width, model.head.shape) == (D_MODEL, (VOCAB, D_MODEL))


def test_the_stream_stays_in_full_precision_under_autocast():
    model, seen = make_model(), []
    model.blocks[1].register_forward_hook(lambda _module, inputs, output: seen.extend((inputs[0].dtype, output.dtype)))
    with torch.autocast("cpu", dtype=torch.bfloat16), warnings.catch_warnings():
        warnings.simplefilter("error")
        hidden = model.hidden(tokens_of(2, 7))
    assert seen == [torch.float32, torch.float32]
    torch.testing.assert_close(hidden, model.hidden(tokens_of(2, 7)), atol=0.1, rtol=0.1)


# In a process of its own, as in the pipeline: an export leaves state behind that can change later ones.
EXPORT = """
import sys
from pathlib import Path
import numpy as np, torch
from safetensors.torch import load_file
from memfit.export.bundle import export_bundle
from memfit.export.signature import Signature
from memfit.models.decoder_language import DecoderLanguageModel
from memfit.models.language_settings import LanguageSettings

class Outputs(torch.nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model
    def forward(self, tokens):
        return (self.model(tokens),)

folder = Path(sys.argv[1])
model = DecoderLanguageModel(LanguageSettings(name="decoder", vocab_size=31, d_model=16, num_layers=2, num_heads=2))
model.load_state_dict(load_file(folder / "weights.safetensors"))
export_bundle(
    folder / "bundle",
    Outputs(model),
    inputs=[Signature("tokens", ("batch", "time"), "int64")],
    outputs=[Signature("logits", ("batch", "time", 31))],
    sample_inputs={"tokens": np.random.default_rng(0).integers(0, 31, (9, 12))},
    card={"name": "decoder"},
    support_files={},
)
"""


def test_the_exported_graph_agrees_at_any_batch_size_and_length(tmp_path):
    model = make_model().eval()
    save_file(model.state_dict(), tmp_path / "weights.safetensors")
    command = [sys.executable, "-W", "error", "-c", EXPORT, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    session = onnxruntime.InferenceSession(tmp_path / "bundle" / "model.onnx", providers=["CPUExecutionProvider"])
    for n, length in ((1, 1), (3, 12), (5, 4), (2, 37)):
        tokens = tokens_of(n, length)
        (got,) = session.run(["logits"], {"tokens": tokens.numpy()})
        np.testing.assert_allclose(got, model(tokens).detach().numpy(), rtol=1e-4, atol=1e-4)
