"""The FLOPs that a training step needs, counted exactly, as a share of what this machine can compute in that time.

    QWEN3_DIR=... HH_RLHF_DIR=... python bench/flops.py [HIDDEN] [--lora] [--attention sdpa] [--pairs 64]

The model is Qwen3's architecture with 4 layers of width HIDDEN (default 512), trained on real HH-RLHF pairs in the
precision that is fast here and without gradient checkpointing. Each round times a whole step (building batches,
forward, backward, clipping, AdamW) and, right before and after it, matrix products of the model's own shapes. The share
is needed FLOPs / time / rate of these products. Measuring the rate in every round matters because the speed of a shared
machine changes from minute to minute.
"""

from __future__ import annotations

import argparse
import math
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import needed_arithmetic
from modeling import fused, pretrained, speedups, tokenizers

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))


def write_small_base(config_folder: str, folder: Path, hidden: int, layers: int = 4) -> None:
    """Qwen3's architecture with fewer and narrower layers, the real vocabulary, and random weights."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    torch.manual_seed(0)
    config = AutoConfig.from_pretrained(config_folder)
    config.hidden_size, config.intermediate_size = hidden, 3 * hidden
    config.num_hidden_layers = config.max_window_layers = layers
    config.layer_types = config.layer_types[:1] * layers  # all of them are full attention
    config.num_attention_heads, config.num_key_value_heads = hidden // 64, hidden // 128
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    AutoTokenizer.from_pretrained(config_folder).save_pretrained(folder)


def product_rate(hidden: int, device: Any, dtype: Any) -> float:
    """FLOP/s of products of (4096, hidden) and (hidden, 3 · hidden) in `dtype`, the best of eight."""
    import torch

    inputs = torch.randn(4096, hidden, device=device).to(dtype)
    weights = torch.randn(3 * hidden, hidden, device=device).to(dtype)
    seconds = []
    for _ in range(8):
        started = now(device)
        for _ in range(4):
            inputs @ weights.t()
        seconds.append(now(device) - started)
    return 4 * 2 * 4096 * hidden * 3 * hidden / min(seconds)


def now(device: Any) -> float:
    """Seconds: on a GPU wall time, on a CPU the processor time of this process per thread."""
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() if device.type != "cpu" else time.process_time() / torch.get_num_threads()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("hidden", type=int, nargs="?", default=512)
    parser.add_argument("--lora", action="store_true")
    parser.add_argument("--attention", default="auto")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--pairs", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    config_folder, dataset = os.environ.get("QWEN3_DIR"), os.environ.get("HH_RLHF_DIR")
    if not config_folder or not dataset:
        sys.exit("set QWEN3_DIR and HH_RLHF_DIR; see the top of this file")
    import torch

    import data
    import models
    import train_rm
    import utils
    from common import prefetch
    from data_pipeline import packing, sampler
    from modeling import devices
    from training import distributed

    with tempfile.TemporaryDirectory() as folder:
        write_small_base(config_folder, Path(folder), arguments.hidden)
        tokenizer = tokenizers.load_tokenizer(folder)
        lora = pretrained.LoraSettings() if arguments.lora else None
        model = models.RewardModel.create(folder, tokenizer, 0, lora).to(devices.pick_device()).train()
    devices.keep_heap(model.device)
    pairs, _ = data.load_pairs(dataset, tokenizer, 2048)
    precision = devices.fastest_precision(model.device)
    model.autocast_dtype = devices.autocast_dtype(model.device, precision)
    dtype = model.autocast_dtype or torch.float32
    way = model.use_attention(arguments.attention)
    speedups.narrow_last_layer(model)
    if arguments.lora and model.autocast_dtype:
        speedups.cast_frozen_weights(model, model.autocast_dtype)
    if arguments.compile:
        speedups.compile_layers(model)
    elif model.device.type == "cpu":
        fused.fuse_layers(model)
    trained = [parameter for parameter in model.hf_model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-5, fused=True)
    indices = sampler.fixed_sample(len(pairs), arguments.pairs, 0)
    needed = needed_arithmetic.needed_flops(model, pairs.lengths[indices])

    world, pad_id = distributed.World(), tokenizer.pad_token_id

    def step() -> float:
        started = now(model.device)
        plans = packing.plan_step(pairs, indices, 4096, 32, model.attention_crossover_length())
        turns = world.assign(plans, is_training=True)
        batches = prefetch.prefetched(turns, lambda turn: (turn, packing.build(pairs, turn.plan, pad_id)))
        on_device = ((turn, batch.to(model.device)) for turn, batch in batches)
        margins = train_rm.label_margins(pairs, plans, model.device)
        train_rm.accumulate_gradients(world, model, on_device, margins, 0.0, utils.StopRequest())
        torch.nn.utils.clip_grad_norm_(trained, math.inf)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return now(model.device) - started

    step(), step()  # warms up, and compiles
    print(f"torch {torch.__version__}, {model.device}, {torch.get_num_threads()} threads, attention {way}")
    print(f"{arguments.pairs} pairs, {needed / 1e12:.3f} TFLOP needed")
    shares = []
    for _ in range(arguments.rounds):
        before = product_rate(arguments.hidden, model.device, dtype)
        seconds = step()
        after = product_rate(arguments.hidden, model.device, dtype)
        shares.append(needed / seconds / ((before + after) / 2))
        print(
            f"step {seconds:6.2f} s, needed {needed / seconds / 1e9:6.0f} GFLOP/s, "
            f"products {before / 1e9:6.0f} and {after / 1e9:6.0f}: {shares[-1]:.3f}",
            flush=True,
        )
    print(f"share of the products' rate: {statistics.median(shares):.3f} (median of {len(shares)})")


if __name__ == "__main__":
    main()
