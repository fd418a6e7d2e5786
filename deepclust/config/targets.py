"""What a `_target_` names: the class or function is found, or the error says which part of the path is wrong."""

import importlib
import pkgutil
from typing import Any

from deepclust.config.suggestions import find_nearest_name
from deepclust.errors import InputError


def locate_target(path: str, key: str) -> Any:
    """Return the class or function of the dotted `path` that stands at `key` in the configuration.

    Raises:
        InputError: if a part of the path does not exist, or a package is not installed.
    """
    parts = path.split(".")
    found: Any = None
    for i, part in enumerate(parts):
        try:
            found = getattr(found, part) if i else importlib.import_module(part)
        except AttributeError:
            try:
                found = importlib.import_module(".".join(parts[: i + 1]))
            except ModuleNotFoundError as error:
                if not error.name or not path.startswith(error.name):
                    raise missing_package_error(error) from None
                known = [*dir(found), *(m.name for m in pkgutil.iter_modules(getattr(found, "__path__", [])))]
                nearest = find_nearest_name(part, known)
                raise InputError(
                    f"{key} is {path} and {'.'.join(parts[:i])} has no {part}",
                    expected="the dotted path of a class or function",
                    do=f"write {'.'.join([*parts[:i], nearest, *parts[i + 1 :]])}" if nearest else "correct it",
                ) from error
        except ModuleNotFoundError as error:
            if error.name != part:
                raise missing_package_error(error) from None
            raise InputError(
                f"{key} is {path} and there is no module {part}",
                expected="the dotted path of a class or function",
                do=f"install {part}, or put its folder on PYTHONPATH",
            ) from error
    return found


def missing_package_error(error: ModuleNotFoundError) -> Exception:
    """Return what to raise for a module that cannot be imported.

    A missing module of our own is a fault of the program, which the user cannot mend.
    """
    if (error.name or "").startswith("deepclust"):
        return error
    package = error.name.partition(".")[0] if error.name else "it"
    message = (str(error).strip() or type(error).__name__).partition("\n")[0]
    return InputError(
        f"a package is missing: {message}",
        expected="the optional packages of what the configuration chooses",
        do=f"install {package}, alone or by an extra of deepclust (see README), or choose another option",
    )
