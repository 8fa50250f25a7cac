"""README.md: its flag tables are the dataclass, and its commands run."""

import dataclasses
import json
import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from chat import DEMO_RUN, ChatConfig
from eval_rm import EvalConfig
from manage_runs import ManageConfig
from tests.chat_server import Server, free_port
from tests.conftest import ROOT
from training.config import TrainConfig

README = (ROOT / "README.md").read_text(encoding="utf-8")


def code_blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def commands():
    lines = [line.split(" #")[0].strip() for block in code_blocks("bash") for line in block.splitlines()]
    return [line for line in lines if line]


def flag_rows(text):
    return re.findall(r"^\| `--(\w+)` \| (.*?) ?\| (.*) \|$", text, re.MULTILINE)


def section(title):
    return README.split(f"\n## {title}\n")[1].split("\n## ")[0]


@pytest.mark.parametrize(
    "config, title",
    [
        (TrainConfig, "Training"),
        (ManageConfig, "Managing runs"),
        (ChatConfig, "Chat"),
        (EvalConfig, "How good is it?"),
    ],
)
def test_flag_tables_are_the_dataclass(config, title):
    rows = flag_rows(section(title))
    fields = dataclasses.fields(config)
    wanted = [(f.name, "" if f.default in (None, ()) else str(f.default), f.metadata["help"]) for f in fields]
    assert rows == wanted


def test_project_structure_names_every_script_and_nothing_else():
    table = README.split("## Project structure")[1].split("## ")[0]
    named = set(re.findall(r"`(\w+\.py)`", table))
    assert named == {path.name for path in ROOT.glob("*.py")}


def test_every_command_is_of_a_kind_that_is_run():
    run_here = (
        "python train_rm.py",
        "python chat.py",
        "python eval_rm.py",
        "python manage_runs.py",
        "tensorboard ",
        "torchrun ",
    )
    run_by_ci = ("make demo", "make test", "uv venv", "uv pip install -r requirements.txt")
    for command in commands():
        assert command.startswith(run_here) or command in run_by_ci, command
    ci = (ROOT / ".ci/run").read_text()
    for command in run_by_ci:
        assert command.replace("install -r", "install --dry-run -r") in ci, command


@pytest.fixture(scope="module")
def readers_folder(tmp_path_factory, small_dataset):
    """Where a reader would stand: with a `pairs.jsonl` and a `settings.json` of their own."""
    folder = tmp_path_factory.mktemp("reader")
    (folder / "pairs.jsonl").write_bytes((Path(small_dataset) / "train.jsonl").read_bytes())
    replies = {"prompt": "What should I know about bread?", "replies": ["A hot oven gives a crisp crust.", "No."]}
    (folder / "replies.jsonl").write_text(json.dumps(replies) + "\n")
    (folder / "settings.json").write_text(json.dumps({"batch_size": 16, "lora": True}))
    return folder


def run(arguments, folder):
    return subprocess.run(
        [sys.executable, *map(str, arguments)], cwd=folder, capture_output=True, text=True, timeout=300, env=os.environ
    )


def test_training_commands_run_as_written(readers_folder, base, small_dataset):
    """Each `python train_rm.py …` of the README, in order, on the small model and for one step (later flags win)."""
    training = [shlex.split(command)[1:] for command in commands() if command.startswith("python train_rm.py")]
    assert len(training) >= 8
    for number, (script, *flags) in enumerate(training):
        small = ["--max_steps", "1", "--eval_num_batches", "1"]
        if "--resume_from" not in flags:
            small += ["--model", base]
            small += [] if "--dataset" in flags else ["--dataset", small_dataset]
            small += [] if "--run_name" in flags else ["--run_name", f"run{number}"]
        result = run([ROOT / script, *flags, *small], readers_folder)
        assert result.returncode == 0, (flags, result.stderr)


def test_commands_for_several_processes_run_as_written(readers_folder, base, small_dataset):
    """Each `torchrun …` of the README with fewer processes, on CPUs; the machines of several are all this one."""
    launches = [shlex.split(command)[1:] for command in commands() if command.startswith("torchrun")]
    assert len(launches) == 4 and sum("--nnodes" in words for words in launches) == 1
    small = ["--max_steps", "1", "--eval_num_batches", "1"]
    training = [ROOT / "train_rm.py", "--model", base, "--dataset", small_dataset, *small, "--run_name", "first"]
    if not (readers_folder / "checkpoints/rm/first").exists():
        assert run(training, readers_folder).returncode == 0
    for number, words in enumerate(launches):
        machines = int(words[words.index("--nnodes") + 1]) if "--nnodes" in words else 1
        words[words.index("--nproc_per_node") + 1] = str(2 // machines)
        words = [word.replace("HOST:29500", f"127.0.0.1:{free_port()}") for word in words]
        place = words.index("train_rm.py")
        flags = [*words[place + 1 :], *small]
        if "--resume_from" not in flags:
            flags += ["--model", base, "--dataset", small_dataset, "--run_name", f"several{number}"]
        command = [sys.executable, "-m", "torch.distributed.run", *words[:place], str(ROOT / "train_rm.py"), *flags]
        agents = [
            subprocess.Popen(command, cwd=readers_folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
            for _ in range(machines)
        ]
        outputs = [agent.communicate(timeout=300) for agent in agents]
        assert [agent.returncode for agent in agents] == [0] * machines, (words, outputs)
        said = "".join(output for output, _ in outputs)
        assert "processes: 2" in said and ("done: 1 steps" in said or "nothing to do" in said), said


def test_managing_commands_run_as_written(readers_folder, base, small_dataset):
    """Each `python manage_runs.py …` of the README, in order, after its trainings."""
    flags = ["--model", base, "--dataset", small_dataset, "--max_steps", "1", "--eval_num_batches", "1"]
    for name, more in (("first", []), ("adapter", ["--lora"])):
        if not (readers_folder / "checkpoints/rm" / name).exists():
            assert run([ROOT / "train_rm.py", *flags, "--run_name", name, *more], readers_folder).returncode == 0
    managing = [shlex.split(command)[1:] for command in commands() if command.startswith("python manage_runs.py")]
    assert len(managing) >= 8
    for script, *words in managing:
        result = run([ROOT / script, *words], readers_folder)
        assert result.returncode == 0, (words, result.stderr)
        assert result.stdout, words
    assert (readers_folder / "checkpoints/rm/first/step-1/optimizer.safetensors").exists()
    assert (readers_folder / "logs/rm/adapter").is_dir()


def test_evaluating_commands_run_as_written(readers_folder, base, small_dataset):
    """Each `python eval_rm.py …` of the README, in order, on runs of one step."""
    flags = ["--model", base, "--dataset", small_dataset, "--max_steps", "1", "--eval_num_batches", "1"]
    for name, more in (("first", []), ("adapter", ["--lora"])):
        if not (readers_folder / "checkpoints/rm" / name).exists():
            assert run([ROOT / "train_rm.py", *flags, "--run_name", name, *more], readers_folder).returncode == 0
    evaluating = [shlex.split(command)[1:] for command in commands() if command.startswith("python eval_rm.py")]
    assert len(evaluating) == 5
    for script, *words in evaluating:
        result = run([ROOT / script, *words], readers_folder)
        assert result.returncode == 0, (words, result.stderr)
        assert ("reward" in result.stdout) if "--score" in words else ("report.html" in result.stdout), words
    report = json.loads((readers_folder / "checkpoints/rm/first/reports/step-1/report.json").read_text())
    assert report["n"] == 16 and len((readers_folder / "scores.jsonl").read_text().splitlines()) == 16


def test_python_blocks_load_what_training_wrote(readers_folder, base, small_dataset):
    flags = ["--model", base, "--dataset", small_dataset, "--max_steps", "1", "--eval_num_batches", "1"]
    for name, more in (("first", []), ("adapter", ["--lora"])):
        if not (readers_folder / "checkpoints/rm" / name).exists():
            assert run([ROOT / "train_rm.py", *flags, "--run_name", name, *more], readers_folder).returncode == 0
    blocks = [block for block in code_blocks("python") if "from_pretrained" in block]
    assert len(blocks) == 2
    for block in blocks:
        code = block.replace("step-350", "step-1") + "\nassert model.score.weight.shape[0] == 1\n"
        if "reward =" in block:
            code += "assert reward.isfinite()\n"
        result = run(["-c", code], readers_folder)
        assert result.returncode == 0, result.stderr


def test_chat_commands_and_the_api_example_run_as_written(readers_folder, base, small_dataset, monkeypatch):
    """Each `python chat.py …` of the README, with the small model for the one that needs the hub."""
    monkeypatch.chdir(readers_folder)
    small = ["--max_steps", "1", "--eval_num_batches", "1"]
    if not (readers_folder / "checkpoints/rm/first").exists():
        flags = ["--model", base, "--dataset", small_dataset, "--run_name", "first", *small]
        assert run([ROOT / "train_rm.py", *flags], readers_folder).returncode == 0
    assert run([ROOT / "train_rm.py", "--demo", "--run_name", DEMO_RUN, *small], readers_folder).returncode == 0
    (example,) = (block for block in code_blocks("python") if "gradio_client" in block)
    chatting = [shlex.split(command)[2:] for command in commands() if command.startswith("python chat.py")]
    assert len(chatting) == 3
    for flags in chatting:
        more = ["--model", base, "--reward_model", "checkpoints/rm/first"] if "--autoload" in flags else []
        with Server(*flags, *more, "--port", free_port()) as server:
            result = run(["-c", example.replace("http://127.0.0.1:7860", server.url)], readers_folder)
            assert result.returncode == 0, (flags, result.stderr)
            reward, probability = map(float, result.stdout.split()[-2:])
            assert abs(reward) < 100 and 0 <= probability <= 1


def test_tensorboard_serves_the_logs(readers_folder):
    command = next(command for command in commands() if command.startswith("tensorboard"))
    arguments = [sys.executable, "-m", "tensorboard.main", *shlex.split(command)[1:], "--port", "0"]
    (readers_folder / "logs/rm").mkdir(parents=True, exist_ok=True)
    with subprocess.Popen(arguments, cwd=readers_folder, stderr=subprocess.PIPE, text=True) as process:
        served = next((line for line in process.stderr if "http://" in line), "")
        process.send_signal(signal.SIGTERM)
        process.stderr.read()
    assert re.search(r"TensorBoard [\d.]+ at http://\S+", served)
