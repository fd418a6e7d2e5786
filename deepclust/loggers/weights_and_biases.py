"""A logger for Weights & Biases that works without an account and goes offline where the service fails."""

import logging
import netrc
import os
import re
import ssl
import threading
import uuid
from http.client import HTTPException
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.request import urlopen

from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from deepclust.engine.small_files import read_small_text
from deepclust.errors import InputError

log = logging.getLogger(__name__)

RESPONSE_TIMEOUT = 3  # seconds within which the server must respond at all
INIT_TIMEOUT, FINISH_TIMEOUT = 30, 60  # seconds that a run waits for the network at its start and at its end


def read_run_id(file: Path) -> str:
    """Return the id that a run has had on the dashboard since its first start.

    Raises:
        InputError: if something else lies in place of the file.
    """
    try:
        run_id = read_small_text(file).strip()
        if not re.fullmatch(r"[\w.-]{1,128}", run_id, re.ASCII):
            raise ValueError("it holds no id")
    except ValueError as error:
        raise InputError(
            f"{file} is not as deepclust wrote it: {' '.join(str(error).split())}",
            expected="the id of the run on the dashboard",
            do="remove it, and the run begins anew on the dashboard, or bring back a copy",
        ) from error
    return run_id


def wandb_logger(*, folder: Path, config: dict[str, Any], project: str) -> WandbLogger:
    """Return a logger that is online where an API key is configured, and offline elsewhere or where that fails.

    WANDB_MODE, if set, decides instead. The key is looked for in WANDB_API_KEY and in the netrc file. An offline run is
    stored in `folder`/wandb and can be sent later by `wandb sync`. A resumed run keeps its id.
    """
    import wandb

    id_file = folder / "wandb_id.txt"
    if not id_file.exists():
        rank_zero_only(id_file.write_text)(uuid.uuid4().hex[:8])
    mode = os.environ.get("WANDB_MODE")
    if not mode:
        mode = "online" if has_api_key() else "offline"
        if mode == "offline":
            log.info("wandb has no key (see wandb login)")
    names = config["names"]
    settings: dict[str, Any] = {
        "project": project,
        "save_dir": str(folder),
        "id": read_run_id(id_file) if id_file.exists() else None,
        "resume": "allow",
        "name": f"{names['method']} {config['dataset']['name']} seed {config['seed']}",
        "group": folder.parent.name,
        "tags": [names["method"], config["dataset"]["name"], names["backbone"]],
        "config": config,
    }
    os.environ.setdefault("WANDB_SILENT", "true")
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
    if mode == "online" and not is_server_responding(server := wandb.setup().settings.base_url):
        log.warning("wandb's server %s does not answer", server)
        mode = "offline"
    if mode == "online":
        try:
            timeouts = wandb.Settings(
                init_timeout=INIT_TIMEOUT, finish_timeout=FINISH_TIMEOUT, finish_timeout_raises=False
            )
            logger = WandbLogger(**settings, mode="online", settings=timeouts)
            _ = logger.experiment  # reading this attribute connects, so that a failure shows here
            return logger
        except Exception as error:
            log.warning("wandb could not go online (%s); this run is logged offline", str(error).splitlines()[0])
            wandb.teardown()  # wandb's service process holds the failed run and would refuse another one with its id
            mode = "offline"
    if mode == "offline":
        log.info("wandb works offline; send the run later with: wandb sync %s", folder / "wandb" / "offline-run-*")
    return WandbLogger(**settings, mode=mode)


def is_server_responding(url: str) -> bool:
    """Return whether a server responds at `url` within RESPONSE_TIMEOUT, be it with an error."""
    has_responded = threading.Event()

    def request() -> None:
        try:
            urlopen(url, timeout=RESPONSE_TIMEOUT).close()
        except HTTPError:
            pass
        except (OSError, HTTPException) as error:
            if not isinstance(getattr(error, "reason", None), ssl.SSLError):  # wandb brings its own certificates
                return
        has_responded.set()

    # urlopen's timeout holds for each address and not for looking up the name, so the request runs in a thread that may
    # be left behind.
    thread = threading.Thread(target=request, daemon=True)
    thread.start()
    thread.join(RESPONSE_TIMEOUT)
    return has_responded.is_set()


def has_api_key() -> bool:
    """Return whether an API key for wandb is configured."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    try:
        return any("wandb" in host for host in netrc.netrc().hosts)
    except (OSError, netrc.NetrcParseError):
        return False
