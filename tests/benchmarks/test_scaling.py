"""benchmarks/scaling.py: the fit finds the constants of made-up cases, and the extrapolation adds up by hand."""

from pathlib import Path

import pytest

from tests.benchmarks.test_benchmarks import run_benchmark

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
COUNTS = {
    **{"operations": 1000, "synchronised_operations": 5000, "synchronised_collectives": 1000},
    **{"parameters": 10**7, "kept_bytes_per_image": 1e8},
}
NUMBERS = {
    **{"image_seconds": 1e-3, "clean_image_seconds": 1e-4, "operation_seconds": 1e-5, "decode_seconds": 4e-3},
    **{"latency_in_a_node": 1e-5, "latency_over_nodes": 1e-4},
    **{"bandwidth_in_a_node": 1e11, "bandwidth_over_nodes": 1e10},
    **{"float32": 1e13, "float64": 1e13, "copy": 1e12, "iterations": 10, "gpu_memory": 8e10},
}


@pytest.fixture
def model(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    import scaling_model

    return scaling_model


def test_the_fit_finds_the_constants_of_each_model(model):
    changes = [(p, r, k) for p in (1, 2, 4) for r in (1, 3) for k in (10, 50, 200)]
    cases = [
        {
            **{"processes": processes, "cores": 2, "restarts": restarts, "clusters": clusters},
            **{"rows": 1000 + 37 * number**2, "features": 16 + 7 * number % 50, "iterations": 2 + number % 5},
            **{"flops": 1e9 * (1 + number**1.5), "unfused_bytes": 1e8 * (1 + number % 4), "kept_bytes": 1e6 * clusters},
            **{"parameters": 1e6 * (1 + number % 3), "alone_seconds": 0.1 + number % 7, "collectives": 10 * number},
            "bytes": 1e6 * (1 + number),
        }
        for number, (processes, restarts, clusters) in enumerate(changes)
    ]
    for one in model.MODELS.values():
        largest = {name: max(count(case) for case in cases) for name, count in one.terms.items()}
        constants = {name: (2 + number) / largest[name] for number, name in enumerate(one.terms)}
        fit = one.fit([case | {one.quantity: one.predict(constants, case)} for case in cases])
        assert fit["constants"] == pytest.approx(constants, rel=1e-6)
        assert fit["largest_residual"] < 1e-6


def test_a_term_that_explains_nothing_gets_no_weight(model):
    one = model.Model("seconds", {"s": model.one, "s a row": lambda case: case["rows"]})
    fit = one.fit([{"rows": rows, "seconds": 2.0 - 0.01 * rows} for rows in range(1, 9)])
    assert fit["constants"]["s a row"] == 0
    assert fit["residuals"] == sorted(fit["residuals"])


def test_a_batch_takes_the_longer_of_gpu_and_host_and_then_communication(model):
    plan = model.Plan(gpus=8, batch_size=256, accumulated=16)
    found = model.extrapolate(plan, NUMBERS, COUNTS)
    assert found["batch, GPU"] == pytest.approx(0.032)
    assert found["batch, host"] == pytest.approx(0.05)
    assert found["batch, batch normalisation"] == pytest.approx(0.01)
    assert found["batch, gradients"] == pytest.approx(7 / 8 * 2 * 4e7 / 1e11 / 16)
    assert found["batch"] == pytest.approx(0.06 + found["batch, gradients"])
    assert found["kept_share"] == pytest.approx(0.04)
    seconds = 1_281_167 / found["epoch_images_per_second"]
    e_step = sum(found[f"E-step, {part}"] for part in ("features", "gather", "k-means")) / 10
    assert seconds == pytest.approx(found["epoch"]) == pytest.approx(1_281_167 / 256 * found["batch"] + e_step)


def test_restarts_are_whole_and_slower_links_count_over_nodes(model):
    few, many, more = (model.extrapolate(model.Plan(gpus, 4096, 1), NUMBERS, COUNTS) for gpus in (8, 64, 128))
    assert few["E-step, k-means"] == pytest.approx(5 * many["E-step, k-means"])  # 10 of 80 restarts, and 2
    assert many["E-step, k-means"] == pytest.approx(2 * more["E-step, k-means"])
    assert many["batch, batch normalisation"] == pytest.approx(10 * few["batch, batch normalisation"])
    alone = model.extrapolate(model.Plan(1, 4096, 1), NUMBERS, COUNTS)
    assert alone["batch, batch normalisation"] == alone["batch, gradients"] == alone["E-step, gather"] == 0
    slow = NUMBERS | {"decode_seconds": 1.0}
    assert model.extrapolate(model.Plan(8, 256, 16), slow, COUNTS)["batch"] == pytest.approx(32 / 8)


@pytest.mark.slow
def test_all_parts_are_measured_and_drawn(tmp_path):
    figure = tmp_path / "figure.png"
    figures = run_benchmark(tmp_path, "scaling.py", "--quick", "--rounds", "1", "--figure", str(figure))
    assert figure.stat().st_size > 10_000
    assert set(figures["fits"]) == {
        *("step", "memory of a step", "step on several processes", "gather", "memory of the gather"),
        *("E-step", "memory of the E-step", "size of a checkpoint", "time of a checkpoint"),
    }
    with_collectives = [case for case in figures["processes"] if case["processes"] == 2 and case.get("synchronised")]
    assert with_collectives and all(case["collectives"] > 20 for case in with_collectives)
    assert figures["imagenet"]["synchronised_collectives"] > 500
    assert len(figures["plans"]) == 7 and all(plan["epoch"] > 0 for plan in figures["plans"].values())
