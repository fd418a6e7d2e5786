"""The one exception for what a user can mend."""


class InputError(ValueError):
    """Something the user gave cannot be used; the command line prints it as one line and exits with 2.

    Raised at the boundary (configuration, files, first batch), wherever the text can say what to do about it.

    Args:
        what: what is wrong, with the value that was given.
        expected: what would have been right.
        do: what to do about it.

    Example:
        >>> import deepclust
        >>> try:
        ...     deepclust.load_run("no-such-folder")
        ... except deepclust.InputError as error:
        ...     print(error.expected)
        a folder with results.json
    """

    # Whether another process of the run has printed it. None: unknown; then the first process prints it.
    is_printed: bool | None = None

    def __init__(self, what: str, *, expected: str, do: str) -> None:
        super().__init__(f"{what}; expected {expected}; {do}")
        self.what, self.expected, self.do = what, expected, do

    def __reduce__(self) -> tuple:  # keyword-only arguments would be lost on the way between processes
        return _restore, (self.what, self.expected, self.do)


class ProcessLost(InputError):
    """Another process of the run was killed, has failed or does not answer; the last checkpoint is intact.

    Args:
        what: which process, and how it has ended.
        do: how the run goes on.
        exit_code: with which this process ends.
    """

    def __init__(self, what: str, *, do: str, exit_code: int) -> None:
        super().__init__(what, expected="all processes to run to the end", do=do)
        self.exit_code = exit_code

    def __reduce__(self) -> tuple:
        return _restore_lost, (self.what, self.do, self.exit_code, self.is_printed)


def _restore_lost(what: str, do: str, exit_code: int, is_printed: bool | None) -> ProcessLost:
    error = ProcessLost(what, do=do, exit_code=exit_code)
    error.is_printed = is_printed
    return error


def _restore(what: str, expected: str, do: str) -> InputError:
    return InputError(what, expected=expected, do=do)
