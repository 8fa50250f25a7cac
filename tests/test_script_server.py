"""script_server.py: a script in a forked child does what it does in a process of its own."""

import signal
import subprocess
import sys

import pytest

from tests.conftest import ROOT
from tests.script_server import CAN_FORK, Forked

pytestmark = pytest.mark.skipif(not CAN_FORK, reason="scripts are new processes on this platform")

SCRIPT = f"""
import atexit, os, signal, sys, threading
sys.path.append({str(ROOT)!r})
import utils

def main(argv):
    print(argv, os.getcwd(), sys.argv[0], sys.path[0], __name__, __file__, os.environ.get("FLOUR"), sys.stdin.read())
    print([signal.getsignal(number) for number in (signal.SIGCHLD, signal.SIGPIPE)], threading.active_count())
    print(os.isatty(1), sys.stdout.encoding, sys.stdout.line_buffering, sys.stderr.errors, file=sys.stderr)
    atexit.register(print, "the interpreter ends")
    if argv == ["UserError"]:
        raise utils.UserError("no flour", next="buy some")
    if argv == ["bug"]:
        raise KeyError("flour")
    for name in argv:
        os.kill(os.getpid(), getattr(signal, name))

if "early" in sys.argv:
    print([signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)])
    raise SystemExit("leaving with a text")
sys.exit(utils.run_script(main))
"""


@pytest.mark.parametrize(
    "word, code",
    [("", 0), ("bug", 1), ("UserError", 2), ("SIGINT", 130), ("SIGTERM", 143), ("SIGKILL", -9), ("early", 1)],
)
def test_a_forked_script_ends_and_prints_as_a_process_of_its_own(script_server, tmp_path, word, code):
    path = tmp_path / "bake.py"
    path.write_text(SCRIPT)
    variables = {"FLOUR": "rye"}
    script = script_server.start([path, *word.split()], tmp_path, variables)
    assert isinstance(script.process, Forked)
    forked = script.wait()
    real = subprocess.run(
        [sys.executable, path, *word.split()], cwd=tmp_path, env={**script_server.env, **variables},
        stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert (forked.returncode, forked.stdout, forked.stderr) == (real.returncode, real.stdout, real.stderr)
    assert forked.returncode == code and (code == -9 or forked.stdout)


def test_trainings_in_forked_and_in_new_processes_write_the_same_bytes(run_script, base, small_dataset, tmp_path):
    flags = ["--model", base, "--dataset", small_dataset, "--max_steps", "1", "--eval_num_batches", "1", "--lora",
             "--lora_dropout", "0.2", "--no_report"]  # fmt: skip
    forked = run_script("train_rm.py", *flags, "--run_name", "forked")
    command = [sys.executable, ROOT / "train_rm.py", *flags, "--run_name", "new"]
    new = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert (forked.returncode, forked.stderr) == (new.returncode, new.stderr) == (0, "")
    for name in ("adapter_model.safetensors", "optimizer.safetensors", "random_state.safetensors"):
        one, other = (tmp_path / "checkpoints/rm" / run / "step-1" / name for run in ("forked", "new"))
        assert one.read_bytes() == other.read_bytes(), name


def test_a_variable_that_imports_read_makes_a_new_process(script_server, tmp_path):
    script = script_server.start(["manage_runs.py", "--help"], tmp_path, {"HF_ENDPOINT": "http://127.0.0.1:9"})
    assert not isinstance(script.process, Forked)
    assert script.wait().returncode == 0 and script.read("stdout").startswith("usage: manage_runs.py")


def test_a_variable_that_a_library_sets_here_reaches_no_script(script_server, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_FLOUR", str(tmp_path))  # as torch, when its compiler is imported
    code = "import os\nprint(os.environ.get('TORCH_FLOUR'))"
    script = script_server.start(["-c", code], tmp_path)
    assert isinstance(script.process, Forked)
    assert script.wait().stdout == "None\n"


def test_a_script_can_be_watched_and_stopped(script_server, tmp_path):
    code = "import time\nprint('kneading', flush=True)\ntime.sleep(60)"
    script = script_server.start(["-c", code], tmp_path)
    script.wait_for("kneading")
    assert script.poll() is None
    script.send_signal(signal.SIGTERM)
    assert script.wait().returncode == -signal.SIGTERM == script.poll()
    script = script_server.start(["-c", code], tmp_path)
    assert script.wait(timeout=1).returncode == -signal.SIGKILL
    with pytest.raises(AssertionError, match="'baked' was not printed"):
        script.wait_for("baked")
