"""Learning-rate schedules at their turning points."""

import pytest

from deepclust.nn.schedules import DelayedWarmupCosine, EpochCosine, InclusiveWarmupCosine, RisingCosine


def test_an_epoch_at_zero_then_warm_up_then_cosine():
    schedule = DelayedWarmupCosine(warmup_epochs=11, epochs=401)
    factors = [schedule(step, 391) for step in range(1, 401 * 391 + 1)]
    assert not any(factors[:391])
    assert factors[391] == factors[392] == pytest.approx(1 / 3910)
    assert factors[11 * 391 - 1] == pytest.approx(3909 / 3910) and factors[11 * 391] == 1.0
    assert factors[11 * 391 + 390 * 391 // 2] == pytest.approx(0.5, abs=1e-4)
    assert (
        all(a >= b for a, b in zip(factors[11 * 391 :], factors[11 * 391 + 1 :], strict=False))
        and 0 < factors[-1] < 1e-8
    )


@pytest.mark.parametrize(("warmup", "epochs"), [(1, 1), (11, 2), (2, 2), (3, 4)])
def test_factors_of_short_runs_are_between_zero_and_one(warmup, epochs):
    schedule = DelayedWarmupCosine(warmup_epochs=warmup, epochs=epochs)
    assert all(0 <= schedule(step, 3) <= 1 for step in range(1, 3 * epochs + 2))  # the scheduler asks one step ahead


def test_epoch_cosine_changes_once_per_epoch():
    schedule = EpochCosine(epochs=10, floor=0.001)
    factors = [schedule(step, 7) for step in range(1, 71)]
    assert factors[:7] == [1.0] * 7 and all(len(set(factors[7 * e : 7 * e + 7])) == 1 for e in range(10))
    assert factors[35] == pytest.approx(0.5005) and schedule(71, 7) == pytest.approx(0.001)
    assert all(a > b for a, b in zip(factors[::7], factors[7::7], strict=False))


def test_rising_cosine():
    schedule = RisingCosine(epochs=10)
    assert schedule(1, 7) == 0.0 and schedule(36, 7) == pytest.approx(0.5) and schedule(70, 7) < 1.0


def test_an_inclusive_warm_up_has_both_of_its_ends_and_a_floor():
    schedule = InclusiveWarmupCosine(warmup_epochs=2, epochs=10, floor=0.2)
    factors = [schedule(step, 5) for step in range(1, 51)]
    assert factors[:10] == pytest.approx([i / 9 for i in range(10)]) and factors[10] == 1.0
    assert factors[30] == pytest.approx(0.6) and schedule(51, 5) == pytest.approx(0.2) and factors[49] > 0.2
    constant = InclusiveWarmupCosine(warmup_epochs=0, epochs=10, floor=1.0)
    assert {constant(step, 5) for step in range(1, 52)} == {1.0}


@pytest.mark.parametrize(("warmup", "epochs", "steps"), [(1, 1, 1), (20, 2, 7), (0, 0, 3), (0.5, 3, 3), (2, 2, 2.5)])
def test_an_inclusive_warm_up_of_short_runs_stays_between_zero_and_one(warmup, epochs, steps):
    schedule = InclusiveWarmupCosine(warmup_epochs=warmup, epochs=epochs, floor=0.0)
    assert all(0 <= schedule(step, steps) <= 1 for step in range(1, int(epochs * steps) + 3))
