"""What the first matrix product of a new shape costs on a CPU, compared with later ones of the same shape.

    python bench/shapes.py

oneDNN compiles a kernel for each new shape of a bf16 product and keeps a thousand of them. This measures a layer's
product for many numbers of tokens, and attention's products for many lengths, once and then again: how much longer the
first time takes, and how much memory remains allocated. This is why the widths of packed rows are multiples of
`packing.WIDTH_STEP` and why attention's tiles begin and end at multiples of `attention.KEY_BLOCK`.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import harness

SHAPES = 200
PASSES = 3


def main() -> None:
    arguments = harness.parser(__doc__).parse_args()
    import torch

    torch.manual_seed(0)
    count = 10 if arguments.quick else SHAPES
    weight = torch.randn(768, 256).bfloat16()
    inputs = torch.randn(3000 + count, 256).bfloat16()
    query, key = torch.randn(2, 512, 128).bfloat16(), torch.randn(2, 128, 100 + count).bfloat16()

    def layer(size: int) -> Any:
        return inputs[: 3000 + size] @ weight.T

    def attention(size: int) -> Any:
        return torch.bmm(query, key[:, :, : 100 + size])

    where = harness.machine()
    print(f"{harness.describe(where)}\n\n{count} shapes of each product, bf16\n", flush=True)
    clock = time.perf_counter if arguments.clock == "wall" else time.process_time
    products = {"a layer's, 3,000 tokens and more": layer, "attention's": attention}
    found = {name: measure(product, count, clock) for name, product in products.items()}
    rows = [
        [name, f"{1000 * one['first']:.2f} ms", f"{1000 * one['again']:.2f} ms", f"{one['kept_mib']:.2f} MiB"]
        for name, one in found.items()
    ]
    print(harness.table(("product", "the first time", "again", "memory that stays, a shape"), rows))
    harness.write_json(arguments.json, {"machine": where, **found})


def measure(product: Callable[[int], Any], count: int, clock: Callable[[], float]) -> dict[str, float]:
    """Per shape: mean seconds of the first pass and of the fastest later one, and growth of memory in MiB."""
    product(0)
    before, passes = resident_mib(), []
    for _ in range(PASSES):
        started = clock()
        for size in range(1, count + 1):
            product(size)
        passes.append((clock() - started) / count)
    return {"first": passes[0], "again": min(passes[1:]), "kept_mib": (resident_mib() - before) / count}


def resident_mib() -> float:
    """Resident memory of this process on Linux; 0 elsewhere, so that no growth is reported."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return 0.0
    return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS:")) / 1024


if __name__ == "__main__":
    main()
