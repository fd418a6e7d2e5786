"""`deepclust VERB --help`: the keys of a verb with what they mean, and the groups of options that it uses.

What a key means is the comment beside it in the YAML file of the verb, so that it is written once.
"""

import re
import textwrap
from collections.abc import Iterator
from importlib import resources
from typing import Any

import yaml

WIDTH = 80  # characters of a line
LEFT_OUT = ("defaults", "hydra", "names", "overrides", "earlier")  # not for the command line
INDENTED: Any = {"initial_indent": " " * 6, "subsequent_indent": " " * 6}
COMMENT = re.compile(r"(?:^|\s)#\s(.*)$")
KEY = re.compile(r"^(\s*)([A-Za-z_]\w*):(\s|$)")

FLAGS = {
    "-m": "one job for each of several values: KEY=A,B",
    "--cfg job": "the whole configuration that would run",
    "--config-dir": "a folder with configurations of your own",
    "--hydra-help": "Hydra's own flags",
}


def compose_help(verb: str, purpose: str, *, config_package: str, options: dict[str, list[str]]) -> str | None:
    """Return the help of a verb, or None if the package of configurations has no file of its name.

    Args:
        verb: the verb.
        purpose: what it does, in a line.
        config_package: the package with the YAML files.
        options: the options of every group that there is.
    """
    text = read_own_config(verb, config_package)
    if text is None:
        return None
    lines = [
        *textwrap.wrap(f"deepclust {verb}: {purpose}", WIDTH),
        "",
        f"usage: deepclust {verb} [KEY=VALUE ...] [flags]",
    ]
    lines += ["", "keys:"]
    for key, value, comment in list_keys(text, config_package, options):
        shown = f"{key}  (must be given)" if value == "???" else f"{key}={value}"
        if len(shown) + 2 > WIDTH:  # a list, which is broken at its commas
            shown = textwrap.fill(shown.replace(",", ", "), WIDTH - 4).replace("\n", "\n    ")
        lines += f"  {shown}".split("\n")
        lines += textwrap.wrap(comment, WIDTH, **INDENTED)
    groups = list_groups(text)
    if groups:
        lines += ["", "groups of options, with the one that is chosen unless GROUP=OPTION says so:"]
    for group, chosen in groups.items():
        lines.append(f"  {group}" + (f"={chosen}" if chosen else ""))
        names = ", ".join(options.get(group, []))
        lines += textwrap.wrap(names, WIDTH, **INDENTED, break_on_hyphens=False)
    lines += ["", "flags:"]
    lines += [f"  {flag:<14} {meaning}" for flag, meaning in FLAGS.items()]
    if groups:
        lines += ["", f"deepclust {verb} --cfg job GROUP=OPTION shows the keys of the options, too."]
    return "\n".join(lines)


def list_keys(text: str, config_package: str, options: dict[str, list[str]]) -> Iterator[tuple[str, str, str]]:
    """Yield key, value and comment of the keys of a verb, of whose configuration `text` is the YAML file.

    A group with a single option is a section that several verbs have in common. Its keys follow those of the verb.
    """
    yield from list_documented_keys(text)
    for group, chosen in list_groups(text).items():
        if options.get(group) == [chosen]:
            section = read_own_config(f"{group}/{chosen}", config_package) or "{}"
            yield from ((f"{group}.{key}", value, comment) for key, value, comment in list_documented_keys(section))


def read_own_config(name: str, config_package: str) -> str | None:
    """Return a YAML file of a package of configurations, that of a verb or of GROUP/OPTION; None if there is none."""
    file = resources.files(config_package).joinpath(f"{name}.yaml")
    return file.read_text(encoding="utf-8") if file.is_file() else None


def list_groups_of(verb: str, config_package: str) -> list[str]:
    """Return the groups that a verb uses."""
    return [*list_groups(read_own_config(verb, config_package) or "{}")]


def list_groups(text: str) -> dict[str, str | None]:
    """Return the groups in the defaults list of a configuration, each with the option that is chosen, if there is one.

    Groups whose option follows from others, and those of Hydra itself, have none that a user would choose.
    """
    groups: dict[str, str | None] = {}
    for entry in yaml.safe_load(text).get("defaults", []):
        if isinstance(entry, dict):
            [(name, chosen)] = entry.items()
            *words, group = name.split()
            if "override" not in words:
                groups[group] = None if chosen is None or "optional" in words else str(chosen)
    return groups


def list_documented_keys(text: str) -> Iterator[tuple[str, str, str]]:
    """Yield the dotted key, the value and the comment of every key in a YAML file that the command line can set."""
    values = yaml.safe_load(text)
    for key, comment in read_comments(text).items():
        section, _, name = key.rpartition(".")
        holder = values
        for part in filter(None, section.split(".")):
            holder = holder[part] if isinstance(holder, dict) else None
        if not isinstance(holder, dict) or key.split(".")[0] in LEFT_OUT or name.startswith("_"):
            continue  # what stands in a list can only be replaced together with the list
        value = holder[name]
        is_reference = isinstance(value, str) and value.startswith("${") and not comment
        is_list_of_sections = isinstance(value, list) and any(isinstance(entry, dict) for entry in value)
        if isinstance(value, dict) or is_reference or is_list_of_sections:
            continue
        yield key, format_default(value), comment


def format_default(value: object) -> str:
    """Return a value as it is written on the command line; a reference stays one."""
    if isinstance(value, list):
        return f"[{','.join(map(format_default, value))}]"
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    return str(value)


def read_comments(text: str) -> dict[str, str]:
    """Return the comment of each dotted key: what stands beside it and in the lines below, or right above it."""
    comments: dict[str, str] = {}
    path: list[tuple[int, str]] = []  # (indentation, name) of the sections around a line
    above: list[str] = []  # lines of a comment of their own, which is that of the key below
    last: str | None = None  # the key whose comment goes on
    for line in text.splitlines():
        match, comment = KEY.match(line), COMMENT.search(line)
        if match is not None:
            indentation, name = len(match[1]), match[2]
            path = [(i, section) for i, section in path if i < indentation] + [(indentation, name)]
            key = ".".join(section for _, section in path)
            comments[key] = " ".join([*above, *([comment[1]] if comment else [])])
            last, above = (key if comment else None), []
        elif line.lstrip().startswith("# "):
            if last is not None:
                comments[last] += f" {line.lstrip()[2:]}"
            else:
                above.append(line.lstrip()[2:])
        else:
            last, above = None, []
    return comments
