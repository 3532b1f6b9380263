"""The configuration reference, as Markdown, made from the schema: field, type, default, meaning."""

from collections.abc import Iterator
from typing import Any

from orchestrator.config import SweepConfig

HEADER = """\
# Configuration reference

Made by `orchestrator schema --markdown`; a test keeps it equal. Unknown fields are errors.
"""


def render_reference() -> str:
    schema = SweepConfig.model_json_schema()
    return "\n".join([HEADER, *_section(schema, schema["$defs"], "", set())]) + "\n"


def _section(
    model: dict[str, Any], definitions: dict[str, Any], prefix: str, shown: set[str]
) -> Iterator[str]:
    """A table of the model's plain fields, then a section for each mapping in it, the first time
    that it comes."""
    rows, groups, choices = [], [], []
    for name, field in model["properties"].items():
        definition = field.get("$ref", "").rpartition("/")[2]
        if "properties" in definitions.get(definition, {}):
            groups.append((f"{prefix}{name}.", definition))
            continue
        options = (option.get("$ref", "") for option in field.get("anyOf", ()))
        choices += [(f"{prefix}{name}.", option.rpartition("/")[2]) for option in options if option]
        required = name in model.get("required", [])
        default = "required" if required else f"`{_shown(field.get('default'))}`"
        text = " ".join(field.get("description", "").split())
        rows.append(f"| `{prefix}{name}` | {_type(field, definitions)} | {default} | {text} |")
    if rows:
        title = prefix.rstrip(".") or "Top level"
        yield f"## {title}\n\n| field | type | default | meaning |\n|---|---|---|---|"
        yield from rows
        yield ""
    for inner_prefix, definition in groups + choices:
        if definition not in shown:
            shown.add(definition)
            yield from _section(definitions[definition], definitions, inner_prefix, shown)


def _type(field: dict[str, Any], definitions: dict[str, Any]) -> str:
    if "anyOf" in field:
        return " or ".join(_type(option, definitions) for option in field["anyOf"])
    if "enum" in field:
        return ", ".join(f"`{_shown(value)}`" for value in field["enum"])
    if "const" in field:
        return f"`{_shown(field['const'])}`"
    if "$ref" in field:
        inner = definitions[field["$ref"].rpartition("/")[2]]
        return "{" + ", ".join(inner["properties"]) + "}"
    limits = [f"{sign} {field[key]}" for key, sign in LIMITS.items() if key in field]
    return " ".join([TYPES[field["type"]], *limits])


def _shown(value: Any) -> str:
    words = {None: "null", True: "true", False: "false"}
    return words[value] if value is None or isinstance(value, bool) else str(value)


LIMITS = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<"}
TYPES = {
    "integer": "whole number",
    "number": "number",
    "string": "text",
    "boolean": "true or false",
    "array": "list",
    "object": "mapping",
    "null": "null",
}
