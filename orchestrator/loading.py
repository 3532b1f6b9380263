"""Read a YAML file into a SweepConfig, or report every mistake in it at once.

In: a path and `field=value` overrides. Out: SweepConfig. Each mistake is one line,
`file:line: field: rule (got value)`, with a suggestion for a misspelt name.

Numbers and booleans are YAML 1.2's, see yaml_core.py; a key given twice is a mistake, for PyYAML
would take the last.
"""

import difflib
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError

from orchestrator.config import SweepConfig, TrialConfig
from orchestrator.data_config import DataConfig
from orchestrator.errors import ConfigError
from orchestrator.search_config import BUDGETS, RangeConfig, Values
from orchestrator.yaml_core import CoreLoader

FieldPath = tuple[str | int, ...]
Mistake = tuple[FieldPath, str]
COMMAND_LINE = "--set"
# In place of the line of a field that --set gives.
SET_LINE = 0
STDIN = "-"
SPACE = ("search", "space")
DOTTED = (SPACE, ("search", "conditions"))
"""Groups whose keys have dots of their own."""


def load_config(path: Path, overrides: Sequence[str] = ()) -> SweepConfig:
    """From a file, or from standard input for `-`.

    Raises:
        ConfigError: with one line per mistake.
    """
    try:
        text = sys.stdin.read() if str(path) == STDIN else path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        why = getattr(error, "strerror", None) or error
        raise ConfigError(f"{path}: the configuration cannot be read: {why}") from error
    return parse_config(text, str(path), overrides)


def parse_config(text: str, name: str, overrides: Sequence[str] = ()) -> SweepConfig:
    content, lines = _parse_yaml(text, name)
    return _checked(content, overrides, lines, name, _written_budget_problems)


def override_config(config: SweepConfig, overrides: Sequence[str]) -> SweepConfig:
    """Raises ConfigError with one line per mistake."""
    return _checked(config.model_dump(mode="json"), overrides, {}, "")


def trial_with(trial: TrialConfig, params: dict[str, Any]) -> TrialConfig:
    """The trial with dotted fields replaced, validated as a whole.

    Raises:
        ConfigError: a field does not exist or a value is not allowed.
    """
    content = trial.model_dump()
    for field, value in params.items():
        *parents, leaf = field.split(".")
        place = content
        for parent in parents:
            place = place.get(parent) if isinstance(place, dict) else None  # type: ignore[assignment]
        if not isinstance(place, dict) or field not in trial_fields():
            raise ConfigError(_no_field(field))
        place[leaf] = value
    try:
        return TrialConfig.model_validate(content)
    except ValidationError as error:
        found = _mistakes(error, TrialConfig, content, {})
        raise ConfigError("; ".join(_described(found, {}, ""))) from error


def data_config(content: dict[str, Any], overrides: Sequence[str]) -> DataConfig:
    """A DataConfig from its fields and FIELD=VALUE changes. Raises ConfigError."""
    lines = _override(content, overrides, {})
    try:
        return DataConfig.model_validate(content)
    except ValidationError as error:
        found = _mistakes(error, DataConfig, content, lines)
        raise ConfigError("\n".join(_described(found, lines, ""))) from error


def trial_fields() -> list[str]:
    """All dotted leaf fields of a trial."""
    return _leaf_fields(TrialConfig)


def _leaf_fields(model: type[BaseModel], prefix: str = "") -> list[str]:
    names = []
    for name, field in model.model_fields.items():
        inner = field.annotation
        if isinstance(inner, type) and issubclass(inner, BaseModel):
            names += _leaf_fields(inner, f"{prefix}{name}.")
        else:
            names.append(prefix + name)
    return names


def _checked(
    content: dict[str, Any],
    overrides: Sequence[str],
    lines: dict[FieldPath, int],
    name: str,
    further: Callable[[SweepConfig], Iterable[Mistake]] = lambda config: (),
) -> SweepConfig:
    """`further` mistakes are looked for in what is sound so far."""
    lines = _override(content, overrides, lines)
    found = list(_unknown_in_space(content))
    unknown = [path for path, _ in found]
    try:
        config = SweepConfig.model_validate(content)
    except ValidationError as error:
        inner = _mistakes(error, SweepConfig, content, lines)
        found += [(path, rule) for path, rule in inner if path[: len(SPACE) + 1] not in unknown]
        raise ConfigError("\n".join(_described(found, lines, name))) from error
    found += [*_candidate_problems(config), *further(config)]
    if found:
        raise ConfigError("\n".join(_described(found, lines, name)))
    return config


def _unknown_in_space(content: dict[str, Any]) -> Iterable[tuple[FieldPath, str]]:
    """Looks at what is written, for a mistake elsewhere must not hide these."""
    search = content.get("search")
    space = search.get("space") if isinstance(search, dict) else None
    for field in space if isinstance(space, dict) else {}:
        if isinstance(field, str) and field not in trial_fields():
            yield (*SPACE, field), _no_field(field)


def _no_field(field: str) -> str:
    return f"{field} is no field of a trial{_suggestion(field, trial_fields())}"


def _parse_yaml(text: str, name: str) -> tuple[dict[str, Any], dict[FieldPath, int]]:
    try:
        loader = CoreLoader(text)
    except yaml.YAMLError as error:  # a sign that no text has
        raise ConfigError(f"{name}: not valid YAML: {error}") from error
    try:
        node = loader.get_single_node()
        if not isinstance(node, yaml.MappingNode):
            raise ConfigError(f"{name}:1: the file must be a mapping of fields to values")
        lines: dict[FieldPath, int] = {(): 1}
        duplicates: list[str] = []
        _note_lines(node, (), lines, duplicates, name)
        if duplicates:
            raise ConfigError("\n".join(duplicates))
        return loader.construct_document(node), lines
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise ConfigError(f"{name}:{line}: not valid YAML: {error.problem}") from error
    except RecursionError as error:
        raise ConfigError(f"{name}: a value must not hold itself: write it out") from error
    finally:
        loader.dispose()


def _note_lines(
    node: yaml.Node,
    path: FieldPath,
    lines: dict[FieldPath, int],
    duplicates: list[str],
    name: str,
) -> None:
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            line = key.start_mark.line + 1
            if not isinstance(key, yaml.ScalarNode):
                raise ConfigError(
                    f"{name}:{line}: the name of a field must be a word: put quotes around what "
                    "begins with a bracket"
                )
            inner = (*path, key.value)
            if inner in lines:
                field = ".".join(map(str, inner))
                duplicates.append(
                    f"{name}:{line}: {field}: given twice (first in line {lines[inner]})"
                )
            lines[inner] = line
            _note_lines(value, inner, lines, duplicates, name)
    elif isinstance(node, yaml.SequenceNode):
        for index, value in enumerate(node.value):
            lines[(*path, index)] = value.start_mark.line + 1
            _note_lines(value, (*path, index), lines, duplicates, name)


def _override(
    content: dict[str, Any], overrides: Sequence[str], lines: dict[FieldPath, int]
) -> dict[FieldPath, int]:
    """Changes `content`; the lines of what the file still decides, and SET_LINE for the rest."""
    for override in overrides:
        changed = _set_override(content, override)
        depth = len(changed)
        lines = {path: line for path, line in lines.items() if path[:depth] != changed}
        lines[changed] = SET_LINE
    return lines


def _set_override(content: dict[str, Any], override: str) -> FieldPath:
    field, equals, text = override.partition("=")
    if not equals or not field:
        raise ConfigError(f"{COMMAND_LINE} {override}: must be written field=value")
    try:
        loader = CoreLoader(text)
        try:
            value = loader.get_single_data()
        finally:
            loader.dispose()
    except (yaml.YAMLError, RecursionError, TypeError) as error:  # the last: keys that are lists
        raise ConfigError(f"{COMMAND_LINE} {override}: the value is not valid YAML") from error
    *parents, leaf = field.split(".")
    if (group := tuple(parents[:2])) in DOTTED:
        parents, leaf = list(group), field.removeprefix(".".join(group) + ".")
    place = content
    for parent in parents:
        place = place.setdefault(parent, {})
        if not isinstance(place, dict):
            raise ConfigError(f"{COMMAND_LINE} {override}: {parent} is not a group of fields")
    place[leaf] = value
    return (*parents, leaf)


def _candidate_problems(config: SweepConfig) -> Iterable[tuple[FieldPath, str]]:
    """Each value of the search space must make a valid trial, before any GPU is held."""
    # Values are tried one at a time; check_space in search/space.py looks at combinations.
    for field, values in config.search.space.items():
        path = (*SPACE, field)
        if field not in trial_fields():
            continue  # named already
        if isinstance(values, RangeConfig):
            problem = _range_problem(config, field, values)
            if problem:
                yield path, problem
            continue
        for index, value in enumerate(values):
            problem = _value_problem(config, field, value)
            if problem:
                yield (*path, index), problem
                break


def _written_budget_problems(config: SweepConfig) -> Iterable[Mistake]:
    """Of a new sweep: a resume cannot change `trial`."""
    if "auto" in _widths(config):
        return
    quant = config.trial.quant
    for field in BUDGETS:
        name = field.removeprefix("quant.")
        if (value := getattr(quant, name)) is not None:
            yield (
                ("trial", "quant", name),
                f"only bit_width: auto has a budget, but got {name}={value:g}, "
                f"bit_width={quant.bit_width}: set bit_width: auto, or leave {name} out",
            )


def _widths(config: SweepConfig) -> tuple[Any, ...]:
    return config.search.values_of("quant.bit_width", config.trial.quant.bit_width)


def _range_problem(config: SweepConfig, field: str, values: RangeConfig) -> str:
    kind = _field_type(field)
    numbers = [option for option in _options(kind) if option in (int, float)]
    if not numbers:
        return f"a range needs a numeric field, and {field} is none: list the values instead"
    if numbers == [int] and not values.integer:
        return f"{field} is a whole number: add integer: true to its range"
    ends = [int(end) if values.integer else end for end in (values.low, values.high)]
    return next(filter(None, (_value_problem(config, field, end) for end in ends)), "")


def _value_problem(config: SweepConfig, field: str, value: Any) -> str:
    beside: dict[str, Any] = {}
    if field in BUDGETS:
        if "auto" not in _widths(config):
            widths = ", ".join(map(str, _widths(config)))
            return (
                f"only bit_width: auto has a budget, but got quant.bit_width={widths}: "
                f"add auto to search.space.quant.bit_width, or leave {field} out"
            )
        beside = {"quant.bit_width": "auto"}
    if field == "quant.bit_width" and value == "auto":
        space = config.search.space
        beside = {name: _first(space[name]) for name in BUDGETS if name in space}
    try:
        trial_with(config.trial, beside | {field: value})
    except ConfigError as error:
        return str(error)
    return ""


def _first(values: Values) -> Any:
    return values.low if isinstance(values, RangeConfig) else values[0]


def _field_type(field: str) -> Any:
    """The annotation of a trial's dotted field."""
    kind: Any = TrialConfig
    for part in field.split("."):
        kind = kind.model_fields[part].annotation
    return kind


def _options(kind: Any) -> list[Any]:
    """The types of `Annotated[int, ...] | None`, without what annotates them."""
    if get_origin(kind) is Annotated:
        return _options(get_args(kind)[0])
    if get_origin(kind) in (Union, UnionType):
        return [option for part in get_args(kind) for option in _options(part)]
    return [kind]


def _described(
    mistakes: Iterable[tuple[FieldPath, str]], lines: dict[FieldPath, int], name: str
) -> list[str]:
    """One text per mistake, in the order of the file; those of --set come first."""
    return [
        f"{_place(name, lines, path, rule)}{'.'.join(map(str, path)) or 'the file'}: {rule}"
        for path, rule in sorted(mistakes, key=lambda mistake: lines.get(mistake[0], 0))
    ]


def _mistakes(
    error: ValidationError, model: type[BaseModel], content: Any, lines: dict[FieldPath, int]
) -> Iterable[tuple[FieldPath, str]]:
    for found, details in _by_path(error, content).items():
        written = [found]
        if details[0]["type"] == "extra_forbidden" and found not in lines:
            # A group that --set made by writing into it: what it wrote is the mistake.
            written = _set_within(found, lines) or written
        for path in written:
            yield path, _rule(details, path, model)


def _by_path(error: ValidationError, content: Any) -> dict[FieldPath, list[Any]]:
    """The errors of each path: several where no branch of a union takes the value."""
    found: dict[FieldPath, list[Any]] = {}
    for detail in error.errors(include_url=False):
        path = _written_path(detail["loc"], content, detail["type"])
        found.setdefault(path, []).append(detail)
    # An error further in is that of the branch that was meant, for it took what is around it.
    outer = {path[:depth] for path in found for depth in range(len(path))}
    return {path: details for path, details in found.items() if path not in outer}


def _rule(details: list[Any], path: FieldPath, model: type[BaseModel]) -> str:
    """One message for all errors of a path."""
    # A branch that got as far as the value itself is the one that was meant.
    refused = [detail for detail in details if not _is_mismatch(detail)]
    if not refused:
        kinds = _kinds_wanted(details, NoneType in _kinds_at(path, model))
        return f"Input should be {kinds} (got {details[0]['input']!r})"
    detail = refused[0]
    if detail["type"] == "missing":
        return "required field is missing"
    if detail["type"] == "extra_forbidden":
        return f"unknown field{_nearest_field(path, model)}"
    if detail["type"] == "too_short":
        return f"needs a list of at least {detail['ctx']['min_length']} (got {detail['input']!r})"
    message = str(detail["msg"]).removeprefix("Value error, ")
    if detail["type"] == "value_error":  # the message names fields and values itself
        return message
    return f"{message} (got {detail['input']!r})"


def _is_mismatch(detail: Any) -> bool:
    kind: str = detail["type"]
    return kind.endswith("_type") or kind == "literal_error"


def _kinds_wanted(details: list[Any], nullable: bool) -> str:
    """In YAML's words, where pydantic's are Python's."""
    value = details[0]["input"]
    words = {"model_type": "a mapping", "dict_type": "a mapping", "tuple_type": "a list"}
    words["bool_type"] = "true, false or null" if nullable else "true or false"
    types = [detail["type"] for detail in details]
    alone = isinstance(value, int | float | str) and not isinstance(value, bool)
    if alone and "string_type" not in types:  # else a name is wanted, and a list of this is wrong
        words["tuple_type"] = f"a list such as [{value!r}]"
    kinds = [
        words.get(detail["type"]) or str(detail["msg"]).removeprefix("Input should be ")
        for detail in details
    ]
    return " or ".join(dict.fromkeys(kinds))


def _written_path(loc: tuple[Any, ...], content: Any, kind: str) -> FieldPath:
    """The error's path without the parts that pydantic adds for a union's branch."""
    path: list[str | int] = []
    place = content
    for index, part in enumerate(loc):
        if isinstance(place, dict) and part in place:
            place = place[part]
        elif isinstance(place, list | tuple) and isinstance(part, int) and part < len(place):
            place = place[part]
        elif not (kind == "missing" and index == len(loc) - 1):
            continue
        path.append(part)
    return tuple(path)


def _place(name: str, lines: dict[FieldPath, int], path: FieldPath, message: str) -> str:
    """`file:line: `, or `--set `; nothing for what was written in neither."""
    # A rule about several fields is found at their group, but broken by one that it names.
    if any(
        re.search(rf"\b{re.escape(str(field[-1]))}\b", message)
        for field in _set_within(path, lines)
    ):
        return f"{COMMAND_LINE} "
    while path not in lines and path:
        if _set_within(path, lines):
            return f"{COMMAND_LINE} "
        path = path[:-1]
    if lines.get(path) == SET_LINE:
        return f"{COMMAND_LINE} "
    return f"{name}:{lines.get(path, 1)}: " if name else ""


def _set_within(path: FieldPath, lines: dict[FieldPath, int]) -> list[FieldPath]:
    """The fields inside a group that --set gives."""
    depth = len(path)
    return [
        field
        for field, line in lines.items()
        if line == SET_LINE and len(field) > depth and field[:depth] == path
    ]


def _nearest_field(path: FieldPath, model: type[BaseModel]) -> str:
    """A field that is written without its group, such as quant.bit_width, or misspelt."""
    field = ".".join(map(str, path))
    known = _leaf_fields(model)
    for name in known:
        groups, found, _ = f"{name}.".partition(f".{field}.")
        if found:
            return f"; did you mean '{groups}.{field}'?"
    return _suggestion(str(path[-1]), _siblings(path, model)) or _suggestion(field, known, 0.75)


def _siblings(path: FieldPath, model: type[BaseModel]) -> list[str]:
    """The fields of the models that may stand where the path's last part does."""
    kinds = _kinds_at(path[:-1], model)
    models = [kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)]
    return [name for found in models for name in found.model_fields]


def _kinds_at(path: FieldPath, model: type[BaseModel]) -> list[Any]:
    """The types of what may stand there."""
    kinds: list[Any] = [model]
    for part in path:
        kinds = [inner for kind in kinds for inner in _options(_inside(kind, part))]
    return kinds


def _inside(kind: Any, part: str | int) -> Any:
    """The annotation of what a value of this type holds under a key or an index."""
    if get_origin(kind) is dict:
        return get_args(kind)[1]
    if get_origin(kind) is tuple:
        return get_args(kind)[0]
    field = getattr(kind, "model_fields", {}).get(str(part))
    return field.annotation if field else None


def _suggestion(word: str, known: Iterable[str], cutoff: float = 0.6) -> str:
    near = difflib.get_close_matches(word, list(known), n=1, cutoff=cutoff)
    return f"; did you mean '{near[0]}'?" if near else ""
