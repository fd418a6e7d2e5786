"""The exit codes that scripts rely on."""

import signal

from deepclust import exit_codes
from deepclust.errors import InputError, ProcessLost


def test_codes():
    assert (exit_codes.DONE, exit_codes.PROGRAM_FAULT, exit_codes.INPUT_ERROR) == (0, 1, 2)
    assert exit_codes.INTERRUPTED == exit_codes.exit_code_of_signal(signal.SIGINT) == 130
    assert exit_codes.exit_code_of_signal(signal.SIGTERM) == 143
    assert exit_codes.name_signal(9) == "SIGKILL" and exit_codes.name_signal(40) == "signal 40"
    assert exit_codes.PROCESS_LOST == 75
    assert exit_codes.exit_code_of_error(ProcessLost("a", do="b", exit_code=137)) == 137
    assert exit_codes.exit_code_of_error(InputError("a", expected="b", do="c")) == 2
    assert exit_codes.exit_code_of_error(ValueError("a")) == 1
