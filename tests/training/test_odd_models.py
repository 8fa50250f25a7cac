"""The scripts on base models whose rope switches, and whose chat template writes the date or takes no system turn."""

import json

import pytest

import models
from checkpointing import manifest
from data_pipeline import tokenization
from tests.modeling.test_lengths import LONG_ROPE
from tests.modeling.test_pretrained import DATED, NO_SYSTEM, save_classifier
from tests.training.test_distributed import farthest, free_port
from utils import read_json

SWITCH = 70  # tokens; the demo's pairs have sequences on both sides

# what Python imports first: the same clock, a day ahead
TOMORROW = """
import datetime

class Tomorrow(datetime.datetime):
    @classmethod
    def now(cls, tz=None):
        return super().now(tz) + datetime.timedelta(days=1)

datetime.datetime = Tomorrow
"""


@pytest.fixture
def tomorrow(tmp_path):
    """The environment of a script that runs a day later."""
    (tmp_path / "clock").mkdir()
    (tmp_path / "clock/sitecustomize.py").write_text(TOMORROW)
    return {"PYTHONPATH": str(tmp_path / "clock")}


@pytest.fixture
def phi(tokenizer, tmp_path):
    """A tiny Phi 3.5 with the demo's tokenizer and a template that writes today's date."""
    rope = {**LONG_ROPE, "original_max_position_embeddings": SWITCH}
    words = models.load_tokenizer(tokenizer.name_or_path)
    words.chat_template = DATED
    return save_classifier(
        tmp_path / "phi", words, "Phi3", rope_parameters=rope, original_max_position_embeddings=SWITCH,
        pad_token_id=0, max_position_embeddings=512, vocab_size=len(words),
    )  # fmt: skip


def test_a_run_goes_on_the_next_day_as_if_it_were_the_same(run_script, phi, small_dataset, tmp_path, tomorrow):
    common = ["--model", phi, "--dataset", small_dataset, "--batch_size", 8, "--grad_accum", 2, "--lr", "1e-3",
              "--eval_steps", 4, "--save_steps", 4, "--no_report"]  # fmt: skip
    straight = run_script("train_rm.py", *common, "--run_name", "straight", "--epochs", 2)
    assert straight.returncode == 0, straight.stderr
    assert "the chat template writes today's date: fixed at " in straight.stdout
    assert (
        f"sequences above {SWITCH} tokens are computed one at a time, because the model changes there"
        in straight.stdout
    )
    runs = tmp_path / "checkpoints/rm"
    assert "strftime_now(" not in (runs / "straight/step-8/chat_template.jinja").read_text()

    first = run_script("train_rm.py", *common, "--run_name", "later", "--epochs", 1)
    assert first.returncode == 0, first.stderr
    resumed = run_script("train_rm.py", "--resume_from", runs / "later", "--epochs", 2, env=tomorrow)
    assert resumed.returncode == 0, resumed.stderr
    for name in ("model.safetensors", "optimizer.safetensors", "chat_template.jinja"):
        same = [(runs / run / "step-8" / name).read_bytes() for run in ("straight", "later")]
        assert same[0] == same[1], name

    # the clock is another one: a new run fixes another date
    started = [
        run_script("train_rm.py", *common, "--run_name", name, "--max_steps", 1, env=env)
        for name, env in (("today", None), ("tomorrow", tomorrow))
    ]
    assert [result.returncode for result in started] == [0, 0], started[1].stderr
    templates = [(runs / name / "step-1/chat_template.jinja").read_text() for name in ("today", "tomorrow")]
    assert templates[0] != templates[1]

    # an evaluation and a pipeline read the same rewards on both days, and so does the page's model
    rows = tmp_path / "in.jsonl"
    texts = ["Yes.", "Yes. " * SWITCH + "Yes."]
    rows.write_text("".join(json.dumps({"prompt": "Is it fresh?", "reply": text}) + "\n" for text in texts))
    model = ["--model", runs / "straight/step-8"]
    scored = [run_script("eval_rm.py", *model, "--score", rows, env=env) for env in (None, tomorrow)]
    assert scored[0].returncode == 0 and scored[0].stdout == scored[1].stdout
    rewards = [json.loads(line)["reward"] for line in scored[0].stdout.splitlines()]
    dialogues = [
        [{"role": "user", "content": "Is it fresh?"}, {"role": "assistant", "content": text}] for text in texts
    ]
    own = models.RewardModel.restore(runs / "straight/step-8").eval()
    assert own.score_dialogues(dialogues) == pytest.approx(rewards, abs=1e-4)


def test_a_checkpoint_whose_date_was_left_open_says_what_has_changed(run_script, phi, small_dataset, tmp_path):
    """As checkpoints of earlier versions are."""
    common = ["--model", phi, "--dataset", small_dataset, "--batch_size", 8, "--grad_accum", 2, "--no_report"]
    assert run_script("train_rm.py", *common, "--run_name", "old", "--max_steps", 1).returncode == 0
    step = tmp_path / "checkpoints/rm/old/step-1"
    (step / "chat_template.jinja").write_text(DATED)
    (step / manifest.MANIFEST).unlink()
    manifest.write_manifest(step, 1)
    resumed = run_script("train_rm.py", "--resume_from", step, "--max_steps", 2)
    assert resumed.returncode == 2 and "found:  64 pairs, with other tokens" in resumed.stderr, resumed.stderr
    resumed = run_script("train_rm.py", "--resume_from", step, "--max_steps", 2, "--allow_data_change")
    assert resumed.returncode == 0, resumed.stderr


def test_system_turns_count_as_moved_wherever_dialogues_are_read(run_script, base, tokenizer, write_rows, tmp_path):
    words = models.load_tokenizer(tokenizer.name_or_path)
    words.chat_template = NO_SYSTEM
    folder = save_classifier(tmp_path / "base", words, vocab_size=len(words))
    system, user = {"role": "system", "content": "Be brief."}, {"role": "user", "content": "Is it fresh?"}
    replies = [[{"role": "assistant", "content": text}] for text in ("Yes, baked this morning.", "No idea.")]
    rows = [
        {"chosen": [*first, user, *replies[0]], "rejected": [*first, user, *replies[1]], "id": number}
        for number in range(20)
        for first in ([], [system])
    ]
    rows.append({"chosen": [user, system, *replies[0]], "rejected": [user, system, *replies[1]]})
    dataset = write_rows(rows, "pairs.jsonl")
    picky = NO_SYSTEM + "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('not here') }}"
    words.chat_template = picky + "{% endif %}{% endfor %}"
    words.save_pretrained(folder)
    result = run_script(
        "train_rm.py", "--model", folder, "--dataset", dataset, "--run_name", "one", "--max_steps", 1,
        "--batch_size", 4, "--grad_accum", 1, "--no_report", "--bad_rows", "skip",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    moved = "system turn put into the first user turn: the model's chat template takes none"
    assert moved in result.stdout and "not here" in result.stdout
    step = tmp_path / "checkpoints/rm/one/step-1"
    assert (step / "chat_template.jinja").read_text().startswith(tokenization.SYSTEM_INTO_USER)

    found = run_script("eval_rm.py", "--model", step, "--dataset", dataset, "--split", "all", "--report_dir", "out")
    assert found.returncode == 0, found.stderr
    words_of_report = "\n".join(read_json(tmp_path / "out/report.json")["rows"]["in_words"])
    assert f"kept 20: {moved} (rows 2, 4, 6, 8, 10, …)" in words_of_report
    said = 'refused by the model\'s chat template (row 41; the first: it says "not here")'
    assert f"skipped 1: {said}" in words_of_report

    lines = write_rows([{"messages": rows[1]["chosen"]}, {"messages": rows[-1]["chosen"]}], "in.jsonl")
    scored = run_script("eval_rm.py", "--model", step, "--score", lines)
    answers = [json.loads(line) for line in scored.stdout.splitlines()]
    assert answers[0]["reward"] is not None and answers[1]["reward"] is None
    assert answers[1]["left_out"] == 'refused by the model\'s chat template: it says "not here"'
    assert f"1 {moved}" in scored.stderr and "1 row scored, 1 skipped" in scored.stderr


@pytest.mark.parametrize("architecture", ["Llama", "GPT2"])
def test_all_linear_trains_saves_and_resumes(run_script, tokenizer, small_dataset, tmp_path, architecture):
    folder = save_classifier(tmp_path / "base", tokenizer, architecture, vocab_size=len(tokenizer))
    common = ["--model", folder, "--dataset", small_dataset, "--batch_size", 8, "--grad_accum", 2, "--no_report",
              "--lora", "--lora_target_modules", "all-linear"]  # fmt: skip
    for name, switches in (("straight", ["--max_steps", 2]), ("later", ["--max_steps", 1])):
        result = run_script("train_rm.py", *common, "--run_name", name, *switches)
        assert result.returncode == 0, result.stderr
    resumed = run_script("train_rm.py", "--resume_from", tmp_path / "checkpoints/rm/later", "--max_steps", 2)
    assert resumed.returncode == 0, resumed.stderr
    files = [tmp_path / f"checkpoints/rm/{run}/step-2/adapter_model.safetensors" for run in ("straight", "later")]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_two_processes_train_across_the_switch_what_one_does(script_server, phi, small_dataset, tmp_path):
    common = ["train_rm.py", "--model", phi, "--dataset", small_dataset, "--batch_size", 8, "--grad_accum", 2,
              "--max_steps", 2, "--precision", "fp32", "--no_report"]  # fmt: skip

    def run(processes, *switches):
        place = {"WORLD_SIZE": processes, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
        ranks = [place | {"RANK": rank, "LOCAL_RANK": rank} for rank in range(processes)] if processes > 1 else [{}]
        scripts = [script_server.start([*common, *switches], tmp_path, rank) for rank in ranks]
        return [script.wait() for script in scripts]

    for processes, name in ((1, "one"), (2, "two")):
        assert [result.returncode for result in run(processes, "--run_name", name)] == [0] * processes
    one, two = (tmp_path / f"checkpoints/rm/{name}/step-2" for name in ("one", "two"))
    assert (one / "chat_template.jinja").read_text() == (two / "chat_template.jinja").read_text()
    assert max(farthest(one, two)) < 1e-4
    # the ranks of FSDP2 would wait for each other for ever
    refused = run(2, "--run_name", "three", "--fsdp")
    assert [result.returncode for result in refused] == [2, 2]
    assert f"--fsdp cannot train this model on sequences above {SWITCH} tokens" in refused[0].stderr
