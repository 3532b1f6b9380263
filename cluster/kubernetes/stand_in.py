"""A stand-in for the Kubernetes API: objects in memory, with the rules that a client depends on.

In: HTTP requests (a transport of httpx2). Out: answers as a real API server gives them, in status,
reason and words: validation of custom resources, conflicts, resource versions, selectors, quotas,
rights, dry runs. It starts nothing: what controllers would do, tests write with `put` and `event`.
"""

import copy
import datetime
import itertools
import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs

from cluster.kubernetes.api import CLUSTER_WIDE, KINDS, KubernetesApi
from cluster.kubernetes.crds import CustomResources
from cluster.kubernetes.quantities import Object

if TYPE_CHECKING:
    import httpx2

Key = tuple[str, str, str]
Backend = Callable[["httpx2.Request", str], "httpx2.Response"]
TOKEN = "let-me-in"
PATH = re.compile(
    r"(?P<api>/apis?/(?:[a-z0-9.-]+/)?v[a-z0-9]+)(?:/namespaces/(?P<namespace>[^/]+))?"
    r"/(?P<plural>[a-z]+)(?:/(?P<name>[^/]+))?$"
)
PROXY = re.compile(r"/api/v1/namespaces/([^/]+)/services/([^/:]+):([^/]+)/proxy(/.*)$")


@dataclass
class StandIn:
    definitions: CustomResources | None = None
    namespaces: set[str] = field(default_factory=lambda: {"default"})
    missing_groups: set[str] = field(default_factory=set)
    """API groups that are not installed."""
    forbidden: set[tuple[str, str]] = field(default_factory=set)
    """Verbs and plurals that the user has no right to."""
    quotas: dict[str, int] = field(default_factory=dict)
    """The most objects of a kind that there may be, by the plural and its group."""
    services: dict[str, Backend] = field(default_factory=dict)
    """What answers behind the service proxy, by the service's name."""
    token: str = TOKEN
    """What requests must carry."""
    is_down: bool = False

    def __post_init__(self) -> None:
        self._objects: dict[Key, Object] = {}
        self._version = itertools.count(1)

    def api(self, namespace: str = "default", token: str = TOKEN) -> KubernetesApi:
        import httpx2

        headers = {"Authorization": f"Bearer {token}"}
        transport = httpx2.MockTransport(self.handle)
        http = httpx2.Client(base_url="https://cluster", transport=transport, headers=headers)
        return KubernetesApi(http, namespace)

    def put(self, resource: Object, namespace: str = "default") -> Object:
        """Make or replace an object, status and all, as a controller does."""
        metadata = {"namespace": namespace, **resource["metadata"]}
        stored = {**copy.deepcopy(resource), "metadata": metadata}
        key = resource["kind"], namespace, metadata["name"]
        self._stamp(stored, self._objects.get(key))
        self._objects[key] = stored
        return stored

    def object(self, kind: str, name: str, namespace: str = "default") -> Object | None:
        return self._objects.get((kind, namespace, name))

    def set_status(self, kind: str, name: str, status: Object, namespace: str = "default") -> None:
        stored = self._objects[kind, namespace, name]
        stored["status"] = {**stored.get("status", {}), **copy.deepcopy(status)}
        self._stamp(stored, stored)

    def event(
        self, kind: str, name: str, reason: str, message: str, type_: str = "Warning"
    ) -> None:
        """As a controller records it, now."""
        number = next(self._version)
        event = {
            "apiVersion": "v1",
            "kind": "Event",
            "metadata": {"name": f"{name}.{number}"},
            "involvedObject": {"kind": kind, "name": name},
            "reason": reason,
            "message": message,
            "type": type_,
            "lastTimestamp": now(),
        }
        self.put(event)

    def handle(self, request: "httpx2.Request") -> "httpx2.Response":
        import httpx2

        if self.is_down:
            raise httpx2.ConnectError("Connection refused", request=request)
        if request.headers.get("Authorization") != f"Bearer {self.token}":
            return _status(401, "Unauthorized", "Unauthorized")
        path = request.url.path
        if found := PROXY.fullmatch(path):
            return self._proxied(request, *found.groups())
        route = PATH.fullmatch(path)
        kind = next(
            (k for k, v in KINDS.items() if route and v == (route["api"], route["plural"])), ""
        )
        if route is None or not kind or self._is_missing(route["api"]):
            message = "the server could not find the requested resource"
            return _status(404, "NotFound", message, name="")
        namespace = route["namespace"] or ""
        verb = _verb(request.method, route["name"])
        if (verb, route["plural"]) in self.forbidden:
            message = f'{route["plural"]} is forbidden: User "me" cannot {verb} resource'
            return _status(403, "Forbidden", f'{message} "{route["plural"]}"')
        if verb == "create" and kind not in CLUSTER_WIDE and namespace not in self.namespaces:
            return _status(404, "NotFound", f'namespaces "{namespace}" not found', name=namespace)
        params = {
            name: values[-1] for name, values in parse_qs(str(request.url.query, "ascii")).items()
        }
        if verb == "list":
            items = self._matching(kind, namespace, params)
            return _json(200, {"kind": f"{kind}List", "items": items})
        key = kind, namespace or "default", route["name"] or ""
        return self._answer(verb, key, params, request)

    def _answer(
        self, verb: str, key: Key, params: dict[str, str], request: "httpx2.Request"
    ) -> "httpx2.Response":
        kind, namespace, name = key
        if verb == "create":
            return self._create(kind, namespace, json.loads(request.content), params)
        stored = self._objects.get(key)
        if stored is None:
            words = f'{KINDS[kind][1]} "{name}" not found'
            return _status(404, "NotFound", words, name=name)
        if verb == "delete":
            if stored["metadata"].get("finalizers"):
                stored["metadata"]["deletionTimestamp"] = now()
            else:
                del self._objects[key]
        elif verb == "patch":
            changes = json.loads(request.content)
            changed = _merged(stored, {key: changes[key] for key in changes if key != "status"})
            if problems := [p for p in self._problems(changed) if "unexpected" not in p]:
                return _invalid(kind, name, problems)
            self._stamp(changed, stored)
            self._objects[key] = stored = changed
        return _json(200, stored)

    def _create(
        self, kind: str, namespace: str, resource: Object, params: dict[str, str]
    ) -> "httpx2.Response":
        if kind == "SelfSubjectAccessReview":
            return _json(201, {**resource, "status": {"allowed": self._may(resource["spec"])}})
        name = resource["metadata"]["name"]
        plural = KINDS[kind][1]
        if (kind, namespace, name) in self._objects:
            return _status(409, "AlreadyExists", f'{plural} "{name}" already exists', name=name)
        counted = f"{plural}.{KINDS[kind][0].split('/')[2]}"
        if len(self._matching(kind, namespace, {})) >= self.quotas.get(counted, 2**31):
            most = self.quotas[counted]
            words = f'{counted} "{name}" is forbidden: exceeded quota: objects, requested: '
            words += f"count/{counted}=1, used: count/{counted}={most}, limited: "
            return _status(403, "Forbidden", f"{words}count/{counted}={most}", name=name)
        if resource["metadata"].get("namespace", namespace) != namespace:
            message = "the namespace of the provided object does not match the namespace sent"
            return _status(400, "BadRequest", message)
        problems = self._problems(resource)
        if unknown := [_unknown_field(text) for text in problems if "unexpected" in text]:
            words = f'{kind} in version "v1" cannot be handled: strict decoding error: '
            return _status(400, "BadRequest", words + ", ".join(unknown))
        if problems:
            return _invalid(kind, name, problems)
        # Only controllers write a status, by a path of its own.
        stored = copy.deepcopy({key: resource[key] for key in resource if key != "status"})
        stored["metadata"]["namespace"] = namespace
        self._stamp(stored, None)
        if params.get("dryRun") != "All":
            self._objects[kind, namespace, name] = stored
        return _json(201, stored)

    def _problems(self, resource: Object) -> list[str]:
        known = self.definitions
        return known.problems(resource) if known is not None and known.knows(resource) else []

    def _matching(self, kind: str, namespace: str, params: dict[str, str]) -> list[Object]:
        places = self._objects.items()
        # A request without a namespace asks for those of all.
        items = [o for (k, n, _), o in places if k == kind and namespace in (n, "")]
        for term in filter(None, params.get("labelSelector", "").split(",")):
            name, equals, value = term.partition("=")
            labels = [item["metadata"].get("labels", {}) for item in items]
            pairs = zip(items, labels, strict=True)
            items = [i for i, have in pairs if name in have and (not equals or have[name] == value)]
        for term in filter(None, params.get("fieldSelector", "").split(",")):
            path, _, value = term.partition("=")
            items = [item for item in items if _at(item, path) == value]
        return items

    def _proxied(
        self, request: "httpx2.Request", namespace: str, service: str, port: str, path: str
    ) -> "httpx2.Response":
        if service not in self.services:
            words = f'no endpoints available for service "{service}"'
            return _status(503, "ServiceUnavailable", words)
        query = str(request.url.query, "ascii")
        return self.services[service](request, f"{path}?{query}" if query else path)

    def _stamp(self, resource: Object, old: Object | None) -> None:
        metadata = resource["metadata"]
        before = old["metadata"] if old else {}
        number = next(self._version)
        metadata["resourceVersion"] = str(number)
        metadata["uid"] = before.get("uid") or metadata.get("uid") or f"uid-{number}"
        created = before.get("creationTimestamp") or metadata.get("creationTimestamp")
        metadata["creationTimestamp"] = created or now()

    def _may(self, spec: Object) -> bool:
        asked = spec["resourceAttributes"]
        resource = "/".join(filter(None, (asked["resource"], asked["subresource"])))
        return (asked["verb"], resource) not in self.forbidden

    def _is_missing(self, api: str) -> bool:
        return any(group in api for group in self.missing_groups)


def now() -> str:
    return datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def _unknown_field(problem: str) -> str:
    """`$.spec: Additional properties are not allowed ('x' was unexpected)`, as the server says."""
    path, _, words = problem.partition(": ")
    fields = ", ".join(re.findall(r"'([^']+)'", words))
    return f'unknown field "{path.removeprefix("$.")}.{fields}"'


def _verb(method: str, name: str | None) -> str:
    if method == "GET":
        return "get" if name else "list"
    return {"POST": "create", "PATCH": "patch", "DELETE": "delete"}[method]


def _invalid(kind: str, name: str, problems: list[str]) -> "httpx2.Response":
    return _status(422, "Invalid", f'{kind} "{name}" is invalid: {"; ".join(problems)}', name=name)


def _merged(old: Any, changes: Any) -> Any:
    """JSON merge patch, RFC 7396."""
    if not isinstance(changes, dict):
        return changes
    merged = copy.deepcopy(old) if isinstance(old, dict) else {}
    for name, value in changes.items():
        if value is None:
            merged.pop(name, None)
        else:
            merged[name] = _merged(merged.get(name), value)
    return merged


def _at(item: Object, path: str) -> Any:
    value: Any = item
    for part in path.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return value


def _json(code: int, content: Any) -> "httpx2.Response":
    import httpx2

    return httpx2.Response(code, json=content)


def _status(code: int, reason: str, message: str, name: str | None = None) -> "httpx2.Response":
    content: Object = {"kind": "Status", "status": "Failure", "code": code}
    content |= {"reason": reason, "message": message}
    if name:
        content["details"] = {"name": name}
    return _json(code, content)
