"""distributed.py and launch.py: several processes on the CPU train what one would, and torchrun ends them well."""

import json
import os
import re
import signal
import socket
import subprocess
import sys

import psutil
import pytest
import torch
from safetensors.torch import load_file

from checkpointing import run_folder
from data_pipeline import packing
from tests.conftest import ROOT
from training import distributed

FLAGS = ["--batch_size", 8, "--grad_accum", 4, "--precision", "fp32", "--eval_steps", 0, "--eval_num_batches", 1,
         "--no_report"]  # fmt: skip
TEN_STEPS = [*FLAGS, "--max_steps", 10, "--epochs", 5]
LORA = ["--lora", "--lora_dropout", 0]


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    return tmp_path_factory.mktemp("work")


def torchrun(processes, *arguments):
    return ["-m", "torch.distributed.run", "--nproc_per_node", processes, ROOT / "train_rm.py", *arguments]


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="module")
def run(script_server):
    """Train with so many processes, each told of the others as torchrun does it; returns all that they printed."""

    def run(folder, processes, *arguments):
        place = {"WORLD_SIZE": processes, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
        ranks = [place | {"RANK": rank, "LOCAL_RANK": rank} for rank in range(processes)] if processes > 1 else [{}]
        scripts = [script_server.start(["train_rm.py", *arguments], folder, rank) for rank in ranks]
        results = [script.wait() for script in scripts]
        assert [result.returncode for result in results] == [0] * processes, [result.stderr for result in results]
        return "".join(result.stdout + result.stderr for result in results)

    return run


def farthest(one, other):
    """The largest difference between two checkpoints' weights, and between their optimizers' moments."""
    weights = [file.name for file in one.glob("*model.safetensors")]
    assert len(weights) == 1
    distances = []
    for name in (*weights, "optimizer.safetensors"):
        first, second = load_file(one / name), load_file(other / name)
        assert first.keys() == second.keys()
        distances.append(max((first[key] - second[key]).abs().max().item() for key in first))
    return distances


# ---------------------------------------------------------------------------------------------------------------------
# Dealing
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 2, 3, 8])
@pytest.mark.parametrize("in_lockstep", [False, True])
def test_every_micro_batch_is_dealt_once_and_nobody_has_much_more_than_others(size, in_lockstep):
    costs = [float(cost) for cost in torch.randint(100, 4000, (41,), generator=torch.Generator().manual_seed(0))]
    shares = distributed.assign_to_ranks(costs, size, in_lockstep)
    assert sorted(number for share in shares for number in share) == list(range(41))
    for share in shares:
        assert [costs[number] for number in share] == sorted((costs[number] for number in share), reverse=True)
    if in_lockstep:
        assert max(map(len, shares)) - min(map(len, shares)) <= 1
    else:
        loads = [sum(costs[number] for number in share) for share in shares]
        assert max(loads) <= max(4 / 3 * sum(costs) / size, max(costs))


def test_shares_are_uneven_where_one_micro_batch_outweighs_others():
    assert distributed.assign_to_ranks([10, 1, 1, 1], 2) == [[0], [1, 2, 3]]
    assert distributed.assign_to_ranks([10, 1, 1, 1], 2, in_lockstep=True) == [[0, 2], [1, 3]]


@pytest.mark.parametrize(
    "total, budget, size", [(40_000, 4096, 4), (40_000, 4096, 3), (5_000, 4096, 8), (300, 4096, 2)]
)
def test_the_budget_cuts_a_step_into_as_many_parts_as_all_can_share(total, budget, size):
    even = distributed.even_budget(total, budget, size)
    assert even <= budget
    parts = -(-total // even)
    assert parts % size == 0 and parts >= total / budget
    assert distributed.even_budget(total, budget, 1) == budget


def plan_of(cost):
    return packing.MicroBatchPlan([0, 1], [[0, 1]], True, 10, 10, 10, cost)


@pytest.mark.parametrize("is_sharded, turns", [(False, [1, 1, 1, 2]), (True, [2, 2, 2, 2])])
def test_a_process_without_work_keeps_the_others_company(is_sharded, turns):
    plans = [plan_of(cost) for cost in (5, 4, 3, 2, 1)]
    shares = [distributed.World(rank, 4, rank, is_sharded).assign(plans, is_training=True) for rank in range(4)]
    assert [len(share) for share in shares] == turns
    assert [share[-1].is_last for share in shares] == [True] * 4
    places = [turn.positions for share in shares for turn in share if turn.weight]
    assert sorted((place.start, place.stop) for place in places) == [(0, 2), (2, 4), (4, 6), (6, 8), (8, 10)]
    alone = [distributed.World(rank, 4, rank, is_sharded).assign(plans[:1], is_training=True) for rank in range(4)]
    assert [[turn.weight for turn in share] for share in alone] == [[4], [0], [0], [0]]


# ---------------------------------------------------------------------------------------------------------------------
# The same training
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def alone(run, work, base, demo_folder):
    """Ten steps of one process, full and LoRA: name -> checkpoint."""
    data = ["--model", base, "--dataset", demo_folder[1]]
    run(work, 1, *data, *TEN_STEPS, "--save_steps", 5, "--run_name", "full")
    run(work, 1, *data, *TEN_STEPS, *LORA, "--run_name", "lora")
    return {name: work / "checkpoints/rm" / name / "step-10" for name in ("full", "lora")}


@pytest.mark.parametrize(
    "kind, sharing, processes",
    [
        ("full", "ddp", 2),
        ("full", "ddp", 4),
        ("full", "fsdp", 2),
        ("full", "fsdp", 4),
        ("lora", "ddp", 2),
        ("lora", "fsdp", 4),
    ],
)
def test_several_processes_reach_the_weights_of_one(run, work, base, demo_folder, alone, kind, sharing, processes):
    name = f"{kind}-{sharing}-{processes}"
    flags = [*(LORA if kind == "lora" else []), *(["--fsdp"] if sharing == "fsdp" else [])]
    data = ["--model", base, "--dataset", demo_folder[1]]
    output = run(work, processes, *data, *TEN_STEPS, *flags, "--run_name", name, "--save_steps", 5)
    assert f"processes: {processes}, {'FSDP2' if sharing == 'fsdp' else 'DDP'}" in output
    assert len(re.findall(r"^step 10/10 ", output, re.MULTILINE)) == 1, "more than one process spoke"
    assert "Warning" not in output
    final = work / "checkpoints/rm" / name / "step-10"
    weights, moments = farthest(alone[kind], final)
    assert weights < 1e-5 and moments < 1e-6
    assert farthest(final, final.parent / "step-5")[0] > 4e-5, "the steps changed next to nothing"
    assert len(list((work / "logs/rm" / name).glob("events.*"))) == 1
    figures = [json.loads((folder / "training_state.json").read_text()) for folder in (alone[kind], final)]
    assert figures[0]["eval_value"] == figures[1]["eval_value"]


def test_fewer_pairs_than_processes(run, work, base, small_dataset):
    """64 pairs, 21 a step: the last step has one pair for four processes."""
    flags = ["--model", base, "--dataset", small_dataset, *FLAGS, "--batch_size", 7, "--grad_accum", 3]
    run(work, 1, *flags, "--run_name", "few-1")
    run(work, 4, *flags, "--run_name", "few-4", "--fsdp")
    runs = work / "checkpoints/rm"
    assert max(farthest(runs / "few-1/step-4", runs / "few-4/step-4")) < 1e-5


def test_an_encoder_trains_in_two_processes(run, work, tokenizer, small_dataset):
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64,
        pad_token_id=tokenizer.pad_token_id, num_labels=1, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    BertForSequenceClassification(config).save_pretrained(work / "bert")
    tokenizer.save_pretrained(work / "bert")
    flags = ["--model", "bert", "--dataset", small_dataset, *FLAGS]
    for processes in (1, 2):
        assert "one sequence per row" in run(work, processes, *flags, "--run_name", f"bert-{processes}")
    runs = work / "checkpoints/rm"
    assert max(farthest(runs / "bert-1/step-2", runs / "bert-2/step-2")) < 1e-5


# ---------------------------------------------------------------------------------------------------------------------
# Resuming
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("processes, sharing", [(1, "--no_fsdp"), (4, "--no_fsdp")])
def test_a_checkpoint_of_two_processes_goes_on_with_others(run, work, base, demo_folder, alone, processes, sharing):
    two = work / "checkpoints/rm/two"
    if not two.exists():
        data = ["--model", base, "--dataset", demo_folder[1]]
        run(work, 2, *data, *TEN_STEPS, "--fsdp", "--save_steps", 5, "--run_name", "two")
    name = f"from-two-{processes}{sharing}"
    run(work, processes, "--resume_from", two / "step-5", sharing, "--run_name", name)
    assert max(farthest(alone["full"], work / "checkpoints/rm" / name / "step-10")) < 1e-5


@pytest.mark.parametrize("sharing", ["--no_fsdp", "--fsdp"])
def test_two_processes_resume_bitwise_with_dropout(run, work, base, small_dataset, sharing):
    flags = ["--model", base, "--dataset", small_dataset, *FLAGS, "--lora", "--lora_dropout", 0.2, "--epochs", 2]
    straight = work / f"checkpoints/rm/straight{sharing}"
    run(work, 2, *flags, sharing, "--save_steps", 2, "--run_name", straight.name)
    run(work, 2, "--resume_from", straight / "step-2", "--run_name", f"resumed{sharing}")
    assert farthest(straight / "step-4", straight.with_name(f"resumed{sharing}") / "step-4") == [0, 0]
    assert farthest(straight / "step-4", straight / "step-2")[0] > 0


# ---------------------------------------------------------------------------------------------------------------------
# Ending early
# ---------------------------------------------------------------------------------------------------------------------


def begin(script_server, folder, name, *arguments):
    """Start torchrun with two processes and wait for their fourth step; (torchrun's script, the others by rank)."""
    words = torchrun(2, *arguments, "--run_name", name, "--save_steps", 0)
    launcher = script_server.start(words, folder)
    launcher.wait_for(r"step ([4-9]|\d\d)")
    children = psutil.Process(launcher.pid).children()
    ranks = {int(child.environ()["RANK"]): child for child in children if "RANK" in child.environ()}
    return launcher, ranks


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such signals")
@pytest.mark.parametrize("number, sharing", [(signal.SIGINT, "--no_fsdp"), (signal.SIGTERM, "--fsdp")])
def test_a_signal_to_torchrun_saves_the_last_completed_step(
    script_server, run, work, base, demo_folder, alone, number, sharing
):
    name = f"{number.name}{sharing}"
    data = ["--model", base, "--dataset", demo_folder[1]]
    launcher, _ = begin(script_server, work, name, *data, *FLAGS, "--epochs", 5, sharing)
    launcher.send_signal(number)
    ended = launcher.wait(60)
    assert ended.returncode not in (0, -signal.SIGKILL)
    text = ended.stdout + ended.stderr
    (saved,) = (work / "checkpoints/rm" / name).glob("step-*")
    assert f"saved {saved.relative_to(work)} (the last completed step)" in text
    assert run_folder.read_record(saved.parent).state == run_folder.STOPPED
    assert text.count("stopped\n") == 1 and "terminate called" not in text and 'train_rm.py", line' not in text
    step = int(saved.name.removeprefix("step-"))
    if step < 10:
        run(work, 1, "--resume_from", saved, "--max_steps", 10, "--no_fsdp")
        assert max(farthest(alone["full"], saved.with_name("step-10"))) < 1e-5
    else:  # a fast machine: it has gone further than what it is compared with
        assert step <= 250


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such signals")
@pytest.mark.parametrize("sharing, rank", [("--no_fsdp", 1), ("--fsdp", 0)])
def test_a_process_that_dies_ends_the_run_within_a_minute_and_says_so(
    script_server, work, base, demo_folder, sharing, rank
):
    name = f"dead-{rank}{sharing}"
    data = ["--model", base, "--dataset", demo_folder[1]]
    launcher, ranks = begin(script_server, work, name, *data, *FLAGS, "--epochs", 5, sharing)
    ranks[rank].send_signal(signal.SIGKILL)
    ended = launcher.wait(60)
    assert ended.returncode == 1
    text = ended.stdout + ended.stderr
    assert f"rank      : {rank}" in text and "SIGKILL" in text
    survivor = ranks[1 - rank]
    assert not survivor.is_running() or survivor.status() == psutil.STATUS_ZOMBIE
    folder = work / "checkpoints/rm" / name
    if rank != 0:
        assert run_folder.read_record(folder).state == run_folder.CRASHED
        assert "another process of this run has ended" in run_folder.read_record(folder).cause
    if rank != 0 and sharing == "--no_fsdp":
        assert len(list(folder.glob("step-*"))) == 1, "the main process had whole weights and did not save them"


# ---------------------------------------------------------------------------------------------------------------------
# Wrong launches
# ---------------------------------------------------------------------------------------------------------------------


STUCK = """
import ctypes, sys, threading, time
sys.path.insert(0, {root!r})
import utils
from training import launch

with utils.StopRequest() as stop, launch.ended_if_stuck(stop, seconds=0.3):
    threading.Timer(2, print, ["here"], {{"flush": True}}).start()  # once the lines below are reached
    if {is_stuck}:  # in a call that no signal interrupts, and that lets other threads run, as the GPU's driver does
        lock = (ctypes.c_char * 256)()
        for _ in range(2):
            ctypes.CDLL(None).pthread_mutex_lock(lock)
    while stop.signal_number is None:
        time.sleep(0.01)
    time.sleep(1)
print("ended by itself", flush=True)
"""


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such signals")
@pytest.mark.parametrize("is_stuck", [True, False])
def test_a_process_that_is_stuck_in_the_driver_still_ends_when_asked_to(is_stuck):
    code = STUCK.format(root=str(ROOT), is_stuck=is_stuck)
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "here\n"
    process.send_signal(signal.SIGTERM)
    output, errors = process.communicate(timeout=60)
    assert ("is stuck" in errors, "ended by itself" in output) == (is_stuck, not is_stuck)
    assert process.returncode == (143 if is_stuck else 0)


@pytest.mark.parametrize(
    "environment, wanted",
    [
        ({"SLURM_STEP_NUM_TASKS": "4"}, "srun started 4 copies"),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, "mpirun started 2 copies"),
        ({"WORLD_SIZE": "2"}, "RANK, LOCAL_RANK, MASTER_ADDR, MASTER_PORT"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE is not a number"),
    ],
)
def test_unconnected_copies_are_refused(run_script, tmp_path, environment, wanted):
    result = run_script("train_rm.py", env=environment)
    error = result.stderr
    assert result.returncode == 2 and wanted in error
    assert "torchrun" in error + "torchrun" * ("two" in environment.values())
    assert not list(tmp_path.iterdir())


def test_one_process_where_two_were_asked_of_accelerate_is_refused(tmp_path):
    words = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", 2, ROOT / "train_rm.py"]
    result = subprocess.run(list(map(str, words)), cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert result.returncode != 0
    assert "`accelerate launch` was asked for 2 processes and started one" in result.stderr
    assert not list(tmp_path.iterdir())


def test_fsdp_of_one_process_is_refused(run_script, base, small_dataset):
    result = run_script("train_rm.py", "--model", base, "--dataset", small_dataset, "--fsdp")
    assert result.returncode == 2 and "this is one" in result.stderr
    assert "torchrun --nproc_per_node N train_rm.py --fsdp" in result.stderr


def test_processes_that_were_not_started_alike_are_refused(script_server, tmp_path, base, small_dataset):
    environment = {"WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    flags = ["--model", base, "--dataset", small_dataset, *FLAGS, "--run_name", "unlike"]
    started = [
        script_server.start(
            ["train_rm.py", *flags, "--lr", rate], tmp_path, environment | {"RANK": rank, "LOCAL_RANK": rank}
        )
        for rank, rate in enumerate(("1e-4", "1e-5"))
    ]
    first, _ = (script.wait(120) for script in started)
    assert first.returncode == 2
    assert "not started alike" in first.stderr and "lr: 0.0001 in process 0, 1e-05 in process 1" in first.stderr
    assert not list((tmp_path / "checkpoints/rm").iterdir()), "a run folder was left"


def test_a_bad_flag_is_said_once(script_server, tmp_path):
    result = script_server.run(torchrun(2, "--epochs", 0), tmp_path)
    assert result.returncode != 0 and result.stderr.count("expected at least 1") == 1


def test_nobody_to_connect_with_is_said(run_script):
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "no port"}
    result = run_script("train_rm.py", env={"WORLD_SIZE": 2, "RANK": 1, "LOCAL_RANK": 1, **place})
    assert result.returncode == 4
    assert "cannot be connected" in result.stderr and "127.0.0.1:no port" in result.stderr
