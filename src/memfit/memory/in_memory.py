"""Plan a program that exists only in the caller's process: its children get a pickled copy, and it stays untouched."""

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from memfit.errors import ConfigError, DoesNotFitError
from memfit.files import fingerprint
from memfit.memory.budget import check_device, resolve_budget
from memfit.memory.devices import find_device, is_here, read_devices
from memfit.memory.plan import Plan
from memfit.memory.planner import plan_stage, planning
from memfit.memory.request import OnProbe, PlanRequest
from memfit.process import run_child
from memfit.step import CHECKPOINTINGS, PRECISIONS, TrainingProgram


def plan(
    program: TrainingProgram,
    *,
    global_batch_size: int,
    budget: str = "auto",
    device: str = "cpu",
    precisions: Sequence[str] = ("fp32",),
    checkpointing: Sequence[str] = CHECKPOINTINGS,
    seq_lens: Sequence[int] | None = None,
    variants: Sequence[str] | None = None,
    clip: float | None = None,
    deadline_seconds: float = 300.0,
    num_devices: int = 1,
    estimate_only: bool = False,
    user_devices: Sequence[Mapping[str, Any]] = (),
    on_probe: OnProbe = lambda _probe: None,
) -> Plan:
    """Find the fastest way to train a program at a fixed global batch size within a budget, and prove it by running it.

    budget: '14GiB', '80%' of the device, or 'auto' (what is free now, less a margin); process bytes.
    precisions, checkpointing: what is allowed; the fastest that fits is taken. seq_lens, variants: what is allowed, in
    order of preference; all but the first are lossy and taken only where nothing before them fits.
    device: 'cpu', 'cuda', 'cuda:n', or a card of the catalog or of `user_devices`: then the plan is predicted, not run.
    num_devices: how many equal devices share the global batch, one process each under torch.distributed; the budget and
    the plan are those of one. What is run is one device's share, without the others.
    clip: the largest gradient norm, if the step clips. deadline_seconds: for one probing child.

    Nothing of the caller changes: models are built in child processes, random states stay as they are.
    Raises: ConfigError for a wrong argument, a program that cannot be pickled, or a loss that is not what it is taken
    for; DoesNotFitError with what would fit; ChildError where the program itself fails.
    """
    _check_arguments(program, global_batch_size, precisions, checkpointing, variants, num_devices)
    if is_here(device):
        check_device(device)  # and no more: a look at its properties would make a context in this process
    else:
        find_device(device, read_devices(user_devices))
    wanted = list(variants or program.variants)
    if variants is None:
        wanted = wanted[:1]
    with tempfile.TemporaryDirectory(prefix="memfit-plan-") as folder:
        log = Path(folder) / "plan.log"
        request = PlanRequest(
            stage="program",
            program={"pickle": str(_pickled(program, Path(folder)))},
            global_batch_size=global_batch_size,
            budget_bytes=_resolve(budget, device, user_devices, log),
            device=device,
            precisions=tuple(precisions),
            checkpointings=tuple(name for name in checkpointing if name == "none" or program.blocks) or ("none",),
            variant=wanted[0],
            wanted_variant=wanted[0],
            fingerprint=fingerprint([global_batch_size, num_devices, budget, device, [*precisions], [*checkpointing]]),
            clip=clip,
            num_devices=num_devices,
            min_micro_batch_size=program.min_micro_batch_size if program.decomposes else global_batch_size,
            deadline_seconds=deadline_seconds,
            seq_lens=tuple(seq_lens) if seq_lens else (None,),
            estimate_only=estimate_only,
            user_devices=user_devices,
            check=program.loss is not None,
            log=log,
        )
        with planning(device):
            return _first_variant_that_fits(request, wanted, on_probe)


def _first_variant_that_fits(request: PlanRequest, variants: Sequence[str], on_probe: OnProbe) -> Plan:
    failure: DoesNotFitError | None = None
    for variant in variants:
        try:
            return plan_stage(PlanRequest(**{**vars(request), "variant": variant}), on_probe)
        except DoesNotFitError as error:
            failure = failure or error
    assert failure is not None
    raise failure


def _check_arguments(
    program: TrainingProgram,
    global_batch_size: int,
    precisions: Sequence[str],
    checkpointing: Sequence[str],
    variants: Sequence[str] | None,
    num_devices: int,
) -> None:
    if not isinstance(global_batch_size, int) or isinstance(global_batch_size, bool) or global_batch_size < 1:
        raise ConfigError(f"global_batch_size: expected 1 or more samples, got {global_batch_size!r}. Raise it.")
    for what, given, valid in (
        ("precisions", precisions, PRECISIONS),
        ("checkpointing", checkpointing, CHECKPOINTINGS),
        ("variants", variants if variants is not None else program.variants, program.variants),
    ):
        if isinstance(given, str) or not given or not set(given) <= set(valid):
            raise ConfigError(f"{what}: expected some of {list(valid)}, got {given!r}. Give a list of them.")
    if num_devices < 1 or num_devices > global_batch_size:
        raise ConfigError(
            f"num_devices: expected 1 to {global_batch_size}, a sample for each at least, got {num_devices}. "
            "Raise the global batch, or use fewer devices."
        )
    if not program.decomposes and num_devices > 1:
        raise ConfigError("num_devices: expected 1, as the loss does not decompose over samples. Use one device.")
    if program.decomposes and program.min_micro_batch_size > global_batch_size:
        raise ConfigError(
            f"min_micro_batch_size: expected at most the global batch of {global_batch_size}, got "
            f"{program.min_micro_batch_size}. Raise the global batch."
        )


def _resolve(budget: str, device: str, user_devices: Sequence[Mapping[str, Any]], log: Path) -> int:
    """Turn a budget into bytes; a card that is here is looked at by a child, so that this process never touches it."""
    if device == "cpu" or not is_here(device):
        return resolve_budget(budget, device, user_devices=read_devices(user_devices))
    payload = {"budget": budget, "device": device}
    return int(run_child("memfit.memory.budget:resolve_in_child", payload, log=log).unwrap("measuring the device"))


def _pickled(program: TrainingProgram, folder: Path) -> Path:
    try:
        import cloudpickle
    except ImportError as error:
        raise ConfigError("memfit.plan needs cloudpickle to hand the program to a child. pip install it.") from error
    path = folder / "program.pickle"
    try:
        path.write_bytes(cloudpickle.dumps(program))
    except Exception as error:  # whatever refuses to be pickled, and however
        raise ConfigError(
            f"program: expected one that can be pickled for a child process, got {type(error).__name__}: {error}. "
            "Open files, locks and connections inside build_model or make_batch, not outside of them."
        ) from error
    return path
