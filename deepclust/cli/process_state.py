"""The state of a process that commands change, put back when they run inside a program of somebody else."""

import contextlib
import logging
import os
import random
import signal
import sys
import threading
import warnings
from collections.abc import Iterator
from typing import Any

_ONE_AT_A_TIME = threading.RLock()  # Hydra, the command line and the logs belong to the whole process


@contextlib.contextmanager
def process_state_kept() -> Iterator[None]:
    """Run a command inside the `with` block as in a new process, and put back afterwards what it changes.

    That is: the command line, environment variables, the working directory, logging, warnings, Hydra's global state,
    signal handlers, the states of the random generators of Python, NumPy and torch, and torch's global settings.
    Threads wait for each other.
    """
    with (
        _ONE_AT_A_TIME,
        environment_kept(),
        warnings.catch_warnings(),
        logging_kept(),
        hydra_state_kept(),
        signal_handlers_kept(),
        random_states_kept(),
        torch_settings_of_a_new_process(),
    ):
        yield


@contextlib.contextmanager
def computing_state_kept() -> Iterator[None]:
    """Build and use a model inside the `with` block as in a new process, and put back what that changes."""
    with _ONE_AT_A_TIME, random_states_kept(), torch_settings_of_a_new_process():
        yield


@contextlib.contextmanager
def environment_kept() -> Iterator[None]:
    """Put back environment variables, the command line and the working directory."""
    variables, arguments, folder = dict(os.environ), sys.argv, os.getcwd()
    try:
        yield
    finally:
        sys.argv = arguments
        for name in os.environ.keys() - variables.keys():
            del os.environ[name]
        for name, value in variables.items():
            if os.environ.get(name) != value:
                os.environ[name] = value
        if os.getcwd() != folder:
            os.chdir(folder)


@contextlib.contextmanager
def logging_kept() -> Iterator[None]:
    """Put back handlers, filters and levels of all loggers, and close the log files that were opened.

    `logging.config` closes all handlers that there are before it makes new ones: those of the program are hidden from
    it. Warnings that the program has sent to its log (`logging.captureWarnings`) go to that of the command meanwhile.
    """
    module: Any = logging
    # `logging` lists loggers and handlers, and remembers the former `warnings.showwarning`, nowhere but in these.
    loggers = [logging.root, *(x for x in logging.root.manager.loggerDict.values() if isinstance(x, logging.Logger))]
    states = {x: (x.level, x.handlers[:], x.filters[:], x.propagate, x.disabled) for x in loggers}
    disabled_level, former_showwarning = logging.root.manager.disable, module._warnings_showwarning
    known_handlers, names = module._handlerList[:], dict(module._handlers)
    if former_showwarning is not None:
        warnings.showwarning, module._warnings_showwarning = former_showwarning, None
    module._handlerList[:] = []
    module._handlers.clear()
    logging.root.handlers[:] = []
    try:
        yield
    finally:
        for handler in [reference() for reference in module._handlerList]:
            if isinstance(handler, logging.FileHandler):
                with contextlib.suppress(Exception):  # such as a full disk
                    handler.close()
        module._handlerList[:0] = known_handlers
        module._handlers.update(names)
        module._warnings_showwarning = former_showwarning
        logging.disable(disabled_level)
        for logger in logging.root.manager.loggerDict.values():
            if isinstance(logger, logging.Logger) and logger not in states:  # of a module that was imported meanwhile
                logger.handlers[:] = [x for x in logger.handlers if not isinstance(x, logging.FileHandler)]
        for logger, (level, handlers, filters, propagates, is_disabled) in states.items():
            logger.handlers[:], logger.filters[:] = handlers, filters
            logger.propagate, logger.disabled = propagates, is_disabled
            logger.setLevel(level)


@contextlib.contextmanager
def hydra_state_kept() -> Iterator[None]:
    """Put back Hydra's global state: a program may be inside `initialize`, or be a Hydra application itself."""
    from hydra.core.global_hydra import GlobalHydra
    from hydra.core.hydra_config import HydraConfig

    hydra, config = GlobalHydra.instance(), HydraConfig.instance()
    kept = hydra.hydra, config.cfg
    hydra.hydra, config.cfg = None, None
    try:
        yield
    finally:
        hydra.hydra, config.cfg = kept


@contextlib.contextmanager
def signal_handlers_kept() -> Iterator[None]:
    """Put back the handlers of the signals that a training watches. Only the main thread has any."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    names = ("SIGINT", "SIGTERM", "SIGUSR1", "SIGUSR2", "SIGALRM", "SIGCONT", "SIGHUP")
    handlers = {number: signal.getsignal(number) for name in names if (number := getattr(signal, name, None))}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            if handler is not None and signal.getsignal(number) is not handler:
                signal.signal(number, handler)


@contextlib.contextmanager
def random_states_kept() -> Iterator[None]:
    """Put back the states of the global random generators of Python, NumPy and torch."""
    import numpy as np
    import torch

    python, numpy = random.getstate(), np.random.get_state()
    is_initialized: Any = torch.cuda.is_initialized  # it has no types
    devices = list(range(torch.cuda.device_count())) if is_initialized() else []
    with torch.random.fork_rng(devices=devices):
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)


@contextlib.contextmanager
def torch_settings_of_a_new_process() -> Iterator[None]:
    """Give torch the settings that it has in a new process, and put back those of the program afterwards.

    A program may have turned gradients off, or chosen another type of floats, and a run would learn nothing, or
    something else than on the command line.
    """
    import torch
    from torch.backends import cuda, cudnn

    deterministic, warn_only = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    matmul_precision, dtype = torch.get_float32_matmul_precision(), torch.get_default_dtype()
    flags: Any = [cudnn.enabled, cudnn.benchmark, cudnn.deterministic, cudnn.allow_tf32, cuda.matmul.allow_tf32]
    settings: Any = getattr(getattr(torch, "_dynamo", None), "config", None) if "torch._dynamo" in sys.modules else None
    recompile_limit = None if settings is None else settings.recompile_limit
    anomalies = torch.is_anomaly_enabled()
    torch.set_default_dtype(torch.float32)
    torch.set_float32_matmul_precision("highest")
    torch.use_deterministic_algorithms(False)
    torch.autograd.set_detect_anomaly(False)
    cudnn.enabled, cudnn.benchmark, cudnn.deterministic, cudnn.allow_tf32 = True, False, False, True
    try:
        with (
            contextlib.nullcontext() if torch.get_default_device().type == "cpu" else torch.device("cpu"),
            torch.inference_mode(False),
            torch.enable_grad(),
            torch.autocast("cpu", enabled=False),
            torch.autocast("cuda", enabled=False) if torch.cuda.is_available() else contextlib.nullcontext(),
        ):
            yield
    finally:
        torch.set_default_dtype(dtype)
        torch.set_float32_matmul_precision(matmul_precision)
        torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)
        torch.autograd.set_detect_anomaly(anomalies)
        cudnn.enabled, cudnn.benchmark, cudnn.deterministic, cudnn.allow_tf32 = flags[:4]
        cuda.matmul.allow_tf32 = flags[4]
        if recompile_limit is not None:
            settings.recompile_limit = recompile_limit
