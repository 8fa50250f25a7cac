"""Two models, checkpoints of a training, where the report goes, and evaluations that were stopped."""

import contextlib
import io
import itertools
import os
import re
import shlex
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from html.parser import HTMLParser
from pathlib import Path

import pytest

import eval_rm
import train_rm
import utils
from checkpointing import resolve
from checkpointing.run_folder import best_step
from evaluation import evaluator
from tests.conftest import ROOT
from tests.evaluation.conftest import FP32, lines_of
from utils import DiskOrNetworkError, UserError

# -- Two models, the untrained one, where the report goes --------------------------------------------------------------


def test_two_models_on_the_same_pairs(evaluate, length_model, constant_model, capsys):
    found = evaluate(length_model, "--against", constant_model, "--scores_out", "s.jsonl")["against"]
    assert found["n"] == 400 and found["only_b_right"] == found["both_right"] == 0
    assert found["only_a_right"] + found["neither_right"] == 400
    assert found["accuracy_difference"] == found["only_a_right"] / 400 and found["low"] > 0
    assert found["mcnemar"]["p_value"] < 1e-10
    scores = lines_of("s.jsonl")
    assert {one["against"]["margin"] for one in scores} == {0.0}
    furthest = utils.read_json(Path("out/report.json"))["reading"]["disagreements"]
    assert len(furthest) == 10 and furthest[0]["margin"] == max(one["margin"] for one in scores)
    assert "McNemar" in capsys.readouterr().out


TWO_STEPS = ("--max_steps", "2", "--batch_size", "8", "--grad_accum", "1")


@pytest.fixture(scope="module")
def two_steps(tmp_path_factory, base, small_dataset):
    """A folder with a run of two steps and its logs."""
    folder = tmp_path_factory.mktemp("two_steps")
    printed = io.StringIO()
    with contextlib.chdir(folder), contextlib.redirect_stdout(printed):
        train_rm.main(["--model", base, "--dataset", small_dataset, *TWO_STEPS, "--run_name", "crumb"])
    assert printed.getvalue().endswith(f"report: {Path('checkpoints/rm/crumb/reports/step-2/report.html')}\n")
    return folder


@pytest.fixture
def trained_run(two_steps, tmp_path, monkeypatch):
    """A copy of that run in the working folder."""
    shutil.copytree(two_steps, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "checkpoints/rm/crumb"


def test_a_checkpoint_of_ours_knows_its_data_base_model_logs_and_report_folder(
    trained_run, monkeypatch, tmp_path, capsys
):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    import manage_runs

    step = trained_run / "step-2"
    before = {path.name: utils.sha256_of(path) for path in step.iterdir()}
    (point,) = utils.read_json(trained_run / "run.json")["evaluations"]["accuracy"]
    content = utils.read_json(trained_run / "reports/step-2/report.json")  # which training wrote, of what it evaluated
    assert (point["step"], round(point["value"] * point["count"]), point["count"]) == (
        2,
        content["right"],
        content["n"],
    )
    eval_rm.main(["--model", str(trained_run)])  # a second report takes the first one's place
    assert {path.name: utils.sha256_of(path) for path in step.iterdir()} == before
    assert resolve.sound_checkpoint(str(step)) == step
    reports = trained_run / "reports/step-2"
    assert sorted(path.name for path in reports.iterdir()) == ["report.html", "report.json"]
    content = utils.read_json(reports / "report.json")
    assert content["n"] == 16 and content["step"] == 2
    assert content["baselines"]["untrained model"]["n"] == 16
    board = EventAccumulator(str(tmp_path / "logs/rm/crumb")).Reload()
    (point,) = board.Scalars("report/accuracy")
    assert (point.step, point.value) == (2, pytest.approx(content["accuracy"]))
    assert {"report/accuracy", "report/reliability", "report/length"} <= set(board.Tags()["images"])

    capsys.readouterr()
    manage_runs.main(["--show", "crumb"])  # and manage_runs.py takes the reports for a part of the run
    shown = capsys.readouterr().out
    assert "left alone" not in shown and "reports/step-2/report.html" in shown
    manage_runs.main(["--delete", "crumb/step-2", "--yes"])
    assert reports.is_dir()
    manage_runs.main(["--undo"])
    manage_runs.main(["--delete", "crumb", "--yes"])
    assert not trained_run.exists()
    manage_runs.main(["--undo"])
    assert (reports / "report.html").is_file()


def report_points(log_folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    return [point.step for point in EventAccumulator(str(log_folder)).Reload().Scalars("report/accuracy")]


@pytest.mark.usefixtures("undrawn")
def test_tensorboard_shows_a_run_once_with_its_reports_at_their_steps(trained_run, tmp_path):
    from tensorboard.backend.event_processing.event_multiplexer import EventMultiplexer

    logs = tmp_path / "logs/rm"
    (logs / "crumb/report").mkdir()  # where earlier versions put this step's figures
    (logs / "crumb/report/events.out.tfevents.1700000000.host.1.0.step-2").write_bytes(b"")
    train_rm.main(["--resume_from", str(trained_run), "--max_steps", "4", "--eval_steps", "0", "--save_steps", "1"])
    assert sorted(report_points(logs / "crumb")) == [2, 4]
    eval_rm.main(["--model", str(trained_run / "step-2")])
    eval_rm.main(["--model", str(trained_run / "step-3")])
    assert sorted(report_points(logs / "crumb")) == [2, 3, 4]
    assert list(EventMultiplexer().AddRunsFromDirectory(str(logs)).Reload().Runs()) == ["crumb"]
    # going back to step 2 takes away the reports on what comes after it, as it does with every other point
    train_rm.main(["--resume_from", str(trained_run / "step-2"), "--max_steps", "3", "--eval_steps", "0"])
    assert sorted(report_points(logs / "crumb")) == [2, 3]


@pytest.mark.usefixtures("undrawn")
def test_a_report_on_a_run_that_is_being_trained_adds_no_file_to_its_logs(trained_run, tmp_path):
    def files():
        return sorted(path.name for path in (tmp_path / "logs/rm/crumb").iterdir())

    before = files()
    held = subprocess.Popen(
        [sys.executable, "-c", "import sys, time; from pathlib import Path; from common import file_locks\n"
         "lock = file_locks.RunLock(Path(sys.argv[1])); print('held', flush=True); time.sleep(600)", str(trained_run)],
        stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    try:
        assert held.stdout.readline() == "held\n"
        eval_rm.main(["--model", str(trained_run)])
    finally:
        held.kill()
        held.communicate()
    assert files() == before
    assert report_points(trained_run / "reports/step-2/tensorboard") == [2]


@pytest.mark.usefixtures("undrawn")
def test_a_training_reports_on_its_best_checkpoint_too_or_not_at_all(base, small_dataset, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flags = ["--model", base, "--dataset", small_dataset, *TWO_STEPS, "--max_steps", "3", "--eval_steps", "1",
             "--save_steps", "1", "--eval_num_batches", "1", "--lr", "1e-2"]  # fmt: skip
    train_rm.main([*flags, "--run_name", "quiet", "--no_report"])
    assert not (tmp_path / "checkpoints/rm/quiet/reports").exists()
    train_rm.main([*flags, "--run_name", "told"])
    run = tmp_path / "checkpoints/rm/told"
    wanted = {"step-3", best_step(run).name}
    assert {path.name for path in (run / "reports").iterdir()} == wanted
    for point in utils.read_json(run / "run.json")["evaluations"]["accuracy"]:
        if f"step-{point['step']}" in wanted:
            content = utils.read_json(run / f"reports/step-{point['step']}/report.json")
            assert (content["right"], content["n"]) == (round(point["value"] * point["count"]), point["count"])


@pytest.mark.usefixtures("undrawn")
def test_a_resumed_training_ends_with_a_report_of_what_it_evaluated(trained_run):
    train_rm.main(["--resume_from", str(trained_run), "--max_steps", "3"])
    assert (trained_run / "reports/step-3/report.html").is_file()
    content = utils.read_json(trained_run / "reports/step-3/report.json")
    point = utils.read_json(trained_run / "run.json")["evaluations"]["accuracy"][-1]
    assert (point["step"], point["count"]) == (content["step"], content["n"]) == (3, 16)
    assert content["right"] == round(point["value"] * point["count"])
    assert len(found := content["reward_percentiles"]) == 101 and found == sorted(found)


def test_a_report_that_cannot_be_written_does_not_fail_the_training(trained_run, capsys):
    shutil.rmtree(trained_run / "reports")
    (trained_run / "reports").write_text("in the way")
    train_rm.main(["--resume_from", str(trained_run), "--max_steps", "3", "--report"])
    assert "the training is saved, but there is no report of it" in capsys.readouterr().err
    assert (trained_run / "step-3/manifest.json").is_file() and (trained_run / "reports").is_file()


def test_a_report_calls_a_hub_model_by_its_id_and_a_run_by_its_newest_step(reward_checkpoint, tmp_path):
    assert evaluator.saved_model("someone/reward-model", tmp_path / "snapshots/0f3a").name == "someone/reward-model"
    assert evaluator.saved_model(str(reward_checkpoint.parent), reward_checkpoint).name.endswith("step-2")


def test_an_unwritable_folder_is_reported_before_scoring(reward_checkpoint, tmp_path, monkeypatch, demo_folder):
    monkeypatch.chdir(tmp_path)
    Path("taken").touch()
    with pytest.raises(DiskOrNetworkError, match="the report's folder cannot be written") as caught:
        eval_rm.main(
            ["--model", str(reward_checkpoint), "--dataset", str(demo_folder[1]), "--report_dir", "taken/report"]
        )
    assert "nothing was scored" in str(caught.value) and "--report_dir FOLDER" in str(caught.value)


@pytest.mark.usefixtures("undrawn")
def test_an_adapter_whose_base_model_has_moved_is_opened_with_base_model(evaluate, adapter, base, tmp_path):
    moved = tmp_path / "moved"
    shutil.copytree(adapter, moved)
    settings = utils.read_json(moved / "adapter_config.json")
    utils.write_json(moved / "adapter_config.json", settings | {"base_model_name_or_path": "/nowhere/base"})
    for models_given in ([moved], [adapter, "--against", moved]):
        with pytest.raises(UserError, match="--base_model FOLDER") as caught:
            evaluate(*models_given)
        assert "/nowhere/base" in str(caught.value) and not Path("out").exists()
    found = evaluate(adapter, "--against", moved, "--base_model", base, "--max_pairs", 20)
    assert found["against"]["only_a_right"] == found["against"]["only_b_right"] == 0


def test_a_base_model_for_a_whole_model_is_refused_and_a_missing_one_named_by_its_flag(
    evaluate, adapter, length_model, write_rows
):
    with pytest.raises(UserError, match="--base_model is for LoRA checkpoints"):
        evaluate(length_model, "--base_model", "x")
    for flags in ([], ["--score", str(write_rows([{"prompt": "a", "replies": ["b"]}]))]):
        with pytest.raises(UserError, match=r"base model of a LoRA checkpoint is missing(.|\n)*--base_model FOLDER"):
            eval_rm.main(["--model", str(adapter), "--base_model", "./nowhere", *flags])


def test_a_missing_base_model_is_noted_in_the_report(trained_run, monkeypatch, tmp_path, base):
    monkeypatch.chdir(tmp_path)
    config = utils.read_json(trained_run / "step-2/train_config.json") | {"model": "/nowhere/base"}
    copy = tmp_path / "copy"
    shutil.copytree(trained_run / "step-2", copy)
    utils.write_json(copy / "train_config.json", config)
    (copy / "manifest.json").unlink()
    eval_rm.main(["--model", str(copy)])
    content = utils.read_json(tmp_path / "report/report.json")
    assert "untrained model" not in content["baselines"]
    assert content["notes"] == ["no untrained baseline: the base model is no longer at /nowhere/base"]


def test_the_page_is_complete_loads_nothing_and_escapes_replies(evaluate, constant_model, write_rows):
    rows = [
        {"prompt": "<script>alert(1)</script>", "chosen": '<img src="http://evil/x">', "rejected": "</p>",
         "kind": "<b>k"},
        {"prompt": "two", "chosen": "a", "rejected": "b", "kind": "[bold]plain"},
    ]  # fmt: skip
    evaluate(constant_model, "--split", "all", dataset=write_rows(rows))
    page = Path("out/report.html").read_text(encoding="utf-8")
    assert "<script" not in page and "<img" not in page and "<b>k" not in page
    assert "&lt;script&gt;alert(1)" in page and "default-src 'none'" in page
    tags = []
    reader = HTMLParser()
    reader.handle_starttag = lambda tag, attributes: tags.append((tag, dict(attributes)))
    reader.feed(page)
    assert not {tag for tag, _ in tags} & {"script", "img", "link", "iframe", "object", "image", "a", "form"}
    pointers = [v for _, found in tags for k, v in found.items() if k.endswith(("href", "src", "action"))]
    assert all(pointer.startswith("#") for pointer in pointers), pointers  # a mark that is used again
    assert "url(h" not in page and "@import" not in page
    assert not re.search(r"#0[0-9a-f]0[0-9a-f]0[0-9a-f]", page), "a stand-in colour was left"
    assert page.count("<svg") == page.count("</svg>") == page.count("<figcaption") >= 4
    assert "</b> &lt;script&gt;alert(1)&lt;/script&gt;" in page, "a folded pair begins with its prompt"
    assert "@media print" in page


# -- Killed, stopped, no room ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def many_pairs(tmp_path_factory, demo_folder):
    file = tmp_path_factory.mktemp("many") / "many.jsonl"
    with (demo_folder[1] / "train.jsonl").open() as lines:
        file.write_text("".join(itertools.islice(lines, MANY)))
    return file


MANY, WITHOUT_BASELINE = 600, ("--split", "all", "--report_dir", "out", "--no_untrained_baseline")


@pytest.fixture(scope="module")
def uninterrupted(reward_checkpoint, many_pairs, tmp_path_factory):
    """The report on these pairs of an evaluation that nothing stopped."""
    with contextlib.chdir(tmp_path_factory.mktemp("uninterrupted")):
        eval_rm.main(["--model", str(reward_checkpoint), "--dataset", str(many_pairs), *WITHOUT_BASELINE])
        return utils.read_json(Path("out/report.json"))


def start(folder, model, dataset):
    """A slow evaluation in a process: one pair in each forward."""
    command = [sys.executable, ROOT / "eval_rm.py", "--model", model, "--dataset", dataset, *WITHOUT_BASELINE,
               "--tokens_per_batch", "32"]  # fmt: skip
    return subprocess.Popen(
        list(map(str, command)), cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def kept_scores(folder):
    """How many rows the partial file of an evaluation holds."""
    for path in (folder / "out").glob(".partial-*.sqlite"):
        with contextlib.suppress(sqlite3.Error), contextlib.closing(sqlite3.connect(path)) as database:
            return database.execute("SELECT COUNT(*) FROM scores").fetchone()[0]
    return 0


def wait_for_scores(process, folder, rows):
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline and process.poll() is None:
        if kept_scores(folder) >= rows:
            return
        time.sleep(0.02)
    raise AssertionError(process.communicate())


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_a_stopped_evaluation_goes_on_where_it_was(
    number, tmp_path, reward_checkpoint, many_pairs, uninterrupted, evaluate, capsys
):
    process = start(tmp_path, reward_checkpoint, many_pairs)
    wait_for_scores(process, tmp_path, 100)
    process.send_signal(number)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == (-9 if number == signal.SIGKILL else 128 + number)
    if number != signal.SIGKILL:
        assert "the same command continues from there" in errors
    kept = kept_scores(tmp_path)
    assert 100 <= kept < MANY
    resumed = evaluate(reward_checkpoint, *WITHOUT_BASELINE, dataset=many_pairs)
    assert f"{kept:,} rows were scored before; continuing after them" in capsys.readouterr().err
    assert not list((tmp_path / "out").glob(".*")), "the partial file goes when the report is there"
    assert resumed["n"] + resumed["rows"]["left_out"] == MANY
    assert resumed["right"] == pytest.approx(uninterrupted["right"], abs=2)
    assert resumed["mean_margin"] == pytest.approx(uninterrupted["mean_margin"], abs=1e-3)


@pytest.mark.usefixtures("undrawn")
def test_scores_of_another_model_or_of_other_rows_are_not_reused(
    evaluate, length_model, constant_model, demo_folder, monkeypatch
):
    from evaluation import report

    def no_room(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(report, "write_json", no_room)
        with pytest.raises(OSError):
            evaluate(length_model, *FP32)
    assert len(list(Path("out").glob(".partial-*"))) == 1
    Path("out/.partial-0123.jsonl").touch()  # the form before SQLite
    assert evaluate(constant_model, *FP32)["ties"] == 400
    assert evaluate(length_model, "--max_pairs", 30, *FP32)["n"] == 30
    assert len(list(Path("out").glob(".partial-*"))) == 1
    assert evaluate(length_model, *FP32)["n"] == 400
    assert not list(Path("out").glob(".partial-*"))


@pytest.mark.skipif(os.name == "nt", reason="ulimit is a shell's on Unix")
@pytest.mark.usefixtures("undrawn")
def test_a_full_disk_exits_4_and_keeps_what_was_scored(tmp_path, reward_checkpoint, many_pairs, evaluate, capsys):
    command = shlex.join([sys.executable, str(ROOT / "eval_rm.py"), "--model", str(reward_checkpoint), "--dataset",
                          str(many_pairs), *WITHOUT_BASELINE])  # fmt: skip
    result = subprocess.run(
        ["bash", "-c", f"ulimit -f 20; exec {command}"], cwd=tmp_path, capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 4, result.stderr
    assert "writing to disk failed" in result.stderr and "are kept" in result.stderr
    assert "Traceback" not in result.stderr
    evaluate(reward_checkpoint, *WITHOUT_BASELINE, dataset=many_pairs)
    assert "rows were scored before" in capsys.readouterr().err
