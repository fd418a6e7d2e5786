"""Where a run is: a folder of this machine, or a model on the Hugging Face Hub that is downloaded first."""

import importlib.util
import logging
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from deepclust.errors import InputError
from deepclust.runs.run_folder import HUB_CONFIG, HUB_WEIGHTS, RESULTS

HUB_PREFIX = "hf://"
# Nothing else of a stranger's files is fetched. Results are left out where there are none.
DOWNLOADED_FILES = {HUB_CONFIG: True, HUB_WEIGHTS: True, RESULTS: False}  # whether there must be one


def is_on_hub(run: str | os.PathLike[str]) -> bool:
    """Return whether a run is named as a model on the Hub."""
    return os.fsdecode(run).startswith((HUB_PREFIX, "hf:/"))  # a Path has one slash less


def locate_run(run: str | os.PathLike[str]) -> Path:
    """Return the folder of a run that is named as a folder or as `hf://owner/name[@revision]`.

    A model on the Hub is downloaded into the cache of `huggingface_hub`, and not again while it stays the same. Who
    made it is unknown: what it names is built as that of any run (`deepclust.runs.trusted_targets`).

    Raises:
        InputError: if the name is no such name, the package `huggingface_hub` is missing, or the Hub does not give the
            files of a run.
    """
    text = os.fsdecode(run)
    if not is_on_hub(run):
        return Path(text)
    name, at, revision = text.removeprefix("hf:").lstrip("/").partition("@")
    if not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name) or (at and not re.fullmatch(r"\w[\w./-]*", revision)):
        raise InputError(
            f"{text} names no model on the Hub",
            expected="hf://OWNER/NAME or hf://OWNER/NAME@REVISION",
            do="copy the name from the page of the model",
        )
    if importlib.util.find_spec("huggingface_hub") is None:
        raise InputError(
            f"{text} needs huggingface_hub",
            expected="the optional packages of deepclust[hub]",
            do="pip install huggingface_hub, or download the model and set run=DIR",
        )
    return download_run(text, name, revision or None)


def download_run(text: str, name: str, revision: str | None) -> Path:
    """Download the files of a run from the Hub; `text` is what an error calls it.

    Raises:
        InputError: if that cannot be done.
    """
    from huggingface_hub import _CACHED_NO_EXIST, hf_hub_download, try_to_load_from_cache
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, LocalEntryNotFoundError

    folder = None
    for file, is_required in DOWNLOADED_FILES.items():
        if not is_required and try_to_load_from_cache(name, file, revision=revision) is _CACHED_NO_EXIST:
            continue  # known from the last time, so that it needs no network
        try:
            with only_errors_logged("huggingface_hub"):  # what fails in the end is told in one line
                folder = Path(hf_hub_download(name, file, revision=revision)).parent
        except Exception as error:  # of the Hub, of the network, or of this machine
            is_of_hub = isinstance(error, HfHubHTTPError | EntryNotFoundError)
            is_missing = is_of_hub and not isinstance(error, LocalEntryNotFoundError)
            if is_missing and not is_required:
                continue
            if isinstance(error, OSError) and error.errno is not None and not is_of_hub:
                raise  # a full disk, for example
            reason = " ".join(str(error).split())
            raise InputError(
                f"{file} of {text} cannot be downloaded: {type(error).__name__}: {reason[:300]}",
                expected="a model that deepclust export format=hub has made, and a way to the Hub",
                do="check the name and the network; for a private model log in by `hf auth login`",
            ) from error
        revision = folder.name  # the commit: all files are those of the same one
    assert folder is not None
    return folder


@contextmanager
def only_errors_logged(name: str) -> Iterator[None]:
    """Keep warnings of a package back inside the `with` block."""
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
