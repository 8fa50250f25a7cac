"""Run scripts as a shell would, but import torch only once: a server process, which has imported it, forks for each.

A forked child runs the script's file as `__main__`, with its own arguments, folder, signals and output. The server
itself has never computed anything, so its children are as fresh as new interpreters. Where forking is not safe, each
script is a new process.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CAN_FORK = sys.platform == "linux"
IMPORTED = (
    "torch", "torch.utils.tensorboard", "torch.distributed.run", "transformers", "peft", "accelerate", "datasets",
    "matplotlib.figure", "scipy.stats", "gradio", "gradio_client", "models",
    "train_rm", "eval_rm", "chat", "manage_runs",
)  # fmt: skip


class Script:
    """A started script: `ScriptServer.start` makes it, `wait` returns how it ended."""

    def __init__(self, server, words, folder):
        self.server, self.words = server, words
        self.output = Path(tempfile.mkdtemp(prefix="script-"))
        for stream in ("stdout", "stderr"):
            (self.output / stream).touch()
        message = {"words": words, "folder": str(folder), "output": str(self.output)}
        self.pid = server.ask(**message)["pid"] if CAN_FORK else None
        if not CAN_FORK:
            streams = [open(self.output / name, "w") for name in ("stdout", "stderr")]  # noqa: SIM115
            command = [sys.executable, *words]
            self.process = subprocess.Popen(command, cwd=folder, stdout=streams[0], stderr=streams[1])
            self.pid = self.process.pid

    def stop(self):
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGTERM)

    def wait(self, timeout=300):
        """The finished process, with its text output. It is killed after `timeout` seconds."""
        watchdog = threading.Timer(timeout, os.kill, (self.pid, signal.SIGKILL))
        watchdog.start()
        code = self.server.ask(wait=self.pid)["code"] if CAN_FORK else self.process.wait()
        watchdog.cancel()
        return subprocess.CompletedProcess(self.words, code, self.read("stdout"), self.read("stderr"))

    def read(self, stream):
        return (self.output / stream).read_text(encoding="utf-8", errors="replace")


class ScriptServer:
    """Starts scripts: `["train_rm.py", "--demo"]`, `["-m", "tensorboard.main"]` or `["-c", code]`."""

    def __init__(self):
        if CAN_FORK:
            command = [sys.executable, __file__]
            self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def start(self, words, folder):
        words = [str(word) for word in words]
        return Script(self, [str(ROOT / words[0]) if words[0].endswith(".py") else words[0], *words[1:]], folder)

    def run(self, words, folder):
        return self.start(words, folder).wait()

    def ask(self, **message):
        self.process.stdin.write(json.dumps(message) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def close(self):
        if CAN_FORK:
            self.process.stdin.close()
            self.process.wait()


def serve():
    """The server process: one JSON line per question and answer."""
    import importlib

    sys.path[0] = str(ROOT)  # a script's own folder comes first on the path of a real `python script.py`
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for name in IMPORTED:
        importlib.import_module(name)
    for line in sys.stdin:
        question = json.loads(line)
        if "wait" in question:
            answer = {"code": os.waitstatus_to_exitcode(os.waitpid(question["wait"], 0)[1])}
        else:
            answer = {"pid": os.fork()}
            if answer["pid"] == 0:
                run_in_child(question["words"], question["folder"], question["output"])
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def run_in_child(words, folder, output):
    """Become the script; never returns."""
    import runpy
    import traceback

    code = 1
    try:
        for number, name in ((0, os.devnull), (1, f"{output}/stdout"), (2, f"{output}/stderr")):
            os.dup2(os.open(name, os.O_RDWR), number)
        sys.stdin, sys.stdout, sys.stderr = open(0), open(1, "w", buffering=1), open(2, "w", buffering=1)  # noqa: SIM115
        signal.signal(signal.SIGINT, signal.default_int_handler)
        os.chdir(folder)
        for name in ("chat", "eval_rm", "manage_runs", "train_rm"):
            sys.modules.pop(name)  # it runs as __main__ now
        if words[0] == "-c":
            sys.argv = ["-c", *words[2:]]
            exec(compile(words[1], "<page>", "exec"), {"__name__": "__main__"})
        elif words[0] == "-m":
            sys.argv = words[1:]
            runpy.run_module(words[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv = words
            runpy.run_path(words[0], run_name="__main__")
        code = 0
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    serve()
