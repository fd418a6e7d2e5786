"""The console script: `deepclust VERB [Hydra overrides]`, and which module runs which verb.

A verb is a line in VERBS, a module of its name in `commands` with `main(cfg)`, and a root configuration of its name in
`conf`. The module is imported when a job starts, so that help and configurations are shown without waiting for torch.
`jobs.py` runs the jobs of a verb. `deepclust.exit_codes` lists the exit codes.
"""

import atexit
import gc
import os
import re
import sys
import traceback

from deepclust import __version__
from deepclust.cli.environment import FULL_ERROR, environment_variable
from deepclust.cli.terminal import print_message
from deepclust.errors import InputError
from deepclust.exit_codes import DONE, INTERRUPTED, exit_code_of_error

VERBS = {
    "cluster": "a folder of images to clusters, pictures and a model: images=DIR num_clusters=K (or auto)",
    "train": "fit, cluster, score, write the run folder",
    "evaluate": "the same scores from a finished run: run=DIR",
    "predict": "clusters for new images with a trained run: run=DIR images=FOLDER_OR_ARRAY output=FILE.csv",
    "export": "a trained run for use without this package: run=DIR format=torchscript|onnx|safetensors output=FILE",
    "features": "features of a data set, kept as data: run=DIR, or dataset=NAME backbone=NAME",
    "compare": "many runs -> one table: runs=DIR",
    "sweep": "the jobs of a sweep, live: DIR; retry=failed starts what failed or is missing",
}
HELP = """\
deepclust: deep image clustering

usage: deepclust VERB [KEY=VALUE ...] [flags]

{verbs}

deepclust VERB --help        groups and keys that can be overridden
deepclust VERB --cfg job     the configuration that would run
deepclust VERB -m KEY=A,B    one job for each value
deepclust --version          the version"""


def main() -> int:
    """Run the verb that the command line names and return the exit code."""
    shows_traceback = os.environ.get(FULL_ERROR) == "1"
    gc.disable()  # until a job is loaded: looking through what is imported would be a sixth of the start
    atexit.register(gc.disable)  # nor is the whole process looked through when it ends
    atexit.register(gc.unfreeze)  # but what libraries have made is, or they tell of leaks
    try:
        return run_command_line(sys.argv[1:])
    except InputError as error:
        if shows_traceback:
            traceback.print_exception(error)
        from deepclust.engine.launch import launched_rank

        # Where nobody knows whether another process of the run has printed the error, the first process prints it.
        is_printed = launched_rank() > 0 if error.is_printed is None else error.is_printed
        if not is_printed:
            print_message(f"error: {error}")
        return exit_code_of_error(error)
    except KeyboardInterrupt as interruption:
        going_on = f"; to go on: {interruption.args[0]}" if interruption.args else ""
        print_message(f"interrupted{going_on}")
        return INTERRUPTED
    finally:
        gc.enable()


def run_command_line(arguments: list[str]) -> int:
    """Show the help, the version or shell completions, or run a verb; return the exit code.

    Raises:
        InputError: if there is no such verb, and what the verb raises.
    """
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(HELP.format(verbs="\n".join(f"  {verb:<9} {text}" for verb, text in VERBS.items())))
        return DONE
    if "--version" in arguments:
        print(f"deepclust {__version__}")
        return DONE
    verb, *rest = arguments
    if verb in ("-sc", "--shell-completion"):
        return complete_for_shell(arguments)
    from deepclust.cli.jobs import run_verb

    if verb not in VERBS:
        from deepclust.config.suggestions import find_nearest_name

        nearest = find_nearest_name(verb, VERBS)
        raise InputError(
            f"there is no verb {verb!r}",
            expected=f"one of {', '.join(VERBS)}",
            do=f"write deepclust {nearest}" if nearest else "write it first, as in deepclust train method=propos",
        )
    return run_verb(verb, rest)


def complete_for_shell(arguments: list[str]) -> int:
    """Install or answer shell completion.

    It is installed once for all verbs. A query is answered by the verb that the line typed so far names.
    """
    from deepclust.cli.jobs import run_verb

    typed = re.match(r"\s*(\S+)\s+(\S+)(\s.*)", os.environ.get("COMP_LINE", ""))
    if not any(argument.startswith("query=") for argument in arguments):
        return run_verb("train", arguments)
    if typed is None or typed[2] not in VERBS:
        print("\n".join(VERBS))
        return DONE
    with environment_variable("COMP_LINE", typed[1] + typed[3]):
        return run_verb(typed[2], arguments)
