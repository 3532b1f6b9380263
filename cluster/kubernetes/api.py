"""The one seam to Kubernetes: a few verbs on plain dictionaries, over the user's kubeconfig.

In: kinds, names and objects. Out: objects, or an error in our words. lightkube reads the
kubeconfig and signs the requests; its typed models are not used, for half of the kinds here are not
Kubernetes' own. A stand-in (stand_in.py) takes the transport's place in tests.
"""

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from cluster.kubernetes.quantities import Object
from cluster.ray_jobs import Answer
from orchestrator.errors import ClusterError, ContactLost, NeverStarted

if TYPE_CHECKING:
    import httpx2

TIMEOUT_S = 15.0
# Kind -> path of its API, name in paths.
KINDS: dict[str, tuple[str, str]] = {
    "RayJob": ("/apis/ray.io/v1", "rayjobs"),
    "RayCluster": ("/apis/ray.io/v1", "rayclusters"),
    "Workload": ("/apis/kueue.x-k8s.io/v1beta2", "workloads"),
    "LocalQueue": ("/apis/kueue.x-k8s.io/v1beta2", "localqueues"),
    "Pod": ("/api/v1", "pods"),
    "Event": ("/api/v1", "events"),
    "Secret": ("/api/v1", "secrets"),
    "PersistentVolumeClaim": ("/api/v1", "persistentvolumeclaims"),
    "ResourceQuota": ("/api/v1", "resourcequotas"),
    "Namespace": ("/api/v1", "namespaces"),
    "Node": ("/api/v1", "nodes"),
    "Deployment": ("/apis/apps/v1", "deployments"),
    "StorageClass": ("/apis/storage.k8s.io/v1", "storageclasses"),
    "SelfSubjectAccessReview": ("/apis/authorization.k8s.io/v1", "selfsubjectaccessreviews"),
    "CustomResourceDefinition": ("/apis/apiextensions.k8s.io/v1", "customresourcedefinitions"),
}
CLUSTER_WIDE = frozenset(
    {"Namespace", "Node", "StorageClass", "CustomResourceDefinition", "SelfSubjectAccessReview"}
)
REMEDIES = {
    "ray.io": "install KubeRay 1.7 or newer, see k8s/README.md",
    "kueue.x-k8s.io": "install Kueue, or leave --queue out",
}


class Refused(NeverStarted):
    """The API server's refusal: its HTTP status and its reason, such as AlreadyExists."""

    def __init__(self, code: int, reason: str, message: str) -> None:
        super().__init__(code, reason, message)
        self.code = code
        self.reason = reason
        self.message = message

    def __str__(self) -> str:
        return self.message


class KubernetesApi:
    def __init__(self, http: "httpx2.Client", namespace: str) -> None:
        self._http = http
        self.namespace = namespace

    @classmethod
    def connect(cls, context: str | None = None, namespace: str | None = None) -> "KubernetesApi":
        """By KUBECONFIG or ~/.kube/config, or a pod's service account.

        Raises:
            ContactLost: there is no such configuration.
        """
        from lightkube import KubeConfig
        from lightkube.config.client_adapter import Client, ConnectionParams
        from lightkube.config.models import User
        from lightkube.core.exceptions import ConfigError as KubeconfigError

        try:
            config = KubeConfig.from_env().get(context)
            assert config is not None
            # Some clusters, such as a local proxy, need no user.
            config = config._replace(user=config.user or User())
            http = Client(config, ConnectionParams())
        except (KubeconfigError, KeyError, OSError, ValueError) as error:
            raise ContactLost(
                f"no cluster to talk to: {error}: set KUBECONFIG, or --context to one that it has"
            ) from error
        http.timeout = TIMEOUT_S
        return cls(http, namespace or config.namespace)

    def get(self, kind: str, name: str) -> Object | None:
        answer = self._send("GET", self._path(kind, name))
        if answer.code == 404 and _is_missing_object(answer):
            return None
        return self._object(answer, f"read {kind} {name}")

    def list(
        self, kind: str, labels: str = "", fields: str = "", everywhere: bool = False
    ) -> "list[Object]":
        """Taken from the API server's cache: cheap for it, and seconds old at most."""
        params = {"resourceVersion": "0"}
        params |= {"labelSelector": labels} if labels else {}
        params |= {"fieldSelector": fields} if fields else {}
        path = self._path(kind, everywhere=everywhere)
        answer = self._send("GET", path, params=params)
        items: list[Object] = self._object(answer, f"list {kind}s")["items"]
        return items

    def create(self, resource: Object, dry_run: bool = False) -> Object:
        """With strict field validation: an unknown field is refused, not dropped."""
        kind = resource["kind"]
        params = {"fieldValidation": "Strict", "fieldManager": "orchestrator"}
        params |= {"dryRun": "All"} if dry_run else {}
        answer = self._send("POST", self._path(kind), params=params, body=resource)
        return self._object(answer, f"create {kind} {resource['metadata']['name']}")

    def patch(self, kind: str, name: str, changes: Object) -> Object:
        headers = {"Content-Type": "application/merge-patch+json"}
        answer = self._send("PATCH", self._path(kind, name), body=changes, headers=headers)
        return self._object(answer, f"change {kind} {name}")

    def delete(self, kind: str, name: str) -> None:
        """Its dependants go first. No error if it is gone already."""
        params = {"propagationPolicy": "Foreground"}
        answer = self._send("DELETE", self._path(kind, name), params=params)
        if answer.code != 404:
            self._object(answer, f"delete {kind} {name}")

    def through_service(
        self,
        service: str,
        port: str,
        method: str,
        path: str,
        headers: Mapping[str, str] | None = None,
        body: Any = None,
    ) -> Answer:
        """A request to a service in the cluster, by way of the API server."""
        base = f"/api/v1/namespaces/{self.namespace}/services/{service}:{port}/proxy"
        answer = self._send(method, base + path, body=body, headers=headers)
        if answer.code >= 400 and '"kind":"Status"' in answer.text.replace(" ", ""):
            raise self._refusal(answer, f"reach services/proxy of {service}")
        return answer

    def may(self, verb: str, group: str, resource: str) -> bool:
        """Whether this user has a right in the namespace."""
        main, _, sub = resource.partition("/")
        asked = {"namespace": self.namespace, "verb": verb, "group": group}
        asked |= {"resource": main, "subresource": sub}
        review = {
            "apiVersion": "authorization.k8s.io/v1",
            "kind": "SelfSubjectAccessReview",
            "metadata": {"name": ""},
            "spec": {"resourceAttributes": asked},
        }
        return bool(self.create(review)["status"]["allowed"])

    def _path(self, kind: str, name: str | None = None, everywhere: bool = False) -> str:
        api, plural = KINDS[kind]
        wide = everywhere or kind in CLUSTER_WIDE
        place = "" if wide else f"/namespaces/{self.namespace}"
        return f"{api}{place}/{plural}" + (f"/{name}" if name else "")

    def _send(
        self,
        method: str,
        path: str,
        params: Mapping[str, str] | None = None,
        body: Any = None,
        headers: Mapping[str, str] | None = None,
    ) -> Answer:
        import httpx2

        content = None if body is None else json.dumps(body)
        given = {"Content-Type": "application/json"} if body is not None else {}
        try:
            response = self._http.request(
                method,
                path,
                params=params,  # None leaves the path's own
                content=content,
                headers={**given, **(headers or {})},
            )
        except httpx2.HTTPError as error:
            words = str(error) or type(error).__name__
            raise ContactLost(
                f"the cluster at {self._http.base_url} does not answer: {words}: check the network "
                "and the kubeconfig"
            ) from error
        return Answer(response.status_code, response.text)

    def _object(self, answer: Answer, deed: str) -> Object:
        if answer.code < 300:
            result: Object = answer.content
            return result
        raise self._refusal(answer, deed)

    def _refusal(self, answer: Answer, deed: str) -> ClusterError:
        try:
            status = answer.content
        except json.JSONDecodeError:
            status = {}
        reason, words = status.get("reason", ""), status.get("message", answer.text.strip()[:300])
        namespace = self.namespace
        if answer.code >= 500:
            return ContactLost(f"the API server cannot {deed} ({answer.code}): {words}: try again")
        if answer.code == 401:
            text = (
                f"the cluster refuses who you are (401): {words}: log in again, or renew the token"
            )
        elif answer.code == 403 and "exceeded quota" in words:
            text = f"quota: {words}: ask for less, or free some"
        elif answer.code == 403:
            text = (
                f"no right to {deed} in {namespace}: {words}: bind the role of k8s/base/rbac.yaml"
            )
        elif answer.code == 404 and "namespaces" in words:
            text = f"there is no namespace {namespace}: make it, or name another --namespace"
        elif answer.code == 404 and not _is_missing_object(answer):
            text = f"the cluster does not know what to {deed}: {words}: {_remedy(deed)}"
        elif "unknown field" in words:
            text = f"the cluster's definitions are too old to {deed}: {words}: {_remedy(deed)}"
        else:
            text = f"the API server refuses to {deed}: {words}"
        return Refused(answer.code, reason, text)


def _is_missing_object(answer: Answer) -> bool:
    """Not a kind that is not installed, for which the answer names no object."""
    try:
        return bool(answer.content.get("details", {}).get("name"))
    except (json.JSONDecodeError, AttributeError):
        return False


def _remedy(deed: str) -> str:
    kind = next((kind for kind in KINDS if f" {kind}" in deed), "RayJob")
    group = KINDS[kind][0].split("/")[2]
    return REMEDIES.get(group, "see k8s/README.md")
