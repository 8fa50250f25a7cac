"""Memory: how much is held, on whichever device, and giving back what is not needed."""

from __future__ import annotations

import ctypes
import gc
import os
import sys
from typing import Any

import torch


def peak_gib(device: torch.device) -> float:
    """The most memory held so far: the GPU's by our tensors, or on a CPU the process's resident set.

    MPS keeps no peak; there it is what the driver holds now, after a step.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    if device.type == "mps":
        return torch.mps.driver_allocated_memory() / 2**30
    if os.name == "nt":
        import psutil

        return psutil.Process().memory_info().peak_wset / 2**30
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**30 if sys.platform == "darwin" else peak / 2**20  # bytes on macOS, KiB elsewhere


def in_use_gib(device: torch.device) -> float:
    """What is held right now: the GPU's memory by our tensors, or on a CPU the process's resident set."""
    import psutil

    if device.type == "cuda":
        return torch.cuda.memory_allocated(device) / 2**30
    if device.type == "mps":
        return torch.mps.current_allocated_memory() / 2**30
    return psutil.Process().memory_info().rss / 2**30


def local_bytes(tensor: Any) -> int:
    """The bytes of a tensor that this process holds: all of it, or its part where FSDP spreads it."""
    local = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return local.numel() * local.element_size()


def trim_heap() -> None:
    """Give the C library's freed memory back to the system, where it keeps it: glibc, on Linux."""
    if sys.platform == "linux" and (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)):
        trim(0)


def free(device: torch.device) -> None:
    """Give cached blocks back, so that a smaller batch finds room in one piece."""
    gc.collect()
    trim_heap()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    if device.type == "mps":
        torch.mps.empty_cache()
