"""How long operators take on a device that is not here: the longer of computing and moving bytes, plus a launch."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import flop_registry

from memfit.memory.devices import Device

COMPUTE_SHARE, BANDWIDTH_SHARE = 0.5, 0.75
"""Of the peak rates, what real kernels commonly reach. They set the level of all figures, hardly their order."""
_LAUNCH_SECONDS = 6e-6
_PRECISIONS = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


def flat_tensors(values: Iterable[Any]) -> list[Tensor]:
    """List the tensors among an operator's arguments or results, which nest no deeper than in lists."""
    found: list[Tensor] = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, list | tuple):
            found += [each for each in value if isinstance(each, Tensor)]
    return found


class Roofline:
    """Seconds of one operator on a device; source of the model: Williams, Waterman, Patterson, CACM 52(4), 2009."""

    def __init__(self, device: Device) -> None:
        self._flops = {name: rate * 1e12 * COMPUTE_SHARE for name, rate in device.tflops.items()}
        self._bandwidth = (device.bandwidth_gbs or 0) * 1e9 * BANDWIDTH_SHARE

    @property
    def known(self) -> bool:
        """Whether the device's rates are known at all."""
        return bool(self._flops and self._bandwidth)

    def seconds(self, func: Any, args: Any, kwargs: Any, result: Any) -> float:
        """Time one operator from its flops and from the bytes of its operands and results."""
        if func.is_view:
            return 0.0
        operands, results = flat_tensors(args), flat_tensors((result,))
        if not results:
            return 0.0
        moved = sum(tensor.numel() * tensor.element_size() for tensor in (*operands, *results))
        computing = 0.0
        count = flop_registry.get(func._overloadpacket)
        if count is not None and operands:
            rate = self._flops.get(_PRECISIONS.get(operands[-1].dtype, "fp32"), self._flops["fp32"])
            computing = count(*args, **kwargs, out_val=result) / rate
        return _LAUNCH_SECONDS + max(computing, moved / self._bandwidth)
