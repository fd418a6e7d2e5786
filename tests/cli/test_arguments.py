"""Arguments of a verb: paths are taken literally, and other values are parsed by Hydra."""

import pytest

from deepclust.cli.arguments import quote_path


@pytest.mark.parametrize(
    "path",
    ["Süd, 2019", "a (1)", "it's", "x] {y}: z=1; 100%", "c:\\photos\\it's", "~/photos", "plain/path-1.0", "日本"],
)
def test_paths_are_taken_literally(path):
    from hydra.core.override_parser.overrides_parser import OverridesParser

    override = OverridesParser.create().parse_override(quote_path(f"images={path}", is_sweep=False))
    assert override.key_or_group == "images" and override.value() == path and not override.is_sweep_override()


@pytest.mark.parametrize("argument", ["images='a, b'", "run=${start}", "runs=[a,b]", "method.spread=a, b", "run=a b,c"])
def test_values_with_hydra_syntax_are_left_to_hydra(argument):
    assert quote_path(argument, is_sweep=True) == argument
