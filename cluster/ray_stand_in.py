"""A stand-in for a Ray dashboard's job API: jobs in memory, driven by the test that holds it.

In: requests as RayJobs sends them. Out: answers as Ray's dashboard gives them. It runs nothing: a
test says what a driver prints and how it ends.
"""

import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qsl

from cluster.ray_jobs import Answer

if TYPE_CHECKING:
    import httpx2

OVER = ("SUCCEEDED", "FAILED", "STOPPED")


@dataclass
class RayStandIn:
    token: str = ""
    """What requests must carry, if anything."""
    jobs: dict[str, dict[str, Any]] = field(default_factory=dict)
    logs: dict[str, str] = field(default_factory=dict)
    actors: list[dict[str, Any]] = field(default_factory=list)
    """As the state API lists them; what each has printed is in its `out` and `err`."""

    def send(self, method: str, path: str, body: Any) -> Answer:
        """A `Send` of ray_jobs.py."""
        parts, _, query = path.partition("?")
        if parts.startswith("/api/v0/"):
            return self._state(parts.removeprefix("/api/v0/"), dict(parse_qsl(query)))
        return self._answer(method, parts.strip("/").split("/")[2:], body)

    def handle(self, request: "httpx2.Request", path: str) -> "httpx2.Response":
        """Behind the service proxy of the Kubernetes stand-in."""
        import httpx2

        if self.token and request.headers.get("X-Ray-Authorization") != f"Bearer {self.token}":
            return httpx2.Response(401, text="Unauthorized: the authentication token is invalid")
        body = json.loads(request.content) if request.content else None
        answer = self.send(request.method, path, body)
        return httpx2.Response(answer.code, text=answer.text)

    def start(self, job: str) -> None:
        self._set(job, status="RUNNING", message="Job is currently running.")
        self.logs.setdefault(job, "")

    def print(self, job: str, text: str) -> None:
        self.logs[job] += text

    def end(self, job: str, status: str, driver_exit_code: int | None = None) -> None:
        self._set(job, status=status, driver_exit_code=driver_exit_code)

    def _state(self, what: str, query: dict[str, str]) -> Answer:
        if what == "actors":
            of_job = [a for a in self.actors if a["job_id"] == query["filter_values"]]
            return _json({"result": True, "data": {"result": {"result": of_job}}})
        for actor in self.actors:
            if actor["actor_id"] == query["actor_id"]:
                return Answer(200, actor[query["suffix"]])
        return Answer(500, f"Actor ID {query['actor_id']} not found.")

    def _answer(self, method: str, parts: list[str], body: Any) -> Answer:
        match method, parts:
            case "GET", []:
                return _json(list(self.jobs.values()))
            case "POST", []:
                return self._submit(body)
            case _, [job, *_] if job not in self.jobs:
                return Answer(404, f"Job {job} does not exist")
            case "GET", [job]:
                return _json(self.jobs[job])
            case "GET", [job, "logs"]:
                entrypoint = self.jobs[job].get("entrypoint", "")
                first = f"Running entrypoint for job {job}: {entrypoint}\n"
                return _json({"logs": first + self.logs.get(job, "")})
            case "POST", [job, "stop"]:
                stopped = self.jobs[job]["status"] not in OVER
                if stopped:
                    self.end(job, "STOPPED")
                return _json({"stopped": stopped})
        return Answer(405, f"Method {method} is not allowed")

    def _submit(self, body: dict[str, Any]) -> Answer:
        job = body["submission_id"]
        if job in self.jobs:
            words = f"ValueError: Job with submission_id {job} already exists. Please use another."
            return Answer(500, f"Traceback (most recent call last):\n{words}\n.")
        self.jobs[job] = {**body, "status": "PENDING", "message": "Job has not started yet."}
        self.jobs[job] |= {"start_time": 1_700_000_000_000, "driver_exit_code": None}
        return _json({"submission_id": job})

    def _set(self, job: str, **changes: Any) -> None:
        self.jobs.setdefault(job, {"submission_id": job}).update(changes)


def _json(content: Any) -> Answer:
    return Answer(200, json.dumps(content))
