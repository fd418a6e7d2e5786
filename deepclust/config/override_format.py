"""Values as they are typed on the command line: `null`, not `None`, so that advice works when it is followed."""

import re
import shlex
from typing import Any


def format_override(key: str, value: Any) -> str:
    """Return KEY=VALUE for a plain value, as Hydra's grammar takes it, in quotes for the shell where it needs them."""
    return shlex.quote(f"{key}={format_value(value)}")


def format_value(value: Any) -> str:
    """Return a plain value as the grammar of Hydra's overrides takes it: null, true, [a,b], {key:value}, "text"."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, list | tuple):
        return f"[{','.join(map(format_value, value))}]"
    if isinstance(value, dict):
        return f"{{{','.join(f'{name}:{format_value(child)}' for name, child in value.items())}}}"
    if isinstance(value, str) and not is_plain_text(value):
        return quote(value)
    return str(value)


def quote(text: str, mark: str = '"') -> str:
    """Return a text between two quotation marks, as Hydra's grammar takes it for this text and no other."""
    # A backslash counts only before the mark, and the last mark follows the text.
    escaped = re.sub(rf"(\\+)(?={mark}|\Z)", r"\1\1", text).replace(mark, f"\\{mark}")
    return f"{mark}{escaped}{mark}"


def is_plain_text(text: str) -> bool:
    """Return whether a text reaches the configuration as text without quotes: no number, no null, nothing special."""
    is_other = re.fullmatch(r"null|true|false|[+-]?(inf|nan)|[+-]?[\d._]+(e[+-]?\d+)?", text, re.IGNORECASE)
    return bool(re.fullmatch(r"[\w/.%+@?|-]+", text, re.ASCII)) and not is_other
