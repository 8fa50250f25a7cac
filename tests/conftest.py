"""Shared by all tests: one torch thread, a cache of their own, a small base model, and the scripts as subprocesses."""

import json
import os
import signal
import sys
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported: test processes share the cores
os.environ["HF_HUB_OFFLINE"] = "1"  # no test may reach for the hub; the one about its absence sets this anew

import numpy as np
import pytest

from checkpointing import manifest
from tests.script_server import ScriptServer

# A shell that starts tests in the background has them ignore Ctrl-C, and `nohup` a closed terminal; the scripts would
# too, as they should, but tests send them these signals.
for name in ("SIGINT", "SIGHUP"):
    if hasattr(signal, name) and signal.getsignal(getattr(signal, name)) is signal.SIG_IGN:
        signal.signal(getattr(signal, name), signal.default_int_handler if name == "SIGINT" else signal.SIG_DFL)

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "bench")]


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory):
    os.environ["RL_WITH_RM_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session")
def demo_folder(tmp_path_factory):
    """The demo's model and pairs: (model folder, pairs folder)."""
    from data_pipeline import demo

    return demo.write_demo(tmp_path_factory.mktemp("demo") / "demo")


@pytest.fixture(scope="session")
def base(demo_folder):
    return str(demo_folder[0])


@pytest.fixture(scope="session")
def tokenizer(base):
    import models

    return models.load_tokenizer(base)


@pytest.fixture(scope="session")
def small_dataset(demo_folder, tmp_path_factory):
    """64 training and 16 test pairs of the demo's."""
    folder = tmp_path_factory.mktemp("small")
    for name, count in (("train", 64), ("test", 16)):
        lines = (demo_folder[1] / f"{name}.jsonl").read_text().splitlines()[:count]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    return str(folder)


@pytest.fixture
def write_rows(tmp_path):
    """Write rows to a .jsonl file; returns its path."""

    def write(rows, name="train.jsonl"):
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return path

    return write


@pytest.fixture(scope="session")
def script_server(own_cache):
    """Starts scripts as processes that need not import torch first."""
    server = ScriptServer()
    yield server
    server.close()


@pytest.fixture
def run_script(script_server, tmp_path):
    """Run a script of the project in a folder of its own; returns the finished process with text output."""

    def run(script, *arguments, env=None, timeout=300):
        return script_server.run([script, *arguments], tmp_path, env, timeout)

    return run


@pytest.fixture(scope="session")
def run_folder(base, tokenizer, tmp_path_factory):
    """A run whose step-2 is a reward checkpoint of the demo's model."""
    import models
    import utils

    folder = tmp_path_factory.mktemp("rm") / "bread"
    models.RewardModel.create(base, tokenizer, 0).save(folder / "step-2")
    utils.write_json(folder / "step-2" / "train_config.json", {"model": base})
    manifest.write_manifest(folder / "step-2", 2)
    return folder


@pytest.fixture(scope="session")
def reward_checkpoint(run_folder):
    return run_folder / "step-2"


@pytest.fixture(scope="session")
def lora_checkpoint(base, tokenizer, tmp_path_factory):
    """A reward adapter without a train_config.json."""
    import models

    folder = tmp_path_factory.mktemp("lora") / "adapter"
    models.RewardModel.create(base, tokenizer, 0, models.LoraSettings()).save(folder)
    return folder


def folder_from(variable, missing):
    """The folder that an environment variable names; without it the test is skipped and says what is missing."""
    folder = os.environ.get(variable) or pytest.skip(f"{variable} is not set: {missing}")
    return str(Path(folder).resolve())  # scripts run in other folders


@pytest.fixture(scope="session")
def real_data():
    return folder_from("HH_RLHF_DIR", "no real HH-RLHF pairs here")


@pytest.fixture(scope="session")
def real_model_folder():
    return folder_from("SMOLLM2_DIR", "no pretrained model here (make real-model writes one)")


@pytest.fixture(scope="session")
def real_tokenizer_folder():
    return folder_from("QWEN3_DIR", "no Qwen3 tokenizer here")


@pytest.fixture(scope="session")
def real_tokenizer(real_tokenizer_folder):
    import models

    return models.load_tokenizer(real_tokenizer_folder)


def dataset_of(folder, pairs, margins=None):
    """A PairDataset of given token ids, through files like the cache's."""
    import data
    import utils
    from data_pipeline import parsing, reading, shapes, tokenization

    folder.mkdir()
    prefixes = [tokenization.shared_prefix(np.array(c), np.array(r)) for c, r in pairs]
    lengths = [(p, len(c) - p, len(r) - p) for p, (c, r) in zip(prefixes, pairs, strict=True)]
    tokens = [np.concatenate([c, r[p:]]) for p, (c, r) in zip(prefixes, pairs, strict=True)]
    np.concatenate(tokens).astype(np.int32).tofile(folder / "tokens.bin")
    np.save(folder / "lengths.npy", np.array(lengths, np.int32))
    np.save(folder / "rows.npy", np.arange(1, len(pairs) + 1))
    np.save(folder / "margins.npy", np.array(margins or np.arange(len(pairs)), np.float32))
    np.save(folder / "digests.npy", np.arange(len(pairs), dtype=np.uint64))
    np.save(folder / "notes.npy", np.zeros((len(pairs), len(parsing.WARNINGS)), dtype=bool))
    np.save(folder / "unused.npy", np.zeros((len(pairs), len(shapes.DIALOGUE_COLUMNS)), dtype=bool))
    np.save(folder / "kinds.npy", np.zeros(len(pairs), np.int32))
    np.save(folder / "shapes.npy", np.zeros(len(pairs), np.int32))
    np.save(folder / "held_out.npy", np.zeros(len(pairs), dtype=bool))
    for name in ("skipped_rows", "skipped_keys", "skipped_held_out"):
        np.save(folder / f"{name}.npy", np.zeros(0, bool if name == "skipped_held_out" else np.int64))
    report = {
        "shapes": [""],
        "starts": [],
        "holds_out_rows": False,
        "details": {},
        "kinds": [""],
        "tokens_sha256": {"all": "x"},
    }
    utils.write_json(folder / "report.json", report)
    return data.PairDataset([data.SourcePairs(folder, reading.Source("made up"), None)])


class Completions:
    """Prompts with k completions each, of given token ids, as `packing.Examples`: `[[prompt, completion, …], …]`."""

    def __init__(self, examples):
        self.examples = [[np.array(ids) for ids in example] for example in examples]
        self.lengths = np.array([[len(ids) for ids in example] for example in self.examples])

    def tokens(self, index):
        return np.concatenate(self.examples[index])

    def sequences(self, index):
        prompt, *completions = self.examples[index]
        return [np.concatenate([prompt, completion]) for completion in completions]


def random_completions(count, completions, longest=20, seed=0):
    """`count` prompts, one of them empty, with this many completions of different lengths, some of one token."""
    draw = np.random.default_rng([seed, completions])
    lengths = draw.integers(1, longest, size=(count, 1 + completions))
    lengths[0, 0], lengths[1, -1] = 0, 1
    return Completions([[draw.integers(5, 1000, size=length) for length in row] for row in lengths])


def micro_batches_of(dataset, indices, tokens_per_batch, batch_size, pad_id, crossover_length):
    """The tensors of every micro-batch that `packing.plan_step` plans."""
    from data_pipeline import packing

    plans = packing.plan_step(dataset, indices, tokens_per_batch, batch_size, crossover_length)
    return [packing.build(dataset, plan, pad_id) for plan in plans]


# Files whose tests start many processes, train, compile or drive a browser, the slowest first. The first two lead for
# another reason too: they fork the tests' own process, which must not have computed anything before.
SLOW_FILES = [
    ROOT / "tests" / name
    for name in (
        "training/test_faults.py",
        "run_manager/test_manage_runs.py",
        "training/test_distributed.py",
        "evaluation/test_evaluator.py",
        "bench/test_harness.py",
        "bench/test_on_gpu.py",
        "training/test_train_rm.py",
        "chat_app/test_app.py",
        "data_pipeline/test_demo.py",
        "test_docs.py",
        "chat_app/test_chat.py",
        "evaluation/test_eval_data.py",
        "evaluation/test_eval_rm.py",
        "evaluation/test_score_stream.py",
        "modeling/test_speedups.py",
    )
]
HAS_QUICK_TESTS = {"test_train_rm.py", "test_demo.py", "test_docs.py"}  # those that start no script


def pytest_configure(config):
    config.addinivalue_line(
        "markers", "survives(fault): the row of the fault table in docs/checkpoints.md that a test stands for"
    )
    config.addinivalue_line("markers", "real: wants the pretrained model of SMOLLM2_DIR")
    config.addinivalue_line("markers", "cuda: wants a CUDA device; TEST_DEVICE=cpu tries those that a CPU can run")
    config.addinivalue_line("markers", "slow: starts a script, or is in one of conftest.py's SLOW_FILES")


def pytest_collection_modifyitems(items):
    """Mark what is slow, and begin with the slowest files, so that no process of the tests ends long after another."""
    order = {path: number for number, path in enumerate(SLOW_FILES)}
    assert all(path.is_file() for path in order), "a file of SLOW_FILES has another name now"
    for item in items:
        is_slow_file = item.path in order and item.path.name not in HAS_QUICK_TESTS
        if is_slow_file or {"script_server", "real_model_folder"} & set(item.fixturenames):
            item.add_marker("slow")
    items.sort(key=lambda item: order.get(item.path, len(order)))
