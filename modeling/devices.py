"""Pick a device; measure the memory in use on it, and free what is not needed."""

import contextlib
import ctypes
import gc
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor

from utils import UserError

AMPERE = (8, 0)  # the first compute capability of CUDA with bf16 in hardware

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of mallopt(3)


def pick_device() -> torch.device:
    """CUDA if there is any, else MPS, else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def fastest_precision(device: torch.device) -> str:
    """What `--precision auto` means: bf16 where the hardware computes with it, fp32 where that would be emulated.

    A processor without it takes six times as long for a product in bf16 as in fp32 (AVX2, torch 2.13).
    """
    if device.type == "cuda":
        is_fast = torch.cuda.get_device_capability(device) >= AMPERE
    elif device.type == "mps":
        is_fast = torch.backends.mps.is_macos_or_newer(14, 0)
    else:
        capabilities = torch.cpu.get_capabilities()
        is_fast = any(capabilities.get(name) for name in ("amx_bf16", "avx512_bf16", "bf16"))  # the last is ARM's
    return "bf16" if is_fast else "fp32"


def autocast_dtype(device: torch.device, precision: str) -> torch.dtype | None:
    """The dtype of matrix products under `--precision bf16` or `fp32`; None for fp32, which needs no autocast.

    Raises UserError for bf16 on a card that computes it in software.
    """
    if precision == "fp32":
        return None
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < AMPERE:
        major, minor = torch.cuda.get_device_capability(device)
        raise UserError(
            "this GPU has no bf16: it would be computed in software, and slowly",
            found=f"{torch.cuda.get_device_name(device)}, compute capability {major}.{minor}; bf16 came with 8.0",
            next="--precision fp32",
        )
    return torch.bfloat16


@contextlib.contextmanager
def tf32(device: torch.device) -> Iterator[None]:
    """Let CUDA compute products of fp32 numbers in TF32, which has three bits more than bf16, where it is faster.

    For rewards: nothing is rounded between the products, so they are an order of magnitude more exact than with bf16.
    """
    settings = torch.backends.cuda.matmul  # (its newer fp32_precision confuses torch.compile)
    before = settings.allow_tf32
    settings.allow_tf32 = before or device.type == "cuda"
    try:
        yield
    finally:
        settings.allow_tf32 = before


def expect_changing_sizes() -> None:
    """Have CUDA's allocator grow its blocks, so that micro-batches of ever other shapes don't leave gaps.

    Before CUDA is first used; where the user has set the allocator up, nothing changes. Windows does not have it.
    """
    if os.name != "nt" and "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:
        os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")


def peak_gib(device: torch.device) -> float:
    """The peak so far: of the GPU memory that tensors take, or on a CPU of the process's resident set.

    MPS records no peak; there it is what the driver holds now.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    if device.type == "mps":
        return torch.mps.driver_allocated_memory() / 2**30
    if os.name == "nt":
        return psutil.Process().memory_info().peak_wset / 2**30
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**30 if sys.platform == "darwin" else peak / 2**20  # bytes on macOS, KiB elsewhere


def reserved_gib() -> float:
    """The most GPU memory that PyTorch took from CUDA's driver so far, cached and fragmented blocks included."""
    return torch.cuda.max_memory_reserved() / 2**30


def forget_peak(device: torch.device) -> None:
    """Have `peak_gib` start anew from what is in use now; only CUDA can."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def in_use_gib(device: torch.device) -> float:
    """The GPU memory that tensors take right now, or on a CPU the process's resident set."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device) / 2**30
    if device.type == "mps":
        return torch.mps.current_allocated_memory() / 2**30
    return psutil.Process().memory_info().rss / 2**30


def local_bytes(tensor: Any) -> int:
    """The bytes of a tensor that this process holds: all of it, or this rank's shard under FSDP."""
    local = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return local.numel() * local.element_size()


def available_bytes(group: Path = Path("/sys/fs/cgroup")) -> int:
    """The memory still available on this machine, or within the container's limit (Linux, cgroup v2)."""
    available = psutil.virtual_memory().available
    try:
        limit, used = (int((group / f"memory.{name}").read_text()) for name in ("max", "current"))
        statistics = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        cached = sum(int(statistics[f"{kind}_file"]) for kind in ("active", "inactive"))  # freed when needed
    except (OSError, ValueError, KeyError):  # no container, no limit ("max"), or other files than expected
        return available
    return max(0, min(available, limit - used + cached))


def keep_heap(device: torch.device) -> None:
    """Let the C library keep freed large blocks for the next tensors (on a CPU, with glibc on Linux).

    By default it returns them to the system, and each page of the next block costs a page fault: up to a third of the
    time of an evaluation and a tenth of a training step, in which every micro-batch needs a gigabyte of activations.
    """
    if device.type == "cpu" and (mallopt := _glibc("mallopt")):
        for parameter in (M_TRIM_THRESHOLD, M_MMAP_THRESHOLD):
            mallopt(parameter, 2**31 - 1)  # the largest int: in effect never return anything


def trim_heap() -> None:
    """Return the memory that the C library keeps to the system (glibc on Linux)."""
    if trim := _glibc("malloc_trim"):
        trim(0)


def trim_heap_if_scarce() -> None:
    """The same if the machine has less memory left than twice what this process holds."""
    if available_bytes() < 2 * psutil.Process().memory_info().rss:
        trim_heap()


def _glibc(function: str) -> Callable[..., int] | None:
    return getattr(ctypes.CDLL(None), function, None) if sys.platform == "linux" else None


def free(device: torch.device) -> None:
    """Release cached blocks, so that a smaller batch finds room in one piece."""
    gc.collect()
    trim_heap()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    if device.type == "mps":
        torch.mps.empty_cache()


def product(left: Tensor, right: Tensor, dtype: torch.dtype | None) -> Tensor:
    """(P, D) and (V, D) fp32 -> (P, V) fp32; with bf16, the factors may be rounded to it, where that is faster."""
    if dtype == torch.bfloat16 and left.device.type == "cuda":
        return torch.mm(left.to(dtype), right.to(dtype).T, out_dtype=torch.float32)
    with products_in(dtype):
        return left @ right.T


@contextlib.contextmanager
def products_in(dtype: torch.dtype | None) -> Iterator[None]:
    """On a CPU, compute products of fp32 matrices as if rounded to bf16, with its fast instructions; sums stay fp32.

    Any other dtype changes nothing.
    """
    if dtype != torch.bfloat16 or not torch.backends.mkldnn.is_available():
        yield
        return
    settings = torch.backends.mkldnn.matmul
    before = settings.fp32_precision
    settings.fp32_precision = "bf16"
    try:
        yield
    finally:
        settings.fp32_precision = before
