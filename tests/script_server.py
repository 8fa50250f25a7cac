"""Run scripts as a shell would, but import torch only once: a server process, which has imported it, forks for each.

A forked child runs the script's file as `__main__`, with its own arguments, folder, environment, signals and output,
and ends as any interpreter does. The server itself never computes anything, so its children are as fresh as new
interpreters; test_script_server.py compares the two. A script is a new process where forking is not safe, and where
its environment differs in something that libraries read while they are imported.
"""

import contextlib
import gc
import importlib
import json
import os
import re
import runpy
import select
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CAN_FORK = sys.platform == "linux"
READ_BY_IMPORTS = ("HF_", "TRANSFORMERS_", "TORCH", "OMP_", "MKL_", "CUDA_", "PYTHON", "MPL", "GRADIO_", "LD_")

# What the server imports before it forks for a script. A script's other modules are imported by each child.
MODELS = (
    "torch", "torch._dynamo", "torch.utils.tensorboard", "transformers", "transformers.models.qwen3.modeling_qwen3",
    "peft", "safetensors.torch", "datasets", "psutil", "models",
)  # fmt: skip
EVALUATION = (
    "evaluation.evaluator", "evaluation.html_report", "jinja2", "scipy.stats",
    "matplotlib.figure", "matplotlib.backends.backend_agg", "matplotlib.backends.backend_svg",
)  # fmt: skip
TRAINING = (
    "torch.distributed.fsdp", "torch.nn.parallel",
    "training.run", "training.micro_batches", "training.distributed", "training.logger", "train_rm",
)  # fmt: skip
IMPORTS = {
    "train_rm.py": (*MODELS, *EVALUATION, *TRAINING),
    "eval_rm.py": (*MODELS, *EVALUATION, "eval_rm"),
    "chat.py": ("gradio", "chat", "chat_app.app", "models"),
    "-c": ("torch", "transformers", "peft", "gradio_client"),
    "torch.distributed.run": ("torch.distributed.run",),
}


class ScriptServer:
    """Starts scripts: `["train_rm.py", "--demo"]`, `["-m", "tensorboard.main"]` or `["-c", code]`."""

    def __init__(self):
        self.process = None  # until the first script
        self.env = dict(os.environ)  # what libraries add later, when this process uses them, is not for scripts

    def start(self, words, folder, env=None):
        """Start a script in `folder`, with `env` added to the server's environment."""
        words = [str(word) for word in words]
        if words[0].endswith(".py"):
            words[0] = str(ROOT / words[0])
        env = {**self.env, **{name: str(value) for name, value in (env or {}).items()}}
        output = Path(tempfile.mkdtemp(prefix="script-"))
        with open(output / "stdout", "w") as stdout, open(output / "stderr", "w") as stderr:
            if CAN_FORK and self.has_imported_under(env):
                process = Forked(self, self.ask(words=words, folder=str(folder), env=env, output=str(output)))
            else:
                process = subprocess.Popen(
                    [sys.executable, *words],
                    cwd=folder,
                    env=env,
                    stdin=subprocess.DEVNULL,
                    stdout=stdout,
                    stderr=stderr,
                )
        return Script(words, process, output)

    def run(self, words, folder, env=None, timeout=300):
        return self.start(words, folder, env).wait(timeout)

    def has_imported_under(self, env):
        """Whether the server, which is started here, has the variables of `env` that imports depend on."""
        if self.process is None:
            command = [sys.executable, __file__]
            self.process = subprocess.Popen(
                command, env=self.env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
            )
        return read_by_imports(env) == read_by_imports(self.env)

    def ask(self, **question):
        self.process.stdin.write(json.dumps(question) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def close(self):
        if self.process is not None:
            self.process.stdin.close()
            self.process.wait()


def read_by_imports(env):
    return {name: value for name, value in env.items() if name.startswith(READ_BY_IMPORTS)}


class Script:
    """A started script, whose output goes to files: `process` has the methods of a `subprocess.Popen`."""

    def __init__(self, words, process, output):
        self.words, self.process, self.pid, self.output = words, process, process.pid, output

    def poll(self):
        return self.process.poll()

    def send_signal(self, number):
        self.process.send_signal(number)

    def read(self, stream):
        return (self.output / stream).read_text(encoding="utf-8", errors="replace")

    def wait_for(self, pattern, timeout=240):
        """Wait until a line of the script's output begins with `pattern`, and fail if it ends without."""
        deadline = time.monotonic() + timeout
        while True:
            has_ended = self.poll() is not None  # before reading: it may print and end in between
            if re.search(f"^{pattern}", self.read("stdout"), re.MULTILINE):
                return
            if has_ended or time.monotonic() > deadline:
                raise AssertionError(f"{pattern!r} was not printed\n{self.read('stdout')}\n{self.read('stderr')}")
            time.sleep(0.005)

    def wait(self, timeout=300):
        """The finished process, with its text output. It is killed after `timeout` seconds."""
        try:
            code = self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            self.send_signal(signal.SIGKILL)
            code = self.process.wait()
        return subprocess.CompletedProcess(self.words, code, self.read("stdout"), self.read("stderr"))


class Forked:
    """A child of the server: those methods of a `subprocess.Popen` that `Script` calls."""

    def __init__(self, server, pid):
        self.server, self.pid, self.returncode = server, pid, None
        self.handle = os.pidfd_open(pid)  # becomes readable when the process ends

    def wait(self, timeout=None):
        if self.returncode is None:
            if not select.select([self.handle], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired(str(self.pid), timeout)
            self.returncode = self.server.ask(ended=self.pid)
            os.close(self.handle)
        return self.returncode

    def poll(self):
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.wait(0)
        return self.returncode

    def send_signal(self, number):
        if self.poll() is None:
            os.kill(self.pid, number)


# ---------------------------------------------------------------------------------------------------------------------
# The server process
# ---------------------------------------------------------------------------------------------------------------------


def serve():
    """Answer questions, one JSON value per line, until there are no more; a child returns from here to become a script.

    Standard input and output are moved aside, so that those of a child are unused when it gets its own.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a Ctrl-C in the tests' terminal is for the scripts
    sys.path[0] = str(ROOT)
    questions, answers = os.fdopen(os.dup(0)), os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    for line in questions:
        question = json.loads(line)
        if "ended" in question:
            answer = os.waitstatus_to_exitcode(os.waitpid(question["ended"], 0)[1])
        else:
            import_for(question["words"])
            answer = os.fork()
            if answer == 0:
                questions.close()
                answers.close()
                return question
        answers.write(f"{json.dumps(answer)}\n")
    sys.exit()


def import_for(words):
    """Import what a script will want, and have no garbage collection of a child touch the memory it shares."""
    sys.argv = words  # modules may keep the script's name for their messages
    for name in IMPORTS.get(words[1] if words[0] == "-m" else Path(words[0]).name, ()):
        if name not in sys.modules:
            importlib.import_module(name)
    gc.freeze()


def become(words, folder, env, output):
    """Run a script in this process, as a new interpreter would."""
    for number, name in ((0, os.devnull), (1, f"{output}/stdout"), (2, f"{output}/stderr")):
        os.dup2(os.open(name, os.O_RDWR), number)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(env)
    for name in ("chat", "eval_rm", "manage_runs", "train_grpo", "train_rm", "train_sft"):
        sys.modules.pop(name, None)  # the script is `__main__`, and the others it never imports
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed()  # what Python's own generator does by itself after a fork
    if words[0] == "-c":
        sys.argv, sys.path[0] = ["-c", *words[2:]], ""
        exec(compile(words[1], "<string>", "exec"), {"__name__": "__main__"})
    elif words[0] == "-m":
        sys.argv, sys.path[0] = words[1:], folder
        sys.modules.pop(words[1], None)  # it is `__main__` too
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv, sys.path[0] = words, str(Path(words[0]).parent)
        runpy.run_path(words[0], run_name="__main__")


if __name__ == "__main__":
    become(**serve())
