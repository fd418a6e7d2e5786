"""Numbers with their nouns."""

from deepclust.engine.plurals import format_count


def test_one_is_singular():
    assert [format_count(n, "image") for n in (0, 1, 2, 1797)] == ["0 images", "1 image", "2 images", "1797 images"]
