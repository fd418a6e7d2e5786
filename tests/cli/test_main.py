"""The console script: verbs, exit codes, one line for each error, and sweeps in which one job fails."""

import errno
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
from deepclust.errors import InputError
from tests.toy_verb import fail_at

SCRIPT = Path(sys.executable).with_name("deepclust")
MEND = InputError("seed 1 is bad", expected="another seed", do="set seed=2")


def shell(*arguments: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [str(SCRIPT), *arguments],
        cwd=cwd,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=60,
    )


@pytest.mark.parametrize("terminal", [True, False])
def test_loading_is_shown_on_a_terminal_until_work_begins(toy, monkeypatch, capsys, terminal):
    toy.act = lambda cfg: print("works", file=sys.stderr)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
    assert toy() == 0
    text = "deepclust toy: loading ..."
    assert capsys.readouterr().err == (f"{text}\r{' ' * len(text)}\r" if terminal else "") + "works\n"


# The console script


def test_help_and_configurations_come_without_torch(tmp_path):
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


def test_script_says_in_one_line_what_to_mend(tmp_path):
    done = shell("train", "trainer.max_epoch=3", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr == (
        "deepclust: error: there is no key or group trainer.max_epoch; expected trainer.max_epochs; "
        "write trainer.max_epochs=3\n"
    )


def test_traceback_is_shown_on_demand(tmp_path):
    done = shell("compare", "runs=nowhere", cwd=tmp_path, HYDRA_FULL_ERROR="1")
    assert done.returncode == 2 and done.stderr.startswith("Traceback")
    assert done.stderr.splitlines()[-1].startswith("deepclust: error: runs=nowhere")


# Verbs


def run_with(monkeypatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["deepclust", *arguments])
    return main()


@pytest.mark.parametrize(("word", "do"), [("trian", "write deepclust train"), ("seed=1", "write it first, ")])
def test_unknown_verb(word, do, monkeypatch, capsys):
    assert run_with(monkeypatch, word) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"deepclust: error: there is no verb '{word}'; expected one of {', '.join(VERBS)}")
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
def test_shell_completion_knows_the_verbs(line, suggestions, toy, monkeypatch, capsys):
    monkeypatch.setenv("COMP_LINE", line)
    assert run_with(monkeypatch, "-sc", "query=bash") == 0
    found = set(capsys.readouterr().out.split())
    assert suggestions <= found and (found == suggestions or found == set(VERBS))
    assert os.environ["COMP_LINE"] == line


def test_shell_completion_is_installed_for_the_script(monkeypatch, capsys):
    assert run_with(monkeypatch, "-sc", "install=bash") == 0
    assert capsys.readouterr().out.endswith("-F hydra_bash_completion deepclust\n")


# One job


def test_job_gets_its_configuration(toy, capsys):
    toy.act = lambda cfg: seen.append((sys.argv, os.environ.get(FULL_ERROR)))
    seen: list = []
    argv = sys.argv
    assert toy("seed=4", "method.temperature=1") == 0
    assert toy.jobs == [{"seed": 4, "trainer": {"max_epochs": 3}, "method": {"temperature": 1}}]
    assert seen == [(["deepclust toy", "seed=4", "method.temperature=1"], None)]
    assert sys.argv[1:] == ["toy", "seed=4", "method.temperature=1"] and FULL_ERROR not in os.environ
    assert argv is not sys.argv and capsys.readouterr().err == ""
    assert (toy.folder / "run" / "toy.log").exists()


def test_users_error_is_one_line_and_a_file(toy, capsys):
    def act(cfg):
        warnings.warn("half a word", stacklevel=2)
        raise MEND

    toy.act = act
    assert toy() == 2
    out, err = capsys.readouterr()
    assert err == "deepclust: error: seed 1 is bad; expected another seed; set seed=2\n"
    assert "half a word" in out and "half a word" in (toy.folder / "run" / "toy.log").read_text()
    assert (toy.folder / "run" / "error.txt").read_text() == "seed 1 is bad; expected another seed; set seed=2\n"
    toy.act = lambda cfg: None
    assert toy() == 0
    assert not (toy.folder / "run" / "error.txt").exists()


def test_fault_is_raised_as_it_is(toy):
    toy.act = fail_at(0, ZeroDivisionError("by zero"))
    with pytest.raises(ZeroDivisionError) as caught:
        toy()
    assert caught.traceback[-1].name == "act"
    assert (toy.folder / "run" / "error.txt").read_text().endswith("ZeroDivisionError: by zero\n")


def test_interruption_is_no_error(toy, capsys):
    toy.act = fail_at(0, KeyboardInterrupt())
    assert toy() == 130
    assert capsys.readouterr().err == "deepclust: interrupted\n"
    assert not (toy.folder / "run" / "error.txt").exists()


def test_verb_that_keeps_no_run_folder_gets_no_file(toy):
    toy.act = fail_at(0, MEND)
    assert toy("hydra.output_subdir=null") == 2
    assert not (toy.folder / "run" / "error.txt").exists()


def test_value_that_is_open_is_named_before_the_job_starts(toy, capsys):
    assert toy("method=open") == 2
    assert "method.path has no value" in capsys.readouterr().err
    assert not toy.jobs


def test_trouble_with_the_configuration_inside_a_job_is_the_users(toy, capsys):
    toy.act = lambda cfg: cfg.trainer.max_epoch
    assert toy() == 2
    assert "trainer.max_epoch" in capsys.readouterr().err


# Several jobs


def test_one_bad_job_does_not_stop_the_others(toy, capsys):
    toy.act = fail_at(1, MEND)
    assert toy("-m", "seed=0,1,2") == 2
    assert [job.seed for job in toy.jobs] == [0, 1, 2]
    first, last = capsys.readouterr().err.splitlines()
    assert first == "deepclust: error: job 1 (seed=1): seed 1 is bad; expected another seed; set seed=2"
    assert last.startswith("deepclust: error: 1 of 3 jobs failed; ") and last.endswith(os.path.join("sweep", "1"))
    assert [path.parent.name for path in (toy.folder / "sweep").glob("*/error.txt")] == ["1"]


def test_nor_does_it_stop_the_next_batch(toy):
    toy.act = fail_at(0, MEND)
    assert toy("-m", "seed=0,1,2", "hydra.sweeper.max_batch_size=1") == 2
    assert [job.seed for job in toy.jobs] == [0, 1, 2]


def test_fault_in_a_sweep_shows_its_traceback(toy, capsys):
    def act(cfg):
        if cfg.seed < 2:
            raise MEND if cfg.seed else ZeroDivisionError("by zero")

    toy.act = act
    assert toy("-m", "seed=0,1,2") == 1
    err = capsys.readouterr().err
    assert err.startswith("Traceback") and "job 0 (seed=0): ZeroDivisionError: by zero\n" in err
    assert "2 of 3 jobs failed" in err.splitlines()[-1]


def test_interruption_stops_a_sweep(toy):
    toy.act = fail_at(1, KeyboardInterrupt())
    assert toy("-m", "seed=0,1,2") == 130
    assert len(toy.jobs) == 2


def test_sweep_without_failures_is_silent(toy, capsys):
    assert toy("-m", "seed=0,1") == 0
    assert capsys.readouterr().err == ""


def test_failure_of_a_distant_job_reaches_the_launching_process(toy, capsys, monkeypatch):
    toy.act = fail_at(1, MEND)
    pids = iter(range(100))
    monkeypatch.setattr(jobs.os, "getpid", lambda: next(pids))  # every job in a process of its own
    assert toy("-m", "seed=0,1") == 2
    assert "1 of 2 jobs failed" in capsys.readouterr().err
    sent = pickle.loads(pickle.dumps(jobs.JobFailed("job 1 (seed=1): bad", 2, "")))
    assert sent.args == ("job 1 (seed=1): bad", 2, "")


def test_processes_of_one_run_tell_an_error_once(tmp_path):
    note = tmp_path / "error.txt"
    assert jobs.write_error_once(note, "the same\n")
    assert not jobs.write_error_once(note, "the same\n")
    assert jobs.write_error_once(note, "another\n")


@pytest.mark.parametrize("kept", [True, False])
@pytest.mark.parametrize("sweep", [True, False])
def test_full_disk_is_one_line_even_where_it_cannot_be_written_down(toy, capsys, monkeypatch, kept, sweep):
    def act(cfg):
        with open("/dev/full", "w") as file:
            file.write("more than there is room for")

    honest = Path.open

    def refuses(path, mode="r", **how):
        if mode == "x":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        return honest(path, mode, **how)

    if not kept:
        monkeypatch.setattr(Path, "open", refuses)
    toy.act = act
    assert toy(*(["-m", "seed=0,1"] if sweep else [])) == 2
    err = capsys.readouterr().err
    assert len(toy.jobs) == 1 + sweep and err.count("\n") == (3 if sweep else 1)
    folder = toy.folder / ("sweep/0" if sweep else "run")
    assert (
        f"No space left on device: {folder}; expected" in err and "free space and start the same command again" in err
    )
    assert (folder / "error.txt").exists() == kept


def test_error_that_cannot_be_written_down_hides_nothing(toy, capsys):
    def act(cfg):
        (toy.folder / "run").rename(toy.folder / "moved")
        raise MEND

    toy.act = act
    assert toy() == 2
    assert capsys.readouterr().err == f"deepclust: error: {MEND}\n"


@pytest.mark.parametrize(
    ("number", "code"), [(errno.EROFS, 2), (errno.EACCES, 2), (errno.EDQUOT, 2), (errno.EIO, None)]
)
def test_place_that_is_closed_is_named(toy, capsys, number, code):
    toy.act = fail_at(0, OSError(number, os.strerror(number), "/there"))
    if code is None:
        with pytest.raises(OSError, match="/there"):
            toy()
        return
    assert toy() == code
    assert f"error: {os.strerror(number)}: /there; expected" in capsys.readouterr().err


def test_full_disk_is_that_of_the_copy_and_not_of_what_is_copied(toy, capsys):
    toy.act = fail_at(0, OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/tmp/from", None, "/there/to"))
    assert toy() == 2
    assert "No space left on device: /there/to; expected" in capsys.readouterr().err


def test_run_folder_whose_log_cannot_be_written_is_named(toy, capsys):
    (toy.folder / "run" / "toy.log").mkdir(parents=True)
    assert toy() == 2
    assert f"error: Is a directory: {toy.folder / 'run' / 'toy.log'}; expected a place" in capsys.readouterr().err


def test_old_error_that_cannot_be_removed_does_not_silence_the_new(toy, capsys, monkeypatch):
    def refuses(path, missing_ok=False):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))

    monkeypatch.setattr(Path, "unlink", refuses)
    assert toy() == 2
    assert not toy.jobs and "error: Read-only file system: " in capsys.readouterr().err
