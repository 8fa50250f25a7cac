"""Benchmarks without a --quick run to their end on the demo's model and a few pairs, most of them in this process."""

import gzip
import importlib
import re
import sys
from pathlib import Path

import pytest

import train_rm
from modeling import devices


@pytest.fixture
def run_main(monkeypatch, base, small_dataset, tmp_path, capsys):
    """Call a benchmark's `main` with command-line words; returns what it printed."""
    data = tmp_path / "pairs"
    data.mkdir()
    for name in ("train", "test"):
        with gzip.open(data / f"{name}.jsonl.gz", "wb") as file:
            file.write((Path(small_dataset) / f"{name}.jsonl").read_bytes())
    monkeypatch.setenv("QWEN3_DIR", base)
    monkeypatch.setenv("HH_RLHF_DIR", str(data))
    monkeypatch.setattr(devices, "keep_heap", lambda device: None)  # it would last beyond the test

    def run(script, *words):
        monkeypatch.setattr(sys, "argv", [script, *words])
        importlib.import_module(Path(script).stem).main()
        return capsys.readouterr().out

    return run


def test_the_share_of_the_machines_rate_is_measured(run_main):
    output = run_main("flops.py", "128", "--pairs", "4", "--rounds", "1")
    assert float(re.search(r"share of the products' rate: ([\d.]+)", output).group(1)) > 0


def test_tokenizing_is_timed_beside_trl_and_from_the_cache(run_main, monkeypatch):
    pytest.importorskip("trl", reason="trl is not installed: nothing to compare with")
    import tokenise

    def in_this_process(way, folder, cache):
        monkeypatch.setenv("RL_WITH_RM_CACHE", str(cache))
        return tokenise.measure(way, folder)

    monkeypatch.setattr(tokenise, "in_a_process", in_this_process)
    monkeypatch.setattr(tokenise, "WAYS", {way: tokenise.WAYS[way] for way in ("ours", "trl")})
    monkeypatch.setattr(tokenise, "ROUNDS", 1)
    output = run_main("tokenise.py", "40", "40")
    assert re.search(r"\| this project \| [\d,]+ \| [\d.]+ \|", output) and "| TRL |" in output
    assert "| from the cache |" in output


def test_one_step_is_measured_with_all_parameters_and_with_lora(run_main, monkeypatch):
    import real_shape

    # in this process; the benchmark starts `python train_rm.py FLAGS`
    monkeypatch.setattr(real_shape.subprocess, "run", lambda command, **options: train_rm.main(command[2:]))
    output = run_main("real_shape.py", "--batch_size", "4", "--grad_accum", "1")
    assert re.search(r"\| full \| [\d.]+ GiB \|", output) and re.search(r"\| lora \| [\d.]+ GiB \|", output)


def test_listing_runs_is_timed(run_script):
    result = run_script("bench/list_runs.py", "2")
    assert result.returncode == 0, result.stderr
    assert len(re.findall(r"^  --\S.* \d+\.\d+ s to \d+\.\d+ s$", result.stdout, re.MULTILINE)) == 4


def test_the_error_of_rewards_is_measured_for_each_precision(run_main, reward_checkpoint):
    output = run_main("precision.py", "--model", str(reward_checkpoint), "--quick")
    found = re.findall(r"\| (fp32|tf32|bf16) \| ([\d.]+)% \| ([\d.]+)% \|", output)
    errors = {name: float(error) for name, error, _ in found}
    assert errors["fp32"] == 0 < errors["tf32"] < errors["bf16"]
