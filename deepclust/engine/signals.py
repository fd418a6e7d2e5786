"""Signals that ask a run to stop: a time limit that comes near, preemption, `scancel`, `kill`.

A signal can come at any moment, and to only one of several processes, so at first it is only noted. Between two batches
all processes learn of it and callbacks/last_checkpoint.py writes the checkpoint. Then the signal has the effect that it
would have had at once: the handler that was installed before training is called (submitit's puts the job back into
the queue), or, if there was none, the process exits with `exit_code_of_signal`. Ctrl-C is not among them: Lightning
handles it, and commands/train.py passes it on.
"""

import signal
import sys
import threading
from enum import IntEnum
from types import FrameType
from typing import Any

import torch
from torch import distributed as dist

from deepclust.engine import distributed
from deepclust.errors import InputError
from deepclust.exit_codes import exit_code_of_signal

STOP_SIGNALS = (signal.SIGUSR2, signal.SIGUSR1, signal.SIGTERM)  # handled in this order


class HandlerOutcome(IntEnum):
    """How a call of a signal handler ended."""

    RETURNED = 0
    EXITED = 1
    FAILED = 2


class StopSignals:
    """Notes which of STOP_SIGNALS are received during training, and gives them their effect later.

    Where no batch ends within `patience` seconds of a signal, as in a long E-step, the signal takes effect without a
    checkpoint: a job that asks for its place in the queue too late does not get one.
    """

    def __init__(self, *, patience: float) -> None:
        self.patience = patience
        self.received: set[signal.Signals] = set()
        self.original_handlers: dict[signal.Signals, Any] = {}

    def save_original_handlers(self) -> None:
        """Remember the handlers that are installed now; they are what `take_effect` calls."""
        self.original_handlers = {number: signal.getsignal(number) for number in STOP_SIGNALS}

    def start_watching(self) -> None:
        """Note signals from now on; those that are ignored stay ignored."""
        if self.received:
            self._start_timer()
        if threading.current_thread() is threading.main_thread():  # Python lets no other thread set handlers
            for number, handler in self.original_handlers.items():
                if handler is not signal.SIG_IGN:
                    signal.signal(number, self._note_signal)

    def stop_watching(self) -> None:
        """Install the original handlers again."""
        signal.setitimer(signal.ITIMER_REAL, 0)
        restore_handlers(self.original_handlers)

    def received_by_any_process(self, device: torch.device) -> list[signal.Signals]:
        """Return the signals that any process has received. All processes call this; `device` is where they train."""
        if distributed.world_size() == 1:
            return [number for number in STOP_SIGNALS if number in self.received]
        # This makes the host wait for the device, but Lightning's own broadcast before each batch does so anyway.
        flags = torch.tensor([number in self.received for number in STOP_SIGNALS], dtype=torch.int32, device=device)
        dist.all_reduce(flags, op=dist.ReduceOp.MAX)
        return [number for number, flag in zip(STOP_SIGNALS, flags.tolist(), strict=True) if flag]

    def take_effect(self, numbers: list[signal.Signals], device: torch.device) -> None:
        """Give these signals their effect: call their original handlers, or exit where there is none.

        The handlers are called on process 0, and the other processes follow what happens there. Returns if the handlers
        return, as submitit's for SIGTERM does.

        Raises:
            SystemExit: if the run ends here.
            InputError: if a handler fails, as submitit's does for a job that may not be put back once more.
        """
        self.stop_watching()
        self.received.difference_update(numbers)
        for number in numbers:
            outcome = torch.full((), HandlerOutcome.FAILED, device=device)
            try:
                if distributed.rank() == 0:
                    call_handler(self.original_handlers[number], number)
                    outcome.fill_(HandlerOutcome.RETURNED)
            except SystemExit:
                outcome.fill_(HandlerOutcome.EXITED)
                raise
            finally:
                distributed.broadcast(outcome, 0)
            if outcome == HandlerOutcome.EXITED:
                sys.exit(exit_code_of_signal(number))
            if outcome == HandlerOutcome.FAILED:
                raise RuntimeError(f"the handler of {number.name} has failed on process 0")
        self.start_watching()

    def _note_signal(self, number: int, frame: FrameType | None) -> None:
        if not self.received:
            self._start_timer()
        self.received.add(signal.Signals(number))

    def _start_timer(self) -> None:
        signal.signal(signal.SIGALRM, self._on_timeout)
        signal.setitimer(signal.ITIMER_REAL, self.patience)

    def _on_timeout(self, number: int, frame: FrameType | None) -> None:
        self.stop_watching()
        numbers = [number for number in STOP_SIGNALS if number in self.received]
        self.received.clear()
        for number in numbers:
            call_handler(self.original_handlers[number], number)
        self.start_watching()


def restore_handlers(handlers: dict[signal.Signals, Any]) -> None:
    """Install these handlers for their signals; nothing is done outside the main thread."""
    if threading.current_thread() is threading.main_thread():
        for number, handler in handlers.items():
            signal.signal(number, handler or signal.SIG_DFL)  # None: it was not installed from Python


def call_handler(handler: Any, number: signal.Signals) -> None:
    """Call the handler of a signal; if it is not callable (SIG_DFL, None), exit.

    Raises:
        SystemExit: with `exit_code_of_signal`, where there is no handler to call.
        InputError: if the handler fails.
    """
    if not callable(handler):
        sys.exit(exit_code_of_signal(number))
    try:
        handler(number, None)
    except Exception as error:
        raise InputError(
            f"stopped by {number.name}: {error}",
            expected="a job that goes back into the queue",
            do="start again in this folder; with submitit allow more time-outs (hydra.launcher.max_num_timeout)",
        ) from error
