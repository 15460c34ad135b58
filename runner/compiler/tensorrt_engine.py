"""A loaded engine at work.

Not here: how it was loaded and checked (`tensorrt_runtime`).
"""

from typing import Any

import torch

from parallel.errors import InternalError
from runner.compiler.tensorrt_io import EngineIO

# What TensorRT asks of the address of a tensor, in bytes.
_ALIGNMENT = 256


class LoadedEngine:
    """An engine at work; see `runner.compiler.backend.Compiled`.

    Neither waits for the GPU nor allocates anything but its outputs, so that a CUDA graph can hold
    it.
    """

    def __init__(
        self, engine: Any, context: Any, io: EngineIO, kind: str, scratch: "Scratch", log: Any
    ) -> None:
        self._engine = engine
        self._context = context
        self._kind = kind
        self._scratch = scratch
        self._log = log
        self._memory: torch.Tensor | None = None
        self._input_names = tuple(io.inputs)
        self._addresses = [0] * len(io.inputs)
        self._outputs = [(name, spec.shape, spec.dtype) for name, spec in io.outputs.items()]
        self._device = scratch.device
        scratch.require(engine.device_memory_size_v2)

    def __call__(self, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Inputs have the shapes and dtypes of the segment and are contiguous; none is checked."""
        context = self._context
        if self._memory is None:
            self._memory = self._scratch.memory()
            context.set_device_memory(self._memory.data_ptr(), self._memory.numel())
        # A view may begin anywhere; TensorRT reads whole aligned blocks.
        inputs = tuple(x if x.data_ptr() % _ALIGNMENT == 0 else x.clone() for x in inputs)
        addresses = [x.data_ptr() for x in inputs]
        if addresses != self._addresses:
            for name, new, old in zip(self._input_names, addresses, self._addresses, strict=True):
                if new != old:
                    context.set_tensor_address(name, new)
            self._addresses = addresses
        outputs = []
        for name, shape, dtype in self._outputs:
            output = torch.empty(shape, dtype=dtype, device=self._device)
            context.set_tensor_address(name, output.data_ptr())
            outputs.append(output)
        stream = torch.cuda.current_stream(self._device).cuda_stream
        if not context.execute_async_v3(stream):
            raise InternalError(f"TensorRT failed in segment {self._kind!r}: {self._log.last}")
        return tuple(outputs)


class Scratch:
    """One block of device memory that engines write intermediate results to, one at a time.

    It is allocated when the first engine runs, as large as the hungriest of those loaded by then.
    A later, larger need makes a new block; captured graphs keep the old one.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._num_bytes = _ALIGNMENT
        self._memory: torch.Tensor | None = None

    def require(self, num_bytes: int) -> None:
        """An engine that was loaded needs this much."""
        self._num_bytes = max(self._num_bytes, num_bytes)

    def memory(self) -> torch.Tensor:
        """(num_bytes,) uint8, enough for every engine loaded so far."""
        if self._memory is None or self._memory.numel() < self._num_bytes:
            self._memory = torch.empty(self._num_bytes, dtype=torch.uint8, device=self.device)
        return self._memory
