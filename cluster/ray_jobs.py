"""Ray's job API: a few verbs over HTTP, the same for any cluster, however it is reached.

In: a `Send`, which carries a request to a Ray dashboard. Out: Ray's own records, or an error in our
words. Ray itself is not imported: the cluster's version need not be this machine's.
"""

import json
import os
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

from cluster.submission import NO_ROOM, JobState, JobView
from orchestrator.errors import ClusterError, ConfigError, ContactLost, NeverStarted

TIMEOUT_S = 30.0
NO_AGENT = "No available agent to submit job"
# The dashboard itself waits some seconds for one before it answers so.
AGENT_TIMEOUT_S = 45.0
AGENT_POLL_S = 1.0
# Of its state API; more than packs of any sweep.
MAX_ACTORS = 10_000
WORKER = re.compile(r"pack (\d+) worker (\d+)")
SWEEP = "qlora_orchestrator_sweep"
DIGEST = "qlora_orchestrator_config_digest"
RUN_DIR = "qlora_orchestrator_run_dir"
# Ray's words -> ours.
STATES: dict[str, JobState] = {
    "PENDING": "starting",
    "RUNNING": "running",
    "SUCCEEDED": "succeeded",
    "FAILED": "failed",
    "STOPPED": "stopped",
}


@dataclass(frozen=True)
class Answer:
    code: int
    text: str

    @property
    def content(self) -> Any:
        return json.loads(self.text)


Send = Callable[[str, str, Any], Answer]
"""Method, path and JSON body -> answer. Raises ContactLost."""


class RayJobs:
    def __init__(self, send: Send, sleep: Callable[[float], None] = time.sleep) -> None:
        self._send = send
        self._sleep = sleep

    def submit(self, job: str, entrypoint: str, metadata: Mapping[str, str]) -> None:
        """Waits for a cluster that was just started and has no agent for jobs yet."""
        body = {"submission_id": job, "entrypoint": entrypoint, "metadata": dict(metadata)}
        deadline = time.monotonic() + AGENT_TIMEOUT_S
        while True:
            answer = self._send("POST", "/api/jobs/", body)
            if NO_AGENT not in answer.text or time.monotonic() >= deadline:
                _checked(answer)
                return
            self._sleep(AGENT_POLL_S)

    def info(self, job: str) -> dict[str, Any] | None:
        answer = self._send("GET", f"/api/jobs/{job}", None)
        if answer.code == 404:
            return None
        content: dict[str, Any] = _checked(answer)
        return content

    def list(self) -> "list[dict[str, Any]]":
        jobs: list[dict[str, Any]] = self._ask("GET", "/api/jobs/")
        return jobs

    def log(self, job: str) -> str:
        """All that the driver has printed."""
        return str(self._ask("GET", f"/api/jobs/{job}/logs")["logs"])

    def workers(self, job: str) -> Sequence["RayWorker"]:
        """Of the job's packs, as long as Ray remembers them."""
        driver = (self.info(job) or {}).get("job_id")
        if driver is None:  # it has not attached to Ray yet
            return []
        query: dict[str, Any] = {"limit": MAX_ACTORS, "detail": True}
        query |= {"filter_keys": "job_id", "filter_predicates": "=", "filter_values": driver}
        answer = self._ask("GET", f"/api/v0/actors?{urlencode(query)}")
        actors = [ray_worker(actor) for actor in answer["data"]["result"]["result"]]
        found = [actor for actor in actors if actor is not None]
        return sorted(found, key=lambda worker: (worker.pack, worker.world_rank, worker.is_alive))

    def worker_log(self, job: str, pack: int, world_rank: int) -> str:
        """What a worker of a pack has printed, its errors last; of several, the one that lives.

        Raises:
            ConfigError: there is no such worker; with those that there are.
        """
        workers = self.workers(job)
        meant = [w for w in workers if (w.pack, w.world_rank) == (pack, world_rank)]
        if not meant:
            known = dict.fromkeys(f"{worker.pack}.{worker.world_rank}" for worker in workers)
            raise ConfigError(
                f"there is no worker {pack}.{world_rank} that Ray remembers, but "
                f"{', '.join(known) or 'none'}: name one of them with --worker"
            )
        texts = []
        for suffix in ("out", "err"):
            query = {"actor_id": meant[-1].actor, "suffix": suffix, "lines": -1}
            answer = self._send("GET", f"/api/v0/logs/file?{urlencode(query)}", None)
            if answer.code >= 300:
                raise ClusterError(
                    f"the log of worker {pack}.{world_rank} of {job} cannot be read: "
                    f"{_error(answer.text)}: it goes with its node"
                )
            texts.append(answer.text)
        return "".join(texts)

    def stop(self, job: str) -> None:
        """Its driver gets SIGTERM, and SIGKILL after RAY_JOB_STOP_WAIT_TIME_S of the cluster."""
        self._ask("POST", f"/api/jobs/{job}/stop")

    def _ask(self, method: str, path: str, body: Any = None) -> Any:
        return _checked(self._send(method, path, body))


@dataclass(frozen=True)
class RayWorker:
    """A worker of a pack, as Ray's state API shows it."""

    pack: int
    world_rank: int
    actor: str
    is_alive: bool


def ray_worker(actor: Mapping[str, Any]) -> RayWorker | None:
    """None: an actor that does something else."""
    found = WORKER.fullmatch(actor.get("repr_name") or "")
    if found is None:
        return None
    return RayWorker(int(found[1]), int(found[2]), actor["actor_id"], actor["state"] == "ALIVE")


def job_and_number(info: Mapping[str, Any]) -> tuple[str, int]:
    """Of `sums.2`: sums, which was sent for the second time. Of a driver without a job: none."""
    job = info.get("submission_id") or ""
    found = re.fullmatch(r"(.+)\.(\d+)", job)
    return (found[1], int(found[2])) if found else (job, 1)


def job_view(info: Mapping[str, Any]) -> JobView:
    metadata = info.get("metadata") or {}
    state = STATES[info["status"]]
    code = info.get("driver_exit_code")
    has_no_driver = code is None and info.get("driver_agent_http_address") is None
    return JobView(
        name=job_and_number(info)[0],
        sweep=metadata.get(SWEEP, ""),
        digest=metadata.get(DIGEST, ""),
        state=state,
        message="" if state == "running" else _first_line(info.get("message") or ""),
        run_dir=metadata.get(RUN_DIR, ""),
        created=(info.get("start_time") or 0) / 1000 or None,
        exit_code=code,
        never_ran=state == "failed" and (has_no_driver or code == NO_ROOM),
    )


def dashboard(address: str) -> Send:
    """Requests to a dashboard at `http://HOST:PORT`, with the token that Ray's own client takes."""
    import httpx2

    headers = {"X-Ray-Authorization": f"Bearer {token}"} if (token := _token()) else {}
    http = httpx2.Client(base_url=address.rstrip("/"), headers=headers, timeout=TIMEOUT_S)

    def send(method: str, path: str, body: Any) -> Answer:
        try:
            response = http.request(method, path, json=body)
        except (httpx2.HTTPError, httpx2.InvalidURL) as error:
            words = str(error) or type(error).__name__
            raise ContactLost(
                f"the Ray cluster at {address} does not answer: {words}: check the address of its "
                "dashboard, usually port 8265"
            ) from error
        return Answer(response.status_code, response.text)

    return send


def _token() -> str:
    if token := os.environ.get("RAY_AUTH_TOKEN"):
        return token
    path = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or "~/.ray/auth_token").expanduser()
    return path.read_text().strip() if path.is_file() else ""


def _checked(answer: Answer) -> Any:
    if answer.code < 300:
        try:
            return answer.content if answer.text else None
        except json.JSONDecodeError as error:
            raise NeverStarted(
                f"what answers is no Ray dashboard: {answer.text.strip()[:80]!r}: check the address"
            ) from error
    words = _error(answer.text)
    if answer.code in (401, 403):
        raise NeverStarted(
            f"the Ray cluster refuses the token ({answer.code}): {words}: set RAY_AUTH_TOKEN, or "
            "the secret of the cluster's authOptions"
        )
    if answer.code in (502, 503, 504) or NO_AGENT in words:
        raise ContactLost(f"the Ray dashboard does not answer ({answer.code}): {words}")
    raise ClusterError(f"the Ray cluster refuses ({answer.code}): {words}")


def _first_line(text: str) -> str:
    return text.strip().splitlines()[0] if text.strip() else ""


def _error(text: str) -> str:
    """What a traceback of the dashboard, of its agent within, or a plain text says."""
    found = re.findall(r"^\w*(?:Error|Exception): (.+)$", text, re.MULTILINE)
    lines = found or text.strip().splitlines() or [""]
    return str(lines[-1])[:300]
