"""Learning-rate schedules at their turning points."""

import pytest

from deepclust.nn.schedules import DelayedWarmupCosine, EpochCosine, RisingCosine


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
