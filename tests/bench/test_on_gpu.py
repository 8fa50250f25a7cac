"""on_gpu.py on a CPU: its parts run to their end, and one that fails or takes too long loses none of the others."""

import gzip
import json
import math
import time
from pathlib import Path

import pytest
import torch

import gpu_worker
import on_gpu
from on_gpu import Part
from tests.bench.test_harness import numbers


@pytest.fixture
def folders(base, small_dataset, tmp_path):
    """The environment of a benchmark: the demo's model and pairs in place of Qwen3's and HH-RLHF's."""
    data = tmp_path / "pairs"
    data.mkdir()
    for name in ("train", "test"):
        content = (Path(small_dataset) / f"{name}.jsonl").read_bytes()
        (data / f"{name}.jsonl.gz").write_bytes(gzip.compress(content))
    return {"QWEN3_DIR": base, "HH_RLHF_DIR": str(data)}


@pytest.mark.skipif(torch.cuda.is_available(), reason="what it does with a GPU is up to the GPU")
def test_a_quick_run_measures_what_a_cpu_can_and_says_what_it_cannot(run_script, folders, tmp_path):
    parts = ["machine", "train", "tests", "caps", "resume", "chat", "sample"]
    words = ["--quick", "--json", "out.json", "--minutes", 20, "--parts", *parts]
    result = run_script("bench/on_gpu.py", *words, env=folders, timeout=1200)
    assert result.returncode == 0, result.stdout + result.stderr
    figures = json.loads((tmp_path / "out.json").read_text())
    assert all(map(math.isfinite, numbers(figures)))
    skipped = {name for name, found in figures.items() if "skipped" in found}
    assert {"caps: 12 GB card", "caps: out of memory", "resume: no compile"} <= skipped
    done = figures.keys() - skipped - {"goals"}
    assert done == {"machine", "train: default", "train: lora", "tests", "resume: full", "chat", "sample"}
    assert figures["machine"]["matmul_tflops"] > 0 and figures["chat"]["tokens_per_s_of_8"] > 0
    for way in ("ours", "dynamic cache", "static cache"):
        assert figures["sample"][f"{way}: tokens_per_s"] > 0
    for name in ("train: default", "train: lora"):
        found = figures[name]
        assert len(found["loss"]) == len(found["steps_s"]) == 4 and found["tokens_per_s"] > 0
        assert found["allocated_gib"] > 0 and f"\n| {name} | {found['tokens_per_s']:,.0f} |" in result.stdout
    assert figures["tests"]["counts"]["passed"] >= 8
    assert figures["resume: full"]["was_killed_in_time"]
    sampling, *after_kills = figures["goals"]
    assert sampling["name"] == "sampling against transformers" and sampling["measured"] > 0
    for goal in after_kills:
        assert goal["measured"] == 0 and "after a kill differ by" in goal["name"]
    assert len(after_kills) == 2


def inputs_in(folder, is_quick=False):
    return gpu_worker.Inputs(str(folder), "no model", "no tokenizer", "no pairs", is_quick, "seconds")


def test_a_part_that_fails_or_takes_too_long_loses_none_of_the_others(tmp_path, monkeypatch, capsys):
    file = tmp_path / "out.json"
    parts = [
        Part("slow", "machine", limit=0.2),
        Part("failing", "chat", limit=300),
        Part("unknown", "no such job", limit=300),
        Part("left out", "machine", 300, skipped="needs another machine"),
    ]
    found = on_gpu.measure(parts, inputs_in(tmp_path), time.monotonic() + 300, file)
    written = json.loads(file.read_text())
    assert written == {**found, "goals": []}
    assert written["slow"]["failed"] == "not done after 0 s" and written["slow"]["took_s"] < 20
    assert "no tokenizer" in written["failing"]["failed"] and "Traceback" in written["failing"]["output"]
    assert written["unknown"]["failed"] == "KeyError: 'no such job'"
    assert written["left out"] == {"skipped": "needs another machine"}
    assert [line.split(":")[0] for line in capsys.readouterr().out.splitlines()] == [part.name for part in parts]


def test_a_part_that_dies_is_recorded(tmp_path, monkeypatch):
    (tmp_path / "gpu_worker.py").write_text("print('so far'); raise SystemExit(7)")
    monkeypatch.setattr(on_gpu.harness, "BENCH", tmp_path)
    found = on_gpu.run_part(Part("dying", "machine", 300), inputs_in(tmp_path), 300)
    assert found["failed"] == "it ended with exit code 7 and without figures" and found["output"] == "so far\n"


def test_no_part_starts_without_time_for_it(tmp_path):
    found = on_gpu.measure([Part("late", "machine", 60)], inputs_in(tmp_path), time.monotonic() + 5, None)
    assert found == {"late": {"skipped": "no time left"}}


def test_goals_compare_what_was_measured_and_survive_what_is_not_a_number():
    trained = {"mfu": 0.55, "is_compiled": True, "tokens_per_s": 1e5, "loss": [0.7, 0.69, 0.71, 0.68]}
    figures = {
        "train: default": trained,
        "caps: out of memory": {"loss": [0.7, 0.694, 0.71, 0.1]},
        "resume: full": {"killed: weights differ by": 0.0, "killed: moments differ by": 1e-9},
    }
    mfu, losses, weights, moments = on_gpu.goals_of(figures)
    assert mfu.is_met and losses.is_met and weights.is_met and not moments.is_met
    assert losses.measured == pytest.approx(0.004)
    not_a_number = on_gpu.finite({"loss": [0.7, math.nan, 0.71]})
    goals = on_gpu.goals_of(figures | {"caps: out of memory": not_a_number, "trl": {"failed": "it ended"}})
    assert [goal.is_met for goal in goals] == [True, False, True, False]


def test_files_are_the_same_only_bit_by_bit(tmp_path):
    from safetensors.torch import save_file

    for name, value in (("a", 0.0), ("b", 0.0), ("c", -0.0), ("d", 0.5)):
        save_file({"weight": torch.tensor([value, 1.0])}, tmp_path / name)
    differences = [gpu_worker.largest_difference(tmp_path / "a", tmp_path / name) for name in "bcd"]
    assert differences[0] == 0 < differences[1] < 1e-300 and differences[2] == 0.5
