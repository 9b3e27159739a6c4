"""Reading recipes: defaults, then the YAML file, then flags; strict, one source for all three and for --help.

    parsed = parse("Distil a drafter.", ["target", "drafter", "training"])
    parsed.recipe.training.losses

Every program accepts the whole recipe and shows the sections that it uses in its help. An unknown key anywhere is an
error that names the nearest known one. The sections themselves live in `recipe.py` and are importable from here.
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import difflib
import functools
import inspect
import os
import re
import sys
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from drafttrain import recipe as _recipe_module
from drafttrain.errors import UserError
from drafttrain.recipe import (
    PATH,
    BlockConfig,
    ContextConfig,
    CorpusConfig,
    DrafterConfig,
    EvaluateConfig,
    ExportConfig,
    HeadConfig,
    LoraConfig,
    PositionsConfig,
    PretrainConfig,
    PromptsConfig,
    Recipe,
    ResponsesConfig,
    SamplingConfig,
    TargetConfig,
    TracesConfig,
    TrainingConfig,
)

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser

__all__ = [
    "PATH",
    "REPOSITORY",
    "SECTIONS",
    "BlockConfig",
    "ContextConfig",
    "CorpusConfig",
    "DrafterConfig",
    "EvaluateConfig",
    "ExportConfig",
    "HeadConfig",
    "LoraConfig",
    "Parsed",
    "PositionsConfig",
    "PretrainConfig",
    "PromptsConfig",
    "Recipe",
    "ResponsesConfig",
    "SamplingConfig",
    "TargetConfig",
    "TracesConfig",
    "TrainingConfig",
    "build",
    "nearest",
    "parse",
    "resolve_path",
]

REPOSITORY = Path(__file__).resolve().parent.parent
"""The checkout (or site-packages, where nothing of it lies beside the code)."""

SECTIONS: dict[str, type] = {
    name: hint for name, hint in typing.get_type_hints(Recipe).items() if dataclasses.is_dataclass(hint)
}

_GENERAL = ("config", "run", "plan", "accept-new-target", "allow-code")
_LAUNCHER_FLAGS = ("--local_rank", "--local-rank")


@dataclass(frozen=True)
class Parsed:
    """What a program was asked to do.

    Attributes:
        recipe: typed sections, paths looked up.
        run: the run folder, not yet made.
        plan: print what would run and exit.
        accept_new_target: go on though the target's weights differ from the recorded ones.
        allow_code: import classes from outside that methods name.
        config: the recipe file, None when flags were enough.
        resolved: the full recipe as a plain dict, for recipe.yaml and provenance; paths inside the repository are
            relative to it, so the record can be used on another machine.
    """

    recipe: Recipe
    run: Path
    plan: bool
    accept_new_target: bool
    allow_code: bool
    config: Path | None
    resolved: dict[str, Any]

    def to_yaml(self) -> str:
        """The resolved recipe as YAML, usable as --config."""
        import yaml

        return yaml.safe_dump(self.resolved, sort_keys=False, allow_unicode=True)


def parse(
    description: str,
    sections: Sequence[str],
    argv: Sequence[str] | None = None,
    aliases: Mapping[str, str] | None = None,
    prog: str | None = None,
    default_run: str | None = None,
) -> Parsed:
    """Read the command line of a program.

    Args:
        description: what the program does, for --help.
        sections: the sections that it uses; --help shows these, all others are accepted too.
        argv: arguments without the program's name; those of the process by default.
        aliases: short flags of this program, e.g. {"--to": "--export.to"}.
        prog: the program's name in its help.
        default_run: the run folder where neither --run nor --config says one.

    Raises:
        UserError: unknown key, wrong type, missing or malformed recipe file.
    """
    argv = [_expand_alias(word, aliases or {}) for word in (sys.argv[1:] if argv is None else argv)]
    if "-h" in argv or "--help" in argv:
        _parser(description, sections, prog, aliases).print_help()
        raise SystemExit(0)
    own, flags = _general_parser().parse_known_args(argv)
    _check_flags(flags)
    config = Path(resolve_path(str(own.config))) if own.config else None
    values = _read_values(_whole_parser(), config, flags)
    _check_ranges(Recipe, values)
    base = config.resolve().parent if config else None
    values = _map_paths(Recipe, values, lambda path: resolve_path(path, base))
    recipe = build(Recipe, values)
    return Parsed(
        recipe=recipe,
        run=_run_folder(own.run, config, default_run),
        plan=own.plan,
        accept_new_target=own.accept_new_target,
        allow_code=own.allow_code,
        config=config,
        resolved=_map_paths(Recipe, dataclasses.asdict(recipe), _portable_path),
    )


# ---------------------------------------------------------------------------------------------------------------------
# Paths


def resolve_path(path: str, base: Path | None = None) -> str:
    """Find a relative path from the working directory, then `base` (the recipe's folder), then the repository.

    What is found is returned absolute. What is found nowhere is returned as it is: it may be a hub id, and whoever
    opens it says best what is missing.
    """
    expanded = Path(path).expanduser()
    if expanded.is_absolute():
        return str(expanded)
    for folder in (Path.cwd(), base, REPOSITORY):
        if folder is not None and (folder / expanded).exists():
            return os.path.normpath(folder / expanded)
    return path


def _portable_path(path: str) -> str:
    candidate = Path(path)
    if candidate.is_absolute() and candidate.is_relative_to(REPOSITORY):
        return candidate.relative_to(REPOSITORY).as_posix()
    return path


def _map_paths(cls: type, values: dict[str, Any], change: typing.Callable[[str], str]) -> dict[str, Any]:
    changed = dict(values)
    for item in dataclasses.fields(cls):
        value = values.get(item.name)
        inner = _dataclass_in(_hints(cls)[item.name])
        if item.metadata.get("path") and isinstance(value, str):
            changed[item.name] = change(value)
        elif inner is not None and isinstance(value, dict):
            changed[item.name] = _map_paths(inner, value, change)
    return changed


def _run_folder(run: Path | None, config: Path | None, default: str | None) -> Path:
    if run is not None:
        return run.expanduser()
    if config is not None:
        return Path("runs") / config.stem
    if default is not None:
        return Path(default)
    raise UserError("neither --run nor --config is given; say where the results go with --run DIR.")


# ---------------------------------------------------------------------------------------------------------------------
# Known keys


@functools.cache
def _hints(cls: type) -> dict[str, Any]:
    return typing.get_type_hints(cls)


def _options(hint: Any) -> tuple[Any, ...]:
    """The members of a union, or the type alone."""
    return typing.get_args(hint) if typing.get_origin(hint) in (types.UnionType, typing.Union) else (hint,)


def _dataclass_in(hint: Any) -> type | None:
    """The dataclass in `X` or `X | None`."""
    return next((option for option in _options(hint) if dataclasses.is_dataclass(option)), None)


def _element(hint: Any) -> Any:
    """The entries' type of a list, any other type as it is."""
    return typing.get_args(hint)[0] if typing.get_origin(hint) is list else hint


def _takes_dict(hint: Any) -> bool:
    return any(typing.get_origin(option) is dict for option in _options(hint))


@functools.cache
def _known_keys() -> tuple[str, ...]:
    def walk(cls: type, prefix: str) -> Iterator[str]:
        for name, hint in _hints(cls).items():
            yield prefix + name
            inner = _dataclass_in(_element(hint))
            if inner is not None:
                yield from walk(inner, f"{prefix}{name}.")

    return tuple(walk(Recipe, ""))


def nearest(key: str, known: Sequence[str]) -> str | None:
    """The known name most like `key`: a sibling spelt alike, the same name in another section, or any spelt alike."""
    prefix, _, last = key.rpartition(".")
    siblings = [name for name in known if name.rpartition(".")[0] == prefix]
    moved = [name for name in known if name.rpartition(".")[2] == last]
    for names, cutoff in ((siblings, 0.8), (moved, 0.0), (siblings, 0.7), (known, 0.6)):
        close = difflib.get_close_matches(key, names, n=1, cutoff=cutoff)
        if close:
            return close[0]
    return None


def _unknown(key: str, where: str, dashes: str = "") -> UserError:
    known = (*_known_keys(), *_GENERAL) if dashes else _known_keys()
    guess = nearest(key, known)
    hint = f"; did you mean {dashes}{guess}?" if guess else "; see --help for the settings there are."
    return UserError(f"{where}: unknown setting {dashes}{key}{hint}")


def _check_keys(cls: type, values: Any, where: str, prefix: str = "") -> None:
    """Refuse keys that the sections do not have, at any depth."""
    hints = _hints(cls)
    if values is None and prefix:
        return
    if not isinstance(values, dict):
        raise UserError(f"{where}: {prefix.rstrip('.')} takes {_describe(cls)}, not {values}.")
    for key, value in values.items():
        if key not in hints:
            raise _unknown(f"{prefix}{key}", where)
        inner = _dataclass_in(hints[key])
        if inner is not None:
            _check_keys(inner, value, where, f"{prefix}{key}.")
        elif typing.get_origin(hints[key]) is list and isinstance(value, list):
            for entry in value:
                element = _dataclass_in(_element(hints[key]))
                if element is not None:
                    _check_keys(element, entry, where, f"{prefix}{key}.")


def _check_flags(flags: Sequence[str]) -> None:
    for flag in flags:
        if not flag.startswith("--"):
            continue
        key = flag[2:].split("=", 1)[0]
        _check_flag_key(key)


def _check_flag_key(key: str) -> None:
    cls: type = Recipe
    for part in key.removesuffix("+").split("."):
        hint = _hints(cls).get(part)
        if hint is None:
            raise _unknown(key, "command line", "--")
        if _takes_dict(hint):
            return  # anything below a free dict is that dict's own business
        inner = _dataclass_in(hint)
        if inner is not None:
            cls = inner
        else:
            cls = _Leaf


@dataclass
class _Leaf:
    """Has no keys: a name below a plain value is unknown."""


# ---------------------------------------------------------------------------------------------------------------------
# Values


def build(cls: type, values: Mapping[str, Any]) -> Any:
    """A dataclass of the recipe from plain values that were checked already.

    Args:
        cls: `Recipe` or one of its sections.
        values: plain dicts and lists; missing keys take their defaults.
    """
    arguments = {}
    for name, value in values.items():
        hint = _hints(cls)[name]
        inner = _dataclass_in(hint)
        if inner is not None and isinstance(value, Mapping):
            value = build(inner, value)
        elif typing.get_origin(hint) is list and isinstance(value, list):
            element = _dataclass_in(_element(hint))
            value = [build(element, entry) if element and isinstance(entry, Mapping) else entry for entry in value]
        arguments[name] = value
    return cls(**arguments)


def _read_values(parser: ArgumentParser, config: Path | None, flags: Sequence[str]) -> dict[str, Any]:
    from jsonargparse import ArgumentError

    where = str(config)
    try:
        namespace = parser.parse_object(_load_yaml(config)) if config else None
        where = "command line"
        namespace = parser.parse_args(list(flags), namespace=namespace)
    except ArgumentError as error:
        raise _wrong_value(str(error), where) from None
    return {name: value for name, value in namespace.as_dict().items() if name in _hints(Recipe)}


def _check_ranges(cls: type, values: Any, prefix: str = "") -> None:
    """Refuse numbers that no program could use."""
    if not isinstance(values, dict):
        return
    for item in dataclasses.fields(cls):
        value, key = values.get(item.name), prefix + item.name
        low, high = item.metadata.get("low"), item.metadata.get("high")
        for number in value if isinstance(value, list) else [value]:
            if isinstance(number, int | float) and not (
                (low is None or number >= low) and (high is None or number <= high)
            ):
                limits = f"at least {low}" if high is None else f"between {low} and {high}"
                raise UserError(f"{key} must be {limits}, not {number}.")
        inner = _dataclass_in(_element(_hints(cls)[item.name]))
        for entry in value if isinstance(value, list) else [value]:
            if inner is not None:
                _check_ranges(inner, entry, f"{key}.")


def _load_yaml(path: Path) -> dict[str, Any]:
    import yaml
    from jsonargparse import get_loader

    if not path.is_file():
        raise UserError(f"the recipe {path} does not exist; check --config.")
    try:
        values = get_loader("yaml")(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        mark = getattr(error, "problem_mark", None)
        line = f" at line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        problem = getattr(error, "problem", None) or "it is not UTF-8 text"
        raise UserError(f"the recipe {path} is not valid YAML{line} ({problem}).") from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise UserError(f"the recipe {path} must be a mapping of sections such as target and drafter.")
    # A section left empty (`training:` with everything commented out) means its defaults.
    values = {key: value for key, value in values.items() if not (value is None and key in SECTIONS)}
    _check_keys(Recipe, values, str(path))
    return values


def _describe(hint: Any) -> str:
    """A type in words, for people."""
    if typing.get_origin(hint) is typing.Literal:
        return "one of " + ", ".join(str(option) for option in typing.get_args(hint))
    if typing.get_origin(hint) is list:
        return f"a list, each entry {_describe(typing.get_args(hint)[0])}"
    if typing.get_origin(hint) is dict:
        return f"a mapping of names to values, each {_describe(typing.get_args(hint)[1])}"
    if dataclasses.is_dataclass(hint):
        return "a section with " + ", ".join(_hints(hint))
    options = _options(hint)
    if len(options) > 1:
        return " or ".join("nothing (null)" if option is type(None) else _describe(option) for option in options)
    words = {int: "a whole number", float: "a number", bool: "true or false", str: "text", Any: "anything"}
    return words.get(hint, str(hint))


def _wrong_value(message: str, where: str) -> UserError:
    """jsonargparse's message of several lines as one sentence."""
    found = re.search(r'Parser key "([\w.]+)"', message) or re.search(r"argument --([\w.]+)", message)
    if found is None:
        return UserError(f"{where}: {' '.join(message.split())}")
    key, hint = found.group(1), Recipe
    for part in key.split("."):
        hint = _hints(_dataclass_in(hint) or _Leaf).get(part, Any)
    got = re.findall(r"(?:Got value|Given value): (.*)", message)
    value = f", not {got[-1]}" if got else ""
    return UserError(f"{where}: {key} takes {_describe(hint)}{value}.")


# ---------------------------------------------------------------------------------------------------------------------
# Parsers


def _expand_alias(word: str, aliases: Mapping[str, str]) -> str:
    name, equals, value = word.partition("=")
    return aliases.get(name, name) + equals + value


class _GeneralParser(argparse.ArgumentParser):
    """argparse that raises instead of exiting."""

    def error(self, message: str) -> typing.NoReturn:
        raise UserError(f"command line: {message}.")


def _general_parser() -> argparse.ArgumentParser:
    parser = _GeneralParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--config", type=Path)
    parser.add_argument("--run", "--run-dir", type=Path)  # torchrun takes --run for an abbreviation of its --run-path
    parser.add_argument("--plan", action="store_true")
    parser.add_argument("--accept-new-target", action="store_true")
    parser.add_argument("--allow-code", action="store_true")
    parser.add_argument(*_LAUNCHER_FLAGS, type=int)
    return parser


@functools.cache
def _whole_parser() -> ArgumentParser:
    return _parser("", tuple(SECTIONS), None)


def _parser(
    description: str, sections: Sequence[str], prog: str | None, aliases: Mapping[str, str] | None = None
) -> ArgumentParser:
    from jsonargparse import ArgumentParser

    notes = [f"{name} is short for {full}." for name, full in (aliases or {}).items()]
    notes.append("Recipes may hold the sections of the other programs too; each takes its own.")
    parser = ArgumentParser(
        prog=prog,
        description=description,
        exit_on_error=False,
        allow_abbrev=False,
        epilog=" ".join(notes),
    )
    parser.add_argument("--config", metavar="RECIPE", help="YAML recipe; flags override it")
    parser.add_argument("--run", metavar="DIR", help="run folder; spelt --run-dir under torchrun")
    parser.add_argument("--plan", action="store_true", help="print what would run and what it needs, then exit")
    parser.add_argument("--accept-new-target", action="store_true", help="go on though the target's weights changed")
    parser.add_argument("--allow-code", action="store_true", help="import classes of your own that methods name")
    parser.add_argument("--seed", type=int, default=Recipe.seed, help=_field_help()["Recipe", "seed"])
    for name in sections:
        parser.add_class_arguments(SECTIONS[name], name, help=inspect.getdoc(SECTIONS[name]))
        for action in parser._actions:
            section, _, key = action.dest.partition(".")
            if section == name and key in _hints(SECTIONS[name]):
                action.help = _field_help()[SECTIONS[name].__name__, key].replace("%", "%%")
    return parser


@functools.cache
def _field_help() -> dict[tuple[str, str], str]:
    """The string under each field of the sections: {(class, field): help}."""
    help_of = {}
    for node in ast.parse(inspect.getsource(_recipe_module)).body:
        if not isinstance(node, ast.ClassDef):
            continue
        for statement, following in zip(node.body, node.body[1:], strict=False):
            if isinstance(statement, ast.AnnAssign) and isinstance(following, ast.Expr):
                help_of[node.name, statement.target.id] = following.value.value
    return help_of
