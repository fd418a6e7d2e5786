"""The suggestion of a known name for one that was mistyped."""

from deepclust.config.suggestions import find_nearest_name


def test_nearest_name_prefers_a_key_that_ends_in_the_word():
    known = ["trainer.max_epochs", "method.schedule.epochs", "seed", "method.epochs"]
    assert find_nearest_name("trainer.max_epoch", known) == "trainer.max_epochs"
    assert find_nearest_name("epochs", known) == "method.epochs"
    assert find_nearest_name("zebra", known) is None
