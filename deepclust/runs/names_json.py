"""names.json in a run folder: what its clusters are called, by the network's words or by whoever has looked at them."""

import itertools
import json
import logging
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from deepclust.engine.output_files import write_text
from deepclust.engine.small_files import read_json
from deepclust.errors import InputError

NAMES = "names.json"
EARLIER_NAMES = "names-of-earlier-clusters.json"

MAX_DIGITS = 18  # of the number of a cluster

log = logging.getLogger(__name__)


def read_names(folder: Path) -> dict[int, str]:
    """Return the names of clusters that a run folder holds: none where it has no names.json.

    Raises:
        InputError: if the file is something else than an object with a name for each number of a cluster.
    """
    file = folder / NAMES
    if not os.path.lexists(file):
        return {}
    try:
        content = read_json(file)
        reason = check_names(content)
    except (ValueError, OSError) as error:
        reason = " ".join(str(error).split())
    if reason is not None:
        raise InputError(
            f"{file} does not name clusters: {reason}",
            expected='an object such as {"0": "cats", "1": "dogs"}',
            do="mend it, or remove it",
        )
    return {int(cluster): " ".join(name.split()) for cluster, name in content.items() if name.strip()}


def check_names(content: Any) -> str | None:
    """Return what is wrong with the content of a names.json, or None."""
    if not isinstance(content, dict):
        return f"it holds a {type(content).__name__}, no object"
    for cluster, name in content.items():
        if not (cluster.isascii() and cluster.isdigit() and len(cluster) <= MAX_DIGITS):
            return f"{cluster[:40]!r} is no number of a cluster"
        if not isinstance(name, str):
            return f"the name of cluster {cluster[:40]} is no text"
    return None


def write_names(folder: Path, names: Mapping[int, str], *, earlier: Mapping[str, str]) -> None:
    """Write the suggested names of the clusters of a run.

    Names of earlier clusters in its folder, the suggestions for which were `earlier`, are kept in another file if
    somebody has changed them: they belong to other clusters. A file that holds the suggestions already is left alone: a
    run that was killed after this has written it.
    """
    file, suggested = folder / NAMES, {str(cluster): name for cluster, name in names.items()}
    try:
        is_edited = read_json(file) not in (dict(earlier), suggested)
    except FileNotFoundError:
        is_edited = False
    except (ValueError, OSError):
        is_edited = True
    if is_edited and file.is_file():
        kept = next(path for path in list_places_for_earlier_names(folder) if not path.exists())
        file.replace(kept)
        log.info("the names of the earlier clusters are now in %s", kept)
    write_text(file, json.dumps(suggested, indent=2, ensure_ascii=False) + "\n")


def list_places_for_earlier_names(folder: Path) -> Iterator[Path]:
    """Yield `names-of-earlier-clusters.json`, then the same with -2, -3 and so on."""
    first = folder / EARLIER_NAMES
    yield first
    for number in itertools.count(2):
        yield first.with_stem(f"{first.stem}-{number}")
