"""Weights & Biases, without an account and without risk for the run."""

import logging
import netrc
import os
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

log = logging.getLogger(__name__)

ASK_TIMEOUT = 3  # seconds in which the server must answer at all
INIT_TIMEOUT, FINISH_TIMEOUT = 30, 60  # seconds that a run waits for the network, at its start and at its end


def wandb_logger(*, folder: Path, config: dict[str, Any], project: str) -> WandbLogger:
    """A logger that goes online only where a key is at hand, and offline where that fails.

    WANDB_MODE decides if set; else a key, from WANDB_API_KEY or the netrc file, means online, and no key offline. An
    offline run lies in `folder`/wandb and is sent later by `wandb sync`. A resumed run keeps its id.
    """
    import wandb

    identity = folder / "wandb_id.txt"
    if not identity.exists():
        rank_zero_only(identity.write_text)(uuid.uuid4().hex[:8])
    mode = os.environ.get("WANDB_MODE")
    if not mode:
        mode = "online" if has_key() else "offline"
        if mode == "offline":
            log.info("wandb has no key (see wandb login)")
    names = config["names"]
    settings: dict[str, Any] = {
        "project": project,
        "save_dir": str(folder),
        "id": identity.read_text() if identity.exists() else None,
        "resume": "allow",
        "name": f"{names['method']} {config['dataset']['name']} seed {config['seed']}",
        "group": folder.parent.name,
        "tags": [names["method"], config["dataset"]["name"], names["backbone"]],
        "config": config,
    }
    os.environ.setdefault("WANDB_SILENT", "true")
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
    if mode == "online" and not answers(server := wandb.setup().settings.base_url):
        log.warning("wandb's server %s does not answer", server)
        mode = "offline"
    if mode == "online":
        try:
            patience = wandb.Settings(
                init_timeout=INIT_TIMEOUT, finish_timeout=FINISH_TIMEOUT, finish_timeout_raises=False
            )
            logger = WandbLogger(**settings, mode="online", settings=patience)
            _ = logger.experiment  # connects now, or fails now
            return logger
        except Exception as error:
            log.warning("wandb could not go online (%s); this run is logged offline", str(error).splitlines()[0])
            wandb.teardown()  # its own process still holds the failed run, and would refuse another one of that id
            mode = "offline"
    if mode == "offline":
        log.info("wandb works offline; send the run later with: wandb sync %s", folder / "wandb" / "offline-run-*")
    return WandbLogger(**settings, mode=mode)


def answers(url: str) -> bool:
    """Whether anyone answers there within ASK_TIMEOUT, whatever is said."""
    heard = threading.Event()

    def ask() -> None:
        try:
            urlopen(url, timeout=ASK_TIMEOUT).close()
        except HTTPError:
            pass
        except (OSError, HTTPException) as error:
            if not isinstance(getattr(error, "reason", None), ssl.SSLError):  # wandb has certificates of its own
                return
        heard.set()

    # urlopen's own limit is for each address, and none for looking up the name: a thread may be left behind.
    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    asking.join(ASK_TIMEOUT)
    return heard.is_set()


def has_key() -> bool:
    """Whether a key for the hosted service is configured."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    try:
        return any("wandb" in host for host in netrc.netrc().hosts)
    except (OSError, netrc.NetrcParseError):
        return False
