"""bench/recipes.py trains and scores both sides on the demo's model, and goes on where it was stopped."""

import json
import re
import sys

import pytest

import recipes


@pytest.mark.slow
def test_recipes_are_trained_beside_trl_and_not_again(base, small_dataset, tmp_path, monkeypatch, capsys):
    pytest.importorskip("trl", reason="trl is not installed: nothing to compare with")
    monkeypatch.setenv("HH_RLHF_DIR", small_dataset)
    monkeypatch.setenv("RL_WITH_RM_CACHE", str(tmp_path / "cache"))
    words = ["recipes.py", "--model", base, "--seeds", "3", "--trl", "--max_steps", "2", "--work", f"{tmp_path}/work",
             "--recipes", "small head: --lora --lr 1e-3 head=0.02", "--plot", str(tmp_path / "losses.png")]  # fmt: skip
    monkeypatch.setattr(sys, "argv", words)
    recipes.main()
    table = capsys.readouterr().out.split("| recipe |")[-1]
    assert re.findall(r"\n\| small head \| (ours|TRL) \| 2 \| [\d.]+% ", table) == ["ours", "TRL"]
    assert (tmp_path / "losses.png").read_bytes().startswith(b"\x89PNG")
    figures = sorted((tmp_path / "work").glob("*seed3.json"))
    losses = {path.stem: json.loads(path.read_text())["losses"] for path in figures}
    assert all(len(values) == 2 for values in losses.values())
    # a smaller head starts nearer to ln 2
    assert abs(losses["small-head-ours-seed3"][0] - 0.6931) < 0.01
    before = {path: path.stat().st_mtime_ns for path in figures}
    recipes.main()
    assert before == {path: path.stat().st_mtime_ns for path in figures}
