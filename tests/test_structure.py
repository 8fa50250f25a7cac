"""The house: which files are at the root, what may import what, and what never imports torch."""

import ast
import functools
import graphlib
import subprocess
import sys

import pytest

from tests.conftest import ROOT

ENTRY_SCRIPTS = {"train_rm", "train_sft", "train_grpo", "eval_rm", "chat", "manage_runs"}
SHARED = {"models", "data", "utils"}
# From the ground up: each room (a root file or a folder) imports lower floors only, never a neighbour.
FLOORS = [
    {"utils"},
    {"common"},
    {"data_pipeline", "checkpointing"},
    {"modeling", "run_manager"},
    {"models", "data", "manage_runs"},
    {"training", "grpo", "evaluation", "chat_app"},
    {"train_rm", "train_sft", "train_grpo", "eval_rm", "chat"},
    {"bench"},
]
FOLDERS = set().union(*FLOORS) - ENTRY_SCRIPTS - SHARED - {"bench"}
WITHOUT_TORCH = ["utils", "common", "run_manager", "manage_runs", "checkpointing.run_folder", "checkpointing.manifest",
                 "checkpointing.resolve"]  # fmt: skip
MAX_LINES, MAX_FILES = 420, 11


def python_files():
    return [ROOT / f"{name}.py" for name in sorted(ENTRY_SCRIPTS | SHARED)] + [
        path for folder in sorted(FOLDERS | {"bench"}) for path in sorted((ROOT / folder).glob("*.py"))
    ]


def module_name(path):
    """common/flags.py -> common.flags; bench's files are scripts beside one another and go by their own names."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    if parts[0] == "bench":
        return f"bench.{parts[1]}"
    return ".".join(part for part in parts if part != "__init__")


def room_of(module):
    return module.split(".")[0]


@functools.cache
def imports():
    """module -> the project's modules that it imports anywhere: at the top, lazily, in a function, for annotations."""
    modules = {module_name(path): path for path in python_files()}
    bench = {name.removeprefix("bench."): name for name in modules if name.startswith("bench.")}
    found = {}
    for name, path in modules.items():
        wanted = set()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                wanted |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{path}: relative import"
                wanted |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
        if room_of(name) == "bench":
            wanted = {bench.get(each.split(".")[0], each) for each in wanted}
        # `from modeling import attention` is the module modeling.attention, not the docstring of the folder
        inside = {each for each in wanted if each in modules}
        found[name] = {each for each in inside if each not in FOLDERS} - {name}
    return found


def test_the_root_holds_exactly_these_files():
    assert {path.stem for path in ROOT.glob("*.py")} == ENTRY_SCRIPTS | SHARED


def test_every_folder_says_in_one_line_what_it_holds():
    for folder in FOLDERS:
        text = (ROOT / folder / "__init__.py").read_text(encoding="utf-8")
        docstring = ast.get_docstring(ast.parse(text))
        assert docstring and text == f'"""{docstring}"""\n' and "\n" not in docstring, folder
        assert len(list((ROOT / folder).glob("*.py"))) - 1 <= MAX_FILES, f"{folder}/ is too full"


def test_every_python_folder_is_known():
    holders = {path.parent.name for path in ROOT.glob("*/*.py") if not path.parent.name.startswith(".")}
    # what users make: runs, logs, the demo
    assert holders - {"checkpoints", "logs", "demo"} == FOLDERS | {"bench", "tests"}


@pytest.mark.parametrize("path", python_files(), ids=lambda path: str(path.relative_to(ROOT)))
def test_a_file_reads_in_one_sitting_and_says_what_it_is(path):
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= MAX_LINES and ast.get_docstring(ast.parse(text))


def test_imports_go_down_only():
    floor_of = {room: number for number, floor in enumerate(FLOORS) for room in floor}
    wrong = [
        f"{name} (floor {floor_of[room_of(name)]}) imports {other} (floor {floor_of[room_of(other)]})"
        for name, others in imports().items()
        for other in others
        if room_of(name) != room_of(other) and floor_of[room_of(other)] >= floor_of[room_of(name)]
    ]
    assert wrong == []


def test_no_files_import_each_other_in_a_circle():
    list(graphlib.TopologicalSorter(imports()).static_order())  # raises CycleError


def test_only_bench_imports_an_entry_script():
    importers = {name for name, others in imports().items() for other in others if other in ENTRY_SCRIPTS}
    assert {room_of(name) for name in importers} <= {"bench"}


def test_what_must_do_without_torch_does_not_name_it():
    heavy = {"torch", "transformers", "numpy", "datasets", "peft", "accelerate", "gradio"}
    for path in python_files():
        name = module_name(path)
        if any(name == each or name.startswith(f"{each}.") for each in WITHOUT_TORCH):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                named = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
                named += [node.module] if isinstance(node, ast.ImportFrom) else []
                assert not heavy & {each.split(".")[0] for each in named}, f"{name}: {named}"
            below = {
                other for other in imports()[name] if room_of(other) in {"data_pipeline", "modeling", "models", "data"}
            }
            assert not below, f"{name} imports {below}"


def test_importing_what_must_do_without_torch_loads_none():
    modules = [module_name(path) for path in python_files()]
    wanted = [name for name in modules if any(name == each or name.startswith(f"{each}.") for each in WITHOUT_TORCH)]
    code = f"import {', '.join(sorted(wanted))}, sys; print(sorted({{'torch', 'transformers'}} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (result.stdout, result.stderr) == ("[]\n", "")


def test_an_import_upwards_would_be_found(monkeypatch):
    """The tests above can fail: with an arrow up, a circle, or an imported script, they do."""
    upwards = {**imports(), "common.flags": {"models"}, "models": {"common.flags"}, "data": {"train_rm"}}
    monkeypatch.setitem(globals(), "imports", lambda: upwards)
    for test in (test_imports_go_down_only, test_only_bench_imports_an_entry_script):
        with pytest.raises(AssertionError):
            test()
    with pytest.raises(graphlib.CycleError):
        test_no_files_import_each_other_in_a_circle()
