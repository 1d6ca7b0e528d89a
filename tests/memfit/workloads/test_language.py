"""The language workload: exact steps over padded samples, scores, baselines, texts, and the exported graph."""

import itertools
import json
import math
import random

import numpy as np
import onnxruntime
import pytest
import torch

from memfit.chunked_loss import chunking
from memfit.data.token_samples import IGNORED
from memfit.errors import ConfigError
from memfit.export.infer import Model as Exported
from memfit.memory.devices import find_device
from memfit.memory.simulate import simulate
from memfit.metrics.language import METRICS
from memfit.recovery import RecoveringStep
from memfit.step import StepLayout, TrainingStep
from memfit.training.evaluate import evaluate_split
from memfit.training.program import stage_program
from memfit.workloads.generate import Sampling, TextModel
from memfit.workloads.language import LanguageWorkload, next_logits
from memfit.workloads.language_settings import CorpusData, LanguageKind, Model
from tests.memfit.workloads.exporting import export_all

SMALL = {"seq_len": 16, "d_model": 16, "num_layers": 2, "num_heads": 2}
BACKBONE = {"name": "decoder", **SMALL}
MODELS = {
    "recurrent": {},
    "decoder": {"name": "decoder"},
    "experts": {"name": "experts", "num_experts": 3, "expert_rank": 4, "backbone": Model(**BACKBONE).own},
    "low_rank": {"name": "decoder", "lora_rank": 2},
}
STAGE = {"train": ["*"], "optimizer": {"name": "sgd", "lr": 0.1, "momentum": 0.9}}
WORDS = [
    "the",
    "a",
    "of",
    "train",
    "step",
    "memory",
    "budget",
    "plan",
    "fits",
    "model",
    "card",
    "token",
    "learns",
    "café",
    "∑",
    "and",
    "then",
    "loses",
    "nothing",
]


def settings_of(**changes):
    model = Model(**{**SMALL, **changes})
    return model.all_variants()[model.name]


def data_of(path, **changes):
    return CorpusData(
        source={"paths": [str(path)], "separator": "\n\n"},
        tokenizer={"vocab_size": 300},
        validation_share=0.15,
        test_share=0.15,
        **changes,
    )


def prepare(data, model, store):
    return LanguageKind().prepare(data, model, store, code_version="test", fresh=False, on_progress=lambda *_: None)


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    drawn = random.Random(0)
    documents = [" ".join(drawn.choices(WORDS, k=drawn.randint(3, 60))) for _ in range(90)]
    path = tmp_path_factory.mktemp("texts") / "all.txt"
    path.write_text("\n\n".join(documents), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def folder(texts, tmp_path_factory):
    return prepare(data_of(texts), Model(), tmp_path_factory.mktemp("store"))


def model_of(**changes):
    return {"variant": "model", "variants": {"model": settings_of(**changes)}}


def workload_of(folder, loss=None, **changes):
    return LanguageWorkload(folder, model_of(**changes), loss or {})


def built(workload, seed=0):
    torch.manual_seed(seed)
    return next(iter(workload.variants().values()))()


@pytest.mark.parametrize("packing", ["stream", "document"])
@pytest.mark.parametrize("name", MODELS)
def test_gradients_do_not_depend_on_the_cut(folder, name, packing):
    workload = workload_of(folder, packing=packing, **MODELS[name])
    program = stage_program(workload, STAGE)
    batch = workload.batch("train", np.arange(12))
    assert packing == "stream" or (batch["targets"] == IGNORED).any()
    found = []
    for steps in (1, 5, 12):
        model = built(workload).train()
        stats = TrainingStep(StepLayout(steps), program, model, program.optimizer(model))(batch)
        found.append((stats, [parameter.detach() for parameter in model.parameters()]))
    for stats, parameters in found[1:]:
        assert stats.losses == pytest.approx(found[0][0].losses, rel=1e-5)
        for parameter, whole in zip(parameters, found[0][1], strict=True):
            torch.testing.assert_close(parameter, whole, atol=1e-6, rtol=1e-4)


def test_chunks_and_checkpoints_change_no_gradient(folder, monkeypatch):
    monkeypatch.setattr("memfit.chunked_loss.MIN_CHUNK_ROWS", 8)
    monkeypatch.setattr("memfit.chunked_loss.CHUNK_ELEMENTS", 8)
    workload = workload_of(folder)
    program = stage_program(workload, STAGE)
    batch = workload.batch("train", np.arange(6))
    plain, frugal = (built(workload).train() for _ in range(2))
    TrainingStep(StepLayout(1), program, plain, program.optimizer(plain))(batch)
    layout = StepLayout(1, checkpointing="blocks", chunked_loss=True)
    TrainingStep(layout, program, frugal, program.optimizer(frugal))(batch)
    for one, other in zip(plain.parameters(), frugal.parameters(), strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("name", ["recurrent", "experts"])
def test_scores_are_those_of_the_loss_whatever_the_batch_size(folder, name):
    workload = workload_of(folder, packing="document", **MODELS[name])
    model, truth = built(workload), workload.truth("test", np.arange(workload.num_samples("test")))
    for size in (1, 7):
        losses, predictions = evaluate_split(workload, model, "test", batch_size=size, layout=StepLayout())
        scores = workload.score(truth, predictions)
        assert set(scores) == set(METRICS)
        assert scores["nll"] == pytest.approx(losses["token"], rel=1e-5)
        assert scores["bits_per_byte"] == pytest.approx(
            losses["token"] * truth["num_tokens"].sum() / math.log(2) / workload.corpus.manifest["num_bytes"]["test"],
            rel=1e-5,
        )
    with chunking(True):
        assert workload.predict(model, workload.batch("test", np.arange(2)))["nll_sum"].shape == (2,)


def test_baselines_score_every_token_and_the_bigram_wins(folder):
    workload = workload_of(folder)
    truth = workload.truth("test", np.arange(workload.num_samples("test")))
    scores = {name: workload.score(truth, found) for name, found in workload.baselines("test").items()}
    assert scores["bigram"]["nll"] < scores["unigram"]["nll"] < math.log(workload.corpus.vocab_size)
    assert scores["bigram"]["token_accuracy"] is None


def test_no_document_is_in_two_splits(folder):
    corpus = workload_of(folder).corpus
    found = {}
    for split in ("train", "validation", "test"):
        tokens, ends = corpus.tokens(split), corpus.documents(split)
        found[split] = {bytes(tokens[a + 1 : b]) for a, b in itertools.pairwise(ends)}
    assert not (found["train"] & found["test"])
    assert not (found["train"] & found["validation"])
    assert not found["validation"] & found["test"]


@pytest.mark.parametrize("name", MODELS)
def test_a_finished_model_continues_test_documents(folder, name):
    workload = workload_of(folder, **MODELS[name])
    shown = workload.illustrate(built(workload).eval())
    json.dumps(shown)
    assert [text["how"] for text in shown["texts"][:2]] == ["greedy", "temperature 0.8, top-p 0.95"]
    assert len(shown["texts"]) == 6
    assert shown == workload.illustrate(built(workload).eval())
    if name == "experts":
        assert sum(shown["expert_loads"]) == pytest.approx(1, abs=1e-5)


def test_streaming_predicts_what_reading_everything_again_does(folder):
    workload = workload_of(folder)
    model = built(workload).eval()
    tokens = workload.batch("test", np.arange(1))["tokens"][0].tolist()
    stream, whole = next_logits(model, 16), model(torch.tensor([tokens]))[0]
    with torch.no_grad():
        for place, token in enumerate(tokens):
            np.testing.assert_allclose(stream([token]), whole[place].detach(), atol=1e-5)


@pytest.mark.end_to_end
def test_the_exported_graphs_stream_and_score(folder, tmp_path):
    models = {name: model_of(**MODELS[name]) for name in MODELS}
    cards = export_all("language", folder, tmp_path, models)
    for name, card in cards.items():
        assert (
            max(figures["max_absolute"] for batch in card["parity"]["batches"] for figures in batch["outputs"].values())
            < 1e-4
        )
        exported = Exported(tmp_path / name)
        workload = LanguageWorkload(folder, models[name], {})
        model = built(workload, 1)
        model.load_state_dict(torch.load(tmp_path / f"{name}.pt", weights_only=True))
        tokens = workload.batch("test", np.arange(1))["tokens"][:, :9]
        with torch.no_grad():
            likelihood = model.eval()(tokens).float().log_softmax(-1)[:, :-1].gather(2, tokens[:, 1:, None])
        state = {"state": np.zeros((1, 2, 32), np.float32)} if name == "recurrent" else {}
        out = exported.predict(tokens=tokens.numpy(), **state)
        np.testing.assert_allclose(out["log_likelihood"][0, 1:], likelihood[0, :, 0], atol=1e-4)
        texts = [list(TextModel(exported, tmp_path / name).generate("the plan", Sampling(), 8)) for _ in range(2)]
        assert texts[0] == texts[1] != []
    session = onnxruntime.InferenceSession(tmp_path / "recurrent" / "model.onnx")
    state, one_by_one = np.zeros((1, 2, 32), np.float32), None
    whole = session.run(None, {"tokens": tokens.numpy(), "state": state})
    for place in range(tokens.shape[1]):
        one_by_one = session.run(None, {"tokens": tokens.numpy()[:, place : place + 1], "state": state})
        state = one_by_one[2]
    np.testing.assert_allclose(one_by_one[0], whole[0], atol=1e-5)
    np.testing.assert_allclose(one_by_one[2], whole[2], atol=1e-5)


@pytest.mark.parametrize("name", ["recurrent", "experts"])
def test_its_memory_can_be_predicted_for_a_card_that_is_not_here(folder, name):
    program = stage_program(workload_of(folder, **MODELS[name]), STAGE)
    trace = simulate(program, find_device("t4"), micro_batch_size=4, precision="fp16", checkpointing="none")
    assert trace is not None


def test_a_step_is_repeated_exactly_after_running_out_of_memory(folder):
    workload = workload_of(folder, dropout=0.2)
    program = stage_program(workload, STAGE)
    batch = workload.batch("train", np.arange(8))
    found = []
    for fails in (False, True):
        model = built(workload).train()
        step = RecoveringStep(StepLayout(2 if not fails else 1), program, model, program.optimizer(model))
        if fails:
            inner, count = program.loss, iter([True])

            def loss(model, batch, inner=inner, count=count):
                if next(count, False):
                    raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
                return inner(model, batch)

            object.__setattr__(program, "loss", loss)
        torch.manual_seed(3)
        step(batch)
        found.append([parameter.detach() for parameter in model.parameters()])
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "experts"}, "backbone: expected a Hugging Face folder, or a stage before it"),
        ({"backbone": "somewhere"}, "backbone: expected none"),
        ({"name": "decoder", "d_model": 18, "num_heads": 4}, "d_model: expected a multiple"),
        ({"experts_per_token": 2, "num_experts": 1}, "experts_per_token: expected 1 to 1"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(changes, message):
    with pytest.raises((ValueError, ConfigError), match=message):
        Model(**changes)


def test_a_stage_may_grow_the_model_but_not_shrink_it():
    kind, small = LanguageKind(), Model(**SMALL)
    grown = kind.follow(small, {"d_model": 32, "num_layers": 3})
    assert (grown.d_model, grown.num_layers, grown.seq_len) == (32, 3, 16)
    experts = kind.follow(Model(**BACKBONE), {"name": "experts", "num_experts": 2})
    assert experts.backbone == Model(**BACKBONE).own
    with pytest.raises(ConfigError, match="d_model: expected 16 or more"):
        kind.follow(small, {"d_model": 8})
    with pytest.raises(ValueError, match="backbone"):
        kind.follow(small, {"backbone": "elsewhere"})


def test_weights_of_a_small_model_start_a_larger_one(folder):
    small, large = (workload_of(folder, d_model=width) for width in (16, 32))
    before = built(small)
    after = built(large, 1)
    after.load_state_dict(large.carry(before.state_dict(), settings_of(d_model=16), after, "weight"))
    tokens = small.batch("test", np.arange(3))["tokens"]
    torch.testing.assert_close(after(tokens), before(tokens), atol=1e-5, rtol=0)
