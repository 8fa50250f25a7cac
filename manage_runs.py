"""See every run, keep the good ones, delete the rest without fear.

python manage_runs.py                                    the list; on a terminal then what to do with it
python manage_runs.py --show RUN                         one run in detail
python manage_runs.py --delete RUN OTHER/step-500        into the trash; --undo brings it back, --empty_trash frees
python manage_runs.py --prune keep=best,last --dry_run   what would go
"""

from __future__ import annotations

import json
import os
import re
import shlex
import sys
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

import utils
from checkpointing.run_folder import step_of
from common import flags
from common.flags import flag
from run_manager import deletion_plan, inventory, trash
from run_manager.deletion_plan import Plan
from run_manager.inventory import Roots, RunInfo
from utils import UserError, printable

if TYPE_CHECKING:
    from run_manager import display, questions
else:  # loaded when first used, so that --help answers at once
    questions, display = map(utils.lazy_import, ("run_manager.questions", "run_manager.display"))

ACTIONS = ("list", "json", "show", "delete", "prune", "shrink", "delete_superseded", "undo", "empty_trash")
CHANGING = ("delete", "prune", "shrink", "delete_superseded", "undo", "empty_trash")
FILTERS = ("name", "state", "older_than")
EXACT_WORD = "delete"
BACK = "python manage_runs.py --undo"


@dataclass(frozen=True)
class ManageConfig:
    """Every setting of the list and what it deletes."""

    # fmt: off
    output_dir: str = flag("./checkpoints/rm", "where the runs' checkpoints lie", group="where")
    log_dir: str = flag("./logs/rm", "where their TensorBoard logs lie", group="where")

    list: bool = flag(False, "the list and no questions", group="look")
    json: bool = flag(False, "the list as JSON, one object a run", group="look")
    show: str | None = flag(None, "this run in detail", is_name_on_disk=True, group="look")
    against: str | None = flag(None, "with --show: its settings against this run's instead of the defaults", is_name_on_disk=True, group="look")
    sort: str = flag("started", "order of the list, growing", choices=inventory.SORT_KEYS, group="look")
    name: str | None = flag(None, "only runs whose name is like this: lr-*", is_name_on_disk=True, group="look")
    state: str | None = flag(None, "only runs in this state", choices=inventory.STATES, group="look")
    older_than: str | None = flag(None, "only runs begun longer ago than this, with --empty_trash deleted: 90s, 30m, 12h, 7d, 2w", group="look")

    delete: tuple[str, ...] = flag((), "these runs (RUN) or single steps (RUN/step-500)", is_name_on_disk=True, group="delete")
    prune: str | None = flag(None, "of each listed run all steps but these: keep=best,last or keep=best,3 (the newest 3)", group="delete")
    shrink: bool = flag(False, "the optimizer state of each listed finished run: what stays is the model", group="delete")
    delete_superseded: bool = flag(False, "of each listed run what resuming set aside and killed saves left", group="delete")
    undo: bool = flag(False, "bring the last deletion back", group="delete")
    empty_trash: bool = flag(False, "really delete what lies in the trash", group="delete")
    dry_run: bool = flag(False, "only show what would go", group="delete")
    yes: bool = flag(False, "do not ask", group="delete")

    debug: bool = flag(False, "show the traceback of an error", group="other")
    # fmt: on

    def problems(self) -> list[str]:
        """What no single field can tell is wrong."""
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
                found.append(f"--{name}: got {getattr(self, name)!r}, wants {error}")
        return found

    @property
    def age(self) -> timedelta | None:
        return None if self.older_than is None else inventory.parse_age(self.older_than)


def parse_keep(text: str) -> list[str]:
    """'keep=best,last' -> ['best', 'last']; ValueError says what is wanted."""
    words = text.removeprefix("keep=").split(",")
    if not text.startswith("keep=") or not all(re.fullmatch("best|last|[1-9][0-9]{0,5}", word) for word in words):
        raise ValueError("keep=best, keep=last, keep=3 (the newest three) or several with commas")
    return words


# ---------------------------------------------------------------------------------------------------------------------
# Deleting: what goes, a question, what went
# ---------------------------------------------------------------------------------------------------------------------


def carry_out(plan: Plan, roots: Roots, config: ManageConfig, again: str) -> None:
    """Show a plan, ask unless --yes, do it and say what became of it. `again` is the command that repeats it."""
    show_plan(plan, roots)
    if not plan.items:
        print("nothing to delete")
        return
    if config.dry_run:
        print("a dry run: nothing was touched")
        return
    if not config.yes and not is_confirmed(plan, again):
        print("nothing was deleted")
        return
    try:
        outcome = trash.delete(plan, roots)
    except BaseException:  # Ctrl-C, say: what the disk shows is what was done
        tell_half_done(plan, again)
        raise
    freed = utils.format_bytes(sum(item.bytes for item in outcome.done))
    if outcome.done:
        print(f"in the trash: {counted(len(outcome.done))}, {freed} "
              "(--undo brings them back, --empty_trash frees the room)")  # fmt: skip
    report_left("could not be deleted", outcome, roots, again)


def counted(things: int) -> str:
    return "1 thing" if things == 1 else f"{things:,} things"


def refuse_partial(plan: Plan, roots: Roots) -> None:
    """What was asked for by name goes as a whole or not at all."""
    if plan.refused:
        raise UserError(
            "not all of this can be deleted",
            where=roots.output,
            found="; ".join(f"{name}: {why}" for name, why in plan.refused),
            safe="nothing was touched",
            next="the same without that" if plan.items else "python manage_runs.py --list",
        )


def show_plan(plan: Plan, roots: Roots) -> None:
    for item in plan.items:
        where = "checkpoints" if item.root == roots.output else "logs"
        print(f"  {item.name}  {utils.format_bytes(item.bytes)} of {where}")
    for name, why in plan.refused:
        print(f"  left: {name}: {why}")
    for warning in plan.warnings:
        print(f"warning: {warning}", file=sys.stderr)
    if plan.items:
        print(f"{counted(len(plan.items))} to delete, {utils.format_bytes(plan.bytes)}", flush=True)


def is_confirmed(plan: Plan, again: str) -> bool:
    """Ask once: yes or no for one run, an exact word for more."""
    if not questions.has_terminal():
        raise UserError(
            "there is no terminal to ask on",
            safe="nothing was touched",
            next=f"{again} --yes, or --dry_run to see what would go",
        )
    runs = {item.way[0] for item in plan.items}
    if len(runs) == 1:
        return questions.yes_or_no("Move this to the trash?")
    return questions.exact_word(EXACT_WORD, f"This is of {len(runs)} runs. Type {EXACT_WORD} to move it to the trash:")


def report_left(what: str, outcome: trash.Outcome, roots: Roots, again: str) -> None:
    """Raise, naming exactly what is left and why, if not all went as planned."""
    if not outcome.left:
        return
    kind = utils.DiskOrNetworkError if outcome.is_disk else UserError
    gone = ", ".join(item.name for item in outcome.done) or "nothing"
    raise kind(
        f"{len(outcome.left)} of {len(outcome.left) + len(outcome.done)} {what}",
        where=roots.output,
        found="left: " + "; ".join(f"{name}: {why}" for name, why in outcome.left),
        safe=f"done: {gone}",
        next=f"see to the cause, then {again}",
    )


def tell_half_done(plan: Plan, again: str) -> None:
    left = [item.name for item in plan.items if os.path.lexists(item.path)]
    gone = [item.name for item in plan.items if not os.path.lexists(item.path)]
    print(
        f"cut off; in the trash: {', '.join(gone) or 'nothing'}; left: {', '.join(left) or 'nothing'}", file=sys.stderr
    )
    print(f"  the rest: {again}\n  back: {BACK}", file=sys.stderr)


def undo(roots: Roots, config: ManageConfig) -> None:
    entry, outcome = trash.undo(roots, config.dry_run)
    for item in outcome.done:
        print(f"  {item.name}  {utils.format_bytes(item.bytes)}")
    when = f"{entry[:4]}-{entry[4:6]}-{entry[6:8]} {entry[9:11]}:{entry[11:13]}"
    print(f"{'would come back' if config.dry_run else 'back'}: {counted(len(outcome.done))} deleted on {when}")
    report_left("could not be brought back", outcome, roots, command(config, "--undo"))


def empty_trash(roots: Roots, config: ManageConfig) -> None:
    """Show what the trash holds, ask, and free it."""
    planned = trash.empty(roots, config.age, is_dry=True)
    for item in planned.done:
        print(f"  {item.name}  {utils.format_bytes(item.bytes)} in {printable(str(item.root))}")
    for name, why in planned.left:
        print(f"  left: {name}: {why}")
    if not planned.done:
        print("nothing to free")
        return report_left("could not be freed", planned, roots, command(config, "--empty_trash"))
    print(f"{utils.format_bytes(sum(item.bytes for item in planned.done))} to free for good", flush=True)
    if config.dry_run:
        print("a dry run: nothing was touched")
        return
    again = command(config, "--empty_trash")
    if not config.yes:
        if not questions.has_terminal():
            raise UserError("there is no terminal to ask on", safe="nothing was touched", next=f"{again} --yes")
        if not questions.exact_word(EXACT_WORD, f"There is no way back. Type {EXACT_WORD} to free it:"):
            print("nothing was deleted")
            return
    try:
        outcome = trash.empty(roots, config.age)
    except BaseException:
        left = [item.name for item in trash.empty(roots, None, is_dry=True).done]
        print(f"cut off; still in the trash: {', '.join(left) or 'nothing'}; the rest: {again}", file=sys.stderr)
        raise
    print(f"freed: {utils.format_bytes(sum(item.bytes for item in outcome.done))}")
    report_left("could not be freed", outcome, roots, again)


# ---------------------------------------------------------------------------------------------------------------------
# What was asked for
# ---------------------------------------------------------------------------------------------------------------------

MENU = {
    "look at a run": "show",
    "delete runs": "delete",
    "delete single steps": "delete steps",
    "delete all steps but best and last": "prune",
    "delete the optimizer state of finished runs": "shrink",
    "delete superseded steps": "delete_superseded",
    "undo the last deletion": "undo",
    "empty the trash": "empty_trash",
    "leave": "leave",
}


def command(config: ManageConfig, *words: str) -> str:
    """A command line that looks at the same folders and runs."""
    default = ManageConfig()
    same = [name for name in ("output_dir", "log_dir", *FILTERS) if getattr(config, name) != getattr(default, name)]
    same_words = [word for name in same for word in (f"--{name}", printable(str(getattr(config, name))))]
    return shlex.join(["python", "manage_runs.py", *words, *same_words])


def look(config: ManageConfig, roots: Roots) -> tuple[list[RunInfo], list[RunInfo], list[str]]:
    """All runs, those that pass the filters in the order asked for, and notes on what else lies there."""
    if not roots.output.is_dir() and not roots.logs.is_dir():
        raise UserError(
            "there are no runs yet",
            where=roots.output.absolute(),
            found="no such folder, and none for logs either",
            next="python train_rm.py makes one; --output_dir names another place",
        )
    runs, notes = inventory.scan(roots)
    if in_trash := trash.summary(roots):
        notes.append(in_trash)
    chosen = inventory.filter_runs(runs, config.state, config.age, config.name)
    return runs, inventory.sort_runs(chosen, config.sort), notes


def plan_names(names: tuple[str, ...], runs: list[RunInfo], roots: Roots) -> Plan:
    """What `--delete` names: RUN or RUN/step-N, by their exact names in the list."""
    whole, plan = [], Plan()
    for name in names:
        run_name, _, step_name = name.rpartition("/")
        if any(run.name == name for run in runs) or step_of(Path(step_name)) is None:
            whole.append(inventory.find_run(name, runs))
            continue
        run = inventory.find_run(run_name, runs)
        step = next((step for step in run.steps if step.folder.name == step_name), None)
        if step is None:
            steps = ", ".join(step.folder.name for step in run.steps) or "no steps"
            raise UserError(f"{printable(run_name)} has no {step_name}", found=steps, safe="nothing was touched")
        deletion_plan.plan_steps(run, [step], runs, roots, plan)
    return deletion_plan.plan_runs(whole, runs, roots, plan)


def act(action: str, runs: list[RunInfo], chosen: list[RunInfo], roots: Roots, config: ManageConfig) -> None:
    """One of the deletions that need no names."""
    if action == "prune":
        keep = config.prune or "keep=best,last"
        plan, words = deletion_plan.plan_prune(chosen, parse_keep(keep), runs, roots), ("--prune", keep)
    elif action == "shrink":
        plan, words = deletion_plan.plan_shrink(chosen, roots), ("--shrink",)
    elif action == "delete_superseded":
        plan, words = deletion_plan.plan_leftovers(chosen, roots), ("--delete_superseded",)
    elif action == "undo":
        return undo(roots, config)
    else:
        return empty_trash(roots, config)
    carry_out(plan, roots, config, command(config, *words))


def act_on_picked(action: str, runs: list[RunInfo], chosen: list[RunInfo], roots: Roots, config: ManageConfig) -> None:
    """What the menu offers beyond `act`: the user picks runs or steps of one first."""
    titles = [f"{printable(run.name)}  {run.state}" for run in chosen]
    if action == "delete":
        picked = [chosen[place] for place in questions.pick("Runs to delete", titles)]
        plan = deletion_plan.plan_runs(picked, runs, roots)
        names = [run.name for run in picked]
    else:
        run = chosen[questions.pick_one("Which run?", titles)]
        if action == "show":
            return display.show_run(run, runs, roots, None)
        described = [f"{step.folder.name}  {utils.format_bytes(step.bytes)}" for step in run.steps]
        steps = [run.steps[place] for place in questions.pick("Steps to delete", described)] if described else []
        plan = deletion_plan.plan_steps(run, steps, runs, roots)
        names = [f"{run.name}/{step.folder.name}" for step in steps]
    refuse_partial(plan, roots)
    carry_out(plan, roots, config, command(config, "--delete", *map(printable, names)))


def talk(config: ManageConfig, roots: Roots) -> None:
    """The list, then what to do with it, again and again until the user leaves."""
    while True:
        runs, chosen, notes = look(config, roots)
        display.show_runs(chosen, notes)
        action = MENU[questions.choose("What now?", list(MENU))]
        if action == "leave":
            return
        try:
            needs_picking = action in ("show", "delete", "delete steps")
            (act_on_picked if needs_picking else act)(action, runs, chosen, roots, config)
        except UserError as error:  # a deletion that was refused is no reason to leave
            print(error, file=sys.stderr)


def main(argv: list[str]) -> None:
    given, problems = flags.read_flags(ManageConfig, argv, __doc__.split("\n\n")[0])
    config = flags.build_config(ManageConfig, given, problems)
    roots = Roots(Path(config.output_dir), Path(config.log_dir), "log_dir" in given or "output_dir" not in given)
    try:
        manage(config, roots)
    except questions.EndOfInput:
        print("end of input: this question deleted nothing")


def manage(config: ManageConfig, roots: Roots) -> None:
    """Do what the flags ask for; without any, talk on a terminal and list elsewhere."""
    action = next((name for name in ACTIONS if getattr(config, name)), None)
    if action in ("undo", "empty_trash"):
        return act(action, [], [], roots, config)
    if action is None and questions.has_terminal():
        return talk(config, roots)
    runs, chosen, notes = look(config, roots)
    if action == "json":
        print(json.dumps([display.as_object(run) for run in chosen], indent=2))
    elif action == "show":
        other = inventory.find_run(config.against, runs) if config.against else None
        display.show_run(inventory.find_run(config.show, runs), runs, roots, other)
    elif action == "delete":
        plan = plan_names(config.delete, runs, roots)
        refuse_partial(plan, roots)
        carry_out(plan, roots, config, command(config, "--delete", *map(printable, config.delete)))
    elif action in CHANGING:
        act(action, runs, chosen, roots, config)
    else:
        display.show_runs(chosen, notes)


if __name__ == "__main__":
    sys.exit(utils.run_script(main))
