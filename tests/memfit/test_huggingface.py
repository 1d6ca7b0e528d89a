"""Transformers' own models, tiny: what they train on, and that planning needs their config alone."""

import copy
import resource
import subprocess
import sys
import time
from collections import Counter

import cloudpickle
import pytest
import torch
import transformers
from torch.nn import functional as F

import memfit
from memfit import huggingface
from memfit.errors import ConfigError
from memfit.step import StepLayout, TrainingStep, num_samples

MIB = 2**20
VOCAB, LENGTH = 61, 12
TOKENS = {"vocab_size": VOCAB, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
BERT = {**SMALL, **TOKENS, "max_position_embeddings": 32, "hidden_dropout_prob": 0, "attention_probs_dropout_prob": 0}


def gpt2(**changes):
    settings = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32, **TOKENS}
    return transformers.GPT2Config(**settings, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0, **changes)


def llama(**changes):
    return transformers.LlamaConfig(
        **{**SMALL, **TOKENS, "num_key_value_heads": 1, "max_position_embeddings": 32, **changes}
    )


def bert(**changes):
    return transformers.BertConfig(**BERT, **changes)


def t5():
    sizes = {"d_model": 16, "d_ff": 32, "d_kv": 8, "num_layers": 2, "num_heads": 2}
    return transformers.T5Config(**sizes, **TOKENS, decoder_start_token_id=0, dropout_rate=0)


def vit():
    return transformers.ViTConfig(**SMALL, image_size=8, patch_size=4, num_labels=3)


MODELS = {
    "gpt2": (gpt2, "CausalLM"),
    "llama": (llama, "CausalLM"),
    "bert": (bert, "MaskedLM"),
    "t5": (t5, "Seq2SeqLM"),
    "bert tokens": (lambda: bert(num_labels=5), "TokenClassification"),
    "bert sequences": (lambda: bert(num_labels=5), "SequenceClassification"),
    "bert regression": (lambda: bert(num_labels=1), "SequenceClassification"),
    "bert labels": (lambda: bert(num_labels=4, problem_type="multi_label_classification"), "SequenceClassification"),
    "vit": (vit, "ImageClassification"),
}


def program_of(name, **settings):
    make, task = MODELS[name]
    length = {} if task == "ImageClassification" else {"seq_len": LENGTH}
    return huggingface.program(make(), task=task, **length, **settings)


def uneven_batch(program, size):
    """Samples of very different lengths; the last one has nothing to learn from."""
    batch = program.batch(size)
    lengths = torch.tensor([LENGTH, 3, 2, 7, 2, 0][:size])
    labels = batch["labels"]
    if "attention_mask" in batch:
        batch["attention_mask"] = (torch.arange(LENGTH) < lengths.clamp(min=1)[:, None]).long()
    if labels.shape == (size, LENGTH):
        batch["labels"] = labels.masked_fill(torch.arange(LENGTH) >= lengths[:, None], -100)
    elif labels.is_floating_point():
        batch["labels"] = torch.rand_like(labels)
    if "pixel_values" in batch:
        batch["pixel_values"] = torch.randn_like(batch["pixel_values"])
    return batch


def gradients(model):
    found = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    model.zero_grad()
    return found


def accumulated(program, model, batch, steps, checkpointing="none"):
    """Loss and gradients of memfit's step, before its update."""
    step = TrainingStep(StepLayout(steps, checkpointing=checkpointing), program, model, program.optimizer(model))
    size, counts = num_samples(batch), program.count(batch)
    parts = program.split(batch, [size // steps] * steps)
    loss = sum(step.accumulate(part, counts, size)["loss"] for part in parts)
    return loss, gradients(model)


@pytest.mark.parametrize("name", MODELS)
def test_gradients_do_not_depend_on_the_cut(name):
    """The reference is transformers' own loss on the whole batch: a mean over all its labels that count."""
    torch.manual_seed(0)
    program = program_of(name)
    model = program.build().train()
    batch = uneven_batch(program, 6)
    expected = model(**batch, **({"use_cache": False} if name != "vit" and "bert" not in name else {})).loss
    expected.backward()
    expected = float(expected.detach())
    reference = gradients(model)
    for steps in (1, 2, 6):
        loss, found = accumulated(program, model, batch, steps)
        assert float(loss) == pytest.approx(expected, rel=1e-6)
        assert (found - reference).norm() <= 1e-6 * reference.norm()


def test_a_mean_per_micro_batch_would_depend_on_the_cut():
    """What the test above excludes: the batch is uneven enough to show it."""
    torch.manual_seed(0)
    program = program_of("gpt2")
    model, batch = program.build().train(), uneven_batch(program, 4)
    whole = model(**batch).loss.detach()
    means = [model(**part).loss.detach() for part in program.split(batch, [2, 2])]
    assert abs(sum(means) / 2 - whole) > 1e-4 * whole


def test_nothing_counts_in_a_causal_model_but_what_is_predicted():
    program = program_of("gpt2", padded=False)
    assert program.count(program.batch(3)) == {"loss": 3.0 * (LENGTH - 1)}
    labels = torch.full((2, LENGTH), -100)
    labels[0, 0] = labels[1, 4:7] = 5  # the first token is predicted by none
    assert program.count({"labels": labels}) == {"loss": 3.0}
    assert program_of("bert").count({"labels": labels}) == {"loss": 4.0}


@pytest.mark.parametrize(
    ("name", "block"),
    [
        ("gpt2", "GPT2Block"),
        ("llama", "LlamaDecoderLayer"),
        ("bert", "BertLayer"),
        ("t5", "T5Block"),
        ("vit", "ViTLayer"),
    ],
)
def test_activation_checkpointing_recomputes_the_repeated_layers(name, block):
    torch.manual_seed(0)
    program = program_of(name)
    assert [each.__name__ for each in program.blocks] == [block]
    model = program.build().train()
    batch, ran = uneven_batch(program, 2), Counter()
    _, plain = accumulated(program, model, batch, 1)
    blocks = [module for module in model.modules() if isinstance(module, program.blocks)]
    inner = next(each for each in blocks[-1].modules() if not [*each.children()] and [*each.parameters()])
    inner.register_forward_hook(lambda *_: ran.update(["inner"]))
    _, recomputed = accumulated(program, model, batch, 1, "blocks")
    assert ran["inner"] == 2
    assert (recomputed - plain).norm() <= 1e-6 * plain.norm()


@pytest.mark.parametrize("name", ["llama", "bert", "t5"])
@pytest.mark.parametrize("padded", [True, False])
def test_a_simulation_takes_the_attention_that_a_real_batch_takes(name, padded, monkeypatch):
    program = program_of(name, padded=padded)
    real, seen = F.scaled_dot_product_attention, []

    def attention(*args, **settings):
        mask = settings.get("attn_mask")
        seen.append((None if mask is None else tuple(mask.shape), settings.get("is_causal"), args[1].shape[1]))
        return real(*args, **settings)

    monkeypatch.setattr(F, "scaled_dot_product_attention", attention)
    accumulated(program, program.build().train(), program.batch(2), 1)
    really, seen = seen, []
    memfit.estimate(program, micro_batch_size=2, device="t4")
    assert really
    assert seen[: len(really)] == really
    if name == "llama":
        assert {mask is not None for mask, *_ in really} == {padded}


def test_a_billion_parameters_are_estimated_without_them():
    config = llama(vocab_size=128256, hidden_size=2048, intermediate_size=8192, num_hidden_layers=16,
                   num_attention_heads=32, num_key_value_heads=8, max_position_embeddings=131072,
                   tie_word_embeddings=True)  # fmt: skip
    before, started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
    program = huggingface.program(config, task="CausalLM", seq_len=1024)
    asked = {"micro_batch_size": 2, "device": "t4", "precision": "fp16"}
    plain = memfit.estimate(program, **asked)
    blocks = memfit.estimate(program, **asked, checkpointing="blocks")
    assert time.monotonic() - started < 30
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024 < 300
    weights = plain.breakdown["parameters"]
    assert weights == pytest.approx(4 * 1.236e9, rel=1e-3)
    assert plain.breakdown["optimizer_state"] == 2 * weights
    assert not plain.fits
    assert blocks.live_bytes < plain.live_bytes


def test_what_is_longer_takes_more_and_too_long_is_an_error():
    program = program_of("gpt2")
    batch = program.batch(2, 20)
    assert {name: tuple(tensor.shape) for name, tensor in batch.items()} == dict.fromkeys(batch, (2, 20))
    assert int(batch["attention_mask"].sum()) == 2 * 19
    short, long = (
        memfit.estimate(program, micro_batch_size=256, seq_len=length, device="t4").peak_bytes for length in (8, 32)
    )
    assert short + 8 * MIB < long
    with pytest.raises(ConfigError, match=r"seq_len: expected 1 to 32 tokens, got 33"):
        program.batch(2, 33)
    with pytest.raises(ConfigError, match=r"seq_len: expected 1 to 32 tokens, got 40"):
        huggingface.program(gpt2(), task="CausalLM", seq_len=40)
    with pytest.raises(ConfigError, match=r"seq_len: expected the number of tokens .* at most\)"):
        huggingface.program(gpt2(), task="CausalLM")


def test_targets_have_a_length_of_their_own():
    program = program_of("t5", target_len=5)
    assert program.batch(3)["labels"].shape == (3, 5)
    assert program.batch(3, 7)["input_ids"].shape == (3, 7)
    assert program_of("t5").batch(3, 7)["labels"].shape == (3, 7)


def test_a_loaded_model_gives_its_class_its_type_and_what_is_frozen_but_no_weights():
    model = transformers.AutoModelForCausalLM.from_config(llama(hidden_size=512), dtype=torch.bfloat16)
    model.model.embed_tokens.requires_grad_(False)
    before = copy.deepcopy(model.state_dict())
    program = huggingface.program(model, seq_len=LENGTH)
    assert len(cloudpickle.dumps(program)) < 64 * 1024 < sum(p.nbytes for p in model.parameters())
    built = program.build()
    assert type(built) is type(model)
    assert built.dtype == torch.bfloat16
    assert [p.requires_grad for p in built.parameters()] == [p.requires_grad for p in model.parameters()]
    assert (
        sum(len(group["params"]) for group in program.optimizer(built).param_groups)
        == len(list(built.parameters())) - 1
    )
    assert not built.config.use_cache
    assert model.config.use_cache
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    step = TrainingStep(StepLayout(2), program, model.float(), program.optimizer(model))
    assert step(program.batch(4)).stepped


def test_a_folder_names_its_model(tmp_path):
    gpt2(architectures=["GPT2LMHeadModel"]).save_pretrained(tmp_path)
    program = huggingface.program(tmp_path, seq_len=LENGTH)
    assert type(program.build()).__name__ == "GPT2LMHeadModel"
    assert program.build().dtype == torch.float32
    assert huggingface.program(str(tmp_path), seq_len=LENGTH, dtype=torch.bfloat16).build().dtype == torch.bfloat16
    with pytest.raises(ConfigError, match=r"expected a folder with config\.json"):
        huggingface.program(tmp_path / "other")


def headless():
    model = transformers.AutoModelForCausalLM.from_config(llama())
    model.lm_head = torch.nn.Linear(16, 7, bias=False)
    return model


def checkpointed():
    model = transformers.AutoModelForCausalLM.from_config(llama())
    model.model.layers[0].gradient_checkpointing = True  # as model.gradient_checkpointing_enable() does
    return model


@pytest.mark.parametrize(
    ("make", "settings", "said"),
    [
        (gpt2, {}, r"task: expected a model of a known task, got a config without architectures"),
        (gpt2, {"task": "Chat"}, r"task: expected one of \['Seq2SeqLM', 'CausalLM'"),
        (lambda: gpt2(architectures=["GPT2DoubleHeadsModel"]), {}, r"got \['GPT2DoubleHeadsModel'\]"),
        (lambda: torch.nn.Linear(1, 1), {}, r"expected a transformers config, model, or a folder .* got Linear"),
        (headless, {}, r"expected the parameters that its config describes, differing in 1: \['lm_head.weight'\]"),
        (checkpointed, {}, r"without gradient checkpointing"),
        (vit, {"task": "ImageClassification"}, r"seq_len: expected None for images"),
        (lambda: transformers.MixtralConfig(output_router_logits=True), {}, r"output_router_logits: expected False"),
    ],
)
def test_what_cannot_be_planned_so_is_refused(make, settings, said):
    with pytest.raises(ConfigError, match=said):
        huggingface.program(make(), seq_len=LENGTH, **settings)


def test_a_users_own_batches_are_taken():
    def make_batch(n, seq_len=None):
        return {"input_ids": torch.ones(n, seq_len or 4, dtype=torch.long)}

    program = program_of("gpt2", make_batch=make_batch)
    with pytest.raises(ConfigError, match=r"expected 'labels' among \['input_ids'\]"):
        program.loss(program.build(), program.batch(2))
    labelled = program_of("gpt2", make_batch=lambda n, seq_len=None: {**make_batch(n, 4), "labels": torch.ones(n, 4)})
    assert labelled.batch(2)["labels"].shape == (2, 4)


def test_a_model_is_planned_from_its_config_and_stays_as_it_was():
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(gpt2())
    before, state = copy.deepcopy(model.state_dict()), torch.random.get_rng_state()
    program = huggingface.program(model, seq_len=32)
    asked = {"device": "t4", "budget": "170MiB", "seq_lens": (32, 8), "precisions": ("fp32", "fp16")}
    plan = memfit.plan(program, global_batch_size=4096, **asked)
    assert plan.upper_peak_bytes < 170 * MIB
    assert plan.accumulation_steps > 1
    assert plan.seq_len == 32
    assert {probe.checkpointing for probe in plan.probes} == {"none", "blocks"}
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(state, torch.random.get_rng_state())
    assert "forward" not in vars(model)
    step = TrainingStep(StepLayout(2), program, model, program.optimizer(model))
    losses = [step(program.batch(2)).total for _ in range(3)]
    assert losses[-1] < losses[0]


def test_a_missing_library_is_named_with_its_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ConfigError, match=r"pip install 'memfit\[huggingface\]'"):
        huggingface.program("model")


def test_importing_memfit_imports_neither_transformers_nor_lightning():
    code = (
        "import sys, memfit, memfit.huggingface, memfit.lightning, memfit.cli; memfit.plan; "
        "sys.exit(bool({'transformers', 'lightning', 'pytorch_lightning'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
