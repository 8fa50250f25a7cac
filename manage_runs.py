"""List runs of reward models and policies, look at one, delete what you no longer need, and undo a deletion.

python manage_runs.py                                    the list; on a terminal, followed by a menu
python manage_runs.py --show RUN                         one run in detail
python manage_runs.py --delete RUN OTHER/step-500        to the trash: --undo restores it, --empty_trash frees space
python manage_runs.py --prune keep=best,last --dry_run   what would be deleted
"""

from __future__ import annotations

import json
import os
import re
import shlex
import sys
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import utils
from checkpointing.run_folder import step_of
from common import flags
from common.flags import flag
from run_manager import inventory, trash
from run_manager.deletion_plan import Plan
from run_manager.inventory import Roots, RunInfo
from utils import UserError, counted, printable

with utils.lazy_imports():
    from run_manager import display, layout, questions

CHANGING = ("delete", "prune", "shrink", "delete_superseded", "undo", "empty_trash")
ACTIONS = ("list", "json", "show", *CHANGING)
FILTERS = ("name", "state", "older_than")
EXACT_WORD = "delete"
UNDO = "python manage_runs.py --undo"


@dataclass(frozen=True)
class ManageConfig:
    """Settings for listing and deleting runs."""

    # fmt: off
    output_dir: str = flag("./checkpoints/rm", "folder of the runs' checkpoints; without it and --log_dir: those of reward models and policies alike (rm, sft, grpo)", group="where")
    log_dir: str = flag("./logs/rm", "folder of the runs' TensorBoard logs", group="where")

    list: bool = flag(False, "print the list without the menu", group="look")
    json: bool = flag(False, "the list as JSON, one object per run", group="look")
    show: str | None = flag(None, "one run in detail", is_name_on_disk=True, group="look")
    against: str | None = flag(None, "with --show: compare its settings with this run's instead of the defaults", is_name_on_disk=True, group="look")
    sort: str = flag("started", "what the list is sorted by, ascending", choices=inventory.SORT_KEYS, group="look")
    name: str | None = flag(None, "only runs whose name, or kind and name, matches a pattern: lr-*, grpo/*", is_name_on_disk=True, group="look")
    state: str | None = flag(None, "only runs in this state", choices=inventory.STATES, group="look")
    older_than: str | None = flag(None, "only runs started (with --empty_trash: deleted) longer ago than this: 90s, 30m, 12h, 7d, 2w", group="look")

    delete: tuple[str, ...] = flag((), "delete runs (RUN) or single steps (RUN/step-500); grpo/RUN if runs of several kinds have that name", is_name_on_disk=True, group="delete")
    prune: str | None = flag(None, "delete all steps of each listed run except these: keep=best,last or keep=best,3 (the newest 3)", group="delete")
    shrink: bool = flag(False, "delete the optimizer state of each listed finished run; the models stay", group="delete")
    delete_superseded: bool = flag(False, "delete steps that resuming set aside and remains of killed saves, in each listed run", group="delete")
    undo: bool = flag(False, "undo the last deletion", group="delete")
    empty_trash: bool = flag(False, "permanently delete what is in the trash", group="delete")
    dry_run: bool = flag(False, "only show what would be deleted", group="delete")
    yes: bool = flag(False, "do not ask", group="delete")

    debug: bool = flag(False, "show the traceback of an error", group="other")
    # fmt: on

    def problems(self) -> list[str]:
        """Combinations of flags that make no sense, and values that cannot be parsed."""
        found = []
        asked = [name for name in ACTIONS if getattr(self, name)]
        if len(asked) > 1:
            found.append(f"{', '.join('--' + name for name in asked)}: one at a time")
        if self.against is not None and self.show is None:
            found.append("--against: goes with --show")
        for name in ("dry_run", "yes"):
            if getattr(self, name) and not set(asked) & set(CHANGING):
                found.append(f"--{name}: goes with {', '.join('--' + action for action in CHANGING)}")
        if {"delete", "undo", "show"} & set(asked):
            given = [name for name in FILTERS if getattr(self, name) is not None]
            found += [f"--{name}: does not go with --{asked[0]}" for name in given]
        if self.empty_trash and (self.name is not None or self.state is not None):
            found.append("--name, --state: do not go with --empty_trash; --older_than does")
        for name, parse in (("older_than", inventory.parse_age), ("prune", parse_keep)):
            try:
                if getattr(self, name) is not None:
                    parse(getattr(self, name))
            except ValueError as error:
                found.append(f"--{name}: got {getattr(self, name)!r}, expected {error}")
        return found

    @property
    def age(self) -> timedelta | None:
        return None if self.older_than is None else inventory.parse_age(self.older_than)

    def command(self, *words: str) -> str:
        """A command line for the same folders and filters."""
        for name in ("output_dir", "log_dir", *FILTERS):
            if getattr(self, name) != getattr(ManageConfig(), name):
                words += (f"--{name}", printable(str(getattr(self, name))))
        return shlex.join(["python", "manage_runs.py", *words])


def parse_keep(text: str) -> list[str]:
    """'keep=best,last' -> ['best', 'last']; ValueError says what is wanted."""
    words = text.removeprefix("keep=").split(",")
    if not text.startswith("keep=") or not all(re.fullmatch("best|last|[1-9][0-9]{0,5}", word) for word in words):
        raise ValueError("keep=best, keep=last, keep=3 (the newest three) or several with commas")
    return words


# -- Deleting: show what goes, ask, do it, report ----------------------------------------------------------------------


def carry_out(plan: Plan, config: ManageConfig, *words: str) -> None:
    """Show a plan, ask unless --yes, do it and report. `words` are the flags that make the same plan again."""
    again = config.command(*words)
    outputs = [roots.output for roots in plan.places]
    for item in plan.items:
        where = "checkpoints" if item.root in outputs else "logs"
        layout.say(f"  {item.name}  {utils.format_bytes(item.bytes)} of {where}")
    show_left(plan.refused)
    for warning in plan.warnings:
        layout.say(f"warning: {warning}", sys.stderr)
    if not plan.items:
        print("nothing to delete")
        return
    print(f"{counted(len(plan.items), 'item')} to delete, {utils.format_bytes(plan.bytes)}", flush=True)
    runs = {trash.run_of(item) for item in plan.items}
    warning = f"This deletes from {len(runs)} runs." if len(runs) > 1 else ""
    if not is_confirmed(config, again, warning, f"Type {EXACT_WORD} to move it to the trash:"):
        return
    try:
        outcome = trash.delete(plan)
    except BaseException:  # such as Ctrl-C: the disk tells what was done
        left = [item.name for item in plan.items if os.path.lexists(item.path)]
        gone = [item.name for item in plan.items if not os.path.lexists(item.path)]
        print(f"interrupted; in the trash: {', '.join(gone) or 'nothing'}; left: {', '.join(left) or 'nothing'}\n"
              f"  to delete the rest: {again}\n  to restore: {UNDO}", file=sys.stderr)  # fmt: skip
        raise
    if outcome.done:
        layout.say(f"in the trash: {counted(len(outcome.done), 'item')}, {utils.format_bytes(outcome.bytes)} "
                   "(--undo restores them, --empty_trash frees the space)")  # fmt: skip
    report_left("could not be deleted", outcome, plan.places, again)


def show_left(left: list[tuple[str, str]]) -> None:
    for name, why in left:
        layout.say(f"  left: {name}: {why}")


def is_confirmed(config: ManageConfig, again: str, warning: str, exact_word_question: str) -> bool:
    """Ask for a yes, or after a warning for the exact word. --yes answers, --dry_run declines."""
    if config.dry_run:
        print("dry run: nothing was changed")
        return False
    if config.yes:
        return True
    if not questions.has_terminal():
        raise UserError(
            "there is no terminal to ask on",
            safe="nothing was changed",
            next=f"{again} --yes, or --dry_run to see what would be deleted",
        )
    if warning:
        print(warning)
        is_yes = questions.exact_word(EXACT_WORD, exact_word_question)
    else:
        is_yes = questions.yes_or_no("Move this to the trash?")
    if not is_yes:
        print("nothing was deleted")
    return is_yes


def report_left(what: str, outcome: trash.Outcome, places: list[Roots], again: str) -> None:
    """Raise if something could not be done, naming all of it and why."""
    if not outcome.left:
        return
    kind = utils.DiskOrNetworkError if outcome.is_disk else UserError
    raise kind(
        f"{len(outcome.left)} of {len(outcome.left) + len(outcome.done)} {what}",
        where=folders_of(places),
        found="left: " + "; ".join(f"{name}: {why}" for name, why in outcome.left),
        safe=f"done: {', '.join(item.name for item in outcome.done) or 'nothing'}",
        next=f"remove the cause, then {again}",
    )


def folders_of(places: list[Roots]) -> str:
    return ", ".join(str(roots.output) for roots in places)


def undo(places: list[Roots], config: ManageConfig) -> None:
    entry, outcome = trash.undo(places, config.dry_run)
    for item in outcome.done:
        layout.say(f"  {item.name}  {utils.format_bytes(item.bytes)}")
    when = f"{entry[:4]}-{entry[4:6]}-{entry[6:8]} {entry[9:11]}:{entry[11:13]}"
    verb = "would be restored" if config.dry_run else "restored"
    print(f"{verb}: {counted(len(outcome.done), 'item')} deleted on {when}")
    report_left("could not be restored", outcome, places, config.command("--undo"))


def empty_trash(places: list[Roots], config: ManageConfig) -> None:
    """Show what the trash holds, ask, and delete it for good."""
    again = config.command("--empty_trash")
    planned = trash.empty(places, config.age, is_dry=True)
    for item in planned.done:
        layout.say(f"  {item.name}  {utils.format_bytes(item.bytes)} in {printable(str(item.root))}")
    show_left(planned.left)
    if not planned.done:
        print("nothing to free")
        return report_left("could not be freed", planned, places, again)
    print(f"{utils.format_bytes(planned.bytes)} to free for good", flush=True)
    if not is_confirmed(config, again, "This cannot be undone.", f"Type {EXACT_WORD} to free the space:"):
        return
    try:
        outcome = trash.empty(places, config.age)
    except BaseException:
        left = [item.name for item in trash.empty(places, None, is_dry=True).done]
        print(f"interrupted; still in the trash: {', '.join(left) or 'nothing'}; next: {again}", file=sys.stderr)
        raise
    print(f"freed: {utils.format_bytes(outcome.bytes)}")
    report_left("could not be freed", outcome, places, again)


# -- Doing what was asked for ------------------------------------------------------------------------------------------

MENU = {
    "show": "look at a run",
    "delete": "delete runs",
    "delete steps": "delete single steps",
    "prune": "delete all steps except best and last",
    "shrink": "delete the optimizer state of finished runs",
    "delete_superseded": "delete superseded steps",
    "undo": "undo the last deletion",
    "empty_trash": "empty the trash",
    "leave": "leave",
}


def look(config: ManageConfig, places: list[Roots]) -> tuple[list[RunInfo], list[RunInfo], list[str]]:
    """All runs; those that pass the filters, sorted; and notes about what else is in the roots."""
    if not any(roots.output.is_dir() or (roots.has_orphans and roots.logs.is_dir()) for roots in places):
        roots = places[0]
        raise UserError(
            "there are no runs yet",
            where=roots.output.absolute(),
            found="no such folder" + (", and none for logs either" if roots.has_orphans else ""),
            next="python train_rm.py makes one; --output_dir names another place",
        )
    runs, notes = inventory.scan(places)
    if in_trash := trash.summary(places):
        notes.append(in_trash)
    chosen = [run for run in runs if inventory.passes(run, config.state, config.age, config.name)]
    return runs, inventory.sort_runs(chosen, config.sort), notes


def add_names(plan: Plan, names: tuple[str, ...]) -> None:
    """Plan to delete RUN or RUN/step-N, by their exact names in the list."""
    whole_runs = []
    for name in names:
        run_name, _, step_name = name.rpartition("/")
        if any(name in run.names for run in plan.runs) or step_of(Path(step_name)) is None:
            whole_runs.append(inventory.find_run(name, plan.runs))
            continue
        run = inventory.find_run(run_name, plan.runs)
        step = next((step for step in run.steps if step.folder.name == step_name), None)
        if step is None:
            steps = ", ".join(step.folder.name for step in run.steps) or "no steps"
            raise UserError(f"{run.label} has no {step_name}", found=steps, safe="nothing was changed")
        plan.add_steps(run, [step])
    plan.add_runs(whole_runs)


def delete_named(plan: Plan, config: ManageConfig) -> None:
    """Delete runs and steps that were asked for by name: all of them or nothing."""
    if plan.refused:
        raise UserError(
            "not all of this can be deleted",
            where=folders_of(plan.places),
            found="; ".join(f"{name}: {why}" for name, why in plan.refused),
            safe="nothing was changed",
            next="the same command without these" if plan.items else "python manage_runs.py --list",
        )
    carry_out(plan, config, "--delete", *dict.fromkeys(item.name for item in plan.items))


def act_on_picked(action: str, plan: Plan, chosen: list[RunInfo], config: ManageConfig) -> None:
    """Let the user pick runs, or steps of one run, and show or delete them; `plan` is still empty."""
    titles = [f"{number}  {run.label}  {run.state}" for number, run in enumerate(chosen, 1)]
    if action == "delete":
        picked = [chosen[index] for index in questions.pick("Runs to delete", titles)]
        plan.add_runs(picked)
        return delete_named(plan, config)
    run = chosen[questions.choose("Which run?", titles)]
    if action == "show":
        return display.show_run(run, plan.runs, None)
    titles = [f"{n}  {step.folder.name}  {utils.format_bytes(step.bytes)}" for n, step in enumerate(run.steps, 1)]
    steps = [run.steps[index] for index in questions.pick("Steps to delete", titles)] if titles else []
    plan.add_steps(run, steps)
    delete_named(plan, config)


def run_menu(config: ManageConfig, places: list[Roots]) -> None:
    """Show the list and ask what to do, until the user leaves."""
    while True:
        runs, chosen, notes = look(config, places)
        display.show_runs(chosen, notes)
        action = list(MENU)[questions.choose("What now?", list(MENU.values()))]
        if action == "leave":
            return
        try:
            if action in ("show", "delete", "delete steps"):
                act_on_picked(action, Plan(places, runs), chosen, config)
            else:
                manage(replace(config, **{action: "keep=best,last" if action == "prune" else True}), places)
        except UserError as error:  # a refused deletion is no reason to leave the menu
            print(error, file=sys.stderr)


def main(argv: list[str]) -> None:
    given, problems = flags.read_flags(ManageConfig, argv, __doc__.split("\n\n")[0])
    config = flags.build_config(ManageConfig, given, problems)
    manage(config, places_of(config, given))


def places_of(config: ManageConfig, given: dict[str, Any]) -> list[Roots]:
    """Where the runs are: in the folders that flags name, else reward models and policies wherever there are any."""
    if {"output_dir", "log_dir"} & given.keys():
        return [Roots(Path(config.output_dir), Path(config.log_dir), has_orphans="log_dir" in given)]
    all_kinds = [Roots(Path("checkpoints", kind), Path("logs", kind)) for kind in inventory.KINDS]
    used = [roots for roots in all_kinds if roots.output.is_dir() or roots.logs.is_dir() or trash.is_used(roots)]
    return [replace(roots, is_one_of_several=len(used) > 1) for roots in used or all_kinds[:1]]


def manage(config: ManageConfig, places: list[Roots]) -> None:
    """Do what the flags ask for. Without any, show the menu on a terminal and the list elsewhere."""
    action = next((name for name in ACTIONS if getattr(config, name)), None)
    if action == "undo":
        return undo(places, config)
    if action == "empty_trash":
        return empty_trash(places, config)
    if action is None and questions.has_terminal():
        return run_menu(config, places)
    runs, chosen, notes = look(config, places)
    plan = Plan(places, runs)
    if action == "json":
        print(json.dumps([display.as_object(run) for run in chosen], indent=2))
    elif action == "show":
        other = inventory.find_run(config.against, runs) if config.against else None
        display.show_run(inventory.find_run(config.show, runs), runs, other)
    elif action == "delete":
        add_names(plan, config.delete)
        delete_named(plan, config)
    elif action == "prune":
        plan.add_pruned(chosen, parse_keep(config.prune))
        carry_out(plan, config, "--prune", config.prune)
    elif action == "shrink":
        plan.add_optimizers(chosen)
        carry_out(plan, config, "--shrink")
    elif action == "delete_superseded":
        plan.add_leftovers(chosen)
        carry_out(plan, config, "--delete_superseded")
    else:
        display.show_runs(chosen, notes)


if __name__ == "__main__":
    sys.exit(utils.run_script(main))
