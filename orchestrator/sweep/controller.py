"""The sweep's controller: applies events to the state, asks the policy, carries its actions out.

In: a RunStore with its trials, an Executor, and a function that builds a PackSpec. Out: a trial
result for every trial, in the run folder. Everything it decides goes to decisions.jsonl first.
"""

import logging
import math
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from orchestrator.errors import DiskFull
from orchestrator.planning.kinds import WorkerKind
from orchestrator.planning.options import Premises
from orchestrator.planning.packs import PackPlan, one_kind, preview_packs
from orchestrator.planning.waiting import Waiting, pack_key
from orchestrator.records import (
    Arithmetic,
    Assign,
    Checkpointed,
    Decision,
    Evaluated,
    Event,
    Leave,
    Notice,
    PackEvent,
    PackLeft,
    PackLost,
    PackPlaced,
    PackQueued,
    PackReady,
    PackSpec,
    Progress,
    Prune,
    SlotTask,
    Standing,
    TrialDone,
    TrialOpened,
    TrialPruned,
    TrialResult,
    TrialSpec,
    TrialStopped,
)
from orchestrator.search.pruning import Verdict
from orchestrator.search.space import num_trials
from orchestrator.sweep.admission import Admission
from orchestrator.sweep.executor import Executor
from orchestrator.sweep.expectations import check_none_waits
from orchestrator.sweep.lessons import heeding
from orchestrator.sweep.losses import Loads, check_none_held, remedy, slot_limits
from orchestrator.sweep.own_share import OwnShare
from orchestrator.sweep.pace import Pace
from orchestrator.sweep.pack_views import Packs
from orchestrator.sweep.policy import (
    AbandonPack,
    Action,
    AssignTrial,
    ReleasePack,
    StartPack,
    SweepView,
    YieldPack,
    decide,
)
from orchestrator.sweep.reach import with_reach
from orchestrator.sweep.results import failed_result, finished_result, pruned_result
from orchestrator.sweep.run_store import RunStore
from orchestrator.sweep.running import (
    RunningPack,
    plan_record,
    ready_notes,
    standing,
    why_resumed,
)
from orchestrator.sweep.sharing import Alone
from orchestrator.sweep.silence import Silences
from orchestrator.sweep.verdicts import recall_pruning, verdict_facts

POLL_S = 0.5
# How long packs may take to save and leave after Ctrl-C: a step and a checkpoint, not an epoch.
LEAVE_TIMEOUT_S = 60.0
LEFT_EVERY_S = 10.0

log = logging.getLogger(__name__)

AskTrial = Callable[[list[TrialSpec], list[TrialResult]], TrialSpec | None]
BuildPack = Callable[[int, PackPlan], PackSpec]
Observer = Callable[[Notice], None]


class Controller:
    def __init__(
        self,
        store: RunStore,
        executor: Executor,
        ask: AskTrial,
        build_pack: BuildPack,
        num_workers: int,
        premises: Premises,
        observe: Observer = lambda notice: None,
        kinds: tuple[WorkerKind, ...] = (),
        pace: Pace | None = None,
        leave_timeout_s: float = LEAVE_TIMEOUT_S,
        own_share: OwnShare | None = None,
    ) -> None:
        """`kinds` of the workers, the fastest first; empty where all are alike. `pace`: what is
        known of their speed; it learns."""
        self._store = store
        self._executor = executor
        self._ask = ask
        self._build_pack = build_pack
        self._num_workers = num_workers
        self._premises = heeding(premises, store.decisions)
        self._pace = pace or Pace()
        self._pace.recall(store.pack_events)
        self._planned_kinds = kinds
        self._kinds = self._pace.speeds(kinds)
        self._waiting = Waiting(in_turn=premises.in_turn)
        for trial, max_slots in slot_limits(store.decisions).items():
            self._waiting.limit(trial, max_slots)
        self._observe = observe
        self._leave_timeout_s = leave_timeout_s
        self._own_share = own_share or OwnShare(Alone())
        config = store.sweep.config
        self._silences = Silences(config.resources.hang_after_s, time.monotonic())
        self._max_restarts = config.max_restarts
        alike = one_kind(num_workers, premises)
        self._admission = Admission(premises, config.search.constraints, kinds or alike)
        self._num_trials = num_trials(config.search)
        self._trials = {trial.number: trial for trial in store.trials}
        self._results = {result.number: result for result in store.results}
        self._losses: dict[int, int] = {}  # worker losses by trial
        self._had: dict[int, Arithmetic] = {}  # of trials that have a checkpoint to go on from
        for number in self._trials.keys() - self._results.keys():
            self._note_checkpoint(number)
        self._pruning = recall_pruning(store)
        # Trained to their end, while a verdict at one of their rungs is still due.
        self._done = {
            number: event
            for number, event in store.done_events.items()
            if number not in self._results
        }
        for number in self._done:
            self._pruning.end(number)
        self._packs: dict[int, RunningPack] = {}
        self._views = Packs()
        self._moved = True  # some trial has begun or ceased to wait
        self._states: Counter[str] = Counter(result.state for result in self._results.values())
        self._next_pack = 0
        self._loads = Loads()
        self._stop_at: float | None = None
        self._told: Standing | None = None
        self._left_s: float | None = None
        self._left_due = 0.0

    def request_stop(self) -> None:
        """Save all slots at their next report and end; callable from a signal handler."""
        self._stop_at = time.monotonic() + self._leave_timeout_s

    def run(self) -> bool:
        """Train until every trial is over; False if it was asked to stop before that.

        Raises:
            ConfigError: a trial that is not over does not suit the settings of this start, or waits
                for workers that there are not.
            DiskFull: a worker could not write.
        """
        for result in self._results.values():
            self._store.drop_files(result)  # where its sweep was killed before it could
        for refused in self._admission.refused_stored(self._view().waiting):
            self._end(refused)
        self._decided("start", "sweep", f"{len(self._results)} trials are over already")
        self._ask_for_trials()
        self._premises = with_reach(self._store, self._view(), self._pace.durations)
        self._write_plan()
        while True:
            self._judge()
            if self._stop_at is None:
                # Full packs wait for no decision, and to ask a sampler that learns takes a while.
                if not self._own_share.is_exceeded:
                    self._let_packs_go_on(full=True)
                self._ask_for_trials()
                if news := self._own_share.ask(self._view):
                    self._decided("share", "sweep", news)
            for action in decide(self._view()):
                self._carry_out(action)
            self._let_packs_go_on()
            self._tell_standing()
            if not self._packs:
                if self._stop_at is not None or not self._own_share.holds_back(self._view()):
                    break
                time.sleep(POLL_S)
            answers = self._executor.poll(POLL_S)
            self._silences.pass_time(time.monotonic())
            for pack, events in answers:
                self._take(pack, events)
            self._give_up_hung()
            self._give_up_leaving()
        if self._stop_at is None:
            unfinished = (t for n, t in self._trials.items() if n not in self._results)
            check_none_held(self._loads.held, unfinished)
            check_none_waits(self._view().waiting, self._view().all_kinds)
        return self._stop_at is None

    def _ask_for_trials(self) -> None:
        """Keep the sampler's supply ahead of free slots; `ask` says None when there is no more."""
        while trial := self._ask(list(self._trials.values()), list(self._results.values())):
            refused = self._admission.refused_new(trial)
            self._store.add_trial(trial, refused)
            self._trials[trial.number] = trial
            self._moved = True
            self._pruning.add(trial)
            if refused:
                self._is_over(refused)

    def _judge(self) -> None:
        """Give the verdicts that are due at rungs, and end what they settle."""
        for verdict in self._pruning.decide():
            action = "keep_trial" if verdict.keep else "stop_trial"
            self._decided(action, f"trial {verdict.trial}", verdict.reason, verdict_facts(verdict))
        for verdict in self._pruning.stopped():
            if verdict.trial not in self._results:
                self._stop_trial(verdict)
        for number, event in list(self._done.items()):
            if self._pruning.is_settled(number):
                del self._done[number]
                self._end(finished_result(self._store, event))

    def _stop_trial(self, verdict: Verdict) -> None:
        trial = verdict.trial
        saving = None
        for number, pack in self._packs.items():
            if trial in pack.attempts:
                # Before what is assigned next, so that the slot is free for it at once.
                pack.directives.insert(0, Prune(trial))
                self._close(number, pack, trial)
                saving = None if pack.idle else pack
        self._done.pop(trial, None)
        result = pruned_result(self._store, verdict, time.time())
        self._end(result, saving)
        self._observe(
            TrialPruned(trial, result.time, verdict.rung, verdict.eval_loss, verdict.reason)
        )

    def _write_plan(self) -> None:
        """The packs that this start of the sweep begins with, if no other sweep limits it; what
        follows is in the decisions."""
        packs = preview_packs(
            self._view().waiting, self._num_workers, self._premises, self._had, self._kinds
        )
        self._store.write("plan", plan_record(packs, self._num_workers, self._pace.factors))

    def _view(self) -> SweepView:
        if self._moved:  # reports are many, and most move none
            taken = {number for pack in self._packs.values() for number in pack.attempts}
            over = self._results.keys() | self._done.keys()
            waiting = self._trials.keys() - taken - over
            if held := self._loads.held:
                waiting = {n for n in waiting if pack_key(self._trials[n].config) not in held}
            self._waiting.keep_to(waiting, self._trials)
            self._moved = False
        self._views.keep_to({number: pack.view(number) for number, pack in self._packs.items()})
        view = SweepView(
            self._waiting,
            self._views,
            self._num_workers,
            self._premises,
            interrupted=self._stop_at is not None,
            had=self._had,
            kinds=self._kinds,
            queued=frozenset(number for number, pack in self._packs.items() if pack.queued),
        )
        return self._own_share.limited(view)

    def _carry_out(self, action: Action) -> None:
        match action:
            case StartPack(plan):
                number = self._next_pack
                self._next_pack += 1
                self._decided("start_pack", f"pack {number}", action.reason)
                pack = self._packs[number] = RunningPack(plan)
                self._happened(number, "start", **pack.as_planned)
                self._pace.start(number, plan)
                self._silences.start(number, plan.num_slots)
                self._executor.start_pack(self._build_pack(number, plan))
            case AssignTrial(pack, trial):
                self._decided("assign", f"trial {trial}", action.reason)
                self._assign(self._packs[pack], self._trials[trial])
            case ReleasePack(pack, save):
                self._decided("release_pack", f"pack {pack}", action.reason)
                self._packs[pack].directives.append(Leave(save))
            case YieldPack(pack):
                self._decided("yield_pack", f"pack {pack}", action.reason)
                if self._packs[pack].ready:
                    self._packs[pack].directives.append(Leave(save=True))
                    self._packs[pack].leave_by = time.monotonic() + self._leave_timeout_s
                else:
                    self._end_pack(pack)
            case AbandonPack(pack):
                self._decided("release_pack", f"pack {pack}", action.reason)
                self._end_pack(pack)

    def _assign(self, pack: RunningPack, trial: TrialSpec) -> None:
        # Not those beyond a rung whose report was lost: the trial must come by there again.
        rung = self._pruning.first_open_rung(trial.number)
        checkpoints = tuple(map(str, self._store.checkpoints(trial.number, before=rung)))
        attempt, folder = self._store.start_attempt(trial.number, pack.plan.arithmetic)
        pack.attempts[trial.number] = attempt
        self._moved = True
        rungs = self._pruning.rungs(trial.number)
        pack.directives.append(
            Assign(SlotTask(trial.number, attempt, trial.config, str(folder), checkpoints, rungs))
        )

    def _let_packs_go_on(self, full: bool = False) -> None:
        for number, pack in self._packs.items():
            if pack.idle and (not full or len(pack.attempts) == pack.plan.num_slots):
                directives, pack.directives, pack.idle = pack.directives, [], False
                self._executor.advance(number, directives)

    def _tell_standing(self) -> None:
        now = standing(len(self._trials), self._states, self._packs)
        if now != self._told:
            self._told = now
            self._observe(replace(now, left_s=self._left()))

    def _left(self) -> float | None:
        """Seconds; looked up now and then, as there may be thousands of trials in slots."""
        if time.monotonic() >= self._left_due:
            self._left_due = time.monotonic() + LEFT_EVERY_S
            view, unasked = self._view(), max(0, self._num_trials - len(self._trials))
            self._left_s = self._pace.left_s(
                self._waiting, self._packs.values(), self._trials, unasked, view.all_kinds
            )
        return self._left_s

    def _take(self, number: int, events: list[Event]) -> None:
        if number not in self._packs:
            return  # an answer that was under way when the pack was given up
        pack = self._packs[number]
        pack.idle = not any(isinstance(event, PackQueued | PackPlaced) for event in events)
        pack.at_rung = any(isinstance(e, Evaluated | Checkpointed) and e.step > 0 for e in events)
        self._silences.hear(number, events)
        for event in events:
            if getattr(event, "trial", None) in self._results:
                continue  # it was stopped while this was under way
            self._measure(number, pack, event)
            self._apply(number, pack, event)
            self._observe(event)
        if pack.idle:
            self._drop_stopped(pack)

    def _measure(self, number: int, pack: RunningPack, event: Event) -> None:
        """Before the event is applied: so many slots were at work until then."""
        facts = self._pace.take(number, pack.plan, len(pack.attempts), event, self._trials)
        if facts is None:
            return
        self._happened(number, "measured", **facts)
        if reason := self._pace.learn(number, facts):
            self._decided("learn_speed", f"{facts['base']} on {facts['gpu']}", reason)
            self._kinds = self._pace.speeds(self._planned_kinds)
            self._left_due = 0.0

    def _apply(self, number: int, pack: RunningPack, event: Event) -> None:
        match event:
            case PackQueued():
                pack.queued = True
                self._decided("pack_queued", f"pack {number}", event.reason)
            case PackPlaced():
                pack.queued = False
            case PackReady():
                pack.ready, pack.queued = True, False
                self._loads.ready(pack.plan.key.unlimited)
                self._happened(number, "ready")
                for note in ready_notes(event):
                    self._decided("pack_ready", f"pack {number}", note)
            case TrialOpened():
                facts = {
                    name: getattr(event, name) for name in ("trial", "attempt", "slot", "node")
                }
                self._happened(number, "opened", **facts)
                if reason := why_resumed(event):
                    self._decided("resume_trial", f"trial {event.trial}", reason)
            case Progress():
                self._store.add_point(event)
            case Evaluated():
                self._store.add_point(event)
                self._pruning.report(event.trial, event.step, event.eval_loss)
            case TrialDone():
                # It may be that an earlier rung's verdict is still due: see _judge.
                self._store.add_done_event(event)
                self._close(number, pack, event.trial, event.peak_memory_bytes)
                self._pruning.end(event.trial)
                self._done[event.trial] = event
            case TrialStopped():
                self._close(number, pack, event.trial)
                self._end(failed_result(event.trial, event.attempt, event.reason, event.message))
            case PackLeft():
                self._end_pack(number)
            case PackLost():
                self._lost(event)

    def _close(self, number: int, pack: RunningPack, trial: int, peak: int | None = None) -> None:
        attempt = pack.attempts.pop(trial)
        self._happened(number, "closed", trial=trial, attempt=attempt, peak_bytes=peak)

    def _end_pack(self, number: int) -> None:
        self._moved = True
        self._executor.stop_pack(number)
        self._drop_stopped(pack := self._packs.pop(number))
        for trial in pack.attempts:
            self._note_checkpoint(trial)
        self._silences.end(number)
        self._happened(number, "ended")

    def _drop_stopped(self, pack: RunningPack) -> None:
        """Call it when nothing of the pack is at work."""
        while pack.stopped:
            self._store.drop_files(pack.stopped.pop())

    def _lost(self, event: PackLost) -> None:
        pack = self._packs[event.pack]
        at_work = len(pack.attempts) + len(pack.stopped)
        self._end_pack(event.pack)
        if event.reason == "disk_full":
            raise DiskFull(f"the disk is full: {event.message}")
        trials = dict(pack.attempts)
        key = pack.plan.key.unlimited
        if not pack.ready and not self._loads.may_go_on(key, self._next_pack, self._packs):
            # The base could not be loaded anywhere: whatever waits for it shares the loss. With
            # another pack of its kind at work, the machine was at fault, and the trials wait on.
            trials |= {t.number: 0 for t in self._view().waiting if pack_key(t.config) == key}
        found = remedy(pack.plan, pack.attempts.keys(), at_work, event, self._premises, self._kinds)
        self._premises = found.premises
        if found.action:
            self._decided(found.action, f"pack {event.pack}", found.reason, found.facts)
        for trial, attempt in trials.items():
            losses = self._losses[trial] = self._losses.get(trial, 0) + found.counted
            if not found.retried:
                self._end(failed_result(trial, attempt, event.reason, event.message))
            elif losses > self._max_restarts:
                message = f"{event.message} ({losses} times, max_restarts={self._max_restarts})"
                begun = (pack_key(self._trials[number].config) for number in self._had)
                if pack.ready or not self._loads.hold(key, event, message, begun):
                    self._end(failed_result(trial, attempt, event.reason, message))
                self._moved = True
            else:
                reason = f"its pack is lost: {event.reason}: {event.message}"
                self._decided("retry_trial", f"trial {trial}", reason)
                if found.max_slots is not None:
                    self._waiting.limit(trial, found.max_slots)

    def _note_checkpoint(self, trial: int) -> None:
        """Call it when the trial begins to wait: only an attempt adds checkpoints."""
        if had := self._store.arithmetic(trial):
            self._had[trial] = had

    def _end(self, result: TrialResult, saving: RunningPack | None = None) -> None:
        """`saving`: a pack that may be writing the trial's files, until it answers."""
        self._store.finish_trial(result)
        if saving is None:
            self._store.drop_files(result)
        else:
            saving.stopped.append(result)
        self._is_over(result)

    def _is_over(self, result: TrialResult) -> None:
        self._results[result.number] = result
        self._states[result.state] += 1
        self._moved = True
        self._pruning.end(result.number)
        reason = result.message or f"held-out loss {result.eval_loss:.4f}"
        self._decided("end_trial", f"trial {result.number}", f"{result.state}: {reason}")

    def _give_up_hung(self) -> None:
        for number, reason in self._silences.hung():
            self._decided("give_up_pack", f"pack {number}", reason)
            self._lost(PackLost(number, "worker_lost", reason))

    def _give_up_leaving(self) -> None:
        now, stop_at = time.monotonic(), math.inf if self._stop_at is None else self._stop_at
        for number, pack in list(self._packs.items()):
            # One that has answered is about to be told to save and leave.
            if now >= min(stop_at, pack.leave_by) and not pack.idle:
                reason = f"it did not save within {self._leave_timeout_s:.0f} s of being asked to"
                self._decided("give_up_pack", f"pack {number}", reason)
                self._end_pack(number)

    def _happened(self, pack: int, what: str, **facts: Any) -> None:
        self._store.add_pack_event(PackEvent(time.time(), what, pack, **facts))

    def _decided(
        self, action: str, subject: str, reason: str, facts: dict[str, Any] | None = None
    ) -> None:
        log.info("%s: %s: %s", subject, action, reason)
        decision = Decision(time.time(), action, subject, reason, facts or {})
        self._store.add_decision(decision)
        self._observe(decision)
