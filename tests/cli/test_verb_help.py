"""The help of a verb: its own keys with a sentence each, and only the groups that it uses."""

import pytest

from deepclust.cli.main import VERBS, main
from deepclust.cli.verb_help import list_documented_keys, list_groups, read_comments


def read_config(verb: str) -> str:
    from importlib import resources

    return resources.files("deepclust.conf").joinpath(f"{verb}.yaml").read_text(encoding="utf-8")


@pytest.mark.parametrize("verb", VERBS)
def test_every_key_has_a_sentence(verb):
    documented = list(list_documented_keys(read_config(verb)))
    assert documented and not [key for key, _, comment in documented if len(comment.split()) < 3]


@pytest.mark.parametrize("verb", VERBS)
def test_help_names_keys_and_its_own_groups_in_lines_of_80_characters(verb, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["deepclust", verb, "--help"])
    assert main() == 0
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= 80
    groups = list_groups(read_config(verb))
    shown = {line.strip().partition("=")[0] for line in text.splitlines() if line.startswith("  ") and line[2] != " "}
    assert set(groups) <= shown and ("experiment" in shown) == (verb == "train")
    assert {key for key, _, _ in list_documented_keys(read_config(verb))} <= {name.partition("  ")[0] for name in shown}
    assert ("propos_cifar10," in text) == (verb == "train")
    assert ("clustering.backend" in shown) == (verb in ("train", "cluster"))


def test_options_of_your_own_folder_are_listed(tmp_path, monkeypatch, capsys):
    (tmp_path / "method").mkdir()
    (tmp_path / "method/mine.yaml").write_text("a: 1\n")
    monkeypatch.setattr("sys.argv", ["deepclust", "train", "--help", "--config-dir", str(tmp_path)])
    assert main() == 0
    assert "mine," in capsys.readouterr().out.split()


def test_comments_beside_below_and_above_a_key():
    text = "# head\n\na: 1 # one\n# more of it\nb:\n  # above c\n  c: 2\n  d: 3 # three\n\n# not of e\n\ne: 4\n"
    assert read_comments(text) == {"a": "one more of it", "b": "", "b.c": "above c", "b.d": "three", "e": ""}
