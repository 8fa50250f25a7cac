"""Locks: between threads and processes, asked without a trace, released by a kill, and where a file system has none."""

import errno
import os
import subprocess
import sys
import threading

import filelock
import pytest

import utils
from common import file_locks
from tests.conftest import ROOT


def test_asking_whether_a_lock_is_held_neither_creates_nor_changes_it(tmp_path):
    lock = tmp_path / ".lock"
    assert file_locks.is_locked(lock) is False and not lock.exists()
    held = file_locks.RunLock(tmp_path)
    content, when = lock.read_bytes() if os.name != "nt" else None, lock.stat().st_mtime_ns
    assert file_locks.is_locked(lock) is True
    held.release()
    assert file_locks.is_locked(lock) is False
    assert content is None or (lock.read_bytes(), lock.stat().st_mtime_ns) == (content, when)


def test_asking_never_prevents_a_training_from_starting(tmp_path):
    file_locks.RunLock(tmp_path).release()
    stop = threading.Event()

    def ask():
        while not stop.is_set():
            file_locks.is_locked(tmp_path / ".lock")

    asking = threading.Thread(target=ask)
    asking.start()
    try:
        for _ in range(200):
            file_locks.RunLock(tmp_path).release()
    finally:
        stop.set()
        asking.join()


def test_a_lock_whose_folder_was_moved_away_is_refused(tmp_path, monkeypatch):
    run = tmp_path / "run"
    run.mkdir()
    original = filelock.lock_descriptor

    def take_away_first(descriptor, **options):  # what a deletion does between a training's opening and locking
        run.rename(tmp_path / "gone")
        return original(descriptor, **options)

    monkeypatch.setattr(filelock, "lock_descriptor", take_away_first)
    with pytest.raises(utils.UserError, match="being deleted"):
        file_locks.RunLock(run)


@pytest.mark.skipif(os.name == "nt", reason="making symbolic links needs rights on Windows")
def test_a_link_in_place_of_a_lock_is_refused_and_its_target_stays(tmp_path):
    target = tmp_path / "precious.txt"
    target.write_text("do not touch")
    (tmp_path / ".lock").symlink_to(target)
    with pytest.raises(utils.UserError, match="not an ordinary file"):
        file_locks.RunLock(tmp_path)
    assert target.read_text() == "do not touch" and not file_locks.is_locked(tmp_path / ".lock")


def test_a_lock_is_released_by_a_kill(tmp_path):
    code = (
        f"import sys, time; sys.path.insert(0, {str(ROOT)!r})\nfrom pathlib import Path\n"
        "from common import file_locks\n"
        f"lock = file_locks.RunLock(Path({str(tmp_path)!r})); print('held', flush=True); time.sleep(60)"
    )
    holder = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert holder.stdout.readline() == "held\n" and file_locks.is_locked(tmp_path / ".lock")
    with pytest.raises(utils.UserError, match=f"held by process {holder.pid} on"):
        file_locks.RunLock(tmp_path)
    holder.kill()
    holder.wait(10)
    assert not file_locks.is_locked(tmp_path / ".lock")
    file_locks.RunLock(tmp_path).release()


def test_a_file_system_without_locks_is_reported_and_gets_no_other_kind_of_lock(tmp_path, monkeypatch, capsys):
    fcntl = pytest.importorskip("fcntl", reason="Windows has no flock to be missing")

    def missing(descriptor, operation):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", missing)
    locks = [file_locks.RunLock(tmp_path) for _ in range(2)]
    assert capsys.readouterr().out.count("no locks (Function not implemented)") == 2
    assert not file_locks.is_locked(tmp_path / ".lock")
    for lock in locks:
        lock.release()
    with pytest.raises(OSError, match="not implemented"), file_locks.exclusive(tmp_path / "votes.lock"):
        pass
