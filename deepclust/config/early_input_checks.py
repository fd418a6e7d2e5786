"""What paths and numbers alone tell is wrong with a command, said before torch is imported.

The commands make the same checks, for they are called from elsewhere too.
"""

from pathlib import Path
from typing import Any

from deepclust.datasets.image_lists import is_image_list, read_image_list
from deepclust.datasets.input_paths import check_image_folder, check_images_or_vectors, check_new_images, count_files
from deepclust.engine.output_files import check_output_file
from deepclust.engine.output_folders import check_new_folder
from deepclust.engine.plurals import format_count
from deepclust.errors import InputError
from deepclust.runs.batch_size import is_batch_size_named, must_batches_be_full
from deepclust.runs.locate_run import is_on_hub
from deepclust.runs.run_folder import check_holds_run

FOLDER_SOURCE = "deepclust.datasets.folder.load_folder"


def check_inputs(verb: str, values: dict[str, Any], overrides: list[str]) -> None:
    """Check the paths and numbers in the resolved configuration of a verb; `overrides` are those of its job.

    Raises:
        InputError: for the first that cannot be used; it names the key.
    """
    if verb == "train":
        check_inputs_of_train(values, overrides)
    elif verb == "cluster":
        check_inputs_of_cluster(values)
    elif verb == "predict":
        check_inputs_of_predict(values)
    elif verb in ("evaluate", "export", "features"):
        check_run_key(values, "run")


def check_inputs_of_train(values: dict[str, Any], overrides: list[str]) -> None:
    """Check the run to start from, the folder of images, and the numbers of images, of clusters and in a batch."""
    check_run_key(values, "start")
    dataset = values["dataset"]
    source, num_images, num_clusters = (dataset.get(key) for key in ("source", "num_images", "num_clusters"))
    numbers = {"dataset.num_clusters": num_clusters}
    if is_batch_size_named(values.get("batch_size"), overrides) and must_batches_be_full(values):
        numbers["batch_size"] = values["batch_size"]
    numbers = {key: number for key, number in numbers.items() if isinstance(number, int)}
    if isinstance(source, dict) and source.get("_target_") == FOLDER_SOURCE and isinstance(dataset.get("path"), str):
        root = Path(dataset["path"]).expanduser().absolute()
        check_image_folder(root)
        check_num_files(root, numbers)
    elif isinstance(num_images, int):
        check_numbers(numbers, num_images, f"the data set holds {format_count(num_images, 'image')}")


def check_inputs_of_cluster(values: dict[str, Any]) -> None:
    """Check what is clustered, and that a folder holds as many files as clusters are asked for."""
    root = Path(values["images"]).expanduser().absolute()
    check_images_or_vectors(root)
    given = values["num_clusters"]
    numbers = [number for number in (given if isinstance(given, list) else [given]) if isinstance(number, int)]
    if numbers:
        check_num_files(root, {"num_clusters": max(numbers)})


def check_inputs_of_predict(values: dict[str, Any]) -> None:
    """Check the places that are written, the run and the images."""
    check_output_file(Path(values["output"]), key="output")
    if values["sort_to"] is not None:
        check_new_folder(Path(values["sort_to"]), key="sort_to", entry="cluster_000")
    check_run_key(values, "run")
    check_new_images(Path(values["images"]))


def check_run_key(values: dict[str, Any], key: str) -> None:
    """Check that a key names a run, where it names a folder at all."""
    run = values.get(key)
    if run is not None and not is_on_hub(run):
        check_holds_run(Path(run), key=key)


def check_num_files(root: Path, numbers: dict[str, int]) -> None:
    """Check that there are as many files as the numbers by their keys need; more of them can be read only in part."""
    needed = max(numbers.values(), default=0)
    if is_image_list(root):
        num_files = len(read_image_list(root))
    elif root.is_dir():
        num_files = count_files(root, at_most=needed)
    else:  # an array, which is opened later
        return
    check_numbers(numbers, num_files, f"{root} holds {format_count(num_files, 'file')}")


def check_numbers(numbers: dict[str, int], num_images: int, fact: str) -> None:
    """Check that none of the numbers by their keys is above that of the images, of which `fact` tells."""
    for key, number in numbers.items():
        if number > num_images > 0:  # without any image, the search says what was found in their place
            raise InputError(
                f"{key} is {number} and {fact}",
                expected="a batch no larger than the data set" if key == "batch_size" else "an image for each cluster",
                do=f"set {key}={num_images} or less",
            )
