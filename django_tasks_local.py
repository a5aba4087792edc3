# SPDX-License-Identifier: MIT
"""Background work for a Django site with no infrastructure: tasks in local threads or processes.

One file, to install or to copy; for the Tasks framework of Django 6 and its backport to 5.2.
Home: https://pypi.org/project/django-tasks-local/

All of this lives in the web process, but for the child::

    enqueue() -> _Record -> _Pool.ready    heap of (-priority, sequence, id) -> _Worker thread
                    |       _Pool.deferred heap of (due time, ...)               |    ^ pipes (_Peer)
                    +-> _Pool.active -> .finished <---- advance(), settle() -----+    v
                        get_result(): a snapshot                                  _Child process

1. ``enqueue`` validates, keeps a record in the pool of its alias, sends ``task_enqueued`` and queues
   the record. An idle worker wakes, or one is started: up to ``MAX_WORKERS``, one at a time.
2. A worker of ``ThreadPoolBackend`` runs the task. One of ``ProcessPoolBackend`` owns one child process,
   sends it the task and waits for the answer: queue, results, times and signals stay in the parent for
   both, and a child that dies costs one task. Only plain data crosses a pipe, as ``marshal`` bytes.
3. Records are immutable, a change puts another in their place. Whoever asks gets a TaskResult of its own.
4. In a child, ``_pool()`` gives a ``_Remote``, which has the parent's pool do what is asked.
5. After ``close()`` or a change of settings the workers leave, once what was enqueued is done. The exit
   of the interpreter waits for the work, as ``SHUTDOWN_TIMEOUT`` says.

Locks: ``_Pool.lock``, one for each alias, guards all of that pool. ``_start_lock`` guards ``_children``,
and keeps ``os.fork`` away from the start and end of a child. ``_Peer.lock`` lets one thread of it talk to
the parent. Under none of them is a signal sent or a task called, and under the first no other is taken.

Lost when the process is killed: all that is pending, running or kept. All of it is in memory.
"""

from __future__ import annotations

import asyncio
import concurrent.futures.thread  # Before threading._register_atexit(), see there.
import contextlib
import contextvars
import functools
import heapq
import importlib
import itertools
import logging
import marshal
import math
import os
import pickle
import queue
import signal
import sys
import threading
import time
import traceback
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, fields
from datetime import datetime
from typing import TYPE_CHECKING, Any, NamedTuple

import django
from asgiref.sync import async_to_sync, iscoroutinefunction, sync_to_async
from django.conf import settings
from django.core.cache import caches
from django.core.signals import setting_changed
from django.db import connections, transaction
from django.db.backends.signals import connection_created
from django.utils import timezone
from django.utils.module_loading import import_string

if TYPE_CHECKING or django.VERSION >= (6, 0):
    from django.tasks import TaskContext, TaskResult, TaskResultStatus, signals, task, task_backends
    from django.tasks.backends.base import BaseTaskBackend
    from django.tasks.base import Task, TaskError
    from django.tasks.exceptions import InvalidTask, InvalidTaskBackend, TaskException, TaskResultDoesNotExist
    from django.utils.json import normalize_json
else:
    try:
        from django_tasks import TaskContext, TaskResult, TaskResultStatus, signals, task, task_backends
    except ModuleNotFoundError as error:
        raise ImportError(
            f"Django {django.get_version()} has no tasks. Install Django 6, or: pip install django-tasks"
        ) from error
    from django_tasks.backends.base import BaseTaskBackend
    from django_tasks.base import Task, TaskError
    from django_tasks.exceptions import InvalidTaskBackendError as InvalidTaskBackend
    from django_tasks.exceptions import InvalidTaskError as InvalidTask
    from django_tasks.exceptions import TaskException, TaskResultDoesNotExist
    from django_tasks.utils import normalize_json

__all__ = ["ProcessPoolBackend", "TaskQueueFull", "ThreadPoolBackend", "current_result_id"]
__version__ = "1.0.0"
logger = logging.getLogger("django_tasks_local")
current_result_id: contextvars.ContextVar[str] = contextvars.ContextVar("current_result_id")
"""The id of the result of the task that runs; ``LookupError`` where none does."""


class TaskQueueFull(TaskException):
    """``MAX_PENDING`` tasks are waiting; the one more was not enqueued."""


# --- Options: TASKS[alias], checked ---------------------------------------------------------------
def _is_seconds(value: Any) -> bool:
    return type(value) in (int, float) and 0 <= value <= threading.TIMEOUT_MAX


def _is_shared_cache(value: Any) -> bool:
    from django.core.cache.backends import dummy, locmem

    private, known = (dummy.DummyCache, locmem.LocMemCache), value in list(settings.CACHES)
    return known and not issubclass(import_string(settings.CACHES[value]["BACKEND"]), private)


_START_METHODS = ("forkserver", "spawn", "fork") if hasattr(os, "fork") else ("spawn",)
_COUNT = ("a positive integer", lambda value: type(value) is int and value >= 1)
_CACHE = "an alias of CACHES that processes share, so not of a local-memory or dummy cache"
_OPTIONS: dict[str, tuple[Any, str, Callable[[Any], bool]]] = {
    # name: (default, what else is right, whether a value is that)
    "MAX_WORKERS": (10, *_COUNT),
    "MAX_RESULTS": (1000, *_COUNT),
    "MAX_PENDING": (None, *_COUNT),
    "SHUTDOWN_TIMEOUT": (None, "seconds, 0 or more", _is_seconds),
    "RESULTS_CACHE": (None, _CACHE, _is_shared_cache),
    "TASK_TIMEOUT": (None, "seconds, more than 0, at most 1e6", lambda v: _is_seconds(v) and 0 < v <= 1e6),
    "MAX_TASKS_PER_CHILD": (None, *_COUNT),
    "START_METHOD": (None, f"one of {', '.join(_START_METHODS)}", lambda v: v in _START_METHODS),
}
_FOR_PROCESSES = ("TASK_TIMEOUT", "MAX_TASKS_PER_CHILD", "START_METHOD")
_DEFAULTS = {name: default for name, (default, _, _) in _OPTIONS.items()}


class _Config(NamedTuple):
    """One reading of ``TASKS[alias]``; of two, the one of the higher serial holds."""

    serial: int
    backend_class: Any  # Of _PoolBackend.
    params: str  # As ``repr()`` shows them: 1, 1.0 and True differ, and what is changed in place.
    options: dict[str, Any]
    on_commit: str | None  # The database whose commit is to enqueue.


def _configure(backend_class: type[_PoolBackend], alias: str, params: dict[str, Any]) -> _Config:
    """Return ``params`` checked, or raise InvalidTaskBackend; the last reading is used again."""
    last, read = _configs.get(alias), repr(params)
    if last and last.backend_class is backend_class and last.params == read:
        return last
    given = params.get("OPTIONS", {})
    if not isinstance(given, Mapping):
        raise InvalidTaskBackend(f"TASKS[{alias!r}]['OPTIONS'] must be a dictionary, got {given!r}")
    for name in _OPTIONS.keys() & params:
        raise InvalidTaskBackend(f"TASKS[{alias!r}]: {name!r} belongs in its OPTIONS, got {params[name]!r}")
    for name, value in given.items():
        if problem := _problem(name, value, backend_class.worker_class is _ProcessWorker):
            raise InvalidTaskBackend(f"TASKS[{alias!r}]['OPTIONS']: {name!r} {problem}, got {value!r}")
    options, on_commit = {**_DEFAULTS, **given}, params.get("ENQUEUE_ON_COMMIT", False)
    on_commit = _database(f"TASKS[{alias!r}]['ENQUEUE_ON_COMMIT']", on_commit)
    _configs[alias] = _Config(next(_serials), backend_class, read, options, on_commit)
    return _configs[alias]


def _problem(name: Any, value: Any, processes: bool) -> str | None:
    if name in ("QUEUES", "ENQUEUE_ON_COMMIT"):
        return "belongs beside OPTIONS"
    if name not in _OPTIONS:
        import difflib

        near = difflib.get_close_matches(str(name).upper(), _OPTIONS, 1, 0.5) or [", ".join(_OPTIONS)]
        return f"is no option (did you mean {near[0]}?)"
    if not processes and name in _FOR_PROCESSES:
        return "is for ProcessPoolBackend (a thread cannot be stopped or replaced from outside)"
    default, right, check = _OPTIONS[name]
    if check(value) or (value is None and default is None):
        return None
    return f"must be {'None or ' if default is None else ''}{right}"


def _database(place: str, value: Any) -> str | None:
    """Return the database whose commit is to enqueue, if any, for the ``value`` that stands at ``place``."""
    database = "default" if value is True else value
    if value is False or (type(database) is str and database in list(connections)):
        return database or None
    raise InvalidTaskBackend(f"{place} must be False, True or an alias of DATABASES, got {value!r}")


# --- Plain data: what is kept, crosses a pipe or goes to a cache ----------------------------------

_serials = itertools.count(1)
_configs: dict[str, _Config] = {}  # What was read last, by alias.
_ids: deque[str] = deque()  # Ready-made; a deque is documented as thread-safe at both ends.
_ATOMS = {str, int, float, bool, type(None)}
_EXACT = {str: str.__str__, float: float.__float__, int: int.__int__}
_CACHE_KEY = "django_tasks_local.{}.{}"  # Of alias and id of a result.
_NONE, _NO_ARGUMENTS = marshal.dumps(None), marshal.dumps([[], {}])


def _new_id() -> str:
    """Return a random UUID. ``os.urandom`` gives up the GIL, so one call serves 64 ids."""
    try:
        return _ids.popleft()
    except IndexError:
        noise = os.urandom(16 * 64).hex()
        for h in (noise[i : i + 32] for i in range(0, 32 * 64, 32)):
            _ids.append(f"{h[:8]}-{h[8:12]}-4{h[13:16]}-8{h[17:20]}-{h[20:]}")
        return _new_id()


def _plain(value: Any) -> Any:
    """Return ``value`` made JSON as Django does it, each str, int and float of just that type: a subclass
    may be a buffer, like those of NumPy, which ``marshal`` writes as bytes. Raise TypeError or ValueError."""
    kind = type(value)
    if kind in _ATOMS:
        return value
    if kind is list or kind is tuple:
        return [_plain(item) for item in value]
    if kind is dict:
        return {_plain(key): _plain(item) for key, item in value.items()}
    value = normalize_json(value)
    for kind, exact in _EXACT.items():
        if isinstance(value, kind):
            return exact(value)
    return _plain(value)


def _find(module: Any, name: str) -> Any:
    """Return the function at ``name`` of a module, or None."""
    found = functools.reduce(lambda at, part: getattr(at, part, None), name.split("."), module)
    return found.func if issubclass(type(found), Task) else found


@functools.lru_cache(maxsize=1024)
def _reference(func: Callable[..., Any]) -> str:
    """Return "module:name" where another process finds ``func`` itself. Raise InvalidTask."""
    module, place = sys.modules.get(func.__module__), f"{func.__module__}.{func.__qualname__}"
    for name in (func.__qualname__, *vars(module or object)):
        if _find(module, name) is func:
            return f"{func.__module__}:{name}"
    raise InvalidTask(
        f"Task function {place} cannot be found by another process: no name in its module leads to it. "
        "Was it wrapped, or its name given to another?"
    )


def _setter(name: str) -> Callable[[Any, Any], None]:
    """Return what sets a field of a frozen TaskResult: its slot, but the backport has none on Python 3.10."""
    slot = getattr(vars(TaskResult).get(name), "__set__", None)
    return slot or (lambda result, value: object.__setattr__(result, name, value))


_set_task, _set_id, _set_backend, _set_status = map(_setter, ("task", "id", "backend", "status"))
_set_args, _set_kwargs, _set_value = map(_setter, ("args", "kwargs", "_return_value"))
_set_errors, _set_worker_ids = map(_setter, ("errors", "worker_ids"))
_set_enqueued, _set_started = map(_setter, ("enqueued_at", "started_at"))
_set_attempted, _set_finished = map(_setter, ("last_attempted_at", "finished_at"))


class _Record(NamedTuple):
    """What is known of one task."""

    task: Task[..., Any]
    payload: bytes  # The marshalled [args, kwargs].
    id: str
    alias: str
    enqueued_at: datetime | None = None
    status: TaskResultStatus = TaskResultStatus.READY
    # From here on known once it has started,
    worker_id: str | None = None
    started_at: datetime | None = None
    # and from here on once it is finished.
    finished_at: datetime | None = None
    error: tuple[str, str] | None = None  # Class path and traceback.
    value: bytes = _NONE  # The marshalled return value.

    def started(self, worker_id: str) -> _Record:
        return _Record(*self[:5], TaskResultStatus.RUNNING, worker_id, timezone.now())

    def ended(self, value: bytes, error: tuple[str, str] | None) -> _Record:
        status = TaskResultStatus.FAILED if error else TaskResultStatus.SUCCESSFUL
        return _Record(*self[:5], status, *self[6:8], timezone.now(), error, value)

    def result(self) -> TaskResult[..., Any]:
        """Return a TaskResult of its own; to call ``TaskResult()`` would take four times as long."""
        result, errors = object.__new__(TaskResult), []
        if self.error:
            errors = [TaskError(exception_class_path=self.error[0], traceback=self.error[1])]
        args, kwargs = marshal.loads(self.payload)
        _set_task(result, self.task)
        _set_id(result, self.id)
        _set_backend(result, self.alias)
        _set_status(result, self.status)
        _set_args(result, args)
        _set_kwargs(result, kwargs)
        _set_value(result, marshal.loads(self.value))
        _set_errors(result, errors)
        _set_worker_ids(result, [self.worker_id] if self.worker_id else [])
        _set_enqueued(result, self.enqueued_at)
        _set_started(result, self.started_at)
        _set_attempted(result, self.started_at)
        _set_finished(result, self.finished_at)
        return result

    def pack(self) -> dict[str, Any]:
        """Return the record as plain data."""
        task = {field.name: getattr(self.task, field.name) for field in fields(self.task)}
        task |= {"func": _reference(self.task.func), "run_after": _convert(self.task.run_after)}
        return {name: _convert(value) for name, value in {**self._asdict(), "task": task}.items()}


def _convert(value: Any) -> Any:
    if isinstance(value, datetime):
        return value.isoformat()
    return value if isinstance(value, bytes) else _plain(value)


def _unpack(packed: Mapping[str, Any]) -> _Record:
    """Return the record that was packed; import the module of its task."""
    module, _, name = packed["task"]["func"].partition(":")
    func = _find(importlib.import_module(module), name)
    if not callable(func):
        raise InvalidTask(f"Task function {module}.{name} was not found in process {os.getpid()}")
    values, task = dict(packed), {**packed["task"], "func": func}
    for place, key in ((task, "run_after"), *((values, key) for key in values if key.endswith("_at"))):
        place[key] = place[key] and datetime.fromisoformat(place[key])
    kept: Any = object.__new__(LocalTask if "enqueue_on_commit" in task else Task)
    for key, value in task.items():  # Not by its class, which would validate it by the settings of today.
        object.__setattr__(kept, key, value)
    return _Record(**{**values, "task": kept, "status": TaskResultStatus(packed["status"])})


# --- One task, in a worker thread or in a child ---------------------------------------------------
class _RemoteError(Exception):
    """Stands for an exception of the other process: its class path, its traceback and its text."""

    def __str__(self) -> str:
        return "\n".join(self.args[:2])

    def original(self) -> Exception:
        """Return an exception of the same class, if that can be made of the text."""
        path, _, text = self.args
        with contextlib.suppress(ImportError, TypeError, ValueError, AttributeError, LookupError):
            if isinstance(error := import_string(path)(text), Exception):
                return error
        return RuntimeError(f"{path}: {text}")


class _Unforked:
    """Ends the copy of this process that the code within has forked, once it comes out of there."""

    def __enter__(self) -> None:
        self.pid = os.getpid()

    def __exit__(self, *error: object) -> None:
        if os.getpid() != self.pid:
            os._exit(0)


_is_async = functools.lru_cache(maxsize=1024)(iscoroutinefunction)
_coroutines: set[Any] = set()  # What runs, as asyncio's tasks.


async def _await(func: Any, /, *args: Any, **kwargs: Any) -> Any:
    """Await a coroutine function as ``Task.call`` does, but so that the exit can cancel it: else
    ``concurrent.futures``, in whose thread ``async_to_sync`` runs it, would wait for its end."""
    task = asyncio.current_task()
    _coroutines.add(task)
    try:
        if _exiting:
            raise asyncio.CancelledError
        with _Unforked():
            return await func(*args, **kwargs)
    finally:
        _coroutines.discard(task)


def _call(record: _Record, pickleable: str = "") -> bytes:
    """Call the task and return what it returned, as bytes."""
    args, kwargs = marshal.loads(record.payload)
    if record.task.takes_context:
        args.insert(0, TaskContext(task_result=record.result()))
    func = record.task.func
    with _Unforked():
        value = async_to_sync(_await)(func, *args, **kwargs) if _is_async(func) else func(*args, **kwargs)
    try:
        return _NONE if value is None else marshal.dumps(_plain(value))
    except Exception as error:
        raise (ValueError if isinstance(error, ValueError) else TypeError)(
            f"Task {record.task.module_path} returned a {type(value).__module__}.{type(value).__qualname__} "
            f"that cannot be kept ({error}). A return value must be JSON{pickleable}: None, bool, int, "
            "float, str, UTF-8 bytes, or lists and dicts of these"
        ) from None


def _describe(error: BaseException, func: Callable[..., Any] | None = None) -> tuple[str, str, str]:
    """Return class path, traceback and text of the ``error`` that is handled: the frames from those of
    ``func`` on, or without ours. None of the error's own code is trusted, not even to return."""
    if issubclass(type(error), _RemoteError):
        error.__traceback__ = None
        return error.args
    frames, code = sys.exc_info()[2], getattr(func, "__code__", None)
    while frames and (
        frames.tb_frame.f_code is not code if code else frames.tb_frame.f_code.co_filename == __file__
    ):
        frames = frames.tb_next
    BaseException.with_traceback(error, frames)
    path, text = "builtins.BaseException", ""
    with contextlib.suppress(BaseException):
        path = f"{type(error).__module__}.{type(error).__qualname__}".replace("__mp_main__", "__main__")
        text = _plain(str(error))
    try:
        lines = traceback.format_exception(type(error), error, frames)
    except BaseException:
        lines = [f"{path}: {text}\n"]
        with contextlib.suppress(BaseException):  # The loader of its module may fail, too.
            lines = [*traceback.format_tb(frames), *lines]
    return path, "".join(lines), text


class _Here(threading.local):
    connected = False  # Whether this thread ever did: to look at connections takes its time.


_here = _Here()
connection_created.connect(lambda **kwargs: setattr(_here, "connected", True), weak=False)


def _log(level: int, message: str, *args: Any) -> None:
    # A log handler may raise. No worker must end by it; warnings are also given where Ctrl-C ends a wait.
    with contextlib.suppress(BaseException if level == logging.ERROR else Exception):
        logger.log(level, message, *args, exc_info=level >= logging.ERROR)


def _clean_connections(idle: bool = False) -> None:
    """Leave the next task no stale connection, no open transaction and no query log."""
    for connection in connections.all(initialized_only=True) if _here.connected else ():
        try:
            connection.queries_log.clear()
            connection.errors_occurred |= idle  # Then it is looked whether it can still be used.
            connection.close_if_unusable_or_obsolete()
            if connection.in_atomic_block:
                connection.close()
                del connections[connection.alias]
            elif connection.connection is not None:
                connection.connection.rollback()  # Of a BEGIN that Django does not know of.
        except Exception:
            _log(logging.ERROR, "Connection %r could not be closed, it is dropped", connection.alias)
            del connections[connection.alias]


# --- Between parent and child ---------------------------------------------------------------------
class _Peer:
    """One end of the pipes between parent and child. Each calls the other one; who waits for a return
    answers the calls that come meanwhile: the parent runs a task in the child, which may enqueue."""

    def __init__(self, reader: Any, writer: Any) -> None:
        self.reader, self.writer, self.unread = reader, writer, bytearray()
        self.lock = threading.Lock()  # In a child: of the thread that calls, or ends the task.
        self.listens = False  # In a child: whether a task runs, so that the parent listens.

    def send(self, *message: Any) -> None:
        data = marshal.dumps(message)
        if os.name != "posix":
            return self.writer.send_bytes(data)  # type: ignore[no-any-return]
        data = len(data).to_bytes(8, "big") + data
        while data:
            data = data[os.write(self.writer.fileno(), data) :]

    def read(self, deadline: float | None = None) -> Any:
        """Return a message. On POSIX one system call is mostly enough for it, and each gives up the GIL."""
        while (end := 8 + int.from_bytes(self.unread[:8], "big")) > len(self.unread):
            if deadline and not self.reader.poll(max(0.0, deadline - time.monotonic())):
                raise TimeoutError("The task ran for longer than its TASK_TIMEOUT")
            if os.name != "posix":
                return marshal.loads(self.reader.recv_bytes())
            if end > 2**40 or not (part := os.read(self.reader.fileno(), 8192)):
                raise EOFError  # The pipe has ended, or holds what is not ours.
            self.unread += part
        message = marshal.loads(self.unread[8:end])
        del self.unread[:end]
        return message

    def receive(self, number: int, deadline: float | None = None, context: Any = None) -> Any:
        """Return what the other end returns for this call; raise _RemoteError for what it raises.

        A reply to another call is dropped: the exception of a signal handler has ended the wait for it.
        """
        while True:
            kind, of, *content = self.read(deadline)
            if kind not in _REPLIES:
                self.send(*context.run(_outcome, kind, of, *content))
            elif of == number:
                if kind == "returned":
                    return content[0]
                raise _RemoteError(*content)

    def close(self) -> None:
        self.reader.close()
        self.writer.close()


_REPLIES = ("returned", "raised")


def _outcome(name: str, number: int, *args: Any) -> tuple[Any, ...]:
    """Call one of the functions that parent and child offer each other; return the reply."""
    try:
        return "returned", number, globals()[f"_answer_{name}"](*args)
    except BaseException as error:
        return "raised", number, *_describe(error)


_parent: _Peer | None = None  # Set in a child, and there only.
_loaded: dict[str, Task[..., Any]] = {}  # There the tasks that were imported, by reference.
_loading = False  # Whether one is: in the parent the settings may have changed since it was.


def _answer_load(packed: Mapping[str, Any]) -> None:
    """In a child: import the task of a record."""
    global _loading
    _loading = True
    try:
        _loaded[packed["task"]["func"]] = _unpack(packed).task
    finally:
        _loading = False


def _answer_run(reference: str, packed: Mapping[str, Any] | None, *known: Any) -> bytes:
    """In a child: run a task; ``packed`` holds its whole record if the task asks for it."""
    record = _unpack(packed) if packed else _Record(_loaded[reference], *known)
    current_result_id.set(record.id)
    _clean_connections(idle=True)
    try:
        return _call(record, " and pickleable")
    except BaseException as error:
        raise _RemoteError(*_describe(error, record.task.func)) from None
    finally:
        _clean_connections()


def _answer_pool(alias: str, method: str, args: list[Any]) -> Any:
    """In the parent: call a pool for a child."""
    if method == "submit":
        _pool(alias).submit(_unpack(args[0]), task_backends[alias].config)  # type: ignore[attr-defined]
        return None
    reply = getattr(_pool(alias), method)(*args)
    return reply.pack() if isinstance(reply, _Record) else reply


_LATE = "{} not finished in time"


def _turns(timeout: float | None) -> Iterator[float]:
    """Yield the seconds of a child's wait in turns: between them other threads of the task may call, and
    what the task has cancelled or interrupted comes to its end."""
    end = math.inf if timeout is None else time.monotonic() + timeout
    while (left := end - time.monotonic()) > 0.1:
        yield 0.1
    yield max(0.0, left)


class _Remote(NamedTuple):
    """In a child, what stands for the pool of an alias: the parent's pool does what is asked."""

    alias: str

    def __getattr__(self, method: str) -> Callable[..., Any]:
        return functools.partial(self.ask, method)

    def submit(self, record: _Record, config: _Config) -> TaskResult[..., Any]:
        self.ask("submit", record.pack())
        return record.result()

    def wait(self, result_id: str | None, timeout: float | None) -> _Record | None:
        for turn in _turns(timeout):
            with contextlib.suppress(TimeoutError):
                return self.ask("wait", result_id, turn)  # type: ignore[no-any-return]
        raise TimeoutError(_LATE.format(result_id or "Tasks"))

    def ask(self, method: str, *args: Any) -> Any:
        assert _parent
        try:
            with _parent.lock:
                if not _parent.listens:
                    raise RuntimeError(f"{method}() was called in a child process where no task runs")
                _parent.send("pool", number := next(_serials), self.alias, method, args)
                reply = _parent.receive(number)
        except _RemoteError as error:
            raise error.original() from None
        return _unpack(reply) if isinstance(reply, dict) and "payload" in reply else reply


def _child_main(requests: Any, answers: Any, alive: Any, begun: Any, site: Any) -> None:
    """Run what comes in until the parent closes the pipe."""
    global _parent
    _detach(alive)
    peer = _Peer(requests, answers)
    outcome = _outcome("set_up", 0, *site)
    _parent = peer
    with contextlib.suppress(EOFError, OSError):
        while True:
            with peer.lock:
                peer.listens = False
                peer.send(*outcome)
            while (message := peer.read())[0] in _REPLIES:
                pass  # To a call that has ended before.
            begun.value += 1  # From now on the task is not to be run by another one.
            peer.listens = True
            outcome = contextvars.Context().run(_outcome, *message)


def _detach(alive: Any) -> None:
    """Drop the signal handling of a forked parent, ignore Ctrl-C, and die once the parent is gone.

    The parent never writes to ``alive``. A thread waits for its end; on Linux the kernel does too, also
    while a task holds the GIL. A group of its own takes what the task has started along.
    """

    def watch() -> None:
        with contextlib.suppress(EOFError, OSError):
            alive.recv_bytes()
        _kill_group(os.getpid())
        os._exit(1)

    signal.set_wakeup_fd(-1)
    for number in filter(lambda number: callable(signal.getsignal(number)), signal.valid_signals()):
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(os, "setpgid"):
        os.setpgid(0, 0)
        signal.pthread_sigmask(signal.SIG_SETMASK, ())
    if sys.platform == "linux":
        import fcntl

        fcntl.fcntl(alive.fileno(), fcntl.F_SETOWN, -os.getpid())
        fcntl.fcntl(alive.fileno(), fcntl.F_SETSIG, signal.SIGKILL)  # It reaches stopped processes, too.
        fcntl.fcntl(alive.fileno(), fcntl.F_SETFL, os.O_ASYNC)
    threading.Thread(target=watch, daemon=True).start()


def _kill_group(pid: int) -> None:
    with contextlib.suppress(AttributeError, ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)


def _site() -> tuple[dict[str, str], bool, dict[str, bytes]]:
    """Return what a child needs to be set up alike: the environment, whether the settings are made in code
    alone, and those that are."""
    module = sys.modules.get(os.environ.get("DJANGO_SETTINGS_MODULE", ""))
    values: dict[str, bytes] = {}
    for name in filter(settings.is_overridden, filter(str.isupper, dir(settings))):
        with contextlib.suppress(Exception):  # Not to be read or pickled: then the child lacks it.
            value = getattr(settings, name)
            # A test run changes the databases in place.
            if name == "DATABASES" or value is not getattr(module, name, values):
                values[name] = pickle.dumps(value)
    return dict(os.environ), module is None, values


def _databases() -> dict[str, Any]:
    """Return where the databases are: to be set in a child even if the rest cannot be pickled."""
    keys = ("NAME", "USER", "PASSWORD", "HOST", "PORT")
    return {alias: {key: params.get(key) for key in keys} for alias, params in connections.settings.items()}


def _answer_set_up(environ: dict[str, str], in_code: bool, values: dict[str, bytes], databases: Any) -> None:
    for connection in connections.all(initialized_only=True) if settings.configured else ():
        _inherited.append(connection)
        del connections[connection.alias]
    os.environ.clear()
    os.environ.update(environ)
    if in_code and not settings.configured:
        settings.configure()
        vars(settings)["configure"] = lambda *args, **kwargs: None  # Of a module of tasks, once imported.
    for name, value in values.items():
        try:
            loaded = pickle.loads(value)
        except Exception:
            continue  # As if it could not be pickled.
        setattr(settings, name, loaded)
    for alias in databases.keys() & connections.settings.keys():
        connections.settings[alias].update(databases[alias])
    django.setup()


_inherited: list[Any] = []  # Forked connections of the parent: to close one would end its session.


# --- The parent's side of a child -----------------------------------------------------------------

_SET_UP_TIMEOUT = 60  # Seconds for a child to start; others wait for it meanwhile.
_start_lock = threading.RLock()  # Guards _children; held to start a child, and to fork.
_children: set[_Child] = set()
_main_file = getattr(sys.modules["__main__"], "__file__", None)


class _Child:
    """A child process, for one worker."""

    def __init__(self, start_method: str | None) -> None:
        """Start a process and wait until Django is set up in it."""
        self.loaded: set[str] = set()
        self.busy = True
        with _start_lock:
            if _exiting:
                raise RuntimeError("The interpreter is exiting: no child process is started")
            import multiprocessing  # Here, lest a fork leave the copy with a half of it.

            self.sent, self.begun = 0, multiprocessing.RawValue("L", 0)  # Messages that were sent, and came.
            pipes = [multiprocessing.Pipe(duplex=False) for _ in range(3)]
            (requests, to_child), (from_child, answers), (alive, self.alive) = pipes
            self.peer = _Peer(from_child, to_child)
            _children.add(self)
            try:
                self.databases = _databases()
                self.start(start_method or _START_METHODS[0], requests, answers, alive)
            except BaseException:
                self.forget()
                raise
            finally:
                for end in (requests, answers, alive):
                    end.close()
        try:
            self.receive(time.monotonic() + _SET_UP_TIMEOUT)
        except _RemoteError:  # Django could not be set up.
            self.kill()
            raise
        except TimeoutError:
            raise TimeoutError(f"A child process was not set up within {_SET_UP_TIMEOUT} seconds") from None

    def start(self, method: str, *ends: Any) -> None:
        import multiprocessing

        main = sys.modules["__main__"]
        if _main_file and not hasattr(main, "__file__"):  # At exit CPython deletes it.
            main.__file__ = _main_file
        context: Any = multiprocessing.get_context(method)
        if method == "forkserver":
            context.set_forkserver_preload([__name__])
        args = (*ends, self.begun, (*_site(), self.databases))
        self.process = context.Process(target=_child_main, args=args, name=_CHILD_NAME)
        if posix := hasattr(signal, "pthread_sigmask"):
            # Threads of some servers block all signals. A fork server inherits that, but must hear of ends.
            mask = signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGCHLD})
        try:
            self.process.start()
        except ChildProcessError:  # A fork has left us with the fork server of our parent.
            self.start("spawn", *ends)
        finally:
            if posix:
                signal.pthread_sigmask(signal.SIG_SETMASK, mask)

    def send(self, kind: str, *content: Any) -> None:
        self.busy = True
        with contextlib.suppress(OSError):  # It is dead, as receive() will see.
            self.peer.send(kind, self.sent + 1, *content)
        self.sent += 1

    def receive(self, *args: Any) -> Any:
        """Return what the child returns; raise what it raises, TimeoutError or ChildProcessError."""
        try:
            return self.peer.receive(self.sent, *args)
        except _RemoteError:
            raise
        except TimeoutError:
            self.kill()
            raise
        except Exception:  # The pipe has ended, or holds what is not ours.
            self.process.join(1)
            self.kill()
        finally:
            self.busy = False
        code = self.process.exitcode
        killers = [number.name for number in signal.Signals if number == -(code or 0)]
        how = f"was killed by {killers[0]}" if killers else f"ended with exit code {code}"
        missed = "the task was done" if self.sent else "it was set up; its stderr may say why"
        raise ChildProcessError(f"Child process {self.process.pid} {how} before {missed}")

    def end(self) -> None:
        """End the process and what it has started; its worker sees the pipes end, and closes them."""
        _kill_group(self.process.pid)
        if self.process.is_alive():
            self.process.kill()

    def kill(self, patience: float = 0) -> None:
        """End the process, let go of what belongs to it; before, let it end itself for some seconds."""
        if patience:
            with _start_lock:  # A fork must not come in between.
                self.peer.writer.close()
            self.process.join(patience)
        self.end()
        self.process.join()
        self.forget()

    def forget(self) -> None:
        with _start_lock:
            self.peer.close()
            self.alive.close()
            _children.discard(self)


# --- Queue, records and workers -------------------------------------------------------------------
def _politely(lock: Any) -> Any:
    """Return a lock for ``with``, when it is most likely free. For workers only.

    A thread that queues is given a lock before it has the GIL: until it gets that, whoever wants the lock
    has to queue, too. From then on each use of the lock costs two switches of threads.
    """
    for _ in range(50):
        if lock.acquire(False):
            lock.release()
            break
        time.sleep(0)
    return lock


_CLOCK_INTERVAL = 60.0  # Seconds between looks at the clock: it may be set, or the machine sleep.


class _Pool:
    """All there is under one alias; ``lock`` guards it.

    A task is submitted (admitted, announced, placed in a queue) or withdrawn as if it had never been; taken;
    advanced to RUNNING; concluded (advanced to its end and settled), or abandoned: concluded as FAILED.
    """

    def __init__(self, alias: str) -> None:
        self.alias, self.config = alias, _Config(0, None, "", _DEFAULTS, None)
        self.lock = threading.Lock()
        self.active: dict[str, _Record] = {}  # Until all that goes with their end is done.
        self.taken: set[str] = set()  # Of these what workers have taken.
        self.finished: OrderedDict[str, _Record] = OrderedDict()  # The least recently used first.
        self.ready: list[tuple[int, int, str]] = []  # A heap of (-priority, sequence, id).
        self.deferred: list[tuple[float, int, int, str]] = []  # A heap of the same after the due time.
        self.workers: set[_Worker] = set()
        self.idle: list[_Worker] = []  # Who waits to be called.
        self.starting: _Worker | None = None  # Not at the queue yet; there it calls the next one.
        self.waking = False  # Whether an idle one is on its way there, to do the same.
        # By the id that is awaited, or None for all: what is waited with, and by which task, if it is one.
        self.waits: dict[str | None, dict[Future[_Record | None], str]] = {}
        self.cache_failed = False
        self.given_up = 0  # At exit the thread that does it.

    def submit(self, record: _Record, config: _Config) -> TaskResult[..., Any]:
        """Keep, announce and queue a task, or raise and leave nothing behind."""
        result, queueing = record.result(), False
        try:
            with self.lock:
                self.admit(record, config)
            signals.task_enqueued.send(sender=config.backend_class, task_result=result)
            if config.options["RESULTS_CACHE"]:
                if transaction.get_connection().in_atomic_block:  # Of which the cache may be a part.
                    transaction.on_commit(functools.partial(self.publish, record.id, config))
                else:
                    self.publish(record.id, config)
            queueing = True
            with self.lock:
                helper = self.place(record)
            self.start(helper)
        except BaseException:  # Of a receiver, or of a signal handler at any time.
            self.withdraw(record.id, queueing)
            raise
        return result

    def place(self, record: _Record) -> _Worker | None:
        """Queue a task, and see to it that a worker comes for it, which may have to be started."""
        if self.given_up:  # And the task with it, as the process exits.
            return None
        entry, due = (-record.task.priority, next(_serials), record.id), _due(record.task.run_after)
        if due and due > time.time():
            heapq.heappush(self.deferred, (due, *entry))
        else:
            heapq.heappush(self.ready, entry)
        return self.call_helper()

    def withdraw(self, result_id: str, queueing: bool) -> None:
        """Forget a task unless a worker has it, and call again: the last call may have been cut off."""
        helper = None
        with self.lock:
            running = result_id in self.taken
            if queueing:
                heaps: tuple[list[Any], ...] = (self.ready, self.deferred)
                for heap in heaps:
                    heap[:] = [entry for entry in heap if entry[-1] != result_id]
                    heapq.heapify(heap)
                self.workers -= {self.starting}
                self.starting, self.waking = None, False
                helper = self.call_helper()
        self.start(helper)
        if not running:
            self.settle(result_id, None)

    def admit(self, record: _Record, config: _Config) -> None:
        """Keep a task, if there is room for it."""
        if self.given_up or _exiting:
            raise RuntimeError(f"The interpreter is exiting: {self.alias!r} takes no more tasks")
        if self.config.serial < config.serial:
            self.renew(config)
        limit = config.options["MAX_PENDING"]
        if limit and len(self.active) - len(self.taken) >= limit:
            name = record.task.module_path
            raise TaskQueueFull(f"{self.alias!r} has {limit} tasks pending (MAX_PENDING), {name} was refused")
        self.active[record.id] = record

    def renew(self, config: _Config) -> list[_Worker]:
        """Have the workers leave that were started with another configuration, and return them."""
        self.config = config
        for worker in self.idle:
            worker.calls.put(None)
        self.idle.clear()
        return [worker for worker in self.workers if worker.config is not config]

    def wake(self) -> None:
        self.idle[-1].calls.put(None)  # First: who has not heard it must still be idle.
        self.waking = True
        self.idle.pop()

    def call_helper(self) -> _Worker | None:
        """Wake an idle worker for what is ready, or to wait for what is deferred, which only the last one
        that was woken did; or return a new one to start, one at a time."""
        if self.waking or not (self.ready or self.deferred):
            return None
        if self.idle:
            self.wake()
        elif not self.starting:
            if len(self.workers) < self.config.options["MAX_WORKERS"]:
                self.starting = self.config.backend_class.worker_class(self, self.config)
                self.workers.add(self.starting)
                return self.starting
        return None

    def start(self, worker: _Worker | None) -> None:
        """Start a worker, if one is to start; if that fails, those who are there must do, if any are."""
        if not worker:
            return
        try:
            worker.thread.start()
        except (RuntimeError, MemoryError) as error:
            _log(logging.WARNING, "No more workers could be started for %r: %s", self.alias, error)
            with self.lock:
                worker.left.set()
                self.workers.discard(worker)
                self.starting, lost = None, []
                if not self.workers:
                    queued: list[Any] = [*self.ready, *self.deferred]
                    self.ready, self.deferred, lost = [], [], [self.active[entry[-1]] for entry in queued]
            self.abandon(lost, f"no worker could be started: {error}")

    def take(self, worker: _Worker) -> bool:
        """Wait for a task and give it to the worker. False: the worker has to leave."""
        with _politely(self.lock):
            if self.starting is worker:
                self.starting = None
            while stays := worker.config is self.config and worker in self.workers:
                timeout = self.promote() if self.deferred else None
                if self.ready:
                    break
                self.idle.append(worker)
                self.lock.release()
                with contextlib.suppress(BaseException):  # Empty, or what another thread has raised in here.
                    worker.calls.get(timeout=timeout)
                _politely(self.lock).acquire()
                self.waking = False
                if worker in self.idle:  # Nobody has called.
                    self.idle.remove(worker)
            if stays:
                worker.record = self.active[heapq.heappop(self.ready)[2]]
                self.taken.add(worker.record.id)
            else:
                self.workers.discard(worker)
            helper = self.call_helper()
        self.start(helper)
        return stays

    def promote(self) -> float | None:
        """Make ready what is due; return the seconds until the next look at what is deferred."""
        while self.deferred:
            if (left := self.deferred[0][0] - time.time()) > 0:
                return min(left, _CLOCK_INTERVAL)
            heapq.heappush(self.ready, heapq.heappop(self.deferred)[1:])
        return None

    def advance(self, record: _Record, event: Any, context: contextvars.Context, config: _Config) -> bool:
        """Put a changed record in the place of the old one and let it be known. False: it was given up."""
        with _politely(self.lock):
            if (old := self.active.get(record.id)) is None or old.finished_at:
                return False
            self.active[record.id] = record
        if event is None:
            return True
        try:
            if config.options["RESULTS_CACHE"]:
                self.publish(record.id, config)
            _politely(event.lock)  # Which ``send`` takes.
            with _Unforked():
                context.run(event.send_robust, sender=config.backend_class, task_result=record.result())
        except BaseException:
            _log(logging.ERROR, "A signal receiver raised for task result %s", record.id)
        return True

    def conclude(
        self, worker: _Worker, context: contextvars.Context, value: bytes, error: BaseException | None = None
    ) -> None:
        """In its worker, make a task SUCCESSFUL or, while the error is handled, FAILED; unless given up."""
        described = None if error is None else _describe(error, worker.record.task.func)[:2]
        record = worker.record.ended(value, described)
        if self.advance(record, signals.task_finished, context, worker.config):
            _clean_connections()
            self.settle(record.id, record)

    def abandon(self, records: Iterable[_Record], why: str) -> None:
        for record in records:
            try:
                raise RuntimeError(f"The task was abandoned: {why}")  # Django logs the error that is handled.
            except RuntimeError as error:
                record = record.ended(_NONE, _describe(error)[:2])
                if self.advance(record, signals.task_finished, contextvars.Context(), self.config):
                    self.settle(record.id, record)

    def settle(self, result_id: str, record: _Record | None) -> None:
        """Let go of a task, keep what it came to, and wake those who wait for it."""
        with _politely(self.lock):
            self.active.pop(result_id, None)
            self.taken.discard(result_id)
            self.promote()
            if record:
                self.finished[result_id] = record
                while len(self.finished) > self.config.options["MAX_RESULTS"]:
                    self.finished.popitem(last=False)
            over = [result_id] if self.ready or self.taken else [result_id, None]
            done = [future for awaited in over for future in self.waits.pop(awaited, ())]
        for future in done:
            future.set_result(record)

    def publish(self, result_id: str, config: _Config) -> None:
        """Write what is known of a task to RESULTS_CACHE; if that fails, say so once and go on."""
        alias, written = config.options["RESULTS_CACHE"], None
        try:
            while True:  # Another thread may have been faster with a later status.
                with self.lock:
                    record = self.active.get(result_id) or self.finished.get(result_id)
                if record is None or record is written:
                    break
                caches[alias].set(_CACHE_KEY.format(self.alias, result_id), record.pack())
                written, self.cache_failed = record, False
        except Exception:
            with self.lock:
                said, self.cache_failed = self.cache_failed, True
            if not said:
                _log(logging.ERROR, "RESULTS_CACHE %r fails; said once, until it works", alias)

    def get(self, result_id: str) -> _Record | None:
        with self.lock:
            record = self.active.get(result_id)
            if not record and (record := self.finished.get(result_id)):
                self.finished.move_to_end(result_id)
            return record

    @contextlib.contextmanager
    def expect(self, result_id: str | None) -> Iterator[Any]:
        """Yield a future of the finished record, or for None of the time when no task is pending or running;
        yield None if there is nothing to wait for. Raise TimeoutError where the wait does."""
        me = current_result_id.get("")
        future: Future[_Record | None] | None = None
        with self.lock:
            self.promote()
            if (self.ready or self.taken) if result_id is None else result_id in self.active:
                self.check_deadlock(me, result_id)
                future = Future()
                future.set_running_or_notify_cancel()  # asyncio must not cancel.
                self.waits.setdefault(result_id, {})[future] = me
        try:
            yield future
        except (concurrent.futures.TimeoutError, asyncio.TimeoutError):
            raise TimeoutError(_LATE.format(result_id or "Tasks")) from None
        finally:
            with self.lock:
                self.waits.get(result_id, {}).pop(future, None)  # type: ignore[arg-type]

    def check_deadlock(self, me: str, result_id: str | None) -> None:
        """Raise RuntimeError if a wait would never end."""
        never = self.given_up == threading.get_ident()
        if me in self.taken:
            waits = {(task, awaited) for awaited, tasks in self.waits.items() for task in tasks.values()}
            waits.add((me, result_id))
            reached = {result_id or me}
            while more := {awaited or task for task, awaited in waits if task in reached} - reached:
                reached |= more
            waits = {(task, awaited) for task, awaited in waits if awaited in self.active}
            free = set(self.taken)  # Of them, and of what waits for none but them, the workers get free.
            while stuck := {task for task, awaited in waits if task in free and awaited not in free}:
                free -= stuck
            full = len(self.taken) - len(free) >= self.config.options["MAX_WORKERS"]
            never = never or full or me in reached
        if never:
            raise RuntimeError(
                f"It would wait for {result_id or 'all tasks'} for ever: that one waits for "
                f"{me or 'the exit'}, or all workers of {self.alias!r} wait"
            )

    def wait(self, result_id: str | None, timeout: float | None) -> _Record | None:
        """Return the finished record, or None if there was nothing to wait for."""
        with self.expect(result_id) as future:
            timeout = timeout and min(timeout, threading.TIMEOUT_MAX)
            return future and future.result(timeout)  # type: ignore[no-any-return]

    def stats(self) -> dict[str, int]:
        with self.lock:
            self.promote()
            counts = {"pending": len(self.active) - len(self.deferred) - len(self.taken)}
            counts |= {"deferred": len(self.deferred), "running": len(self.taken)}
            counts |= {"finished": len(self.finished), "workers": len(self.workers)}
        return {**counts, "pid": os.getpid()}

    def unfinished(self) -> list[str]:
        """Return the ids of what is running or pending, unless it was given up."""
        with self.lock:
            self.promote()
            return [] if self.given_up else [*self.taken, *(entry[2] for entry in self.ready)]

    def close(self, wait: bool = True) -> None:
        """Abandon what is deferred; once the rest is finished, have the workers leave."""
        if self.given_up or _exiting:
            return
        # A thread of its own: a signal handler that raises here must not cut it off.
        # In no context of a task, either, which some Pythons pass on to threads.
        run, args = contextvars.Context().run, (self.drain, next(_serials), self.config)
        drain = threading.Thread(target=run, args=args, name=f"tasks-{self.alias}-drain", daemon=True)
        drain.start()
        if wait and current_result_id.get(None) is None:
            drain.join()

    def drain(self, closed: int, config: _Config) -> None:
        """Do so with what was queued before; ``closed`` is a sequence number."""
        with self.lock:
            self.promote()
            late = [self.active[entry[3]] for entry in self.deferred if entry[2] < closed]
            self.deferred = [entry for entry in self.deferred if entry[2] > closed]
            heapq.heapify(self.deferred)
            ids = [*self.taken, *(entry[2] for entry in self.ready if entry[1] < closed)]
        if late:
            about = self.alias, len(late), ", ".join(record.id for record in late)
            _log(logging.WARNING, "%r is closed, %s deferred tasks are abandoned: %s", *about)
        self.abandon(late, "its pool was closed before it was due")
        for result_id in ids:
            self.wait(result_id, None)
        with self.lock:
            # A copy counts as another one: configurations are compared by ``is``.
            leaving = self.renew(self.config._replace() if self.config is config else self.config)
        for worker in leaving:
            worker.left.wait()
        connections.close_all()  # Of signal receivers, in this thread.

    def give_up(self, lost: dict[str, None]) -> None:
        """Fail all that is not finished, and note its ids; take nothing more."""
        with self.lock:
            self.given_up = threading.get_ident()
            records = [record for record in self.active.values() if not record.finished_at]
            self.ready, self.deferred = [], []
        lost.update(dict.fromkeys(record.id for record in records))
        self.abandon(records, "the process exits")
        with self.lock:
            children = [worker.child for worker in self.renew(self.config._replace())]
        for child in children:
            if child and child.busy:
                child.end()


def _due(run_after: datetime | None) -> float:
    """Return seconds since the epoch; ``timestamp()`` fails near the ends of the calendar."""
    if run_after is None or run_after.year < 1971:
        return 0.0
    return float("inf") if run_after.year > 9000 else run_after.timestamp()


class _Worker:
    """A thread that takes task after task from its pool, and runs them."""

    record: _Record
    child: _Child | None = None

    def __init__(self, pool: _Pool, config: _Config) -> None:
        self.pool, self.config = pool, config
        self.calls: queue.SimpleQueue[None] = queue.SimpleQueue()
        self.left = threading.Event()
        self.thread = threading.Thread(target=self.main, name=f"tasks-{pool.alias}", daemon=True)

    def main(self) -> None:
        self.prepare()
        while self.pool.take(self):
            self.work()
            self.prepare()
        try:
            self.drop_child()
            connections.close_all()
        finally:
            self.left.set()

    def work(self) -> None:
        """Run the task that was taken, and keep nothing of it."""
        context = contextvars.Context()
        context.run(current_result_id.set, self.record.id)
        _clean_connections(idle=True)
        try:
            value = self.execute(context)
        except BaseException as error:
            self.pool.conclude(self, context, _NONE, error)
        else:
            self.pool.conclude(self, context, value)
        del self.record

    def drop_child(self) -> None:
        """End the child process, if there is one; let it end itself before."""
        if self.child:
            self.child.kill(patience=5)
            self.child = None

    def prepare(self) -> None:
        """Get ready for the next task."""

    def execute(self, context: contextvars.Context) -> bytes:
        """Start the task; return what it returns, as bytes, or raise what it raises."""
        self.record = self.record.started(f"thread-{os.getpid()}-{self.thread.native_id}")
        runs = self.pool.advance(self.record, signals.task_started, context, self.config)
        try:
            return context.run(_call, self.record) if runs else _NONE
        finally:
            _clean_connections()


class _ProcessWorker(_Worker):
    """One that has a child process run the tasks."""

    def prepare(self) -> None:
        options = self.config.options
        limit = options["MAX_TASKS_PER_CHILD"] or math.inf
        if self.child and self.child.sent - len(self.child.loaded) >= limit:
            self.drop_child()
        if not self.child and self.config is self.pool.config:
            with contextlib.suppress(Exception):  # The next task tries again, and fails with the error.
                self.child = _Child(options["START_METHOD"])

    def execute(self, context: contextvars.Context) -> bytes:
        task, limit = self.record.task, self.config.options["TASK_TIMEOUT"]
        reference, again = _reference(task.func), False
        while True:
            if self.child and self.child.databases != _databases():
                self.drop_child()
            child = self.child = self.child or _Child(self.config.options["START_METHOD"])
            try:
                if reference not in child.loaded:
                    child.send("load", self.record.pack())
                    child.receive(None, context)
                    child.loaded.add(reference)
                event = None if self.record.started_at else signals.task_started
                self.record = record = self.record.started(f"process-{child.process.pid}")
                packed = record.pack() if task.takes_context else None
                child.send("run", reference, packed, record.payload, record.id, record.alias)
                if not self.pool.advance(record, event, context, self.config):
                    child.end()
                return child.receive(limit and time.monotonic() + limit, context)  # type: ignore[no-any-return]
            except (ChildProcessError, TimeoutError):
                self.child = None
                # Of a child that died idle, which has not begun the task, another one takes it.
                if again or child.begun.value >= child.sent:
                    raise
                again = True


# --- Process-wide: pools by alias, settings, fork, exit -------------------------------------------

_pools: dict[str, _Pool] = {}
_exiting = False
_SIGNALS = (signals.task_enqueued, signals.task_started, signals.task_finished)
_CHILD_NAME = "django-tasks-local"


def _pool(alias: str) -> Any:
    """Return what holds the tasks of an alias: here a _Pool, in a child a _Remote."""
    if _parent:
        return _Remote(alias)
    if pool := _pools.get(alias):
        return pool
    if "multiprocessing" in sys.modules:
        import multiprocessing.util

        if multiprocessing.current_process().name == _CHILD_NAME:
            raise RuntimeError(
                "In a child process only its running task may enqueue, or tasks would run twice: put what "
                "the main script does under: if __name__ == '__main__', enqueue nothing in AppConfig.ready()"
            )
        # In a process of its own it joins ours; up to Python 3.12 it does so before ``_shutdown`` ends them.
        multiprocessing.util.Finalize(None, _shutdown, exitpriority=100)
    return _pools.setdefault(alias, _Pool(alias))


def _close_changed(*, setting: str, **kwargs: Any) -> None:
    """Close the pools whose settings are no longer those of ``TASKS``; give others children set up anew."""
    for alias, pool in list(_pools.items()):
        if not pool.config.serial:
            continue
        if setting == "TASKS" and pool.config.params != repr(getattr(settings, "TASKS", {}).get(alias)):
            pool.close(wait=False)
        elif pool.config.backend_class.worker_class is _ProcessWorker:
            with pool.lock:
                pool.renew(pool.config._replace())  # Who leaves calls the next one.


setting_changed.connect(_close_changed)


def _at_fork(action: str) -> None:
    for lock in (_start_lock, *(event.lock for event in _SIGNALS)):
        getattr(lock, action)()


def _after_fork_in_child() -> None:
    """Start with nothing of the parent's, and keep nothing of it open."""
    global _start_lock, _pools, _exiting, _parent
    _at_fork("release")
    if _parent:
        _parent.close()
    for child in list(_children):
        child.forget()
        if child.process.pid is not None:
            # At exit multiprocessing would read the exit code, which is the parent's, and wait.
            os.dup2(os.open(os.devnull, os.O_RDONLY), child.process.sentinel)
            child.process.join = lambda timeout=None: None
    _start_lock, _pools, _exiting, _parent = threading.RLock(), {}, False, None
    for handler in (task_backends, caches):  # Another thread may have held the lock of its storage.
        handler.__init__()  # type: ignore[misc]
    _ids.clear()
    _coroutines.clear()


if hasattr(os, "register_at_fork"):
    before, after = (functools.partial(_at_fork, action) for action in ("acquire", "release"))
    os.register_at_fork(before=before, after_in_parent=after, after_in_child=_after_fork_in_child)


def _shutdown() -> None:
    """At exit finish the work, within SHUTDOWN_TIMEOUT; fail what is left."""
    lost: dict[str, None] = {}
    with contextlib.suppress(BaseException):  # Whatever a signal handler raises, and where, ends the wait.
        _await_work(lost)
    try:
        _give_up(lost)
    except BaseException:  # Another signal.
        with contextlib.suppress(BaseException):
            _give_up(lost)
    for child in list(_children):
        child.end()


def _give_up(lost: dict[str, None]) -> None:
    """Fail all that is left, and say so; may be repeated."""
    global _exiting
    with _start_lock:
        _exiting = True
    for pool in list(_pools.values()):
        pool.give_up(lost)
    for task in list(_coroutines):
        with contextlib.suppress(RuntimeError):  # The loop has just ended.
            task.get_loop().call_soon_threadsafe(task.cancel)
    if lost:
        _log(logging.WARNING, "The process exits, %s tasks are FAILED: %s", len(lost), ", ".join(lost))
        lost.clear()
    end = time.monotonic() + 5  # Of the patience for idle children; those at work were ended.
    while _children and time.monotonic() < end:
        time.sleep(0.01)


def _await_work(lost: dict[str, None]) -> None:
    """Wait until nothing is pending or running; give up each pool when its time is over."""
    begun, said = time.monotonic(), False
    while busy := [pool for pool in list(_pools.values()) if pool.unfinished()]:
        ids: list[str] = []
        for pool in busy:
            limit = pool.config.options["SHUTDOWN_TIMEOUT"]
            if limit is not None and time.monotonic() >= begun + limit:
                pool.give_up(lost)
            else:
                ids += pool.unfinished()
        if ids and not said:
            said = True
            _log(
                logging.WARNING,
                "The process exits once %s tasks are finished; Ctrl-C gives up, SHUTDOWN_TIMEOUT limits: %s",
                *(len(ids), ", ".join(ids)),
            )
        with contextlib.suppress(TimeoutError):
            # Not for long: a signal that comes just before a wait begins does not interrupt it.
            busy[0].wait(None, 0.1)


# Not atexit: by then concurrent.futures takes no more work, and async_to_sync() needs it. These hooks
# run last in, first out: this one before that of concurrent.futures, imported above.
threading._register_atexit(_shutdown)  # type: ignore[attr-defined]


# --- The backends ---------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class LocalTask(Task):  # type: ignore[type-arg]
    """A task that may say itself whether a commit enqueues it, see ``ENQUEUE_ON_COMMIT``."""

    enqueue_on_commit: bool | str | None = None


class _PoolBackend(BaseTaskBackend):
    """What both backends have in common."""

    task_class = LocalTask
    supports_defer = supports_async_task = supports_get_result = supports_priority = True
    worker_class: type[_Worker] = _Worker

    def __init__(self, alias: str, params: dict[str, Any]) -> None:
        """Check ``params``, that is ``TASKS[alias]``, or raise InvalidTaskBackend; start nothing."""
        super().__init__(alias, params)
        self.config = _configure(type(self), alias, params)

    def validate_task(self, task: Any) -> None:
        """Raise InvalidTask if the backend cannot run this Task."""
        if not _loading:
            super().validate_task(task)

    def enqueue(self, task: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Queue up a Task with its arguments and return its TaskResult, READY.

        Raise InvalidTask (of the backport InvalidTaskError); TypeError where arguments are not JSON, or for
        processes ValueError if they cannot be pickled either; TaskQueueFull; RuntimeError at exit.
        """
        self.validate_task(task)
        if self.config.options["RESULTS_CACHE"] or self.worker_class is _ProcessWorker:
            _reference(task.func)
        arguments = [[*args], {**(kwargs or {})}] if args or kwargs else None
        try:
            payload = marshal.dumps(_plain(arguments)) if arguments else _NO_ARGUMENTS
        except TypeError:
            if self.worker_class is _ProcessWorker:
                try:
                    pickle.dumps(arguments)
                except Exception as error:
                    raise ValueError(f"Arguments must be pickleable, and JSON: {error}") from error
            raise
        record = _Record(task, payload, _new_id(), self.alias, enqueued_at=timezone.now())
        on_commit, database = getattr(task, "enqueue_on_commit", None), self.config.on_commit
        if on_commit is not None:
            database = _database(f"enqueue_on_commit of {task.module_path}", on_commit)
        if database and transaction.get_connection(database).in_atomic_block:
            transaction.on_commit(functools.partial(self._commit, record), using=database)
            return record._replace(enqueued_at=None).result()
        return _pool(self.alias).submit(record, self.config)

    def _commit(self, record: _Record) -> None:
        _pool(self.alias).submit(record._replace(enqueued_at=timezone.now()), self.config)

    async def aenqueue(self, task: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Do as ``enqueue``; in place, signal receivers too, unless one of them is async, or a cache or a
        transaction is involved."""
        on_commit = self.config.on_commit or getattr(task, "enqueue_on_commit", None)
        is_async = any(receiver[-1] for receiver in signals.task_enqueued.receivers)
        if on_commit or is_async or self.config.options["RESULTS_CACHE"]:
            return await sync_to_async(self.enqueue)(task, args, kwargs)
        return self.enqueue(task, args, kwargs)

    def get_result(self, result_id: str) -> TaskResult[..., Any]:
        """Return the result as it is now. Raise TaskResultDoesNotExist."""
        if record := _pool(self.alias).get(str(result_id)):
            return record.result()  # type: ignore[no-any-return]
        result_id, alias = str(result_id), self.config.options["RESULTS_CACHE"]
        if alias and len(result_id) == 36 and result_id.replace("-", "").isalnum():  # Not any key.
            if packed := caches[alias].get(_CACHE_KEY.format(self.alias, result_id)):
                try:
                    return _unpack(packed).result()
                except (ImportError, InvalidTask) as error:
                    raise TaskResultDoesNotExist(f"The task of {result_id!r} is gone: {error}") from error
        elsewhere = f"and RESULTS_CACHE {alias!r} has none" if alias else "set RESULTS_CACHE to share them"
        raise TaskResultDoesNotExist(
            f"No task result {result_id!r} of {self.alias!r} in process {self.stats()['pid']}: results live "
            f"in the memory of the process that enqueued, at most MAX_RESULTS; {elsewhere}"
        )

    async def aget_result(self, result_id: str) -> TaskResult[..., Any]:
        """Do as ``get_result``; in place, unless a cache is to be read."""
        if self.config.options["RESULTS_CACHE"] and not _pool(self.alias).get(str(result_id)):
            return await sync_to_async(self.get_result)(result_id)
        return self.get_result(result_id)

    def wait_result(self, result_id: str, timeout: float | None = None) -> TaskResult[..., Any]:
        """Return the result once it is finished; wait for ``timeout`` seconds, None: without end.

        Raise TimeoutError; TaskResultDoesNotExist; in a task, RuntimeError if it would wait for ever.
        """
        record = _pool(self.alias).wait(str(result_id), timeout)
        return self._finished(record.result() if record else self.get_result(result_id))

    async def await_result(self, result_id: str, timeout: float | None = None) -> TaskResult[..., Any]:
        """Do as ``wait_result`` without blocking the event loop."""
        if _parent:
            wait = sync_to_async(self.wait_result, thread_sensitive=False)
            for turn in _turns(timeout):
                with contextlib.suppress(TimeoutError):
                    return await wait(result_id, turn)
            raise TimeoutError(_LATE.format(result_id))
        with _pool(self.alias).expect(str(result_id)) as future:
            record = future and await asyncio.wait_for(asyncio.wrap_future(future), timeout)
        return self._finished(record.result() if record else await self.aget_result(result_id))

    def _finished(self, result: TaskResult[..., Any]) -> TaskResult[..., Any]:
        if result.is_finished:
            return result
        where = f"in a process other than {os.getpid()}, so its end cannot be waited for"
        raise TaskResultDoesNotExist(f"Task result {result.id!r} is {result.status} {where}")

    def join(self, timeout: float | None = None) -> None:
        """Wait until nothing is pending or running; deferred tasks do not count.

        Raise TimeoutError after ``timeout`` seconds; RuntimeError in a task of this alias.
        """
        _pool(self.alias).wait(None, timeout)

    def stats(self) -> dict[str, int]:
        """Return the numbers of tasks pending, deferred, running, finished, and of workers; pid."""
        return _pool(self.alias).stats()  # type: ignore[no-any-return]

    def close(self) -> None:
        """Finish what was enqueued, abandon what is deferred and end the workers.

        In a task it returns at once. To enqueue afterwards starts afresh.
        """
        _pool(self.alias).close()


class ThreadPoolBackend(_PoolBackend):
    """Runs tasks in threads of this process: for work that waits for network, disk, database."""


class ProcessPoolBackend(_PoolBackend):
    """Runs tasks in child processes: for work that computes. What goes in and out is plain data."""

    worker_class = _ProcessWorker


# --- Demonstration: python -m django_tasks_local --------------------------------------------------
def _demo_wait(seconds: Any) -> None:
    time.sleep(seconds)


def _demo_count(steps: int) -> None:
    for step in range(steps):
        sum(number % 7 for number in range(250_000))
        caches["default"].set(current_result_id.get("inline"), 100 * (step + 1) // steps)


def _demonstrate() -> None:
    import tempfile

    def say(text: str) -> float:
        sys.stdout.write(f"{time.monotonic() - begun:5.2f} s  {text}\n")
        return time.monotonic()

    def show(task_result: TaskResult[..., Any], **kwargs: Any) -> None:
        say(f"  {task_result.status.value:<10} {task_result.task.name} {task_result.id[:4]}")

    logging.disable()
    directory, cores = tempfile.TemporaryDirectory(), min(os.cpu_count() or 1, 4)
    files = {"BACKEND": "django.core.cache.backends.filebased.FileBasedCache", "LOCATION": directory.name}
    threads: dict[str, Any] = {"BACKEND": f"{__name__}.ThreadPoolBackend"}
    processes = {"BACKEND": f"{__name__}.ProcessPoolBackend", "OPTIONS": {"MAX_WORKERS": cores}}
    settings.configure(CACHES={"default": files}, TASKS={"default": threads, "cpu": processes}, USE_TZ=True)
    django.setup()
    begun = time.monotonic()
    wait, count = task(_demo_wait), task(backend="cpu")(_demo_count)
    pools: list[Any] = [task_backends["default"], task_backends["cpu"]]
    for event in _SIGNALS:
        event.connect(show)
    start = say("ThreadPoolBackend: four tasks that wait half a second each, and one that fails")
    *_, failed = [wait.enqueue(seconds) for seconds in (0.5, 0.5, 0.5, 0.5, "long")]
    say(f"  It says: {pools[0].wait_result(failed.id).errors[0].traceback.splitlines()[-1]}")
    pools[0].join()
    say(f"2 s of waiting took {time.monotonic() - start:.1f} s")
    for result in [count.enqueue(1) for _ in range(cores)]:
        pools[1].wait_result(result.id)  # Now the child processes are there.
    start = say(f"ProcessPoolBackend: {2 * cores} tasks that compute, first inline")
    _demo_count(2 * cores * 15)
    half = say(f"  and then in {cores} processes:")
    results: list[Any] = [count.enqueue(15) for _ in range(2 * cores)]
    while pools[1].stats()["pending"] + pools[1].stats()["running"]:
        with contextlib.suppress(TimeoutError):
            pools[1].join(0.1)
        say("  progress   " + " ".join(f"{caches['default'].get(result.id, 0):4} %" for result in results))
    times = (half - start) / (time.monotonic() - half)
    say(f"Inline it took {half - start:.1f} s; in {cores} processes it was {times:.1f} times as fast")


if __name__ == "__main__":  # Under its own name, by which children find the tasks.
    importlib.import_module(__spec__.name if __spec__ else "django_tasks_local")._demonstrate()
