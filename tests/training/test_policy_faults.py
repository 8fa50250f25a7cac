"""What a policy's run survives beside kills and signals: full disks, damage, memory that runs out in any phase."""

import os
import resource
import shutil
import signal
import sqlite3

import pytest
import torch
from safetensors.torch import load_file

import models
import train_grpo
from checkpointing import checkpoint, manifest
from checkpointing.rollout_file import RolloutFile
from checkpointing.run_folder import step_folders
from grpo import rollouts
from tests.training.test_faults import DAMAGES, in_child
from tests.training.test_train_grpo import FILES, TINY, rollouts_of, spoken, train  # noqa: F401  (fixtures)
from tests.training.test_train_rm import same_bytes

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="forks its victims")
LAST = 3


@pytest.fixture(scope="module")
def straight(spoken, small_dataset, tmp_path_factory):  # noqa: F811
    """The run folder of a training that nothing ever happened to, with a step saved after every update."""
    folder, before = tmp_path_factory.mktemp("straight"), os.getcwd()
    os.chdir(folder)
    flags = ["--model", spoken[0], "--reward_model", spoken[1], "--dataset", small_dataset, *TINY, "--max_steps", LAST,
             "--save_steps", 1, "--run_name", "run"]  # fmt: skip
    code = in_child(lambda: train_grpo.main(list(map(str, flags))), folder / "log")
    assert code == 0, (folder / "log").read_text()
    os.chdir(before)
    return folder / "checkpoints/grpo/run"


@pytest.fixture
def begun(straight, tmp_path, monkeypatch):
    """A copy of that run as it was after step 2: the later replies are there, as after a kill before the save."""
    monkeypatch.chdir(tmp_path)
    run = tmp_path / "checkpoints/grpo/run"
    shutil.copytree(straight, run, ignore=shutil.ignore_patterns(f"step-{LAST}", "reports", "*.lock"))
    shutil.copytree(straight.parents[2] / "logs", tmp_path / "logs")
    return run


def resume(run):
    return lambda: train_grpo.main(["--resume_from", str(run)])


def assert_goes_on_exactly(run, straight, log):
    for step in step_folders(run):
        assert manifest.problem(step) is None, step
    assert in_child(resume(run), log) == 0, log.read_text()
    assert_ended_as(run, straight)


def assert_ended_as(run, straight):
    ended, wanted = run / f"step-{LAST}", straight / f"step-{LAST}"
    assert same_bytes(ended, wanted, *FILES) and rollouts_of(ended) == rollouts_of(wanted)
    assert not list(run.glob(".tmp-*"))


def limit_files_to(size):
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


@pytest.mark.parametrize("kib", [0, 5, 100, 1000])
def test_a_disk_full_at_a_save_exits_4_and_leaves_the_older_steps(begun, straight, tmp_path, kib):
    log = tmp_path / "log"

    def victim():
        def full(*arguments):
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            limit_files_to(kib * 1024)
            try:
                return original(*arguments)
            finally:  # the log that this test reads is a file too
                limit_files_to(resource.RLIM_INFINITY)

        original, checkpoint.save = checkpoint.save, full
        resume(begun)()

    assert in_child(victim, log) == 4, log.read_text()
    text = log.read_text()
    assert "step 3 could not be saved" in text and "step-2 is untouched" in text and "Traceback" not in text, text
    assert f"--resume_from {begun}" in text
    assert_goes_on_exactly(begun, straight, log)


def test_a_disk_full_at_the_file_of_replies_exits_4_and_loses_none(begun, straight, tmp_path):
    log = tmp_path / "log"

    def victim():
        def full(self, *arguments):
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            limit_files_to(4096)
            try:
                return original(self, *arguments)
            finally:
                limit_files_to(resource.RLIM_INFINITY)

        original, RolloutFile.add = RolloutFile.add, full
        resume(begun)()

    assert in_child(victim, log) == 4, log.read_text()
    assert "rollouts.sqlite" in log.read_text() and "Traceback" not in log.read_text(), log.read_text()
    assert_goes_on_exactly(begun, straight, log)


def test_any_damage_of_a_checkpoint_exits_3_and_names_file_and_way_out(begun, straight, tmp_path):
    log = tmp_path / "log"
    for path in sorted((begun / "step-2").iterdir()):
        whole = path.read_bytes()
        for kind, damage in DAMAGES.items():
            damage(path)
            assert in_child(resume(begun / "step-2"), log) == 3, (path.name, kind, log.read_text())
            text = log.read_text()
            assert path.name in text and f"--resume_from {begun / 'step-1'}" in text, (path.name, kind, text)
            path.write_bytes(whole)
    (begun / "step-2" / "optimizer.safetensors").unlink()  # a run falls back to its newest sound step
    assert in_child(resume(begun), log) == 0 and "resuming after step 1" in log.read_text(), log.read_text()
    assert_ended_as(begun, straight)


@pytest.mark.parametrize("kind", list(DAMAGES))
def test_a_damaged_file_of_replies_is_named_or_begun_anew_and_the_steps_are_untouched(begun, straight, tmp_path, kind):
    log, file = tmp_path / "log", begun / "rollouts.sqlite"
    DAMAGES[kind](file)
    code = in_child(resume(begun), log)
    if code:
        assert code == 2 and "the file of replies is damaged" in log.read_text() and str(file) in log.read_text()
        assert "the checkpoints are untouched" in log.read_text()
        file.unlink()
        assert in_child(resume(begun), log) == 0, log.read_text()
    assert same_bytes(begun / f"step-{LAST}", straight / f"step-{LAST}", *FILES)
    with sqlite3.connect(file) as database:
        assert database.execute("SELECT COUNT(*) FROM rollouts WHERE step = ?", (LAST,)).fetchone() == (12,)


PHASES = {
    "sampling": (rollouts, "sample_groups", 1),
    "scoring": (models.RewardModel, "forward", 1),
    "evaluation": (train_grpo.Policy, "reference_logprobs", 0),
    "reference": (train_grpo.Policy, "reference_logprobs", 1),
}


@pytest.mark.parametrize("phase", list(PHASES))
def test_out_of_memory_in_any_phase_goes_on_with_less_and_the_same_replies(train, monkeypatch, capsys, phase):  # noqa: F811
    whole = train("whole", "--max_steps", 2, "--eval_steps", 1)
    owner, name, calls_before = PHASES[phase]
    original, calls = getattr(owner, name), []

    def fail_once(*arguments, **options):
        calls.append(1)
        if len(calls) == calls_before + 1:
            raise torch.OutOfMemoryError("CUDA out of memory (made up)")
        return original(*arguments, **options)

    monkeypatch.setattr(owner, name, fail_once)
    other = train("again", "--max_steps", 2, "--eval_steps", 1)
    assert "out of memory at" in "".join(capsys.readouterr()) and len(calls) > calls_before + 1
    written, wanted = rollouts_of(other), rollouts_of(whole)
    assert [row[:5] for row in written] == [row[:5] for row in wanted]  # the replies, to the letter
    weights, exact = (load_file(folder / "model.safetensors") for folder in (other, whole))
    assert all(torch.allclose(weights[path], tensor, atol=3e-5) for path, tensor in exact.items())


def test_completions_that_never_fit_are_refused_with_what_to_try(train, monkeypatch):  # noqa: F811
    def fail(*arguments):
        raise torch.OutOfMemoryError("CUDA out of memory (made up)")

    monkeypatch.setattr(rollouts, "sample_groups", fail)
    with pytest.raises(rollouts.UserError, match="a single prompt do not fit") as caught:
        train("never")
    assert "--group_size" in str(caught.value)
