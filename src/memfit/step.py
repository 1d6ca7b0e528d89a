"""What is trained, and the one optimizer step: the same function is probed and trained with."""

import functools
import inspect
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parameter import UninitializedParameter
from torch.utils.checkpoint import checkpoint

from memfit.chunked_loss import chunking
from memfit.errors import ConfigError

Batch = Any
"""A tensor, or a mapping, list or tuple of batches; the first dimension of every tensor is the sample."""

PRECISIONS: dict[str, torch.dtype | None] = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
CHECKPOINTINGS = ("none", "blocks")


def map_tensors(function: Callable[[Tensor], Any], batch: Batch) -> Batch:
    """Apply a function to every tensor of a batch and keep its structure."""
    if isinstance(batch, Tensor):
        return function(batch)
    if isinstance(batch, Mapping):
        return {key: map_tensors(function, value) for key, value in batch.items()}
    if isinstance(batch, list | tuple):
        return type(batch)(map_tensors(function, value) for value in batch)
    return batch


def tensors_of(batch: Batch) -> list[Tensor]:
    """List the tensors of a batch, in order."""
    found: list[Tensor] = []
    map_tensors(found.append, batch)
    return found


def num_samples(batch: Batch) -> int:
    """Read a batch's size off the first dimension of its first tensor."""
    tensors = tensors_of(batch)
    if not tensors or not tensors[0].dim():
        raise ValueError("batch: expected tensors whose first dimension is the sample, got none. Return tensors.")
    return tensors[0].shape[0]


def split_samples(batch: Batch, sizes: Sequence[int]) -> list[Batch]:
    """Split every tensor of a batch along its first dimension; the parts are views."""
    return [_narrow(batch, sum(sizes[:i]), size) for i, size in enumerate(sizes)]


def _narrow(batch: Batch, start: int, size: int) -> Batch:
    return map_tensors(lambda tensor: tensor.narrow(0, start, size), batch)


def micro_batch_sizes(num_samples: int, accumulation_steps: int) -> list[int]:
    """Cut a global batch into micro-batches whose sizes differ by at most one, the larger ones first."""
    steps = max(1, min(accumulation_steps, num_samples))
    share, rest = divmod(num_samples, steps)
    return [share + (i < rest) for i in range(steps)]


@dataclass(frozen=True, kw_only=True)
class TrainingProgram:
    """What is trained, without saying how it fits into memory."""

    build_model: Callable[[], nn.Module] | None = None
    """Builds the model; short for one variant of that name."""
    variants: Mapping[str, Callable[[], nn.Module]] = field(default_factory=dict)
    """Model builders by name; the first is the default."""
    make_batch: Callable[..., Batch]
    """(n, seq_len=None) -> n worst-case samples on the host."""
    loss: Callable[[nn.Module, Batch], Mapping[str, Tensor] | Tensor] | None = None
    """A sum per term, weights included; or one scalar, the mean over the samples. None: only a user's own step runs."""
    optimizer: Callable[[nn.Module], torch.optim.Optimizer]
    count: Callable[[Batch], Mapping[str, float]] | None = None
    """How much each term of a batch counts, known before the forward pass; default: the number of samples."""
    split: Callable[[Batch, Sequence[int]], list[Batch]] = split_samples
    blocks: tuple[type[nn.Module], ...] = ()
    """Module types that activation checkpointing wraps."""
    evaluate: Callable[[nn.Module, Batch], Any] | None = None
    """One evaluation batch; what it returns is the caller's to drop."""
    save: Callable[[nn.Module, torch.optim.Optimizer, Path], None] | None = None
    """Writes a checkpoint into a folder."""
    min_micro_batch_size: int = 1
    """Smallest micro-batch allowed, for layers with batch statistics."""
    decomposes: bool = True
    """Whether the loss is a sum over samples; a contrastive loss is not, and then a batch is never cut."""

    def __post_init__(self) -> None:
        if (self.build_model is None) == (not self.variants):
            got = "both" if self.variants else "neither"
            raise ConfigError(f"TrainingProgram: expected either build_model or variants, got {got}. Give one of them.")
        if self.build_model is not None:
            object.__setattr__(self, "variants", {"default": self.build_model})
            object.__setattr__(self, "build_model", None)

    def build(self, variant: str | None = None) -> nn.Module:
        """Build a variant, the default one if None."""
        model = self.variants[variant or next(iter(self.variants))]()
        if any(isinstance(parameter, UninitializedParameter) for parameter in model.parameters()):
            raise ConfigError(
                "build_model: expected a model whose parameters have shapes, got lazy modules that have seen no batch. "
                "Call the model on a small batch before returning it."
            )
        return model

    def batch(self, size: int, seq_len: int | None = None) -> Batch:
        """Make a worst-case batch on the host. Raises: ConfigError where it has another size than asked for."""
        batch = self.make_batch(size, seq_len)
        if num_samples(batch) != size:
            raise ConfigError(
                f"make_batch: expected {size} samples, got {num_samples(batch)}. Return as many as asked for."
            )
        return batch


class Layout(Protocol):
    """How a step fits into memory: the part of a plan that a step reads."""

    @property
    def accumulation_steps(self) -> int: ...  # noqa: D102
    @property
    def precision(self) -> str: ...  # noqa: D102
    @property
    def checkpointing(self) -> str: ...  # noqa: D102
    @property
    def device(self) -> str: ...  # noqa: D102
    @property
    def chunked_loss(self) -> bool: ...  # noqa: D102
    @property
    def foreach(self) -> bool: ...  # noqa: D102


@dataclass(frozen=True)
class StepLayout:
    """A layout by itself, where there is no plan."""

    accumulation_steps: int = 1
    precision: str = "fp32"
    checkpointing: str = "none"
    device: str = "cpu"
    chunked_loss: bool = False
    foreach: bool = True


@dataclass(frozen=True)
class StepStats:
    """What one optimizer step did: losses are per term, already divided by the global counts."""

    losses: dict[str, float]
    gradient_norm: float
    stepped: bool = True
    """False where the update was skipped: a gradient was not finite (under fp16: the loss scaler overflowed), or its
    norm was not accepted."""
    loss_scale: float = 1.0
    num_samples: int = 0
    seconds: float = 0.0
    """Of the whole step, the device synchronized before and after."""
    update_seconds: float = 0.0
    """Of that, clipping and the optimizer's update, which do not grow with accumulation."""

    @property
    def total(self) -> float:
        """The loss that was minimized: the sum of its terms."""
        return sum(self.losses.values())


def checkpoint_blocks(model: nn.Module, blocks: tuple[type[nn.Module], ...]) -> None:
    """Make every module of the given types recompute its activations in the backward pass.

    Works in place and only while training; parameter names stay as they are. Calling it twice changes nothing.
    """
    for module in model.modules():
        if isinstance(module, blocks) and "forward" not in vars(module):
            module.forward = functools.partial(_recompute, module, module.forward)


def _recompute(module: nn.Module, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    if not (module.training and torch.is_grad_enabled()):
        return forward(*args, **kwargs)
    contexts = functools.partial(_once_and_again, module)
    return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=True, context_fn=contexts, **kwargs)


def _once_and_again(module: nn.Module) -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
    return nullcontext(), _statistics_kept(module)


@contextmanager
def _statistics_kept(module: nn.Module) -> Iterator[None]:
    """Leave running statistics as the first pass made them: a recomputation must not count a batch twice."""
    norms = [norm for norm in module.modules() if isinstance(norm, _BatchNorm)]
    before = [(norm.momentum, norm.num_batches_tracked) for norm in norms]
    for norm, (_, tracked) in zip(norms, before, strict=True):
        norm.momentum, norm.num_batches_tracked = 0.0, None if tracked is None else tracked.clone()
    try:
        yield
    finally:
        for norm, (momentum, tracked) in zip(norms, before, strict=True):
            norm.momentum, norm.num_batches_tracked = momentum, tracked


def check_optimizer(optimizer: torch.optim.Optimizer) -> None:
    """Refuse an optimizer that runs the model inside its step, as line searches do. Raises: ConfigError."""
    closure = inspect.signature(optimizer.step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise ConfigError(
            f"optimizer: expected one whose step needs no closure, got {type(optimizer).__name__}, which runs the "
            "model again inside its step. Take a first-order optimizer, as of torch.optim."
        )


def materialize_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Give the optimizer its state before the first forward pass, as a resumed run has it.

    Parameters move (weight decay), so this is for a model that is thrown away.
    """
    check_optimizer(optimizer)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def autocast(precision: str, device: str) -> AbstractContextManager[Any]:
    """Enter the plan's precision: nothing for fp32, autocast for bf16 and fp16."""
    dtype = PRECISIONS[precision]
    return nullcontext() if dtype is None else torch.autocast(torch.device(device).type, dtype=dtype)


@contextmanager
def evaluating(layout: Layout) -> Iterator[None]:
    """Enter what an evaluation batch runs under: no gradients, and the plan's precision and chunks."""
    with torch.no_grad(), chunking(layout.chunked_loss), autocast(layout.precision, layout.device):
        yield


def loss_terms(program: TrainingProgram, model: nn.Module, batch: Batch) -> Mapping[str, Tensor]:
    """Evaluate the program's loss as sums per term; a scalar mean becomes the sum of one term."""
    if program.loss is None:
        raise ConfigError("TrainingProgram: expected a loss, got None. Give one, or estimate with a step of your own.")
    loss = program.loss(model, batch)
    return loss if isinstance(loss, Mapping) else {"loss": loss * num_samples(batch)}


def term_counts(program: TrainingProgram, batch: Batch) -> Mapping[str, float] | None:
    """Count how much each term weighs over a batch, or None where every term counts samples."""
    return None if program.count is None else program.count(batch) or None


def num_ranks() -> int:
    """Count the processes that share a global batch: those of torch.distributed, or this one."""
    ready = torch.distributed.is_available() and torch.distributed.is_initialized()
    return torch.distributed.get_world_size() if ready else 1


def sum_over_ranks(tensors: Iterable[Tensor]) -> None:
    """Add up each tensor over all ranks, in place and one by one: no bucket takes memory."""
    for tensor in tensors:
        torch.distributed.all_reduce(tensor)


def over_all_ranks(
    counts: Mapping[str, float] | None, size: int, device: str
) -> tuple[Mapping[str, float] | None, int]:
    """Return the counts and the size of the whole global batch, of which this process has a share."""
    if num_ranks() == 1:
        return counts, size
    amounts = torch.tensor([float(size), *(counts or {}).values()], dtype=torch.float64, device=device)
    torch.distributed.all_reduce(amounts)
    total, *summed = amounts.tolist()
    return None if counts is None else dict(zip(counts, summed, strict=True)), int(total)


@dataclass
class TrainingStep:
    """One optimizer step on one global batch, under a plan's layout.

    Every term is divided by its count over the whole global batch, so that gradients do not depend on how the batch
    is cut. The batch stays on the host; a micro-batch moves to the device when its turn comes. Under torch.distributed
    every process begins with the same weights and is given its share of the global batch; counts and gradients are
    summed over all of them.
    """

    layout: Layout
    program: TrainingProgram
    model: nn.Module
    optimizer: torch.optim.Optimizer
    clip: float | None = None
    """Largest total gradient norm, or None."""
    accepts: Callable[[float], bool] | None = None
    """Asked, if given, with the gradient norm before clipping whether to update; the gradients are dropped if not."""
    observe: Callable[[], None] | None = None
    """Called, if given, with a step's gradients complete and not yet clipped; must leave them as they are."""
    scaler: torch.amp.GradScaler = field(init=False)

    def __post_init__(self) -> None:
        device_type = torch.device(self.layout.device).type
        self.scaler = torch.amp.GradScaler(device_type, enabled=self.layout.precision == "fp16")
        if self.layout.checkpointing == "blocks":
            checkpoint_blocks(self.model, self.program.blocks)
        check_optimizer(self.optimizer)
        if not self.layout.foreach:
            for group in self.optimizer.param_groups:
                group.update({"foreach": False} if "foreach" in group else {})

    def __call__(self, batch: Batch) -> StepStats:
        """Train on one global batch: forward and backward per micro-batch, then one update."""
        started, size = self._clock(), num_samples(batch)
        counts, size = over_all_ranks(term_counts(self.program, batch), size, self.layout.device)
        sums = self.gradients(batch, counts, size)
        if num_ranks() > 1:
            sum_over_ranks(self._filled_gradients())
            sum_over_ranks(sums.values())
        accumulated = self._clock()
        norm, stepped = self.update()
        losses = {term: float(value) for term, value in sums.items()}
        ended = self._clock()
        scale = float(self.scaler.get_scale())
        return StepStats(losses, float(norm), stepped, scale, size, ended - started, ended - accumulated)

    def _clock(self) -> float:
        if torch.device(self.layout.device).type == "cuda":
            torch.cuda.synchronize(self.layout.device)
        return time.perf_counter()

    def gradients(self, batch: Batch, counts: Mapping[str, float] | None, size: int) -> dict[str, Tensor]:
        """Add up the gradients of this rank's share of a global batch; return its share of each term's loss.

        counts, size: of the whole global batch.
        """
        sums: dict[str, Tensor] = {}
        here = num_samples(batch)  # an epoch's last batch may be smaller, and its parts no smaller than allowed
        steps = min(self.layout.accumulation_steps, max(1, here // max(self.program.min_micro_batch_size, 1)))
        for micro in self.program.split(batch, micro_batch_sizes(here, steps)):
            for term, value in self.accumulate(micro, counts, size).items():
                sums[term] = sums[term] + value if term in sums else value
        return sums

    def accumulate(self, micro: Batch, counts: Mapping[str, float] | None, size: int) -> dict[str, Tensor]:
        """Add one micro-batch's gradients; return its share of each term's loss, detached."""
        micro = map_tensors(lambda tensor: tensor.to(self.layout.device, non_blocking=True), micro)
        with chunking(self.layout.chunked_loss):
            with autocast(self.layout.precision, self.layout.device):
                sums = loss_terms(self.program, self.model, micro)
            shares = {term: value.float() * _inverse(counts, term, size) for term, value in sums.items()}
            torch.autograd.backward(self.scaler.scale(_total(shares.values())))
        return {term: share.detach() for term, share in shares.items()}

    def update(self) -> tuple[Tensor, bool]:
        """Unscale, clip, step and zero; return the gradient norm before clipping and whether it stepped."""
        self.scaler.unscale_(self.optimizer)
        if self.observe is not None:
            self.observe()
        norm = self._clip()
        if self.accepts is not None and not self.accepts(float(norm)):
            self.scaler.update()
            stepped = False
        else:
            stepped = self._step_with_scaler() if self.scaler.is_enabled() else self._step_if_finite(norm)
        self.optimizer.zero_grad(set_to_none=True)
        return norm, stepped

    def _clip(self) -> Tensor:
        """Scale the gradients down to the largest norm that is allowed; return the norm that they had."""
        gradients = [parameter.grad for parameter in self._parameters() if parameter.grad is not None]
        values = [gradient.coalesce().values() if gradient.is_sparse else gradient for gradient in gradients]
        norm = torch.nn.utils.get_total_norm(values)
        if self.clip is not None:
            torch.nn.utils.clip_grads_with_norm_(self._parameters(), self.clip, norm)
        return norm

    def _parameters(self) -> list[Tensor]:
        return [parameter for group in self.optimizer.param_groups for parameter in group["params"]]

    def _filled_gradients(self) -> Iterator[Tensor]:
        """Yield every parameter's gradient; zeros where this rank's share made none, as another's may have."""
        for parameter in self._parameters():
            if parameter.requires_grad:
                parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
                yield parameter.grad

    def _step_with_scaler(self) -> bool:
        scale = self.scaler.get_scale()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return self.scaler.get_scale() >= scale

    def _step_if_finite(self, norm: Tensor) -> bool:
        """Step unless a gradient is not finite: one bad batch must not destroy the weights."""
        finite = bool(torch.isfinite(norm))
        if finite:
            self.optimizer.step()
        return finite


def _inverse(counts: Mapping[str, float] | None, term: str, size: int) -> float:
    count = size if counts is None else counts[term]
    return 1.0 / count if count else 0.0  # a term that nothing counts for has a sum of zero


def _total(shares: Iterable[Tensor]) -> Tensor:
    return functools.reduce(torch.add, shares)
