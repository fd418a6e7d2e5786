"""The console script: verbs, exit codes, one line for each error, and sweeps with a failed job."""

import errno
import logging
import os
import pickle
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

from deepclust import __version__
from deepclust.cli import jobs
from deepclust.cli.environment import FULL_ERROR
from deepclust.cli.main import VERBS, main
from deepclust.errors import InputError, ProcessLost
from tests.toy_verb import fail_at_seed

SCRIPT = Path(sys.executable).with_name("deepclust")
USER_ERROR = InputError("seed 1 is bad", expected="another seed", do="set seed=2")


def run_script(*arguments: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess:
    """Run `deepclust ARGUMENTS` in a process of its own."""
    return subprocess.run(
        [str(SCRIPT), *arguments],
        cwd=cwd,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=60,
    )


@pytest.mark.parametrize("is_terminal", [True, False])
def test_loading_notice_is_shown_on_a_terminal_until_the_job_starts(toy_verb, monkeypatch, capsys, is_terminal):
    toy_verb.on_job = lambda cfg: print("works", file=sys.stderr)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: is_terminal)
    assert toy_verb.run() == 0
    text = "deepclust toy: loading ..."
    assert capsys.readouterr().err == (f"{text}\r{' ' * len(text)}\r" if is_terminal else "") + "works\n"


# The console script


def test_help_and_configurations_do_not_import_torch(tmp_path):
    code = (
        "import sys; from deepclust.cli.main import main\n"
        "for arguments in [], ['--help'], ['--version'], ['train', '--help'], ['train', '--cfg', 'job']:\n"
        "    sys.argv = ['deepclust', *arguments]\n"
        "    assert main() == 0\n"
        "    assert not {'torch', 'lightning', 'numpy'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and not done.stderr, done.stderr
    assert all(f"  {verb} " in done.stdout for verb in VERBS)
    assert f"\ndeepclust {__version__}\n" in done.stdout and "\n  max_epochs: " in done.stdout
    assert not list(tmp_path.iterdir())


def test_every_verb_has_a_configuration():
    configs = Path(__file__).parents[2] / "conf"
    assert all((configs / f"{verb}.yaml").is_file() for verb in VERBS)


def test_script_prints_one_line_that_says_what_to_do(tmp_path):
    done = run_script("train", "trainer.max_epoch=3", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr == (
        "deepclust: error: there is no key or group trainer.max_epoch; expected trainer.max_epochs; "
        "write trainer.max_epochs=3\n"
    )


def test_traceback_is_shown_with_hydra_full_error(tmp_path):
    done = run_script("compare", "runs=nowhere", cwd=tmp_path, HYDRA_FULL_ERROR="1")
    assert done.returncode == 2 and done.stderr.startswith("Traceback")
    assert done.stderr.splitlines()[-1].startswith("deepclust: error: runs=nowhere")


# Verbs


def run_main(monkeypatch, *arguments: str) -> int:
    """Run `deepclust ARGUMENTS` in this process and return the exit code."""
    monkeypatch.setattr(sys, "argv", ["deepclust", *arguments])
    return main()


@pytest.mark.parametrize(("verb", "do"), [("trian", "write deepclust train"), ("seed=1", "write it first, ")])
def test_unknown_verb(verb, do, monkeypatch, capsys):
    assert run_main(monkeypatch, verb) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"deepclust: error: there is no verb '{verb}'; expected one of {', '.join(VERBS)}")
    assert f"; {do}" in err and err.count("\n") == 1


@pytest.mark.parametrize(
    ("line", "suggestions"),
    [
        ("deepclust to", {"toy", "train"}),
        ("deepclust toy", {"toy", "train"}),
        ("deepclust toy seed=1 trainer.max_ep", {"trainer.max_epochs="}),
        ("bin/deepclust toy method=pro", {"method=propos"}),
    ],
)
def test_shell_completion_knows_the_verbs(line, suggestions, toy_verb, monkeypatch, capsys):
    monkeypatch.setenv("COMP_LINE", line)
    assert run_main(monkeypatch, "-sc", "query=bash") == 0
    printed = set(capsys.readouterr().out.split())
    assert suggestions <= printed and (printed == suggestions or printed == set(VERBS))
    assert os.environ["COMP_LINE"] == line


def test_shell_completion_is_installed_for_the_script(monkeypatch, capsys):
    assert run_main(monkeypatch, "-sc", "install=bash") == 0
    assert capsys.readouterr().out.endswith("-F hydra_bash_completion deepclust\n")


# One job


def test_job_gets_its_configuration(toy_verb, capsys):
    in_job: list = []
    toy_verb.on_job = lambda cfg: in_job.append((sys.argv, os.environ.get(FULL_ERROR)))
    argv = sys.argv
    assert toy_verb.run("seed=4", "method.temperature=1") == 0
    assert toy_verb.job_configs == [{"seed": 4, "trainer": {"max_epochs": 3}, "method": {"temperature": 1}}]
    assert in_job == [(["deepclust toy", "seed=4", "method.temperature=1"], None)]
    assert sys.argv[1:] == ["toy", "seed=4", "method.temperature=1"] and FULL_ERROR not in os.environ
    assert argv is not sys.argv and capsys.readouterr().err == ""
    assert (toy_verb.folder / "run" / "toy.log").exists()


def test_user_error_is_one_line_and_a_file(toy_verb, capsys):
    def job(cfg):
        warnings.warn("half a word", stacklevel=2)
        raise USER_ERROR

    toy_verb.on_job = job
    assert toy_verb.run() == 2
    out, err = capsys.readouterr()
    assert err == "deepclust: error: seed 1 is bad; expected another seed; set seed=2\n"
    assert "half a word" in out and "half a word" in (toy_verb.folder / "run" / "toy.log").read_text()
    assert (toy_verb.folder / "run" / "error.txt").read_text() == "seed 1 is bad; expected another seed; set seed=2\n"
    toy_verb.on_job = lambda cfg: None
    assert toy_verb.run() == 0
    assert not (toy_verb.folder / "run" / "error.txt").exists()


def test_internal_error_is_raised_unchanged(toy_verb):
    toy_verb.on_job = fail_at_seed(0, ZeroDivisionError("by zero"))
    with pytest.raises(ZeroDivisionError) as caught:
        toy_verb.run()
    assert caught.traceback[-1].name == "job"
    assert (toy_verb.folder / "run" / "error.txt").read_text().endswith("ZeroDivisionError: by zero\n")


def test_interruption_is_not_an_error(toy_verb, capsys):
    toy_verb.on_job = fail_at_seed(0, KeyboardInterrupt())
    assert toy_verb.run() == 130
    assert capsys.readouterr().err == "deepclust: interrupted\n"
    assert not (toy_verb.folder / "run" / "error.txt").exists()


def test_interruption_names_the_command_that_goes_on(toy_verb, monkeypatch, capsys):
    def job(cfg):
        (toy_verb.folder / "run/checkpoints").mkdir()
        (toy_verb.folder / "run/checkpoints/last.ckpt").touch()
        raise KeyboardInterrupt

    monkeypatch.setattr(jobs, "RUN_FOLDER_VERBS", ("toy",))
    monkeypatch.setattr("deepclust.runs.hydra_files.write_hydra_files", lambda *_, **__: None)
    toy_verb.on_job = job
    assert toy_verb.run("seed=4") == 130
    message = "deepclust: interrupted; to go on: deepclust toy seed=4 hydra.run.dir=run\n"
    assert capsys.readouterr().err == message


def test_verb_without_a_run_folder_gets_no_error_file(toy_verb):
    toy_verb.on_job = fail_at_seed(0, USER_ERROR)
    assert toy_verb.run("hydra.output_subdir=null") == 2
    assert not (toy_verb.folder / "run" / "error.txt").exists()


def test_missing_value_is_named_before_the_job_starts(toy_verb, capsys):
    assert toy_verb.run("method=open") == 2
    assert "method.path has no value" in capsys.readouterr().err
    assert not toy_verb.job_configs


def test_configuration_error_inside_a_job_is_a_user_error(toy_verb, capsys):
    toy_verb.on_job = lambda cfg: cfg.trainer.max_epoch
    assert toy_verb.run() == 2
    assert "trainer.max_epoch" in capsys.readouterr().err


# Several jobs


def test_failed_job_does_not_stop_the_other_jobs(toy_verb, capsys):
    toy_verb.on_job = fail_at_seed(1, USER_ERROR)
    assert toy_verb.run("-m", "seed=0,1,2") == 2
    assert [job.seed for job in toy_verb.job_configs] == [0, 1, 2]
    first, last = capsys.readouterr().err.splitlines()
    assert first == "deepclust: error: job 1 (seed=1): seed 1 is bad; expected another seed; set seed=2"
    assert last.startswith("deepclust: error: 1 of 3 jobs failed; ") and last.endswith(os.path.join("sweep", "1"))
    assert [path.parent.name for path in (toy_verb.folder / "sweep").glob("*/error.txt")] == ["1"]


def test_failed_job_does_not_stop_the_next_batch_of_jobs(toy_verb):
    toy_verb.on_job = fail_at_seed(0, USER_ERROR)
    assert toy_verb.run("-m", "seed=0,1,2", "hydra.sweeper.max_batch_size=1") == 2
    assert [job.seed for job in toy_verb.job_configs] == [0, 1, 2]


def test_internal_error_in_a_sweep_shows_its_traceback(toy_verb, capsys):
    def job(cfg):
        if cfg.seed < 2:
            raise USER_ERROR if cfg.seed else ZeroDivisionError("by zero")

    toy_verb.on_job = job
    assert toy_verb.run("-m", "seed=0,1,2") == 1
    err = capsys.readouterr().err
    assert err.startswith("Traceback") and "job 0 (seed=0): ZeroDivisionError: by zero\n" in err
    assert "2 of 3 jobs failed" in err.splitlines()[-1]


def test_interruption_stops_a_sweep(toy_verb):
    toy_verb.on_job = fail_at_seed(1, KeyboardInterrupt())
    assert toy_verb.run("-m", "seed=0,1,2") == 130
    assert len(toy_verb.job_configs) == 2


def test_sweep_without_failures_is_silent(toy_verb, capsys):
    assert toy_verb.run("-m", "seed=0,1") == 0
    assert capsys.readouterr().err == ""


def test_failure_of_a_job_in_another_process_reaches_the_launching_process(toy_verb, capsys, monkeypatch):
    toy_verb.on_job = fail_at_seed(1, USER_ERROR)
    pids = iter(range(100))
    monkeypatch.setattr(jobs.os, "getpid", lambda: next(pids))  # as if every job ran in a process of its own
    assert toy_verb.run("-m", "seed=0,1") == 2
    assert "1 of 2 jobs failed" in capsys.readouterr().err
    unpickled = pickle.loads(pickle.dumps(jobs.JobFailed("job 1 (seed=1): bad", 2, "")))
    assert unpickled.args == ("job 1 (seed=1): bad", 2, "")


def test_a_sweep_of_several_processes_that_has_lost_one_says_which(toy_verb, capsys, monkeypatch):
    toy_verb.on_job = fail_at_seed(0, ProcessLost("rank 1 was killed", do="to go on: again", exit_code=75))
    monkeypatch.setattr("deepclust.engine.launch.processes_exist", lambda: True)
    with pytest.raises(SystemExit) as end:
        toy_verb.run("-m", "seed=0,1")
    assert end.value.code == 75 and len(toy_verb.job_configs) == 1, "another job would wait for the lost process"
    assert "deepclust: error: job 0 (seed=0): rank 1 was killed; " in capsys.readouterr().err


def test_processes_of_one_run_write_an_error_once(tmp_path):
    file = tmp_path / "error.txt"
    assert jobs.write_error_once(file, "the same\n")
    assert not jobs.write_error_once(file, "the same\n")
    assert jobs.write_error_once(file, "another\n")


@pytest.mark.parametrize("can_write_error_file", [True, False])
@pytest.mark.parametrize("is_sweep", [True, False])
def test_full_disk_is_one_line_even_if_no_error_file_can_be_written(
    toy_verb, capsys, monkeypatch, can_write_error_file, is_sweep
):
    def job(cfg):
        with open("/dev/full", "w") as file:
            file.write("more than there is room for")

    original_open = Path.open

    def open_on_full_disk(path, mode="r", **options):
        if mode == "x":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        return original_open(path, mode, **options)

    if not can_write_error_file:
        monkeypatch.setattr(Path, "open", open_on_full_disk)
    toy_verb.on_job = job
    assert toy_verb.run(*(["-m", "seed=0,1"] if is_sweep else [])) == 2
    err = capsys.readouterr().err
    assert len(toy_verb.job_configs) == 1 + is_sweep and err.count("\n") == (3 if is_sweep else 1)
    folder = toy_verb.folder / ("sweep/0" if is_sweep else "run")
    assert (
        f"No space left on device: {folder}; expected" in err and "free space and start the same command again" in err
    )
    assert (folder / "error.txt").exists() == can_write_error_file


def test_error_is_printed_even_if_it_cannot_be_written_to_the_run_folder(toy_verb, capsys):
    def job(cfg):
        (toy_verb.folder / "run").rename(toy_verb.folder / "moved")
        raise USER_ERROR

    toy_verb.on_job = job
    assert toy_verb.run() == 2
    assert capsys.readouterr().err == f"deepclust: error: {USER_ERROR}\n"


@pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES, errno.EDQUOT, errno.EIO])
def test_path_that_cannot_be_written_is_named(toy_verb, capsys, number):
    toy_verb.on_job = fail_at_seed(0, OSError(number, os.strerror(number), "/there"))
    assert toy_verb.run() == 2
    assert f"error: {os.strerror(number)}: /there; expected" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.EINTR])
def test_system_error_that_names_no_file_is_that_of_the_run_folder(toy_verb, capsys, number):
    toy_verb.on_job = fail_at_seed(0, OSError(number, os.strerror(number)))
    assert toy_verb.run() == 2
    assert f"error: {os.strerror(number)}: {toy_verb.folder / 'run'}; expected" in capsys.readouterr().err


@pytest.mark.slow
def test_log_that_cannot_be_written_any_more_lacks_lines(toy_verb, capfd):
    toy_verb.on_job = lambda cfg: logging.getLogger("toy").info("a line")
    assert toy_verb.run("hydra.job_logging.handlers.file.filename=/dev/full") == 0
    captured = capfd.readouterr()
    assert "a line" in captured.out and captured.err == ""


@pytest.mark.slow
def test_line_of_the_log_with_an_error_of_ours_is_told(toy_verb, capfd):
    toy_verb.on_job = lambda cfg: logging.getLogger("toy").info("%d", "no number")
    assert toy_verb.run() == 0 and "TypeError" in capfd.readouterr().err


def test_system_error_of_no_file_is_a_fault_of_the_program(toy_verb):
    toy_verb.on_job = fail_at_seed(0, OSError(errno.ECONNREFUSED, os.strerror(errno.ECONNREFUSED)))
    with pytest.raises(OSError, match="refused"):
        toy_verb.run()


def test_full_disk_while_copying_is_that_of_the_destination(toy_verb, capsys):
    toy_verb.on_job = fail_at_seed(0, OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/tmp/from", None, "/there/to"))
    assert toy_verb.run() == 2
    assert "No space left on device: /there/to; expected" in capsys.readouterr().err


def test_other_error_of_a_copy_names_both_files(toy_verb, capsys):
    toy_verb.on_job = fail_at_seed(0, OSError(errno.EIO, os.strerror(errno.EIO), b"/tmp/from", None, "/there/to"))
    assert toy_verb.run() == 2
    assert f"error: {os.strerror(errno.EIO)}: /tmp/from -> /there/to; expected" in capsys.readouterr().err


def test_log_file_that_cannot_be_written_is_named(toy_verb, capsys):
    (toy_verb.folder / "run" / "toy.log").mkdir(parents=True)
    assert toy_verb.run() == 2
    assert f"error: Is a directory: {toy_verb.folder / 'run' / 'toy.log'}; expected a place" in capsys.readouterr().err


def test_old_error_file_that_cannot_be_removed_is_an_error(toy_verb, capsys, monkeypatch):
    def unlink_on_read_only_disk(path, missing_ok=False):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))

    monkeypatch.setattr(Path, "unlink", unlink_on_read_only_disk)
    assert toy_verb.run() == 2
    assert not toy_verb.job_configs and "error: Read-only file system: " in capsys.readouterr().err
