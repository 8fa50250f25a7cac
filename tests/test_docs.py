"""README.md and docs/: tables and tree are the code's, links lead somewhere, commands and Python blocks run."""

import json
import re
import shlex
import shutil
import signal
import time
from dataclasses import fields
from pathlib import Path

import pytest

from chat import DEMO_RUN
from tests import pages
from tests.chat_server import free_port
from tests.pages import CONFIGS, PAGES, ROOT
from tests.test_structure import FLOORS

README, *DOCS = PAGES
SMALL = ["--max_steps", "1", "--eval_num_batches", "1"]

each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


def documented(start):
    """Every command of a kind, in the order of the pages. What an earlier page has already is not repeated."""
    found = []
    for page in PAGES:
        found += [command for command in pages.commands(page) if command.startswith(start) and command not in found]
    return found


# ---------------------------------------------------------------------------------------------------------------------
# Text
# ---------------------------------------------------------------------------------------------------------------------


def test_the_readme_is_short():
    assert len(pages.read(README).splitlines()) <= 200


@each_page
def test_a_page_begins_with_its_title_and_what_it_answers(page):
    title, first, *_ = pages.read(page).split("\n\n")
    assert re.fullmatch("# .+", title)
    assert first.endswith((".", ":")) and (page == README or ". " not in first), "one sentence says what it answers"


@each_page
def test_tables_of_flags_and_the_tree_are_what_the_code_says(page):
    for marker, text in pages.generated(page):
        assert text == pages.generate(marker), f"{marker}: `python -m tests.pages` rewrites it"


def test_every_flag_is_in_a_table_on_exactly_one_page():
    markers = {page: [marker for marker, _ in pages.generated(page) if "flags: " in marker] for page in PAGES}
    whole = {page: [name for name in names if " --" not in name] for page, names in markers.items()}
    for script, config in CONFIGS.items():
        (page,) = (page for page, names in whole.items() if any(script in name for name in names))
        listed = [
            field.name for name in whole[page] if script in name
            for field in pages.flags_of(name.removeprefix("flags: "))
        ]  # fmt: skip
        assert sorted(listed) == sorted(field.name for field in fields(config))
    for page in PAGES:
        written = re.findall(r"^\| `--(\w+)` \|", pages.read(page), re.MULTILINE)
        shown = [field for name in markers[page] for field in pages.flags_of(name.removeprefix("flags: "))]
        assert written == [field.name for field in shown], "a table of flags that nothing keeps in step"


def test_the_tree_names_every_product_file():
    named = re.findall(r"^(?:  )?(\w+\.[\w.]+|\w+/) ", pages.tree(), re.MULTILINE)
    folders = [path.parent for path in ROOT.glob("*/__init__.py") if path.parent.name != "tests"] + [ROOT / "bench"]
    files = [path.name for path in ROOT.glob("*.py")]
    files += [path.name for folder in folders for path in folder.glob("*.*") if path.name != "__init__.py"]
    assert sorted(named) == sorted(files + [f"{folder.name}/" for folder in folders])
    assert ("tree", pages.tree()) in pages.generated(ROOT / "docs/development.md")


def test_the_floors_are_those_of_the_structure_test():
    drawn = pages.read(ROOT / "docs/development.md").split("## The floors")[1].split("```text\n")[1].split("\n```")[0]
    floors = [set(re.findall(r"\w+", line.replace(".py", ""))) for line in drawn.splitlines()]
    assert floors[::-1] == FLOORS


@each_page
def test_links_and_pictures_lead_somewhere(page):
    for link in pages.links(page):
        if not link.startswith("https://"):
            name, _, fragment = link.partition("#")
            target = (page.parent / name).resolve() if name else page
            assert target.is_file() and target.is_relative_to(ROOT), link
            assert not fragment or fragment in map(pages.anchor, pages.headings(target)), link


def test_every_page_can_be_reached_from_the_readme():
    reached, left = set(), [README]
    while left:
        page = left.pop()
        reached.add(page)
        names = {link.partition("#")[0] for link in pages.links(page) if ".md" in link and "://" not in link}
        left += {(page.parent / name).resolve() for name in names} - reached
    assert reached == set(PAGES)


@each_page
def test_files_that_a_page_names_exist(page):
    for name in re.findall(r"`([\w/]+\.py)\b", pages.read(page)):
        assert (ROOT / name).is_file() or name == "__init__.py", name


@each_page
def test_flags_that_a_page_mentions_exist(page):
    text = re.sub(r"^```(?:slurm|dockerfile).*?^```", "", pages.read(page), flags=re.DOTALL | re.MULTILINE)
    known = {field.name for config in CONFIGS.values() for field in fields(config)}
    known |= {f"no_{name}" for name in known}
    known |= set(re.findall(r'"--(\w+)"', "".join(path.read_text() for path in (ROOT / "bench").glob("*.py"))))
    known |= {"nproc_per_node", "nnodes", "rdzv_backend", "rdzv_endpoint", "shutdown_timeout"}  # torchrun's
    known |= {"multi_gpu", "num_processes", "cpu", "logdir", "help"}  # accelerate's, TensorBoard's, argparse's
    assert set(re.findall(r"(?<![\w-])--(\w+)", text)) <= known


# ---------------------------------------------------------------------------------------------------------------------
# Commands
# ---------------------------------------------------------------------------------------------------------------------

RUN_BELOW = (
    "python train_rm.py",
    "python train_sft.py",
    "python train_grpo.py",
    "python eval_rm.py",
    "python chat.py",
    "python manage_runs.py",
    "python data.py",
    "tensorboard ",
    "torchrun ",
)
RUN_BY_CI = ("make lint", "make demo", "make test", "uv venv", "uv pip install -r requirements.txt")


def test_every_command_is_of_a_kind_that_is_run():
    ci = (ROOT / ".ci/run").read_text()
    makefile = (ROOT / "Makefile").read_text()
    benchmarks = "".join(path.read_text() for path in (ROOT / "tests/bench").glob("*.py"))
    for command in documented(""):
        if command.startswith("python bench/"):
            assert re.search(rf'["/]{Path(command.split()[1]).name}"', benchmarks), command
        elif command.startswith("make "):
            assert f"\n{command.removeprefix('make ')}: " in makefile, command
        elif "pytest" not in command and command != "python -m tests.pages":
            assert command.startswith(RUN_BELOW) or command in RUN_BY_CI, command
    for command in RUN_BY_CI:
        assert command.replace("install -r", "install --dry-run -r") in ci, command


def test_pytest_commands_select_tests():
    selections = [shlex.split(command.split("pytest ")[1]) for command in documented("") if "pytest" in command]
    assert len(selections) >= 3
    for path, *options in selections:
        assert (ROOT / path).exists(), path
        if options:
            option, word = options
            assert option == "-k" and re.search(rf"def test_\w*{word}", (ROOT / path).read_text()), options


def test_writing_the_pages_changes_nothing_now():
    assert {page: pages.rewrite(pages.read(page)) for page in PAGES} == {page: pages.read(page) for page in PAGES}


@pytest.fixture(scope="module")
def reader(tmp_path_factory, base, small_dataset, script_server):
    """A reader of the pages, in a folder with files of their own and the two runs that the pages speak of."""
    reader = Reader(tmp_path_factory.mktemp("reader"), base, small_dataset, script_server)
    reader.train(["--run_name", "first"])
    reader.train(["--run_name", "adapter", "--lora"])
    return reader


class Reader:
    """Runs commands of the pages in one folder, on the small model and for one step."""

    def __init__(self, folder, base, dataset, server):
        self.folder, self.model, self.dataset = folder, ["--model", base], ["--dataset", dataset]
        self.server = server
        shutil.copy(f"{dataset}/train.jsonl", folder / "pairs.jsonl")
        replies = {"prompt": "What should I know about bread?", "replies": ["A hot oven gives a crisp crust.", "No."]}
        (folder / "replies.jsonl").write_text(json.dumps(replies) + "\n")
        (folder / "settings.json").write_text(json.dumps({"batch_size": 16, "lora": True}))

    def run(self, *words):
        """Run a script that is to succeed; returns its standard output."""
        result = self.server.run(words, self.folder)
        assert result.returncode == 0, (words, result.stderr)
        return result.stdout

    def small(self, flags):
        """Flags of a training, made small: later ones win."""
        if "--resume_from" in flags:
            return [*flags, *SMALL]
        return [*flags, *SMALL, *self.model, *([] if "--dataset" in flags else self.dataset)]

    def train(self, flags):
        return self.run("train_rm.py", *self.small(flags), "--no_report")


def test_training_commands_run_as_written(reader):
    commands = [shlex.split(command)[1:] for command in documented("python train_rm.py")]
    assert len(commands) >= 9
    for number, (script, *flags) in enumerate(commands):
        own_name = [] if "--resume_from" in flags else ["--run_name", f"run{number}"]  # `first` is there already
        output = reader.run(script, *reader.small(flags), *own_name)
        assert "report: " in output or "nothing to do" in output


def test_commands_for_several_processes_run_as_written(reader):
    """With fewer processes, on CPUs; where there are several machines, this one is all of them."""
    launches = [shlex.split(command)[1:] for command in documented("torchrun")]
    assert len(launches) == 4 and sum("--nnodes" in words for words in launches) == 1
    for number, words in enumerate(launches):
        machines = int(words[words.index("--nnodes") + 1]) if "--nnodes" in words else 1
        words[words.index("--nproc_per_node") + 1] = str(2 // machines)
        words = [word.replace("HOST:29500", f"127.0.0.1:{free_port()}") for word in words]
        place = words.index("train_rm.py")
        flags = [*reader.small(words[place + 1 :]), "--no_report"]
        flags += [] if "--resume_from" in flags else ["--run_name", f"several{number}"]
        words = ["-m", "torch.distributed.run", *words[:place], ROOT / "train_rm.py", *flags]
        agents = [reader.server.start(words, reader.folder) for _ in range(machines)]
        results = [agent.wait() for agent in agents]
        assert [result.returncode for result in results] == [0] * machines, (words, results)
        output = "".join(result.stdout for result in results)
        assert "processes: 2" in output and ("done: 1 step," in output or "nothing to do" in output), output


def test_managing_commands_run_as_written(reader):
    commands = [shlex.split(command)[1:] for command in pages.commands(ROOT / "docs/runs.md")]
    assert len(commands) >= 10 and {"manage_runs.py"} == {words[0] for words in commands}
    assert set(documented("python manage_runs.py")) <= {f"python {shlex.join(words)}" for words in commands}
    for words in commands:
        assert reader.run(*words), words
    assert (reader.folder / "checkpoints/rm/first/step-1/optimizer.safetensors").exists()
    assert (reader.folder / "logs/rm/adapter").is_dir()


SMALLER = {
    "train_rm.py": [*SMALL, "--no_report"],
    "train_sft.py": SMALL,
    "train_grpo.py": ["--max_steps", "1", "--eval_num_prompts", "4", "--max_new_tokens", "8"],
    "eval_rm.py": ["--max_pairs", "8", "--no_untrained_baseline"],
}


def test_from_preferences_to_a_policy_as_written(script_server, tmp_path):
    """The README's story in six commands, on the demo's own models, and then those of the page about policies."""
    section = (
        pages.read(README).split("## From preferences to a better policy")[1].split("```bash\n")[1].split("```")[0]
    )
    story = [shlex.split(line, comments=True)[1:] for line in section.splitlines()]
    assert [words[0] for words in story] == [*SMALLER, "manage_runs.py", "chat.py"]
    for words in story[:-1]:
        result = script_server.run([*words, *SMALLER.get(words[0], [])], tmp_path)
        assert result.returncode == 0, (words, result.stderr)
    assert all(name in result.stdout for name in ("demo", "better")), "one list of all runs"
    port = free_port()
    server = script_server.start([*story[-1], "--port", port], tmp_path)
    waited = script_server.run(["-c", wait_for(port)], tmp_path)
    server.send_signal(signal.SIGTERM)
    assert waited.returncode == 0 and server.wait().returncode == 143
    page = [shlex.split(command)[1:] for command in pages.commands(ROOT / "docs/grpo.md")]
    assert page[:2] == [words for words in story if words[0] in ("train_sft.py", "train_grpo.py")]
    ((script, *flags),) = page[2:]
    result = script_server.run([script, *flags, "--max_steps", "2"], tmp_path)
    assert result.returncode == 0 and "resuming after step 1 of 2" in result.stdout, result.stderr


def test_evaluating_commands_run_as_written(reader):
    commands = [shlex.split(command)[1:] for command in documented("python eval_rm.py")]
    commands = [words for words in commands if "./checkpoints/rm/demo" not in words]
    assert len(commands) == 5
    for words in commands:
        output = reader.run(*words)
        assert ("reward" in output) if "--score" in words else ("report.html" in output), words
    report = json.loads((reader.folder / "checkpoints/rm/first/reports/step-1/report.json").read_text())
    assert report["n"] == 16 and len((reader.folder / "scores.jsonl").read_text().splitlines()) == 16


def test_looking_at_data_runs_as_written(reader):
    commands = [shlex.split(command)[1:] for command in documented("python data.py")]
    assert commands
    for words in commands:
        output = reader.run(*words, *reader.model)
        assert "train: kept" in output and output.count("as the model sees it") == 3, output


def test_python_blocks_load_what_training_wrote(reader):
    blocks = {block for page in PAGES for block in pages.code_blocks(page, "python") if "gradio" not in block}
    assert len(blocks) == 2 and all("from_pretrained" in block for block in blocks)
    for block in blocks:
        code = block.replace("step-350", "step-1") + "\nassert model.score.weight.shape[0] == 1\n"
        reader.run("-c", code + ("assert reward.isfinite()\n" if "reward =" in block else ""))


def test_chat_commands_and_the_api_example_run_as_written(reader):
    reader.train(["--demo", "--run_name", DEMO_RUN])
    (example,) = {block for page in PAGES for block in pages.code_blocks(page, "python") if "gradio" in block}
    commands = [shlex.split(command)[1:] for command in documented("python chat.py") if "/grpo/" not in command]
    commands = [words for words in commands if "--auth" not in words]  # the example gives no password
    assert len(commands) == 3
    for words in commands:
        small = [*reader.model, "--reward_model", "checkpoints/rm/first"] if "--autoload" in words else []
        port = free_port()
        server = reader.server.start([*words, *small, "--port", port], reader.folder)
        try:
            code = example.replace("127.0.0.1:7860", f"127.0.0.1:{port}")
            output = reader.run("-c", wait_for(port) + code)
        finally:
            server.send_signal(signal.SIGTERM)
        assert server.wait().returncode == 143
        reward, probability = map(float, output.split()[-2:])
        assert abs(reward) < 100 and 0 <= probability <= 1


def wait_for(port):
    """Code that waits until a server listens at a port, at most two minutes."""
    return (
        "import socket, time, contextlib\n"
        "for _ in range(1200):\n"
        "    with contextlib.suppress(OSError), socket.create_connection(('127.0.0.1', "
        f"{port})):\n        break\n"
        "    time.sleep(0.1)\n"
    )


def test_tensorboard_serves_the_logs(reader):
    (command,) = documented("tensorboard")
    server = reader.server.start(["-m", "tensorboard.main", *shlex.split(command)[1:], "--port", 0], reader.folder)
    deadline = time.monotonic() + 120
    while "http://" not in server.read("stderr") and time.monotonic() < deadline:
        time.sleep(0.1)
    server.send_signal(signal.SIGTERM)
    assert re.search(r"TensorBoard [\d.]+ at http://\S+", server.wait().stderr)


def test_examples_of_rows_are_read_by_the_scripts(reader):
    for page in ("README.md", "docs/data.md"):
        rows = "".join(pages.code_blocks(ROOT / page, "json"))
        (reader.folder / "rows.jsonl").write_text(rows)
        flags = ["--dataset", "rows.jsonl", "--split", "all", "--no_untrained_baseline", "--report_dir", "rows"]
        reader.run("eval_rm.py", "--model", "checkpoints/rm/first", *flags)
        assert json.loads((reader.folder / "rows/report.json").read_text())["n"] == len(rows.splitlines()) == 3
    (replies,) = pages.code_blocks(ROOT / "docs/evaluation.md", "json")
    (reader.folder / "lines.jsonl").write_text(replies)
    output = reader.run("eval_rm.py", "--model", "checkpoints/rm/first", "--score", "lines.jsonl")
    assert len(re.findall(r'"rewards?": ', output)) == 3 and "null" not in output
