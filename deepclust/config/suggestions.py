"""Which known name a mistyped one most likely meant."""

import difflib
from collections.abc import Collection


def find_nearest_name(word: str, known: Collection[str]) -> str | None:
    """Return the shortest known name that ends in `.word`, else the one spelt most alike, else None."""
    endings = sorted((name for name in known if name.endswith(f".{word}")), key=len)
    candidates = endings or difflib.get_close_matches(word, sorted(known), n=1)
    return candidates[0] if candidates else None
