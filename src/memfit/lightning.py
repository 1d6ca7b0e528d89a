"""Lightning modules: plan their training step at a fixed global batch, then set batch size and accumulation."""

import copy
import inspect
import random
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from importlib import import_module
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

from memfit.chunked_loss import chunking
from memfit.errors import ConfigError
from memfit.memory.in_memory import plan as plan_program
from memfit.memory.plan import Plan
from memfit.memory.request import OnProbe
from memfit.memory.simulate import build_on_meta
from memfit.step import Batch, TrainingProgram, checkpoint_blocks, num_samples, tensors_of

PRECISIONS = {"32-true": "fp32", "bf16-mixed": "bf16", "16-mixed": "fp16"}
"""The Trainer's precisions, as memfit names them."""
_PACKAGES = ("lightning", "pytorch_lightning")
_SAMPLES_DRAWN = 64


def plan(
    module: Any,
    data: Any = None,
    *,
    global_batch_size: int,
    budget: str = "auto",
    trainer: Any = None,
    device: str | None = None,
    precisions: Sequence[str] | None = None,
    clip: float | None = None,
    make_batch: Callable[..., Batch] | None = None,
    optimizer: Callable[[nn.Module], torch.optim.Optimizer] | None = None,
    blocks: tuple[type[nn.Module], ...] = (),
    min_micro_batch_size: int = 1,
    exact: bool = True,
    deadline_seconds: float = 300.0,
    estimate_only: bool = False,
    user_devices: Sequence[Mapping[str, Any]] = (),
    on_probe: OnProbe = lambda _probe: None,
) -> Plan:
    """Find the fastest batch size x accumulate_grad_batches of a module within a budget, and prove it by running it.

    data: a LightningDataModule or the training DataLoader; default: the module's own train_dataloader. 64 samples of
    it are drawn; every batch is collated from those with most elements. make_batch: (n, seq_len=None) -> the largest
    n samples there can be, in place of data.
    trainer: device, precision and clipping are taken from it where they are not given (else cpu, fp32, none).
    optimizer: in place of configure_optimizers. blocks: module types whose activations may be recomputed.
    min_micro_batch_size: for layers with batch statistics. exact: whether training_step returns a mean over samples,
    which is checked; otherwise gradients depend on the cut, as accumulation weighs all micro-batches alike.
    budget and the rest: as in `memfit.plan`.

    What is run is training_step in automatic optimization, without a trainer: what it logs is dropped; hooks and
    callbacks are not called. The micro-batch size of the plan divides the global batch, as Lightning divides the loss
    of every micro-batch by their number. Neither the module nor random states change; of a datamodule, prepare_data
    is called, and setup on a shallow copy.
    Raises: ConfigError for what cannot be planned so, and the errors of `memfit.plan`.
    """
    _check_module(module)
    taken = _settings_of(trainer) if trainer is not None else {}
    given = {"device": device, "precisions": precisions, "clip": clip}
    taken |= {name: value for name, value in given.items() if value is not None}
    with tempfile.TemporaryDirectory(prefix="memfit-lightning-") as folder, _random_states_kept():
        build = _Copies.of(module, Path(folder) / "weights.pt")
        program = TrainingProgram(
            build_model=build,
            make_batch=make_batch or _Samples.of(module, data),
            loss=partial(_loss, exact),
            count=None if exact else _count,
            optimizer=partial(_optimizer, optimizer),
            blocks=blocks,
            min_micro_batch_size=min_micro_batch_size,
        )
        with suppress(RuntimeError):  # some optimizers want real tensors
            program.optimizer(build_on_meta(program.build))
        found = plan_program(
            program,
            global_batch_size=global_batch_size,
            budget=budget,
            deadline_seconds=deadline_seconds,
            estimate_only=estimate_only,
            user_devices=user_devices,
            on_probe=on_probe,
            **taken,
        )
    return _evenly_cut(found, min_micro_batch_size)


def apply(plan: Plan, trainer: Any, *holders: Any, blocks: tuple[type[nn.Module], ...] = ()) -> None:
    """Set a Trainer's accumulate_grad_batches, and `batch_size` of the modules or datamodules that are given.

    `batch_size` is an attribute, or one of `hparams`, which train_dataloader reads. blocks: those of the plan.
    What else the plan chose is switched on as `fit` starts, by a callback that is added.
    Raises: ConfigError for a Trainer of another precision, or a holder without `batch_size`.
    """
    if plan.micro_batch_size * plan.accumulation_steps != plan.global_batch_size:
        raise ConfigError(
            f"plan: expected micro-batches of one size, got {plan.micro_batch_size} x {plan.accumulation_steps} for "
            f"{plan.global_batch_size} samples. Make it with memfit.lightning.plan."
        )
    wanted = next(name for name, known in PRECISIONS.items() if known == plan.precision)
    if PRECISIONS.get(trainer.precision) != plan.precision:
        raise ConfigError(
            f"trainer: expected precision {wanted!r}, as planned, got {trainer.precision!r}. Build it so."
        )
    if plan.checkpointing == "blocks" and not blocks:
        raise ConfigError("blocks: expected those that the plan was made with, as it recomputes them. Give them.")
    for holder in holders:
        if not _set_batch_size(holder, plan.micro_batch_size):
            raise ConfigError(
                f"{type(holder).__name__}: expected an attribute or hyperparameter batch_size, got none. "
                "Read it in train_dataloader."
            )
    trainer.accumulate_grad_batches = plan.accumulation_steps
    callbacks = import_module(f"{_root(trainer)}.callbacks")
    stack = ExitStack()
    callback = callbacks.LambdaCallback(
        on_fit_start=partial(_start, plan, blocks, stack),
        on_fit_end=lambda *_: stack.close(),
        on_exception=lambda *_: stack.close(),
    )
    callback.memfit_plan = plan
    trainer.callbacks = [each for each in trainer.callbacks if not hasattr(each, "memfit_plan")] + [callback]


def _start(plan: Plan, blocks: tuple[type[nn.Module], ...], stack: ExitStack, trainer: Any, module: Any) -> None:
    if plan.checkpointing == "blocks":
        checkpoint_blocks(module, blocks)
    for group in (group for optimizer in trainer.optimizers for group in optimizer.param_groups):
        if not plan.foreach and "foreach" in group:
            group["foreach"] = False
    stack.enter_context(chunking(plan.chunked_loss))


def _set_batch_size(holder: Any, size: int) -> bool:
    found = False
    if hasattr(holder, "batch_size"):
        holder.batch_size, found = size, True
    hparams = getattr(holder, "hparams", {})
    if "batch_size" in hparams:
        hparams["batch_size"], found = size, True
    return found


def _root(thing: Any) -> str:
    """Name the Lightning package that an object comes from: lightning.pytorch or pytorch_lightning."""
    for base in type(thing).__mro__:
        if base.__module__.split(".")[0] in _PACKAGES:
            return "lightning.pytorch" if base.__module__.startswith("lightning.") else "pytorch_lightning"
    return ""


def _check_module(module: Any) -> None:
    if not (_root(module) and hasattr(module, "training_step")):
        raise ConfigError(
            f"module: expected a LightningModule, got {type(module).__name__}. Install 'memfit[lightning]', or give "
            "memfit.plan a TrainingProgram."
        )
    if not module.automatic_optimization:
        raise ConfigError(
            "module: expected automatic optimization, got manual. Lightning accumulates nothing there: write a "
            "TrainingProgram for memfit.plan."
        )
    if "dataloader_iter" in inspect.signature(module.training_step).parameters:
        raise ConfigError("training_step: expected a batch, got dataloader_iter. Take (batch, batch_idx).")


def _settings_of(trainer: Any) -> dict[str, Any]:
    devices = trainer.num_devices * trainer.num_nodes
    if devices != 1:
        raise ConfigError(f"trainer: expected one device, got {devices}. Plan for one of them.")
    if trainer.precision not in PRECISIONS:
        raise ConfigError(f"trainer: expected a precision of {list(PRECISIONS)}, got {trainer.precision!r}. Change it.")
    by_value = trainer.gradient_clip_algorithm == "value"
    return {
        "device": str(trainer.strategy.root_device),
        "precisions": (PRECISIONS[trainer.precision],),
        "clip": None if by_value else trainer.gradient_clip_val or None,
    }


@dataclass(frozen=True)
class _Copies:
    """Builds copies of a module; its tensors lie in a file, so that no process holds them twice."""

    empty: Any
    """The module, its parameters and buffers without memory."""
    weights: Path

    @classmethod
    def of(cls, module: Any, weights: Path) -> "_Copies":
        """Copy a module; it stays as it is."""
        tensors = [*module.parameters(), *module.buffers()]
        try:
            empty = copy.deepcopy(
                module, {id(each): _like(each, torch.empty_like(each, device="meta")) for each in tensors}
            )
        except Exception as error:  # whatever an attribute refuses
            raise ConfigError(
                f"module: expected one that can be copied, got {type(error).__name__}: {error}. "
                "Open files, locks and connections in hooks, not in __init__."
            ) from error
        for each in empty.modules():
            if _root(each):
                each.log = each.log_dict = _ignore
        torch.save([each.detach().cpu() for each in tensors], weights)
        return cls(empty, weights)

    def __call__(self) -> Any:
        """Build a copy; without memory where that is the default device."""
        memo = {}
        if torch.get_default_device().type != "meta":
            saved = torch.load(self.weights, map_location="cpu", mmap=True, weights_only=True)
            tensors = [*self.empty.parameters(), *self.empty.buffers()]
            memo = {id(each): _like(each, real.clone()) for each, real in zip(tensors, saved, strict=True)}
        built = copy.deepcopy(self.empty, memo)
        built.configure_model()
        return built


def _like(tensor: Tensor, other: Tensor) -> Tensor:
    return nn.Parameter(other, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else other


def _ignore(*_args: Any, **_settings: Any) -> None:
    """Log nothing."""


@dataclass(frozen=True)
class _Samples:
    """Makes batches of real samples, those with most elements first."""

    samples: Sequence[Any]
    collate: Callable[[list[Any]], Batch]

    @classmethod
    def of(cls, module: Any, data: Any) -> "_Samples":
        """Draw samples from the training data."""
        loader = _train_loader(module, data)
        if not isinstance(loader, DataLoader) or (loader.batch_size is None and loader.batch_sampler is None):
            raise ConfigError(
                f"data: expected a training DataLoader that collates samples, got {type(loader).__name__}. "
                "Give make_batch."
            )
        dataset: Any = loader.dataset
        if isinstance(dataset, IterableDataset):
            drawn = list(islice(iter(dataset), _SAMPLES_DRAWN))
        else:
            count = min(len(dataset), _SAMPLES_DRAWN)
            drawn = [dataset[i * len(dataset) // count] for i in range(count)]
        if not drawn:
            raise ConfigError("data: expected samples to train on, got none. Give make_batch.")
        return cls(sorted(drawn, key=_num_elements, reverse=True), loader.collate_fn)

    def __call__(self, n: int, seq_len: int | None = None) -> Batch:  # noqa: ARG002  (there is one length only)
        """Collate n samples; where they are fewer, some come again."""
        return self.collate([self.samples[i % len(self.samples)] for i in range(n)])


def _train_loader(module: Any, data: Any) -> Any:
    if isinstance(data, DataLoader):
        return data
    if data is None:
        return module.train_dataloader()
    if not hasattr(data, "train_dataloader"):
        return data
    data.prepare_data()
    data = copy.copy(data)
    data.setup("fit")
    return data.train_dataloader()


def _num_elements(sample: Any) -> int:
    return sum(tensor.numel() for tensor in tensors_of(sample)) or (len(sample) if hasattr(sample, "__len__") else 0)


@contextmanager
def _random_states_kept() -> Iterator[None]:
    """Leave all generators as they were: data that is drawn or split draws from them."""
    numpy = sys.modules.get("numpy")
    python_state, numpy_state = random.getstate(), numpy.random.get_state() if numpy else None
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        random.setstate(python_state)
        if numpy:
            numpy.random.set_state(numpy_state)


def _loss(exact: bool, module: Any, batch: Batch) -> Tensor | dict[str, Tensor]:
    """Run the training step. Lightning frees the last step's gradients only after it: until then they are held."""
    parameters = list(module.parameters())
    if module.device != parameters[0].device:
        module.to(parameters[0].device)
    waiting = (
        [each for each in parameters if each.requires_grad and each.grad is None] if torch.is_grad_enabled() else []
    )
    held = [torch.zeros_like(each) for each in waiting]
    arguments = (batch, 0)[: len(inspect.signature(module.training_step).parameters)]
    result = module.training_step(*arguments)
    held.clear()
    loss = result.get("loss") if isinstance(result, Mapping) else result
    if not isinstance(loss, Tensor):
        raise ConfigError(
            f"training_step: expected a loss, or {{'loss': ...}}, got {type(loss).__name__}. Return it for every batch."
        )
    return loss if exact else {"loss": loss * num_samples(batch)}


def _count(batch: Batch) -> dict[str, float]:
    return {"loss": float(num_samples(batch))}


def _optimizer(given: Callable[[nn.Module], torch.optim.Optimizer] | None, module: Any) -> torch.optim.Optimizer:
    if given is not None:
        return given(module)
    try:
        found = _optimizers(module.configure_optimizers())
    except RuntimeError as error:
        if "Trainer" not in str(error):
            raise
        raise ConfigError(
            "configure_optimizers: expected one that needs no trainer, got one that asks for it. "
            "Give memfit.lightning.plan the optimizer, without schedules."
        ) from error
    if len(found) != 1:
        raise ConfigError(
            f"configure_optimizers: expected one optimizer, got {len(found)}. "
            "Write a TrainingProgram for memfit.plan that runs what you do with them."
        )
    return found[0]


def _optimizers(found: Any) -> list[torch.optim.Optimizer]:
    """Find the optimizers in what configure_optimizers may return; schedules are left out."""
    if isinstance(found, torch.optim.Optimizer):
        return [found]
    if isinstance(found, Mapping):
        return _optimizers(found.get("optimizer"))
    if isinstance(found, list | tuple):
        return [each for part in found for each in _optimizers(part)]
    return []


def _evenly_cut(found: Plan, smallest: int) -> Plan:
    """Take the largest micro-batch up to the plan's that divides the global batch: it needs no more memory."""
    total = found.global_batch_size
    smallest = max(smallest, min((probe.micro_batch_size for probe in found.probes), default=1))
    size = max(each for each in range(1, found.micro_batch_size + 1) if total % each == 0)
    steps = total // size
    if (size, steps) == (found.micro_batch_size, found.accumulation_steps):
        return found
    if size < smallest:
        raise ConfigError(
            f"global_batch_size: expected one with a divisor from {smallest} to {found.micro_batch_size}, got {total}. "
            "Lightning divides the loss of every micro-batch by their number. Choose another."
        )
    levers = tuple(each | {"value": steps} if each["name"] == "accumulation_steps" else each for each in found.levers)
    return replace(
        found,
        micro_batch_size=size,
        accumulation_steps=steps,
        step_seconds=None,
        samples_per_second=None,
        levers=levers,
        reason=f"{found.reason} Micro-batches of {size} instead of {found.micro_batch_size}, so that all are alike, as "
        "Lightning divides their losses by their number; memory was taken with the larger ones, speed is not known.",
    )
