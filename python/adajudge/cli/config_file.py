"""``--config FILE``: options from a YAML file, under their command-line names."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path

from adajudge.cli.options import UsageError


def apply_config_file(commands: Mapping[str, argparse.ArgumentParser], given: list[str]) -> None:
    """Make the file's values the defaults of the command that `given` names, so that the command line wins.

    Raises:
        UsageError: the file cannot be read, or a key is no option of the command, or a value does not fit it.
    """
    finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    finder.add_argument("--config")
    path = finder.parse_known_args(given)[0].config
    command = next((commands[word] for word in given if word in commands), None)
    if path is None or command is None:
        return
    options = {action.dest: action for action in command._actions if action.dest not in ("help", "config")}
    for key, value in _read(path).items():
        action = options.get(key.replace("-", "_"))
        if action is None:
            raise UsageError(f"{path}: unknown key {key!r}; the options are {', '.join(sorted(options))}")
        action.default = _value(path, key, action, value)
        action.required = False
        if not action.option_strings:
            action.nargs = "?"


def _read(path: str) -> dict[str, object]:
    import yaml

    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UsageError(f"{path}: not a readable YAML file: {error}") from error
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise UsageError(f"{path}: {type(content).__name__} came, expected `option: value` lines")
    return content


def _value(path: str, key: str, action: argparse.Action, value: object) -> object:
    def wrong(expected: str) -> UsageError:
        return UsageError(f"{path}: {key}: {value!r} came, expected {expected}")

    if action.nargs == 0 and not isinstance(value, bool):
        raise wrong("true or false")
    if action.nargs == 0 or value is None:
        return value
    values = value if isinstance(value, list) else [value]
    if isinstance(value, list) and action.nargs not in ("+", "*"):
        raise wrong("one value")
    converted = []
    for item in values:
        try:
            converted.append(action.type(str(item)) if callable(action.type) else str(item))
        except (ValueError, argparse.ArgumentTypeError) as error:
            raise wrong(str(error)) from error
        if action.choices is not None and converted[-1] not in action.choices:
            raise wrong(f"one of {', '.join(map(str, action.choices))}")
    return converted if isinstance(value, list) else converted[0]
