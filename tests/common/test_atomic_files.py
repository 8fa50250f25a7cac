"""Folders and files that are written completely or not at all."""

import os
import stat

import pytest

from common import atomic_files


def names_in(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_folder_appears_complete_and_only_at_the_end(tmp_path):
    final = tmp_path / "run" / "step-5"
    with atomic_files.atomic_folder(final) as temporary:
        assert temporary.parent == final.parent, "a rename is only whole within one file system"
        (temporary / "weights").write_text("w")
        (temporary / "deeper").mkdir()
        (temporary / "deeper" / "more").write_text("m")
        assert not final.exists()
    assert (final / "weights").read_text() == "w" and (final / "deeper" / "more").read_text() == "m"
    assert names_in(final.parent) == ["step-5"]


def test_what_is_in_a_folder_is_flushed_before_the_folder_and_all_before_the_renaming(tmp_path, monkeypatch):
    flushed = []
    monkeypatch.setattr(atomic_files, "fsync_path", flushed.append)
    with atomic_files.atomic_folder(tmp_path / "step-5") as temporary:
        (temporary / "deeper" / "still").mkdir(parents=True)
        (temporary / "deeper" / "still" / "more").write_text("m")
        (temporary / "weights").write_text("w")
        rename = type(temporary).rename
        monkeypatch.setattr(type(temporary), "rename", lambda *paths: flushed.append("renamed") or rename(*paths))
    names = [path if path == "renamed" else path.relative_to(temporary.parent).as_posix() for path in flushed]
    assert sorted(names[:4]) == [
        f".tmp-step-5/{one}" for one in ("deeper", "deeper/still", "deeper/still/more", "weights")
    ]
    assert names.index(".tmp-step-5/deeper/still/more") < names.index(".tmp-step-5/deeper/still")
    assert names.index(".tmp-step-5/deeper/still") < names.index(".tmp-step-5/deeper")
    assert names[4:] == [".tmp-step-5", "renamed", "."]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit, OSError])
def test_a_failure_while_writing_leaves_nothing(tmp_path, error):
    with pytest.raises(error), atomic_files.atomic_folder(tmp_path / "step-5") as temporary:
        (temporary / "weights").write_text("half")
        raise error
    assert names_in(tmp_path) == []


def test_a_folder_that_exists_is_never_written_into(tmp_path):
    (tmp_path / "step-5").mkdir()
    with pytest.raises(FileExistsError), atomic_files.atomic_folder(tmp_path / "step-5"):
        pytest.fail("the body ran")
    assert names_in(tmp_path) == ["step-5"] and names_in(tmp_path / "step-5") == []


def test_the_first_of_two_writers_wins(tmp_path):
    final = tmp_path / "step-5"
    with pytest.raises(FileExistsError) as caught, atomic_files.atomic_folder(final, ".tmp-second") as second:
        (second / "weights").write_text("second")
        with atomic_files.atomic_folder(final, ".tmp-first") as first:
            (first / "weights").write_text("first")
    assert caught.value.filename == str(final)
    assert (final / "weights").read_text() == "first" and names_in(tmp_path) == ["step-5"]


def test_an_existing_file_inside_the_body_is_not_taken_for_another_writer(tmp_path):
    with pytest.raises(FileExistsError) as caught, atomic_files.atomic_folder(tmp_path / "step-5") as temporary:
        (temporary / "weights").mkdir()
        (temporary / "weights").mkdir()
    assert "already exists" not in str(caught.value)
    assert names_in(tmp_path) == []


def test_what_a_killed_save_left_is_not_part_of_the_next(tmp_path):
    (tmp_path / ".tmp-step-5").mkdir()
    (tmp_path / ".tmp-step-5" / "old").write_text("half")
    with atomic_files.atomic_folder(tmp_path / "step-5") as temporary:
        (temporary / "new").write_text("whole")
    assert names_in(tmp_path) == ["step-5"] and names_in(tmp_path / "step-5") == ["new"]


@pytest.mark.skipif(os.name == "nt", reason="Windows has no umask to respect")
@pytest.mark.parametrize("umask, mode", [(0o022, 0o644), (0o027, 0o640), (0o077, 0o600), (0o002, 0o664)])
def test_files_follow_the_umask_whatever_wrote_them(tmp_path, umask, mode):
    previous = os.umask(umask)
    try:
        with atomic_files.atomic_folder(tmp_path / "step-5") as temporary:
            (temporary / "deeper").mkdir()
            for number, path in enumerate((temporary / "private", temporary / "deeper" / "open")):
                path.write_text("x")
                path.chmod((0o600, 0o666)[number])
        assert os.umask(umask) == umask, "the umask was left changed"
    finally:
        os.umask(previous)
    files = [path for path in (tmp_path / "step-5").rglob("*") if path.is_file()]
    assert [stat.S_IMODE(path.stat().st_mode) for path in files] == [mode, mode]


def test_dead_saves_are_removed_and_nothing_else(tmp_path):
    for name in (".tmp-step-5", ".tmp-step-10", "step-5", "tmp-notes"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "weights").write_text("x")
    (tmp_path / ".tmp-file").write_text("not a save")
    (tmp_path / ".tmp-link").symlink_to(tmp_path / "step-5")
    removed = atomic_files.remove_dead_saves(tmp_path)
    assert sorted(path.name for path in removed) == [".tmp-step-10", ".tmp-step-5"]
    assert names_in(tmp_path) == [".tmp-file", ".tmp-link", "step-5", "tmp-notes"]
    assert (tmp_path / "step-5" / "weights").read_text() == "x"
    assert atomic_files.remove_dead_saves(tmp_path) == []


def test_a_file_is_replaced_completely_or_not_at_all(tmp_path):
    final = tmp_path / "new" / "report.json"
    with atomic_files.atomic_file(final) as file:
        file.write("first\n")
        assert not final.exists()
    with pytest.raises(ZeroDivisionError), atomic_files.atomic_file(final) as file:
        file.write("second, half of it")
        raise ZeroDivisionError
    assert final.read_bytes() == b"first\n" and list(final.parent.iterdir()) == [final]
    with atomic_files.atomic_file(None) as file:
        file.write("goes nowhere")
