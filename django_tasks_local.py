# SPDX-License-Identifier: MIT
"""Run the tasks of a Django site in threads or child processes of the web process.

One file, to install or to copy. Its manual is the README.md beside the original.
The way of a task::

    backend.enqueue() --> _Pool.submit() --> _Queue.put()
          READY               |                  |
                        _Pool.unfinished    _Queue.get()
                              |                  v
    backend.get_result() <-- a copy <------ _Pool.run() in a worker thread:
                              |               prepare()  for processes: have a child
          RUNNING             |               change()   tells task_started
                              |               execute()  here, or in the child process
          SUCCESSFUL, FAILED  |               finish()   tells task_finished
                        _Pool.finished <----- settle()   wakes who waits for the result

1. One ``_Pool`` for each alias serves all its backend instances. To build a backend
   starts nothing; the first task starts a thread.
2. A result is Django's TaskResult. The pool changes its own, all others have copies.
   It is *finished* if SUCCESSFUL or FAILED, *settled* once the receivers have returned.
3. A task that will not run is *abandoned*: FAILED, with the reason.
4. ``close()`` and a change of TASKS *close* the queue: its workers leave once it is
   empty. The next task opens it for new workers, with the options of that time.
5. Queue and results live in the parent for both backends. A child process is the tool
   of one worker: if it dies, that one task fails. Section 7 lists their messages.
6. The exit of the process waits for the work, then abandons the rest: ``_shutdown``.

Locks: ``_Pool.lock``, one for each alias, guards its results, queue and workers.
``_children_lock`` keeps forks and the exit away from the start of a child process.
``_Parent.lock``, in a child, lets one thread at a time talk to the parent. Under none
is another of them taken, a signal sent or a task called. They are re-entrant: a signal
handler or ``__del__`` may call stats() and get_result() between any two lines.

Private interfaces: ``threading._register_atexit`` (the exit has to wait before Python
ends its executors), ``atexit._run_exitfuncs`` (children skip it before Python 3.13),
``multiprocessing.process._children`` (a forked copy must not join them) and Django's
``TaskResult._return_value``. All is in memory: SIGKILL, or SIGTERM alone, loses it."""

import asyncio
import atexit
import concurrent.futures.process  # Its exit hook has to be there before ours.
import itertools
import json
import logging
import multiprocessing.util
import os
import pickle
import signal
import socket
import sys
import threading
import time
import traceback
from collections import OrderedDict
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from contextvars import Context, ContextVar
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from functools import partial
from hashlib import blake2b
from heapq import heappop, heappush
from inspect import isawaitable, unwrap
from multiprocessing.connection import wait

import django
from asgiref.sync import async_to_sync
from django.conf import settings
from django.core.cache import caches
from django.core.signals import setting_changed
from django.db import connections, transaction
from django.utils.module_loading import import_string
from django.utils.timezone import now

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

__version__ = "2.0.0"
logger = logging.getLogger("django_tasks_local")
current_result_id = ContextVar("current_result_id")
"""The id of the running task's result; ``LookupError`` where no task runs."""


class TaskQueueFull(exceptions.TaskException):
    """``MAX_PENDING`` tasks are pending or deferred; this one was not enqueued."""


# --- 1. Options: TASKS[alias], checked ------------------------------------------------
def _is_shared_cache(value):
    known, private = settings.CACHES, ("LocMemCache", "DummyCache")
    return value in [*known] and not known[value]["BACKEND"].endswith(private)


_START_METHODS = ["forkserver", "spawn"] if hasattr(os, "fork") else ["spawn"]
_CACHE = "an alias of CACHES that processes share: no local-memory or dummy cache"
_COUNT = ("a positive integer", lambda value: type(value) is int and value > 0)
_SECONDS = ("seconds", lambda value: type(value) in (int, float) and 0 <= value <= 1e6)
_OPTIONS = {
    # name: (default, what else is right, whether a value is that)
    "MAX_WORKERS": (10, *_COUNT),
    "MAX_RESULTS": (1000, *_COUNT),
    "MAX_PENDING": (None, *_COUNT),
    "SHUTDOWN_TIMEOUT": (None, *_SECONDS),
    "RESULTS_CACHE": (None, _CACHE, _is_shared_cache),
}
_PROCESS_OPTIONS = {
    "TASK_TIMEOUT": (None, "seconds, not 0", lambda v: v and _SECONDS[1](v)),
    "MAX_TASKS_PER_CHILD": (None, *_COUNT),
    "START_METHOD": (None, f"one of {_START_METHODS}", [*_START_METHODS].count),
    "INITIALIZER": (None, "a dotted path", lambda value: "." in str(value)),
}
_UNKNOWN = (..., "left out (perhaps it stands beside, such as QUEUES)", ().count)


def _read_options(alias, params, allowed):
    """Return the options in TASKS[alias], with defaults. Raise InvalidTaskBackend."""
    place, given = f"TASKS[{alias!r}]['OPTIONS']", params.get("OPTIONS", {})
    if not isinstance(given, dict) or params.keys() & (_OPTIONS | _PROCESS_OPTIONS):
        raise InvalidBackend(f"{place} must be a dict with all options, got {params!r}")
    for name, value in given.items():
        default, right, is_right = allowed.get(name, _UNKNOWN)
        if value is not default and not is_right(value):
            text = f"must be {right}. Options are {', '.join(allowed)}"
            raise InvalidBackend(f"{place}: {name!r} {text}; got {value!r}")
    return {name: default for name, (default, _, _) in allowed.items()} | given


# --- 2. The backends ------------------------------------------------------------------
@dataclass(frozen=True, slots=True, kw_only=True)
class LocalTask(Task):
    """A Task that takes a timedelta as ``run_after``, and ``enqueue_on_commit``."""

    enqueue_on_commit: object = None  # A bool, or a database.

    def __post_init__(self):
        if isinstance(self.run_after, timedelta):
            _change(self, run_after=now() + self.run_after)
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
        self.on_commit = params.get("ENQUEUE_ON_COMMIT", False)
        if self.on_commit not in (False, True, *connections.settings):
            raise InvalidBackend(
                f"TASKS[{alias!r}]['ENQUEUE_ON_COMMIT'] must be False, True or a key "
                f"of DATABASES, got {self.on_commit!r}"
            )

    def enqueue(self, task, args=(), kwargs=None):
        """Queue a Task with its arguments; return its TaskResult, READY. Raise
        InvalidTask; TypeError, or for processes ValueError, for arguments that are not
        JSON; TaskQueueFull; RuntimeError at exit, or if no thread can be started."""
        self.validate_task(task)
        self.check_path(task)
        kind, kwargs = self.argument_error, kwargs or {}
        args = [_json(value, kind, task, name) for name, value in enumerate(args, 1)]
        kwargs = {name: _json(kwargs[name], kind, task, name) for name in kwargs}
        values = dict.fromkeys(_FIELDS) | {"task": task, "args": args, "kwargs": kwargs}
        values |= {"id": _new_id(), "backend": self.alias, "status": Status.READY}
        result = _new_result(values | {"errors": [], "worker_ids": []})
        on_commit = getattr(task, "enqueue_on_commit", None)
        if on_commit is None:
            on_commit = self.on_commit
        using = on_commit if isinstance(on_commit, str) else None  # The default one.
        if on_commit and transaction.get_connection(using).in_atomic_block:
            transaction.on_commit(partial(self._submit, _copy(result)), using)
            return result
        return self._submit(result)

    def check_path(self, task):
        """Raise InvalidTask if no worker would find the function by its path."""

    def _submit(self, result):
        _change(result, enqueued_at=now())
        if _parent:
            return _parent.ask("_submit", self.alias, _pack(result))
        return _pool(self.alias).submit(self, result)

    def get_result(self, result_id):
        """Return the TaskResult as it is now. Raise TaskResultDoesNotExist."""
        result_id, cache = str(result_id), self.options["RESULTS_CACHE"]
        if _parent:
            return _parent.ask("get_result", self.alias, result_id)
        pool = _pool(self.alias)
        with pool.lock:
            if result_id in pool.finished:
                pool.finished.move_to_end(result_id)
            result = pool.unfinished.get(result_id) or pool.finished.get(result_id)
            result = result and _copy(result)
        if not result and cache and len(result_id) == 36:
            result = _read_cache(cache, self.alias, result_id)
        if not result:
            raise DoesNotExist(
                f"No result {result_id!r} of {self.alias!r}: process {os.getpid()} has "
                f"the last MAX_RESULTS of its own, RESULTS_CACHE ({cache!r}) of others"
            )
        return result

    def wait_result(self, result_id, timeout=None):
        """Return the TaskResult once it is finished. Raise TimeoutError after seconds;
        TaskResultDoesNotExist, also if another process has the task; RuntimeError in a
        task of the same alias."""
        with _pool(self.alias).expect(str(result_id)) as future:
            return self._finished(future.result(timeout) or self.get_result(result_id))

    async def await_result(self, result_id, timeout=None):
        """Do as ``wait_result``, without blocking the event loop."""
        with _pool(self.alias).expect(str(result_id)) as future:
            await asyncio.wait([asyncio.wrap_future(future)], timeout=timeout)
            result = future.result(0) or await self.aget_result(result_id)
        return self._finished(result)

    def _finished(self, result):
        if result.is_finished:
            return _copy(result)
        raise DoesNotExist(f"{result.id!r} is {result.status}, but in another process")

    def join(self, timeout=None):
        """Wait until no task is pending or running; deferred ones do not count. Raise
        TimeoutError after seconds; RuntimeError in a task of the same alias."""
        pool = _pool(self.alias)
        with pool.expect(None), pool.lock:
            if not pool.idle.wait_for(lambda: not pool.queue.is_busy(), timeout):
                raise TimeoutError

    def stats(self):
        """Return the numbers of tasks by state and of workers, and the process id."""
        queue = _pool(self.alias).queue
        with queue.pool.lock:
            due = sum(entry[0] <= time.time() for entry in queue.deferred)
            return {  # Nothing is changed, as this may interrupt promote().
                "pending": len(queue.ready) + due,
                "deferred": len(queue.deferred) - due,
                "running": len(queue.taken),
                "finished": len(queue.pool.finished),
                "workers": len(queue.crew),
                "pid": os.getpid(),
            }

    def close(self):
        """Finish what is pending, abandon what is deferred, end the workers. In a task
        return at once. To enqueue afterwards starts afresh."""
        pool = _pool(self.alias)
        crew = pool.queue.crew
        pool.close("the pool was closed")
        while current_result_id.get(None) is None and (workers := list(crew)):
            with suppress(RuntimeError):  # Its start is under way.
                workers[0].join()


class ThreadPoolBackend(_PoolBackend):
    """Runs tasks in threads: for work that waits for network, disk or database."""


class ProcessPoolBackend(_PoolBackend):
    """Runs tasks in child processes: for work that computes."""

    allowed_options = _OPTIONS | _PROCESS_OPTIONS
    argument_error = ValueError  # What is not JSON may not be pickleable, either.

    def check_path(self, task):
        with suppress(ImportError, AttributeError):
            is_typed = unwrap(task.func).__code__.co_filename.startswith("<")
            if _load_task(task.module_path).func is task.func and not is_typed:
                return
        raise InvalidTask(
            f"Task function {task.module_path} cannot be found by a child process: "
            "define and decorate it under its own name, in a module (not in a shell), "
            "at the top level"
        )


# --- 3. The pool of an alias ----------------------------------------------------------
class _Pool:
    """The results of an alias and its queue, for all its backend instances."""

    def __init__(self, alias):
        self.alias = alias
        self.lock = threading.RLock()
        self.idle = threading.Condition(self.lock)  # Who joins waits for it.
        self.queue = _Queue(self)
        self.unfinished = {}  # Results by id, until they are settled.
        self.finished = OrderedDict()  # The least recently used result first.
        self.waiting = {}  # By the id of a result the set of Futures for it.

    def submit(self, backend, result):
        """Keep, announce and queue a result; return a copy. Or leave nothing behind."""
        mine, queue = _copy(result), self.queue
        with self.lock:
            limit = backend.options["MAX_PENDING"]
            if limit and len(self.unfinished) - len(queue.taken) >= limit:
                raise TaskQueueFull(f"{self.alias!r} has {limit} tasks pending already")
            queue.open(backend)
            self.unfinished[result.id] = result
        try:
            queue.hire(1)  # It raises before others are told of the task.
            signals.task_enqueued.send(type(backend), task_result=mine)
            self.publish(result)
            with self.lock:
                queue.open(backend)
                queue.put(result)
            queue.hire()  # Others may have come first, or a new crew.
        except BaseException:
            self.settle(result)
            raise
        return mine

    def run(self, result, worker):
        """In a worker: run a task, come what may, and keep what came of it."""
        current_result_id.set(result.id)
        try:
            ids, start = [worker.prepare()], now()
            times = {"started_at": start, "last_attempted_at": start, "worker_ids": ids}
            if self.change(result, signals.task_started, Status.RUNNING, **times):
                self.finish(result, worker.execute(result))
        except BaseException as error:
            self.finish(result, error=error)
        _clean_connections()  # Of the receivers.
        self.settle(result)

    def finish(self, result, value=None, error=None):
        errors = [] if error is None else [_task_error(error)]
        status = Status.FAILED if errors else Status.SUCCESSFUL
        values = {"_return_value": value, "finished_at": now(), "errors": errors}
        self.change(result, signals.task_finished, status, **values)

    def change(self, result, event, status, **values):
        """Change a result and let others know. False: it is finished or forgotten."""
        with _politely(self.lock):
            if result.is_finished or result.id not in self.unfinished:
                return False
            _change(result, status=status, **values)
        try:
            self.publish(result)
            mine = _copy(result)
            _politely(event.lock)  # Receivers are looked up under it.
            event.send_robust(self.queue.backend_class, task_result=mine)
        except BaseException:  # Nothing that others raise may end a worker.
            with suppress(BaseException):
                logger.exception("A receiver raised for task result %s", result.id)
        return True

    def publish(self, result):
        """Write a result to RESULTS_CACHE, if there is one."""
        cache = self.queue.options["RESULTS_CACHE"]
        try:
            if cache:
                _write_cache(cache, result)
        except Exception:
            logger.exception("RESULTS_CACHE %r fails", cache)

    def settle(self, result):
        """Keep a finished result, forget another one, and wake who waits for it."""
        finished = result if result.is_finished else None
        with _politely(self.lock):
            self.queue.taken.pop(result.id, None)
            self.unfinished.pop(result.id, None)
            if finished:
                self.finished[result.id] = result
            while len(self.finished) > self.queue.options["MAX_RESULTS"]:
                self.finished.popitem(last=False)
            if not self.queue.is_busy():
                self.idle.notify_all()
            futures = self.waiting.pop(result.id, ())
        for future in futures:
            future.set_result(finished)

    @contextmanager
    def expect(self, result_id):
        """Yield a Future of the finished result, or of None if it is not unfinished."""
        if _exiting or current_result_id.get(None) in self.unfinished:
            raise RuntimeError(
                f"A task of {self.alias!r} must not wait for others of it, nor may the "
                "exit: have it enqueue a task that goes on, or give it another alias"
            )
        future = Future()
        with self.lock:
            if result_id in self.unfinished:
                self.waiting.setdefault(result_id, set()).add(future)
            else:
                future.set_result(None)
        try:
            yield future  # Up to Python 3.10 these are not the same:
        except (concurrent.futures.TimeoutError, TimeoutError):
            raise TimeoutError(
                f"{result_id or 'A task'} of {self.alias!r} is not finished"
            ) from None
        finally:
            with self.lock:
                self.waiting.get(result_id, set()).discard(future)

    def close(self, why, everything=False):
        """Close the queue; abandon what is deferred in it, or everything."""
        lost = self.queue.close()
        if everything:
            lost = list(self.unfinished.values())
        if lost:
            ids = ", ".join(result.id for result in lost)
            logger.warning("%s tasks are FAILED, as %s: %s", len(lost), why, ids)
        for result in lost:
            try:
                raise RuntimeError(f"The task was abandoned: {why}")
            except RuntimeError as error:  # Django logs what is being handled.
                self.finish(result, error=error)
            self.settle(result)


# --- 4. Queue and thread worker -------------------------------------------------------
class _Queue:
    """What is to be done, and a crew of workers for it. A crew serves a backend class
    with its options. It leaves for another one, or if the queue is closed and empty."""

    def __init__(self, pool):
        self.pool = pool
        self.changed = threading.Condition(pool.lock)  # Free workers wait for it.
        self.ready = []  # A heap of (-priority, age, result).
        self.deferred = []  # A heap of (due time, -priority, age, result).
        self.taken = {}  # The results that workers have, by id, until they are settled.
        self.crew = set()  # Its workers.
        self.options, self.closed = {"SHUTDOWN_TIMEOUT": 0}, True  # Until it is opened.

    def open(self, backend):
        """Have a crew for this backend. That of another one sees this, and leaves."""
        if _exiting:
            raise RuntimeError(f"The process exits, {backend.alias!r} takes no tasks")
        wanted = type(backend), backend.options
        if self.closed or (self.backend_class, self.options) != wanted:
            self.backend_class, self.options = wanted
            self.crew, self.closed = set(), False
            self.changed.notify_all()

    def put(self, result):
        due = result.task.run_after.timestamp() if result.task.run_after else 0
        entry = (-result.task.priority, next(_numbers), result)
        if due > time.time():
            heappush(self.deferred, (due, *entry))
            self.changed.notify_all()  # They may have to wait for less long.
        else:
            heappush(self.ready, entry)
            self.changed.notify()

    def hire(self, more=0):
        """Start one worker if what is queued, or will be, exceeds the free ones. Not
        under the lock, which code in the new thread (a ``__del__``) may want."""
        with self.pool.lock:
            free = len(self.crew) - len(self.taken)
            wanted = len(self.ready) + bool(self.deferred) + more
            if wanted <= free or len(self.crew) >= self.options["MAX_WORKERS"]:
                return
            worker = self.backend_class.worker_class(self)
            self.crew.add(worker)
        try:
            worker.start()
        except Exception:
            worker.crew.discard(worker)
            if not self.crew:  # Else those who are there must do.
                raise

    def get(self, worker):
        """Wait for a result and take it. None: the worker has to leave."""
        with _politely(self.pool.lock):
            while worker.crew is self.crew:
                if self.promote():
                    result = heappop(self.ready)[-1]
                    self.taken[result.id] = result
                    return result
                if self.closed:
                    break
                # The clock may be set, so nobody waits for longer than a minute.
                left = self.deferred[0][0] - time.time() if self.deferred else 60
                self.changed.wait(min(left, 60))

    def promote(self):
        """Make ready what is due, drop what was abandoned; return what is ready."""
        while self.deferred and self.deferred[0][0] <= time.time():
            heappush(self.ready, heappop(self.deferred)[1:])
        while self.ready and self.ready[0][-1].id not in self.pool.unfinished:
            heappop(self.ready)
        return self.ready

    def is_busy(self):
        return self.promote() or self.taken

    def close(self):
        """Have the workers leave once nothing is ready; return what is deferred."""
        with self.pool.lock:
            self.promote()
            deferred, self.deferred, self.closed = self.deferred, [], True
            self.changed.notify_all()
        return [entry[-1] for entry in deferred]


class _ThreadWorker(threading.Thread):
    """Runs one task after the other."""

    def __init__(self, queue):
        super().__init__(name=f"tasks-{queue.pool.alias}", daemon=True)
        self.queue, self.crew, self.options = queue, queue.crew, queue.options

    def run(self):
        if hasattr(signal, "pthread_sigmask"):  # The fork server inherits the mask.
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGCHLD})
        try:
            base = _base_context()
            while result := self.queue.get(self):
                self.queue.hire()  # If there is more to do.
                base.copy().run(self.queue.pool.run, result, self)
                self.tidy(last=False)
            self.tidy(last=True)
            connections.close_all()
        finally:
            self.crew.discard(self)

    def prepare(self):
        """Get ready for a task; return the id of the worker."""
        return f"thread-{os.getpid()}-{self.native_id}"

    def execute(self, result):
        """Return what the task returns, or raise what it raises."""
        context = result.task.takes_context and _copy(result)
        return _call(result.task, _own(result.args), _own(result.kwargs), context)

    def tidy(self, last):
        """Clean up after a task, or after the last one."""


def _politely(lock):
    """Return a lock when it is most likely free. Who queues for it gets it before the
    GIL, so the next one has to queue, too: from then on each use costs two switches
    of threads, half of the throughput. It may take a while: not for enqueue."""
    for _ in range(50):
        if lock.acquire(False):
            lock.release()
            break
        time.sleep(0)
    return lock


# --- 5. Results -----------------------------------------------------------------------
_FIELDS, _set = list(TaskResult.__dataclass_fields__), object.__setattr__
_KEY, _numbers = os.urandom(64), itertools.count()


def _new_id():
    """Return a UUID, as good as random. ``os.urandom`` would give up the GIL."""
    name = f"{os.getpid()} {next(_numbers)}".encode()  # uWSGI forks without our hook.
    x = blake2b(name, digest_size=16, key=_KEY).hexdigest()
    return f"{x[:8]}-{x[8:12]}-4{x[13:16]}-8{x[17:20]}-{x[20:]}"


def _change(frozen, **values):
    """Set fields of a frozen dataclass, as Django's own backends do."""
    for name, value in values.items():
        _set(frozen, name, value)


def _new_result(values):
    result = object.__new__(TaskResult)  # Its constructor would convert them again.
    _change(result, **values)
    return result


def _copy(result):
    """Return a TaskResult that shares nothing that can be changed."""
    copy = object.__new__(TaskResult)
    for name in _FIELDS:
        _set(copy, name, _own(getattr(result, name)))
    return copy


def _own(value):
    if type(value) is list:
        return [_own(item) for item in value]
    if type(value) is dict:
        return {key: _own(item) for key, item in value.items()}
    return value


def _json(value, kind, task, name):
    """Return as JSON what a task was given or returned, under this name."""
    try:
        return normalize_json(value)
    except Exception as error:
        kind = ValueError if isinstance(error, ValueError) else kind
        raise kind(
            f"{name!r} of task {task.module_path} is {type(value)}, not JSON, so "
            f"perhaps not pickleable: {error}. Right are None, bool, int, float, str, "
            "UTF-8 bytes, lists and dicts; of a model instance pass the primary key"
        ) from None


def _values(frozen):
    return {name: getattr(frozen, name) for name in frozen.__dataclass_fields__}


def _pack(result):
    """Return a TaskResult as plain data and datetimes, as it leaves this process."""
    packed, task = _values(result), _values(result.task)
    packed |= {"path": result.task.module_path, "run_after": task["run_after"]}
    packed |= {"errors": [*map(_values, result.errors)]}
    plain = (str, int, float)
    packed["task"] = {k: value for k, value in task.items() if isinstance(value, plain)}
    return packed


def _unpack(values):
    """Return the TaskResult that was packed. Import the module of its task."""
    for name, value in list(values.items()):
        if name.endswith(("_at", "_after")) and isinstance(value, str):  # From JSON.
            values[name] = datetime.fromisoformat(value)
    changed = values["task"] | {"run_after": values.pop("run_after")}
    values["task"] = replace(_load_task(values.pop("path")), **changed)
    values["status"] = Status(values["status"])
    values["errors"] = [TaskError(**error) for error in values["errors"]]
    return _new_result(values)


def _load_task(path):
    found = import_string(path)
    return found if isinstance(found, Task) else tasks.task(found)


# RESULTS_CACHE holds JSON text: [host, namespace of process ids, pid, packed result].
_CACHE_KEY, _NAMESPACE = "django_tasks_local.{}.{}", "/proc/self/ns/pid"
_HOST = [socket.gethostname(), os.path.exists(_NAMESPACE) and os.readlink(_NAMESPACE)]


def _write_cache(cache, result):
    packed = [*_HOST, os.getpid(), _pack(result)]
    key = _CACHE_KEY.format(result.backend, result.id)
    caches[cache].set(key, json.dumps(packed, default=datetime.isoformat))


def _read_cache(cache, alias, result_id):
    """Return a result, or None. One whose process is gone from this host is FAILED."""
    key = _CACHE_KEY.format(alias, result_id)
    text = caches[cache].get(key)
    if not text:
        return None
    *host, pid, packed = json.loads(text)
    try:
        result = _unpack(packed)
    except Exception as error:  # The module is gone, or the task has changed.
        raise DoesNotExist(f"The task of {result_id!r} is gone: {error}") from error
    is_gone = host == _HOST and host[1] and not os.path.exists(f"/proc/{pid}")
    if is_gone and not result.is_finished:
        if caches[cache].get(key) != text:  # It was the last that its process did.
            return _read_cache(cache, alias, result_id)
        error = _task_error(RuntimeError(f"Process {pid} ended before the task did"))
        _change(result, status=Status.FAILED, errors=[error], finished_at=now())
        _write_cache(cache, result)
    return result


# --- 6. Running a task ----------------------------------------------------------------
def _base_context():
    """Return a context with nothing in it but this worker's cache objects."""
    context = Context()
    for alias in settings.CACHES:
        with suppress(Exception):  # It is told who uses that cache.
            context.run(caches.__getitem__, alias)
    return context


_coroutines = set()  # The asyncio tasks that run, for the exit to cancel.


async def _await(value):
    _coroutines.add(asyncio.current_task())
    try:
        return await value
    finally:
        _coroutines.discard(asyncio.current_task())


def _call(task, args, kwargs, result):
    """Call a task. What is awaitable is awaited in an event loop of its own."""
    if result:
        args = [tasks.TaskContext(task_result=result), *args]
    try:
        value = task.func(*args, **kwargs)
        if isawaitable(value):
            value = async_to_sync(_await)(value)
        return _json(value, TypeError, task, "return value")
    finally:
        _clean_connections()


def _clean_connections():
    """Leave the next task no transaction, broken session or changed object."""
    for connection in connections.all(initialized_only=True):
        try:
            connection.close_if_unusable_or_obsolete()
            if connection.in_atomic_block:
                connection.close()
            if connection.in_atomic_block or connection.connection is None:
                del connections[connection.alias]
            else:
                connection.connection.rollback()  # Of a BEGIN that Django has not seen.
                connection.health_check_enabled = True  # The next query asks.
                connection.health_check_done = False
        except Exception:
            logger.exception("Connection %r is broken, and dropped", connection.alias)
            del connections[connection.alias]


_CALLERS = {__name__, "asgiref.sync", "concurrent.futures._base"}


def _task_error(error):
    """Return a TaskError, without the frames of those who called the task."""
    kind, text = type(error), ""
    path = f"{kind.__module__}.{kind.__qualname__}".replace("__mp_main__", "__main__")
    with suppress(BaseException):  # Of the exception's own code, or a loader's.
        frames = error.__traceback__
        while frames and frames.tb_frame.f_globals.get("__name__") in _CALLERS:
            frames = frames.tb_next
        text = "".join(traceback.format_exception(kind, error, frames))
        if type(error.__cause__) is _RemoteTraceback and not _parent:
            return error.__cause__.described
    return TaskError(exception_class_path=path, traceback=text or f"{path}\n")


# --- 7. Child processes ---------------------------------------------------------------
# The messages, each a pickle. First a child answers how its set-up went. Then:
#   --> id, path, args, kwargs, packed result or False          run a task
#   <-- "_submit", alias, packed result                         while it runs: do this
#   <-- "get_result", alias, id                                 or this
#   --> "done", packed result   or   "failed", as below         the answer to that
#   <-- "done", value   or   "failed", (TaskError, pickled)     the answer: so it did

_SET_UP_TIMEOUT, _PATIENCE = 60, 5  # Seconds for a child to start, to end itself.
_CHILD_NAME = "django-tasks-local"
_main_file = getattr(sys.modules["__main__"], "__file__", None)


class _RemoteTraceback(Exception):
    """The cause of an exception that was raised in the other process."""


def _outcome(function, *args):
    """Call a function; return a pickled message that says what comes of it."""
    try:
        return pickle.dumps(("done", function(*args)))
    except BaseException as error:
        described, pickled = _task_error(error), b""
        with suppress(BaseException):
            pickled = pickle.dumps(error)
        return pickle.dumps(("failed", (described, pickled)))


def _take(kind, content):
    """Return what such a message says; raise its error, or one with its text."""
    if kind == "done":
        return content
    described, pickled = content
    cause = _RemoteTraceback(described.traceback)
    cause.described = described
    try:
        error = pickle.loads(pickled)
    except BaseException:
        error = RuntimeError(described.traceback.strip().rpartition("\n")[2])
    raise error from cause


class _ProcessWorker(_ThreadWorker):
    """Has a child process of its own run the tasks."""

    sent = 0  # The number of tasks that the child was sent.

    def prepare(self):
        if self in _children and self.age != _age():
            self.end_child(_PATIENCE)
        if self not in _children:
            self.start_child()
        return f"process-{self.process.pid}"

    def start_child(self):
        """Start a process and wait until it is set up."""
        self.sent, self.busy = 0, True  # An exit kills a busy child at once.
        self.age = _age()
        with _children_lock:
            if _exiting:
                raise RuntimeError("The process exits: no child process is started")
            context = _multiprocessing_context(self.options["START_METHOD"])
            if _main_file:  # CPython deletes this at exit, but children import it.
                sys.modules["__main__"].__file__ = _main_file
            self.pipe, pipe = socket.socketpair()
            self.pipe.setblocking(True)  # Whatever socket.setdefaulttimeout() says.
            alive, self.alive = context.Pipe(False)  # Its end ends the child.
            args = pipe, alive, self.options["INITIALIZER"], *_site(), self.age[1]
            self.process = context.Process(None, _child_main, _CHILD_NAME, args)
            try:
                with pipe, alive:
                    self.process.start()
            except BaseException:
                self.pipe.close()
                raise
            self.answers = self.pipe.makefile("rb")
            _children.add(self)
        try:
            self.receive(_SET_UP_TIMEOUT)
        except BaseException:
            self.end_child()
            raise

    def execute(self, result):
        packed = result.task.takes_context and _pack(result)
        run = result.id, result.task.module_path, result.args, result.kwargs, packed
        message = pickle.dumps(run)
        try:
            self.pipe.sendall(message)
        except OSError:  # It has died while it was free: the task has not begun.
            self.end_child()
            result.worker_ids[:] = [self.prepare()]
            self.pipe.sendall(message)
        self.sent += 1
        return self.receive(self.options["TASK_TIMEOUT"])

    def receive(self, timeout):
        """Return or raise what the child answers; meanwhile do what its task asks for.
        Raise TimeoutError after seconds; ChildProcessError if the child dies."""
        self.busy, begun = True, time.monotonic()
        try:
            while not timeout or wait([self.pipe], begun + timeout - time.monotonic()):
                message = pickle.load(self.answers)
                if message[0] in ("done", "failed"):
                    break
                self.pipe.sendall(_outcome(_serve, *message))
            else:
                raise TimeoutError(f"The child process took over {timeout} seconds")
        except Exception as error:
            if not isinstance(error, TimeoutError):
                self.process.join(1)
                error = ChildProcessError(
                    f"Child process {self.process.pid} ended with exit code "
                    f"{self.process.exitcode}, before it was done"
                )
            self.end_child()
            raise error from None
        self.busy = False
        return _take(*message)

    def tidy(self, last):
        last = last or self.sent == self.options["MAX_TASKS_PER_CHILD"]
        if last and self in _children:
            self.end_child(_PATIENCE)

    def end_child(self, patience=0):
        """Let the process end itself for some seconds; kill what is left then."""
        self.answers.close()
        self.pipe.close()
        self.process.join(patience)
        self.kill_child()
        self.process.join()
        self.alive.close()
        _children.discard(self)

    def kill_child(self):
        _kill_group(self.process.pid)
        self.process.kill()


def _kill_group(pid):
    """Kill a child, and what its tasks have started and left."""
    with suppress(AttributeError, ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)


def _serve(method, alias, content):
    """Have a backend do for a child's task what it asks; return the packed result."""
    if method == "_submit":
        content = _unpack(content)
    return _pack(getattr(tasks.task_backends[alias], method)(content))


def _multiprocessing_context(method):
    """Return the context of multiprocessing for a START_METHOD."""
    if not os.path.basename(sys.executable or "").startswith("py"):
        found = os.path.join(sys.prefix, "bin", f"python3.{sys.version_info[1]}")
        if not os.path.exists(found):
            raise RuntimeError(
                f"sys.executable {sys.executable!r} is no Python, nor is {found!r}: "
                "set sys.executable to an interpreter"
            )
        multiprocessing.set_executable(found)
    if "forkserver" in _START_METHODS and method != "spawn":
        from multiprocessing import forkserver  # Windows has none.

        forkserver.set_forkserver_preload([__name__])
        try:
            forkserver.ensure_running()
            return multiprocessing.get_context("forkserver")
        except OSError as error:  # Also if it is the one of a process we are a fork of.
            _START_METHODS.remove("forkserver")
            logger.warning("No fork server, child processes are spawned: %s", error)
    return multiprocessing.get_context("spawn")


def _age():
    """Return what outdates a child. A test run renames databases in place."""
    return _settings_age, {a: p["NAME"] for a, p in connections.settings.items()}


def _site():
    """Return the environment, whether the settings have no module, those it lacks."""
    module = sys.modules.get(os.environ.get("DJANGO_SETTINGS_MODULE"))
    changed = {}
    for name in filter(settings.is_overridden, filter(str.isupper, dir(settings))):
        with suppress(Exception):  # The child has to do without.
            value = getattr(settings, name)
            if value is not getattr(module, name, changed):
                changed[name] = pickle.dumps(value)
    return dict(os.environ), module is None, changed


class _Parent:
    """In a child: the parent, for the task that runs."""

    def __init__(self, pipe):
        self.pipe, self.answers = pipe, pipe.makefile("rb")
        self.lock = threading.RLock()
        self.listens = False  # While a task runs, and no call is under way.

    def ask(self, *request):
        """Have the parent's backend do something; return or raise what comes of it."""
        with self.lock:
            if not self.listens:
                raise RuntimeError(_NO_TASK)
            self.listens = False
            try:
                self.pipe.sendall(pickle.dumps(request))
                answer = pickle.load(self.answers)
            except BaseException:  # Cut off by a signal handler, in mid-message.
                self.pipe.shutdown(socket.SHUT_RDWR)
                raise
            self.listens = True
        return _unpack(_take(*answer))


_NO_TASK = (
    "In a child process only its running task may use backends, to enqueue and get "
    "results, one by one. A main script needs: if __name__ == '__main__'"
)


def _child_main(pipe, alive, *site):
    """Be a child: run what comes in until the parent closes the pipe."""
    global _parent
    _leave_with_parent(alive)
    pipe.setblocking(True)
    pipe.set_inheritable(False)  # Else what a task starts could hide the child's death.
    _parent = _Parent(pipe)
    pipe.sendall(_outcome(_set_up, *site))
    with suppress(EOFError, OSError):
        base = _base_context()
        while True:
            message = pickle.load(_parent.answers)
            _parent.listens = True
            outcome = base.copy().run(_outcome, _run, *message)
            with _parent.lock:
                _parent.listens = False
                pipe.sendall(outcome)
    atexit._run_exitfuncs()


def _run(result_id, path, args, kwargs, packed):
    """Run a task; return what it returns."""
    current_result_id.set(result_id)
    return _call(_load_task(path), args, kwargs, packed and _unpack(packed))


def _leave_with_parent(alive):
    """Leave Ctrl-C to the parent. Die with it, at the end of ``alive``: a thread waits
    for that, and on Linux the kernel, too, as a task may hold the GIL."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(os, "setsid"):
        os.setsid()
        signal.pthread_sigmask(signal.SIG_SETMASK, ())
    if sys.platform == "linux":
        from fcntl import F_SETFL, F_SETOWN, F_SETSIG, fcntl  # Windows has none.

        fcntl(alive, F_SETOWN, -os.getpid())
        fcntl(alive, F_SETSIG, signal.SIGKILL)
        fcntl(alive, F_SETFL, os.O_ASYNC)

    def watch():
        alive.poll(None)
        _kill_group(os.getpid())
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _set_up(initializer, environ, in_code, changed, databases):
    """Make the child like its parent, and set up Django."""
    os.environ.clear()
    os.environ.update(environ)
    if in_code and not settings.configured:
        settings.configure()
        vars(settings)["configure"] = lambda *args, **kwargs: None  # For task modules.
    if "DJANGO_CONFIGURATION" in environ:
        with suppress(ModuleNotFoundError):
            import_string("configurations.importer.install")()
    if initializer:
        import_string(initializer)()
    for name, pickled in changed.items():
        with suppress(Exception):
            setattr(settings, name, pickle.loads(pickled))
    # Django has to look again, as the initializer may have used the settings.
    setting_changed.send(None, setting="TASKS", value=None, enter=True)
    for alias, name in databases.items():
        connections.settings.get(alias, {})["NAME"] = name
    django.setup()


# --- Process-wide: state, exit, fork, changed settings --------------------------------
_pools = {}  # By alias. In a child it is empty.
_children = set()  # Each _ProcessWorker that has one. In a child it is empty.
_children_lock = threading.RLock()
_parent = None  # In a child the _Parent.
_settings_age = 0  # How often they were changed.
_EVENTS = (signals.task_enqueued, signals.task_started, signals.task_finished)
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
        _pools.setdefault(alias, _Pool(alias))
    return _pools[alias]


def _shutdown():
    """At exit: finish the work within SHUTDOWN_TIMEOUT, then abandon what is left."""
    if _exiting:  # It was called already, by another hook.
        return
    # Ctrl-C ends the first step. If it cuts off the second one, the third goes on.
    for step in _finish_work, _give_up, _give_up:
        with suppress(BaseException):
            step()
    end = time.monotonic() + _PATIENCE
    with suppress(BaseException):
        while _children and time.monotonic() < end:
            time.sleep(0.01)
    for worker in list(_children):
        worker.kill_child()


def _finish_work():
    """Wait until nothing is pending or running, or the time of its pool is over."""
    begun, said = time.monotonic(), False
    while any(_is_awaited(pool, begun) for pool in list(_pools.values())):
        if not said and time.monotonic() > begun + 1:
            said = True
            logger.warning(
                "The process exits once all tasks are finished; Ctrl-C gives up, "
                "SHUTDOWN_TIMEOUT limits"
            )
        time.sleep(0.01)


def _is_awaited(pool, begun):
    limit = pool.queue.options["SHUTDOWN_TIMEOUT"]
    in_time = limit is None or time.monotonic() < begun + limit
    with pool.lock:
        return in_time and pool.queue.is_busy()


def _give_up():
    """Abandon what is left. May be called again."""
    global _exiting
    with _children_lock:
        _exiting = True
    for pool in list(_pools.values()):
        pool.close("the process exits", everything=True)
    for task in list(_coroutines):
        with suppress(RuntimeError):  # Its loop has just ended.
            task.get_loop().call_soon_threadsafe(task.cancel)
    for worker in list(_children):
        if worker.busy:
            worker.kill_child()


# Not atexit: by then Python's executors, which coroutines need, take no more work. The
# last hook runs first: this one before that of concurrent.futures, imported above.
threading._register_atexit(_shutdown)


def _after_fork_in_child():
    """Have a forked copy start with nothing of its parent's."""
    global _KEY
    _KEY = os.urandom(64)
    _children_lock.release()
    for child in _children:
        with suppress(OSError):  # Another thread was closing it.
            child.alive.close()
            os.close(child.pipe.detach())  # Its answers may be locked by a thread.
    multiprocessing.process._children.clear()
    for state in _pools, _children, _coroutines:
        state.clear()
    if _parent:
        with suppress(OSError):  # The fork of a fork.
            os.close(_parent.pipe.detach())
        _parent.listens, _parent.lock = False, threading.RLock()
    for event in _EVENTS:
        event.lock = threading.Lock()  # Another thread may have held it,
    for handler in tasks.task_backends, caches:  # and the locks of these.
        handler.__init__()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(
        before=_children_lock.acquire,
        after_in_parent=_children_lock.release,
        after_in_child=_after_fork_in_child,
    )


def _follow_settings(setting, **kwargs):
    """Have children replaced, and if TASKS changes close the pools."""
    global _settings_age
    _settings_age += 1
    if setting == "TASKS":
        for pool in list(_pools.values()):
            pool.close("TASKS has changed")


setting_changed.connect(_follow_settings)


# --- Demonstration: python -m django_tasks_local --------------------------------------
def _demo_wait(name, seconds):
    time.sleep(seconds)


def _demo_sum(name, limit):
    return sum(range(limit))


def _show(task_result, **kwargs):
    print(f"  {task_result.args[0]:8}{task_result.status}\n", end="")


def _demonstrate():
    if os.name == "posix":
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # Be silent if piped into head.
    threads = {"BACKEND": f"{__name__}.ThreadPoolBackend"}
    processes = {"BACKEND": f"{__name__}.ProcessPoolBackend"}
    settings.configure(TASKS={"default": threads, "cpu": processes})
    django.setup()
    for event in _EVENTS:
        event.connect(_show)
    parts = ("default", "wait", _demo_wait, 1.0), ("cpu", "sum", _demo_sum, 100_000_000)
    for alias, name, function, value in parts:
        task, begun = tasks.task(backend=alias)(function), time.monotonic()
        print(f"{type(task.get_backend()).__name__}\n  TASK    STATUS")
        for number in range(1, 4):
            task.enqueue(f"{name}-{number}", value)
        task.get_backend().join()
        print(f"  All done after {time.monotonic() - begun:.1f} s")
    print("Next: First task in two minutes, in README.md")


if __name__ == "__main__":  # Children find the tasks under the module's own name.
    import_string(f"{__spec__.name}._demonstrate")()
