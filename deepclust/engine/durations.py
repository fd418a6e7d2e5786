"""Durations as people read and compare them."""


def format_duration(seconds: float) -> str:
    """Format a rough duration in seconds, minutes or hours."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
