"""`.hydra/` in a run folder: the composed configuration, Hydra's own and the overrides, as Hydra would write them.

Hydra writes them before a job can find out that another process trains in the folder. So `hydra.output_subdir` is null,
and they are written here: at once where there are none, and anew by the process that trains.

Values of environment variables (`hydra.job.env_set`), which may be keys and passwords, are written nowhere.
"""

import copy
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from deepclust.engine.output_files import write_text, write_text_once
from deepclust.runs.provenance import HIDDEN, hide_environment_values

HYDRA_FOLDER = ".hydra"
SWEEP_FILE = "multirun.yaml"  # in which Hydra keeps the configuration of a sweep


def write_hydra_files(folder: Path, cfg: DictConfig, *, replace: bool) -> None:
    """Write `.hydra/` of the job that runs now; files that are there already stay, unless `replace`."""
    hydra_cfg: Any = HydraConfig.instance().cfg
    contents = {
        "config.yaml": OmegaConf.to_yaml(cfg),
        "hydra.yaml": OmegaConf.to_yaml(hide_environment(OmegaConf.masked_copy(hydra_cfg, "hydra"))),
        "overrides.yaml": OmegaConf.to_yaml(hydra_cfg.hydra.overrides.task),
    }
    (folder / HYDRA_FOLDER).mkdir(exist_ok=True)
    for name, text in contents.items():
        file = folder / HYDRA_FOLDER / name
        if replace:
            write_text(file, text)
        else:
            write_text_once(file, text)


def hide_environment(cfg: Any) -> DictConfig:
    """Return a copy of a configuration with the section `hydra`, without the values of environment variables."""
    cfg = copy.deepcopy(cfg)
    for node in (cfg, cfg.hydra):
        OmegaConf.set_readonly(node, False)
        OmegaConf.set_struct(node, False)
    variables = cfg.hydra.job.get("env_set") or {}
    cfg.hydra.job.env_set = dict.fromkeys(variables, HIDDEN)
    cfg.hydra.overrides.hydra = [hide_environment_values(override) for override in cfg.hydra.overrides.hydra]
    return cfg


def hide_environment_of_sweep() -> None:
    """Take the values of environment variables out of the file that Hydra keeps of the sweep that runs now."""
    whole: Any = HydraConfig.instance().cfg
    hydra_cfg = whole.hydra
    file = Path(hydra_cfg.sweep.dir) / SWEEP_FILE
    # The first job does it: two at once would be in each other's way.
    if (
        hydra_cfg.mode == RunMode.MULTIRUN
        and hydra_cfg.job.get("env_set")
        and hydra_cfg.job.num == 0
        and file.is_file()
    ):
        write_text(file, OmegaConf.to_yaml(hide_environment(OmegaConf.load(file))))
