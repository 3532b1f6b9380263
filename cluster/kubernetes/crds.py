"""Validate custom resources as the API server does: unknown fields, types, patterns, CEL rules.

In: a folder of CustomResourceDefinitions and a resource. Out: problems, as the API server would
find them when the resource is created with strict field validation. Used where there is no cluster
to ask; `--dry-run server` asks one. CEL rules need the package cel-python.

A structural schema differs from JSON schema in a few ways, each translated in `_strict`.
"""

import copy
import re
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from cluster.kubernetes.quantities import Object
from orchestrator.errors import ConfigError

Schema = dict[str, Any]
ROOT_FIELDS = {"apiVersion": {"type": "string"}, "kind": {"type": "string"}, "metadata": {}}
MAX_MESSAGE = 200


class CustomResources:
    """The definitions of a folder; each version's schema is translated when it is first needed."""

    def __init__(self, folder: Path) -> None:
        self._definitions = dict(_definitions(folder))
        if not self._definitions:
            raise ConfigError(f"{folder} holds no CustomResourceDefinition: name another --crds")
        self._validators: dict[tuple[str, str], _Validator] = {}

    def without(self, kind: str, field: str) -> "CustomResources":
        """As an older version would be that lacks a field, given as a dotted path."""
        older = copy.copy(self)
        older._definitions, older._validators = copy.deepcopy(self._definitions), {}
        *parents, leaf = field.split(".")
        for (_, name), schema in older._definitions.items():
            place = schema
            for parent in parents if name == kind else ():
                place = place["properties"][parent]
            if name == kind:
                place["properties"].pop(leaf, None)
        return older

    def knows(self, resource: Object) -> bool:
        return _key(resource) in self._definitions

    def problems(self, resource: Object) -> list[str]:
        """Empty if it would be accepted. Raises KeyError for a kind that is not defined here."""
        key = _key(resource)
        if key not in self._validators:
            self._validators[key] = _Validator(self._definitions[key])
        return self._validators[key].problems(_without_nulls(resource))


class _Validator:
    def __init__(self, schema: Schema) -> None:
        self._schema = schema
        self._programs: dict[str, Any] = {}

    def problems(self, resource: Object) -> list[str]:
        errors = sorted(self._json_schema.iter_errors(resource), key=lambda e: str(e.json_path))
        found = [f"{error.json_path}: {error.message[:MAX_MESSAGE]}" for error in errors]
        return found + list(self._broken_rules(self._schema, resource, "$"))

    @cached_property
    def _json_schema(self) -> Any:
        import jsonschema

        schema = _strict(self._schema)
        schema["properties"] |= ROOT_FIELDS
        return jsonschema.Draft202012Validator(schema)

    def _broken_rules(self, schema: Schema, value: Any, path: str) -> Iterator[str]:
        for rule in schema.get("x-kubernetes-validations", []):
            # Rules about changes hold when a resource is made: there is no old one.
            if "oldSelf" not in rule["rule"] and not self._holds(rule["rule"], value):
                yield f"{path}: {rule.get('message', rule['rule'])}"
        if isinstance(value, dict):
            others = schema.get("additionalProperties")
            for name, item in value.items():
                inner = schema.get("properties", {}).get(name, others)
                if isinstance(inner, dict):
                    yield from self._broken_rules(inner, item, f"{path}.{name}")
        elif isinstance(value, list) and isinstance(schema.get("items"), dict):
            for index, item in enumerate(value):
                yield from self._broken_rules(schema["items"], item, f"{path}[{index}]")

    def _holds(self, rule: str, value: Any) -> bool:
        import celpy
        from celpy.evaluation import CELEvalError

        if rule not in self._programs:
            environment = celpy.Environment()
            self._programs[rule] = environment.program(environment.compile(rule))
        try:
            return bool(self._programs[rule].evaluate({"self": celpy.json_to_cel(value)}))
        except CELEvalError:  # such as a field of the wrong type: an error refuses, too
            return False


def _definitions(folder: Path) -> Iterator[tuple[tuple[str, str], Schema]]:
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # libyaml's is 10 times as fast
    for path in sorted(folder.rglob("*.yaml")):
        for document in yaml.load_all(path.read_text(), loader):
            if not document or document.get("kind") != "CustomResourceDefinition":
                continue
            spec = document["spec"]
            for version in spec["versions"]:
                if version["served"]:
                    key = f"{spec['group']}/{version['name']}", spec["names"]["kind"]
                    yield key, version["schema"]["openAPIV3Schema"]


def _strict(schema: Schema) -> Schema:
    """A structural schema as a JSON schema that knows no other fields."""
    strict = {name: value for name, value in schema.items() if name != "description"}
    if strict.pop("x-kubernetes-int-or-string", False):
        strict.pop("anyOf", None)
        strict["type"] = ["integer", "string"]
    for name in ("items", "additionalProperties"):
        if isinstance(strict.get(name), dict):
            strict[name] = _strict(strict[name])
    if "properties" in strict:
        strict["properties"] = {n: _strict(s) for n, s in strict["properties"].items()}
        open_ended = strict.get("x-kubernetes-preserve-unknown-fields")
        if "additionalProperties" not in strict and not open_ended:
            strict["additionalProperties"] = False
        if strict.get("x-kubernetes-embedded-resource"):
            strict["properties"] |= ROOT_FIELDS
    if "required" in strict:  # the API server fills in defaults first
        known = strict.get("properties", {})
        strict["required"] = [n for n in strict["required"] if "default" not in known.get(n, {})]
    if "pattern" in strict:
        strict["pattern"] = _python_pattern(strict["pattern"])
    if strict.pop("nullable", False):
        return {"anyOf": [{"type": "null"}, strict]}
    return strict


def _python_pattern(pattern: str) -> str:
    """RE2 takes flags such as (?i) after `^`, Python only at the beginning or with a group."""
    found = re.match(r"^(\^?)\(\?([imsU]+)\)(.*)$", pattern, re.DOTALL)
    return f"{found[1]}(?{found[2]}:{found[3]})" if found else pattern


def _without_nulls(value: Any) -> Any:
    """The API server drops a null before it validates."""
    if isinstance(value, dict):
        return {name: _without_nulls(item) for name, item in value.items() if item is not None}
    if isinstance(value, list):
        return [_without_nulls(item) for item in value]
    return value


def _key(resource: Object) -> tuple[str, str]:
    return resource.get("apiVersion", ""), resource.get("kind", "")
