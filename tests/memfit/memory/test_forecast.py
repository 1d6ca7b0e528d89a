"""What layouts will take: few simulations, and straight lines through them."""

import pytest
import torch
from torch import nn

from memfit.memory import forecast as room
from memfit.memory.devices import Device, find_device
from memfit.memory.forecast import Forecast
from memfit.memory.plan import Candidate, Probe, evaluation_batch_size
from memfit.memory.search import candidates, grid
from memfit.step import TrainingProgram

MIB = 2**20
BARE = Device.from_mapping({"name": "bare", "memory": "24GiB", "compute_capability": "8.6"})


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(64, 256), nn.Linear(256, 64)

    def forward(self, x):
        return x + self.down(torch.relu(self.up(x)))


def forward(model, batch):
    return model(batch["x"])


def program(evaluate=None, num_blocks=3) -> TrainingProgram:
    """A plain net: 64 MiB a sample and linear layer, so that no rounding matters."""
    return TrainingProgram(
        build_model=lambda: nn.Sequential(*[Block() for _ in range(num_blocks)]),
        make_batch=lambda n, seq_len=None: {"x": torch.ones(n, seq_len or 65536, 64)},
        loss=lambda model, batch: forward(model, batch).mean(),
        optimizer=lambda model: torch.optim.AdamW(model.parameters()),
        blocks=(Block,),
        evaluate=evaluate,
    )


def hungry(model, batch):
    """Takes far more than training does: 1 GiB a sample, at once."""
    return model(batch["x"][:, :1024]).new_ones(len(batch["x"]), 256, 1024, 1024)


def ladder_of(size: int, precision: str = "fp32", checkpointing: str = "none") -> list[Candidate]:
    return candidates(size, precision=precision, checkpointing=checkpointing, variant=None)


def oracle(of: TrainingProgram, device: str | Device = "t4") -> Forecast:
    return Forecast(of, find_device(device) if isinstance(device, str) else device, evaluation_factor=4, clip=1.0)


@pytest.fixture
def simulated(monkeypatch):
    """Note what is simulated: (phase, micro-batch)."""
    runs, real = [], room.simulate

    def note(*given, **how):
        runs.append((how.get("phase", "train"), how["micro_batch_size"]))
        return real(*given, **how)

    monkeypatch.setattr(room, "simulate", note)
    return runs


@pytest.mark.parametrize("evaluate", [None, forward, hungry])
@pytest.mark.parametrize("size", [2, 5, 64])
def test_every_rung_lies_on_the_line(size, evaluate):
    predictor, ladder = oracle(program(evaluate)), ladder_of(size)
    for layouts in (ladder, grid(ladder)):
        for candidate, rough in zip(layouts, predictor.line(ladder, layouts), strict=True):
            exact = predictor.of(candidate)
            assert rough.peak_bytes == pytest.approx(exact.peak_bytes, rel=0.03)
            assert rough.upper_bytes == pytest.approx(exact.upper_bytes, rel=0.03)
            assert rough.upper_bytes >= rough.peak_bytes
            assert rough.micro_seconds == pytest.approx(exact.micro_seconds, rel=0.05)
            assert rough.update_seconds == pytest.approx(exact.update_seconds, rel=0.05)


def test_checkpointing_has_a_lower_line():
    predictor = oracle(program())
    for plain, recomputed in zip(
        predictor.line(ladder_of(64)), predictor.line(ladder_of(64, checkpointing="blocks")), strict=True
    ):
        assert recomputed.peak_bytes < plain.peak_bytes
        assert recomputed.micro_seconds > 1.1 * plain.micro_seconds


def test_a_ladder_takes_two_simulations_and_its_grid_none_more(simulated):
    predictor, ladder = oracle(program()), ladder_of(64)
    predictor.line(ladder)
    predictor.line(ladder, grid(ladder))
    assert [phase for phase, _ in simulated] == ["train", "train"]


def test_a_layout_is_simulated_once(simulated):
    predictor = oracle(program(forward))
    first = predictor.of(Candidate(2, 16))
    assert predictor.of(Candidate(2, 32)) == first  # only more of the same steps
    assert simulated == [("train", 2), ("evaluate", 8)]
    predictor.of(Candidate(2, 1))
    assert simulated[2:] == [("train", 2), ("evaluate", 2)]


@pytest.mark.parametrize(("micro", "steps"), [(1, 64), (2, 32), (4, 16), (8, 8), (16, 4), (32, 2), (64, 1)])
def test_evaluation_is_simulated_at_the_size_that_it_will_have(simulated, micro, steps):
    oracle(program(forward, 1)).of(Candidate(micro, steps))
    assert simulated[1] == ("evaluate", evaluation_batch_size(Candidate(micro, steps), 64))


def test_evaluation_binds_where_it_is_hungry():
    training, evaluating = oracle(program()), oracle(program(hungry))
    for candidate in ladder_of(64):
        alone, both = training.of(candidate), evaluating.of(candidate)
        assert both.phase == "evaluate"
        size = evaluation_batch_size(candidate, 64)
        assert both.peak_bytes >= max(alone.peak_bytes, 1024 * MIB * size)
        assert both.upper_bytes > both.peak_bytes
        assert both.micro_seconds == alone.micro_seconds
    assert {each.phase for each in evaluating.line(ladder_of(64))} == {"evaluate"}


def test_evaluation_does_not_bind_where_it_takes_nothing(simulated):
    predictor = oracle(program(lambda model, batch: None))
    assert {each.phase for each in predictor.line(ladder_of(64))} == {"train_step"}
    assert [run for run in simulated if run[0] == "evaluate"] == [("evaluate", 64), ("evaluate", 16)]
    assert predictor.of(ladder_of(64)[3]) == oracle(program()).of(ladder_of(64)[3])


def test_seconds_and_bytes_grow_with_the_batch_and_samples_get_no_dearer():
    line = oracle(program()).line(ladder_of(64))
    sizes = [candidate.micro_batch_size for candidate in ladder_of(64)]
    seconds = [each.micro_seconds for each in line]
    peaks = [each.peak_bytes for each in line]
    assert seconds == sorted(set(seconds))
    assert peaks == sorted(set(peaks))
    dearness = [second / size for second, size in zip(seconds, sizes, strict=True)]
    assert dearness == sorted(dearness, reverse=True)
    assert all(each.update_seconds > 0 for each in line)


def test_a_t4_is_faster_and_smaller_in_half_precision():
    fp32, fp16 = (oracle(program()).of(Candidate(8, 8, precision)) for precision in ("fp32", "fp16"))
    assert fp16.micro_seconds < 0.8 * fp32.micro_seconds
    assert fp16.peak_bytes < fp32.peak_bytes


def test_a_faster_card_takes_less_time_and_about_as_many_bytes():
    t4, h100 = (oracle(program(), name).of(Candidate(8, 8)) for name in ("t4", "h100"))
    assert h100.micro_seconds < 0.3 * t4.micro_seconds
    contexts = find_device("h100").context_bytes - find_device("t4").context_bytes
    assert h100.peak_bytes - contexts == pytest.approx(t4.peak_bytes, rel=0.05)


@pytest.mark.parametrize("device", ["cpu", BARE])
def test_where_rates_are_not_known_no_time_is_told(device):
    line = oracle(program(), device).line(ladder_of(16))
    assert {(each.micro_seconds, each.update_seconds) for each in line} == {(0.0, 0.0)}
    assert all(each.peak_bytes > 100 * MIB for each in line)


def test_a_layout_that_was_simulated_has_a_timeline_and_no_other():
    predictor = oracle(program())
    assert predictor.timeline(Candidate(2, 4)) == {}
    predictor.of(Candidate(2, 4))
    shown = predictor.timeline(Candidate(2, 8))
    assert {"phase", "parameters", "gradients", "activations", "optimizer_state"} <= set(shown)
    assert len({len(moments) for moments in shown.values()}) == 1
    assert {"forward", "backward", "optimizer"} <= set(shown["phase"])
    held = [sum(moment) for moment in zip(*(shown[name] for name in shown if name != "phase"), strict=True)]
    assert max(held) * MIB < predictor.of(Candidate(2, 4)).peak_bytes


def test_an_earlier_forecast_spares_simulations(simulated):
    ladder = ladder_of(64)
    known = [
        Probe(
            candidate.micro_batch_size, candidate.accumulation_steps, "fp32", "none", None, "predicted",
            micro_seconds=0.1, update_seconds=0.01, predicted_bytes=(100 + n) * MIB, upper_bytes=(200 + n) * MIB,
        )
        for candidate in ladder
        for n in [candidate.micro_batch_size]
    ]  # fmt: skip
    predictor = oracle(program())
    predictor.take_over(known)
    line = predictor.line(ladder_of(32))
    assert simulated == []
    assert [each.peak_bytes // MIB for each in line] == [101, 102, 104, 108, 116, 132]
    assert [each.upper_bytes // MIB for each in line] == [201, 202, 204, 208, 216, 232]


def test_on_a_cpu_the_whole_global_batch_is_held_and_on_a_card_a_micro_batch():
    program = TrainingProgram(
        build_model=lambda: nn.Linear(2**18, 1),
        make_batch=lambda n, _seq_len: torch.ones(n, 2**18),  # 1 MiB a sample
        loss=lambda model, batch: model(batch).mean(),
        optimizer=lambda model: torch.optim.SGD(model.parameters(), lr=0.1),
    )
    for device, rise in (("cpu", 62), ("t4", 0)):
        oracle = Forecast(program, find_device(device), evaluation_factor=4)
        few, many = (oracle.of(Candidate(1, steps)) for steps in (2, 64))
        assert (many.peak_bytes - few.peak_bytes) // 2**20 == rise
        assert (many.upper_bytes - few.upper_bytes) // 2**20 == rise
