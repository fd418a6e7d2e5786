"""Files that grow block by block: what a killed process has completed is kept by the next one.

A journal beside the files says how long they are at the end of the last complete block. What is beyond is cut off.
"""

import json
import os
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import IO, Any

from deepclust.engine.output_files import name_file_in_errors, write_text
from deepclust.engine.small_files import MAX_BYTES_OF_LIST, read_json_object


class GrowingFiles:
    """Files of one folder to which blocks are appended.

    Args:
        folder: where they are.
        names: of the files.
        journal: the name of the journal.
    """

    def __init__(self, folder: Path, names: Sequence[str], *, journal: str) -> None:
        self.folder, self.names, self.journal = folder, list(names), folder / journal
        self.files: dict[str, IO[bytes]] = {}

    def read_state(self) -> Any:
        """Return the state at the end of the last complete block, None if there is none or a file is too short."""
        content = read_json_object(self.journal, max_bytes=MAX_BYTES_OF_LIST)
        sizes = content.get("sizes")
        if not isinstance(sizes, dict) or set(sizes) != set(self.names):
            return None
        for name, size in sizes.items():
            file = self.folder / name
            if not isinstance(size, int) or not file.is_file() or file.stat().st_size < size:
                return None
        return content.get("state")

    def open(self, *, keep: bool) -> None:
        """Open the files at the end of the last complete block, or empty them."""
        sizes = read_json_object(self.journal, max_bytes=MAX_BYTES_OF_LIST)["sizes"] if keep else {}
        if not keep:
            self.journal.unlink(missing_ok=True)
        for name in self.names:
            file = open(self.folder / name, "r+b" if keep else "w+b")  # noqa: SIM115  # closed by `close`
            self.files[name] = file
            with name_file_in_errors(self.folder / name):
                file.truncate(sizes.get(name, 0))
            file.seek(0, os.SEEK_END)

    def append(self, name: str, content: Any) -> None:
        """Append bytes to a file."""
        with name_file_in_errors(self.folder / name):
            self.files[name].write(content)

    def commit(self, state: Any) -> None:
        """End a block: from here on a second start keeps it, and is given `state`, which JSON can hold."""
        for name, file in self.files.items():
            with name_file_in_errors(self.folder / name):
                file.flush()
                os.fsync(file.fileno())
        sizes = {name: file.tell() for name, file in self.files.items()}
        write_text(self.journal, json.dumps({"sizes": sizes, "state": state}))

    def close(self) -> None:
        """Close the files."""
        with ExitStack() as stack:  # all of them, also if one cannot be written
            for name, file in self.files.items():
                stack.enter_context(name_file_in_errors(self.folder / name))
                stack.callback(file.close)
