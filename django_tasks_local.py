# SPDX-License-Identifier: MIT
"""Background work for a Django site with no infrastructure: tasks in local threads or processes.

One file, to install or to copy; for the Tasks framework of Django 6 and its backport to 5.2.
Home: https://pypi.org/project/django-tasks-local/

All of this lives in the web process, but for the child::

    enqueue() -> _Record -> _Pool.ready    heap of (-priority, sequence, id) -> _Worker thread
                    |       _Pool.deferred heap of (due time, ...)               |    ^ pipes
                 _Store     active, running, finished <-- begin(), finish() -----+    v
                    +-> get_result(): a snapshot                                  _Child process

1. ``enqueue`` validates, stores a record under its alias, sends ``task_enqueued`` and queues the
   record. The pool wakes an idle worker or starts one, up to ``MAX_WORKERS``, one at a time.
2. A ``ThreadPoolBackend`` worker runs the task itself. A ``ProcessPoolBackend`` worker owns one
   child process, sends it the task and waits for the answer: queue, results, times and signals
   stay in the parent for both, and a child that dies costs one task.
3. Only plain data, as ``marshal`` bytes, is kept or crosses a pipe; whoever reads gets a copy.
4. Inside a child the backends hand each call to the parent over the same pipes (``_Link``).
5. ``close()`` and changed settings retire a pool: its workers end after the work they hold, the
   results stay. The interpreter's exit waits for the work, as ``SHUTDOWN_TIMEOUT`` says.

Locks: ``_Store.lock``, one for each alias, guards the records, the results and the pools of that
alias. ``_registry_lock`` guards ``_stores``. ``_start_lock`` guards ``_children`` and keeps
``os.fork`` away from the start of a child. ``_Link.lock`` lets one thread of a child talk to the
parent. Under none of them is another one taken, a signal sent or a task called.

Lost when the process is killed: all that is pending, running or kept. All of it is in memory.
"""

from __future__ import annotations

import asyncio
import concurrent.futures.thread  # Before threading._register_atexit, see _shutdown().
import contextvars
import functools
import heapq
import importlib
import itertools
import logging
import marshal
import os
import pickle
import signal
import sys
import threading
import time
import traceback
import uuid
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Any, NamedTuple

import django
from asgiref.sync import sync_to_async
from django.conf import settings
from django.core.signals import setting_changed
from django.db import connections, transaction
from django.dispatch import receiver
from django.utils import timezone
from django.utils.module_loading import import_string

if TYPE_CHECKING or django.VERSION >= (6, 0):
    from django.tasks import Task, TaskContext, TaskResult, TaskResultStatus, task_backends
    from django.tasks.backends.base import BaseTaskBackend
    from django.tasks.base import TaskError
    from django.tasks.exceptions import InvalidTask, InvalidTaskBackend
    from django.tasks.exceptions import TaskException, TaskResultDoesNotExist
    from django.tasks.signals import task_enqueued, task_finished, task_started
    from django.utils.json import normalize_json
else:
    try:
        from django_tasks import TaskContext, TaskResult, TaskResultStatus, task_backends
    except ModuleNotFoundError as error:
        raise ImportError(
            f"Django {django.get_version()} has no tasks: install Django 6.0 or newer, or the "
            "backport with: python -m pip install django-tasks"
        ) from error
    from django_tasks.backends.base import BaseTaskBackend
    from django_tasks.base import Task, TaskError
    from django_tasks.exceptions import InvalidTaskBackendError as InvalidTaskBackend
    from django_tasks.exceptions import InvalidTaskError as InvalidTask
    from django_tasks.exceptions import TaskException, TaskResultDoesNotExist
    from django_tasks.signals import task_enqueued, task_finished, task_started
    from django_tasks.utils import normalize_json

__all__ = ["ProcessPoolBackend", "TaskQueueFull", "ThreadPoolBackend", "current_result_id"]
__version__ = "1.0.0"

logger = logging.getLogger("django_tasks_local")

current_result_id: contextvars.ContextVar[str] = contextvars.ContextVar("current_result_id")
"""The id of the result of the task that runs; ``LookupError`` where none does."""


class TaskQueueFull(TaskException):
    """``MAX_PENDING`` tasks are waiting; the one more was not enqueued."""


# --- Options: TASKS[alias], checked ---------------------------------------------------------------

_START_METHODS = ("forkserver", "spawn", "fork") if hasattr(os, "fork") else ("spawn",)
_PROCESSES_ONLY = ("TASK_TIMEOUT", "MAX_TASKS_PER_CHILD", "START_METHOD")


def _is_count(value: Any) -> bool:
    return type(value) is int and value >= 1


def _is_seconds(value: Any) -> bool:
    return type(value) in (int, float) and 0 <= value <= threading.TIMEOUT_MAX


def _is_shared_cache(value: Any) -> bool:
    from django.core.cache.backends import dummy, locmem

    return value in list(settings.CACHES) and not issubclass(
        import_string(settings.CACHES[value]["BACKEND"]), (dummy.DummyCache, locmem.LocMemCache)
    )


_OPTIONS: dict[str, tuple[Any, str, Callable[[Any], bool]]] = {
    # name: (default, what else is right, whether a value is)
    "MAX_WORKERS": (10, "a positive integer", _is_count),
    "MAX_RESULTS": (1000, "a positive integer", _is_count),
    "MAX_PENDING": (None, "a positive integer", _is_count),
    "SHUTDOWN_TIMEOUT": (None, "seconds, 0 or more", _is_seconds),
    "RESULTS_CACHE": (
        None,
        "an alias of CACHES, not of a local-memory or dummy cache: processes do not share those",
        _is_shared_cache,
    ),
    "TASK_TIMEOUT": (None, "seconds, more than 0", lambda value: _is_seconds(value) and value > 0),
    "MAX_TASKS_PER_CHILD": (None, "a positive integer", _is_count),
    "START_METHOD": (None, f"one of {', '.join(_START_METHODS)}", lambda v: v in _START_METHODS),
}


class _Config(NamedTuple):
    """One reading of ``TASKS[alias]``; of two, the later one holds."""

    serial: int
    backend_class: type[_PoolBackend]
    params: dict[str, Any]
    options: dict[str, Any]
    on_commit: str | None  # The database whose commit enqueues.


def _configure(backend_class: type[_PoolBackend], alias: str, params: dict[str, Any]) -> _Config:
    """Return ``params`` checked, or raise InvalidTaskBackend; what was checked last is reused."""
    store = _store(alias)
    config = store.config
    if config and config.backend_class is backend_class and config.params == params:
        return config
    where, given = f"TASKS[{alias!r}]['OPTIONS']", params.get("OPTIONS", {})
    if not isinstance(given, Mapping):
        raise InvalidTaskBackend(f"{where} must be a dictionary, got {given!r}")
    for name, value in given.items():
        _check_option(where, name, value, backend_class.uses_processes)
    options = {name: default for name, (default, _, _) in _OPTIONS.items()} | dict(given)
    on_commit = _database(alias, params.get("ENQUEUE_ON_COMMIT", False))
    copy = {name: dict(value) if name == "OPTIONS" else value for name, value in params.items()}
    store.config = _Config(next(_serials), backend_class, copy, options, on_commit)
    return store.config


def _check_option(where: str, name: Any, value: Any, uses_processes: bool) -> None:
    if name not in _OPTIONS:
        import difflib

        near = difflib.get_close_matches(str(name).upper(), _OPTIONS, 1, 0.5)
        hint = f"did you mean {near[0]}?" if near else f"the options are {', '.join(_OPTIONS)}"
        raise InvalidTaskBackend(f"{where}: unknown option {name!r} with value {value!r}, {hint}")
    if name in _PROCESSES_ONLY and not uses_processes:
        raise InvalidTaskBackend(
            f"{where}: {name} is for ProcessPoolBackend, got {value!r}: a thread cannot be stopped "
            "or replaced from outside"
        )
    default, right, check = _OPTIONS[name]
    if not (check(value) or (value is None and default is None)):
        right = f"None or {right}" if default is None else right
        raise InvalidTaskBackend(f"{where}: {name} must be {right}, got {value!r}")


def _database(alias: str, value: Any) -> str | None:
    """Return the database that ``ENQUEUE_ON_COMMIT`` names, if any."""
    database = "default" if value is True else None if value is False else value
    if database is None or database in list(connections):
        return database
    raise InvalidTaskBackend(
        f"TASKS[{alias!r}]['ENQUEUE_ON_COMMIT'] must be False, True or an alias of DATABASES, "
        f"got {value!r}"
    )


# --- Plain data: what is kept, crosses a pipe or goes to the cache --------------------------------

_serials = itertools.count(1)  # Its next() is one step in C; a lock is held where order matters.
_ids: deque[str] = deque()  # Ready-made; deques are documented as thread-safe at both ends.
_NONE = marshal.dumps(None)


def _new_id() -> str:
    """Return a random UUID. ``os.urandom`` gives up the GIL, so one call serves 64 ids."""
    try:
        return _ids.popleft()
    except IndexError:
        noise = os.urandom(16 * 64)
        ids = [str(uuid.UUID(bytes=noise[i : i + 16], version=4)) for i in range(0, 16 * 64, 16)]
        _ids.extend(ids[1:])
        return ids[0]


def _dump(value: Any) -> bytes:
    """Return ``value``, made JSON as Django does it, as bytes. Raise TypeError or ValueError."""
    value = normalize_json(value)
    try:
        return marshal.dumps(value)
    except ValueError:  # It holds a subclass of str, int or float.
        return marshal.dumps(_exact(value))


def _exact(value: Any) -> Any:
    """Return JSON in which each str, int and float is of just that type."""
    if isinstance(value, dict):
        return {_exact(key): _exact(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_exact(item) for item in value]
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, float):
        return float.__float__(value)
    return value if value is None or isinstance(value, bool) else int.__int__(value)


def _find(at: Any, name: str) -> Any:
    """Return the function at ``name`` of a module, or None."""
    for part in name.split("."):
        at = getattr(at, part, None)
    return at.func if issubclass(type(at), Task) else at


@functools.lru_cache(maxsize=1024)
def _reference(func: Callable[..., Any]) -> str:
    """Return "module:name" where another process finds ``func`` itself. Raise InvalidTask."""
    module = sys.modules.get(func.__module__)
    for name in (func.__qualname__, *vars(module or object)):
        if _find(module, name) is func:
            return f"{func.__module__}:{name}"
    raise InvalidTask(
        f"Task function {func.__module__}.{func.__qualname__} cannot be found by another process: "
        "no name in its module leads to it. Was it wrapped, or its name given to another?"
    )


def _resolve(reference: str) -> Any:
    module, _, name = reference.partition(":")
    func = _find(importlib.import_module(module), name)
    if not callable(func):
        raise InvalidTask(f"Task function {module}.{name} was not found in process {os.getpid()}")
    return func


def _pack_task(task: Task) -> dict[str, Any]:
    names = ("priority", "queue_name", "backend", "takes_context")
    run_after = task.run_after and task.run_after.isoformat()
    packed = {"func": _reference(task.func), "run_after": run_after}
    return packed | {name: getattr(task, name) for name in names}


def _unpack_task(packed: Mapping[str, Any]) -> Task:
    run_after = packed["run_after"] and datetime.fromisoformat(packed["run_after"])
    changed = {"func": _resolve(packed["func"]), "run_after": run_after}
    return task_backends[packed["backend"]].task_class(**{**packed, **changed})


_TIMES = ("enqueued_at", "started_at", "last_attempted_at", "finished_at")
_OTHERS = ("id", "args", "kwargs", "backend", "worker_ids")


def _pack(result: TaskResult) -> dict[str, Any]:
    """Return ``result`` as plain data."""
    times = {name: getattr(result, name) for name in _TIMES}
    return {
        "task": _pack_task(result.task),
        "status": result.status.value,
        "errors": [(error.exception_class_path, error.traceback) for error in result.errors],
        "return_value": result._return_value,
        **{name: getattr(result, name) for name in _OTHERS},
        **{name: moment and moment.isoformat() for name, moment in times.items()},
    }


def _unpack(packed: Mapping[str, Any]) -> TaskResult:
    result = TaskResult(
        task=_unpack_task(packed["task"]),
        status=TaskResultStatus(packed["status"]),
        errors=[TaskError(exception_class_path=p, traceback=t) for p, t in packed["errors"]],
        **{name: packed[name] for name in _OTHERS},
        **{name: packed[name] and datetime.fromisoformat(packed[name]) for name in _TIMES},
    )
    object.__setattr__(result, "_return_value", packed["return_value"])
    return result


@dataclass(slots=True, eq=False)
class _Record:
    """What is known of one task; once stored, changed by its store alone, under its lock."""

    alias: str
    task: Task
    payload: bytes  # The marshalled [args, kwargs].
    id: str
    status: TaskResultStatus = TaskResultStatus.READY
    enqueued_at: datetime | None = None
    started_at: datetime | None = None
    finished_at: datetime | None = None
    worker_id: str | None = None
    error: TaskError | None = None
    value: bytes = _NONE  # The marshalled return value.

    def snapshot(self) -> TaskResult:
        """Return a result of its own. ``TaskResult()`` would take five times as long."""
        result: TaskResult = object.__new__(TaskResult)
        put = object.__setattr__
        args, kwargs = marshal.loads(self.payload)
        put(result, "task", self.task)
        put(result, "id", self.id)
        put(result, "status", self.status)
        put(result, "enqueued_at", self.enqueued_at)
        put(result, "started_at", self.started_at)
        put(result, "last_attempted_at", self.started_at)
        put(result, "finished_at", self.finished_at)
        put(result, "args", args)
        put(result, "kwargs", kwargs)
        put(result, "backend", self.alias)
        put(result, "errors", [self.error] if self.error else [])
        put(result, "worker_ids", [self.worker_id] if self.worker_id else [])
        put(result, "_return_value", marshal.loads(self.value))
        return result


# --- One task, in a worker thread or in a child ---------------------------------------------------


class _ChildTaskError(Exception):
    """Stands in the parent for an exception of a child; its text is the child's traceback."""

    def __init__(self, class_path: str, text: str) -> None:
        super().__init__(f"{class_path}\n{text}")
        self.error = TaskError(exception_class_path=class_path, traceback=text)


def _call(record: _Record, context: TaskResult | None, pickleable: str = "") -> bytes:
    """Call the task and return what it returned, as bytes."""
    args, kwargs = marshal.loads(record.payload)
    if context:
        args.insert(0, TaskContext(task_result=context))
    value = record.task.call(*args, **kwargs)
    try:
        return _NONE if value is None else _dump(value)
    except (TypeError, ValueError, RecursionError) as error:
        raise (ValueError if isinstance(error, ValueError) else TypeError)(
            f"Task {record.task.module_path} returned a {type(value).__module__}."
            f"{type(value).__qualname__} that cannot be kept ({error}): a return value must be "
            f"JSON{pickleable}: None, bool, int, float, str, UTF-8 bytes, or lists and dicts of these"
        ) from None


def _class_path(error: BaseException) -> str:
    return f"{type(error).__module__}.{type(error).__qualname__}"


def _describe(error: BaseException, func: Callable[..., Any] | None) -> tuple[str, str]:
    """Return class path and traceback of ``error``: the frames from ``func`` on, not ours."""
    if isinstance(error, _ChildTaskError):
        return error.error.exception_class_path, error.error.traceback
    frames = error.__traceback__
    while frames and (func is None or frames.tb_frame.f_code is not func.__code__):
        frames = frames.tb_next
    error.__traceback__ = frames
    try:
        return _class_path(error), "".join(traceback.format_exception(error))
    except BaseException as bad:  # Whatever the error's own code raises.
        text = f"{_class_path(error)}, not printable because of {_class_path(bad)}\n"
        return _class_path(error), text


def _clean_connections() -> None:
    """Leave the next task no stale connection, no open transaction and no query log."""
    for connection in connections.all(initialized_only=True):
        try:
            connection.queries_log.clear()
            if connection.in_atomic_block:
                connection.close()
                del connections[connection.alias]
            else:
                connection.close_if_unusable_or_obsolete()
        except Exception:
            logger.exception("Connection %r could not be closed, it is dropped", connection.alias)
            del connections[connection.alias]


def _notify(sent: Any, backend_class: type[_PoolBackend], result: TaskResult) -> None:
    """Send a signal from a worker; what a receiver raises is logged.

    ``Signal.send`` takes a lock. A thread pre-empted inside hands it to one that waits for the
    GIL, and from then on every ``send`` blocks. So stand back while another thread is inside.
    """
    for _ in range(20):
        if sent.lock.acquire(blocking=False):
            sent.lock.release()
            break
        time.sleep(0)
    try:
        sent.send_robust(sender=backend_class, task_result=result)
    except BaseException:
        logger.exception("A signal receiver raised for task result %s", result.id)


# --- The child's side -----------------------------------------------------------------------------


class _Link:
    """In a child: it takes tasks from the parent, and hands the parent what they ask of us."""

    def __init__(self, requests: Any, answers: Any, started: Any) -> None:
        self.requests, self.answers, self.started = requests, answers, started
        self.lock = threading.Lock()  # Held for a call and its reply, and to send an outcome.
        self.listening = False  # Whether a task runs: only then the parent answers calls.
        self.tasks: dict[str, Task] = {}

    def call(self, alias: str, method: str, *args: Any) -> Any:
        """Have the parent call ``method`` of its backend; return or raise what that does."""
        with self.lock:
            if not self.listening:
                raise RuntimeError(f"{method}() was called in a child process where no task runs")
            self.answers.send_bytes(marshal.dumps((alias, method, args)))
            kind, *reply = marshal.loads(self.requests.recv_bytes())
        if kind == "returned":
            return reply[0]
        try:
            error = import_string(reply[0])(reply[1])
        except Exception:
            error = None
        raise error if isinstance(error, Exception) else RuntimeError(": ".join(reply))

    def serve(self) -> None:
        """Load or run what comes in, until the parent closes the pipe."""
        pid = os.getpid()
        while True:
            try:
                what, *message = marshal.loads(self.requests.recv_bytes())
            except (EOFError, OSError):
                return
            outcome = contextvars.Context().run(getattr(self, what), *message)
            if os.getpid() != pid:  # The task forked, and this is the copy.
                os._exit(0)
            with self.lock:
                self.listening = False
                self.answers.send_bytes(marshal.dumps(outcome))

    def load(self, packed: Mapping[str, Any]) -> tuple[Any, ...]:
        try:
            self.tasks[packed["func"]] = _unpack_task(packed)
        except BaseException as error:
            return _describe(error, _resolve)
        return (_NONE,)

    def run(self, name: str, result_id: str, payload: bytes, packed: Any) -> tuple[Any, ...]:
        task = self.tasks[name]
        current_result_id.set(result_id)
        _clean_connections()
        self.listening = True
        self.started.value += 1
        try:
            context = _unpack(packed) if packed else None
            record = _Record(task.backend, context.task if context else task, payload, result_id)
            return (_call(record, context, " and pickleable"),)
        except BaseException as error:
            return _describe(error, task.func)
        finally:
            _clean_connections()


_link: _Link | None = None  # Set in a child, and there only.


def _child_main(
    requests: Any, answers: Any, alive: Any, started: Any, environ: dict[str, str], values: Any
) -> None:
    global _link
    _reset_process()
    _die_with_parent(alive)
    try:
        os.environ.clear()
        os.environ.update(environ)
        _set_up_django(values)
    except BaseException as error:
        answers.send_bytes(marshal.dumps(_describe(error, _set_up_django)))
        return
    _link = _Link(requests, answers, started)
    answers.send_bytes(marshal.dumps((_NONE,)))
    _link.serve()


def _reset_process() -> None:
    """Drop what a fork brought along. Ctrl-C reaches the whole group, and the parent decides."""
    signal.set_wakeup_fd(-1)
    for number in signal.valid_signals():
        if callable(signal.getsignal(number)):
            signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    for connection in connections.all(initialized_only=True) if settings.configured else ():
        _inherited.append(connection)
        del connections[connection.alias]


_inherited: list[Any] = []  # Connections of the parent: to close one would end its session.


def _die_with_parent(alive: Any) -> None:
    """End this process and what it started once the parent, which never writes, is gone.

    A thread sees to it; on Linux the kernel does too, even where a task never gives up the GIL.
    """

    def watch() -> None:
        try:
            alive.recv_bytes()
        except (EOFError, OSError):
            _kill_group(os.getpid())
            os._exit(1)

    if hasattr(os, "setpgid"):
        os.setpgid(0, 0)
    if sys.platform == "linux":
        import fcntl

        fcntl.fcntl(alive.fileno(), fcntl.F_SETOWN, -os.getpid())
        fcntl.fcntl(alive.fileno(), fcntl.F_SETFL, os.O_ASYNC)
    threading.Thread(target=watch, daemon=True).start()


def _kill_group(pid: int) -> None:
    try:
        if hasattr(os, "killpg"):
            os.killpg(pid, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):
        pass


def _settings_values() -> dict[str, bytes]:
    """Return what the settings module cannot tell a child: settings made in code or in a test."""
    module = sys.modules.get(os.environ.get("DJANGO_SETTINGS_MODULE", ""))
    values = {}
    for name in filter(settings.is_overridden, filter(str.isupper, dir(settings))):
        value = getattr(settings, name)
        # A test run renames the databases in place.
        if name == "DATABASES" or value is not getattr(module, name, values):
            try:
                values[name] = pickle.dumps(value)
            except Exception:
                logger.debug("Setting %s cannot be pickled, so children lack it", name)
    return values


def _set_up_django(values: Mapping[str, bytes]) -> None:
    if not settings.configured and "DJANGO_SETTINGS_MODULE" not in os.environ:
        settings.configure()
    for name, value in values.items():
        setattr(settings, name, pickle.loads(value))
    django.setup()


# --- The parent's side of a child -----------------------------------------------------------------

_start_lock = threading.RLock()  # Guards _children; held to start a child, and to fork.
_children: set[_Child] = set()
_CHILD_NAME = "django-tasks-local"


class _Child:
    """A child process and its pipes, for one worker. ChildProcessError: it died."""

    def __init__(self, start_method: str | None) -> None:
        """Start a process and wait until Django is set up in it."""
        import multiprocessing
        from multiprocessing.sharedctypes import RawValue

        self.sent = 0
        self.started = RawValue("L", 0)  # How many tasks the child has begun.
        self.loaded: set[str] = set()
        with _start_lock:
            if _exiting:
                raise RuntimeError("The interpreter is exiting: no child process is started")
            pipes = [multiprocessing.Pipe(duplex=False) for _ in range(3)]
            (requests, self.requests), (self.answers, answers), (alive, self.alive) = pipes
            self.ends = (self.requests, self.answers, self.alive)
            _children.add(self)
            try:
                self.start(start_method or _START_METHODS[0], requests, answers, alive)
            except BaseException:
                self.forget()
                raise
            finally:
                for end in (requests, answers, alive):
                    end.close()
        self.receive(None)

    def start(self, method: str, *ends: Any) -> None:
        import multiprocessing

        context: Any = multiprocessing.get_context(method)
        if method == "forkserver":
            context.set_forkserver_preload([__name__])
        args = (*ends, self.started, dict(os.environ), _settings_values())
        self.process = context.Process(target=_child_main, args=args, name=_CHILD_NAME)
        try:
            self.process.start()
        except ChildProcessError:  # A fork has left us with the fork server of our parent.
            self.start("spawn", *ends)

    def send(self, *message: Any) -> None:
        try:
            self.requests.send_bytes(marshal.dumps(message))
        except OSError as error:
            raise self.died() from error

    def receive(self, deadline: float | None) -> Any:
        """Return (value,) or the (alias, method, args) of a call; raise what the task raised."""
        try:
            if deadline and not self.answers.poll(max(0.0, deadline - time.monotonic())):
                self.kill()
                raise TimeoutError
            message = marshal.loads(self.answers.recv_bytes())
        except TimeoutError:
            raise
        except (EOFError, OSError, ValueError, TypeError) as error:
            raise self.died() from error
        if len(message) == 2:
            raise _ChildTaskError(*message)
        return message

    def died(self) -> ChildProcessError:
        self.process.join(1)
        self.kill()
        code = self.process.exitcode
        try:
            how = f"was killed by {signal.Signals(-code).name}"
        except (TypeError, ValueError):
            how = f"ended with exit code {code}"
        return ChildProcessError(f"Child process {self.process.pid} {how} before the task was done")

    def stop(self) -> None:
        """Let the idle child end, which takes a moment; kill it if it takes long."""
        self.requests.close()
        self.process.join(5)
        self.kill()

    def kill(self) -> None:
        if self.process.is_alive():
            _kill_group(self.process.pid)
            self.process.kill()
            self.process.join()
        self.forget()

    def forget(self) -> None:
        for end in self.ends:
            end.close()
        with _start_lock:
            _children.discard(self)


# --- Records and results of an alias --------------------------------------------------------------


class _Store:
    """All that is known under one alias; ``lock`` guards it, and the pools that work on it."""

    def __init__(self, alias: str) -> None:
        self.alias = alias
        self.lock = threading.Lock()
        self.config: _Config | None = None  # What was read last.
        self.active: dict[str, _Record] = {}  # Not finished.
        self.running: dict[str, _Record] = {}  # In the hands of a worker.
        self.finished: OrderedDict[str, _Record] = OrderedDict()  # The least recently used first.
        self.futures: dict[str, Future[None]] = {}  # Done with the task; at "" when none is left.
        self.waiting: dict[str, str] = {}  # Which task waits for which.
        self.pools: list[_Pool] = []  # The current one last; the others are retired, but at work.

    def get(self, result_id: str) -> TaskResult | None:
        with self.lock:
            record = self.active.get(result_id)
            if record is None:
                record = self.finished.get(result_id)
                if record is None:
                    return None
                self.finished.move_to_end(result_id)
            return record.snapshot()

    def begin(self, record: _Record, worker_id: str) -> TaskResult | None:
        """Make the task RUNNING, or return None: it was given up meanwhile."""
        with self.lock:
            if record.finished_at:
                return None
            record.started_at = record.started_at or timezone.now()
            record.status = TaskResultStatus.RUNNING
            record.worker_id = worker_id
            return record.snapshot()

    def finish(
        self, record: _Record, value: bytes, error: TaskError | None, limit: int
    ) -> TaskResult | None:
        """Make the task SUCCESSFUL or FAILED, or return None: it is finished already."""
        with self.lock:
            if record.finished_at:
                return None
            record.finished_at = timezone.now()
            record.status = TaskResultStatus.FAILED if error else TaskResultStatus.SUCCESSFUL
            record.value, record.error = value, error
            del self.active[record.id]
            self.finished[record.id] = record
            while len(self.finished) > limit:
                self.finished.popitem(last=False)
            return record.snapshot()

    def settle(self, record: _Record) -> None:
        """Wake those who wait: the task is finished, and all that goes with it is done."""
        with self.lock:
            self.running.pop(record.id, None)
            done = [self.futures.pop(record.id, None)]
            if "" in self.futures and not self.is_busy():
                done.append(self.futures.pop(""))
        for future in filter(None, done):
            future.set_result(None)

    def is_busy(self) -> bool:
        return bool(self.running) or any(pool.ready or pool.reserved for pool in self.pools)

    def future(self, result_id: str) -> Future[None] | None:
        """Return what is done when the task is, at "" when all are; None if that is so now."""
        me = current_result_id.get("")
        with self.lock:
            if not (result_id in self.active or result_id in self.running if result_id else self.is_busy()):
                return None
            if me in self.running:
                self.check_deadlock(me, result_id)
            if result_id not in self.futures:
                self.futures[result_id] = Future()
                self.futures[result_id].set_running_or_notify_cancel()  # asyncio must not cancel.
            return self.futures[result_id]

    def check_deadlock(self, me: str, result_id: str) -> None:
        """Note that ``me`` waits, unless it would do so for ever: then raise RuntimeError."""
        chain: str | None = result_id or me
        while chain and chain != me:
            chain = self.waiting.get(chain)
        limit = self.pools[-1].options["MAX_WORKERS"]
        if chain == me or len({*self.waiting, me}) >= limit:
            raise RuntimeError(
                f"Task result {me} would wait for {result_id or 'all tasks'} for ever: that one "
                f"waits for this one, or all {limit} workers of {self.alias!r} wait"
            )
        self.waiting[me] = result_id

    def unfinished(self) -> list[str]:
        """Return the ids of what is pending or running."""
        with self.lock:
            deferred = {entry[2] for pool in self.pools for _, entry in pool.deferred}
            return [result_id for result_id in self.active if result_id not in deferred]

    def stats(self) -> dict[str, int]:
        with self.lock:
            return {
                "pending": sum(len(pool.ready) + pool.reserved for pool in self.pools),
                "deferred": sum(len(pool.deferred) for pool in self.pools),
                "running": len(self.running),
                "finished": len(self.finished),
                "workers": sum(len(pool.workers) for pool in self.pools),
                "pid": os.getpid(),
            }


# --- Queue and workers ----------------------------------------------------------------------------


class _Pool:
    """The queue and the workers of an alias, from the first task until ``retire``."""

    def __init__(self, config: _Config, store: _Store) -> None:
        self.config, self.options, self.store, self.lock = config, config.options, store, store.lock
        self.arrival = threading.Condition(self.lock)  # Idle workers wait: for work, or to go.
        self.ready: list[tuple[int, int, str]] = []  # A heap of (-priority, sequence, id).
        self.deferred: list[tuple[float, tuple[int, int, str]]] = []  # A heap by due time.
        self.reserved = 0  # Stored, not queued yet: task_enqueued is being sent.
        self.workers: set[_Worker] = set()
        self.idle = 0
        self.starting: _Worker | None = None  # Not at the queue yet; there it hires the next one.
        self.retired = False
        self.cache_failed = False

    def submit(self, record: _Record) -> TaskResult | None:
        """Store, announce and queue a task, or raise and keep nothing. None: the pool is retired."""
        with self.lock:
            if self.retired:
                return None
            limit = self.options["MAX_PENDING"]
            if limit and self.reserved + len(self.ready) + len(self.deferred) >= limit:
                raise TaskQueueFull(
                    f"{limit} tasks are pending on {record.alias!r}, which is its MAX_PENDING: "
                    f"{record.task.module_path} was not enqueued"
                )
            record.enqueued_at = timezone.now()
            self.store.active[record.id] = record
            self.reserved += 1
            first = None if self.workers else self.hire()
        try:
            if first:
                first.start()
            result = record.snapshot()
            self.publish(result)
            task_enqueued.send(sender=self.config.backend_class, task_result=result)
        except BaseException:
            self.withdraw(record)
            raise
        self.queue(record)
        return result

    def withdraw(self, record: _Record) -> None:
        with self.lock:
            self.reserved -= 1
            del self.store.active[record.id]
            self.arrival.notify_all()
        self.store.settle(record)
        self.publish(record.snapshot(), withdrawn=True)

    def queue(self, record: _Record) -> None:
        due = _due(record.task.run_after)
        with self.lock:
            entry = (-record.task.priority, next(_serials), record.id)
            self.reserved -= 1
            if due > time.time():
                heapq.heappush(self.deferred, (due, entry))
                self.arrival.notify()  # It may be due before what idle workers wait for.
            else:
                heapq.heappush(self.ready, entry)
            helper = self.call_helper()
            retired = self.retired
        self.start(helper)
        if retired:
            self.retire()

    def call_helper(self) -> _Worker | None:
        """Wake an idle worker for what is ready, or return a new one to start, one at a time."""
        if self.idle:
            if self.ready:
                self.arrival.notify()
        elif self.ready or self.deferred:
            if not self.starting and len(self.workers) < self.options["MAX_WORKERS"]:
                return self.hire()
        return None

    def hire(self) -> _Worker:
        self.starting = self.config.backend_class.worker_class(self)
        self.workers.add(self.starting)
        return self.starting

    def start(self, worker: _Worker | None) -> None:
        """Start one worker more, if any; where that fails, those who are there have to do."""
        try:
            if worker:
                worker.start()
        except RuntimeError:
            logger.warning("No more than %s workers could be started", len(self.workers), exc_info=True)

    def take(self, worker: _Worker) -> _Record | None:
        """Wait for a task and return it. None: the worker may go."""
        with self.lock:
            if self.starting is worker:
                self.starting = None
            while True:
                timeout = self.promote()
                if self.ready:
                    record = self.store.active[heapq.heappop(self.ready)[2]]
                    self.store.running[record.id] = record
                    helper = self.call_helper()
                    break
                if self.retired and not self.reserved:
                    return None
                self.idle += 1
                self.arrival.wait(timeout)
                self.idle -= 1
        self.start(helper)
        return record

    def promote(self) -> float | None:
        """Make ready what is due; return the seconds until the next one is."""
        while self.deferred:
            left = self.deferred[0][0] - time.time()
            if left > 0:
                return min(left, 86400.0)
            heapq.heappush(self.ready, heapq.heappop(self.deferred)[1])
        return None

    def leave(self, worker: _Worker) -> None:
        with self.lock:
            self.workers.discard(worker)
            if self.starting is worker:
                self.starting = None
            self.arrival.notify_all()
        worker.left.set()

    def has_work(self) -> bool:
        with self.lock:
            return bool(self.ready or self.reserved or self.deferred)

    def retire(self) -> None:
        """Abandon what is deferred, and let the workers go once the rest is done."""
        with self.lock:
            self.retired = True
            late = [self.store.active[entry[2]] for _, entry in self.deferred]
            self.deferred.clear()
            self.arrival.notify_all()
        if late:
            ids = ", ".join(record.id for record in late)
            logger.warning("%s deferred tasks of %r are abandoned, as its pool is closed: %s",
                           len(late), self.store.alias, ids)
        self.abandon(late, "its pool was closed before it was due")

    def abandon(self, records: Iterable[_Record], why: str) -> None:
        for record in records:
            try:
                raise RuntimeError(f"The task was abandoned: {why}")
            except RuntimeError as error:
                self.conclude(record, contextvars.Context(), error=error)

    def conclude(
        self,
        record: _Record,
        context: contextvars.Context,
        value: bytes = _NONE,
        error: BaseException | None = None,
    ) -> None:
        """Finish a task, unless it is finished, and let it be known."""
        failure = None
        if error:
            path, text = _describe(error, record.task.func)
            failure = TaskError(exception_class_path=path, traceback=text)
        result = self.store.finish(record, value, failure, self.options["MAX_RESULTS"])
        if result:
            self.publish(result)
            context.run(_notify, task_finished, self.config.backend_class, result)
            _clean_connections()
        self.store.settle(record)

    def publish(self, result: TaskResult, withdrawn: bool = False) -> None:
        """Write to RESULTS_CACHE; if that fails, log it once and go on."""
        alias = self.options["RESULTS_CACHE"]
        if alias:
            try:
                _write_cache(alias, result, withdrawn)
                self.cache_failed = False
            except Exception:
                if not self.cache_failed:
                    logger.exception("RESULTS_CACHE %r fails; said once, until it works", alias)
                self.cache_failed = True


def _cache(alias: str, backend: str, result_id: str) -> tuple[Any, str]:
    from django.core.cache import caches

    return caches[alias], f"django_tasks_local.{backend}.{result_id}"


def _write_cache(alias: str, result: TaskResult, withdrawn: bool) -> None:
    cache, key = _cache(alias, result.backend, result.id)
    if withdrawn:
        cache.delete(key)
    else:
        cache.set(key, _pack(result))


def _due(run_after: datetime | None) -> float:
    try:
        return run_after.timestamp() if run_after else 0.0
    except (OverflowError, ValueError, OSError):  # A naive date at an end of the calendar.
        return float("inf") if run_after and run_after.year > 5000 else 0.0


class _Worker:
    """A thread that takes task after task from its pool, and runs them."""

    def __init__(self, pool: _Pool) -> None:
        self.pool = pool
        self.left = threading.Event()

    def start(self) -> None:
        name = f"tasks-{self.pool.store.alias}"
        try:
            threading.Thread(target=self.main, name=name, daemon=True).start()
        except BaseException:
            self.pool.leave(self)
            raise

    def main(self) -> None:
        _here.worker = self
        try:
            self.prepare()
            while record := self.pool.take(self):
                self.attempt(record, os.getpid())
                del record
                self.prepare()
        finally:
            self.end()
            self.pool.leave(self)

    def attempt(self, record: _Record, pid: int) -> None:
        context = contextvars.Context()
        context.run(current_result_id.set, record.id)
        try:
            value = self.execute(record, context)
        except BaseException as error:
            _exit_if_copy(pid)
            self.pool.conclude(record, context, error=error)
        else:
            _exit_if_copy(pid)
            self.pool.conclude(record, context, value)

    def execute(self, record: _Record, context: contextvars.Context) -> bytes:
        """Run the task; return what it returns, as bytes, or raise what it raises."""
        _clean_connections()
        worker_id = f"thread-{os.getpid()}-{threading.get_native_id()}"
        started = self.pool.store.begin(record, worker_id)
        if started is None:
            return _NONE
        self.announce(started, context)
        try:
            return context.run(_call, record, started if record.task.takes_context else None)
        finally:
            _clean_connections()

    def announce(self, started: TaskResult, context: contextvars.Context) -> None:
        self.pool.publish(started)
        context.run(_notify, task_started, self.pool.config.backend_class, started)

    def prepare(self) -> None:
        """Get ready for the next task."""

    def end(self) -> None:
        """Release what the worker holds."""

    def give_up(self) -> None:
        """Stop the task that runs, where that can be done."""


_here = threading.local()  # Our threads have their worker here.


def _exit_if_copy(pid: int) -> None:
    """End a process that a task has forked: the task goes on in the original."""
    if os.getpid() != pid:
        os._exit(0)


class _ProcessWorker(_Worker):
    child: _Child | None = None
    failure: BaseException | None = None  # Why there is no child; the next task fails with it.

    def prepare(self) -> None:
        limit = self.pool.options["MAX_TASKS_PER_CHILD"]
        if self.child and limit and self.child.sent >= limit:
            self.end()
        if not self.child and self.pool.has_work():
            try:
                self.child = _Child(self.pool.options["START_METHOD"])
            except Exception as error:
                self.failure = error

    def end(self) -> None:
        if self.child:
            self.child.stop()
            self.child = None

    def give_up(self) -> None:
        if child := self.child:
            child.kill()

    def employ(self, task: Task) -> _Child:
        """Return a child that has imported the task."""
        failure, self.failure = self.failure, None
        if failure:
            raise failure
        if not self.child:
            self.child = _Child(self.pool.options["START_METHOD"])
        name = _reference(task.func)
        if name not in self.child.loaded:
            self.child.send("load", {**_pack_task(task), "run_after": None})
            self.child.receive(None)
            self.child.loaded.add(name)
        return self.child

    def execute(self, record: _Record, context: contextvars.Context) -> bytes:
        announced = False
        for last in (False, False, True):
            try:
                child = self.employ(record.task)
                started = self.pool.store.begin(record, f"process-{child.process.pid}")
                if started is None:
                    return _NONE
                packed = _pack(started) if record.task.takes_context else None
                child.sent += 1
                child.send("run", _reference(record.task.func), record.id, record.payload, packed)
                if not announced:
                    self.announce(started, context)
                    announced = True
                return self.listen(child, context)
            except (ChildProcessError, TimeoutError):
                dead, self.child = self.child, None
                # A child that died idle has not begun the task: another one takes it.
                if last or dead is None or dead.started.value >= dead.sent > 0:
                    raise
        raise AssertionError

    def listen(self, child: _Child, context: contextvars.Context) -> bytes:
        """Answer the calls of a task until it is done, and return its value."""
        limit = self.pool.options["TASK_TIMEOUT"]
        deadline = limit and time.monotonic() + limit
        while True:
            try:
                message = child.receive(deadline)
            except TimeoutError:
                raise TimeoutError(f"The task ran for longer than {limit} seconds, its TASK_TIMEOUT") from None
            if len(message) == 1:
                return message[0]  # type: ignore[no-any-return]
            child.send(*context.run(_answer, *message, deadline))


def _answer(alias: str, method: str, args: list[Any], deadline: float | None) -> tuple[Any, ...]:
    """Call a backend for a child, for no longer than its task may run."""
    if method in ("wait_result", "join") and deadline:
        *args, timeout = args
        left = max(0.0, deadline - time.monotonic())
        args.append(left if timeout is None else min(timeout, left))
    try:
        return ("returned", task_backends[alias].answer(method, *args))
    except BaseException as error:
        return ("raised", _class_path(error), str(error))


# --- Process-wide: stores by alias, fork, exit ----------------------------------------------------

_registry_lock = threading.Lock()
_stores: dict[str, _Store] = {}
_exiting = False


def _store(alias: str) -> _Store:
    with _registry_lock:
        if alias not in _stores:
            _stores[alias] = _Store(alias)
        return _stores[alias]


def _pool(alias: str, config: _Config) -> _Pool:
    """Return the pool of an alias to enqueue on, a new one if it is closed or of older settings."""
    store = _store(alias)
    with store.lock:
        old = store.pools[-1] if store.pools else None
        if old and not old.retired and old.config.serial >= config.serial:
            return old
        if _exiting:
            raise RuntimeError(f"The interpreter is exiting: {alias!r} takes no more tasks")
        if old and old.config.serial > config.serial:
            config = old.config
        pool = _Pool(config, store)
        store.pools = [*(pool for pool in store.pools if pool.workers or pool.reserved), pool]
    if old:
        old.retire()
    return pool


@receiver(setting_changed)
def _retire_changed(*, setting: str, **kwargs: Any) -> None:
    """Retire the pools whose settings are no longer those of ``TASKS``."""
    if setting == "TASKS":
        for store in _all_stores():
            for pool in store.pools[-1:]:
                if pool.config.params != settings.TASKS.get(store.alias):
                    pool.retire()


def _all_stores() -> list[_Store]:
    with _registry_lock:
        return list(_stores.values())


_SIGNALS = (task_enqueued, task_started, task_finished)


def _before_fork() -> None:
    _start_lock.acquire()
    for sent in _SIGNALS:
        sent.lock.acquire()


def _after_fork_in_parent() -> None:
    for sent in _SIGNALS:
        sent.lock.release()
    _start_lock.release()


def _after_fork_in_child() -> None:
    """Start with nothing of the parent's, and keep nothing of it open."""
    global _registry_lock, _start_lock, _stores, _exiting, _link
    for sent in _SIGNALS:
        sent.lock.release()
    if _link:
        _link.requests.close()
        _link.answers.close()
    for child in _children:
        for end in child.ends:
            end.close()
        if child.process.pid is not None:
            # At exit multiprocessing would take the exit code from the parent, and wait.
            os.dup2(os.open(os.devnull, os.O_RDONLY), child.process.sentinel)
            child.process.join = lambda timeout=None: None
    _registry_lock, _start_lock = threading.Lock(), threading.RLock()
    _stores, _exiting, _link = {}, False, None
    _children.clear()
    _ids.clear()
    vars(_here).clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(
        before=_before_fork,
        after_in_parent=_after_fork_in_parent,
        after_in_child=_after_fork_in_child,
    )


def _shutdown() -> None:
    """At exit finish the work, within SHUTDOWN_TIMEOUT; fail what is left, and say so."""
    global _exiting
    stores = [store for store in _all_stores() if store.pools]
    lost: list[str] = []
    try:
        _await_work(stores, lost)
    except KeyboardInterrupt:
        pass
    with _start_lock:
        _exiting = True
    for store in stores:
        lost += _give_up(store)
    if lost:
        logger.warning("The process exits: %s tasks were not finished and are FAILED: %s",
                       len(lost), ", ".join(lost))
    end = time.monotonic() + 5
    for store in stores:
        for pool in store.pools:
            for worker in list(pool.workers):
                if pool.config.backend_class.uses_processes:
                    worker.left.wait(max(0.0, end - time.monotonic()))
    for child in list(_children):
        child.kill()


def _await_work(stores: list[_Store], lost: list[str]) -> None:
    """Wait until nothing is pending or running; give up each store when its time is over."""
    begun = time.monotonic()
    timeouts = {store: store.pools[-1].options["SHUTDOWN_TIMEOUT"] for store in stores}
    stores = sorted(stores, key=lambda store: (timeouts[store] is None, timeouts[store] or 0))
    ids = [
        result_id for store in stores for result_id in store.unfinished() if timeouts[store] != 0
    ]
    if ids:
        logger.warning(
            "The process exits once %s tasks are finished; Ctrl-C gives up, SHUTDOWN_TIMEOUT "
            "limits the wait: %s", len(ids), ", ".join(ids),
        )
    while stores:
        for store in stores:
            limit = timeouts[store]
            left = None if limit is None else max(0.0, begun + limit - time.monotonic())
            future = store.future("")
            try:
                if future:
                    future.result(left)
            except concurrent.futures.TimeoutError:
                lost += _give_up(store)
        stores = [store for store in stores if store.future("")]


def _give_up(store: _Store) -> list[str]:
    """Fail all that is not finished under an alias, stop its workers and return the ids."""
    with store.lock:
        records = list(store.active.values())
        for pool in store.pools:
            pool.retired = True
            pool.ready.clear()
            pool.deferred.clear()
            pool.arrival.notify_all()
        workers = [worker for pool in store.pools for worker in pool.workers]
    for worker in workers:
        worker.give_up()
    store.pools[-1].abandon(records, "the process exits, and its SHUTDOWN_TIMEOUT is over")
    return [record.id for record in records]


# Not atexit: by then concurrent.futures takes no more work, and async_to_sync() needs it. These
# hooks run last in, first out: this one before that of concurrent.futures, imported above.
threading._register_atexit(_shutdown)  # type: ignore[attr-defined]


# --- The backends ---------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class LocalTask(Task):  # type: ignore[type-arg]
    """A task that may say itself whether a commit enqueues it, see ``ENQUEUE_ON_COMMIT``."""

    enqueue_on_commit: bool | str | None = None


class _PoolBackend(BaseTaskBackend):
    """What both backends have in common. In a child process each call goes to the parent."""

    task_class = LocalTask
    supports_defer = True
    supports_async_task = True
    supports_get_result = True
    supports_priority = True
    uses_processes = False
    worker_class = _Worker

    def __init__(self, alias: str, params: dict[str, Any]) -> None:
        """Check ``params``, that is ``TASKS[alias]``, and start nothing.

        Raise InvalidTaskBackend, of the backport InvalidTaskBackendError, for a wrong option.
        """
        super().__init__(alias, params)
        self._config = _configure(type(self), alias, params)

    def enqueue(
        self, task: Task, args: Iterable[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> TaskResult:
        """Queue up ``task`` and return its result, READY.

        Raise InvalidTask (of the backport InvalidTaskError); TypeError or ValueError where the
        arguments are not JSON; TaskQueueFull; RuntimeError while the interpreter exits.
        """
        self.validate_task(task)
        record = _Record(self.alias, task, self._payload(task, [*args], {**(kwargs or {})}), _new_id())
        on_commit = getattr(task, "enqueue_on_commit", None)
        database = self._config.on_commit if on_commit is None else _database(self.alias, on_commit)
        if database and transaction.get_connection(database).in_atomic_block:
            transaction.on_commit(functools.partial(self._submit, record), using=database)
            return record.snapshot()
        return self._submit(record)

    def _payload(self, task: Task, args: list[Any], kwargs: dict[str, Any]) -> bytes:
        if self._config.options["RESULTS_CACHE"]:
            _reference(task.func)
        return _dump([args, kwargs])

    def _submit(self, record: _Record) -> TaskResult:
        if _link:
            packed = _pack_task(record.task)
            return _unpack(_link.call(self.alias, "enqueue", packed, record.payload, record.id))
        result = None
        while result is None:
            result = _pool(self.alias, self._config).submit(record)
        return result

    def answer(self, method: str, *args: Any) -> Any:
        """Do for a child what it asks, and return plain data."""
        if method == "enqueue":
            packed, payload, result_id = args
            return _pack(self._submit(_Record(self.alias, _unpack_task(packed), payload, result_id)))
        result = getattr(self, method)(*args)
        return _pack(result) if isinstance(result, TaskResult) else result

    async def aenqueue(
        self, task: Task, args: Iterable[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> TaskResult:
        """Do as ``enqueue``; in place, unless a cache is to be written."""
        if self._config.options["RESULTS_CACHE"]:
            return await sync_to_async(self.enqueue)(task, args, kwargs)
        return self.enqueue(task, args, kwargs)

    def get_result(self, result_id: str) -> TaskResult:
        """Return the result as it is now. Raise TaskResultDoesNotExist."""
        if _link:
            return _unpack(_link.call(self.alias, "get_result", str(result_id)))
        return _store(self.alias).get(str(result_id)) or self._cached(str(result_id))

    def _cached(self, result_id: str) -> TaskResult:
        alias, packed = self._config.options["RESULTS_CACHE"], None
        if alias:
            cache, key = _cache(alias, self.alias, result_id)
            packed = cache.get(key)
        if packed:
            return _unpack(packed)
        hint = f"nor in the cache {alias!r}" if alias else "see the option RESULTS_CACHE"
        raise TaskResultDoesNotExist(
            f"No task result {result_id!r} of {self.alias!r} in process {os.getpid()}: results are "
            f"kept in the memory of the process that enqueued, at most MAX_RESULTS; {hint}"
        )

    async def aget_result(self, result_id: str) -> TaskResult:
        """Do as ``get_result``; in place, unless a cache is to be read."""
        if _link is None and self._config.options["RESULTS_CACHE"]:
            result = _store(self.alias).get(str(result_id))
            return result or await sync_to_async(self._cached)(str(result_id))
        return self.get_result(result_id)

    def wait_result(self, result_id: str, timeout: float | None = None) -> TaskResult:
        """Return the result once it is finished; wait for ``timeout`` seconds, or without end.

        Raise TimeoutError, TaskResultDoesNotExist, or RuntimeError in a task if this would be
        for ever.
        """
        if _link:
            return _unpack(_link.call(self.alias, "wait_result", str(result_id), timeout))
        self._wait(str(result_id), timeout)
        return self._finished(self.get_result(result_id))

    def _finished(self, result: TaskResult) -> TaskResult:
        if not result.is_finished:
            raise TaskResultDoesNotExist(
                f"Task result {result.id!r} is {result.status} in another process than {os.getpid()}"
                f", its end cannot be waited for here"
            )
        return result

    def _wait(self, result_id: str, timeout: float | None) -> None:
        store, me = _store(self.alias), current_result_id.get("")
        try:
            if future := store.future(result_id):
                future.result(timeout)
        except concurrent.futures.TimeoutError:
            raise _timed_out(result_id, timeout) from None
        finally:
            store.waiting.pop(me, None)

    async def await_result(self, result_id: str, timeout: float | None = None) -> TaskResult:
        """Do as ``wait_result`` without blocking the event loop."""
        if _link:
            return await sync_to_async(self.wait_result, thread_sensitive=False)(result_id, timeout)
        store, me = _store(self.alias), current_result_id.get("")
        try:
            if future := store.future(str(result_id)):
                await asyncio.wait_for(asyncio.wrap_future(future), timeout)
        except asyncio.TimeoutError:
            raise _timed_out(result_id, timeout) from None
        finally:
            store.waiting.pop(me, None)
        return self._finished(await self.aget_result(result_id))

    def join(self, timeout: float | None = None) -> None:
        """Wait until nothing is pending or running; deferred tasks do not count.

        Raise TimeoutError after ``timeout`` seconds, or RuntimeError in a task of this alias.
        """
        if _link:
            _link.call(self.alias, "join", timeout)
        else:
            self._wait("", timeout)

    def stats(self) -> dict[str, int]:
        """Return how many tasks are pending, deferred, running and finished, workers, and pid."""
        return _link.call(self.alias, "stats") if _link else _store(self.alias).stats()

    def close(self) -> None:
        """Finish what was enqueued, abandon what is deferred and stop the workers.

        It waits, but not in a task. To enqueue afterwards starts afresh.
        """
        if _link:
            _link.call(self.alias, "close")
            return
        for pool in list(_store(self.alias).pools):
            pool.retire()
            for worker in list(pool.workers):
                if not hasattr(_here, "worker"):
                    worker.left.wait()


def _timed_out(result_id: str, timeout: float | None) -> TimeoutError:
    what = f"Task result {result_id!r} is" if result_id else "Tasks are"
    return TimeoutError(f"{what} not finished after {timeout} seconds")


class ThreadPoolBackend(_PoolBackend):
    """Runs tasks in threads of this process: for work that waits for network, disk, database."""


class ProcessPoolBackend(_PoolBackend):
    """Runs tasks in child processes: for work that computes. What goes in and out is pickleable."""

    uses_processes = True
    worker_class = _ProcessWorker

    def _payload(self, task: Task, args: list[Any], kwargs: dict[str, Any]) -> bytes:
        _reference(task.func)
        try:
            return _dump([args, kwargs])
        except TypeError:
            try:
                pickle.dumps((args, kwargs))
            except Exception as error:
                raise ValueError(
                    f"Arguments of {task.module_path} must be pickleable, and JSON: {error}"
                ) from error
            raise
