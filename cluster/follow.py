"""Follow a submitted sweep to its end: its story, then its driver's log.

In: a Target and places to print. Out: how it ended. The end of a log, or of contact, is never
taken for the end of the job: only the job's own state is.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, field

from cluster.submission import BEFORE, OVER, JobView, Story
from cluster.target import Target
from orchestrator.errors import ClusterError, ContactLost, NeverStarted
from orchestrator.sweep.run_store import DRIVER_LOG

POLL_S = 2.0
# Long enough for an API server that is being replaced.
LOST_AFTER_S = 60.0
# A cause that does not pass must hold this long: what is observed may be seconds old.
PATIENCE_S = 20.0
# The whole log is read each time, so that nothing depends on a stream's end: the longer, the rarer.
LOG_POLL_S_PER_MIB = 10.0
# The end of what was shown, to tell a log that grew from that of a driver started anew.
REMEMBERED = 256


@dataclass
class Follower:
    target: Target
    name: str
    say: Callable[[str], None]
    sleep: Callable[[float], None] = time.sleep
    clock: Callable[[], float] = time.time
    log: Callable[[str], None] | None = None
    """Takes what the driver has printed, in whole lines; None: say it."""
    _told: set[str] = field(default_factory=set)
    _shown: int = 0
    _tail: str = ""
    _log_due: float = 0.0

    def follow(self) -> JobView:
        """Until it is over.

        Raises:
            NeverStarted: it cannot start; with the cause. One that waits for what may pass is ended
                by the cluster's own deadline.
            ContactLost: the cluster has not answered for a minute, or does not let us look any
                more, such as by a login that has expired.
        """
        started = answered = self.clock()
        hopeless_since: float | None = None
        last: Story | None = None
        while True:
            try:
                story = self.target.story(self.name)
                answered = self.clock()
            except ClusterError as error:
                if last is None and isinstance(error, NeverStarted):
                    raise
                self._lose(error, answered)
                continue
            if story is None:
                return self._gone(last)
            last = story
            self._tell(story, started)
            if story.view.state not in BEFORE:
                self._show_log(is_last=story.view.state in OVER)
            if story.view.state in OVER | {"suspended"}:
                return self._ended(story)
            hopeless_since = (hopeless_since or self.clock()) if story.is_hopeless else None
            self._check_start(story, hopeless_since)
            self.sleep(POLL_S)

    def _lose(self, error: ClusterError, answered: float) -> None:
        """A refusal where it was allowed before says nothing about the job either."""
        self._tell_once(f"lost {answered}", f"no contact, trying again: {error}")
        if self.clock() - answered > LOST_AFTER_S:
            raise ContactLost(str(error)) from error
        self.sleep(POLL_S)

    def _tell(self, story: Story, started: float) -> None:
        for line in story.lines:
            self._tell_once(line.key, line.text, line.time - (story.view.created or started))

    def _tell_once(self, key: str, text: str, at_s: float | None = None) -> None:
        if key in self._told:
            return
        self._told.add(key)
        minutes, rest = divmod(max(0, round(at_s)), 60) if at_s is not None else (0, 0)
        self.say(f"[{minutes}:{rest:02d}] {text}" if at_s is not None else text)

    def _check_start(self, story: Story, hopeless_since: float | None) -> None:
        if story.view.state not in BEFORE or hopeless_since is None:
            return
        if self.clock() - hopeless_since >= PATIENCE_S:
            raise NeverStarted(f"{self.name} cannot start: {story.cause}")

    def _show_log(self, is_last: bool) -> None:
        if not is_last and self.clock() < self._log_due:
            return
        try:
            text = self.target.log(self.name)
        except NeverStarted as error:  # such as a token that is refused: the job runs all the same
            self._tell_once(str(error), f"the driver's log cannot be read: {error}")
            return
        if text is None:
            if is_last:
                self._tell_once("end of log", "the end of the driver's log cannot be read here")
            return
        self._log_due = self.clock() + len(text) / 2**20 * LOG_POLL_S_PER_MIB
        begins = self._shown - len(self._tail)
        if text[begins : self._shown] != self._tail:
            self.say("the driver was started anew, and goes on from its run folder")
            self._shown = 0
        # A line that is not whole yet is shown when it is.
        end = len(text) if is_last else text.rfind("\n") + 1
        if end > self._shown:
            (self.log or self.say)(text[self._shown : end].rstrip("\n"))
            self._shown = end
            self._tail = text[max(0, end - REMEMBERED) : end]

    def _gone(self, last: Story | None) -> JobView:
        if last is None:
            raise NeverStarted(f"there is no job {self.name}: see `orchestrator jobs list`")
        self.say(f"{self.name} was deleted; its run folder is {last.view.run_dir}")
        return JobView(self.name, last.view.sweep, last.view.digest, "stopped", "it was deleted")

    def _ended(self, story: Story) -> JobView:
        view = story.view
        reasons = dict.fromkeys(filter(None, (view.message, story.cause)))
        because = f": {': '.join(reasons)}" if reasons and view.state != "succeeded" else ""
        self.say(f"{self.name} {view.state}{because}")
        if view.run_dir:
            self.say(f"run folder: {view.run_dir} (its driver's log is {DRIVER_LOG})")
        return view
