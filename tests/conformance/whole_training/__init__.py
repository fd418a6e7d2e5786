"""Whole small trainings, beside those of the authors' code.

A case is a dict of numbers. From it alone, `train_ours(case)` of a module trains a method of this package, built from
its configuration, with the trainer and the data module that every run uses. `train_authors(case, code)` trains the
authors' networks with the authors' losses, optimiser and loops, imported from a checkout `code` of theirs. Both get the
same initial weights, images, order of images and views. Nothing of the authors' code is kept here.

    python -m tests.conformance.whole_training propos --code DIR             # prints the largest differences
    python -m tests.conformance.whole_training propos --code DIR --record    # writes them as reference vectors, too
"""
