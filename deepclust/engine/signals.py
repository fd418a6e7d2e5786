"""Signals that ask a run to stop: a time limit that comes near, preemption, `scancel`, `kill`.

A signal comes in the middle of anything, and perhaps to one process of several, so it is only noted. Where training
next stands between two batches all processes learn of it, the checkpoint is written (callbacks/checkpoint.py), and what
would have happened at once happens then: the handler that was there before acts (submitit's puts the job back into the
queue), or the process ends with 128 + the signal's number, as a shell reports it.
"""

import signal
import sys
import threading
from types import FrameType
from typing import Any

import torch
from torch import distributed as dist

from deepclust.engine import distributed
from deepclust.errors import InputError

STOP_SIGNALS = (signal.SIGUSR2, signal.SIGUSR1, signal.SIGTERM)  # acted on in this order
GOES_ON, ENDS, FAILS = range(3)  # what comes of a handler


class StopRequest:
    """Which of STOP_SIGNALS have come since `watch`.

    Where no batch ends within `patience` seconds, as in a long E-step, the signal takes effect without a checkpoint: a
    job that is put back into the queue too late is gone.
    """

    def __init__(self, *, patience: float) -> None:
        self.patience = patience
        self.received: set[signal.Signals] = set()
        self.before: dict[signal.Signals, Any] = {}

    def remember(self) -> None:
        """Take the handlers of now for what is done in the end."""
        self.before = {number: signal.getsignal(number) for number in STOP_SIGNALS}

    def watch(self) -> None:
        """Note signals from now on; those that are ignored stay so."""
        if self.received:
            self._wait()
        if threading.current_thread() is threading.main_thread():  # no other may
            for number, handler in self.before.items():
                if handler is not signal.SIG_IGN:
                    signal.signal(number, self._note)

    def unwatch(self) -> None:
        """Put the handlers back that were there before."""
        signal.setitimer(signal.ITIMER_REAL, 0)
        restore_handlers(self.before)

    def agreed(self, device: torch.device) -> list[signal.Signals]:
        """What has come to any of the processes, which all call this; `device` is theirs."""
        if distributed.world_size() == 1:
            return [number for number in STOP_SIGNALS if number in self.received]
        # Lightning asks the like of process 0 before each batch, so this is not what makes the device wait.
        flags = torch.tensor([number in self.received for number in STOP_SIGNALS], dtype=torch.int32, device=device)
        dist.all_reduce(flags, op=dist.ReduceOp.MAX)
        return [number for number, flag in zip(STOP_SIGNALS, flags.tolist(), strict=True) if flag]

    def act(self, numbers: list[signal.Signals], device: torch.device) -> None:
        """What these signals would have done at once; on every process what they do on process 0.

        Comes back where that handler does, as submitit's for SIGTERM.

        Raises:
            SystemExit: where the run ends.
            InputError: where the handler fails, as submitit's where the job may not be put back once more.
        """
        self.unwatch()
        self.received.difference_update(numbers)
        for number in numbers:
            outcome = torch.full((), FAILS, device=device)
            try:
                if distributed.rank() == 0:
                    call_handler(self.before[number], number)
                    outcome.fill_(GOES_ON)
            except SystemExit:
                outcome.fill_(ENDS)
                raise
            finally:
                distributed.broadcast(outcome, 0)
            if outcome == ENDS:
                sys.exit(128 + number)
            if outcome == FAILS:
                raise RuntimeError(f"the handler of {number.name} has failed on process 0")
        self.watch()

    def _note(self, number: int, frame: FrameType | None) -> None:
        if not self.received:
            self._wait()
        self.received.add(signal.Signals(number))

    def _wait(self) -> None:
        signal.signal(signal.SIGALRM, self._out_of_patience)
        signal.setitimer(signal.ITIMER_REAL, self.patience)

    def _out_of_patience(self, number: int, frame: FrameType | None) -> None:
        self.unwatch()
        numbers = [number for number in STOP_SIGNALS if number in self.received]
        self.received.clear()
        for number in numbers:
            call_handler(self.before[number], number)
        self.watch()


def restore_handlers(handlers: dict[signal.Signals, Any]) -> None:
    """Make these the handlers of their signals again."""
    if threading.current_thread() is threading.main_thread():
        for number, handler in handlers.items():
            signal.signal(number, handler or signal.SIG_DFL)  # None: it is not Python's


def call_handler(handler: Any, number: signal.Signals) -> None:
    """Call the handler of a signal; without one, end.

    Raises:
        SystemExit: with 128 + the signal's number, where there is no handler.
        InputError: where the handler fails.
    """
    if not callable(handler):
        sys.exit(128 + number)
    try:
        handler(number, None)
    except Exception as error:
        raise InputError(
            f"stopped by {number.name}: {error}",
            expected="a job that goes back into the queue",
            do="start again in this folder; with submitit allow more time-outs (hydra.launcher.max_num_timeout)",
        ) from error
