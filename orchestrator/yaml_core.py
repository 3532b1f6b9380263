"""YAML as configurations are written and read: with the scalars of YAML 1.2's core schema.

PyYAML's 1.1 rules change meaning silently: `2e-4` would be a string, `off` a boolean, `1:30` the
number 90, `010` the number 8. What `dump_yaml` writes reads back the very same by either rules.
"""

import re
from typing import Any

import yaml

# Tag, form, and the characters that it begins with.
_SCALARS = (
    ("tag:yaml.org,2002:bool", re.compile(r"^(?:true|false)$"), list("tf")),
    ("tag:yaml.org,2002:null", re.compile(r"^(?:null|~|)$"), ["n", "~", ""]),
    ("tag:yaml.org,2002:int", re.compile(r"^[-+]?[0-9]+$"), list("-+0123456789")),
    (
        "tag:yaml.org,2002:float",
        re.compile(
            r"^[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?$|^[-+]?\.(?:inf|nan)$"
        ),
        list("-+0123456789."),
    ),
)


class CoreLoader(yaml.SafeLoader):
    """SafeLoader with YAML 1.2's scalars and no dates. Raises yaml.MarkedYAMLError."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}


class CoreDumper(yaml.SafeDumper):
    """SafeDumper that also quotes what only YAML 1.2 takes for a number, such as 4e5 or 08."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def dump_yaml(content: Any) -> str:
    """Of plain dictionaries, lists, texts and numbers, in their order."""
    return yaml.dump(content, Dumper=CoreDumper, sort_keys=False, allow_unicode=True)


def _construct_int(loader: CoreLoader, node: yaml.ScalarNode) -> int:
    text = loader.construct_scalar(node)
    try:
        return int(text)
    except ValueError as error:  # Python reads at most 4300 digits
        problem = f"no whole number that can be read: {text[:40]}"
        raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark) from error


def _represent_text(dumper: CoreDumper, text: str) -> yaml.ScalarNode:
    # Without escapes PyYAML 6 writes Unicode's line breaks as they are, and reads \n for them.
    style = '"' if re.search("[\x85\u2028\u2029]", text) else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


for _tag, _pattern, _first in _SCALARS:
    CoreLoader.add_implicit_resolver(_tag, _pattern, _first)
    CoreDumper.add_implicit_resolver(_tag, _pattern, _first)
CoreLoader.add_constructor("tag:yaml.org,2002:int", _construct_int)
CoreDumper.add_representer(str, _represent_text)
