"""manage_runs.py: on folders made by real trainings, as functions, as a program, and in a pseudo-terminal."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace

import pytest

import manage_runs
import utils
from checkpointing import manifest, resolve, run_folder
from checkpointing.run_folder import best_step, step_folders
from common import file_locks
from run_manager import deletion_plan, inventory, questions, trash
from tests.conftest import ROOT

needs_pty = pytest.mark.skipif(os.name == "nt", reason="this platform has no pseudo-terminals: prompts are not driven")
needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="forks its victims")

# ---------------------------------------------------------------------------------------------------------------------
# Runs to look at: made once by real trainings, copied for each test
# ---------------------------------------------------------------------------------------------------------------------


class Forked:
    """A script's `main` in a forked child, which has torch imported already; otherwise like a subprocess.Popen."""

    def __init__(self, main, folder, *arguments):
        reading, writing = os.pipe()
        sys.stdout.flush()
        self.pid = os.fork()
        if self.pid == 0:
            code = 70  # not an exit code of run_script
            try:
                os.dup2(writing, 1)
                os.dup2(writing, 2)
                sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1)
                for number in (signal.SIGINT, signal.SIGTERM):
                    signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
                os.chdir(folder)
                sys.argv = ["script.py", *map(str, arguments)]
                code = utils.run_script(main)
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)
        os.close(writing)
        self.stdout, self.returncode = os.fdopen(reading), None

    def poll(self):
        if self.returncode is None and (found := os.waitpid(self.pid, os.WNOHANG))[0]:
            self.returncode = os.waitstatus_to_exitcode(found[1])
        return self.returncode

    def wait(self):
        if self.returncode is None:
            self.returncode = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        return self.returncode

    def communicate(self):
        text = self.stdout.read()
        self.wait()
        return text

    def send_signal(self, number):
        if self.poll() is None:
            os.kill(self.pid, number)


def train(folder, *flags):
    import train_rm

    return Forked(train_rm.main, folder, *flags)


def stop_at_step_3(process, number):
    """Send a signal once two steps were made."""
    seen = []
    for line in process.stdout:
        seen.append(line)
        if line.startswith("saved") and "step-2" in line:
            process.send_signal(number)
            break
    process.stdout.read()
    assert process.wait() != 0, seen


@pytest.fixture(scope="session")
def small_flags(base, small_dataset):
    return ["--model", base, "--dataset", small_dataset, "--batch_size", "8", "--grad_accum", "2", "--lora",
            "--eval_num_batches", "1", "--lr", "1e-3", "--no_report"]  # fmt: skip


@pytest.fixture(scope="module")
def trained(small_flags, tmp_path_factory):
    """A finished run, one resumed from it, one stopped, one killed, one that crashed."""
    folder = tmp_path_factory.mktemp("trained")
    each_step = ["--eval_steps", "1", "--save_steps", "1"]
    finished = train(folder, *small_flags, *each_step, "--run_name", "first", "--seed", "3")
    # a rate that makes every later loss infinite or not a number: ten such steps in a row end the run
    crashed = train(folder, *small_flags, "--lr", "1e30", "--max_grad_norm", "0", "--epochs", "20",
                    "--run_name", "crashed", "--eval_steps", "0")  # fmt: skip
    assert finished.communicate() and finished.returncode == 0
    assert "in a row" in crashed.communicate()
    long = [*small_flags, *each_step, "--epochs", "500"]
    stopped, killed = (train(folder, *long, "--run_name", name) for name in ("stopped", "killed"))
    stop_at_step_3(stopped, signal.SIGINT)
    stop_at_step_3(killed, signal.SIGKILL)
    assert stopped.returncode == 130 and killed.returncode == -signal.SIGKILL
    for dead in (folder / "checkpoints/rm").glob("*/.tmp-*"):  # chance: did the kill meet a save?
        shutil.rmtree(dead) if dead.is_dir() else dead.unlink()
    branch = train(folder, "--resume_from", "checkpoints/rm/first/step-2", "--run_name", "branch", "--save_steps", "0")
    assert "done: 4 steps" in branch.communicate()
    return folder


@pytest.fixture
def work(trained, tmp_path, monkeypatch):
    """A copy of them in a folder of its own, beside something that must not be touched."""
    folder = tmp_path / "work"
    shutil.copytree(trained, folder, symlinks=True)
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "precious.txt").write_text("do not touch")
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture
def run_here(capsys, monkeypatch):
    """Run the program in this process and folder, without a terminal; returns its exit code and output."""
    handlers = {number: signal.getsignal(number) for number in utils.STOP_SIGNALS}
    monkeypatch.delenv("COLUMNS", raising=False)  # readline leaves the size of another terminal in the environment

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["manage_runs.py", *map(str, arguments)])
        capsys.readouterr()
        code = utils.run_script(manage_runs.main)
        found = capsys.readouterr()
        return SimpleNamespace(returncode=code, stdout=found.out, stderr=found.err)

    yield run
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture
def manage(work, run_here):
    """Run the program in the copy of the runs."""
    return run_here


def objects(manage, *arguments):
    result = manage("--json", *arguments)
    assert result.returncode == 0, result.stderr
    return {run["name"]: run for run in json.loads(result.stdout)}


def tree(folder):
    """Everything beneath a folder but locks and empty trashes: what a test means by 'as it was'."""
    found = {}
    for path in sorted(Path(folder).rglob("*")):
        if path.name in (".lock", ".trash", ".trash-rm", ".trash-sft", ".trash-grpo"):
            continue
        way = str(path.relative_to(folder))
        found[way] = os.readlink(path) if path.is_symlink() else path.read_bytes() if path.is_file() else "folder"
    return found


def roots_of(work):
    return [inventory.Roots(work / "checkpoints/rm", work / "logs/rm")]


def scanned(work):
    return {run.name: run for run in inventory.scan(roots_of(work))[0]}


@pytest.fixture
def training(work, small_flags):
    """A run that is being trained while the test runs."""
    flags = [*small_flags, "--epochs", "5000", "--save_steps", "1", "--eval_steps", "1", "--keep_checkpoints", "2"]
    process = train(work, *flags, "--run_name", "live")
    for line in process.stdout:
        if line.startswith("saved") and "step-2" in line:
            break
    drain = threading.Thread(target=process.stdout.read, daemon=True)
    drain.start()
    yield process
    process.send_signal(signal.SIGKILL)
    process.wait()
    drain.join(60)


# ---------------------------------------------------------------------------------------------------------------------
# The record of a run
# ---------------------------------------------------------------------------------------------------------------------


def test_the_state_of_a_run_follows_from_its_lock_and_record(manage):
    found = objects(manage)
    assert {name: run["state"] for name, run in found.items()} == {
        "first": "finished", "branch": "finished", "stopped": "stopped", "killed": "crashed", "crashed": "crashed",
    }  # fmt: skip
    assert found["stopped"]["cause"] == "SIGINT" and "killed" in found["killed"]["cause"]
    assert "in a row had a loss" in found["crashed"]["cause"]
    assert (found["first"]["steps_done"], found["first"]["planned_steps"]) == (4, 4)
    assert found["killed"]["steps_done"] >= 2 and found["killed"]["planned_steps"] == 2000
    assert found["branch"]["resumed_from"] == os.path.join("first", "step-2")
    assert found["first"]["training"] == "lora" and found["first"]["ended"] >= found["first"]["started"]


def test_accuracies_are_those_that_tensorboard_shows(manage, work):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(work / "logs/rm/first")).Reload()
    points = [(point.step, point.value) for point in events.Scalars("eval/accuracy")]
    found = objects(manage)["first"]
    assert len(points) == 4
    best = max(points, key=lambda point: (point[1], point[0]))
    for what, (step, value) in (("last", points[-1]), ("best", best)):
        assert found[what]["step"] == step and found[what]["accuracy"] == pytest.approx(value)
        low, high = found[what]["interval"]
        assert (found[what]["pairs"] == 8 and low < found[what]["accuracy"] < high) or high == pytest.approx(1)


def test_a_checkpoint_stores_how_many_pairs_its_accuracy_is_of_and_old_ones_stay_readable(work):
    from checkpointing import checkpoint

    step = work / "checkpoints/rm/first/step-2"
    assert checkpoint.read_training_state(step).eval_count == 8
    content = utils.read_json(step / "training_state.json")
    value = content.pop("eval_value")
    del content["eval_count"]
    old = content | {"num_pairs": content.pop("num_examples"), "eval_accuracy": value}  # as it was written before
    utils.write_json(step / "training_state.json", old)
    assert checkpoint.read_training_state(step).eval_value == value
    assert checkpoint.read_training_state(step).eval_count is None
    assert scanned(work)["first"].steps[1].accuracy().count == 0


def test_a_resumed_run_keeps_its_start_and_drops_later_evaluations(manage, work):
    before = run_folder.read_record(work / "checkpoints/rm/first")
    again = train(work, "--resume_from", "checkpoints/rm/first/step-2", "--eval_steps", "0")
    assert "done: 4 steps" in again.communicate()
    after = run_folder.read_record(work / "checkpoints/rm/first")
    assert (after.started, after.state) == (before.started, "finished") and after.began >= before.began
    before, after = before.evaluations["accuracy"], after.evaluations["accuracy"]
    assert [point.step for point in before] == [1, 2, 3, 4]
    assert [point.step for point in after] == [1, 2, 4]
    assert after[:2] == before[:2]


def test_a_run_killed_after_its_last_save_is_finished_by_resuming_it(work):
    folder = work / "checkpoints/rm/first"
    record = run_folder.read_record(folder)
    record.state, record.ended = run_folder.RUNNING, None
    run_folder.write_record(folder, record)
    assert scanned(work)["first"].state == "crashed"
    again = train(work, "--resume_from", folder)
    assert "nothing to do" in again.communicate()
    assert scanned(work)["first"].state == "finished"


def test_a_run_that_crashed_before_its_first_save_can_be_started_again_under_its_name(work, small_flags):
    folder = work / "checkpoints/rm/crashed"
    for step in step_folders(folder):
        shutil.rmtree(step)
    again = train(work, *small_flags, "--run_name", "crashed", "--max_steps", "1")
    assert "done: 1 step," in again.communicate()
    assert scanned(work)["crashed"].state == "finished"


# ---------------------------------------------------------------------------------------------------------------------
# Listing
# ---------------------------------------------------------------------------------------------------------------------


def names_listed(text):
    """The names in the first lines of blocks."""
    return {line.split()[1] for line in text.splitlines() if re.fullmatch(r"\d+ +\S+", line)}


def add_policies(work):
    """A run of each kind of policy beside the reward models; one has the name of a reward model's run."""
    for kind, name, metric, value in (("grpo", "better", "reward", 4.2126), ("sft", "first", "log_likelihood", -2.3)):
        folder = work / "checkpoints" / kind / name
        config = {"model": "base", "lora": True, "log_dir": f"../../logs/{kind}"}
        record = run_folder.new_record(f"train_{kind}.py", 20, 20, config, {})
        record.state = run_folder.FINISHED
        record.evaluations = {metric: [run_folder.EvalPoint(20, value, value - 0.3, value + 0.3, 128)]}
        for number in (1, 2):
            shutil.copytree(work / f"checkpoints/rm/first/step-{number}", folder / f"step-{number}")
        shutil.copytree(work / "logs/rm/first", work / "logs" / kind / name)
        run_folder.write_record(folder, record)


def test_runs_of_every_kind_are_one_list(manage, work):
    add_policies(work)
    out = manage("--list").stdout
    names = [f"rm/{name}" for name in ("first", "crashed", "stopped", "killed", "branch")]
    assert names_listed(out) == {*names, "grpo/better", "sft/first"}
    assert "best and last reward 4.213 (3.91 to 4.51) at step 20" in out and "7 runs" in out
    assert "best and last log likelihood -2.300 (-2.6 to -2) at step 20" in out and "accuracy" in out
    kinds = [(run["kind"], run["name"]) for run in json.loads(manage("--json").stdout)]
    assert len(kinds) == 7 and {("grpo", "better"), ("sft", "first"), ("rm", "first")} <= set(kinds)
    kinds = [run["kind"] for run in json.loads(manage("--json", "--sort", "accuracy").stdout)]
    assert kinds == ["rm"] * 5 + ["sft", "grpo"], "values of different metrics cannot be compared"
    shown = manage("--show", "better").stdout
    assert "reward 4.213 (3.91 to 4.51) at step 20, 128 prompts" in shown
    assert "train_grpo.py --resume_from" in shown and "eval_rm.py" not in shown
    assert [run["kind"] for run in json.loads(manage("--json", "--name", "*/first").stdout)] == ["rm", "sft"]
    assert set(objects(manage, "--output_dir", "checkpoints/rm")) == {"branch", "crashed", "first", "killed", "stopped"}


def test_a_name_that_two_kinds_have_is_asked_for_with_its_kind(manage, work):
    add_policies(work)
    before = tree(work)
    for words in (["--show", "first"], ["--delete", "first", "--yes"], ["--delete", "first/step-1", "--yes"],
                  ["--show", "better", "--against", "first"]):  # fmt: skip
        refused = manage(*words)
        assert refused.returncode == 2 and "there are 2 runs named 'first'" in refused.stderr, words
        assert "next:   the same command with rm/first or sft/first" in refused.stderr and tree(work) == before
    assert manage("--show", "sft/first").stdout.startswith("sft/first: finished\n")
    guess = manage("--delete", "sft/frist", "--yes")
    assert guess.returncode == 2 and "did you mean 'sft/first'" in guess.stderr and tree(work) == before
    result = manage("--delete", "sft/first", "better", "rm/first/step-1", "--yes")
    assert result.returncode == 0 and "sft/first  " in result.stdout and "rm/first/step-1  " in result.stdout
    assert not (work / "checkpoints/sft/first").exists() and not (work / "logs/grpo/better").exists()
    assert (work / "checkpoints/rm/first/step-2").is_dir() and not (work / "checkpoints/rm/first/step-1").exists()
    restored = manage("--undo")
    assert restored.returncode == 0 and "sft/first  " in restored.stdout and tree(work) == before


@pytest.mark.parametrize("words", [["--prune", "keep=last"], ["--shrink"], ["--delete_superseded"]])
def test_runs_of_every_kind_are_pruned_and_shrunk_at_once_and_restored_at_once(manage, work, words):
    add_policies(work)
    for kind, name in (("rm", "first"), ("grpo", "better")):
        shutil.copytree(work / f"checkpoints/{kind}/{name}/step-1", work / f"checkpoints/{kind}/{name}/.tmp-step-9")
    before = tree(work)
    listed = manage(*words, "--dry_run").stdout
    result = manage(*words, "--yes")
    assert result.returncode == 0, result.stderr
    for kind, name in (("rm", "first"), ("grpo", "better"), ("sft", "first")):
        folder = work / "checkpoints" / kind / name
        if words[0] == "--prune":
            assert len(step_folders(folder)) == 1
        elif words[0] == "--shrink":
            assert not list(folder.glob("step-*/optimizer.safetensors"))
        assert not list(folder.glob(".tmp-*")) or words[0] != "--delete_superseded"
        assert f"  {kind}/{name}/" in listed or (kind, words[0]) == ("sft", "--delete_superseded")
    assert manage("--undo").returncode == 0 and tree(work) == before
    assert manage("--undo").returncode == 2
    assert manage(*words, "--name", "grpo/*", "--yes").returncode == 0
    assert {way: content for way, content in tree(work).items() if "/rm" in way or "/sft" in way} == {
        way: content for way, content in before.items() if "/rm" in way or "/sft" in way
    }
    assert manage("--empty_trash", "--yes").returncode == 0 and manage("--undo").returncode == 2


def test_one_place_undoes_its_part_of_a_deletion_of_several(manage, work):
    add_policies(work)
    before = tree(work)
    assert manage("--delete", "better", "rm/first", "--yes").returncode == 0
    only_grpo = ["--output_dir", "checkpoints/grpo", "--log_dir", "logs/grpo"]
    assert manage(*only_grpo, "--undo").returncode == 0
    assert (work / "checkpoints/grpo/better").is_dir() and not (work / "checkpoints/rm/first").exists()
    assert manage("--undo").returncode == 0 and tree(work) == before


LONG = "a-long-name-that-says-all-that-was-tried-" + "x" * 60
WIDE = "報酬モデル一号機"


def words_of(text):
    return re.sub(r"(\d),(\d)", r"\1\2", text).replace(",", " ").split()


@pytest.mark.parametrize("columns", [40, 60, 80, 100, 120, 130, 200])
def test_no_width_cuts_a_value_or_breaks_a_word(manage, work, monkeypatch, columns):
    from rich.cells import cell_len

    add_policies(work)
    for folder in ("checkpoints", "logs"):
        (work / folder / "rm/branch").rename(work / folder / "rm" / LONG)
        (work / folder / "grpo/better").rename(work / folder / "grpo" / WIDE)
    monkeypatch.setenv("COLUMNS", str(columns))
    text = manage("--list").stdout
    values = ["rm/" + LONG, "grpo/" + WIDE, "sft/first", "finished", "stopped", "crashed", "2000", "log", "likelihood",
              "4.213", "LoRA", "-2.300", "reward", "accuracy", "ago"]  # fmt: skip
    assert set(values) <= set(words_of(text)), text
    assert f"{run_folder.read_record(work / 'checkpoints/grpo' / WIDE).started[:4]}-" in text
    base = next(run for run in json.loads(manage("--json").stdout) if run["name"] == "first")["base_model"]
    for line in text.splitlines():
        has_one_word = len(line.removeprefix("    from").replace("   ", " ").split()) <= 2  # a name, a path
        assert cell_len(line) <= columns or (has_one_word and (LONG in line or base in line)), line
    assert ("name" in text.splitlines()[0].split()) == (columns >= 130), "a table from 130 columns, blocks below"
    shown = manage("--show", LONG).stdout.split("next:")[0]
    for line in shown.splitlines():
        assert cell_len(line) <= columns or max(map(cell_len, line.split())) > columns - 16, line


def test_a_pipe_gets_whole_blocks_without_colours(manage, work, monkeypatch):
    monkeypatch.delenv("COLUMNS", raising=False)
    (work / "checkpoints/rm/branch").rename(work / "checkpoints/rm" / LONG)
    text = manage().stdout
    assert "\x1b" not in text and f" {LONG}\n    rm, finished, 4 of 4 steps, started " in text
    assert max(len(line) for line in text.splitlines() if LONG not in line and "from " not in line) <= 80


def test_sizes_are_the_bytes_on_disk(manage, work):
    for name, run in objects(manage).items():
        for root, key in (("checkpoints", "checkpoint_bytes"), ("logs", "log_bytes")):
            wanted = sum(path.stat().st_size for path in (work / root / "rm" / name).rglob("*") if path.is_file())
            assert run[key] == wanted


def test_the_list_is_sorted_and_filtered(manage, work):
    assert list(objects(manage, "--sort", "name")) == ["branch", "crashed", "first", "killed", "stopped"]
    accuracies = [run["best"]["accuracy"] for run in objects(manage, "--sort", "accuracy").values() if run["best"]]
    assert len(accuracies) == 4 and accuracies == sorted(accuracies)
    sizes = [run["checkpoint_bytes"] + run["log_bytes"] for run in objects(manage, "--sort", "size").values()]
    assert sizes == sorted(sizes)
    assert set(objects(manage, "--state", "crashed")) == {"killed", "crashed"}
    assert set(objects(manage, "--name", "*ed")) == {"stopped", "killed", "crashed"}
    assert objects(manage, "--older_than", "7d") == {}
    record = run_folder.read_record(work / "checkpoints/rm/first")
    record.started = (datetime.now(UTC) - timedelta(days=8)).isoformat()
    run_folder.write_record(work / "checkpoints/rm/first", record)
    assert set(objects(manage, "--older_than", "7d")) == {"first"}
    assert objects(manage, "--older_than", "9d") == {}


@pytest.mark.parametrize("age", ["7", "7x", "-1d", "²d", "1.5d", "", "9999999d", "7D"])
def test_an_invalid_age_is_rejected(manage, age):
    result = manage("--list", "--older_than", age)
    assert result.returncode == 2 and "--older_than" in result.stderr


def test_torch_is_never_imported(work):
    commands = [["--list"], ["--json"], ["--show", "first"], ["--delete", "branch", "--yes"], ["--undo"]]
    code = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r}); import manage_runs\n"
        f"for words in {commands!r}:\n"
        "    manage_runs.main(words)\n"
        "    assert not {'torch', 'tensorflow', 'transformers'} & set(sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=work, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr


def test_help_waits_for_no_library():
    code = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r}); import manage_runs\n"
        "try: manage_runs.main(['--help'])\n"
        "except SystemExit: pass\n"
        "assert not {'rich', 'questionary', 'plotext', 'tensorboard', 'numpy'} & set(sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert result.returncode == 0 and "--empty_trash" in result.stdout, result.stderr


def test_a_run_that_vanishes_while_it_is_listed_is_not_an_error(work):
    folder, hidden = work / "checkpoints/rm/first", work / "hidden"
    stop = threading.Event()

    def flicker():
        while not stop.is_set():
            for path in (folder, work / "logs/rm/first", folder / "step-2"):
                path.rename(hidden)
                hidden.rename(path)

    flickering = threading.Thread(target=flicker)
    flickering.start()
    try:
        counts = {len(inventory.scan(roots_of(work))[0]) for _ in range(300)}
    finally:
        stop.set()
        flickering.join()
    assert counts <= {4, 5, 6}  # 6: checkpoints were gone, their logs were there


ODD_RECORDS = {
    "a list": "[]",
    "cut": '{"state": "fini',
    "another state": '{"state": "dancing"}',
    "numbers for texts": '{"state": 1}',
    "nested without end": "[" * 100_000,
    "not UTF-8": b"\xff\xfe\x00",
    "empty": "",
    "evaluations of nothing": None,
    "a year that no clock has": None,
    "an end that is no time": None,
}
ODD_FIELDS = {
    "evaluations of nothing": {"evaluations": [[1, 5, 0]]},
    "a year that no clock has": {"started": "0001-01-01T00:00:00+23:00"},
    "an end that is no time": {"ended": "yesterday"},
}


@pytest.mark.parametrize("kind", ODD_RECORDS)
def test_a_foreign_record_is_noted_and_does_not_crash_the_list(manage, work, kind):
    path = work / "checkpoints/rm/first/run.json"
    content = ODD_RECORDS[kind]
    if content is None:
        content = json.dumps({**utils.read_json(path), **ODD_FIELDS[kind]})
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    found = objects(manage)["first"]
    assert found["state"] == "unknown" and any("run.json cannot be read" in note for note in found["notes"])
    assert found["base_model"] and found["best"], "the checkpoints still know"
    assert manage("--show", "first").returncode == 0


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes in folders here")
@pytest.mark.parametrize("name", ["run.json", ".lock"])
def test_a_pipe_in_place_of_a_file_does_not_block(manage, work, name):
    path = work / "checkpoints/rm/first" / name
    path.unlink()
    os.mkfifo(path)
    assert objects(manage)["first"]["checkpoints"]
    if name == ".lock":
        result = manage("--delete", "first", "--yes")
        assert result.returncode == 2 and "not an ordinary file" in result.stderr and "first" in objects(manage)


def test_logs_of_another_output_dir_are_neither_claimed_nor_shown(manage, work):
    (work / "elsewhere").mkdir()
    shutil.copytree(work / "checkpoints/rm/first", work / "elsewhere/first")
    found = objects(manage, "--output_dir", "elsewhere")
    assert list(found) == ["first"] and found["first"]["log_folder"] is None
    assert any("not --log_dir" in note for note in found["first"]["notes"])
    before = tree(work / "logs")
    assert manage("--output_dir", "elsewhere", "--delete", "first", "--yes").returncode == 0
    assert tree(work / "logs") == before


def test_logs_without_checkpoints_and_checkpoints_without_logs_are_shown_and_handled(manage, work):
    shutil.rmtree(work / "checkpoints/rm/killed")
    shutil.rmtree(work / "logs/rm/stopped")
    found = objects(manage)
    assert found["killed"]["folder"] is None and found["killed"]["started"]
    assert "no logs here" in found["stopped"]["notes"]
    assert "logs only" in manage().stdout
    assert manage("--show", "killed").returncode == 0
    result = manage("--delete", "killed", "stopped", "--yes")
    assert result.returncode == 0 and "may be training" in result.stderr
    assert not (work / "logs/rm/killed").exists() and not (work / "checkpoints/rm/stopped").exists()
    assert manage("--undo").returncode == 0 and set(objects(manage)) == set(found)


def test_folders_that_are_not_runs_are_left_alone(manage, work):
    (work / "checkpoints/rm/notes").mkdir()
    (work / "checkpoints/rm/notes/todo.txt").write_text("buy milk")
    result = manage()
    assert "notes: not a run" in result.stdout and "notes" not in objects(manage)
    assert manage("--delete", "notes", "--yes").returncode == 2
    assert (work / "checkpoints/rm/notes/todo.txt").read_text() == "buy milk"


def test_without_runs_it_says_how_to_make_one(run_script, tmp_path):
    result = run_script("manage_runs.py")
    assert result.returncode == 2 and "train_rm.py" in result.stderr
    (tmp_path / "checkpoints/rm").mkdir(parents=True)
    result = run_script("manage_runs.py")
    assert result.returncode == 0 and "0 runs" in result.stdout


# ---------------------------------------------------------------------------------------------------------------------
# One run
# ---------------------------------------------------------------------------------------------------------------------


def test_one_run_shows_settings_steps_curve_and_commands(manage, work):
    text = manage("--show", "first").stdout
    assert "lora" in text and "seed" in text and "configuration against the defaults" in text
    assert "max_grad_norm" not in text, "it has its default"
    assert "step-2" in text and "branch was resumed from here" in text and "best" in text
    assert "loss by step" in text and "┤" in text
    assert f"--resume_from {Path('checkpoints/rm/first')}" in text and "tensorboard --logdir" in text
    assert "eval_rm.py" in text
    against = manage("--show", "first", "--against", "stopped").stdout
    assert "epochs" in against and "500" in against and "lr_schedule" not in against


def test_the_commands_shown_work(manage, work):
    text = manage("--show", "stopped").stdout
    command = next(line for line in text.splitlines() if "train_rm.py" in line).split()
    again = train(work, *command[2:], "--max_steps", "1")
    assert "nothing to do" in again.communicate() and again.returncode == 0


def test_truncated_logs_give_a_partial_curve_and_foreign_ones_a_message(manage, work):
    for path in (work / "logs/rm/first").glob("*tfevents*"):
        path.write_bytes(path.read_bytes()[:-7])
    assert "loss by step" in manage("--show", "first").stdout
    for path in (work / "logs/rm/first").glob("*tfevents*"):
        path.write_bytes(b"\x00garbage" * 100)
    result = manage("--show", "first")
    assert result.returncode == 0 and "loss: " in result.stdout


def test_an_ascii_terminal_gets_an_ascii_curve(work):
    result = subprocess.run([sys.executable, str(ROOT / "manage_runs.py"), "--show", "first"], cwd=work, text=True,
                            capture_output=True, env={**os.environ, "PYTHONIOENCODING": "ascii"})  # fmt: skip
    assert result.returncode == 0 and "loss by step" in result.stdout
    curve = result.stdout.split("loss by step")[1].split("next:")[0]
    assert curve.isascii() and "\\u" not in curve


# ---------------------------------------------------------------------------------------------------------------------
# Deleting and undoing
# ---------------------------------------------------------------------------------------------------------------------


def test_a_deleted_run_comes_back_byte_for_byte_until_the_trash_is_emptied(manage, work):
    before = tree(work)
    result = manage("--delete", "first", "stopped", "--yes")
    assert result.returncode == 0 and "branch was resumed from first/step-2" in result.stderr
    assert set(objects(manage)) == {"branch", "killed", "crashed"}
    assert manage("--undo").returncode == 0
    assert tree(work) == before
    assert manage("--delete", "first", "--yes").returncode == 0
    result = manage("--empty_trash", "--yes")
    assert result.returncode == 0 and "freed" in result.stdout
    assert not list((work / "checkpoints/.trash-rm").glob("2*")) and not list((work / "logs/.trash-rm").glob("2*"))
    result = manage("--undo")
    assert result.returncode == 2 and "empty" in result.stderr


def test_each_undo_takes_back_one_deletion(manage, work):
    states = [tree(work)]
    for words in (["--delete", "killed"], ["--delete", "first/step-1"], ["--prune", "keep=best,last"], ["--shrink"]):
        assert manage(*words, "--yes").returncode == 0
        states.append({way: c for way, c in tree(work).items() if ".trash" not in way})
    for state in reversed(states[:-1]):
        assert manage("--undo").returncode == 0
        assert {way: c for way, c in tree(work).items() if ".trash" not in way} == state
    assert manage("--undo").returncode == 2


def test_a_dry_run_changes_nothing(manage, work):
    assert manage("--delete", "crashed", "--yes").returncode == 0
    before = tree(work)
    for words in (["--delete", "first"], ["--prune", "keep=last"], ["--shrink"], ["--delete_superseded"],
                  ["--undo"], ["--empty_trash"]):  # fmt: skip
        result = manage(*words, "--dry_run")
        assert result.returncode == 0, result.stderr
        assert tree(work) == before


def test_without_a_terminal_it_never_asks(manage, work):
    before = tree(work)
    for words in (["--delete", "first"], ["--prune", "keep=last"], ["--shrink"]):
        result = manage(*words)
        assert result.returncode == 2 and "--yes" in result.stderr and tree(work) == before
    assert manage("--delete", "first", "--yes").returncode == 0
    result = manage("--empty_trash")
    assert result.returncode == 2 and "--yes" in result.stderr and list((work / "checkpoints/.trash-rm").glob("2*"))


def test_tensorboard_does_not_show_the_trash(manage, work):
    from tensorboard.backend.event_processing.event_multiplexer import EventMultiplexer

    assert set(EventMultiplexer().AddRunsFromDirectory(str(work / "logs/rm")).Runs()) >= {"first", "killed"}
    assert manage("--delete", "first", "--yes").returncode == 0
    shown = EventMultiplexer().AddRunsFromDirectory(str(work / "logs/rm")).Runs()
    assert "killed" in shown and not any("first" in name for name in shown)


def as_earlier_versions_did(work):
    """Turn the trash beside each root into the one inside it, whose event files had another name."""
    for name in ("checkpoints", "logs"):
        shutil.rmtree(work / name / "rm/.trash", ignore_errors=True)
        (work / name / ".trash-rm").rename(work / name / "rm/.trash")
    for path in list((work / "logs/rm/.trash").rglob("*tfevents*")):
        path.rename(path.with_name(path.name.replace("tfevents", "tf-events-in-trash")))


def test_the_trash_of_earlier_versions_is_listed_undone_and_emptied(manage, work):
    before = tree(work)
    assert manage("--delete", "first", "stopped", "--yes").returncode == 0
    as_earlier_versions_did(work)
    assert "1 deletion" in manage("--list").stdout
    assert manage("--delete", "killed", "--yes").returncode == 0
    assert "2 deletions" in manage("--list").stdout
    assert manage("--undo").returncode == 0 and manage("--undo").returncode == 0 and tree(work) == before
    assert manage("--delete", "first", "--yes").returncode == 0
    as_earlier_versions_did(work)
    assert "freed" in manage("--empty_trash", "--yes").stdout
    assert not list((work / "checkpoints/rm/.trash").glob("2*")) and not list((work / "logs/rm/.trash").glob("2*"))
    assert manage("--undo").returncode == 2


def test_a_deletion_is_undone_after_its_root_was_removed(manage, work):
    assert manage("--delete", "first", "--yes").returncode == 0
    for name in ("checkpoints", "logs"):
        shutil.rmtree(work / name / "rm")
    assert manage("--undo").returncode == 0 and set(objects(manage)) == {"first"}


@pytest.mark.parametrize("obstacle", ["a file in its place", "another file system"])
def test_a_trash_that_cannot_be_beside_its_root_is_inside_it(manage, work, monkeypatch, obstacle):
    before = tree(work)
    if obstacle == "a file in its place":
        (work / "logs/.trash-rm").write_text("")
    else:
        monkeypatch.setattr(trash, "mount_points", lambda: [str(work / "logs/rm")])
    result = manage("--delete", "first", "--yes")
    assert result.returncode == 0 and "TensorBoard shows deleted logs" in result.stderr
    assert list((work / "logs/rm/.trash").glob("*/files/first")) and not (work / "logs/rm/first").exists()
    assert "killed" in objects(manage) and "first" not in objects(manage)
    assert manage("--undo").returncode == 0
    (work / "logs/.trash-rm").is_file() and (work / "logs/.trash-rm").unlink()
    assert tree(work) == before


def test_pruning_keeps_what_was_asked_for(manage, work):
    folder = work / "checkpoints/rm/first"
    best = best_step(folder).name
    result = manage("--prune", "keep=best,last", "--name", "first", "--yes")
    assert result.returncode == 0, result.stderr
    assert {path.name for path in step_folders(folder)} == {best, "step-4"}
    assert best_step(folder).name == best
    assert manage("--undo").returncode == 0
    assert manage("--prune", "keep=2", "--name", "first", "--yes").returncode == 0
    assert [path.name for path in step_folders(folder)] == ["step-3", "step-4"]
    assert len(step_folders(work / "checkpoints/rm/stopped")) >= 2, "the filter held"


@pytest.mark.parametrize("keep", ["best", "keep=", "keep=0", "keep=²", "keep=best,,last", "keep=-1", "keep=all"])
def test_an_invalid_list_of_steps_to_keep_is_rejected(manage, work, keep):
    before = tree(work)
    result = manage("--prune", keep, "--yes")
    assert result.returncode == 2 and "--prune" in result.stderr and tree(work) == before


def test_steps_that_were_never_evaluated_are_not_pruned_to_the_best(manage, work):
    for step in step_folders(work / "checkpoints/rm/first"):
        content = utils.read_json(step / "training_state.json") | {"eval_value": None}
        utils.write_json(step / "training_state.json", content)
    result = manage("--prune", "keep=best,last", "--name", "first", "--yes")
    assert result.returncode == 0 and "none of its steps was evaluated" in result.stderr
    assert len(step_folders(work / "checkpoints/rm/first")) == 4


def test_a_shrunk_checkpoint_is_valid_and_scores_the_same_but_cannot_be_resumed(manage, work):
    import models

    folder = work / "checkpoints/rm/first"
    before = tree(folder)
    dialogue = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}]
    reward = models.RewardModel.restore(folder / "step-4").eval().score_dialogues([dialogue])
    result = manage("--shrink", "--name", "first", "--yes")
    assert result.returncode == 0, result.stderr
    for step in step_folders(folder):
        assert not (step / "optimizer.safetensors").exists() and manifest.problem(step) is None
    assert resolve.sound_checkpoint(str(folder)) == folder / "step-4"
    assert models.RewardModel.restore(folder / "step-4").eval().score_dialogues([dialogue]) == reward
    refused = train(work, "--resume_from", folder, "--epochs", "2")
    text = refused.communicate()
    assert refused.returncode == 3 and "manage_runs.py removed it" in text and "--undo" in text, text
    assert manage("--undo").returncode == 0 and tree(folder) == before


def test_resuming_a_shrunk_step_names_one_that_still_has_its_optimizer(manage, work):
    folder = work / "checkpoints/rm/first"
    optimizer = "step-2/optimizer.safetensors"
    assert manage("--shrink", "--name", "first", "--yes").returncode == 0
    trashed = next((work / "checkpoints/.trash-rm").glob(f"*/files/first/{optimizer}"))
    trashed.rename(folder / optimizer)
    manifest.move_in_manifest(folder / "step-2", manifest.OPTIMIZER, "removed", "files")
    refused = train(work, "--resume_from", folder / "step-4")
    text = refused.communicate()
    assert refused.returncode == 3 and f"--resume_from {folder / 'step-2'}" in text, text
    assert "removed" in manage("--show", "first").stdout
    assert str(Path("checkpoints/rm/first/step-2")) in manage("--show", "first").stdout


def test_only_finished_runs_are_shrunk(manage, work):
    assert manage("--shrink", "--yes").returncode == 0
    for name, is_whole in (("stopped", True), ("killed", True), ("first", False), ("branch", False)):
        for step in step_folders(work / "checkpoints/rm" / name):
            assert (step / "optimizer.safetensors").exists() == is_whole


def test_a_damaged_step_is_not_shrunk(manage, work):
    manifest = work / "checkpoints/rm/first/step-2/manifest.json"
    manifest.write_text(manifest.read_text().replace("1", "2", 1))
    result = manage("--shrink", "--name", "first", "--yes")
    assert result.returncode == 0 and "left: first/step-2/optimizer.safetensors: the step is damaged" in result.stdout
    assert (work / "checkpoints/rm/first/step-2/optimizer.safetensors").exists()
    assert not (work / "checkpoints/rm/first/step-3/optimizer.safetensors").exists()


def test_superseded_steps_and_dead_saves_are_shown_counted_and_deleted(manage, work):
    folder = work / "checkpoints/rm/first"
    again = train(work, "--resume_from", folder / "step-3")
    assert again.communicate() and again.returncode == 0
    shutil.copytree(folder / "step-2", folder / ".tmp-step-9")
    text = manage("--show", "first").stdout
    assert "superseded-" in text and "set aside on resuming" in text and "left by a killed save" in text
    before = tree(folder)
    assert manage("--delete_superseded", "--yes").returncode == 0
    assert not list(folder.glob("superseded-*")) and not list(folder.glob(".tmp-*"))
    assert [path.name for path in step_folders(folder)] == ["step-1", "step-2", "step-3", "step-4"]
    assert manage("--undo").returncode == 0 and tree(folder) == before


def test_undo_never_writes_over_a_new_run_of_the_same_name(manage, work, small_flags):
    assert manage("--delete", "first", "--yes").returncode == 0
    new = train(work, *small_flags, "--run_name", "first", "--max_steps", "1")
    assert new.communicate() and new.returncode == 0
    before = tree(work)
    result = manage("--undo")
    assert result.returncode == 2 and "first" in result.stderr and "there again" in result.stderr
    assert tree(work) == before
    for root in ("checkpoints", "logs"):
        (work / root / "rm/first").rename(work / root / "rm/second")
    assert manage("--undo").returncode == 0
    assert len(objects(manage)["first"]["checkpoints"]) == 4


def test_undo_puts_no_step_into_a_run_that_was_resumed_since(manage, work):
    assert manage("--delete", "first/step-4", "--yes").returncode == 0
    again = train(work, "--resume_from", "checkpoints/rm/first", "--eval_steps", "0", "--max_steps", "3")
    again.communicate()
    again = train(work, "--resume_from", "checkpoints/rm/first/step-2", "--max_steps", "3")
    assert again.communicate() and again.returncode == 0
    result = manage("--undo")
    assert result.returncode == 2 and "resumed since" in result.stderr
    assert not (work / "checkpoints/rm/first/step-4").exists()


def test_the_trash_is_emptied_by_age(manage, work):
    assert manage("--delete", "first", "--yes").returncode == 0
    for root in ("checkpoints", "logs"):
        entry = next((work / root / ".trash-rm").glob("2*"))
        entry.rename(entry.with_name("20240115_143022-001"))
    assert manage("--delete", "killed", "--yes").returncode == 0
    assert manage("--empty_trash", "--older_than", "7d", "--yes").returncode == 0
    assert manage("--undo").returncode == 0 and "killed" in objects(manage)
    assert manage("--undo").returncode == 2, "the old deletion is gone"


def test_a_folder_in_the_trash_whose_name_only_looks_like_a_date_is_never_old(manage, work):
    entry = work / "checkpoints/.trash-rm/99999999_999999-001"
    (entry / "files").mkdir(parents=True)
    for age in ("1d", "99999w"):
        assert manage("--empty_trash", "--older_than", age, "--yes").returncode == 0 and entry.exists()


def test_a_deletion_and_an_undo_lock_the_trashes_in_the_same_order(manage, monkeypatch):
    locked, original = [], file_locks.RunLock.__init__

    def note(self, folder, *arguments):
        if folder.name == ".trash-rm":
            locked.append(folder.parent.name)
        original(self, folder, *arguments)

    monkeypatch.setattr(file_locks.RunLock, "__init__", note)
    assert manage("--delete", "first", "--yes").returncode == 0 and manage("--undo").returncode == 0
    assert locked == ["checkpoints", "logs"] * 2


# ---------------------------------------------------------------------------------------------------------------------
# Safety
# ---------------------------------------------------------------------------------------------------------------------


def test_a_run_that_is_training_is_shown_and_nothing_of_it_is_deleted(manage, work, training):
    found = objects(manage)["live"]
    assert found["state"] == "running" and found["steps_done"] >= 2
    for words in (["--delete", "live"], ["--delete", "first", "live"], ["--delete", "live/step-2"]):
        result = manage(*words, "--yes")
        assert result.returncode == 2 and ("being trained right now" in result.stderr or "has no step" in result.stderr)
    result = manage("--prune", "keep=1", "--name", "live", "--yes")
    assert "being trained" in result.stdout and (work / "checkpoints/rm/first").exists()
    assert "train_rm.py --resume_from" not in manage("--show", "live").stdout
    assert training.poll() is None and objects(manage)["live"]["state"] == "running"


def test_a_run_whose_training_started_after_the_list_was_made_is_not_deleted(work):
    run = scanned(work)["first"]
    plan = deletion_plan.Plan(roots_of(work), [run])
    plan.add_runs([run])
    lock = file_locks.RunLock(run.folder)
    before = tree(work)
    outcome = trash.delete(plan)
    lock.release()
    assert not outcome.done and "being trained" in outcome.left[0][1]
    assert tree(work) == before


BAD_NAMES = ["..", "../outside", "/etc", "./first", "first/", "first/..", "first/../../..", "", " ", "a\nb",
             "\x1b[2J", "²", "x" * 300, ".trash", "first/step-99", "first/step-²", "*", "-1", "~",
             "first/step-1/../../stopped", "checkpoints/rm/first", "FIRST"]  # fmt: skip


@pytest.mark.parametrize("name", BAD_NAMES)
def test_a_name_of_no_run_is_rejected_and_nothing_is_changed(manage, work, tmp_path, name):
    before = tree(tmp_path)
    for words in (["--delete", name, "--yes"], ["--delete", "killed", name, "--yes"], ["--show", name]):
        result = manage(*words)
        assert result.returncode == 2 and "Traceback" not in result.stderr, (words, result.stderr)
        assert "\x1b" not in result.stderr and result.stderr.startswith("error:")
        assert tree(tmp_path) == before
    result = manage("--delete", str((work / "checkpoints/rm/first").absolute()), "--yes")
    assert result.returncode == 2 and tree(tmp_path) == before


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such names")
def test_odd_names_on_disk_are_listed_as_codes_and_deleted_by_their_real_names(manage, work):
    root = work / "checkpoints/rm"
    names = ["two\nlines", "\x1b[31mred\x1b[0m", "²", "[bold]x", "b\udcffytes", "-1", "ü" * 100, "tab\there"]
    for name in names:
        shutil.copytree(root / "branch", root / name)
    result = manage("--list")
    assert result.returncode == 0 and "\x1b" not in result.stdout
    assert "two\\nlines" in result.stdout and "\\x1b[31mred" in result.stdout and "[bold]x" in result.stdout
    assert len(re.findall(r"^\d+ +\S.*\n    rm, ", result.stdout, re.MULTILINE)) == 5 + len(names)
    assert {*names} <= set(objects(manage))
    for name in (name for name in names if name != "-1"):
        assert manage("--delete", name, "--yes").returncode == 0, name
        assert not (root / name).exists()
    assert manage("--delete=-1", "--yes").returncode == 0 and not (root / "-1").exists()
    for _ in names:
        assert manage("--undo").returncode == 0
    assert all((root / name / "run.json").exists() for name in names)


needs_links = pytest.mark.skipif(os.name == "nt", reason="making symbolic links needs rights on Windows")


@needs_links
def test_symlinked_runs_and_steps_are_never_touched(manage, work, tmp_path):
    root = work / "checkpoints/rm"
    shutil.move(root / "first", tmp_path / "outside/first")
    (root / "first").symlink_to(tmp_path / "outside/first")
    shutil.move(root / "stopped/step-1", tmp_path / "outside/step-1")
    (root / "stopped/step-1").symlink_to(tmp_path / "outside/step-1")
    before = tree(tmp_path / "outside")
    assert "first: a symbolic link; left alone" in manage().stdout
    assert objects(manage)["first"]["folder"] is None, "only its logs are ours"
    for name in ("first/step-1", "stopped/step-1"):
        assert manage("--delete", name, "--yes").returncode == 2
    for words in (["--prune", "keep=last"], ["--shrink"], ["--delete", "stopped"], ["--empty_trash"]):
        result = manage(*words, "--yes")
        assert result.returncode == 0, result.stderr
        assert tree(tmp_path / "outside") == before
    assert (root / "first").is_symlink()


@needs_links
@pytest.mark.parametrize("which", ["checkpoints", "logs"])
def test_a_root_that_is_a_link_is_listed_but_not_touched(manage, work, tmp_path, which):
    shutil.move(work / which / "rm", tmp_path / "outside/rm")
    (work / which / "rm").symlink_to(tmp_path / "outside/rm")
    before = tree(tmp_path)
    assert "first" in objects(manage)
    for words in (["--delete", "first"], ["--delete", "first", "stopped"]):
        result = manage(*words, "--yes")
        assert result.returncode == 2 and "symbolic link" in result.stderr and "real folder" in result.stderr
        assert tree(tmp_path) == before


@needs_links
@pytest.mark.parametrize("name", ["rm/.trash", ".trash-rm", "rm/first/.lock", ".trash-rm/.lock"])
def test_a_link_in_place_of_our_own_files_is_not_followed(manage, work, tmp_path, name):
    path = work / "checkpoints" / name
    path.parent.mkdir(exist_ok=True)
    path.unlink(missing_ok=True)
    target = tmp_path / "outside" / ("precious.txt" if name.endswith("lock") else "")
    path.symlink_to(target)
    entry = tmp_path / "outside/20240115_143022-001"
    (entry / "files/first").mkdir(parents=True)
    utils.write_json(entry / "manifest.json", {"has_checkpoints": True, "items": []})
    before = tree(tmp_path / "outside")
    if name != "rm/.trash":  # where nothing is put any more
        result = manage("--delete", "first", "--yes")
        assert result.returncode == 2 and (work / "checkpoints/rm/first/step-4").exists(), result.stderr
    assert manage("--empty_trash", "--yes").returncode in (0, 2) and manage("--undo").returncode == 2
    assert tree(tmp_path / "outside") == before


def test_a_forged_manifest_in_the_trash_moves_nothing_out_of_the_root(manage, work, tmp_path):
    assert manage("--delete", "first", "--yes").returncode == 0
    manifest = next((work / "checkpoints/.trash-rm").glob("*/manifest.json"))
    content = utils.read_json(manifest)
    for way in (["..", "..", "..", "outside", "new"], ["/tmp/new"], [], ["a/../../b"], [1], "first", None):
        content["items"] = [{"way": way, "bytes": 1, "began": None}]
        utils.write_json(manifest, content)
        before = tree(tmp_path)
        result = manage("--undo")
        assert result.returncode == 2 and "Traceback" not in result.stderr, (way, result.stderr)
        assert tree(tmp_path) == before


@pytest.mark.skipif(sys.platform != "linux", reason="mounts folders in a namespace of its own, which only Linux has")
def test_mount_points_are_neither_deleted_nor_emptied_into(work, tmp_path):
    if subprocess.run(["unshare", "-rm", "true"], capture_output=True).returncode:
        pytest.skip("this system allows no mount namespaces")
    root = work / "checkpoints/rm"
    (root / "killed/more").mkdir()
    (root / "mounted").mkdir()
    python, script = sys.executable, ROOT / "manage_runs.py"
    script_text = f"""
        set -u
        mount --bind {tmp_path}/outside {root}/killed/more
        mount --bind {root}/first {root}/mounted
        {python} {script} --delete killed --yes; echo "code $?"
        {python} {script} --delete mounted --yes; echo "code $?"
        {python} {script} --delete stopped --yes; echo "code $?"
        entry=$(echo {root.parent}/.trash-rm/2*/files/stopped)
        mkdir "$entry/more"
        mount --bind {tmp_path}/outside "$entry/more"
        {python} {script} --empty_trash --yes; echo "code $?"
    """
    result = subprocess.run(["unshare", "-rm", "bash", "-c", script_text], cwd=work, capture_output=True, text=True)
    codes = [line for line in result.stdout.splitlines() if line.startswith("code")]
    assert codes == ["code 2", "code 2", "code 0", "code 2"], (result.stdout, result.stderr)
    assert result.stderr.count("mounted at") == 3, result.stderr
    assert (tmp_path / "outside/precious.txt").read_text() == "do not touch"
    assert (root / "first/step-4").exists() and (root / "killed/step-1").exists()
    assert list((root.parent / ".trash-rm").glob("*/files/stopped/run.json")), (
        "the trash with a mount in it was left whole"
    )


def in_child(function, output):
    """Run `function` in a forked child through `utils.run_script`; returns its exit code, negative for a signal."""
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        code = 70
        try:
            log = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(log, 1)
            os.dup2(log, 2)
            sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
            sys.argv = ["manage_runs.py"]
            code = utils.run_script(lambda argv: function())
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def link_but_locks(source, target):
    """Copying a run by hard links is quicker, and right: only a lock is ever written into, all else is replaced."""
    (shutil.copy2 if source.endswith(".lock") else os.link)(source, target)


@needs_fork
@pytest.mark.parametrize("words", [["--delete", "first", "stopped"], ["--shrink"], ["--prune", "keep=last"]])
def test_a_kill_at_any_point_of_a_deletion_or_its_undo_loses_nothing(trained, run_here, tmp_path, monkeypatch, words):
    """Killed right before each change of the disk; the same again and --undo must give back the first bytes."""

    log = tmp_path / "log"

    def die_at(number, main_words):
        seen = [0]

        def watch(event, arguments):
            writes = event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
            if (writes or event in ("os.rename", "os.mkdir", "os.remove", "os.rmdir")) and str(
                tmp_path
            ) in os.path.abspath(os.fsdecode(arguments[0])):
                seen[0] += 1
                if seen[0] == number:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(watch)
        manage_runs.main(main_words)

    for is_undo in (False, True):
        for number in range(1, 100):
            folder = tmp_path / f"{is_undo}{number}"
            shutil.copytree(trained, folder, copy_function=link_but_locks)
            monkeypatch.chdir(folder)
            before = tree(folder)
            if is_undo:
                assert run_here(*words, "--yes").returncode == 0
            victim = ["--undo"] if is_undo else [*words, "--yes"]
            code = in_child(lambda number=number, victim=victim: die_at(number, victim), log)
            for run in (folder / "checkpoints/rm").iterdir():
                for step in step_folders(run):
                    assert manifest.problem(step) is None, (number, step)
            if code == 0:
                break
            assert code == -signal.SIGKILL, log.read_text()
            for _ in range(3):  # an undo that was cut off is finished; a deletion that was, is taken back
                if run_here("--undo").returncode:
                    break
            after = {way: content for way, content in tree(folder).items() if ".tmp-" not in way}
            assert after == before, (is_undo, number)
            shutil.rmtree(folder)
        assert number > 5


@needs_fork
def test_a_deletion_that_fails_half_way_reports_what_was_done_and_can_be_repeated(work, tmp_path):
    log = tmp_path / "log"
    (work / "logs/.trash-rm").mkdir()
    if os.geteuid() == 0:  # root may write anywhere, so it becomes nobody, who owns all but the log root
        for folder in (tmp_path, *tmp_path.parents[:-2]):
            folder.chmod(folder.stat().st_mode | 0o011)
        for path in [work, *work.rglob("*")]:
            os.chown(path, 65534, 65534)
    (work / "logs/rm").chmod(0o555)

    def as_nobody():
        if os.geteuid() == 0:
            os.seteuid(65534)
        manage_runs.main(["--delete", "first", "--yes"])

    assert in_child(as_nobody, log) == 4, log.read_text()
    (work / "logs/rm").chmod(0o755)
    text = log.read_text()
    assert "left: first: Permission denied" in text and "done: first" in text and "1 of 2 could not" in text, text
    assert not (work / "checkpoints/rm/first").exists() and (work / "logs/rm/first").exists()
    assert "next:" in text and "python manage_runs.py --delete first" in text
    assert in_child(lambda: manage_runs.main(["--delete", "first", "--yes"]), log) == 0, log.read_text()
    assert not (work / "logs/rm/first").exists()
    for _ in range(2):
        assert in_child(lambda: manage_runs.main(["--undo"]), log) == 0, log.read_text()
    assert (work / "logs/rm/first").exists() and (work / "checkpoints/rm/first/step-4").exists()


@needs_fork
def test_a_deletion_that_is_stopped_half_way_reports_what_was_done(work, tmp_path):
    log = tmp_path / "log"

    def stopped_in_the_middle():
        def watch(event, arguments):
            if event == "os.rename" and str(arguments[0]).endswith("logs/rm/first"):
                os.kill(os.getpid(), signal.SIGTERM)

        sys.addaudithook(watch)
        manage_runs.main(["--delete", "first", "stopped", "--yes"])

    assert in_child(stopped_in_the_middle, log) == 143, log.read_text()
    text = log.read_text()
    assert (
        "interrupted; in the trash: first" in text
        and "left: " in text
        and "stopped" in text
        and manage_runs.UNDO in text
    ), text
    assert (work / "checkpoints/rm/stopped/run.json").exists() and not (work / "checkpoints/rm/first").exists()
    assert in_child(lambda: manage_runs.main(["--undo"]), log) == 0 and len(scanned(work)) == 5


def test_what_another_deletion_took_between_listing_and_planning_is_refused_as_gone(work):
    runs, _ = inventory.scan(roots_of(work))
    for name in ("first", "stopped"):
        for root in ("checkpoints/rm", "logs/rm"):
            shutil.rmtree(work / root / name)
    chosen = [run for run in runs if run.name in ("first", "stopped")]
    plan = deletion_plan.Plan(roots_of(work), runs)
    plan.add_runs(chosen)
    assert len(plan.refused) >= 2 and {why for _, why in plan.refused} == {"gone already"} and not plan.items


def test_many_instances_at_once_corrupt_nothing(work):
    before = tree(work)
    names = [["first"], ["first", "stopped"], ["stopped"], ["killed"], ["killed"], ["branch"]]
    command = [sys.executable, str(ROOT / "manage_runs.py")]
    processes = [
        subprocess.Popen(
            [*command, "--delete", *some, "--yes"],
            cwd=work,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for some in names
    ]
    for process in processes:
        text = process.communicate(timeout=120)[0]
        assert process.returncode in (0, 2) and "Traceback" not in text, text
    left = set(scanned(work))
    assert left <= {"crashed", "first", "stopped"} and "killed" not in left and "branch" not in left
    while subprocess.run([*command, "--undo"], cwd=work, capture_output=True).returncode == 0:
        pass
    assert tree(work) == before


def test_a_second_instance_waits_and_then_says_that_it_changed_nothing(manage, work, monkeypatch):
    (work / "checkpoints/.trash-rm").mkdir()
    lock = file_locks.RunLock(work / "checkpoints/.trash-rm")
    monkeypatch.setattr(trash, "LOCK_SECONDS", 0.5)
    before = tree(work)
    result = manage("--delete", "first", "--yes")
    lock.release()
    assert result.returncode == 2 and "another manage_runs.py" in result.stderr and tree(work) == before


@pytest.mark.parametrize(
    "words, message",
    [
        (["--json", "--undo"], "one at a time"),
        (["--delete", "first", "--prune", "keep=last"], "one at a time"),
        (["--yes"], "--yes: goes with"),
        (["--dry_run", "--list"], "--dry_run: goes with"),
        (["--against", "first"], "--against: goes with --show"),
        (["--delete", "first", "--state", "crashed"], "does not go with --delete"),
        (["--empty_trash", "--name", "x"], "do not go with --empty_trash"),
        (["--stat", "crashed"], "did you mean --state"),
        (["--state", "cracked"], "did you mean 'crashed'"),
        (["--output_dir", "no/such", "--log_dir", "none"], "there are no runs yet"),
    ],
)
def test_flags_that_make_no_sense_together_exit_2_and_say_why(manage, work, words, message):
    before = tree(work)
    result = manage(*words)
    assert result.returncode == 2 and message in result.stderr, result.stderr
    assert tree(work) == before


@pytest.mark.parametrize("words", [[], ["--json"], ["--show", "first"], ["--prune", "keep=last", "--dry_run"]])
def test_an_output_dir_that_does_not_exist_is_refused_although_there_are_logs(manage, work, words):
    assert (work / "logs/rm").is_dir()
    result = manage("--output_dir", "no/such", *words)
    assert result.returncode == 2 and result.stdout == "", result.stdout
    assert "no/such\n  found:  no such folder\n" in result.stderr, result.stderr


def test_a_reader_that_leaves_early_causes_no_traceback(work):
    command = f"{sys.executable} {ROOT / 'manage_runs.py'} --json | head -1"
    result = subprocess.run(command, shell=True, cwd=work, capture_output=True, text=True, timeout=60)
    assert "Traceback" not in result.stderr


# ---------------------------------------------------------------------------------------------------------------------
# In a terminal
# ---------------------------------------------------------------------------------------------------------------------

DOWN, SPACE, ENTER = "\x1b[B", " ", "\r"


@pytest.fixture
def terminal(work):
    """Start the program in a pseudo-terminal."""
    pexpect = pytest.importorskip("pexpect", reason="pexpect drives the pseudo-terminal")
    started = []

    def start(*arguments, size=(50, 160)):
        # readline leaves the size of another terminal in the environment
        own = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES")}
        environment = {**own, "TERM": "xterm-256color", "PROMPT_TOOLKIT_NO_CPR": "1"}
        child = pexpect.spawn(sys.executable, [str(ROOT / "manage_runs.py"), *arguments], cwd=str(work),
                              env=environment, dimensions=size, encoding="utf-8", timeout=30)  # fmt: skip
        started.append(child)
        return child

    yield start
    for child in started:
        child.close(force=True)


def leave(child):
    """Take 'leave' from the menu, its last line; the exit code."""
    child.expect("What now")
    child.send("\x1b[A" + ENTER)
    return ended(child)


def ended(child):
    import pexpect

    child.expect(pexpect.EOF)
    child.close()
    return child.exitstatus


@needs_pty
def test_a_terminal_shows_a_table_and_the_menu_leaves(terminal):
    child = terminal("--sort", "name", size=(50, 250))
    child.expect("What now")
    text = child.before
    assert "-----" in text and all(name in text for name in ("branch", "crashed", "first", "killed", "stopped"))
    child.send("\x1b[A" + ENTER)
    assert ended(child) == 0


@needs_pty
def test_a_narrow_terminal_gets_a_block_for_each_run(terminal, work):
    name = "n" * 100
    (work / "checkpoints/rm/branch").rename(work / "checkpoints/rm" / name)
    child = terminal("--list", size=(24, 60))
    import pexpect

    child.expect(pexpect.EOF)
    text = child.before
    assert name in text and "…" not in text and "-----" not in text and "\x1b[32mfinished\x1b[0m" in text
    lines = re.sub(r"\x1b\[[0-9;]*m", "", text).splitlines()
    assert max(len(line) for line in lines if name not in line and "/" not in line) <= 60


@needs_pty
def test_runs_are_picked_with_arrow_keys_and_space(terminal, work):
    child = terminal("--sort", "name", size=(50, 250))
    child.expect("What now")
    child.send(DOWN + ENTER)  # delete runs
    child.expect("Enter for a list")
    child.send(ENTER)
    child.expect("Runs to delete")
    child.send(SPACE + DOWN + DOWN + DOWN + SPACE + ENTER)  # branch, killed
    child.expect("Type delete")
    child.send("delete" + ENTER)
    child.expect("in the trash: 4 items")
    assert leave(child) == 0
    assert set(scanned(work)) == {"crashed", "first", "stopped"}


@needs_pty
def test_runs_are_picked_by_numbers_and_ranges_and_one_needs_a_plain_yes(terminal, work):
    child = terminal("--sort", "name", size=(50, 250))
    child.expect("What now")
    child.send(DOWN + ENTER)
    child.expect("Enter for a list")
    child.send("9" + ENTER)
    child.expect("not within 1 to 5")
    child.send("\x7f" + "2" + ENTER)
    child.expect("Move this to the trash")
    child.send("y" + ENTER)
    child.expect("in the trash: 2 items")
    assert leave(child) == 0 and "crashed" not in scanned(work)


@needs_pty
@pytest.mark.parametrize("answer", ["Delete", "delet", "y", ""])
def test_anything_but_the_exact_word_deletes_nothing(terminal, work, answer):
    before = tree(work)
    child = terminal("--delete", "first", "stopped")
    child.expect("Type delete")
    child.send(answer + ENTER)
    child.expect("nothing was deleted")
    assert ended(child) == 0 and tree(work) == before


@needs_pty
@pytest.mark.parametrize("answer", ["n" + ENTER, ENTER])
def test_a_single_run_is_not_deleted_without_a_yes(terminal, work, answer):
    before = tree(work)
    child = terminal("--delete", "first")
    child.expect("Move this to the trash")
    child.send(answer)
    child.expect("nothing was deleted")
    assert ended(child) == 0 and tree(work) == before


@needs_pty
@pytest.mark.parametrize("key, code", [("\x03", 130), ("\x04", 0)], ids=["Ctrl-C", "end of input"])
@pytest.mark.parametrize("depth", range(4))
def test_ctrl_c_and_end_of_input_at_any_question_delete_nothing(terminal, work, key, code, depth):
    before = tree(work)
    child = terminal("--sort", "name", size=(50, 250))
    steps = [("What now", DOWN + ENTER), ("Enter for a list", ENTER), ("Runs to delete", SPACE + DOWN + SPACE + ENTER)]
    for wanted, keys in steps[:depth]:
        child.expect(wanted)
        child.send(keys)
    child.expect([wanted for wanted, _ in [*steps, ("Type delete", "")]][depth])
    time.sleep(0.3)  # the prompt has drawn itself
    child.send(key)
    assert ended(child) == code, child.before
    assert tree(work) == before and "Traceback" not in child.before


@needs_pty
@pytest.mark.parametrize("key, code", [("\x03", 130), ("\x04", 0)], ids=["Ctrl-C", "end of input"])
@pytest.mark.parametrize("names", [["first"], ["first", "stopped"]])
def test_ctrl_c_and_end_of_input_at_a_confirmation_delete_nothing(terminal, work, key, code, names):
    before = tree(work)
    child = terminal("--delete", *names)
    child.expect(["Move this to the trash", "Type delete"])
    time.sleep(0.3)
    child.send(key)
    assert ended(child) == code and "deleted nothing" in child.before, child.before
    assert tree(work) == before and "Traceback" not in child.before


@needs_pty
def test_sigterm_at_a_question_exits_143_and_deletes_nothing(terminal, work):
    before = tree(work)
    child = terminal("--delete", "first", "stopped")
    child.expect("Type delete")
    time.sleep(0.3)
    child.kill(signal.SIGTERM)
    assert ended(child) == 143 and tree(work) == before


@needs_pty
def test_single_steps_and_every_other_entry_of_the_menu_work(terminal, work):
    before = tree(work)
    child = terminal("--sort", "name", size=(50, 250))
    child.expect("What now")
    child.send(DOWN * 2 + ENTER)  # single steps
    child.expect("Which run")
    child.send(DOWN * 2 + ENTER)  # first
    child.expect("Enter for a list")
    child.send("1-2" + ENTER)
    child.expect("branch was resumed from first/step-2")
    child.expect("Move this to the trash")
    child.send("y" + ENTER)
    child.expect("in the trash: 2 items")
    child.expect("What now")
    assert not (work / "checkpoints/rm/first/step-1").exists()
    child.send(DOWN * 6 + ENTER)  # undo
    child.expect("restored: 2 items")
    child.expect("What now")
    assert tree(work) == before
    child.send(ENTER)  # look at a run
    child.expect("Which run")
    child.send(DOWN * 2 + ENTER)
    child.expect("loss by step")
    child.expect("What now")
    child.send(DOWN * 4 + ENTER)  # optimizer states
    child.expect("Type delete")
    child.send("delete" + ENTER)
    child.expect("in the trash: 5 items")
    child.expect("What now")
    child.send(DOWN * 7 + ENTER)  # empty the trash
    child.expect("cannot be undone")
    child.send("delete" + ENTER)
    child.expect("freed:")
    assert leave(child) == 0
    assert not (work / "checkpoints/rm/first/step-4/optimizer.safetensors").exists()


# ---------------------------------------------------------------------------------------------------------------------
# Small things
# ---------------------------------------------------------------------------------------------------------------------


def test_numbers_and_ranges_are_read_strictly():
    assert questions.parse_numbers("1,3-5 2", 9) == [1, 2, 3, 4, 5] and questions.parse_numbers("", 9) == []
    for text in ("0", "10", "5-3", "²", "1-", "a", "1;2", "-1", "1-99999999", "٣"):
        with pytest.raises(ValueError):
            questions.parse_numbers(text, 9)


def test_a_name_reaches_the_terminal_without_control_characters():
    assert utils.printable("a\nb\x1b[2J\u202e\udcff²") == "a\\nb\\x1b[2J\\u202e\\udcff²"


def test_a_manifest_is_the_same_after_moving_an_entry_away_and_back(work):
    step = work / "checkpoints/rm/first/step-4"
    before = (step / "manifest.json").read_bytes()
    manifest.move_in_manifest(step, manifest.OPTIMIZER, "files", "removed")
    manifest.move_in_manifest(step, manifest.OPTIMIZER, "files", "removed")  # the second time does nothing
    assert not manifest.has_optimizer(step)
    manifest.move_in_manifest(step, manifest.OPTIMIZER, "removed", "files")
    assert (step / "manifest.json").read_bytes() == before
