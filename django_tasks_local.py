# SPDX-License-Identifier: MIT
"""Run the tasks of a Django site in threads or child processes of the web process.

One file, to install or to copy. Its manual is the README.md beside the original.

The way of a task, with the names of this file::

    backend.enqueue() ---> _Pool.submit() ---> _Queue.put()
                               |                   |
                        _Results.add()        _Queue.get()
                               |                   v
    backend.get_result() <-- _Results <----- _Pool.run() in a worker thread:
          a copy             READY             prepare()  a child, for processes
                             RUNNING           change(), tell() task_started
                                               execute()  here, or in the child
                             SUCCESSFUL        finish():  change(), tell()
                             or FAILED         task_finished, settle()

1. One ``_Pool`` for each alias serves all backend instances of it. To build a backend
   starts nothing; the first task starts a thread.
2. A result is Django's TaskResult. ``_Results`` changes its own, all others have copies.
   *Finished* is SUCCESSFUL or FAILED. *Settled* is finished, with the receivers of
   ``task_finished`` done: only then do those wake who wait for the result.
3. A task that will not run is *abandoned*: FAILED, with the reason.
4. Workers belong to a queue. ``close()``, other options and changed settings *close* it:
   its workers leave once it is empty, and the next task opens another one.
5. Queue and results live in the parent for both backends. A child process is the tool
   of one worker: if it dies, that one task fails. Section 7 lists their messages.
6. The exit of the process waits for the work, then abandons the rest: ``_shutdown``.

Locks: ``_Pool.lock``, one for each alias, guards its results, queues and workers.
``_children_lock`` guards ``_children`` and keeps forks away from the start of a child.
``_Parent.lock``, in a child, lets one thread at a time talk to the parent. Under none of
them is another one taken, a signal sent or a task called. They are re-entrant: a signal
handler or ``__del__`` may call a backend between any two lines.

Private interfaces: ``threading._register_atexit`` (the exit has to wait before Python
ends its executors), ``atexit._run_exitfuncs`` (children skip it before Python 3.13),
``multiprocessing.process._children`` (a forked copy must not join them) and Django's
``TaskResult._return_value``.

All of it is in memory: a killed process loses it. With threads only, skip section 7.
"""

from __future__ import annotations

import asyncio
import atexit
import concurrent.futures.process  # Its exit hook has to be there before ours.
import contextvars
import functools
import heapq
import importlib
import inspect
import itertools
import json
import logging
import multiprocessing.util
import os
import pickle
import shutil
import signal
import socket
import sys
import threading
import time
import traceback
import uuid
from collections import OrderedDict
from contextlib import contextmanager, suppress
from dataclasses import dataclass, fields, replace
from datetime import datetime, timedelta

import asgiref.sync
import django
from django.conf import settings
from django.core.cache import caches
from django.core.signals import setting_changed
from django.db import connections, transaction
from django.utils import timezone
from django.utils.module_loading import import_string

if django.VERSION >= (6, 0):
    from django import tasks
    from django.tasks import exceptions, signals
    from django.tasks.backends.base import BaseTaskBackend
    from django.tasks.base import Task, TaskError
    from django.utils.json import normalize_json
else:
    import django_tasks as tasks
    from django_tasks import exceptions, signals
    from django_tasks.backends.base import BaseTaskBackend
    from django_tasks.base import Task, TaskError
    from django_tasks.utils import normalize_json

TaskResult, Status = tasks.TaskResult, tasks.TaskResultStatus
DoesNotExist, _NAMES = exceptions.TaskResultDoesNotExist, vars(exceptions)
InvalidTask = _NAMES.get("InvalidTask") or _NAMES["InvalidTaskError"]  # The backport.
InvalidBackend = _NAMES.get("InvalidTaskBackend") or _NAMES["InvalidTaskBackendError"]

__all__ = [
    "LocalTask",
    "ProcessPoolBackend",
    "TaskQueueFull",
    "ThreadPoolBackend",
    "current_result_id",
]
__version__ = "2.0.0"
logger = logging.getLogger("django_tasks_local")
current_result_id = contextvars.ContextVar("current_result_id")
"""The id of the running task's result; ``LookupError`` where no task runs."""


class TaskQueueFull(exceptions.TaskException):
    """``MAX_PENDING`` tasks are waiting already; this one was not enqueued."""


# --- 1. Options: TASKS[alias], checked ------------------------------------------------


def _is_count(value):
    return type(value) is int and value > 0


def _is_seconds(value):
    return type(value) in (int, float) and 0 <= value <= 1_000_000


def _is_shared_cache(value):
    backend = dict(settings.CACHES).get(value, {}).get("BACKEND", "DummyCache")
    return not backend.endswith(("LocMemCache", "DummyCache"))


_START_METHODS = multiprocessing.get_all_start_methods()
_START_METHODS = [name for name in ("forkserver", "spawn") if name in _START_METHODS]
_CACHE = "an alias of CACHES that processes share: no local-memory or dummy cache"
_OPTIONS = {
    # name: (default, whether a value is right, what is right)
    "MAX_WORKERS": (10, _is_count, "a positive integer"),
    "MAX_RESULTS": (1000, _is_count, "a positive integer"),
    "MAX_PENDING": (None, _is_count, "None or a positive integer"),
    "SHUTDOWN_TIMEOUT": (None, _is_seconds, "None or seconds, 0 to 1e6"),
    "RESULTS_CACHE": (None, _is_shared_cache, f"None or {_CACHE}"),
}
_PROCESS_OPTIONS = {
    "TASK_TIMEOUT": (None, lambda v: _is_seconds(v) and v, "None or seconds up to 1e6"),
    "MAX_TASKS_PER_CHILD": (None, _is_count, "None or a positive integer"),
    "START_METHOD": (None, _START_METHODS.count, f"None or one of {_START_METHODS}"),
    "INITIALIZER": (None, lambda v: "." in str(v), "None or a dotted path"),
}
_UNKNOWN = ("", ().count, "left out (perhaps it stands beside, such as QUEUES)")


def _read_options(alias, params, allowed):
    """Return the options in TASKS[alias], with defaults. Raise InvalidTaskBackend."""
    place, given = f"TASKS[{alias!r}]['OPTIONS']", params.get("OPTIONS", {})
    if not isinstance(given, dict):
        raise InvalidBackend(f"{place} must be a dict, got {given!r}")
    for name in params.keys() & (_OPTIONS | _PROCESS_OPTIONS):
        raise InvalidBackend(f"{name!r} (got {params[name]!r}) belongs in {place}")
    for name, value in given.items():
        default, is_right, right = allowed.get(name, _UNKNOWN)
        if not is_right(value) and not value is default is None:
            raise InvalidBackend(
                f"{place}: {name!r} must be {right}, got {value!r}. Options of this "
                f"backend are {', '.join(allowed)}"
            )
    return {name: default for name, (default, _, _) in allowed.items()} | given


def _database(place, value):
    """Return the alias of the database whose commit enqueues, or None."""
    database = "default" if value is True else value
    if value is False or (type(database) is str and database in connections.settings):
        return database or None
    right = "False, True or an alias of DATABASES"
    raise InvalidBackend(f"{place} must be {right}, got {value!r}")


# --- 2. The backends ------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class LocalTask(Task):
    """Django's Task; its ``run_after`` may be a timedelta, counted from now.

    ``enqueue_on_commit`` overrides ``ENQUEUE_ON_COMMIT`` for the task.
    """

    enqueue_on_commit: bool | str | None = None

    def __post_init__(self):
        if isinstance(self.run_after, timedelta):
            _change(self, run_after=timezone.now() + self.run_after)
        Task.__post_init__(self)


class _PoolBackend(BaseTaskBackend):
    """What both backends have in common. The async methods are those of the base."""

    task_class = LocalTask
    supports_defer = supports_async_task = True
    supports_get_result = supports_priority = True
    allowed_options = _OPTIONS
    argument_error = TypeError

    def __init__(self, alias, params):
        """Check ``params``, which is ``TASKS[alias]``. Raise InvalidTaskBackend."""
        super().__init__(alias, params)
        self.options = _read_options(alias, params, self.allowed_options)
        place = f"TASKS[{alias!r}]['ENQUEUE_ON_COMMIT']"
        self.on_commit = _database(place, params.get("ENQUEUE_ON_COMMIT", False))

    def enqueue(self, task, args=(), kwargs=None):
        """Queue a Task with its arguments; return its TaskResult, READY.

        Raise InvalidTask; TypeError for arguments that are not JSON, or for processes
        ValueError; TaskQueueFull; RuntimeError at exit, or if no thread can be started.
        """
        self.validate_task(task)
        kind, path = self.argument_error, task.module_path
        args = [_json(value, kind, path, name) for name, value in enumerate(args, 1)]
        kwargs = {k: _json(value, kind, path, k) for k, value in (kwargs or {}).items()}
        result = TaskResult(
            **{"task": task, "args": args, "kwargs": kwargs, "backend": self.alias},
            **{"id": _new_id(), "status": Status.READY, "errors": [], "worker_ids": []},
            **dict.fromkeys(_TIMES),
        )
        database, own = self.on_commit, getattr(task, "enqueue_on_commit", None)
        if own is not None:
            database = _database(f"enqueue_on_commit of {path}", own)
        if database and transaction.get_connection(database).in_atomic_block:
            mine = _copy(result)
            transaction.on_commit(functools.partial(self._submit, result), database)
            return mine
        return self._submit(result)

    def _submit(self, result):
        _change(result, enqueued_at=timezone.now())
        if _parent:
            return _parent.ask("enqueue", self.alias, _pack(result))
        return _pool(self.alias).submit(self, result)

    def get_result(self, result_id):
        """Return the TaskResult as it is now. Raise TaskResultDoesNotExist."""
        result_id, cache = str(result_id), self.options["RESULTS_CACHE"]
        if _parent:
            return _parent.ask("get_result", self.alias, result_id)
        result = _pool(self.alias).results.get(result_id)
        if not result and cache:
            result = _read_cache(cache, self.alias, result_id)
        if not result:
            raise DoesNotExist(
                f"No task result {result_id!r} of {self.alias!r}: process {os.getpid()} "
                "has its own in memory, the last MAX_RESULTS of them; RESULTS_CACHE "
                f"shares them, and is {cache!r}"
            )
        return result

    def wait_result(self, result_id, timeout=None):
        """Return the TaskResult once it is finished.

        Raise TimeoutError after ``timeout`` seconds; TaskResultDoesNotExist, also where
        another process has the task; RuntimeError in a task of the same alias.
        """
        with _pool(self.alias).expect(str(result_id)) as future:
            result = future.result(timeout)
        return self._finished(result or self.get_result(result_id))

    async def await_result(self, result_id, timeout=None):
        """Do as ``wait_result``, without blocking the event loop."""
        with _pool(self.alias).expect(str(result_id)) as future:
            if not future.done():
                await asyncio.wait_for(asyncio.wrap_future(future), timeout)
        return self._finished(future.result() or await self.aget_result(result_id))

    def _finished(self, result):
        if result.is_finished:
            return _copy(result)
        raise DoesNotExist(f"{result.id!r} is {result.status}, but in another process")

    def join(self, timeout=None):
        """Wait until nothing is pending or running; deferred tasks do not count.

        Raise TimeoutError after ``timeout`` seconds; RuntimeError in a task of it.
        """
        _pool(self.alias).join(timeout)

    def stats(self):
        """Return the numbers of tasks by state and of workers, and the process id."""
        return _pool(self.alias).stats()

    def close(self):
        """Finish what is pending, abandon what is deferred, end the workers.

        In a task it returns at once. To enqueue afterwards starts afresh.
        """
        pool = _pool(self.alias)
        pool.close("the pool was closed")
        if current_result_id.get(None) is None:
            pool.queue.join_workers()


class ThreadPoolBackend(_PoolBackend):
    """Runs tasks in threads: for work that waits for network, disk or database."""


class ProcessPoolBackend(_PoolBackend):
    """Runs tasks in child processes: for work that computes."""

    allowed_options = _OPTIONS | _PROCESS_OPTIONS
    argument_error = ValueError  # What is not JSON may not be pickleable, either.

    def validate_task(self, task):
        """Raise InvalidTask if the backend cannot run the task."""
        if "<locals>" in task.module_path:
            raise InvalidTask(_NOT_FOUND.format(task.module_path))
        super().validate_task(task)

    def enqueue(self, task, args=(), kwargs=None):
        _check_path(task.func, task.module_path)
        return super().enqueue(task, args, kwargs)


_NOT_FOUND = (
    "Task function {} cannot be found by a child process: define and decorate it under "
    "its own name, at the top level of a module, not in a shell or another function"
)


@functools.lru_cache(maxsize=1024)
def _check_path(func, path):
    """Raise InvalidTask if the path of a task does not lead back to its function."""
    with suppress(ImportError, AttributeError):
        is_typed = inspect.unwrap(func).__code__.co_filename.startswith("<")
        if import_string(path).func is func and not is_typed:
            return
    raise InvalidTask(_NOT_FOUND.format(path))


# --- 3. The pool of an alias ----------------------------------------------------------


class _Pool:
    """All that the backend instances of one alias share."""

    def __init__(self, alias):
        self.alias = alias
        self.lock = threading.RLock()
        self.idle = threading.Condition(self.lock)  # Who joins waits for it.
        self.results = _Results(self.lock)
        self.queue = _Queue(self)
        self.cache_failed = False

    def submit(self, backend, result):
        """Keep, announce and queue a result; return a copy. Or leave nothing behind."""
        mine, task, limit = _copy(result), result.task, backend.options["MAX_PENDING"]
        with self.lock:
            self.queue.open(backend)
            pending = len(self.results.unfinished) - len(self.queue.taken)
            if limit and pending >= limit:
                text = f"{self.alias!r} has {limit} tasks pending (MAX_PENDING)"
                raise TaskQueueFull(f"{text}, {task.module_path} was refused")
            self.results.unfinished[result.id] = result
        try:
            signals.task_enqueued.send(type(backend), task_result=mine)
            self.publish(result)
            with self.lock:
                self.queue.open(backend)
                self.queue.put(result, task.priority, _timestamp(task.run_after))
        except BaseException:
            self.settle(result)
            raise
        return mine

    def run(self, result, worker):
        """In a worker: run a task, come what may, and keep what came of it."""
        current_result_id.set(result.id)
        finished = False
        try:
            values, now = {"worker_ids": [worker.prepare()]}, timezone.now()
            values |= {"started_at": now, "last_attempted_at": now}
            if self.results.change(result, status=Status.RUNNING, **values):
                self.tell(signals.task_started, result)
                finished = self.finish(result, worker.execute(result))
        except BaseException as error:
            finished = self.finish(result, error=error)
        _clean_connections()
        if finished:
            self.settle(result)
        self.queue.taken.pop(result.id, None)  # If it was given up before it started.

    def finish(self, result, value=None, error=None):
        """Finish a result, and return True. False: somebody was faster."""
        status = Status.FAILED if error else Status.SUCCESSFUL
        values = {"_return_value": value, "finished_at": timezone.now()}
        values["errors"] = [_task_error(error)] if error else []
        first = self.results.change(result, status=status, **values)
        if first:
            self.tell(signals.task_finished, result)
        return first

    def settle(self, result):
        """Let go of a result: keep it if it is finished, else forget it."""
        kept = result if result.is_finished else None
        with _politely(self.lock):
            futures = self.results.settle(result, self.queue.options["MAX_RESULTS"])
            self.queue.taken.pop(result.id, None)
            if not self.queue.count_busy():
                self.idle.notify_all()
        for future in futures:
            future.set_result(kept)

    def tell(self, event, result):
        """Let others know of a change. Nothing that they raise may end a worker."""
        try:
            self.publish(result)
            _politely(event.lock)
            event.send_robust(self.queue.backend_class, task_result=_copy(result))
        except BaseException:
            with suppress(BaseException):
                logger.exception("A receiver raised for task result %s", result.id)

    def publish(self, result):
        """Write a result to RESULTS_CACHE, if there is one."""
        cache = self.queue.options["RESULTS_CACHE"]
        try:
            if cache:
                _write_cache(cache, result)
                self.cache_failed = False
        except Exception:
            said, self.cache_failed = self.cache_failed, True
            if not said:
                logger.exception("RESULTS_CACHE %r fails; said once", cache)

    def expect(self, result_id):
        self.check_may_wait()
        return self.results.expect(result_id)

    def join(self, timeout):
        self.check_may_wait()
        with self.lock:
            if not self.idle.wait_for(lambda: not self.queue.count_busy(), timeout):
                raise TimeoutError(f"{self.alias!r} has tasks pending or running")

    def check_may_wait(self):
        """Refuse a wait that could last for ever: it holds a worker, or the exit."""
        if _exiting or current_result_id.get(None) in self.results.unfinished:
            raise RuntimeError(
                f"A task of {self.alias!r} must not wait for others of it, nor may the "
                "exit: have it enqueue a task that goes on, or give it another alias"
            )

    def stats(self):
        with self.lock:
            pending = self.queue.count_busy() - len(self.queue.taken)
            return {
                "pending": pending,
                "deferred": len(self.queue.deferred),
                "running": len(self.queue.taken),
                "finished": len(self.results.finished),
                "workers": len(self.queue.threads),
                "pid": os.getpid(),
            }

    def close(self, why, everything=False):
        """Close the queue; abandon what is deferred in it, or everything."""
        lost = self.queue.close()
        if everything:
            lost = list(self.results.unfinished.values())
        if lost:
            ids = ", ".join(result.id for result in lost)
            logger.warning("%s tasks are FAILED, as %s: %s", len(lost), why, ids)
        for result in lost:
            try:
                raise RuntimeError(f"The task was abandoned: {why}")
            except RuntimeError as error:  # Django logs what is being handled.
                if self.finish(result, error=error):
                    self.settle(result)


# --- 4. Queue and thread worker -------------------------------------------------------


class _Queue:
    """What is to be done, by priority and age, and threads for it; guarded by a lock.

    Its workers are for one backend class and its options. After others have opened the
    queue, or once it is closed and empty, they leave.
    """

    ages = itertools.count()

    def __init__(self, pool):
        self.pool, self.lock = pool, pool.lock
        self.changed = threading.Condition(self.lock)  # Free workers wait for it.
        self.ready = []  # A heap of (-priority, age, result).
        self.deferred = []  # A heap of (due time, -priority, age, result).
        self.taken = {}  # The results that workers have, by id, until they are settled.
        self.threads = set()
        self.serves, self.closed = (None, None), True

    backend_class = property(lambda self: self.serves[0])
    options = property(lambda self: self.serves[1])

    def open(self, backend):
        """Have workers for this backend, once tasks come."""
        if _exiting:
            raise RuntimeError(f"The process exits, {backend.alias!r} takes no tasks")
        if self.closed or self.serves != (type(backend), backend.options):
            self.serves, self.closed = (type(backend), backend.options), False
            self.changed.notify_all()

    def put(self, result, priority, due):
        """Queue a result that is due at a time in seconds since the epoch."""
        self.hire(1)
        entry = (-priority, next(self.ages), result)
        if due > time.time():
            heapq.heappush(self.deferred, (due, *entry))
            self.changed.notify_all()  # They may have to wait for less long.
        else:
            heapq.heappush(self.ready, entry)
            self.changed.notify()

    def hire(self, more=0):
        """Start a worker if more is to do than workers are free."""
        wanted = len(self.ready) + bool(self.deferred) + more
        hired = [thread for thread in self.threads if thread.serves is self.serves]
        free = len(hired) - len(self.taken)
        if wanted > free and len(hired) < self.options["MAX_WORKERS"]:
            worker = self.backend_class.worker_class(self)
            try:
                worker.start()
                self.threads.add(worker)
            except (RuntimeError, MemoryError):
                if not hired:  # Else those who are there must do.
                    raise

    def get(self, worker):
        """Wait for a result and take it. None: the worker has to leave."""
        with _politely(self.lock):
            while worker.serves is self.serves:
                if self.promote():
                    result = heapq.heappop(self.ready)[-1]
                    self.taken[result.id] = result
                    self.hire()
                    return result
                if self.closed:
                    break
                # The clock may be set, so nobody waits for longer than a minute.
                left = self.deferred[0][0] - time.time() if self.deferred else None
                self.changed.wait(left and min(left, _CLOCK_INTERVAL))
            self.threads.discard(worker)

    def promote(self):
        """Make ready what is due; return how much is ready."""
        while self.deferred and self.deferred[0][0] <= time.time():
            heapq.heappush(self.ready, heapq.heappop(self.deferred)[1:])
        return len(self.ready)

    def count_busy(self):
        """Return how many results are ready or taken."""
        with self.lock:
            return self.promote() + len(self.taken)

    def close(self):
        """Have the workers leave once nothing is ready; return what is deferred."""
        with self.lock:
            self.promote()
            deferred, self.deferred, self.closed = self.deferred, [], True
            self.changed.notify_all()
        return [entry[-1] for entry in deferred]

    def join_workers(self):
        while threads := list(self.threads):
            threads[0].join()


_CLOCK_INTERVAL = 60  # Seconds.


def _timestamp(run_after):
    """Return seconds since the epoch; ``timestamp()`` fails at the calendar's ends."""
    if run_after is None or run_after.year < 1971:
        return 0.0
    return float("inf") if run_after.year > 9000 else run_after.timestamp()


class _ThreadWorker(threading.Thread):
    """Runs one task after the other."""

    def __init__(self, queue):
        super().__init__(name=f"tasks-{queue.pool.alias}", daemon=True)
        self.queue, self.serves = queue, queue.serves

    def run(self):
        if hasattr(signal, "pthread_sigmask"):  # Threads of some servers block all.
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGCHLD})
        base = _base_context()
        while result := self.queue.get(self):
            base.copy().run(self.queue.pool.run, result, self)
            self.tidy()
        self.stop()

    def prepare(self):
        """Get ready for a task; return the id of the worker."""
        return f"thread-{os.getpid()}-{self.native_id}"

    def execute(self, result):
        """Return what the task returns, or raise what it raises."""
        context = result.task.takes_context and _copy(result)
        return _call(result.task, _own(result.args), _own(result.kwargs), context)

    def tidy(self):
        """Make order after a task."""

    def stop(self):
        connections.close_all()


def _politely(lock):
    """Return a lock for ``with`` when it is most likely free. For workers only.

    A thread that queues for a lock is given it before it has the GIL, and meanwhile the
    next thread has to queue: from then on each use of the lock costs two switches of
    threads, 30 % of the throughput. So a worker waits outside and gives up the GIL.
    """
    for _ in range(50):
        if lock.acquire(False):
            lock.release()
            break
        time.sleep(0)
    return lock


# --- 5. Results -----------------------------------------------------------------------


class _Results:
    """All unfinished results, and the finished ones that were used last, by id."""

    def __init__(self, lock):
        self.lock = lock
        self.unfinished = {}  # Until they are settled.
        self.finished = OrderedDict()  # The least recently used first.
        self.waiting = {}  # By id the set of Futures that it has to keep.

    def get(self, result_id):
        """Return a copy of a result, or None."""
        with self.lock:
            if result_id in self.finished:
                self.finished.move_to_end(result_id)
            result = self.unfinished.get(result_id) or self.finished.get(result_id)
            return result and _copy(result)

    def change(self, result, **values):
        """Change a result. False: it is finished or forgotten already."""
        with _politely(self.lock):
            changes = result.id in self.unfinished and not result.is_finished
            if changes:
                _change(result, **values)
            return changes

    def settle(self, result, limit):
        """Keep a finished result, forget another one; return who waits for it."""
        with self.lock:
            self.unfinished.pop(result.id, None)
            if result.is_finished:
                self.finished[result.id] = result
            while len(self.finished) > limit:
                self.finished.popitem(last=False)
            return self.waiting.pop(result.id, ())

    @contextmanager
    def expect(self, result_id):
        """Yield a Future of the finished result; of None if there is none to wait for.

        Raise TimeoutError where the wait does.
        """
        future = concurrent.futures.Future()
        future.set_running_or_notify_cancel()  # Nobody may cancel it.
        with self.lock:
            if result_id in self.unfinished:
                self.waiting.setdefault(result_id, set()).add(future)
            else:
                future.set_result(None)
        try:
            yield future
        except (concurrent.futures.TimeoutError, asyncio.TimeoutError):  # Of 3.10.
            raise TimeoutError(f"Task result {result_id} is not finished") from None
        finally:
            with self.lock:
                self.waiting.get(result_id, set()).discard(future)


_FIELDS = [field.name for field in fields(TaskResult)]
_TIMES = ("enqueued_at", "started_at", "last_attempted_at", "finished_at")
_ids = []


def _new_id():
    """Return a random UUID. Made 64 at a time: each ``os.urandom`` gives up the GIL."""
    try:
        return _ids.pop()
    except IndexError:
        noise = os.urandom(64 * 16)
        parts = (noise[start : start + 16] for start in range(0, len(noise), 16))
        _ids.extend(str(uuid.UUID(bytes=part, version=4)) for part in parts)
        return _new_id()


def _change(frozen, **values):
    """Set fields of a frozen dataclass, as Django's own backends do."""
    for name, value in values.items():
        object.__setattr__(frozen, name, value)


def _copy(result):
    """Return a TaskResult that shares nothing that can be changed."""
    copy = object.__new__(TaskResult)
    for name in _FIELDS:
        object.__setattr__(copy, name, _own(getattr(result, name)))
    return copy


def _own(value):
    if type(value) is list:
        return [_own(item) for item in value]
    if type(value) is dict:
        return {key: _own(item) for key, item in value.items()}
    return value


def _json(value, kind, path, name):
    """Return as JSON what a task was given or returned, under this name."""
    try:
        return normalize_json(value)
    except Exception as error:
        kind = ValueError if isinstance(error, ValueError) else kind
        what = f"{type(value).__module__}.{type(value).__qualname__}"
        raise kind(
            f"{name!r} of task {path} is a {what}, which is not JSON (and so perhaps not "
            f"pickleable): {error}. Right are None, bool, int, float, str, UTF-8 bytes, "
            "lists and dicts of these; of a model instance pass the primary key"
        ) from None


def _values(frozen):
    return {name: getattr(frozen, name) for name in frozen.__dataclass_fields__}


def _pack(result):
    """Return a TaskResult as plain data and datetimes, as it leaves this process."""
    packed, task = _values(result), _values(result.task).items()
    packed["errors"] = [(e.exception_class_path, e.traceback) for e in result.errors]
    packed["task"] = {
        k: v for k, v in task if isinstance(v, (str, int, float, datetime))
    }
    return packed | {"path": result.task.module_path}


def _unpack(packed):
    """Return the TaskResult that was packed. Import the module of its task."""
    values, task = dict(packed), dict(packed["task"])
    for place, name in [*((values, name) for name in _TIMES), (task, "run_after")]:
        if isinstance(place.get(name), str):  # It has come as JSON text.
            place[name] = datetime.fromisoformat(place[name])
    values["task"] = replace(import_string(values.pop("path")), **task)
    values["status"] = Status(values["status"])
    values["errors"] = [_new_error(*error) for error in values["errors"]]
    result = object.__new__(TaskResult)
    _change(result, **values)
    return result


def _new_error(path, text):
    return TaskError(exception_class_path=path, traceback=text)


# RESULTS_CACHE holds JSON text: [[host, namespace of process ids], pid, packed result].


def _cache_key(alias, result_id):
    """Return a key that each cache takes, whatever the alias and the id are."""
    return str(uuid.uuid5(uuid.NAMESPACE_OID, repr((alias, result_id))))


def _host():
    """Return what has process ids of its own, or None where that is not known."""
    with suppress(OSError):
        return [socket.gethostname(), os.readlink("/proc/self/ns/pid")]


def _write_cache(cache, result):
    content = [_host(), os.getpid(), _pack(result)]
    text = json.dumps(content, default=datetime.isoformat)
    caches[cache].set(_cache_key(result.backend, result.id), text)


def _read_cache(cache, alias, result_id):
    """Return a result, or None. One whose process is gone from this host is FAILED."""
    text = caches[cache].get(_cache_key(alias, result_id))
    if text is None:
        return None
    host, pid, packed = json.loads(text)
    try:
        result = _unpack(packed)
    except Exception as error:  # The module is gone, or the task has changed.
        raise DoesNotExist(f"The task of {result_id!r} is gone: {error}") from error
    is_gone = host and host == _host() and not os.path.exists(f"/proc/{pid}")
    if is_gone and not result.is_finished:
        error = _task_error(RuntimeError(f"Process {pid} ended before the task did"))
        values = {"status": Status.FAILED, "finished_at": timezone.now()}
        _change(result, errors=[error], **values)
        _write_cache(cache, result)
    return result


# --- 6. Running a task ----------------------------------------------------------------


def _base_context():
    """Return a context with nothing in it but this worker's cache objects."""
    context = contextvars.Context()
    for alias in settings.CACHES:
        with suppress(Exception):  # It is told who uses that cache.
            context.run(caches.__getitem__, alias)
    return context


_coroutines = set()  # The asyncio tasks that run, for the exit to cancel.


async def _await(function, *args, **kwargs):
    _coroutines.add(asyncio.current_task())
    try:
        return await function(*args, **kwargs)
    finally:
        _coroutines.discard(asyncio.current_task())


def _call(task, args, kwargs, result):
    """Call a task, in an event loop of its own if it is a coroutine function."""
    function = task.func
    if inspect.iscoroutinefunction(function):
        function = asgiref.sync.async_to_sync(functools.partial(_await, function))
    if task.takes_context:
        args = [tasks.TaskContext(task_result=result), *args]
    value = function(*args, **kwargs)
    return _json(value, TypeError, task.module_path, "return value")


def _clean_connections():
    """Leave the next task no transaction, stale session, query log or attribute."""
    for connection in connections.all(initialized_only=True):
        try:
            connection.queries_log.clear()
            connection.close_if_unusable_or_obsolete()
            if connection.in_atomic_block:
                connection.close()
            if connection.in_atomic_block or connection.connection is None:
                del connections[connection.alias]
            else:
                connection.connection.rollback()  # Of a BEGIN that Django has not seen.
                # The first query of the next task looks whether it still works.
                connection.health_check_enabled = True
                connection.health_check_done = False
        except Exception:
            logger.exception("Connection %r is broken, and dropped", connection.alias)
            del connections[connection.alias]


_CALLERS = {__file__, asgiref.sync.__file__, concurrent.futures._base.__file__}


def _task_error(error):
    """Return a TaskError, without the frames of those who called the task."""
    kind, text = type(error), ""
    path = f"{kind.__module__}.{kind.__qualname__}".replace("__mp_main__", "__main__")
    with suppress(BaseException):  # Of the exception's own code, or a loader's.
        if type(error.__cause__) is _RemoteTraceback:
            return _new_error(error.__cause__.path, str(error.__cause__))
        frames = error.__traceback__
        while frames and frames.tb_frame.f_code.co_filename in _CALLERS:
            frames = frames.tb_next
        text = "".join(traceback.format_exception(kind, error, frames))
    return _new_error(path, text or f"{path}\n")


# --- 7. Child processes ---------------------------------------------------------------

# The messages, by turns to the child, to the parent, to the parent, to the child:
#
#   "run", id, path, args, kwargs, packed result or None    run a task
#   "done", value   or   "failed", packed error             the answer: so it did
#   "enqueue", alias, packed result                         while it runs: do this
#   "get_result", alias, id                                 or this
#   "done", packed result   or   "failed", packed error     the answer to that

_SET_UP_TIMEOUT = 60  # Seconds for a child to start.
_PATIENCE = 5  # Seconds for a free child to end itself, with its exit hooks.
_CHILD_NAME = "django-tasks-local"
_main_file = getattr(sys.modules["__main__"], "__file__", None)


class _RemoteTraceback(Exception):
    """The cause of an exception that was raised in the other process."""


def _outcome(function, *args):
    """Call a function; return a message that says what comes of it."""
    try:
        return "done", function(*args)
    except BaseException as error:
        described, pickled = _task_error(error), b""
        with suppress(BaseException):
            pickled = pickle.dumps(error)
        return "failed", (described.exception_class_path, described.traceback, pickled)


def _take(kind, content):
    """Return what such a message says; raise its error, or a RuntimeError of its text."""
    if kind == "done":
        return content
    path, text, pickled = content
    cause = _RemoteTraceback(text)
    cause.path = path
    try:
        error = pickle.loads(pickled)
    except Exception:
        error = RuntimeError(text.strip().rpartition("\n")[2])
    raise error from cause


class _ProcessWorker(_ThreadWorker):
    """Has a child process run the tasks."""

    child = None

    def prepare(self):
        child = self.child
        if child in _children and (child.outdated or child.databases != _databases()):
            child.end(_PATIENCE)
        if child not in _children:
            self.child = child = _Child(self.queue.options)
        return f"process-{child.process.pid}"

    def execute(self, result):
        task, packed = result.task, None
        if task.takes_context:
            packed = _pack(result)
        run = ("run", result.id, task.module_path, result.args, result.kwargs, packed)
        try:
            self.child.pipe.send(run)
        except OSError:  # It has died while it was free: the task has not begun.
            self.child.end()
            result.worker_ids[:] = [self.prepare()]
            self.child.pipe.send(run)
        self.child.tasks += 1
        return self.child.receive(self.queue.options["TASK_TIMEOUT"])

    def tidy(self):
        if self.child and self.child.tasks == self.queue.options["MAX_TASKS_PER_CHILD"]:
            self.child.end(_PATIENCE)

    def stop(self):
        super().stop()
        if self.child in _children:
            self.child.end(_PATIENCE)


class _Child:
    """A child process, for one worker."""

    def __init__(self, options):
        """Start a process and wait until it is set up."""
        self.tasks, self.outdated = 0, False  # Whether settings have changed since.
        self.databases = _databases()
        main = sys.modules["__main__"]
        if _main_file and not hasattr(main, "__file__"):  # At exit CPython deletes it.
            main.__file__ = _main_file
        with _children_lock:
            if _exiting:
                raise RuntimeError("The process exits: no child process is started")
            context = _multiprocessing_context(options["START_METHOD"])
            self.pipe, pipe = context.Pipe()
            alive, self.alive = context.Pipe(duplex=False)  # Nothing is written to it.
            args = (pipe, alive, options["INITIALIZER"], *_site(), self.databases)
            self.process = context.Process(None, _child_main, _CHILD_NAME, args)
            with pipe, alive:
                self.process.start()
            _children.add(self)
        try:
            self.receive(_SET_UP_TIMEOUT)
        except BaseException:
            self.end()
            raise

    def receive(self, timeout):
        """Return or raise what the child answers. Do meanwhile what its task asks for.

        Raise TimeoutError after ``timeout`` seconds; ChildProcessError if it dies.
        """
        self.busy, begun = True, time.monotonic()
        try:
            while not timeout or self.pipe.poll(begun + timeout - time.monotonic()):
                message = self.pipe.recv()
                if message[0] in ("done", "failed"):
                    break
                self.pipe.send(_outcome(_serve, *message))
            else:
                raise TimeoutError(
                    f"The child process took more than {timeout} seconds"
                )
        except TimeoutError:
            self.end()
            raise
        except Exception:
            self.process.join(1)
            code = self.process.exitcode
            self.end()
            text = f"Child process {self.process.pid} ended with exit code {code}"
            raise ChildProcessError(f"{text}, before it was done") from None
        self.busy = False
        return _take(*message)

    def end(self, patience=0):
        """Let the process end itself for some seconds; kill what is left then."""
        self.pipe.close()
        if patience:
            self.process.join(patience)
        self.kill()
        self.process.join()
        with _children_lock:
            self.alive.close()
            _children.discard(self)

    def kill(self):
        """Kill the process, and what its tasks have started and left."""
        with suppress(AttributeError, ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.kill()


def _serve(method, alias, content):
    """Do for a child's task what it asks of a backend; return the packed result."""
    backend = tasks.task_backends[alias]
    if method == "enqueue":
        return _pack(_pool(alias).submit(backend, _unpack(content)))
    return _pack(backend.get_result(content))


def _multiprocessing_context(method):
    """Return the context of multiprocessing for a START_METHOD."""
    method = method or _START_METHODS[0]
    if not os.path.basename(sys.executable or "").startswith(("python", "pypy")):
        multiprocessing.set_executable(_find_python())
    if method == "forkserver" in _START_METHODS:
        multiprocessing.set_forkserver_preload([__name__])
        try:
            importlib.import_module("multiprocessing.forkserver").ensure_running()
        except OSError as error:  # Also if it is the one of a process we are a fork of.
            _START_METHODS.remove("forkserver")
            logger.warning("No fork server, child processes are spawned: %s", error)
    return multiprocessing.get_context(method if method in _START_METHODS else "spawn")


def _find_python():
    """Return the interpreter, where a server is sys.executable, as under uWSGI."""
    name, place = f"python3.{sys.version_info[1]}", os.path.join(sys.prefix, "bin")
    if found := shutil.which(name, path=place):
        return found
    raise RuntimeError(
        f"sys.executable {sys.executable!r} is no Python to start child processes with, "
        f"and {place} has no {name}: set sys.executable to the path of an interpreter"
    )


def _databases():
    """Return the names of the databases, which a test run changes in place."""
    return {alias: params["NAME"] for alias, params in connections.settings.items()}


def _site():
    """Return the environment, whether the settings have no module, those it lacks."""
    module = sys.modules.get(os.environ.get("DJANGO_SETTINGS_MODULE", ""))
    changed = {}
    for name in filter(settings.is_overridden, filter(str.isupper, dir(settings))):
        with suppress(Exception):  # The child has to do without.
            value = getattr(settings, name)
            if name == "DATABASES" or value is not getattr(module, name, changed):
                changed[name] = pickle.dumps(value)
    return dict(os.environ), module is None, changed


class _Parent:
    """In a child: the parent, for the task that runs."""

    def __init__(self, pipe):
        self.pipe, self.lock = pipe, threading.RLock()
        self.listens = False  # While a task runs, and no call is under way.

    def ask(self, *request):
        """Have the parent's backend do something; return or raise what comes of it."""
        with self.lock:
            if not self.listens:
                raise RuntimeError(_NO_TASK)
            self.listens = False  # And so it stays if an exception cuts off the call.
            self.pipe.send(request)
            answer = self.pipe.recv()
            self.listens = True
        return _unpack(_take(*answer))

    def answer(self, message):
        with self.lock:
            self.listens = False
            self.pipe.send(message)


_NO_TASK = (
    "In a child process only its running task can enqueue and get results, one by one, "
    "and do no more. What the main script does belongs under if __name__ == '__main__', "
    "and AppConfig.ready() must enqueue nothing"
)


def _child_main(pipe, alive, *site):
    """Be a child: run what comes in until the parent closes the pipe."""
    global _parent
    _leave_with_parent(alive)
    _parent = _Parent(pipe)
    _parent.answer(_outcome(_set_up, *site))
    with suppress(EOFError, OSError):
        base = _base_context()
        while True:
            message = pipe.recv()
            if message[0] == "run":  # Else the answer to a call that was cut off.
                _parent.listens = True
                _parent.answer(base.copy().run(_outcome, _run, *message[1:]))
    atexit._run_exitfuncs()


def _run(result_id, path, args, kwargs, packed):
    """Run a task; return what it returns."""
    current_result_id.set(result_id)
    try:
        return _call(import_string(path), args, kwargs, packed and _unpack(packed))
    finally:
        _clean_connections()


def _leave_with_parent(alive):
    """Leave Ctrl-C to the parent, and end when it does, with what tasks have started.

    The end of ``alive`` tells. A thread waits for it; on Linux the kernel does, too, as
    a task may hold the GIL.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(os, "setpgid"):
        os.setpgid(0, 0)
        signal.pthread_sigmask(signal.SIG_SETMASK, ())
    if sys.platform == "linux":
        import fcntl

        fcntl.fcntl(alive, fcntl.F_SETOWN, -os.getpid())
        fcntl.fcntl(alive, fcntl.F_SETSIG, signal.SIGKILL)
        fcntl.fcntl(alive, fcntl.F_SETFL, os.O_ASYNC)

    def watch():
        with suppress(EOFError, OSError):
            alive.recv()
        with suppress(AttributeError):
            os.killpg(0, signal.SIGKILL)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _set_up(initializer, environ, in_code, changed, databases):
    """Make the child like its parent, and set up Django."""
    os.environ.clear()
    os.environ.update(environ)
    if in_code and not settings.configured:
        settings.configure()
        # The module of a task may do so, too, once it is imported.
        vars(settings)["configure"] = lambda *args, **kwargs: None
    if "DJANGO_CONFIGURATION" in environ:
        with suppress(ModuleNotFoundError):
            import_string("configurations.importer.install")()
    if initializer:
        import_string(initializer)()
    for name, pickled in changed.items():
        with suppress(Exception):
            setattr(settings, name, pickle.loads(pickled))
    for alias in databases.keys() & connections.settings.keys():
        connections.settings[alias]["NAME"] = databases[alias]
    django.setup()


# --- Process-wide: state, exit, fork, changed settings --------------------------------

_pools = {}  # By alias. In a child it is empty.
_children = set()  # Of type _Child. In a child it is empty.
_children_lock = threading.RLock()
_parent = None  # In a child the _Parent.
_exiting = False  # Whether the exit has given up: nothing is started any more.
ThreadPoolBackend.worker_class = _ThreadWorker
ProcessPoolBackend.worker_class = _ProcessWorker


def _pool(alias):
    """Return the pool of an alias in this process."""
    if multiprocessing.current_process().name == _CHILD_NAME:
        raise RuntimeError(_NO_TASK)
    if alias not in _pools:
        # A process of multiprocessing joins its children before its threads end.
        multiprocessing.util.Finalize(None, _shutdown, exitpriority=100)
    return _pools.setdefault(alias, _Pool(alias))


def _shutdown():
    """At exit: finish the work within SHUTDOWN_TIMEOUT, then abandon what is left."""
    # Ctrl-C ends the first step. If it cuts off the second one, the third goes on.
    for step in (_finish_work, _give_up, _give_up):
        with suppress(BaseException):
            step()
    for child in list(_children):
        child.kill()


def _finish_work():
    """Wait until nothing is pending or running, or the time of its pool is over."""
    begun, said = time.monotonic(), False
    while busy := [pool for pool in list(_pools.values()) if _has_time(pool, begun)]:
        if not said and time.monotonic() > begun + 1:
            said, number = True, sum(pool.queue.count_busy() for pool in busy)
            message = "The process exits once %s tasks are finished; Ctrl-C gives up, "
            logger.warning(message + "SHUTDOWN_TIMEOUT limits", number)
        with suppress(TimeoutError):
            busy[0].join(0.1)


def _has_time(pool, begun):
    if not pool.queue.count_busy():
        return False
    limit = pool.queue.options["SHUTDOWN_TIMEOUT"]
    return limit is None or time.monotonic() < begun + limit


def _give_up():
    """Abandon what is left and end the children. May be called again."""
    global _exiting
    with _children_lock:
        _exiting = True
    for pool in list(_pools.values()):
        pool.close("the process exits", everything=True)
    for task in list(_coroutines):
        with suppress(RuntimeError):  # Its loop has just ended.
            task.get_loop().call_soon_threadsafe(task.cancel)
    for child in list(_children):
        if child.busy:
            child.kill()
    end = time.monotonic() + _PATIENCE
    while _children and time.monotonic() < end:
        time.sleep(0.01)


# Not atexit: by then Python's executors, which coroutines need, take no more work. The
# last hook runs first: this one before that of concurrent.futures, imported above.
threading._register_atexit(_shutdown)


def _after_fork_in_child():
    """Have a forked copy start with nothing of its parent's."""
    _children_lock.release()
    for child in _children:
        child.pipe.close()
        child.alive.close()
    multiprocessing.process._children.clear()
    for state in (_pools, _children, _coroutines, _ids):
        state.clear()
    if _parent:
        _parent.pipe.close()
        _parent.listens = False
    for event in (signals.task_enqueued, signals.task_started, signals.task_finished):
        event.lock = threading.Lock()  # Another thread may have held it,
    for handler in (tasks.task_backends, caches):  # and the locks of these.
        handler.__init__()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(
        before=_children_lock.acquire,
        after_in_parent=_children_lock.release,
        after_in_child=_after_fork_in_child,
    )


def _follow_settings(*, setting, **kwargs):
    """Have children replaced, and if TASKS changes close the pools."""
    for child in list(_children):
        child.outdated = True
    for pool in list(_pools.values()) if setting == "TASKS" else ():
        pool.close("TASKS has changed")


setting_changed.connect(_follow_settings)
