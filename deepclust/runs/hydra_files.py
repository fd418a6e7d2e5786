"""`.hydra/` in a run folder: the composed configuration, Hydra's own and the overrides, as Hydra would write them.

Hydra writes them before a job can find out that another process trains in the folder. So `hydra.output_subdir` is null,
and they are written here: at once where there are none, and anew by the process that trains.
"""

from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from deepclust.engine.output_files import write_text

HYDRA_FOLDER = ".hydra"


def write_hydra_files(folder: Path, cfg: DictConfig, *, replace: bool) -> None:
    """Write `.hydra/` of the job that runs now; files that are there already stay, unless `replace`."""
    hydra_cfg: Any = HydraConfig.instance().cfg
    contents = {
        "config.yaml": OmegaConf.to_yaml(cfg),
        "hydra.yaml": OmegaConf.to_yaml(OmegaConf.masked_copy(hydra_cfg, "hydra")),
        "overrides.yaml": OmegaConf.to_yaml(hydra_cfg.hydra.overrides.task),
    }
    (folder / HYDRA_FOLDER).mkdir(exist_ok=True)
    for name, text in contents.items():
        file = folder / HYDRA_FOLDER / name
        if replace:
            write_text(file, text)
            continue
        try:
            with file.open("x", encoding="utf-8") as new:  # of two processes that start at once, one writes it
                new.write(text)
        except FileExistsError:
            pass
