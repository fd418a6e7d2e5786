"""Numbers with their nouns, for people: 1 image, 2 images."""


def format_count(number: int, noun: str) -> str:
    """Return a number with its noun: in the singular for 1, else in the plural, which is `noun` with an s."""
    return f"{number} {noun if number == 1 else noun + 's'}"
