"""Errors of Hydra and OmegaConf become one line each that says what to do."""

import pytest

from deepclust.config.explain_errors import check_chosen_options


@pytest.mark.parametrize(
    ("arguments", "what", "do"),
    [
        ("trainer.max_epoch=3", "there is no key or group trainer.max_epoch", "write trainer.max_epochs=3"),
        ("trianer.max_epochs=3", "there is no key or group trianer.max_epochs", "write trainer.max_epochs=3"),
        ("temperature=3", "there is no key or group temperature", "write method.temperature=3"),
        ("zzz=3", "there is no key or group zzz", "leave zzz=3 out"),
        ("~sed", "there is no key or group sed", "write ~seed"),
        ("~hydra.mode", "hydra.mode is null already", "leave ~hydra.mode out"),
        ("hydra.rn.dir=x", "there is no key or group hydra.rn.dir", "write hydra.run.dir=x"),
        ("metod=propos", "there is no key or group metod", "write method=propos"),
        ("method=propso", "the group method has no option 'propso'", "write method=propos"),
        ("method=zzz", "the group method has no option 'zzz'", None),
        ("experiment=null", "experiment=null does not name an option", None),
        (
            "hydra/launcher=bsic",
            "the group hydra/launcher has no option 'bsic'",
            "write hydra/launcher=basic",
        ),
        ("method@x=propos", "Could not override 'method@x'", "Did you mean to override method?"),
        ("propos", "cannot read 'propos'", None),
        ("seed=[1", "cannot read 'seed=[1'", None),
        ("seed=1,2", "seed has several values", "add -m, or write seed=[1,2] for a list"),
        ("+seed=1", "Could not append to config. An item is already at 'seed'", None),
        ("seed=${trainer.max_epoch}", "seed refers to trainer.max_epoch, which does not exist", None),
        ("hydra.run.dir=${nope}", "hydra.run.dir refers to nope, which does not exist", None),
        (
            "hydra.job.num=one",
            "hydra.job.num: Value 'one' of type 'str' could not be converted to Integer",
            None,
        ),
        (
            "hydra.run.dir=toy_configs/toy.yaml",
            "File exists: toy_configs/toy.yaml",
            "choose one with hydra.run.dir=DIR",
        ),
        ("--config-dir=nowhere", "--config-dir nowhere is no folder", "correct the path"),
        ("--config-name=tay", "there is no configuration 'tay'", None),
        ("--cfg job --package trainr", "--package trainr is not in the configuration", None),
        ("--bogus", "unrecognized arguments: --bogus", "see deepclust toy --hydra-help"),
        (
            "--cfg job -m",
            "Only one of --run, --multirun, --cfg, --info and --shell_completion can be specified",
            None,
        ),
        ("--resolve", "The --resolve flag can only be used in conjunction with --cfg or --help", None),
        ("hydra.searchpath=[nowhere] sed=1", "there is no key or group sed", "write seed=1"),
        (
            "-m seed=1,2 method=propos,propso",
            "the group method has no option 'propso'",
            "write method=propos",
        ),
        (
            "-m method=propos,open method.temperature=3",
            "method=open has no key method.temperature",
            "leave method.temperature=3 out, or sweep without method=open",
        ),
        (
            "-m method=open,other method.temperature=3",
            "method=open and method=other have no key method.temperature",
            "leave method.temperature=3 out",
        ),
        (
            "-m method=propos,open method.tmperature=3",
            "there is no key or group method.tmperature",
            "write method.temperature=3",
        ),
        (
            "trainer.accumulate_grad_batches=2",
            "there is no key trainer.accumulate_grad_batches",
            "write +trainer.accumulate_grad_batches=2",
        ),
        ("-m sed=1,2", "there is no key or group sed", "write seed=1,2"),
    ],
)
def test_command_line_that_does_not_compose_is_one_line(toy_verb, capsys, arguments, what, do):
    assert toy_verb.run(*arguments.split()) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"deepclust: error: {what}; expected ") and err.count("\n") == 1
    assert do is None or err.endswith(f"; {do}\n")
    assert not toy_verb.job_configs


def test_configurations_of_the_user_in_a_config_dir(toy_verb, capsys):
    method_configs = toy_verb.folder / "mine" / "method"
    method_configs.mkdir(parents=True)
    (method_configs / "mine.yaml").write_text("speed: 3\n")
    assert toy_verb.run("method=mine", "--config-dir=mine") == 0
    assert toy_verb.job_configs[0].method == {"speed": 3}
    assert toy_verb.run("method=mine", "method.sped=4", "--config-dir=mine") == 2
    assert "write method.speed=4" in capsys.readouterr().err
    (method_configs / "torn.yaml").write_text("speed: [3\n")
    assert toy_verb.run("method=torn", "--config-dir=mine") == 2
    assert "torn.yaml" in capsys.readouterr().err


def test_warnings_while_composing_are_not_lost(toy_verb, capsys):
    assert toy_verb.run("hydra.searchpath=[nowhere]") == 0
    out, err = capsys.readouterr()
    assert "path=nowhere is not available" in out and err == ""
    with pytest.warns(UserWarning, match="path=nowhere is not available"):  # outside of tests, on standard error
        assert toy_verb.run("hydra.searchpath=[nowhere]", "--cfg", "job") == 0
    assert capsys.readouterr().out.startswith("seed: 0\n")


def test_a_sweep_need_not_be_a_list_of_values():
    searched = [
        "method.optimizer.lr=interval(1e-4,1e-2)",
        "seed=tag(log,interval(1,9))",
        "method=glob(*)",
        "seed=range(3)",
    ]
    check_chosen_options(command="deepclust train", config_name="train", config_dir=None, overrides=searched)
