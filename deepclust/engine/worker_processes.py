"""Worker processes that are forked: they end with their parent, and hold none of its locks."""

import os
import signal

LOCKED_DESCRIPTORS: set[int] = set()  # those of locked files, which a forked process inherits with their locks
PR_SET_PDEATHSIG = 1  # of prctl(2), which Linux alone has


def begin_worker(parent: int, _: int = 0) -> None:
    """Let this process, which `parent` has just forked, end as soon as `parent` does, and give up inherited locks.

    Without this, a parent that is killed leaves workers that wait for it for ever and keep its locks.
    """
    import ctypes  # only where it is used: every command imports this module

    for descriptor in LOCKED_DESCRIPTORS:
        os.close(descriptor)
    LOCKED_DESCRIPTORS.clear()
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it has ended before
        os._exit(1)
