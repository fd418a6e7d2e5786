"""`deepclust predict run=DIR images=FOLDER_OR_ARRAY output=FILE.csv`: clusters of new images or vectors by a run."""

import csv
import os
import sys
from contextlib import nullcontext, redirect_stdout
from pathlib import Path

from omegaconf import DictConfig

from deepclust.commands.new_images import read_chunks
from deepclust.commands.predict_folders import sort_images
from deepclust.datasets.image_formats import IMAGE_FORMATS
from deepclust.engine.csv_cells import path_cell, text_cell
from deepclust.engine.output_files import (
    check_output_file,
    is_standard_output,
    is_written_through,
    replace_text_file,
    shorten_name,
    write_text,
)
from deepclust.engine.output_folders import check_new_folder, folders_above
from deepclust.engine.plurals import format_count
from deepclust.errors import InputError
from deepclust.runs.locate_run import locate_run
from deepclust.runs.names_json import read_names
from deepclust.runs.trained_model import load_trained_model
from deepclust.runs.trusted_targets import split_trust

UNREADABLE_SUFFIX = ".unreadable.txt"  # of the list of files that cannot be read, after the name of the output


def main(cfg: DictConfig) -> None:
    """Write one line an image, in order: index, cluster, confidence, distance and, where they are known, path and name.

    `distance` is the Euclidean distance of the features to the mean of the training images in that cluster. `name` is
    what names.json in the run folder calls the cluster; without that file there are no names. Files that cannot be
    read are listed in OUTPUT.unreadable.txt and left out. With `sort_to` every file is also copied into one folder per
    cluster. The file and these folders are all complete in the end, or none of them is there.

    A run on vectors takes vectors (M, D) in place of images, scaled as those that it was trained on.

    Raises:
        InputError: if the run, the images or the output cannot be used; it names the key to change.
    """
    output, sort_to = Path(cfg.output), None if cfg.sort_to is None else Path(cfg.sort_to)
    check_output_file(output, key="output")
    if sort_to is not None:
        check_new_folder(sort_to, key="sort_to", entry="cluster_000")
    # Standard output may be the output; then nothing else is written there.
    with redirect_stdout(sys.stderr) if is_standard_output(output) else nullcontext():
        predict(cfg, output, sort_to)


def predict(cfg: DictConfig, output: Path, sort_to: Path | None) -> None:
    """Predict the clusters of all images, write them into `output`, and sort the files into `sort_to` if it is given.

    Raises:
        InputError: if the run or the images cannot be used.
    """
    run = locate_run(cfg.run)
    names = read_names(run)
    model = load_trained_model(run, trust=split_trust(cfg.trust), accelerator=cfg.accelerator)
    chunks = read_chunks(Path(cfg.images), model, max_megapixels=cfg.max_megapixels, batch_size=cfg.batch_size)
    num_written, unreadable = 0, []
    with (
        folders_above(output),
        sort_images(sort_to, way="link" if cfg.link else "copy", names=names) as sorted_images,
        replace_text_file(output) as file,
    ):
        writer = csv.writer(file)
        for number, chunk in enumerate(chunks):
            if number == 0:
                path_column, name_column = ["path"] * (chunk.paths is not None), ["name"] * bool(names)
                writer.writerow(["index", "cluster", "confidence", "distance", *path_column, *name_column])
            unreadable += chunk.unreadable
            if len(chunk.images) == 0:
                continue
            clusters, confidences, distances = model.assign(model.encode(chunk.images))
            rows = zip(clusters.tolist(), confidences.tolist(), distances.tolist(), strict=True)
            for row, (cluster, confidence, distance) in enumerate(rows):
                index, path = num_written + row, None if chunk.paths is None else chunk.paths[row]
                values = [index, cluster, f"{confidence:.6f}", f"{distance:.6g}"]
                values += [] if path is None else [path_cell(path)]
                writer.writerow([*values, text_cell(names.get(cluster, ""))] if names else values)
                if sorted_images is not None:
                    sorted_images.add(path, cluster, index=index)
            num_written += len(chunk.images)
        if not num_written:
            raise InputError(
                f"none of the {len(unreadable)} files in {cfg.images} can be read as an image "
                f"(the first: {unreadable[0][1]})",
                expected=f"images ({', '.join(IMAGE_FORMATS)})",
                do="name another folder with images=DIR",
            )
        list_unreadable(output, unreadable)
        if sorted_images is not None:
            file.flush()
            os.fsync(file.fileno())  # before the folder gets its place: what does not fit on the disk is known by now
            sorted_images.move_into_place()
    print(f"{format_count(num_written, 'vector' if model.is_on_vectors else 'image')}: {output}")
    if sort_to is not None:
        print(f"one folder per cluster: {sort_to}")


def list_unreadable(output: Path, unreadable: list[tuple[str, str]]) -> None:
    """Write the files that could not be read, with reasons, beside the output. A list of an earlier call is removed.

    Where the output is no regular file, they are printed.
    """
    lines = [f"{path_cell(path)}\t{reason}\n" for path, reason in unreadable]
    if is_written_through(output):
        print("".join(f"could not be read: {line}" for line in lines), end="")
        return
    file = output.with_name(shorten_name(output.name + UNREADABLE_SUFFIX))
    file.unlink(missing_ok=True)
    if lines:
        write_text(file, "".join(lines))
        print(f"could not be read: {len(lines)}, listed in {file}")
