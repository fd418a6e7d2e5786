"""The exit codes of the command line: which end of a command has which code."""

import signal

from deepclust.errors import InputError, ProcessLost

DONE = 0
PROGRAM_FAULT = 1  # a fault of the program, shown with a traceback
INPUT_ERROR = 2  # something that the user can mend, said in one line
PROCESS_LOST = 75  # another process of the run has ended or hangs, nobody knows why; EX_TEMPFAIL of sysexits.h
INTERRUPTED = 130  # Ctrl-C


def exit_code_of_error(error: BaseException) -> int:
    """Return the exit code of a command, or of a job, that ended with this error."""
    if isinstance(error, ProcessLost):
        return error.exit_code
    return INPUT_ERROR if isinstance(error, InputError) else PROGRAM_FAULT


def exit_code_of_signal(number: int) -> int:
    """Return the exit code of a run that a signal ended, as a shell reports it: 128 + the signal's number."""
    return 128 + number


def name_signal(number: int) -> str:
    """Return the name of a signal, and its number where Python knows no name, as for most real-time signals."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
