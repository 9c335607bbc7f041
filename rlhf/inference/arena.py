"""Memory that comes and goes while its addresses stay.

Captured CUDA graphs hold addresses. So that the memory of a rollout can be given back to training and the graphs still run in the next
one, addresses are reserved once and physical memory is mapped behind them for the time of a rollout (CUDA's virtual memory
management). On the CPU these are plain tensors.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

Specs = dict[str, tuple[tuple[int, ...], torch.dtype]]
"""Name -> shape and dtype of a tensor."""

ALIGNMENT = 256
"""Bytes; every tensor begins at a multiple of it."""


class Mapped:
    """Bytes behind all arenas of this process: now, and at most since `restart`. PyTorch's statistics do not hold them."""

    def __init__(self) -> None:
        self.now = self.most = 0

    def add(self, size: int) -> None:
        self.now += size
        self.most = max(self.most, self.now)

    def restart(self) -> None:
        self.most = self.now


mapped_memory = Mapped()


def _offsets(specs: Specs) -> tuple[dict[str, int], int]:
    """Where each tensor begins, and the bytes of all."""
    offsets, end = {}, 0
    for name, (shape, dtype) in specs.items():
        offsets[name] = end
        end += -(-math.prod(shape) * dtype.itemsize // ALIGNMENT) * ALIGNMENT
    return offsets, end


class Arena:
    """A fixed set of tensors on the CPU."""

    def __init__(self, specs: Specs, device: torch.device) -> None:
        self.specs = specs
        self.device = device
        self.offsets, self.bytes = _offsets(specs)
        self.mapped = False
        self.tensors: dict[str, Tensor] = {}

    def map(self) -> None:
        """Gets the memory, finite numbers in it on the CPU and anything on a GPU. Does nothing if it is there."""
        if not self.mapped:
            self._map()
            self.mapped = True
            mapped_memory.add(self.bytes)

    def unmap(self) -> None:
        """Gives the memory back. Its tensors must not be touched until the next `map`."""
        if self.mapped:
            self._unmap()
            self.mapped = False
            mapped_memory.add(-self.bytes)

    def close(self) -> None:
        """Gives the addresses back too."""
        self.unmap()
        self.tensors = {}

    def _map(self) -> None:
        # Zeros: plain attention weighs what lies behind a sequence with 0, and 0 times NaN is NaN.
        self.tensors = {name: torch.zeros(shape, dtype=dtype, device=self.device) for name, (shape, dtype) in self.specs.items()}

    def _unmap(self) -> None:
        self.tensors = {}


class CudaArena(Arena):
    """The same on a GPU, always at the same addresses.

    Raises:
        torch.OutOfMemoryError: from `map`, the GPU has not enough free memory.
    """

    def __init__(self, specs: Specs, device: torch.device) -> None:
        super().__init__(specs, device)
        from cuda.bindings import driver  # NVIDIA's bindings, a dependency of torch where it has CUDA

        self.driver = driver
        torch.cuda.synchronize(device)  # there must be a context
        index = device.index if device.index is not None else torch.cuda.current_device()
        self.location = driver.CUmemAllocationProp()
        self.location.type = driver.CUmemAllocationType.CU_MEM_ALLOCATION_TYPE_PINNED
        self.location.location.type = driver.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE
        self.location.location.id = index
        smallest = driver.CUmemAllocationGranularity_flags.CU_MEM_ALLOC_GRANULARITY_MINIMUM
        granularity = int(self._call(driver.cuMemGetAllocationGranularity(self.location, smallest)))
        self.bytes = max(1, -(-self.bytes // granularity)) * granularity
        self.address = int(self._call(driver.cuMemAddressReserve(self.bytes, 0, 0, 0)))
        self.handle: Any = None

    def _call(self, result: tuple[Any, ...]) -> Any:
        """The value of a driver call."""
        code, *values = result
        if code == self.driver.CUresult.CUDA_ERROR_OUT_OF_MEMORY:
            raise torch.OutOfMemoryError(f"the GPU has no {self.bytes / 1e9:.2f} GB free")
        if code != self.driver.CUresult.CUDA_SUCCESS:
            raise RuntimeError(f"CUDA driver: {code}")
        return values[0] if values else None

    def _map(self) -> None:
        driver = self.driver
        self.handle = self._call(driver.cuMemCreate(self.bytes, self.location, 0))
        self._call(driver.cuMemMap(self.address, self.bytes, 0, self.handle, 0))
        access = driver.CUmemAccessDesc()
        access.location = self.location.location
        access.flags = driver.CUmemAccess_flags.CU_MEM_ACCESS_FLAGS_PROT_READWRITE
        self._call(driver.cuMemSetAccess(self.address, self.bytes, [access], 1))
        if not self.tensors:  # made once: they are addresses, and torch asks the driver for their device
            whole = torch.as_tensor(_Bytes(self.address, self.bytes), device=self.device)
            for name, (shape, dtype) in self.specs.items():
                start, size = self.offsets[name], math.prod(shape) * dtype.itemsize
                self.tensors[name] = whole[start : start + size].view(dtype).view(shape)

    def _unmap(self) -> None:
        torch.cuda.synchronize(self.device)  # nothing may still read it
        self._call(self.driver.cuMemUnmap(self.address, self.bytes))
        self._call(self.driver.cuMemRelease(self.handle))
        self.handle = None

    def close(self) -> None:
        super().close()
        if self.address:
            self._call(self.driver.cuMemAddressFree(self.address, self.bytes))
            self.address = 0


class _Bytes:
    """Raw device memory in the form that torch takes without a copy."""

    def __init__(self, address: int, size: int) -> None:
        self.__cuda_array_interface__ = {"data": (address, False), "shape": (size,), "typestr": "|u1", "version": 3, "strides": None}


def make_arena(specs: Specs, device: torch.device) -> Arena:
    return (CudaArena if device.type == "cuda" else Arena)(specs, device)
