"""utils.py: exit codes and messages, stopping, publishing, run folders, small things."""

import errno
import json
import os
import signal
import subprocess
import sys

import pytest

import utils
from checkpointing.run_folder import run_name_problem, step_folder, step_folders, step_of
from tests.conftest import ROOT
from utils import Stopped, UserError

# ---------------------------------------------------------------------------------------------------------------------
# run_script: messages and exit codes
# ---------------------------------------------------------------------------------------------------------------------

SCRIPT = """
import errno, os, signal, sys, time
sys.path.insert(0, {root!r})
import utils
signal.signal(signal.SIGINT, signal.default_int_handler)  # whatever the shell of the tests has set

def main(argv):
{body}

if __name__ == "__main__":
    sys.exit(utils.run_script(main))
"""


@pytest.fixture
def script(tmp_path):
    """Write a script with the given body of `main`."""

    def write(body):
        path = tmp_path / "script.py"
        indented = "\n".join("    " + line for line in body.strip().splitlines())
        path.write_text(SCRIPT.format(root=str(ROOT), body=indented))
        return path

    return write


FULL_DISK_BENEATH = """
try:
    raise OSError(errno.EDQUOT, "Quota exceeded", "x")
except OSError as error:
    raise RuntimeError("could not save") from error
"""
FULL_DISK_ON_THE_WAY = """
try:
    raise OSError(errno.EROFS, "Read-only", "x")
except OSError:
    raise KeyError("lost")
"""
ENDS = {
    "done": ("print('fine')", 0, ""),
    "memory": ("raise MemoryError", 2, "error: out of memory"),
    "memory in words": (
        "raise RuntimeError(\"DefaultCPUAllocator: can't allocate memory: you tried 9 bytes\")",
        2,
        "error: out of memory",
    ),
    "a bug": ("return 1 / 0", 1, "error: ZeroDivisionError: division by zero"),
    "no message": ("raise RuntimeError", 1, "error: RuntimeError: no message"),
    "other OSError": ("open('nowhere')", 1, "error: FileNotFoundError"),
    "bad input": ("raise utils.UserError('blue', where='here', next='x')", 2, "blue\n  where:  here\n  next:   x\n"),
    "missing package": ("import no_such_package", 2, "the package 'no_such_package' is not installed\n  next:   pip"),
    "checkpoint": ("raise utils.CheckpointError('torn')", 3, "error: torn\n"),
    "network": ("raise utils.DiskOrNetworkError('no line')", 4, "error: no line\n"),
    "full disk": ("raise OSError(errno.ENOSPC, 'No space', 'file')", 4, "writing to disk failed\n  where:  file\n"),
    "full disk, what next": ("raise OSError(errno.EDQUOT, 'Quota', 'file')", 4, "next:   free some space, or name"),
    "no permission": ("raise OSError(errno.EACCES, 'No', 'file')", 4, "next:   make the folder writable, or name"),
    "full disk beneath": (FULL_DISK_BENEATH, 4, "Quota exceeded"),
    "full disk on the way": (FULL_DISK_ON_THE_WAY, 4, "Read-only"),
    "ctrl-c": ("raise KeyboardInterrupt", 130, "stopped\n"),
    "stopped by ctrl-c": ("raise utils.Stopped(signal.SIGINT)", 130, "stopped\n"),
    "stopped by SIGTERM": ("raise utils.Stopped(signal.SIGTERM)", 143, "stopped\n"),
}  # fmt: skip


@pytest.mark.parametrize("name", list(ENDS))
def test_each_end_has_its_exit_code_and_message_and_a_traceback_only_with_debug(script, run_script, name):
    body, exit_code, message = ENDS[name]
    path = script(body)
    plain, debug = run_script(path), run_script(path, "--debug")
    assert (plain.returncode, debug.returncode) == (exit_code, exit_code)
    assert message in plain.stderr and message in debug.stderr
    assert "Traceback" not in plain.stderr
    assert ("Traceback" in debug.stderr) == (exit_code != 0)
    if exit_code == 0:
        assert (plain.stdout, plain.stderr) == ("fine\n", "")


def test_our_fault_says_where_it_was_and_how_to_report_it(script, run_script):
    path = script("x = 1\nreturn x / 0")
    line = path.read_text().splitlines().index("    return x / 0") + 1
    text = run_script(path).stderr
    assert f"where:  {path}:{line}\n" in text and "this is a bug" in text and "--debug" in text


@pytest.mark.parametrize(
    "arguments, shows",
    [(["--debug"], True), (["--debug", "False"], False), (["--debug=1"], True), (["--debug=no"], False), ([], False)],
)
def test_every_form_of_debug_means_what_it_says(script, run_script, arguments, shows):
    assert ("Traceback" in run_script(script("return 1 / 0"), *arguments).stderr) == shows


@pytest.mark.parametrize("closed", ["1", "2"])
def test_a_script_that_is_started_with_a_closed_stream_runs(script, tmp_path, closed):
    path = script("open('done', 'w').close()\nprint('hello')\nprint('hello', file=sys.stderr)")
    command = f"exec {closed}>&-; exec {sys.executable} {path}"
    assert subprocess.run(["sh", "-c", command], cwd=tmp_path).returncode == 0
    assert (tmp_path / "done").exists()


def test_a_deleted_working_folder_is_named(script, tmp_path):
    (tmp_path / "gone").mkdir()
    command = f"cd {tmp_path / 'gone'} && rmdir {tmp_path / 'gone'} && exec {sys.executable} {script('pass')}"
    result = subprocess.run(["sh", "-c", command], capture_output=True, text=True)
    assert result.returncode == 2 and "the working folder was deleted" in result.stderr


def test_a_signal_that_the_parent_wants_ignored_is_ignored(script):
    code = "import os, signal\nos.kill(os.getpid(), signal.SIGHUP)\nwith utils.StopRequest() as stop:\n"
    code += "    os.kill(os.getpid(), signal.SIGHUP)\n    stop.check()\nprint('went on')"
    command = f"trap '' HUP; exec {sys.executable} {script(code)}"
    result = subprocess.run(["sh", "-c", command], capture_output=True, text=True)
    assert (result.returncode, result.stdout, result.stderr) == (0, "went on\n", "")


def test_a_stop_during_an_import_is_a_stop_whatever_the_import_makes_of_it(script, run_script):
    code = "import os, signal\ntry:\n    os.kill(os.getpid(), signal.SIGTERM)\n    import time; time.sleep(1)\n"
    code += "except BaseException as error:\n    raise utils.UserError('no such module') from error"
    result = run_script(script(code))
    assert (result.returncode, result.stderr) == (143, "stopped\n")


def test_a_stop_is_noted_even_if_nobody_can_be_told(script, tmp_path):
    code = "import os, signal\nwith utils.StopRequest() as stop:\n    os.close(2)\n"
    code += "    os.kill(os.getpid(), signal.SIGTERM)\n    open('went_on', 'w').close()\n    stop.check()"
    result = subprocess.run([sys.executable, script(code)], cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 143 and (tmp_path / "went_on").exists()


def test_a_path_that_cannot_be_is_no_full_disk(script, run_script):
    result = run_script(script("open('x' * 300)"))
    assert result.returncode == 2 and "a path cannot be used" in result.stderr
    assert "free some space" not in result.stderr


def test_the_script_gets_its_arguments(script, run_script):
    assert run_script(script("print(argv)"), "--a", "b c").stdout == "['--a', 'b c']\n"


def test_a_reader_that_leaves_early_ends_the_script_in_one_line(script):
    path = script("for number in range(100_000):\n    print(number)")
    process = subprocess.Popen([sys.executable, str(path)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "0\n"
    process.stdout.close()
    assert process.stderr.read() == "stopped: the reader of the output has gone\n" and process.wait(30) == 1
    process.stderr.close()


def signalled(path, *signals):
    """Run a script and send it each signal when it says that it is ready; (exit code, other stdout, stderr)."""
    process = subprocess.Popen(
        [sys.executable, "-u", str(path)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    with process:
        for number in signals:
            assert process.stdout.readline() == "ready\n"
            process.send_signal(number)
        stdout, stderr = process.communicate(timeout=30)
    return process.returncode, stdout, stderr


@pytest.mark.parametrize("number, exit_code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_to_a_sleeping_script_stops_it_without_a_traceback(script, number, exit_code):
    path = script("print('ready', flush=True)\ntime.sleep(30)\nprint('slept')")
    assert signalled(path, number) == (exit_code, "", "stopped\n")


# ---------------------------------------------------------------------------------------------------------------------
# StopRequest
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number, exit_code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_the_first_signal_is_noted_and_raised_by_check(number, exit_code, capsys):
    before = [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)]
    with utils.StopRequest() as stop:
        stop.check()
        signal.raise_signal(number)
        assert stop.signal_number == number
        with pytest.raises(Stopped) as caught:
            stop.check()
    assert caught.value.exit_code == exit_code
    assert not isinstance(caught.value, Exception)
    assert [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)] == before
    assert "press again to leave" in capsys.readouterr().err


def test_the_handlers_are_restored_after_an_error_too():
    before = [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)]
    with pytest.raises(RuntimeError), utils.StopRequest():
        assert [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)] != before
        raise RuntimeError
    assert [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)] == before


@pytest.mark.parametrize("number, exit_code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_first_signal_lets_the_step_end_and_the_clean_up_run(script, number, exit_code):
    path = script("""
with utils.StopRequest() as stop:
    try:
        print("ready", flush=True)
        while stop.signal_number is None:
            time.sleep(0.01)
        print("step ended", flush=True)
        stop.check()
        print("not reached", flush=True)
    finally:
        print("saved", flush=True)
""")
    code, stdout, stderr = signalled(path, number)
    assert (code, stdout) == (exit_code, "step ended\nsaved\n")
    assert stderr.endswith("stopped\n") and "Traceback" not in stderr


@pytest.mark.parametrize("second, exit_code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_second_signal_leaves_at_once(script, second, exit_code):
    path = script("""
with utils.StopRequest() as stop:
    try:
        print("ready", flush=True)
        while stop.signal_number is None:
            time.sleep(0.01)
        print("ready", flush=True)
        time.sleep(30)
        stop.check()
    finally:
        print("saved", flush=True)
""")
    code, stdout, stderr = signalled(path, signal.SIGINT, second)
    assert (code, stdout) == (exit_code, "") and "Traceback" not in stderr


CHILD = """
import sys, time, utils
def main(argv):
    with utils.StopRequest() as stop:
        print("ready", flush=True)
        while stop.signal_number is None:
            time.sleep(0.01)
        time.sleep(0.3)  # a second signal would end it here
        print("saved", flush=True)
        stop.check()
sys.exit(utils.run_script(main))
"""


@pytest.mark.skipif(os.name == "nt", reason="Windows has no signals to groups of processes")
@pytest.mark.parametrize("is_to_all", [False, True], ids=["to the parent alone", "to all, as a terminal sends it"])
@pytest.mark.parametrize("number", utils.STOP_SIGNALS)
def test_a_child_is_told_once_to_stop_and_waited_for(tmp_path, number, is_to_all):
    (tmp_path / "child.py").write_text(CHILD)
    code = f"""
import sys, utils
def main(argv):
    print(utils.run_child([sys.executable, {str(tmp_path / "child.py")!r}]), flush=True)
sys.exit(utils.run_script(main))
"""
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)}, start_new_session=True,
    )  # fmt: skip
    with process:
        assert process.stdout.readline() == "ready\n"
        (os.killpg if is_to_all else os.kill)(process.pid, number)
        stdout, stderr = process.communicate(timeout=30)
    assert (process.returncode, stdout) == (128 + number, "saved\n") and stderr.endswith("stopped\n"), stderr


def test_a_childs_exit_code_is_returned_and_signals_are_as_before():
    before = [signal.getsignal(each) for each in utils.STOP_SIGNALS]
    assert utils.run_child([sys.executable, "-c", "raise SystemExit(7)"]) == 7
    assert [signal.getsignal(each) for each in utils.STOP_SIGNALS] == before


# ---------------------------------------------------------------------------------------------------------------------
# Disk errors and folders
# ---------------------------------------------------------------------------------------------------------------------


def test_disk_errors_are_found_in_the_chain_of_causes():
    full = OSError(errno.ENOSPC, "full")
    outer = RuntimeError("outer")
    outer.__cause__ = ValueError("middle")
    outer.__cause__.__context__ = full
    assert utils.disk_full_cause(outer) is full and utils.disk_full_cause(full) is full
    assert utils.disk_full_cause(OSError(errno.ENOENT, "not there")) is None
    assert utils.disk_full_cause(RuntimeError()) is utils.disk_full_cause(None) is None


# ---------------------------------------------------------------------------------------------------------------------
# Run folders
# ---------------------------------------------------------------------------------------------------------------------


def test_steps_are_ordered_by_number_and_not_by_name_or_date(tmp_path):
    for age, step in enumerate((1000, 9, 200, 10)):
        step_folder(tmp_path, step).mkdir()
        os.utime(step_folder(tmp_path, step), (10_000 + age, 10_000 + age))
    assert [path.name for path in step_folders(tmp_path)] == ["step-9", "step-10", "step-200", "step-1000"]


def test_other_names_are_no_steps(tmp_path):
    for name in (
        "step-5",
        "step-",
        "step-x",
        "step-5.old",
        "xstep-5",
        "step--5",
        "step-٣",
        "Step-7",
        ".tmp-step-8",
        "5",
    ):
        (tmp_path / name).mkdir()
    (tmp_path / "step-6").write_text("a file")
    assert [path.name for path in step_folders(tmp_path)] == ["step-5"]
    assert step_of(tmp_path / "step-12") == 12 and step_of(tmp_path / "step-12b") is None


def test_a_run_without_a_folder_has_no_steps(tmp_path):
    assert step_folders(tmp_path / "nowhere") == []
    (tmp_path / "file").touch()
    assert step_folders(tmp_path / "file") == []


@pytest.mark.parametrize(
    "name",
    ["first", "a", "7", "20240115_143022", "lr=1e-5", "a.b+c@d-e_f", "É1", "実験", "a" * 100, "console", "com10"],
)
def test_good_run_names(name):
    assert run_name_problem(name) is None


@pytest.mark.parametrize(
    "name",
    [
        "", " ", "a b", "a/b", "a\\b", "..", ".", ".hidden", "-first", "_first", "name.", "a:b", "a*", "a\n", "a\0",
        "a?", "con", "NUL", "com1", "LPT9", "aux.txt", "a" * 101, "~", "$HOME", "a'b",
    ],
)  # fmt: skip
def test_bad_run_names_are_explained(name):
    assert run_name_problem(name)


def test_a_run_name_is_never_longer_than_a_folders_name_may_be():
    assert run_name_problem("実" * 100), "300 bytes; most file systems take 255"


# ---------------------------------------------------------------------------------------------------------------------
# Small things
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "successes, trials, low, high",
    [
        (95, 100, 0.8882, 0.9785),
        (0, 10, 0.0, 0.2775),
        (10, 10, 0.7225, 1.0),
        (5, 10, 0.2366, 0.7634),
        (1, 1, 0.2065, 1.0),
        (81, 263, 0.2553, 0.3662),  # Newcombe 1998, table I
        (0, 0, 0.0, 1.0),
    ],
)
def test_wilsons_interval_has_its_published_values(successes, trials, low, high):
    got = utils.wilson_interval(successes, trials)
    assert got == pytest.approx((low, high), abs=5e-5)
    assert 0 <= got[0] <= got[1] <= 1


@pytest.mark.parametrize("trials", [1, 7, 100, 2000])
def test_wilsons_bounds_are_the_shares_from_which_the_observed_one_is_196_deviations_away(trials):
    for successes in range(trials + 1):
        for bound in utils.wilson_interval(successes, trials):
            distance = abs(successes / trials - bound)
            assert distance == pytest.approx(1.959964 * (bound * (1 - bound) / trials) ** 0.5, abs=1e-6)


@pytest.mark.parametrize(
    "count, text",
    [
        (0, "0 B"), (1023, "1023 B"), (1024, "1.0 KiB"), (1536, "1.5 KiB"), (5 * 2**20, "5.0 MiB"),
        (2.25 * 2**30, "2.2 GiB"), (3 * 2**40, "3.0 TiB"), (5000 * 2**40, "5000.0 TiB"),
    ],
)  # fmt: skip
def test_bytes_are_shown_in_binary_units(count, text):
    assert utils.format_bytes(count) == text


@pytest.mark.parametrize(
    "seconds, text",
    [
        (0, "0s"), (0.4, "0s"), (59.4, "59s"), (59.6, "1m00s"), (75, "1m15s"), (3599.4, "59m59s"), (3599.6, "1h00m"),
        (5000, "1h23m"), (360_000, "100h00m"),
    ],
)  # fmt: skip
def test_durations_are_shown_in_two_units(seconds, text):
    assert utils.format_duration(seconds) == text


def test_the_nearest_name_is_suggested_or_nothing():
    assert utils.nearest("trian", ["test", "train"]) == ", did you mean 'train'?"
    assert utils.near_matches("RNU", ["other", "run", "run-2"]) == ["run", "run-2"]
    assert utils.near_matches("2024", ["2025", "20240115_143022", "first"])[0] == "20240115_143022"
    assert utils.nearest("zebra", ["test", "train"]) == utils.nearest("train", []) == ""


def test_an_error_shows_its_details_in_one_form():
    error = UserError("it broke", where="here", found=0, safe="the rest", next="try again")
    assert str(error).splitlines() == [
        "error: it broke", "  where:  here", "  found:  0", "  safe:   the rest", "  next:   try again",
    ]  # fmt: skip
    assert (error.what, str(UserError("it broke"))) == ("it broke", "error: it broke")


def test_json_files_come_back_as_they_went(tmp_path):
    content = {"a": [1, 2.5, None, True], "ü": "日本"}
    utils.write_json(tmp_path / "x.json", content)
    assert utils.read_json(tmp_path / "x.json") == content == json.loads((tmp_path / "x.json").read_bytes())
    assert "日本" in (tmp_path / "x.json").read_text(encoding="utf-8")


def test_the_sha256_of_a_file_is_that_of_its_bytes(tmp_path):
    (tmp_path / "abc").write_bytes(b"abc")
    assert utils.sha256_of(tmp_path / "abc") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


# ---------------------------------------------------------------------------------------------------------------------
# Imports
# ---------------------------------------------------------------------------------------------------------------------


def run_code(code, *arguments):
    return subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, cwd=ROOT, timeout=60
    )


def test_a_lazy_import_waits_for_its_first_use(tmp_path, monkeypatch):
    (tmp_path / "slow_to_import.py").write_text("ANSWER = 42\n")
    (tmp_path / "a_folder").mkdir()
    (tmp_path / "a_folder" / "with_a_module.py").write_text("ANSWER = 43\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with utils.lazy_imports():
        import no_such_module as missing
        import slow_to_import as module
        from a_folder import with_a_module
    assert "slow_to_import" not in sys.modules
    assert module.ANSWER == 42 and "slow_to_import" in sys.modules
    monkeypatch.delitem(sys.modules, "slow_to_import")
    with pytest.raises(ModuleNotFoundError, match="no_such_module"):
        _ = missing.anything
    assert with_a_module.ANSWER == 43


def test_utils_imports_the_standard_library_only():
    result = run_code("""
import sys
before = set(sys.modules)
import utils
new = {name.split(".")[0] for name in set(sys.modules) - before} - {"utils"}
print(sorted(new - set(sys.stdlib_module_names)))
""")
    assert (result.stdout, result.stderr) == ("[]\n", "")


def test_help_does_not_wait_for_torch():
    result = run_code("""
import runpy, sys
sys.path.insert(0, ".")
sys.argv = ["train_rm.py", "--help"]
try:
    runpy.run_path("train_rm.py", run_name="__main__")
except SystemExit as end:
    slow = {"torch", "numpy", "transformers", "datasets", "pyarrow", "tensorboard"} & set(sys.modules)
    print("end", end.code, sorted(slow))
""")
    assert "--batch_size" in result.stdout and result.stderr == ""
    assert result.stdout.splitlines()[-1] == "end 0 []"


@pytest.mark.parametrize(
    "error, ran_out",
    [
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("[enforce fail at alloc_cpu.cpp:118] . DefaultCPUAllocator: can't allocate memory"), True),
        (MemoryError(), True),
        (RuntimeError("No valid triton configs. OutOfMemoryError: out of resource: triton_flex_attention"), False),
        (RuntimeError("CUDA error: device-side assert triggered"), False),
    ],
)
def test_errors_that_mean_that_memory_ran_out(error, ran_out):
    assert utils.is_out_of_memory(error) == ran_out
