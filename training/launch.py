"""Connects the processes that a launcher started, rejects wrong launches, and explains a lost rank."""

from __future__ import annotations

import contextlib
import gc
import os
import signal
import socket
import sys
import threading
import time
import traceback
import typing
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import utils
from training.distributed import World
from utils import EXIT_DISK_OR_NETWORK, Stopped, UserError

with utils.lazy_imports():  # a single process needs none of it, and --help must not wait for it
    import torch

# The launcher and a broken connection tell of a process that dies; this limit is for those that wait while one
# tokenizes, evaluates or saves.
MOST_SECONDS_OF_WAITING = 4 * 3600
OTHERS_SPEAK_AFTER_SECONDS = 2.0
STUCK_AFTER_SECONDS = 20.0  # torchrun kills after 30
# Launchers that start copies without connecting them, and where they say how many.
COUNTS_OF_OTHER_LAUNCHERS = {
    "SLURM_STEP_NUM_TASKS": "srun",
    "OMPI_COMM_WORLD_SIZE": "mpirun",
    "PMI_SIZE": "mpiexec",
    "MV2_COMM_WORLD_SIZE": "mpirun",
}
LAUNCH = f"torchrun --nproc_per_node N {Path(sys.argv[0]).name} …   (docs/distributed.md has more)"


class PeerLost(UserError):
    """Another process of this run has ended, so this one cannot go on."""

    exit_code = EXIT_DISK_OR_NETWORK


# -- Connecting --------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def joined() -> Iterator[World]:
    """The world of this process, connected inside the block; errors that another process caused are explained."""
    world = join()
    try:
        yield world
        world.barrier()
    except BaseException as error:
        if world.is_alone:
            raise
        if not world.is_main:
            let_main_speak_first(error)
        traceback.clear_frames(error.__traceback__)  # they hold the model
        raise explained(error, world)  # noqa: B904
    finally:
        if not world.is_alone:
            gc.collect()  # DDP and FSDP2 hold on to the connection
            torch.distributed.destroy_process_group()


def join() -> World:
    """Connect to the other processes that a launcher started, if any. Raises UserError for a wrong launch."""
    size = _number("WORLD_SIZE", 1)
    if size == 1:
        check_no_unconnected_copies()
        return World()
    if missing := [name for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]:
        raise UserError(
            f"WORLD_SIZE says that this is one of {size} processes, but {', '.join(missing)} is not set",
            next=f"start it with a launcher, {LAUNCH}; or unset WORLD_SIZE",
        )
    world = World(_number("RANK", 0), size, _number("LOCAL_RANK", 0))
    if not world.is_main:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115  one process speaks for all
    gpus = torch.cuda.device_count()
    if gpus and world.local_rank >= gpus:
        started = _number("LOCAL_WORLD_SIZE", size)
        raise UserError(
            f"{started} processes were started on a machine with {utils.counted(gpus, 'GPU')}",
            next=f"--nproc_per_node {gpus}",
        )
    from accelerate import PartialState

    try:
        state = PartialState(cpu=not gpus, timeout=timedelta(seconds=MOST_SECONDS_OF_WAITING))
    except (RuntimeError, ValueError) as error:
        raise PeerLost(
            "the processes of this run cannot be connected",
            where=f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}",
            found=utils.first_line(error),
            next="see that this address is reached from every machine, and that its port is free",
        ) from error
    if state.num_processes != size:  # connected, but not to the processes that were asked for
        raise UserError(f"{size} processes were asked for, and {state.num_processes} are connected", next=LAUNCH)
    return world


def connect_model(world: World, is_sharded: bool) -> None:
    """Decide how the processes share the model: DDP, or FSDP2."""
    if world.is_alone:
        if is_sharded:
            raise UserError(
                "--fsdp spreads the model over several processes, and this is one",
                next=LAUNCH.replace(" …", " --fsdp …"),
            )
        return
    from accelerate import Accelerator, DistributedDataParallelKwargs

    ddp = DistributedDataParallelKwargs(gradient_as_bucket_view=True)  # gradients are not held twice
    world.accelerator = Accelerator(cpu=not torch.cuda.is_available(), mixed_precision="no", kwargs_handlers=[ddp])
    world.is_sharded = is_sharded


def _number(name: str, default: int) -> int:
    text = os.environ.get(name, "").strip()
    if text and not text.isdecimal():
        raise UserError(f"{name} is not a number", found=repr(text), next=f"unset {name}")
    return int(text or default)


def check_no_unconnected_copies() -> None:
    """Raise UserError if a launcher started several unconnected copies, or one where several were asked for."""
    for name, launcher in COUNTS_OF_OTHER_LAUNCHERS.items():
        if _number(name, 1) > 1:
            raise UserError(
                f"{launcher} started {os.environ[name]} copies of this script without connecting them",
                safe="nothing was trained",
                next=f"one {launcher} task a machine, and in it {LAUNCH}",
            )
    asked = _asked_of_accelerate() if "ACCELERATE_MIXED_PRECISION" in os.environ else 1
    if asked > 1:
        raise UserError(
            f"`accelerate launch` was asked for {asked} processes and started one",
            found="without GPUs it starts one process, whatever --num_processes says",
            safe="nothing was trained",
            next=LAUNCH.replace("N", str(asked), 1),
        )


def _asked_of_accelerate() -> int:
    """The value of --num_processes in the command of the process that started this one."""
    import psutil

    try:
        words = psutil.Process().parent().cmdline()
    except (psutil.Error, AttributeError):  # it is gone, or belongs to another user
        return 1
    for word, following in zip(words, [*words[1:], ""], strict=True):
        name, _, value = word.partition("=")
        if name in ("--num_processes", "--num-processes", "--nproc_per_node"):
            value = value or following
            return int(value) if value.isdecimal() else 1
    return 1


# -- Ending ------------------------------------------------------------------------------------------------------------


def explained(error: BaseException, world: World) -> BaseException:
    """A broken connection as what it means, that another process ended; any other error unchanged."""
    if world.is_alone or not isinstance(error, RuntimeError):
        return error
    words = ("gloo/", "Connection closed by peer", "Connection reset by peer", "NCCL")
    if not isinstance(error, torch.distributed.DistError) and not any(word in str(error) for word in words):
        return error
    lost = PeerLost(
        "another process of this run has ended, so this one cannot go on",
        where=f"process {world.rank} of {world.size}",
        found=utils.first_line(error),
        next="fix what the other process reported, then resume with --resume_from and the run's folder",
    )
    lost.__cause__ = error
    return lost


@contextlib.contextmanager
def ended_if_stuck(stop: utils.StopRequest, seconds: float = STUCK_AFTER_SECONDS) -> Iterator[None]:
    """Inside the block a signal to stop is obeyed even where `stop` cannot note it, because Python does not run.

    A process that waits in the GPU's driver for another one, which has died, is stuck like that. The launcher would
    kill it without a word; here a thread says after `seconds` what happened, and ends it.
    """
    if os.name == "nt" or threading.current_thread() is not threading.main_thread():
        yield
        return
    arrivals, notes = socket.socketpair()  # the interpreter writes a signal's number there the moment that it arrives
    notes.setblocking(False)

    def is_noted() -> bool:
        return stop.signal_number is not None or notes.fileno() < 0

    def watch() -> None:
        while number := arrivals.recv(1):  # nothing more comes once `notes` is closed
            deadline = time.monotonic() + seconds
            while not is_noted() and time.monotonic() < deadline:
                time.sleep(0.1)
            if number[0] in utils.STOP_SIGNALS and not is_noted():
                utils.say_if_heard(
                    "this process was asked to stop, and is stuck: most likely it waits for another that has ended\n"
                    "  saved steps are safe; resume with --resume_from and the run's folder"
                )
                os._exit(128 + number[0])

    before = signal.set_wakeup_fd(notes.fileno(), warn_on_full_buffer=False)
    threading.Thread(target=watch, daemon=True).start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)
        notes.close()


def leave(exit_code: int) -> typing.NoReturn:
    """End this process; if it is one of several, without the interpreter's own shutdown.

    DDP and FSDP2 keep gloo's threads alive, and a process whose peers are gone may abort in them during shutdown: the
    launcher would take a finished run for a failed one.
    """
    if os.environ.get("WORLD_SIZE", "1") == "1":
        sys.exit(exit_code)
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # its reader may be gone
            stream.flush()
    os._exit(exit_code)


def let_main_speak_first(error: BaseException) -> None:
    """Most errors happen on every rank: the main one reports it, and then the launcher ends the others."""
    with contextlib.suppress(Stopped):  # the launcher ends this process, as expected
        if isinstance(error, Exception):
            time.sleep(OTHERS_SPEAK_AFTER_SECONDS)
            return
    sys.stderr = open(os.devnull, "w")  # noqa: SIM115  the main rank reports the stop
