"""Advice that is typed as it is printed gives the value that it names."""

import shlex

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser

from deepclust.config.override_format import format_override

VALUES = [
    *(None, True, False, 0, -3, 1.5, 1e-5, float("inf"), "weak", "a b", "12", "1e5", "null", "True", "nan", ""),
    *("it's", 'say "a"', "a:b", "a=b", "a,b", "[a]", "{a}", "é", "~", "a/b.c-d", "\\", 'end\\"', "# no"),
    *("a\\b", "two\nlines", "a\tb", "a\\\\b\\", "a\\'b", 'it\\\'s "a\\"\\\\'),
    *(["weak", "x y", None], [], [[1, 2.5], []], {"a": 1, "b": [True, {"c": "d e"}]}),
]


@pytest.mark.parametrize("value", VALUES, ids=repr)
def test_value_comes_back(value):
    (argument,) = shlex.split(format_override("a.b", value))
    (override,) = OverridesParser.create().parse_overrides([argument])
    assert override.key_or_group == "a.b"
    assert override.value() == value and type(override.value()) is type(value)


@pytest.mark.parametrize("value, text", [(None, "null"), (True, "true"), ("weak", "weak"), (["a", None], "[a,null]")])
def test_value_is_yaml_not_python(value, text):
    assert format_override("key", value).strip("'") == f"key={text}"
