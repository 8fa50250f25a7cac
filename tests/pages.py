"""The pages, README.md and docs/*.md, as the tests see them; run as a script, it rewrites what is generated.

    python -m tests.pages

rewrites the flag tables (from the scripts' dataclasses) and the tree in docs/development.md (from the modules'
docstrings). Each follows a comment in the Markdown that names it and ends at the next blank line:

    <!-- flags: train_rm.py, optimization -->          every flag of one group of `--help`
    <!-- flags: train_rm.py --model --lr -->           chosen flags
    <!-- tree -->
"""

import ast
import dataclasses
import re
import textwrap
from pathlib import Path

from chat import ChatConfig
from data import LookConfig
from eval_rm import EvalConfig
from manage_runs import ManageConfig
from train_grpo import PolicyTrainingConfig
from train_rm import RewardTrainingConfig
from train_sft import SupervisedTrainingConfig

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
CONFIGS = {
    "train_rm.py": RewardTrainingConfig,
    "train_sft.py": SupervisedTrainingConfig,
    "train_grpo.py": PolicyTrainingConfig,
    "eval_rm.py": EvalConfig,
    "chat.py": ChatConfig,
    "manage_runs.py": ManageConfig,
    "data.py": LookConfig,
}
# The tree's order: entry scripts, shared files, then the folders from the top floor down.
ROOT_FILES = [*CONFIGS, "models.py", "utils.py"]
FOLDERS = ["training", "grpo", "evaluation", "chat_app", "run_manager", "modeling", "data_pipeline", "checkpointing",
           "common"]  # fmt: skip
WITHOUT_DOCSTRING = {
    "demo_chat_template.jinja": "The demo model's chat template, which writes what Qwen3's writes.",
    "demo_sentences.json": "The words and sentences that the demo's pairs are made of.",
    "page.css": "The page's style, in addition to Gradio's.",
    "page_head.html": "The page's JavaScript: keeps conversations in the browser, and streams in order.",
    "page.html.jinja": "What every page begins with: its colours, style and rules for printing.",
    "page_macros.html.jinja": "Parts of a page that several kinds of page have.",
    "policy_report.html.jinja": "The template of a policy run's report.html.",
    "report.html.jinja": "The template of report.html.",
    "reward_bench.json": "RewardBench's sections: subsets and their weights.",
}
GENERATED = re.compile(r"(<!-- (flags: .*?|tree) -->\n)((?:.+\n)*)")


def read(page):
    return page.read_text(encoding="utf-8")


def code_blocks(page, language):
    return re.findall(rf"^```{language}\n(.*?)^```", read(page), re.DOTALL | re.MULTILINE)


def commands(page):
    """The lines of a page's bash blocks, without comments; lines joined where one ends in a backslash."""
    joined = "\n".join(code_blocks(page, "bash")).replace("\\\n", " ")
    lines = [re.sub(r"(^|\s)#.*", "", line).strip() for line in joined.splitlines()]
    return [line for line in lines if line]


def headings(page):
    """The headings of a page, without what looks like one in code."""
    text = re.sub(r"^```.*?^```", "", read(page), flags=re.DOTALL | re.MULTILINE)
    return re.findall(r"^#+ (.*)$", text, re.MULTILINE)


def anchor(heading):
    """The fragment by which GitHub links to a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def links(page):
    """Targets of a page's Markdown links and pictures, code aside."""
    text = re.sub(r"^```.*?^```|`[^`\n]*`", "", read(page), flags=re.DOTALL | re.MULTILINE)
    return re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r'(?:src|href)="([^"]+)"', text)


# ---------------------------------------------------------------------------------------------------------------------
# What is generated
# ---------------------------------------------------------------------------------------------------------------------


def generated(page):
    """(marker, text) of each generated part of a page."""
    return [(match[2], match[3].rstrip()) for match in GENERATED.finditer(read(page))]


def generate(marker):
    return tree() if marker == "tree" else flag_table(marker.removeprefix("flags: "))


def flag_table(wanted):
    """The Markdown table for 'script, group' or 'script --flag --flag'."""
    return "\n".join(["| flag | default | what it does |", "|---|---|---|", *map(flag_row, flags_of(wanted))])


def flags_of(wanted):
    """The dataclass fields that a marker names, in the dataclass's order."""
    script, *names = wanted.split(" --")
    script, _, group = script.partition(", ")
    fields = dataclasses.fields(CONFIGS[script])
    chosen = [
        field for field in fields if (field.name in names if names else field.metadata.get("group", "options") == group)
    ]
    assert len(chosen) == len(names) or (chosen and not names), f"{wanted}: no such flags"
    return chosen


def flag_row(field):
    default = "" if field.default in (None, ()) else field.default
    choices = field.metadata.get("choices")
    help_text = field.metadata["help"] + (f" ({', '.join(f'`{choice}`' for choice in choices)})" if choices else "")
    return f"| `--{field.name}` | {default} | {help_text} |"


def tree():
    """Every product file and benchmark with the first sentence of its docstring, as a text block."""
    lines = [_entry("", name, ROOT / name) for name in ROOT_FILES]
    for folder in [*FOLDERS, "bench"]:
        package = ROOT / folder / "__init__.py"
        lines.append(_entry("", f"{folder}/", package))
        files = sorted(path for path in (ROOT / folder).glob("*.*") if path.is_file() and path != package)
        lines += [_entry("  ", path.name, path) for path in files]
    return "\n".join(["```text", *lines, "```"])


def _entry(indent, name, path):
    if path.suffix == ".py":
        doc = ast.get_docstring(ast.parse(read(path))) if path.exists() else "Benchmarks; each one is a script."
    else:
        doc = WITHOUT_DOCSTRING[path.name]
    summary = doc.split("\n\n")[0]
    start = f"{indent}{name}".ljust(28)
    return textwrap.fill(
        " ".join(summary.split()), 110, initial_indent=start, subsequent_indent=" " * 28, break_on_hyphens=False
    )


def rewrite(text):
    return GENERATED.sub(lambda match: match[1] + generate(match[2]) + "\n", text)


if __name__ == "__main__":
    for page in PAGES:
        if (new := rewrite(read(page))) != read(page):
            page.write_text(new, encoding="utf-8")
            print(f"rewritten: {page.relative_to(ROOT)}")
