"""`sort_to` of `deepclust cluster`: the image files in one folder for each cluster, copied, linked or moved."""

import os
from pathlib import Path

from omegaconf import DictConfig

from deepclust.commands.cluster_numbers import list_numbers
from deepclust.commands.predict_folders import sort_images
from deepclust.datasets.image_lists import is_image_list
from deepclust.engine.output_folders import check_new_folder, folders_above
from deepclust.errors import InputError
from deepclust.runs.assignments_csv import read_assignments
from deepclust.runs.names_json import read_names

CURE = "set another sort_to=DIR; after sort_action=move this one may hold the only copies of photos"


def check_sorting(cfg: DictConfig, root: Path) -> None:
    """Refuse a folder to sort into that cannot be used, before anything is computed.

    Raises:
        InputError: naming the key to change.
    """
    if cfg.sort_to is None:
        return
    sort_to = Path(os.path.abspath(Path(cfg.sort_to).expanduser()))
    if not (root.is_dir() or is_image_list(root)):
        raise InputError("the images are rows of an array", expected="image files to sort", do="leave sort_to out")
    if sort_to.resolve().is_relative_to(root.resolve()):
        raise InputError(
            f"{sort_to} is in {root}",
            expected="a folder beside the photos: in it, the sorted ones would be found as photos the next time",
            do="set another sort_to=DIR",
        )
    if len(list_numbers(cfg.num_clusters)) > 1:
        raise InputError(
            f"sort_to is set and num_clusters is {list_numbers(cfg.num_clusters)}",
            expected="one number of clusters to sort by",
            do="set num_clusters to the one that you choose; the features are kept",
        )
    check_new_folder(sort_to, key="sort_to", entry="cluster_000", cure=CURE)


def sort_clustered(cfg: DictConfig, folder: Path, paths: list[str]) -> None:
    """Sort the files (M paths) that a run folder holds the clusters of: all of them, or none.

    Files that are moved are removed from their place once all of them have their new one. Links are copied.

    Raises:
        InputError: if the folder to sort into is not empty.
    """
    sort_to = Path(cfg.sort_to).expanduser()
    check_new_folder(sort_to, key="sort_to", entry="cluster_000", cure=CURE)
    with folders_above(sort_to), sort_images(sort_to, way=cfg.sort_action, names=read_names(folder)) as sorted_images:
        assert sorted_images is not None
        for index, (path, cluster) in enumerate(zip(paths, read_assignments(folder)["cluster"], strict=True)):
            sorted_images.add(path, cluster, index=index)
        sorted_images.move_into_place()
    if cfg.sort_action == "move":
        os.sync()  # copies on another disk are written before the originals go
        for path in paths:
            Path(path).unlink(missing_ok=True)  # a list may name a file twice
    print(f"one folder per cluster: {sort_to}")
