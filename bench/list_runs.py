"""How long `manage_runs.py` takes to list a thousand runs.

    python bench/list_runs.py [RUNS]

Creates RUNS run folders (default 1,000) in a temporary folder, each with three steps of ten files, a record of 25
evaluations, a lock and an event file. Then it times the real program from start to end and prints the best and the
worst of five. The files are nearly empty, so that a thousand runs fit anywhere: it is their number that takes time.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from checkpointing import run_folder  # noqa: E402

STEP_FILES = ["chat_template.jinja", "config.json", "model.safetensors", "optimizer.safetensors",
              "random_state.safetensors", "tokenizer.json", "tokenizer_config.json", "train_config.json",
              "training_state.json", "manifest.json"]  # fmt: skip


def write_runs(work: Path, count: int) -> None:
    config = {"model": "Qwen/Qwen3-0.6B", "lora": False, "log_dir": "../../logs/rm"}
    for number in range(count):
        name = f"20240115_{number:06d}"
        folder, logs = work / "checkpoints/rm" / name, work / "logs/rm" / name
        for step in (500, 1000, 1250):
            (folder / f"step-{step}").mkdir(parents=True)
            for file in STEP_FILES:
                (folder / f"step-{step}" / file).write_bytes(b"x" * 100)
            state = {"eval_accuracy": 0.6, "eval_pairs": 1024}
            (folder / f"step-{step}" / "training_state.json").write_text(json.dumps(state))
        record = run_folder.new_record("train_rm.py", 1250, 1250, config, {})
        record.state, record.ended = run_folder.FINISHED, record.started
        shares = {step: (600 + step % 97) / 1024 for step in range(50, 1251, 50)}
        points = [run_folder.EvalPoint(step, share, share - 0.03, share + 0.03, 1024) for step, share in shares.items()]
        record.evaluations = {"accuracy": points}
        run_folder.write_record(folder, record)
        (folder / ".lock").write_text("process 1 on bench")
        logs.mkdir(parents=True)
        (logs / "events.out.tfevents.1705329022.bench.1.0").write_bytes(b"x" * 1000)


def main() -> None:
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 1000
    with tempfile.TemporaryDirectory() as folder:
        write_runs(Path(folder), count)
        print(f"{count:,} runs; Python {platform.python_version()}, {platform.machine()}, {os.cpu_count()} cores")
        for words in (["--list"], ["--list", "--sort", "accuracy"], ["--json"], ["--help"]):
            seconds = []
            for _ in range(5):
                began = time.perf_counter()
                command = [sys.executable, str(ROOT / "manage_runs.py"), *words]
                output = subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True).stdout
                seconds.append(time.perf_counter() - began)
            assert words == ["--help"] or output.count("20240115_") >= count
            print(f"  {' '.join(words):<24} {min(seconds):.2f} s to {max(seconds):.2f} s")


if __name__ == "__main__":
    main()
