"""Lightning's own Trainer and modules: what is planned is what fit() then runs, and planning leaves no trace."""

import copy
import random
import threading
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # what it imports warns of its own
    import lightning

import memfit.lightning
from memfit.chunked_loss import _state as chunks
from memfit.errors import ConfigError
from memfit.memory.checks import check_loss
from memfit.memory.plan import Candidate, Plan
from memfit.memory.simulate import simulate
from memfit.step import StepLayout, TrainingStep

pytestmark = [
    pytest.mark.filterwarnings(r"ignore:.*isinstance\(treespec, LeafSpec\).*"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers.*"),
    pytest.mark.filterwarnings("ignore:.*GPU available but not used.*"),
]
WIDTH = 6


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        return torch.tanh(self.linear(x))


class Net(lightning.LightningModule):
    def __init__(self, batch_size=2, result=None):
        super().__init__()
        self.save_hyperparameters("batch_size")
        self.body = nn.Sequential(Block(), Block(), nn.Linear(WIDTH, 1))
        self.body[0].requires_grad_(False)
        self.register_buffer("scale", torch.tensor(2.0))
        self.result, self.sizes = result, []

    def training_step(self, batch, batch_idx):
        x, y = batch
        self.sizes.append(len(x))
        loss = (self.scale * self.body(x) - y).pow(2).mean()
        self.log("loss", loss, prog_bar=True, on_epoch=True)
        self.log_dict({"twice": 2 * loss})
        return loss if self.result is None else self.result(loss)

    def configure_optimizers(self):
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.1, momentum=0.9)


class Data(lightning.LightningDataModule):
    def __init__(self, batch_size=2, size=60):
        super().__init__()
        self.batch_size, self.size = batch_size, size

    def setup(self, stage):
        self.rows = TensorDataset(torch.randn(self.size, WIDTH), torch.randn(self.size, 1))

    def train_dataloader(self):
        return DataLoader(self.rows, batch_size=self.batch_size)


def trainer(**settings):
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    return lightning.Trainer(**{"max_epochs": 1, "accelerator": "cpu", **quiet, **settings})


def planned(micro, steps, **changes) -> Plan:
    plan = Plan(
        "program", "cpu", 2**30, micro * steps, micro, steps, "fp32", "none", "default", 2**20, micro, 0.1, 10.0, True,
        (), (), "0", "because",
    )  # fmt: skip
    return replace(plan, **changes)


@pytest.fixture
def here(monkeypatch):
    """Take the program that would be planned, in place of a plan; return what was asked."""
    asked = {}

    def plan_program(program, **settings):
        asked.update(settings, program=program)
        asked["step"] = run_in_place(program, settings["global_batch_size"])
        return asked.get("plan") or planned(settings["global_batch_size"], 1)

    monkeypatch.setattr(memfit.lightning, "plan_program", plan_program)
    return asked


def run_in_place(program, size):
    """Check and run the program as a child would; its files are gone afterwards."""
    check_loss(program, Candidate(1, size))
    model = program.build().train()
    step = TrainingStep(StepLayout(2), program, model, program.optimizer(model))
    return model, step(program.batch(size))


def states():
    return random.random(), np.random.rand(), torch.rand(1).item()  # noqa: NPY002


def seed():
    random.seed(1)
    np.random.seed(2)  # noqa: NPY002
    torch.manual_seed(3)


def test_a_module_is_planned_by_running_it_fitted_so_and_nothing_else_changes():
    net, data = Net(), Data()
    net.body.eval()
    net.body[1].train()
    weights = copy.deepcopy(net.state_dict())
    modes, attributes = [module.training for module in net.modules()], set(vars(net))
    run = trainer(gradient_clip_val=0.5)
    seed()
    expected = states()
    seed()
    plan = memfit.lightning.plan(net, data, global_batch_size=2, budget="3GiB", trainer=run)
    assert states() == expected
    assert plan.verified
    assert (plan.device, plan.precision, plan.global_batch_size) == ("cpu", "fp32", 2)
    assert all(torch.equal(value, weights[name]) for name, value in net.state_dict().items())
    assert [module.training for module in net.modules()] == modes
    assert set(vars(net)) == attributes
    assert all(p.grad is None for p in net.parameters())
    assert not hasattr(data, "rows")
    assert net._trainer is None

    net.train()
    memfit.lightning.apply(plan, run, data, net)
    assert run.accumulate_grad_batches * data.batch_size == 2
    assert data.batch_size == net.hparams.batch_size == plan.micro_batch_size
    run.fit(net, data)
    assert set(net.sizes) == {plan.micro_batch_size}
    assert run.global_step == 30


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_what_fit_then_does_is_one_step_on_the_global_batch(steps):
    torch.manual_seed(0)
    net, data = Net(), Data(size=12)
    data.setup("fit")
    x, y = data.rows.tensors
    reference = copy.deepcopy(net).train()
    optimizer = reference.configure_optimizers()
    loss = (2 * reference.body(x) - y).pow(2).mean()
    loss.backward()
    optimizer.step()
    data.setup = lambda stage: None
    run = trainer()
    memfit.lightning.apply(planned(12 // steps, steps), run, data)
    run.fit(net, data)
    assert run.global_step == 1
    for found, wanted in zip(net.parameters(), reference.parameters(), strict=True):
        assert (found - wanted).detach().norm() <= 1e-6 * wanted.detach().norm()


def test_what_is_run_is_the_training_step_on_the_samples_with_most_elements(here):
    class Words(Dataset):
        def __len__(self):
            return 300

        def __getitem__(self, i):
            return torch.ones(1 + i // 30 if i < 299 else 3, WIDTH)

    def pad(samples):
        longest = max(len(sample) for sample in samples)
        x = torch.stack([nn.functional.pad(sample, (0, 0, 0, longest - len(sample))) for sample in samples])
        return x.sum(1), x.sum((1, 2)).unsqueeze(1)

    memfit.lightning.plan(Net(), DataLoader(Words(), batch_size=3, collate_fn=pad), global_batch_size=100)
    x, y = here["program"].batch(70)
    assert x.shape == (70, WIDTH)
    assert y.max() == y[0] == 10 * WIDTH
    assert (y.flatten()[:64].diff() <= 0).all()
    assert torch.equal(y[64:], y[:6])
    model, stats = here["step"]
    assert model.sizes == [50, 50]
    assert stats.losses["loss"] > 0


def test_streams_own_loaders_and_own_batches_are_taken(here):
    class Stream(IterableDataset):
        def __iter__(self):
            return iter([(torch.ones(WIDTH) * i, torch.ones(1)) for i in range(5)])

    class WithLoader(Net):
        def train_dataloader(self):
            return DataLoader(Stream(), batch_size=self.hparams.batch_size)

    memfit.lightning.plan(WithLoader(), global_batch_size=4)
    assert here["program"].batch(6)[0][:, 0].tolist() == [0, 1, 2, 3, 4, 0]
    memfit.lightning.plan(
        Net(), global_batch_size=4, make_batch=lambda n, seq_len=None: (torch.zeros(n, WIDTH), torch.zeros(n, 1))
    )
    assert here["program"].batch(3)[0].shape == (3, WIDTH)


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ({"a": 1}, r"expected a training DataLoader that collates samples, got dict\. Give make_batch"),
        (DataLoader(TensorDataset(torch.ones(3, 2)), batch_size=None), "collates samples"),
        (DataLoader(list[int](), batch_size=2), "expected samples to train on, got none"),
    ],
)
def test_data_that_no_samples_can_be_drawn_from_is_refused(here, data, said):
    with pytest.raises(ConfigError, match=said):
        memfit.lightning.plan(Net(), data, global_batch_size=4)


def test_settings_come_from_the_trainer_where_none_are_given(here):
    memfit.lightning.plan(Net(), Data(), global_batch_size=4, trainer=trainer(precision="bf16-mixed"))
    assert (here["device"], here["precisions"], here["clip"]) == ("cpu", ("bf16",), None)
    clipping = trainer(gradient_clip_val=2.0, gradient_clip_algorithm="norm")
    memfit.lightning.plan(Net(), Data(), global_batch_size=4, trainer=clipping, device="t4", budget="1GiB")
    assert (here["device"], here["precisions"], here["clip"], here["budget"]) == ("t4", ("fp32",), 2.0, "1GiB")
    by_value = trainer(gradient_clip_val=2.0, gradient_clip_algorithm="value")
    memfit.lightning.plan(Net(), Data(), global_batch_size=4, trainer=by_value)
    assert here["clip"] is None
    for wrong, said in (
        (trainer(precision="64-true"), r"expected a precision of .*, got '64-true'"),
        (trainer(devices=2, strategy="ddp_spawn"), "expected one device, got 2"),
    ):
        with pytest.raises(ConfigError, match=said):
            memfit.lightning.plan(Net(), Data(), global_batch_size=4, trainer=wrong)


@pytest.mark.parametrize(
    ("total", "micro", "steps", "cut"), [(50, 13, 4, (10, 5)), (48, 12, 4, (12, 4)), (7, 4, 2, (1, 7))]
)
def test_micro_batches_are_all_of_one_size(here, total, micro, steps, cut):
    levers = ({"name": "accumulation_steps", "class": "exact", "value": steps},)
    here["plan"] = planned(micro, steps, global_batch_size=total, levers=levers)
    plan = memfit.lightning.plan(Net(), Data(), global_batch_size=total)
    assert (plan.micro_batch_size, plan.accumulation_steps) == cut
    assert plan.levers[0]["value"] == cut[1]
    assert plan.measured_peak_bytes == 2**20
    if cut != (micro, steps):
        assert plan.samples_per_second is None
        assert f"Micro-batches of {cut[0]} instead of {micro}" in plan.reason
        with pytest.raises(ConfigError, match=f"expected one with a divisor from {cut[0] + 1} to {micro}"):
            memfit.lightning.plan(Net(), Data(), global_batch_size=total, min_micro_batch_size=cut[0] + 1)


def test_a_loss_that_is_no_mean_over_samples_is_refused_unless_told(here):
    net, odd = Net(result=lambda loss: {"loss": loss}), Net(result=lambda loss: loss**2)
    memfit.lightning.plan(net, Data(), global_batch_size=4)
    known = here["step"][1].losses["loss"]
    memfit.lightning.plan(net, Data(), global_batch_size=4, exact=False)
    assert here["program"].count(here["program"].batch(3)) == {"loss": 3.0}
    assert here["step"][0].sizes[-2:] == [2, 2]
    assert known > 0
    with pytest.raises(ConfigError, match="expected a mean over the samples"):
        memfit.lightning.plan(odd, Data(), global_batch_size=4)
    memfit.lightning.plan(odd, Data(), global_batch_size=4, exact=False)
    assert here["step"][1].stepped


def test_gradients_of_the_last_step_are_held_through_the_forward_pass(here, tmp_path):
    """As Lightning frees them only then; without accumulation this is the peak."""
    net = Net()
    memfit.lightning.plan(net, Data(), global_batch_size=4)
    program = here["program"]
    build = memfit.lightning._Copies.of(net, tmp_path / "weights.pt")
    trained = sum(p.nbytes for p in net.parameters() if p.requires_grad)
    device = memfit.memory.devices.find_device("t4")
    program = replace(program, build_model=build, variants={})
    trace = simulate(program, device, micro_batch_size=4)
    zeros = [s.num_bytes for s in trace.storages if s.op == "aten::zeros_like" and s.phase == "forward"]
    assert sum(zeros) == 2 * trained
    assert simulate(program, device, micro_batch_size=4, phase="evaluate").storages


class Manual(Net):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = False


class Several(Net):
    def configure_optimizers(self):
        return [torch.optim.SGD(self.body.parameters()), torch.optim.SGD(self.body.parameters())]


class Asking(Net):
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1.0 / self.trainer.estimated_stepping_batches)


class Locked(Net):
    def __init__(self):
        super().__init__()
        self.lock = threading.Lock()


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: nn.Linear(1, 1), r"expected a LightningModule, got Linear\. Install 'memfit\[lightning\]'"),
        (Manual, "expected automatic optimization, got manual"),
        (Several, "expected one optimizer, got 2"),
        (Asking, "expected one that needs no trainer"),
        (lambda: Net(result=lambda loss: {"value": loss}), r"training_step: expected a loss, .* got NoneType"),
        (Locked, "expected one that can be copied"),
    ],
)
def test_what_cannot_be_planned_so_is_refused(here, make, said):
    with pytest.raises(ConfigError, match=said):
        memfit.lightning.plan(make(), Data(), global_batch_size=4)


def test_an_optimizer_may_be_given_and_schedules_are_left_out(here):
    class Scheduled(Net):
        def configure_optimizers(self):
            optimizer = torch.optim.Adam(self.parameters())
            return [optimizer], [{"scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 1), "interval": "step"}]

    memfit.lightning.plan(Scheduled(), Data(), global_batch_size=4)
    model = here["step"][0]
    memfit.lightning.plan(
        Asking(), Data(), global_batch_size=4, optimizer=lambda net: torch.optim.SGD(net.parameters(), lr=0.5)
    )
    assert here["program"].optimizer(model).param_groups[0]["lr"] == 0.5


def test_layers_may_come_in_configure_model(here):
    class Late(Net):
        def configure_model(self):
            if isinstance(self.body[2], nn.Linear):
                self.body[2] = nn.Sequential(nn.Linear(WIDTH, 3), nn.Linear(3, 1))

    net = Late()
    memfit.lightning.plan(net, Data(), global_batch_size=4)
    assert isinstance(here["step"][0].body[2], nn.Sequential)
    assert isinstance(net.body[2], nn.Linear)


def test_everything_a_plan_chose_is_switched_on_while_it_trains():
    seen = []

    class Watching(Net):
        def training_step(self, batch, batch_idx):
            group = self.optimizers().param_groups[0]
            seen.append((chunks.enabled, group["foreach"], sum("forward" in vars(m) for m in self.modules())))
            return super().training_step(batch, batch_idx)

    run, net = trainer(), Watching()
    plan = planned(4, 3, checkpointing="blocks", chunked_loss=True, foreach=False)
    with pytest.raises(ConfigError, match="blocks: expected those that the plan was made with"):
        memfit.lightning.apply(plan, run, Data())
    memfit.lightning.apply(planned(12, 1), run)
    memfit.lightning.apply(plan, run, blocks=(Block,))  # in place of the plan before
    assert sum(hasattr(callback, "memfit_plan") for callback in run.callbacks) == 1
    run.fit(net, Data(batch_size=4))
    assert set(seen) == {(True, False, 2)}
    assert not chunks.enabled


def test_a_trainer_or_a_holder_that_does_not_suit_is_refused():
    with pytest.raises(ConfigError, match=r"expected precision 'bf16-mixed', as planned, got '32-true'"):
        memfit.lightning.apply(planned(4, 1, precision="bf16"), trainer())
    with pytest.raises(ConfigError, match=r"expected micro-batches of one size, got 4 x 2 for 7 samples"):
        memfit.lightning.apply(planned(4, 2, global_batch_size=7), trainer())
    with pytest.raises(ConfigError, match=r"Linear: expected an attribute or hyperparameter batch_size"):
        memfit.lightning.apply(planned(4, 2), trainer(), nn.Linear(1, 1))
