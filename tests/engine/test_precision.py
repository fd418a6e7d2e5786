"""Every method trains in every precision that the door lets in, and the others are refused there."""

from typing import get_args

import pytest
from lightning.fabric.connector import _PRECISION_INPUT

from deepclust.commands.train import run
from deepclust.engine.precision import PRECISIONS
from deepclust.errors import InputError
from tests.conftest import compose_train
from tests.methods.test_contract import METHODS

ONE_STEP = ["hardware=cpu", "trainer.max_epochs=1", "+trainer.limit_train_batches=1", "report.map_points=0"]
ONE_STEP += ["pixel_baseline_max_values=0", "evaluation.kmeans_restarts=1"]
REFUSED = sorted({str(name) for group in get_args(_PRECISION_INPUT) for name in get_args(group)})
REFUSED = [name for name in REFUSED if name not in (*PRECISIONS, "16", "32", "64", "bf16")]


@pytest.fixture(scope="module")
def earlier_stages(tmp_path_factory):
    """Return a function that gives the run before a method of several stages, trained once in 32 bits."""
    folders = {}

    def find_folder(name):
        if name not in folders:
            folders[name] = tmp_path_factory.mktemp(name)
            stage = cfg = compose_train(f"method={name}", *ONE_STEP, *overrides_of(name))
            while (stage := stage.get("before")) is not None:
                stage.trainer.max_epochs = 1
            run(cfg, folders[name])
        return folders[name] / "before"

    return find_folder


def overrides_of(name):
    return ["method.threshold=0.05"] if name == "self_label" else []


@pytest.mark.sampled
@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("precision", [p for p in PRECISIONS if p not in ("32-true", "16-mixed")])
def test_every_method_takes_a_step_in_every_precision(precision, name, earlier_stages, tmp_path):
    """In 32-true all other tests run. Of 16-mixed, a CPU makes bf16-mixed."""
    cfg = compose_train(f"method={name}", *ONE_STEP, *overrides_of(name), f"hardware.precision={precision}")
    if cfg.before is not None:
        cfg.start = str(earlier_stages(name))
    results = run(cfg, tmp_path)
    assert results["steps"] == 1 and results["scores"]["kmeans"]["acc"] > 0.3


@pytest.mark.parametrize("key", ["hardware.precision", "trainer.precision"])
@pytest.mark.parametrize("precision", [*REFUSED, "float32", "8"])
def test_other_precisions_are_refused_in_one_line(precision, key, tmp_path):
    with pytest.raises(InputError, match=f"{key} is {precision}; expected one of 32-true, .*set {key}=") as caught:
        run(compose_train("method=cc", *ONE_STEP, f"{key}={precision}"), tmp_path)
    advice = caught.value.do.split("=")[1]
    assert advice in PRECISIONS and (advice.split("-")[0] == precision.split("-")[0] or advice == "32-true")
    assert not list(tmp_path.iterdir())
