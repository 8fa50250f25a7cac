"""chat.py as a process of its own, for the tests that need the real server."""

import os
import re
import signal
import socket
import subprocess
import sys
import threading

from tests.conftest import ROOT


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Server:
    """chat.py as a process of its own; as a context manager it is stopped on leaving."""

    def __init__(self, *arguments):
        # Python leaves Ctrl-C alone where a background shell turned it off, so the child turns it on again
        start = "import runpy, signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler); "
        start += "sys.argv = sys.argv[1:]; sys.path.insert(0, sys.argv[0].rsplit('/', 1)[0]); "
        start += "runpy.run_path(sys.argv[0], run_name='__main__')"
        self.process = subprocess.Popen(
            [sys.executable, "-c", start, str(ROOT / "chat.py"), *map(str, arguments)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ.copy(),
        )
        watchdog = threading.Timer(90, self.process.kill)  # a server that never answers must not block the tests
        watchdog.start()
        self.lines = []
        for line in self.process.stdout:
            self.lines.append(line)
            if found := re.match(r"open (\S+)", line):
                self.url = found.group(1)
                break
        watchdog.cancel()
        assert hasattr(self, "url"), "".join(self.lines) + self.process.stderr.read()

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self.stop(signal.SIGTERM)

    def stop(self, number):
        """Send a signal; returns (exit code, stderr)."""
        if self.process.poll() is None:
            self.process.send_signal(number)
        _, stderr = self.process.communicate(timeout=30)
        return self.process.returncode, stderr
