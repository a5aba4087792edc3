"""The tests: python -m pytest. Benchmarks: python -m pytest -m bench. Stress: python -m pytest -m stress."""

import ast
import asyncio
import builtins
import concurrent.futures
import contextlib
import contextvars
import ctypes
import enum
import faulthandler
import fcntl
import functools
import gc
import http.cookiejar
import itertools
import json
import logging
import multiprocessing.forkserver
import os
import py_compile
import queue
import random
import re
import select
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import textwrap
import threading
import time
import tracemalloc
import types
import urllib.error
import urllib.parse
import urllib.request
import uuid
import venv
import weakref
from collections import OrderedDict, UserDict, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeoutError
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import datetime, timedelta
from datetime import timezone as datetimes
from pathlib import Path
from typing import Any, NamedTuple

import django
import pytest
from asgiref.sync import async_to_sync
from django.conf import settings
from django.test import override_settings
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

if "TASKS_TEST_DIRECTORY" not in os.environ:  # Children have it from their parent.
    os.environ["TASKS_TEST_DIRECTORY"] = tempfile.mkdtemp()
    py_compile.compile(__file__)  # They import this file, too, and may not keep what they compile.
DIRECTORY = os.environ["TASKS_TEST_DIRECTORY"]
POSTGRES = os.environ.get("TASKS_TEST_POSTGRES")  # A connection string.
REDIS = os.environ.get("TASKS_TEST_REDIS")  # A URL.


def databases() -> dict[str, Any]:
    sqlite = {
        "ENGINE": "django.db.backends.sqlite3",
        "NAME": f"{DIRECTORY}/db.sqlite3",
        "OPTIONS": {"timeout": 30},
    }
    found = {"default": sqlite, "kept": {**sqlite, "CONN_MAX_AGE": None}}
    if POSTGRES:
        from psycopg.conninfo import conninfo_to_dict

        given = conninfo_to_dict(POSTGRES)
        names = ("host", "port", "user", "password")
        found["postgres"] = {
            "ENGINE": "django.db.backends.postgresql",
            **{name.upper(): given.get(name) or "" for name in names},
            "NAME": given.get("dbname") or "postgres",
            "OPTIONS": {"application_name": f"tasks-{os.getpid()}"},
        }
        found["postgres_kept"] = {**found["postgres"], "CONN_MAX_AGE": None}
    return found


if not settings.configured:  # A child process has the settings of its parent.
    settings.configure(
        DATABASES=databases(),
        CACHES={
            "default": {"BACKEND": "django.core.cache.backends.locmem.LocMemCache"},
            "files": {
                "BACKEND": "django.core.cache.backends.filebased.FileBasedCache",
                "LOCATION": f"{DIRECTORY}/cache",
            },
        },
        TASKS={"default": {"BACKEND": "django_tasks_local.ThreadPoolBackend"}},
        USE_TZ=True,
        SECRET_KEY="tests",
    )
    django.setup()

if django.VERSION >= (6, 0):
    from django.tasks import TaskResultStatus, task, task_backends
    from django.tasks.exceptions import (
        InvalidTask,
        InvalidTaskBackend,
        TaskResultDoesNotExist,
        TaskResultMismatch,
    )
    from django.tasks.signals import task_enqueued, task_finished, task_started
else:
    from django_tasks import TaskResultStatus, task, task_backends
    from django_tasks.exceptions import InvalidTaskBackendError as InvalidTaskBackend
    from django_tasks.exceptions import InvalidTaskError as InvalidTask
    from django_tasks.exceptions import TaskResultDoesNotExist, TaskResultMismatch
    from django_tasks.signals import task_enqueued, task_finished, task_started

from django.db import connections, transaction
from django.utils import timezone, translation
from django.utils.safestring import mark_safe

import django_tasks_local
from django_tasks_local import ProcessPoolBackend, TaskQueueFull, ThreadPoolBackend, current_result_id

READY, RUNNING = TaskResultStatus.READY, TaskResultStatus.RUNNING
SUCCESSFUL, FAILED = TaskResultStatus.SUCCESSFUL, TaskResultStatus.FAILED
TIMEOUT = 30  # Seconds; it only ends a hang.


class Gate:
    """A gate that tasks in threads and in processes wait at (``pass_gate``) until it is opened."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)
        self.file = path.open("w")
        fcntl.flock(self.file, fcntl.LOCK_EX)

    def open(self) -> None:
        if not self.file.closed:
            fcntl.flock(self.file, fcntl.LOCK_UN)  # A forked process may hold the file, too.
            self.file.close()


def pass_gate(path: str) -> None:
    with open(path) as file:
        fcntl.flock(file, fcntl.LOCK_SH)


@task
def echo(*args: Any, **kwargs: Any) -> list[Any]:
    return [list(args), kwargs]


@task
def wait_at(path: str, value: Any = None) -> Any:
    pass_gate(path)
    return value


@task
def fail(message: str) -> None:
    raise ValueError(message)


processes = pytest.mark.parametrize("kind", ["ProcessPoolBackend"])
threads = pytest.mark.parametrize("kind", ["ThreadPoolBackend"])
each_kind = pytest.mark.parametrize("kind", ["ThreadPoolBackend", "ProcessPoolBackend"])


@pytest.fixture(scope="session", autouse=True)
def fork_server() -> None:
    """Have what this file imports imported once, for all the child processes that import it."""
    multiprocessing.set_forkserver_preload(["django_tasks_local", "hypothesis", "pytest"])
    multiprocessing.forkserver.ensure_running()


@pytest.fixture(params=["ThreadPoolBackend", "ProcessPoolBackend"])
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def use(kind: str) -> Iterator[Callable[..., Any]]:
    """Return a function that makes a pool of this kind the default backend, with options."""
    overrides = []

    def configure(params: dict[str, Any] | None = None, **options: Any) -> Any:
        default = {"BACKEND": f"django_tasks_local.{kind}", "OPTIONS": options, **(params or {})}
        overrides.append(override_settings(TASKS={"default": default}))
        overrides[-1].enable()
        return task_backends["default"]

    yield configure
    for override in reversed(overrides):
        task_backends["default"].close()
        override.disable()
        join_drains()  # The pool is closed once more, not waited for.


def join_drains() -> None:
    """Wait until what was closed in a task, or by changed settings, is closed."""
    for thread in threading.enumerate():
        if thread.name.endswith("-drain"):
            thread.join(TIMEOUT)


@pytest.fixture
def backend(use: Callable[..., Any]) -> Any:
    return use()


@pytest.fixture
def gate(tmp_path: Path) -> Iterator[Gate]:
    gate = Gate(tmp_path / "gate")
    yield gate
    gate.open()


@pytest.fixture
def signals() -> Iterator["queue.Queue[tuple[str, Any]]"]:
    """Return a queue of (name, task result): each signal of a task, as it is sent."""
    sent: queue.Queue[tuple[str, Any]] = queue.Queue()
    receivers = []
    for name, source in (("enqueued", task_enqueued), ("started", task_started), ("finished", task_finished)):

        def receive(task_result: Any, name: str = name, **kwargs: Any) -> None:
            sent.put((name, task_result))

        source.connect(receive, weak=False)
        receivers.append((source, receive))
    yield sent
    for source, receive in receivers:
        source.disconnect(receive)


def finished(result: Any, timeout: float = TIMEOUT) -> Any:
    """Return the finished result."""
    return task_backends[result.backend].wait_result(result.id, timeout)


REPOSITORY = Path(sys.modules[ThreadPoolBackend.__module__].__file__).parent
note = contextvars.ContextVar("note")
both_aliases = {
    "default": {"BACKEND": "django_tasks_local.ThreadPoolBackend"},
    "other": {"BACKEND": "django_tasks_local.ProcessPoolBackend", "OPTIONS": {"MAX_WORKERS": 2}},
}


class OwnBaseException(BaseException):
    pass


class SealedError(Exception):
    def __setattr__(self, *args):
        raise RuntimeError("sealed")


class HiddenError(Exception):
    def __getattribute__(self, name):
        raise RuntimeError("hidden")


class UnprintableError(Exception):
    def __str__(self):
        raise OwnBaseException


class UnpicklableError(Exception):
    def __init__(self, message):
        super().__init__(message)
        self.hook = lambda: message

    def __reduce__(self):
        raise OwnBaseException


class TwoArgumentsError(Exception):
    def __init__(self, first, second):
        super().__init__(first)


EXCEPTIONS = {
    "SystemExit": SystemExit("odd"),
    "KeyboardInterrupt": KeyboardInterrupt("odd"),
    "GeneratorExit": GeneratorExit("odd"),
    "CancelledError": asyncio.CancelledError("odd"),
    "StopIteration": StopIteration("odd"),
    "RecursionError": RecursionError("odd"),
    "EOFError": EOFError("odd"),
    "ChildProcessError": ChildProcessError("odd"),
    "TimeoutError": TimeoutError("odd"),
    "OwnBaseException": OwnBaseException("odd"),
    "UnprintableError": UnprintableError("odd"),
    "UnpicklableError": UnpicklableError("odd"),
    "TwoArgumentsError": TwoArgumentsError("odd", 2),
}
SEALED = {"SealedError": SealedError, "HiddenError": HiddenError}


@task
def raise_sealed(name):
    raise SEALED[name]("odd")


@task
def raise_odd(name):
    raise EXCEPTIONS[name]  # The line of the task.


@task
async def araise_odd(name):
    raise EXCEPTIONS[name]  # The line of the task.


@task
def nested_failure():
    try:
        json.loads("{")
    except ValueError as error:
        raise LookupError("outer") from error


class BufferedText(str):
    """Also a buffer (from Python 3.12 on), like the strings and numbers of NumPy."""

    def __buffer__(self, flags):
        return memoryview(b"not this")


class BufferedNumber(float):
    __buffer__ = BufferedText.__buffer__


class RaisingMapping(UserDict[str, Any]):
    def __iter__(self):
        raise OSError("own")


RETURNED = {
    "tuple": lambda: (1, (2, "x")),
    "bytes": lambda: b"caf\xc3\xa9",
    "keys": lambda: {b"k": {1: OrderedDict(a=(None, True))}},
    "string subclass": lambda: type("S", (str,), {})("s"),
    "number subclass": lambda: [type("I", (int,), {})(7), type("F", (float,), {})(0.5)],
    "buffers": lambda: {BufferedText("k"): [BufferedNumber(0.5), (BufferedText("s"),)]},
    "set": lambda: {1},
    "object": object,
    "lambda": lambda: lambda: 1,
    "latin": lambda: b"\xe9",
    "deep": lambda: 0,
    "raises": lambda: RaisingMapping(a=1),
    "huge": lambda: "x" * 10_000_000,
}


@task
def give(name):
    value = RETURNED[name]()
    if name == "deep":
        for _ in range(100_000):
            value = [value]
    return value


@task(takes_context=True)
def look(context, *args, **kwargs):
    result = context.task_result
    return {
        "id": result.id,
        "attempt": context.attempt,
        "status": result.status,
        "priority": result.task.priority,
        "queue": result.task.queue_name,
        "backend": result.task.backend,
        "run_after": result.task.run_after and result.task.run_after.isoformat(),
        "path": result.task.module_path,
        "args": result.args,
        "kwargs": result.kwargs,
        "started": result.started_at == result.last_attempted_at is not None,
        "finished_at": result.finished_at,
        "workers": result.worker_ids,
        "same": result.task.get_result(result.id).started_at == result.started_at,
    }


@task(takes_context=True)
async def alook(context, value):
    await asyncio.sleep(0)
    same = current_result_id.get() == context.task_result.id
    return [value, context.attempt, same, threading.get_ident()]


def read_id():
    try:
        return current_result_id.get()
    except LookupError:
        return "LookupError"


@task
def ids():
    """Return the current id as seen here, in a coroutine, a thread, and a thread with a copy."""
    found = []

    async def coroutine():
        found.append(await asyncio.create_task(asyncio.sleep(0, read_id())))

    asyncio.run(coroutine())
    copy = contextvars.copy_context()
    for target in (read_id, lambda: copy.run(read_id)):
        with ThreadPoolExecutor(initializer=lambda: contextvars.Context()) as executor:
            found.append(executor.submit(target).result())
    return [read_id(), *found]


@task
def leave_context(language, zone):
    """Return what is active, and leave something else."""
    seen = [note.get(None), translation.get_language(), str(timezone.get_current_timezone())]
    note.set("left")
    translation.activate(language)
    timezone.activate(zone)
    return seen


@task
def record_order(path, name):
    with open(path, "a") as file:
        file.write(f"{name}\n")


@task
def enqueue_both(value):
    """Enqueue on both aliases, wait for the results, and return what they gave."""
    results = [echo.using(backend=alias).enqueue(value) for alias in ("default", "other")]
    done = [task_backends[result.backend].wait_result(result.id, TIMEOUT) for result in results]
    return [os.getpid(), [(result.id, result.status, result.return_value) for result in done]]


@task
async def aenqueue_and_read(alias):
    result = await echo.using(backend=alias).aenqueue(1)
    done = await task_backends[alias].await_result(result.id, TIMEOUT)
    await result.arefresh()
    return [done.return_value, result.status]


@task
def call_wrongly(alias):
    """Return the class and the text of the errors that wrong calls of a backend raise."""
    found = []
    calls = (
        lambda: echo.using(backend=alias).get_result("none"),
        lambda: ids.using(backend=alias).get_result(echo.using(backend=alias).enqueue().id),
        lambda: echo.using(backend=alias).enqueue(object()),
        lambda: echo.using(backend=alias, priority=7).using(queue_name="unknown"),
    )
    for call in calls:
        try:
            call()
        except Exception as error:
            found.append(type(error).__name__)
    return found


def wrap(function):
    def inner(*args):
        return ["wrapped", function(*args)]

    inner.__name__, inner.__qualname__ = function.__name__, function.__qualname__
    inner.__module__ = function.__module__
    return inner


def bare(value):
    return ["bare", value]


bare_task = task(bare)  # The name in the module leads to the bare function, and is enough.


@task
@wrap
def decorated(value):
    return value


def hidden_original(value):
    return ["original", value]


hidden = task(hidden_original)
hidden_original = wrap(hidden_original)
unreachable = task(wrap(bare))
del unreachable
UNREACHABLE = [task(wrap(bare))]


def wait_until_started(sent):
    """Return the result of the next task that starts."""
    return next(result for name, result in iter(lambda: sent.get(timeout=TIMEOUT), None) if name == "started")


def outcome(result):
    """Return what a task returned, or why it failed."""
    done = finished(result)
    return done.return_value if done.status == SUCCESSFUL else done.errors[0].traceback


def run_script(tmp_path, text, *, name="script.py", **environ):
    script = tmp_path / name
    script.parent.mkdir(parents=True, exist_ok=True)
    script.write_text(textwrap.dedent(text))
    environ = {
        **{key: value for key, value in os.environ.items() if not key.startswith("DJANGO")},
        "PYTHONPATH": os.pathsep.join([str(tmp_path), str(REPOSITORY)]),
        **environ,
    }
    command = [sys.executable, "-W", "error", str(script)]
    done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=50)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout), done.stderr


@pytest.fixture
def connect():
    """Return a function that connects a receiver to signals until the test ends."""
    connected = []

    def connect_all(receiver, *signals):
        for source in signals:
            source.connect(receiver)
            connected.append((source, receiver))

    yield connect_all
    for source, receiver in connected:
        source.disconnect(receiver)


def refusal(kind, params):
    """Return with which text ``TASKS["default"]`` is refused; "" if it is not."""
    entry = {"BACKEND": f"django_tasks_local.{kind}", **params}
    with override_settings(TASKS={"default": entry}):
        try:
            task_backends["default"].validate_task(echo)
        except InvalidTaskBackend as error:
            return str(error)
    return ""


# --- The Tasks API, flags and options


def test_flags_promise_everything(backend):
    names = ("get_result", "async_task", "priority", "defer")
    assert all(getattr(backend, f"supports_{name}") is True for name in names)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(
            (name, bad)
            for name in ("MAX_WORKERS", "MAX_RESULTS")
            for bad in (True, "4", 2.5, 1.0, None, 0, -1, [1])
        ),
        *(("MAX_PENDING", bad) for bad in (False, "1", 0, 1.0)),
    ],
)
def test_a_wrong_value_of_an_option_is_refused_with_alias_option_value_and_what_is_right(kind, name, value):
    refusal(kind, {"OPTIONS": {name: 1}})  # An equal value must not hide one of a wrong type.
    text = refusal(kind, {"OPTIONS": {name: value}})
    assert all(part in text for part in ("'default'", name, repr(value), "integer"))


@pytest.mark.parametrize("wrong", ["MAX_WORKER", "max_workers", "MAXWORKERS", "MAX_WORKRES"])
def test_an_unknown_option_is_refused_with_the_nearest_name(kind, wrong):
    text = refusal(kind, {"OPTIONS": {wrong: 41}})
    assert all(part in text for part in ("'default'", repr(wrong), "41", "MAX_WORKERS"))


def test_an_option_in_the_wrong_place_is_told_the_right_one(kind):
    text = refusal(kind, {"MAX_WORKERS": 3})
    assert all(part in text for part in ("'default'", "'MAX_WORKERS'", "in its OPTIONS", "3"))
    text = refusal(kind, {"OPTIONS": {"QUEUES": ["mail"]}})
    assert all(part in text for part in ("'default'", "'QUEUES'", "beside OPTIONS", "['mail']"))


def test_options_that_are_no_mapping_are_refused(kind):
    text = refusal(kind, {"OPTIONS": ["MAX_WORKERS"]})
    assert all(part in text for part in ("'default'", "OPTIONS", "dict"))


def test_building_a_backend_starts_nothing(use):
    threads = set(threading.enumerate())
    backend = use(MAX_WORKERS=3)
    with pytest.raises(TaskResultDoesNotExist):
        backend.get_result("none")
    backend.join()
    backend.close()
    assert set(threading.enumerate()) == threads
    assert backend.stats()["workers"] == 0


def test_all_workers_work_at_once_and_no_more(use, gate, signals):
    backend = use(MAX_WORKERS=3)
    kept = backend.stats()["finished"]
    results = [wait_at.enqueue(gate.path, n) for n in range(5)]
    started = set()
    while len(started) < 3:
        name, result = signals.get(timeout=TIMEOUT)
        started |= {result.id} if name == "started" else set()
    assert started == {result.id for result in results[:3]}
    stats = backend.stats()
    gate.open()
    assert [outcome(result) for result in results] == list(range(5))
    expected = {"pending": 2, "deferred": 0, "running": 3, "finished": kept, "workers": 3}
    assert stats == {**expected, "pid": os.getpid()}
    backend.join(TIMEOUT)
    assert backend.stats() == {
        **expected,
        "pending": 0,
        "running": 0,
        "finished": kept + 5,
        "pid": os.getpid(),
    }


def test_task_runs_though_its_module_has_others_that_the_settings_of_now_refuse(use):
    use({"QUEUES": ["mail"]})
    assert outcome(echo.using(queue_name="mail").enqueue(1)) == [[1], {}]
    with pytest.raises(InvalidTask, match="'default' is not valid"):
        echo.enqueue(1)


def test_aliases_work_side_by_side_with_results_of_their_own(kind):
    entry = {"BACKEND": f"django_tasks_local.{kind}", "QUEUES": ["default", "mail"]}
    with override_settings(TASKS={"default": entry, "second": entry}):
        first = echo.enqueue(1)
        second = echo.using(backend="second", queue_name="mail", priority=5).enqueue(2)
        assert outcome(first) == [[1], {}]
        assert outcome(second) == [[2], {}]
        assert (second.backend, second.task.queue_name, second.task.priority) == (
            "second",
            "mail",
            5,
        )
        with pytest.raises(TaskResultDoesNotExist, match=rf"second.*{os.getpid()}.*memory"):
            task_backends["second"].get_result(first.id)
        with pytest.raises(TaskResultDoesNotExist, match="RESULTS_CACHE"):
            task_backends["default"].get_result(second.id)
        for backend in task_backends.all():
            backend.close()


def test_what_is_pending_runs_though_changed_settings_would_refuse_it(use, gate, connect):
    senders = []
    connect(lambda sender, **kwargs: senders.append(sender.__name__), task_finished)
    backend = use({"QUEUES": ["default", "old"]}, MAX_WORKERS=1)
    running = wait_at.using(queue_name="old").enqueue(gate.path, 1)
    waiting = echo.using(queue_name="old").enqueue(2)
    while not backend.stats()["running"]:
        os.sched_yield()
    use({"QUEUES": ["default"], "BACKEND": "django_tasks_local.ThreadPoolBackend"}, MAX_WORKERS=2)
    gate.open()
    assert [outcome(result) for result in (running, waiting)] == [1, [[2], {}]]
    assert set(senders) == {type(backend).__name__}


def test_changed_settings_hold_and_the_old_pool_ends_after_its_work(use, gate, signals):
    use(MAX_WORKERS=1)
    running, waiting = wait_at.enqueue(gate.path, "running"), wait_at.enqueue(gate.path, "waiting")
    wait_until_started(signals)
    before = {t for t in threading.enumerate() if t.name.startswith("tasks-default")}
    use(MAX_WORKERS=2)
    results = [wait_at.enqueue(gate.path, n) for n in range(2)]
    assert wait_until_started(signals).id == waiting.id
    gate.open()
    assert [outcome(r) for r in (running, waiting, *results)] == ["running", "waiting", 0, 1]
    for thread in before:
        thread.join(TIMEOUT)
    assert not any(thread.is_alive() for thread in before)


def test_an_instance_in_another_thread_serves_the_same_pool(backend):
    with ThreadPoolExecutor(1) as executor:
        result = executor.submit(echo.enqueue, 1).result(TIMEOUT)
        assert finished(result).return_value == [[1], {}]
        there = executor.submit(lambda: task_backends["default"])
        assert there.result() is not backend
        assert executor.submit(backend.get_result, result.id).result().status == SUCCESSFUL
        assert executor.submit(echo.get_result, result.id).result().id == result.id


# --- enqueue, arguments and return values


def test_enqueue_stores_ready_then_announces_then_hands_over(use, connect):
    backend = use(MAX_WORKERS=1)
    seen = []

    def look_up(task_result, **kwargs):
        seen.append((backend.get_result(task_result.id).status, backend.stats()["running"]))

    connect(look_up, task_enqueued)
    result = backend.enqueue(echo)
    assert seen == [(READY, 0)]
    assert result.status == READY
    assert uuid.UUID(result.id).version == 4
    assert str(uuid.UUID(result.id)) == result.id
    assert (result.args, result.kwargs, result.attempts) == ([], {}, 0)
    assert (result.errors, result.worker_ids, result.backend) == ([], [], "default")
    assert (result.started_at, result.last_attempted_at, result.finished_at) == (None, None, None)
    assert finished(backend.enqueue(echo, kwargs={"a": 1})).return_value == [[], {"a": 1}]
    assert finished(backend.enqueue(echo, [1])).return_value == [[1], {}]
    assert finished(backend.enqueue(echo, args=(1,), kwargs={})).return_value == [[1], {}]
    assert result.status == READY
    with pytest.raises(ValueError, match="not finished"):
        result.return_value  # noqa: B018


@pytest.mark.parametrize("use_tz", [True, False])
def test_times_are_true_under_both_time_zone_settings(use, use_tz):
    use()
    with override_settings(USE_TZ=use_tz):
        before = timezone.now()
        done = finished(echo.enqueue())
        after = timezone.now()
    times = [done.enqueued_at, done.started_at, done.finished_at]
    assert [before, *times, after] == sorted([before, *times, after])
    assert done.last_attempted_at == done.started_at
    assert all(timezone.is_aware(moment) is use_tz for moment in times)


def test_the_task_gets_a_copy_of_its_arguments_normalised_as_the_result_shows(use, gate, signals):
    use(MAX_WORKERS=1)
    wait_at.enqueue(gate.path)
    argument, option = [1, (2,), b"x"], {"k": {"deep": ()}}
    result = echo.enqueue(argument, option=option)
    argument.append(3)
    option["k"]["deep"] = "changed"
    expected = [[[1, [2], "x"]], {"option": {"k": {"deep": []}}}]
    assert [result.args, result.kwargs] == expected
    result.args[0].append("mine")
    result.kwargs["mine"] = 1
    gate.open()
    done = finished(result)
    assert done.return_value == [done.args, done.kwargs] == expected
    done.return_value.append("mine")
    done.errors.append("mine")
    done.worker_ids.append("mine")
    done.args.append("mine")
    again = task_backends["default"].get_result(result.id)
    assert again.return_value == [again.args, again.kwargs] == expected
    assert (again.errors, len(again.worker_ids)) == ([], 1)


@pytest.mark.parametrize("bad", [object(), {1, 2}, datetime(2020, 1, 1), Path()])
def test_arguments_that_are_not_json_are_refused_and_leave_nothing_behind(backend, signals, bad):
    before = backend.stats()
    for args, kwargs in (([bad], {}), ([], {"deep": [{"k": bad}]})):
        with pytest.raises(TypeError, match="Unsupported type"):
            backend.enqueue(echo, args, kwargs)
    with pytest.raises(ValueError, match="Unsupported value"):
        echo.enqueue(b"\xff")
    assert signals.empty()
    assert backend.stats() == before


@pytest.mark.parametrize("bad", [lambda: 1, threading.Lock(), sys])
def test_arguments_that_cannot_be_pickled_are_refused(kind, backend, bad):
    before = backend.stats()
    error = TypeError if kind == "ThreadPoolBackend" else ValueError
    text = "Unsupported type" if kind == "ThreadPoolBackend" else "must be pickleable"
    for args, kwargs in (([bad], {}), ([], {"k": [bad]})):
        with pytest.raises(error, match=text):
            backend.enqueue(echo, args, kwargs)
    assert backend.stats() == before


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("tuple", [1, [2, "x"]]),
        ("bytes", "café"),
        ("keys", {"k": {1: {"a": [None, True]}}}),
        ("string subclass", "s"),
        ("number subclass", [7, 0.5]),
        ("buffers", {"k": [0.5, ["s"]]}),
        ("huge", "x" * 10_000_000),
    ],
)
def test_a_return_value_is_normalised(backend, name, expected):
    assert outcome(give.enqueue(name)) == expected


def test_arguments_that_are_buffers_too_are_what_they_are_equal_to(backend):
    value = RETURNED["buffers"]()
    assert outcome(echo.enqueue(value, k=value)) == [[{"k": [0.5, ["s"]]}], {"k": {"k": [0.5, ["s"]]}}]


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("set", "set"),
        ("object", "object"),
        ("lambda", "function"),
        ("latin", "bytes"),
        ("deep", "list"),
        ("raises", "RaisingMapping"),
    ],
)
def test_a_return_value_that_is_not_json_fails_the_task_and_says_what_may_be(kind, backend, name, what):
    done = finished(give.enqueue(name))
    assert done.status == FAILED
    assert done.errors[0].exception_class in (TypeError, ValueError)
    text = done.errors[0].traceback
    assert give.module_path in text
    assert re.search(rf"\b{what}\b", text)
    assert "JSON" in text
    assert ("pickleable" in text) is (kind == "ProcessPoolBackend")
    with pytest.raises(ValueError, match="failed"):
        done.return_value  # noqa: B018
    assert outcome(echo.enqueue(1)) == [[1], {}]


def test_invalid_tasks_are_refused_before_anything_happens(backend, signals):
    before = backend.stats()
    for wrong in (
        {"queue_name": "unknown"},
        {"priority": 101},
        {"priority": -101},
        {"run_after": datetime(2020, 1, 1)},
    ):
        unchecked = object.__new__(type(echo))
        for name in echo.__dataclass_fields__:
            object.__setattr__(unchecked, name, wrong.get(name, getattr(echo, name)))
        with pytest.raises(InvalidTask):
            backend.enqueue(unchecked)
    assert signals.empty()
    assert backend.stats() == before


# --- Lifecycle, errors and signals


def test_a_task_is_ready_then_running_then_successful(use, gate, signals, kind):
    backend = use(MAX_WORKERS=1)
    first, second = wait_at.enqueue(gate.path, "a"), wait_at.enqueue(gate.path, "b")
    assert wait_until_started(signals).id == first.id
    first.refresh()
    assert (first.status, backend.get_result(second.id).status) == (RUNNING, READY)
    assert (first.attempts, first.finished_at) == (1, None)
    assert first.started_at == first.last_attempted_at is not None
    with pytest.raises(ValueError, match="not finished"):
        first.return_value  # noqa: B018
    gate.open()
    done = [finished(first), finished(second)]
    assert [(d.status, d.return_value, d.attempts, d.errors) for d in done] == [
        (SUCCESSFUL, "a", 1, []),
        (SUCCESSFUL, "b", 1, []),
    ]
    assert first.status == RUNNING
    assert done[0].worker_ids == first.worker_ids == done[1].worker_ids
    own_process = str(os.getpid()) in done[0].worker_ids[0]
    assert own_process is (kind == "ThreadPoolBackend")


@pytest.mark.parametrize("raising", [raise_odd, araise_odd])
def test_any_exception_fails_the_task_and_the_worker_lives_on(use, capfd, raising):
    backend = use(MAX_WORKERS=1)
    workers = set()
    results = {name: raising.enqueue(name) for name in EXCEPTIONS}
    for name, result in results.items():
        done = finished(result, 5)
        error = done.errors[0]
        workers |= {*done.worker_ids}
        expected = type(EXCEPTIONS[name])
        if raising is araise_odd and name == "StopIteration":  # As of any coroutine.
            expected = RuntimeError
        assert done.status == FAILED
        assert error.exception_class is expected
        assert name == "UnprintableError" or "odd" in error.traceback
        assert "# The line of the task." in error.traceback
        assert "/django_tasks_local.py" not in error.traceback
    assert outcome(echo.enqueue(1)) == [[1], {}]
    assert len(workers) == 1
    assert backend.stats()["running"] == 0
    assert "Exception in thread" not in capfd.readouterr().err


@pytest.mark.parametrize("name", SEALED)
def test_an_exception_that_defends_itself_fails_its_task_alone(kind, capfd, name):
    """It has an alias of its own: a task that is stuck would keep the others from closing."""
    options = {"MAX_WORKERS": 1, "SHUTDOWN_TIMEOUT": 0}
    entry = {"BACKEND": f"django_tasks_local.{kind}", "OPTIONS": options}
    with override_settings(TASKS={"default": entry, f"sealed {name}": entry}):
        sealed = raise_sealed.using(backend=f"sealed {name}")
        done = finished(sealed.enqueue(name), 5)
        assert done.errors[0].exception_class is SEALED[name]
        again = finished(sealed.enqueue(name), 5)
        assert again.worker_ids == done.worker_ids
        assert "Exception in thread" not in capfd.readouterr().err
        task_backends[f"sealed {name}"].close()


def test_a_traceback_shows_the_lines_of_the_task_and_not_ours(backend):
    text = outcome(nested_failure.enqueue())
    assert re.search(r'(?s)json.loads\("{"\).*direct cause.*raise LookupError\("outer"\)', text)
    assert text.rstrip().endswith("LookupError: outer")
    assert text.startswith("Traceback")
    assert "django_tasks_local" not in text.replace("test_django_tasks_local", "")
    mismatch = finished(fail.enqueue()).errors[0]
    assert mismatch.exception_class is TypeError
    assert "missing 1 required positional argument" in mismatch.traceback


def test_signals_come_once_each_in_order_in_the_parent_with_the_right_status(kind, backend, connect):
    seen = queue.Queue()

    def receive(signal, sender, task_result, **kwargs):
        seen.put((signal, sender, task_result.id, task_result.status, os.getpid(), sys.exc_info()[0]))

    connect(receive, task_enqueued, task_started, task_finished)
    good, bad = echo.enqueue(), fail.using(priority=-1).enqueue("x")
    for result in (good, bad):
        finished(result)
        found = []
        rest = []
        while not seen.empty():
            entry = seen.get()
            (found if entry[2] == result.id else rest).append(entry)
        for entry in rest:
            seen.put(entry)
        last = SUCCESSFUL if result is good else FAILED
        stages = [(task_enqueued, READY), (task_started, RUNNING), (task_finished, last)]
        assert [(e[0], e[3]) for e in found] == stages
        assert {e[1].__name__ for e in found} == {kind}
        assert {e[4] for e in found} == {os.getpid()}
        assert [e[5] is not None for e in found] == [False, False, result is bad]


def test_the_log_of_django_shows_the_traceback_of_a_failure(backend, caplog):
    logger = "django.tasks" if django.VERSION >= (6, 0) else "django_tasks"
    with caplog.at_level(logging.DEBUG, logger=logger):
        result = fail.enqueue("seen in the log")
        finished(result)
    records = [r for r in caplog.records if r.levelno == logging.ERROR and result.id in r.getMessage()]
    assert len(records) == 1
    assert "raise ValueError(message)" in logging.Formatter().format(records[0])


@pytest.mark.parametrize("error", [ValueError("receiver"), SystemExit("receiver"), OwnBaseException()])
def test_a_receiver_that_raises_in_a_worker_is_logged_and_harms_nothing(use, connect, caplog, error):
    use(MAX_WORKERS=1)

    def receive(**kwargs):
        raise error

    connect(receive, task_started, task_finished)
    assert outcome(echo.enqueue(1)) == [[1], {}]
    assert "ValueError: failed" in outcome(fail.enqueue("failed"))
    assert sum(r.exc_info is not None and r.exc_info[1] is error for r in caplog.records) == 4


def test_a_receiver_that_raises_in_enqueue_surfaces_and_nothing_is_left(use, connect, gate):
    backend = use(MAX_WORKERS=1, MAX_PENDING=1)
    before = backend.stats()["finished"]
    seen = []

    def receive(task_result, **kwargs):
        seen.append(task_result.id)
        raise KeyError("receiver")

    connect(receive, task_enqueued)
    for _ in range(3):
        with pytest.raises(KeyError, match="receiver"):
            wait_at.enqueue(gate.path)
        with pytest.raises(TaskResultDoesNotExist):
            backend.get_result(seen[-1])
    task_enqueued.disconnect(receive)
    backend.join(TIMEOUT)
    assert len(seen) == 3
    gate.open()
    assert outcome(echo.enqueue()) == [[], {}]
    stats = backend.stats()
    assert (stats["pending"], stats["running"], stats["finished"]) == (0, 0, before + 1)


def test_lists_that_a_receiver_changes_are_its_own(use, connect):
    use(MAX_WORKERS=1)

    def receive(task_result, **kwargs):
        task_result.args.append("receiver")
        task_result.worker_ids.append("receiver")

    connect(receive, task_enqueued, task_started, task_finished)
    done = finished(look.enqueue(1))
    assert (done.args, len(done.worker_ids)) == ([1], 1)
    assert done.return_value["args"] == [1]
    assert done.return_value["attempt"] == 1


# --- Context, coroutines and isolation


def test_the_context_shows_the_task_as_enqueued(use):
    use({"QUEUES": ["default", "slow"]})
    due = timezone.now() - timedelta(hours=1)
    special = look.using(priority=7, queue_name="slow", run_after=due)
    result = special.enqueue(1, (2,), k=b"v")
    done = finished(result)
    assert outcome(result) == {
        "id": result.id,
        "attempt": 1,
        "status": "RUNNING",
        "priority": 7,
        "queue": "slow",
        "backend": "default",
        "run_after": due.isoformat(),
        "path": look.module_path,
        "args": [1, [2]],
        "kwargs": {"k": "v"},
        "started": True,
        "finished_at": None,
        "workers": done.worker_ids,
        "same": True,
    }
    assert done.task == special


def test_coroutines_run_with_context_and_id(backend):
    value, attempt, same, _ = outcome(alook.enqueue((5,)))
    assert (value, attempt, same) == ([5], 1, True)


def test_the_current_id_is_known_in_the_task_and_only_there(backend):
    result = ids.enqueue()
    assert outcome(result) == [result.id, result.id, "LookupError", result.id]
    with pytest.raises(LookupError):
        current_result_id.get()


def test_a_task_starts_with_an_empty_context(use):
    note.set("of the caller")
    with translation.override("de"), timezone.override("Asia/Tokyo"):
        use(MAX_WORKERS=1)
        seen = [outcome(leave_context.enqueue("fr", "Europe/Paris")) for _ in range(3)]
        assert seen == [[None, settings.LANGUAGE_CODE, settings.TIME_ZONE]] * 3
        assert translation.get_language() == "de"
    note.set(None)


# --- Priority and run_after


def test_the_higher_priority_runs_first_and_equal_ones_in_order(use, gate, signals, tmp_path):
    backend = use(MAX_WORKERS=1)
    wait_at.enqueue(gate.path)
    wait_until_started(signals)
    path = str(tmp_path / "order")
    for n, priority in enumerate((0, -100, 100, 0, 100, -100, 1, -1)):
        record_order.using(priority=priority).enqueue(path, f"{priority} {n}")
    gate.open()
    backend.join(TIMEOUT)
    order = Path(path).read_text().split("\n")[:-1]
    assert order == ["100 2", "100 4", "1 6", "0 0", "0 3", "-1 7", "-100 1", "-100 5"]


def defer_two(backend: Any) -> list[float]:
    """Return by how many seconds each of two deferred tasks started late."""
    now = timezone.now()
    due = {"late": now + timedelta(seconds=0.7), "near": now + timedelta(seconds=0.4)}
    results = {name: echo.using(run_after=moment).enqueue() for name, moment in due.items()}
    assert {backend.get_result(r.id).status for r in results.values()} == {READY}
    stats = backend.stats()
    assert (stats["deferred"], stats["pending"], stats["running"]) == (2, 0, 0)
    backend.join(0)
    return [(finished(results[name]).started_at - due[name]).total_seconds() for name in due]


def test_a_deferred_task_is_ready_until_due_and_then_starts(use):
    backend = use(MAX_WORKERS=1)
    finished(echo.enqueue())
    for _ in range(3):  # The machine may stand still once.
        delays = defer_two(backend)
        assert min(delays) >= 0
        if max(delays) < 0.1:
            break
    assert max(delays) < 0.1
    assert backend.stats()["deferred"] == 0


def test_past_dates_run_at_once_and_far_ones_harm_nothing(backend):
    far = [
        datetime.max.replace(tzinfo=datetimes.utc),
        datetime.max.replace(tzinfo=datetimes(timedelta(hours=-14))),
        timezone.now() + timedelta(days=400),
    ]
    past = [
        datetime.min.replace(tzinfo=datetimes(timedelta(hours=14))),
        datetime(1969, 12, 31, tzinfo=datetimes.utc),
        timezone.now(),
    ]
    deferred = [echo.using(run_after=moment).enqueue() for moment in far]
    assert [outcome(echo.using(run_after=moment).enqueue()) for moment in past] == [[[], {}]] * 3
    assert outcome(echo.enqueue(1)) == [[1], {}]
    assert backend.stats()["deferred"] == 3
    backend.close()
    for result in deferred:
        result.refresh()
        assert (result.status, result.started_at) == (FAILED, None)


@pytest.mark.parametrize("moment", [datetime.min, datetime.max, datetime(9999, 12, 31)])
def test_naive_dates_at_the_ends_of_the_calendar_harm_nothing(use, moment):
    backend = use()
    with override_settings(USE_TZ=False):
        result = echo.using(run_after=moment).enqueue()
        if moment.year == 1:
            assert finished(result).status == SUCCESSFUL
        else:
            assert outcome(echo.enqueue()) == [[], {}]
            assert backend.stats()["deferred"] == 1
        backend.close()


def test_waiting_tasks_use_no_worker_and_no_processor_time(use):
    backend = use(MAX_WORKERS=2)
    later = timezone.now() + timedelta(hours=1)
    for n in range(50):
        echo.using(run_after=later + timedelta(seconds=n)).enqueue()
    assert outcome(echo.enqueue(1)) == [[1], {}]
    used = time.process_time()
    with pytest.raises(TimeoutError):
        backend.wait_result(echo.using(run_after=later).enqueue().id, 0.5)
    assert time.process_time() - used < 0.2
    stats = backend.stats()
    assert (stats["deferred"], stats["running"], stats["pending"]) == (51, 0, 0)


def test_a_deferred_task_is_waited_for_though_its_waiter_gets_other_work(use, gate, tmp_path):
    backend, first = use(MAX_WORKERS=2), Gate(tmp_path / "first")
    results = [wait_at.enqueue(first.path, n) for n in range(2)]
    first.open()
    assert [outcome(result) for result in results] == [0, 1]
    backend.join(TIMEOUT)
    deferred = echo.using(run_after=timezone.now() + timedelta(seconds=0.3)).enqueue()
    busy = wait_at.enqueue(gate.path)
    assert outcome(deferred) == [[], {}], "the other worker starts it"
    gate.open()
    assert outcome(busy) is None


def test_a_deferred_task_that_is_due_counts_as_pending_though_all_workers_are_busy(use, gate):
    backend = use(MAX_WORKERS=1)
    busy = wait_at.enqueue(gate.path)
    due = echo.using(run_after=timezone.now() + timedelta(seconds=0.05)).enqueue()
    with pytest.raises(TimeoutError):
        backend.wait_result(due.id, 0.2)
    stats = backend.stats()
    assert (stats["deferred"], stats["pending"] + stats["running"]) == (0, 2)
    soon = echo.using(run_after=timezone.now() + timedelta(seconds=0.05)).enqueue()
    with pytest.raises(TimeoutError):
        backend.wait_result(soon.id, 0.2)
    with ThreadPoolExecutor(1) as executor:
        closing = executor.submit(backend.close)
        with pytest.raises(TimeoutError):  # It is not abandoned.
            backend.wait_result(soon.id, 0.2)
        gate.open()
        closing.result(TIMEOUT)
    assert [outcome(result) for result in (busy, due, soon)] == [None, [[], {}], [[], {}]]


def test_join_waits_for_what_has_become_due(use, gate, tmp_path):
    backend, last = use(MAX_WORKERS=1), Gate(tmp_path / "last")
    busy = wait_at.enqueue(gate.path)
    due = wait_at.using(run_after=timezone.now() + timedelta(seconds=0.05)).enqueue(last.path)
    with ThreadPoolExecutor(1) as executor:
        joining = executor.submit(backend.join)
        with pytest.raises(TimeoutError):
            backend.wait_result(due.id, 0.2)
        gate.open()
        assert outcome(busy) is None
        with pytest.raises(FutureTimeoutError):
            joining.result(0.2)
        last.open()
        joining.result(TIMEOUT)
    assert outcome(due) is None


def test_a_clock_that_is_set_forward_makes_deferred_tasks_due(use, monkeypatch):
    monkeypatch.setattr(django_tasks_local, "_CLOCK_INTERVAL", 0.05)
    use(MAX_WORKERS=1)
    deferred = echo.using(run_after=timezone.now() + timedelta(hours=9)).enqueue()
    with pytest.raises(TimeoutError):
        finished(deferred, 0.2)
    read = time.time
    monkeypatch.setattr("time.time", lambda: read() + 36_000)
    assert outcome(deferred) == [[], {}]


def test_one_idle_worker_waits_for_all_that_is_deferred(use):
    backend = use(MAX_WORKERS=2)
    deferred = echo.using(run_after=timezone.now() + timedelta(hours=1))
    for _ in range(3):
        with pytest.raises(TimeoutError):
            backend.wait_result(deferred.enqueue().id, 0.2)
    assert backend.stats()["workers"] == 1


# --- Results


def test_finished_results_are_kept_up_to_the_limit_and_the_least_recently_used_go(use, gate):
    backend = use(MAX_WORKERS=2, MAX_RESULTS=3)
    pending = wait_at.enqueue(gate.path, "kept")
    results = []
    for n in range(3):
        results.append(echo.enqueue(n))
        finished(results[-1])
    results[0].refresh()  # To be read is use.
    results.append(echo.enqueue(3))
    finished(results[3])
    with pytest.raises(TaskResultDoesNotExist, match=rf"default.*process {os.getpid()}"):
        results[1].refresh()
    kept = [results[n].task.get_result(results[n].id).return_value for n in (0, 2, 3)]
    assert kept == [[[0], {}], [[2], {}], [[3], {}]]
    assert backend.stats()["finished"] == 3
    gate.open()
    assert finished(pending).return_value == "kept"
    with pytest.raises(TaskResultDoesNotExist):
        backend.get_result(results[0].id)


def test_a_result_of_another_task_or_none_is_refused(backend):
    result = echo.enqueue()
    finished(result)
    assert echo.get_result(result.id).status == SUCCESSFUL
    with pytest.raises(TaskResultMismatch):
        ids.get_result(result.id)
    for unknown in ("unknown", str(uuid.uuid4()), "", None):
        with pytest.raises(TaskResultDoesNotExist, match="default"):
            backend.get_result(unknown)


def test_async_calls_work_without_a_thread_pool(backend, connect, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("a thread pool was used")

    async def main():
        here = threading.get_ident()
        threads = []

        def receive(**kwargs):
            threads.append(threading.get_ident())

        connect(receive, task_enqueued)
        monkeypatch.setattr("asgiref.sync.SyncToAsync.__call__", refuse)
        asyncio.get_running_loop().set_default_executor(RefusingExecutor())
        result = await echo.aenqueue(1, k=2)
        assert result.status == READY
        done = await backend.await_result(result.id, TIMEOUT)
        await result.arefresh()
        assert result.return_value == done.return_value == [[1], {"k": 2}]
        assert (await echo.aget_result(result.id)).status == SUCCESSFUL
        with pytest.raises(TaskResultMismatch):
            await ids.aget_result(result.id)
        with pytest.raises(TaskResultDoesNotExist):
            await backend.aget_result("unknown")
        with pytest.raises(TypeError):
            await echo.aenqueue(object())
        assert threads == [here]

    asyncio.run(main())


def test_receivers_may_be_async(backend, connect):
    statuses = []

    async def receive(task_result, **kwargs):
        await asyncio.sleep(0)
        statuses.append(task_result.status)

    for source in (task_enqueued, task_started, task_finished):
        connect(receive, source)
    assert outcome(asyncio.run(echo.aenqueue(1))) == [[1], {}]
    assert outcome(echo.enqueue(2)) == [[2], {}]
    assert statuses == [READY, RUNNING, SUCCESSFUL] * 2


class RefusingExecutor(ThreadPoolExecutor):
    def submit(self, *args, **kwargs):
        raise AssertionError("a thread pool was used")


# --- Waiting


def test_waiting_returns_the_finished_result_or_times_out(use, gate):
    backend = use(MAX_WORKERS=1)
    result = wait_at.enqueue(gate.path, 1)
    for timeout in (0, 0.01, -1):
        with pytest.raises(TimeoutError, match=result.id):
            backend.wait_result(result.id, timeout)
        with pytest.raises(TimeoutError):
            asyncio.run(backend.await_result(result.id, timeout))
        with pytest.raises(TimeoutError):
            backend.join(timeout)
    with ThreadPoolExecutor(4) as executor:
        waiting = [executor.submit(backend.wait_result, result.id, wait) for wait in (None, float("inf"))]
        waiting += [
            executor.submit(asyncio.run, backend.await_result(result.id)),
            executor.submit(backend.join),
        ]
        gate.open()
        done = [future.result(TIMEOUT) for future in waiting]
    assert [d.return_value for d in done[:3]] == [1, 1, 1]
    assert done[3] is None
    assert backend.wait_result(result.id, 0).return_value == 1
    assert finished(fail.enqueue("x")).status == FAILED
    backend.join(0)


def test_waiting_for_an_unknown_result_raises_at_once(use, gate):
    backend = use()
    wait_at.enqueue(gate.path)
    for unknown in ("unknown", ""):
        with pytest.raises(TaskResultDoesNotExist):
            backend.wait_result(unknown, 2)
        with pytest.raises(TaskResultDoesNotExist):
            asyncio.run(backend.await_result(unknown, 2))


def test_awaiting_leaves_the_loop_free_and_may_be_cancelled(use, gate):
    backend = use()
    result = wait_at.enqueue(gate.path, 1)

    async def main():
        first = asyncio.ensure_future(backend.await_result(result.id))
        second = asyncio.ensure_future(backend.await_result(result.id))
        await asyncio.sleep(0)
        first.cancel()
        with pytest.raises(asyncio.CancelledError):
            await first
        assert not second.done()
        gate.open()
        return (await asyncio.wait_for(second, TIMEOUT)).return_value

    assert asyncio.run(main()) == 1


def test_waits_that_timed_out_leave_nothing_behind(use, gate):
    backend = use()
    result = wait_at.enqueue(gate.path)

    async def main() -> "weakref.ref[Any]":
        with pytest.raises(TimeoutError):
            await backend.await_result(result.id, 0.001)
        return weakref.ref(asyncio.get_running_loop())

    loop = asyncio.run(main())
    gc.collect()
    assert loop() is None


async def try_to_await(result_id: str) -> Any:
    try:
        return (await task_backends["default"].await_result(result_id)).return_value
    except RuntimeError as error:
        return str(error)


@task
async def wait_for_two(path: str) -> list[Any]:
    soon = echo.using(priority=9).enqueue(1)
    wait_when_told.using(priority=5).enqueue(path)
    late = echo.using(priority=-9).enqueue(2)

    async def wait_and_tell() -> Any:
        value = await try_to_await(soon.id)
        Path(path).touch()
        return value

    return await asyncio.gather(try_to_await(late.id), wait_and_tell())


@task
async def wait_when_told(path: str) -> Any:
    while not Path(path).exists():
        await asyncio.sleep(0.001)
    return await try_to_await(echo.using(priority=-10).enqueue(3).id)


def test_a_task_that_waits_for_two_still_waits_when_one_is_finished(use, signals, tmp_path):
    backend = use(MAX_WORKERS=2)
    late, soon = outcome(wait_for_two.enqueue(str(tmp_path / "told")))
    backend.join(TIMEOUT)
    ends = {
        r.task.name: r.return_value for name, r in [signals.get() for _ in range(15)] if name == "finished"
    }
    assert soon == [[1], {}]
    assert "for ever" in f"{late} {ends['wait_when_told']}"


def test_who_waits_gets_the_result_even_if_others_push_it_out(use, gate):
    backend = use(MAX_WORKERS=2, MAX_RESULTS=1)
    result = wait_at.enqueue(gate.path, "mine")

    async def wait_and_push_out() -> Any:
        waiting = asyncio.ensure_future(backend.await_result(result.id, TIMEOUT))
        await asyncio.sleep(0)
        gate.open()
        backend.join(TIMEOUT)  # Meanwhile the loop stands still.
        finished(echo.enqueue())
        return await waiting

    assert asyncio.run(wait_and_push_out()).return_value == "mine"
    with pytest.raises(TaskResultDoesNotExist):
        backend.get_result(result.id)


# --- Process pool: where task code is found


@pytest.mark.parametrize(
    ("enqueued", "expected"),
    [(bare_task, ["bare", 1]), (decorated, ["wrapped", 1]), (hidden, ["original", 1])],
)
def test_the_function_that_was_enqueued_runs_and_no_other(backend, enqueued, expected):
    assert outcome(enqueued.enqueue(1)) == expected


def test_a_function_that_a_child_cannot_find_is_refused(kind, backend):
    if kind == "ThreadPoolBackend":
        assert outcome(UNREACHABLE[0].enqueue(1)) == ["wrapped", ["bare", 1]]
        return
    with pytest.raises(InvalidTask, match=r"bare.*process"):
        UNREACHABLE[0].enqueue(1)


@processes
def test_a_function_that_a_child_lacks_fails_the_task_and_is_named(use, module_path):
    (module_path / "halved.py").write_text(
        f"import multiprocessing\nfrom {__name__} import task\n"
        "def work():\n    pass\n"
        "work_task = task(work)\n"
        "if multiprocessing.parent_process():\n    del work\n"
    )
    use(MAX_WORKERS=1)
    import halved

    text = errors(finished(halved.work_task.enqueue()))
    assert text.startswith(f"{InvalidTask.__module__}.{InvalidTask.__qualname__}\n")
    assert "halved.work was not found in process" in text
    assert outcome(echo.enqueue(1)) == [[1], {}]


SCRIPT = """
    import json, sys, os
    from django.conf import settings
    {configure}
    import django
    if __name__ == "__main__":
        django.setup()
    try:
        from django.tasks import task, task_backends
    except ImportError:
        from django_tasks import task, task_backends

    class OwnError(Exception):
        pass

    @task
    def double(value):
        return [2 * value, os.getpid(), settings.SPECIAL, settings.USE_TZ]

    @task
    def break_down():
        raise OwnError("broken")

    def wait(result):
        return task_backends["default"].wait_result(result.id, 30)

    if __name__ == "__main__":
        good, bad = wait(double.enqueue(4)), wait(break_down.enqueue())
        error = bad.errors[0]
        print(json.dumps([os.getpid(), good.return_value, error.exception_class_path,
                          error.exception_class is OwnError]))
"""
VALUES = {"SPECIAL": ["x", (1,)], "USE_TZ": False, "SECRET_KEY": "k"}


@pytest.mark.parametrize(
    "how", ["configure", "configure unless done", "configure in an imported module", "settings module"]
)
def test_a_script_runs_tasks_of_its_own(tmp_path, kind, how):
    values = {**VALUES, "TASKS": {"default": {"BACKEND": f"django_tasks_local.{kind}"}}}
    environ = {}
    if how == "settings module":
        (tmp_path / "own_settings.py").write_text(
            "".join(f"{name} = {value!r}\n" for name, value in values.items())
        )
        configure, environ = "", {"DJANGO_SETTINGS_MODULE": "own_settings"}
    else:
        guard = "if not settings.configured: " if "unless" in how else ""
        configure = f"{guard}settings.configure(**{values!r})"
    text = SCRIPT.format(configure=configure)
    if "imported" in how:
        guard = 'if __name__ == "__main__"'
        text = text.replace(guard, "if True", 1).replace(guard, "def main()")
        (tmp_path / "imported.py").write_text(textwrap.dedent(text))
        text = "if __name__ == '__main__':\n    import imported\n    imported.main()"
    found, errors = run_script(tmp_path, text, **environ)
    parent, (doubled, pid, special, use_tz), path, same = found
    assert (doubled, special, use_tz) == (8, ["x", [1]], False)
    assert (pid == parent) is (kind == "ThreadPoolBackend")
    assert same, path
    assert "Warning" not in errors


APP = {
    "site_settings.py": """
        SECRET_KEY = "k"
        INSTALLED_APPS = ["django.contrib.contenttypes", "shop"]
        DEFAULT_AUTO_FIELD = "django.db.models.BigAutoField"
        DATABASES = {{"default": {{"ENGINE": "django.db.backends.sqlite3", "NAME": {database!r}}}}}
        TASKS = {{"default": {{"BACKEND": {backend!r}, "OPTIONS": {{"MAX_WORKERS": 1}}}}}}
    """,
    "shop/__init__.py": "",
    "shop/models.py": """
        from django.db import models

        class Item(models.Model):
            name = models.CharField(max_length=9)
    """,
    "shop/tasks.py": """
        from shop.models import Item
        try:
            from django.tasks import task
        except ImportError:
            from django_tasks import task

        @task
        def add(name):
            return Item.objects.create(name=name).pk

        @task
        async def aadd(name):
            item = await Item.objects.acreate(name=name)
            return [i.name async for i in Item.objects.filter(pk__lte=item.pk).order_by("pk")]
    """,
    "shop/management/__init__.py": "",
    "shop/management/commands/__init__.py": "",
    "shop/management/commands/order.py": """
        import json
        from django.core.management.base import BaseCommand
        from django.db import connection
        from shop import models, tasks

        class Command(BaseCommand):
            def handle(self, **options):
                with connection.schema_editor() as editor:
                    editor.create_model(models.Item)
                backend = tasks.add.get_backend()
                ids = [tasks.add.enqueue("tea").id, tasks.aadd.enqueue("milk").id]
                done = [backend.wait_result(result_id, 30) for result_id in ids]
                self.stdout.write(json.dumps([d.return_value for d in done]))
    """,
    "manage.py": """
        import os, sys
        from django.core.management import execute_from_command_line
        if __name__ == "__main__":
            os.environ["DJANGO_SETTINGS_MODULE"] = "site_settings"
            execute_from_command_line(["manage.py", "order"])
    """,
}


def write_project(tmp_path, files, **values):
    for name, text in files.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(textwrap.dedent(text.format(**values) if "{{" in text else text))


@pytest.mark.parametrize("vendored", [False, True])
def test_tasks_of_an_app_use_models_under_a_management_command(tmp_path, kind, vendored):
    module = "shop.tasks_local" if vendored else "django_tasks_local"
    write_project(tmp_path, APP, backend=f"{module}.{kind}", database=str(tmp_path / "site.sqlite3"))
    environ = {}
    if vendored:
        source = (REPOSITORY / "django_tasks_local.py").read_text()
        assert all(word in source[:500] for word in ("SPDX-License-Identifier", "https://"))
        assert re.search(r'(?m)^__version__ = "\d', source)
        (tmp_path / "shop/tasks_local.py").write_text(source)
        environ = {"PYTHONPATH": str(tmp_path)}
    text = (tmp_path / "manage.py").read_text()
    assert run_script(tmp_path, text, name="manage.py", **environ) == ([1, ["tea", "milk"]], "")


# --- Tasks that enqueue


@pytest.mark.parametrize("alias", ["default", "other"])
def test_a_task_enqueues_and_reads_on_all_aliases(alias):
    with override_settings(TASKS=both_aliases):
        pid, found = outcome(enqueue_both.using(backend=alias).enqueue([1]))
        assert (pid == os.getpid()) is (alias == "default")
        for (result_id, status, value), where in zip(found, ("default", "other"), strict=True):
            here = task_backends[where].get_result(result_id)
            assert (here.status, here.return_value) == (status, value) == (SUCCESSFUL, [[[1]], {}])
        for where in ("default", "other"):
            assert outcome(aenqueue_and_read.using(backend=alias).enqueue(where)) == [
                [[1], {}],
                "SUCCESSFUL",
            ]
            refused = ["TaskResultDoesNotExist", "TaskResultMismatch", "TypeError"]
            assert outcome(call_wrongly.using(backend=alias).enqueue(where)) == [
                *refused,
                InvalidTask.__name__,
            ]
        for where in ("default", "other"):
            task_backends[where].join(TIMEOUT)
            task_backends[where].close()


@task
def enqueue_refused():
    try:
        echo.enqueue()
    except BaseException as error:
        return [type(error).__name__, str(error)]


@processes
@pytest.mark.parametrize(
    ("error", "there", "text"),
    [
        (ValueError("own"), "ValueError", "own"),
        (TwoArgumentsError("own", 2), "RuntimeError", "TwoArgumentsError: own"),
        (SystemExit("own"), "RuntimeError", "builtins.SystemExit: own"),
    ],
)
def test_a_child_gets_the_error_of_the_parent_or_its_name(use, connect, error, there, text):
    use(MAX_WORKERS=1)

    def receive(task_result, **kwargs):
        if task_result.task == echo:
            raise error

    connect(receive, task_enqueued)
    name, said = outcome(enqueue_refused.enqueue())
    assert (name, said[-len(text) :]) == (there, text)


class Level(enum.IntEnum):
    HIGH = 7


class Queue(str, enum.Enum):
    MAIL = "mail"


@task
def refuse_politely() -> None:
    raise ValueError(mark_safe("<b>no</b>"))


def test_subclasses_of_plain_types_cross_to_a_child_and_back(use):
    backend = use({"QUEUES": []})
    result = finished(look.using(priority=Level.HIGH, queue_name=Queue.MAIL).enqueue())
    assert result.status == SUCCESSFUL, result.errors
    assert (result.task.priority, result.task.queue_name) == (7, "mail")
    assert "ValueError: <b>no</b>" in errors(finished(refuse_politely.enqueue()))
    assert backend.stats()["running"] == 0


def test_join_and_close_do_not_wait_for_a_task_that_is_not_enqueued_yet(backend, connect):
    def receive(task_result, **kwargs):
        backend.join(TIMEOUT)
        backend.close()

    connect(receive, task_enqueued)
    due = timezone.now() + timedelta(days=1)
    result = echo.using(run_after=due).enqueue()
    assert backend.get_result(result.id).status == READY
    assert backend.stats()["deferred"] == 1


@task
def wait_impatiently(result_id: str) -> list[str]:
    def ring(number: int, frame: Any) -> None:
        if not frame.f_globals["__name__"].startswith("coverage."):  # It would leave its lock held.
            raise InterruptedError
        signal.setitimer(signal.ITIMER_REAL, 0.0001)

    def wait() -> None:
        with contextlib.suppress(TimeoutError):
            task_backends["default"].wait_result(result_id, 0.001)
            task_backends["default"].stats()

    signal.signal(signal.SIGALRM, ring)
    for _ in range(50):
        with contextlib.suppress(InterruptedError):
            signal.setitimer(signal.ITIMER_REAL, random.uniform(0.0001, 0.002))
            while True:
                wait()
    return [task_backends["default"].get_result(result_id).id, echo.enqueue("after").id]


@processes
def test_interrupted_call_of_a_child_does_not_confuse_the_next_one(use, gate, signals):
    use(MAX_WORKERS=2)
    running = wait_at.enqueue(gate.path)
    await_signal(signals, "started", running.id)
    for _ in range(3):
        found, after = outcome(wait_impatiently.enqueue(running.id))
        assert found == running.id
        assert finished(task_backends["default"].get_result(after)).return_value == [["after"], {}]
    assert outcome(echo.enqueue(1)) == [[1], {}]


@task
async def await_and_call(result_id: str) -> list[Any]:
    backend = task_backends["default"]
    waiting = asyncio.ensure_future(backend.await_result(result_id))
    for timeout in (0, 0.15):
        with pytest.raises(TimeoutError, match=result_id):
            await backend.await_result(result_id, timeout)
    with contextlib.suppress(asyncio.TimeoutError):
        await asyncio.wait_for(backend.await_result(result_id), 0.01)
    other = await echo.aenqueue("other")
    return [(await backend.await_result(other.id)).return_value, waiting.done()]


def test_task_can_call_while_it_awaits_and_end_before_that(use, gate, signals):
    use(MAX_WORKERS=3)
    running = wait_at.enqueue(gate.path)
    await_signal(signals, "started", running.id)
    assert outcome(await_and_call.enqueue(running.id)) == [[["other"], {}], False]


@task
def try_to_stop():
    backend = task_backends["default"]
    backend.close()
    try:
        backend.join(1)
    except RuntimeError:
        return backend.stats()["running"]


def test_in_a_task_close_returns_at_once_and_join_raises(backend):
    assert outcome(try_to_stop.enqueue()) == 1
    assert outcome(echo.enqueue(1)) == [[1], {}]


@threads
def test_in_a_task_close_ends_the_workers_where_threads_inherit_the_context(use, monkeypatch):
    start = threading.Thread.start

    def inherit(thread):
        thread.run = functools.partial(contextvars.copy_context().run, thread.run)
        start(thread)

    monkeypatch.setattr("threading.Thread.start", inherit)
    backend = use()
    assert outcome(try_to_stop.enqueue()) == 1
    join_drains()
    assert backend.stats()["workers"] == 0


# --- Threads that cannot be started, locks that others hold


@contextlib.contextmanager
def no_threads(monkeypatch: pytest.MonkeyPatch, error: type[Exception] = RuntimeError) -> Iterator[None]:
    """Let no worker start."""
    start = threading.Thread.start

    def refuse(thread: threading.Thread) -> None:
        if thread.name.startswith("tasks-"):
            raise error("can't start new thread")
        start(thread)

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        yield


@pytest.mark.parametrize("late", [False, True])
def test_enqueue_that_is_interrupted_loses_its_task_unless_it_runs(use, gate, monkeypatch, late):
    """As by a signal handler that raises while a worker is started."""
    backend = use(MAX_WORKERS=1)
    start = threading.Thread.start

    def interrupt(thread: threading.Thread) -> None:
        if thread.name.startswith("tasks-") and late:
            start(thread)
            while not backend.stats()["running"]:
                os.sched_yield()
        raise KeyboardInterrupt

    kept = backend.stats()["finished"]
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", interrupt)
        with pytest.raises(KeyboardInterrupt):
            wait_at.enqueue(gate.path)
    stats = backend.stats()
    assert (stats["pending"], stats["running"]) == (0, int(late))
    gate.open()
    assert outcome(echo.enqueue(1)) == [[1], {}]
    assert backend.stats()["finished"] == kept + 1 + late


@pytest.mark.parametrize("running", [0, 1])
@pytest.mark.parametrize("error", [RuntimeError, MemoryError])
def test_without_threads_tasks_go_to_the_workers_there_are_or_fail(
    use, gate, signals, monkeypatch, caplog, running, error
):
    backend = use(MAX_WORKERS=2)
    started = [wait_at.enqueue(gate.path, "done") for _ in range(running)]
    for result in started:
        await_signal(signals, "started", result.id)
    with no_threads(monkeypatch, error):
        refused = echo.enqueue(1)
        late = echo.using(run_after=timezone.now() + timedelta(days=1)).enqueue()
        for result in () if running else (refused, late):
            assert "no worker could be started: can't start new thread" in errors(finished(result))
    assert "can't start new thread" in caplog.text
    assert backend.stats()["workers"] == running
    gate.open()
    assert [outcome(result) for result in started] == ["done"] * running
    assert outcome(refused if running else echo.enqueue(1)) == [[1], {}]


def test_a_worker_waits_as_long_as_somebody_holds_the_lock_of_a_signal(use):
    backend = use(MAX_WORKERS=1)
    assert outcome(echo.enqueue(1)) == [[1], {}]
    with task_started.lock:
        result = echo.enqueue(2)
        with pytest.raises(TimeoutError):
            backend.wait_result(result.id, 0.1)
    assert outcome(result) == [[2], {}]


# --- close()


def test_close_finishes_what_was_enqueued_and_abandons_what_is_deferred(use, gate, caplog, signals):
    backend = use(MAX_WORKERS=1)
    results = [wait_at.enqueue(gate.path, n) for n in range(3)]
    late = echo.using(run_after=timezone.now() + timedelta(hours=1)).enqueue()
    threads = {t for t in threading.enumerate() if t.name.startswith("tasks-default")}
    with ThreadPoolExecutor(3) as executor:
        closing = [executor.submit(backend.close) for _ in range(3)]
        done = finished(late)
        assert not any(future.done() for future in closing)
        gate.open()
        for future in closing:
            future.result(TIMEOUT)
    assert (done.status, done.errors[0].exception_class) == (FAILED, RuntimeError)
    assert "closed" in done.errors[0].traceback
    warnings = [r for r in caplog.records if r.name == "django_tasks_local"]
    assert [r.levelname for r in warnings] == ["WARNING"]
    assert late.id in warnings[0].getMessage()
    assert [backend.get_result(r.id).return_value for r in results] == [0, 1, 2]
    stats = backend.stats()
    assert (stats["workers"], stats["deferred"], stats["running"]) == (0, 0, 0)
    assert threads
    for thread in threads:
        thread.join(TIMEOUT)
        assert not thread.is_alive()
    backend.close()
    assert outcome(echo.enqueue(1)) == [[1], {}]
    assert backend.stats()["workers"] >= 1


# --- ENQUEUE_ON_COMMIT


def assert_unknown(backend, result):
    assert (result.status, result.enqueued_at) == (READY, None)
    with pytest.raises(TaskResultDoesNotExist):
        backend.get_result(result.id)


def rolled_back(value):
    """Return the result of an enqueue inside a transaction that is rolled back."""
    with transaction.atomic():
        result = echo.enqueue(value)
        transaction.set_rollback(True)
    return result


@pytest.mark.parametrize("value", [True, "default"])
def test_on_commit_a_task_is_enqueued_after_the_commit_or_never(use, signals, value):
    backend = use({"ENQUEUE_ON_COMMIT": value})
    before = backend.stats()
    with transaction.atomic():
        with transaction.atomic():
            result = echo.enqueue(1)
        assert_unknown(backend, result)
        assert signals.empty()
        inner = rolled_back(2)
        assert backend.stats() == before
    assert finished(result).return_value == [[1], {}]
    assert backend.get_result(result.id).enqueued_at is not None
    assert_unknown(backend, inner)
    result = rolled_back(3)
    assert_unknown(backend, result)
    assert echo.enqueue().enqueued_at is not None
    backend.join(TIMEOUT)
    assert backend.stats()["finished"] == before["finished"] + 2


@pytest.mark.parametrize("params", [{}, {"ENQUEUE_ON_COMMIT": False}])
def test_without_on_commit_a_task_is_enqueued_inside_the_transaction(use, params):
    use(params)
    with transaction.atomic():
        assert outcome(echo.enqueue(1)) == [[1], {}]


@pytest.mark.parametrize("value", ["unknown", 1, None, ["default"], ""])
def test_a_wrong_enqueue_on_commit_is_refused(kind, value):
    assert refusal(kind, {"ENQUEUE_ON_COMMIT": True}) == ""
    text = refusal(kind, {"ENQUEUE_ON_COMMIT": value})
    assert all(part in text for part in ("'default'", "ENQUEUE_ON_COMMIT", repr(value), "DATABASES"))


def test_arguments_are_checked_and_copied_before_the_commit(use):
    backend = use({"ENQUEUE_ON_COMMIT": True})
    argument = [1]
    with transaction.atomic():
        with pytest.raises(TypeError):
            echo.enqueue(object())
        result = echo.enqueue(argument)
        argument.append(2)
    assert backend.wait_result(result.id, TIMEOUT).return_value == [[[1]], {}]


HAS_EXTRA_ARGUMENTS = django.VERSION >= (6, 1) or django.VERSION < (6, 0)
if HAS_EXTRA_ARGUMENTS:
    echo_on_commit = task(enqueue_on_commit=True)(bare)
    echo_at_once = task(enqueue_on_commit=False)(bare)


@pytest.mark.skipif(not HAS_EXTRA_ARGUMENTS, reason="Django 6.0 passes no extra arguments on")
def test_a_task_overrides_whether_a_commit_enqueues_it(use):
    backend = use({"ENQUEUE_ON_COMMIT": False})
    with transaction.atomic():
        result = echo_on_commit.using(priority=3).enqueue(1)
        assert_unknown(backend, result)
    assert finished(result).return_value == ["bare", 1]
    backend = use({"ENQUEUE_ON_COMMIT": True})
    with transaction.atomic():
        assert outcome(echo_at_once.enqueue(2)) == ["bare", 2]
        with pytest.raises(InvalidTaskBackend):
            task(enqueue_on_commit="unknown")(bare).enqueue(1)


def test_on_commit_holds_for_a_coroutine_that_is_called_in_a_transaction(use):
    backend = use({"ENQUEUE_ON_COMMIT": True})
    with transaction.atomic():
        result = async_to_sync(echo.aenqueue)(1)
        assert_unknown(backend, result)
    assert finished(result).return_value == [[1], {}]


@task
def enqueue_in_a_transaction():
    """Return what is known of tasks enqueued before a commit and before a rollback."""
    with transaction.atomic():
        kept = echo.enqueue(1)
        early = kept.enqueued_at
    try:
        with transaction.atomic():
            lost = echo.enqueue(2)
            raise ZeroDivisionError
    except ZeroDivisionError:
        pass
    found = []
    for result in (kept, lost):
        try:
            found.append(echo.get_result(result.id).backend)
        except TaskResultDoesNotExist:
            found.append("unknown")
    return [early, found]


def test_on_commit_holds_in_tasks_too(use):
    backend = use({"ENQUEUE_ON_COMMIT": True})
    before = backend.stats()["finished"]
    assert outcome(enqueue_in_a_transaction.enqueue()) == [None, ["default", "unknown"]]
    backend.join(TIMEOUT)
    assert backend.stats()["finished"] == before + 2


# --- Properties


@given(priorities=st.lists(st.integers(-100, 100) | st.sampled_from([-100, 0, 100]), max_size=30))
@hypothesis_settings(max_examples=40, deadline=None)
def test_tasks_run_by_priority_and_then_in_order_of_enqueueing(priorities):
    threads = {"BACKEND": "django_tasks_local.ThreadPoolBackend", "OPTIONS": {"MAX_WORKERS": 1}}
    opened, started = threading.Event(), threading.Event()
    ran = []
    with override_settings(TASKS={"default": threads}):
        ORDER_HOOKS["run"] = lambda n: (started.set(), opened.wait(TIMEOUT)) if n is None else ran.append(n)
        run_hook.using(priority=100).enqueue(None)
        assert started.wait(TIMEOUT)
        for n, priority in enumerate(priorities):
            run_hook.using(priority=priority).enqueue(n)
        opened.set()
        task_backends["default"].close()
    assert ran == sorted(range(len(priorities)), key=lambda n: (-priorities[n], n))


ORDER_HOOKS = {}


@task
def run_hook(value):
    ORDER_HOOKS["run"](value)


@given(
    limit=st.integers(1, 4),
    steps=st.lists(st.tuples(st.sampled_from(["run", "read"]), st.integers(0, 5)), min_size=15, max_size=40),
)
@hypothesis_settings(max_examples=40, deadline=None)
def test_the_kept_results_are_those_of_a_simple_model(limit, steps):
    ORDER_HOOKS["run"] = lambda n: None
    options = {"MAX_WORKERS": 1, "MAX_RESULTS": limit}
    threads = {"BACKEND": "django_tasks_local.ThreadPoolBackend", "OPTIONS": options}
    ids_, model = [], []
    with override_settings(TASKS={"default": threads}):
        backend = task_backends["default"]
        for step, which in steps:
            if step == "run":
                result = run_hook.enqueue(len(ids_))
                backend.join(TIMEOUT)
                ids_.append(result.id)
                model = [*model, result.id][-limit:]
            elif ids_:
                chosen = ids_[-1 - which % len(ids_)]
                assert is_known(backend, chosen) is (chosen in model)
                if chosen in model:
                    model = [i for i in model if i != chosen] + [chosen]
        assert [i for i in ids_ if is_known(backend, i)] == [i for i in ids_ if i in model]
        backend.close()


def is_known(backend, result_id):
    try:
        return backend.get_result(result_id).id == result_id
    except TaskResultDoesNotExist:
        return False


STRESS = float(os.environ.get("TASKS_TEST_STRESS", 2))  # Seconds for each stress test.


def wait_gone(*pids: int, timeout: float = TIMEOUT) -> bool:
    """Wait for the end of processes, of others' children too; return whether they ended."""
    end = time.monotonic() + timeout
    for pid in pids:
        try:
            descriptor = os.pidfd_open(pid)
        except ProcessLookupError:
            continue
        with open(descriptor) as opened:
            if not select.select([opened], [], [], max(0, end - time.monotonic()))[0]:
                return False
    return True


def descendants(pid: int) -> set[int]:
    """Return the processes that ``pid`` has started, and those that they have."""
    found = set()
    with contextlib.suppress(OSError):
        for path in Path(f"/proc/{pid}/task").glob("*/children"):
            for child in map(int, path.read_text().split()):
                found |= {child} | descendants(child)
    return found


def await_signal(signals: Any, name: str, result_id: str) -> Any:
    while True:
        sent, result = signals.get(timeout=TIMEOUT)
        if (sent, result.id) == (name, result_id):
            return result


def errors(result: Any) -> str:
    assert result.status == FAILED
    [error] = result.errors
    return f"{error.exception_class_path}\n{error.traceback}"


# --- A child process ends -------------------------------------------------------------------------


@task
def identify() -> list[Any]:
    return [os.getpid(), os.getppid(), threading.get_native_id()]


@task
def end_process(how: str) -> None:
    if how == "SIGSEGV":
        faulthandler.disable()
        ctypes.string_at(0)
    elif how == "code 7":
        os._exit(7)
    os.kill(os.getpid(), signal.Signals[how])


@processes
def test_dead_child_fails_its_own_task_alone(use, gate, signals):
    backend = use(MAX_WORKERS=2)
    neighbour = wait_at.enqueue(gate.path, "done")
    await_signal(signals, "started", neighbour.id)
    for how in ("SIGKILL", "SIGTERM", "SIGSEGV", "SIGABRT", "code 7"):
        victim, queued = end_process.enqueue(how), identify.enqueue()
        victim, queued = finished(victim), finished(queued)
        number = signal.Signals[how].value if how.startswith("SIG") else 7
        assert re.search(rf"{how}|signal {number}\b", errors(victim))
        assert queued.status == SUCCESSFUL
        assert queued.worker_ids != victim.worker_ids
    assert backend.get_result(neighbour.id).status == RUNNING
    gate.open()
    assert finished(neighbour).return_value == "done"


@task
def scribble(gate_path: str, text: str) -> None:
    for pipe in gc.get_objects():
        if type(pipe) is multiprocessing.connection.Connection and not pipe.closed and pipe.writable:
            os.write(pipe.fileno(), text.encode())
    pass_gate(gate_path)


@processes
def test_task_that_writes_to_the_pipe_fails_alone(use, gate):
    use(MAX_WORKERS=1)
    assert "Child process" in errors(finished(scribble.enqueue(gate.path, "\nscribbled on every pipe")))
    assert finished(echo.enqueue(1)).return_value == [[1], {}]


@task
def start_and_die(path: str) -> None:
    Path(path).write_text(str(subprocess.Popen(["sleep", "1000"]).pid))
    os.kill(os.getpid(), signal.SIGKILL)


@processes
def test_what_a_task_has_started_ends_with_its_child_that_was_killed(use, tmp_path):
    use(MAX_WORKERS=1)
    assert "SIGKILL" in errors(finished(start_and_die.enqueue(str(tmp_path / "pid"))))
    assert wait_gone(int((tmp_path / "pid").read_text()))


@processes
def test_time_out_holds_while_an_answer_arrives(use, gate):
    use(MAX_WORKERS=1, TASK_TIMEOUT=0.5)
    assert "TimeoutError" in errors(finished(scribble.enqueue(gate.path, "\0" * 7 + "d")))


@task
def find_itself() -> str:
    return str(task_backends["default"].get_result(current_result_id.get()).status)


@processes
def test_time_out_does_not_count_the_receivers_of_the_start(use, connect):
    use(MAX_WORKERS=1, TASK_TIMEOUT=1)
    connect(lambda **kwargs: threading.Event().wait(1.2), task_started)
    assert outcome(find_itself.enqueue()) == "RUNNING"


@task
def look_for(result_id: str) -> None:
    task_backends["default"].get_result(result_id)


def test_a_task_is_told_whose_memory_lacks_a_result(backend):
    assert f"in process {os.getpid()}:" in errors(finished(look_for.enqueue("unknown")))


@task
def start_and_leave(path: str) -> None:
    Path(path).write_text(str(subprocess.Popen(["sleep", "1000"]).pid))


@processes
def test_what_a_task_has_started_ends_with_its_child_that_is_replaced(use, tmp_path):
    use(MAX_WORKERS=1, MAX_TASKS_PER_CHILD=1)
    assert finished(start_and_leave.enqueue(str(tmp_path / "pid"))).status == SUCCESSFUL
    assert wait_gone(int((tmp_path / "pid").read_text()))


@processes
def test_signals_of_a_task_come_once_where_its_child_died_idle(use, signals):
    use(MAX_WORKERS=1)
    pid = finished(identify.enqueue()).return_value[0]
    os.kill(pid, signal.SIGKILL)
    assert wait_gone(pid)
    result = finished(echo.enqueue(1))  # Its module has to be imported in the child, too.
    assert result.status == SUCCESSFUL
    sent = [name for name, of in [signals.get() for _ in range(6)] if of.id == result.id]
    assert sent == ["enqueued", "started", "finished"]
    assert signals.empty()


@processes
def test_task_is_not_lost_on_a_child_that_died_idle(use):
    use(MAX_WORKERS=1)
    for number in range(4):
        pid = finished(identify.enqueue()).return_value[0]
        os.kill(pid, signal.SIGKILL)
        if number % 2:
            assert wait_gone(pid)
        result = finished(identify.enqueue())
        assert result.status == SUCCESSFUL, result.errors
        assert result.return_value[0] != pid


@processes
def test_children_ignore_ctrl_c_and_end_by_sigterm(use, gate, signals):
    use(MAX_WORKERS=1)
    pid = finished(identify.enqueue()).return_value[0]
    os.kill(pid, signal.SIGINT)
    result = wait_at.enqueue(gate.path, "done")
    await_signal(signals, "started", result.id)
    os.kill(pid, signal.SIGINT)
    gate.open()
    done = finished(result)
    assert (done.return_value, done.worker_ids) == ("done", [f"process-{pid}"])
    os.kill(pid, signal.SIGTERM)
    assert wait_gone(pid)


BROKEN_CHILD = """
import multiprocessing, os
if multiprocessing.parent_process() and not os.path.exists({repaired!r}):
    with open({starts!r}, "a") as file:
        file.write("x")
    raise LookupError("broken on purpose")
"""


@pytest.fixture
def module_path(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    for path in tmp_path.glob("*.py"):
        sys.modules.pop(path.stem, None)


@processes
@pytest.mark.parametrize("broken", ["settings", "tasks"])
def test_child_that_cannot_start_fails_the_task_and_the_next_one_tries_again(
    use, module_path, monkeypatch, broken
):
    paths = {name: str(module_path / name) for name in ("starts", "repaired")}
    (module_path / f"broken_{broken}.py").write_text(BROKEN_CHILD.format(**paths))
    source = "from {} import task\n"
    tasks = module_path / "broken_tasks.py"
    with tasks.open("a") as file:
        file.write(source.format(__name__) + "@task\ndef work():\n    return 'worked'\n")
    if broken == "settings":
        with (module_path / "broken_settings.py").open("a") as file:
            file.write("SECRET_KEY = 'x'\n")
        monkeypatch.setenv("DJANGO_SETTINGS_MODULE", "broken_settings")
        monkeypatch.setitem(sys.modules, "broken_settings", types.ModuleType("broken_settings"))
    use(MAX_WORKERS=1)
    import broken_tasks

    for _ in range(2):
        assert "LookupError" in errors(finished(broken_tasks.work.enqueue()))
    assert len(Path(paths["starts"]).read_text()) <= 6
    Path(paths["repaired"]).touch()
    assert finished(broken_tasks.work.enqueue()).return_value == "worked"


@processes
def test_process_that_cannot_be_started_fails_the_task_and_the_next_one_tries_again(use, monkeypatch):
    use(MAX_WORKERS=1)

    def refuse(process: Any) -> None:
        raise OSError("no process for you")

    with monkeypatch.context() as patch:
        patch.setattr("multiprocessing.process.BaseProcess.start", refuse)
        assert "no process for you" in errors(finished(identify.enqueue()))
    assert finished(echo.enqueue(1)).return_value == [[1], {}]


# --- Scripts: processes of their own --------------------------------------------------------------

HEAD = """
import atexit, contextlib, fcntl, json, os, signal, socket, sys, threading, time
import django
from django.conf import settings

if not settings.configured:
    settings.configure(TASKS=json.loads(os.environ["SCRIPT_TASKS"]), USE_TZ=True, SECRET_KEY="x",
                       ROOT_URLCONF=__name__, ALLOWED_HOSTS=["*"], MIDDLEWARE=[],
                       DATABASES=json.loads(os.environ["SCRIPT_DATABASES"]))
    django.setup()
if django.VERSION >= (6, 0):
    from django.tasks import task, task_backends
    from django.tasks.exceptions import TaskResultDoesNotExist
    from django.tasks.signals import task_finished, task_started
else:
    from django_tasks import task, task_backends
    from django_tasks.exceptions import TaskResultDoesNotExist
    from django_tasks.signals import task_finished, task_started
from django.http import JsonResponse
from django.urls import path

if __name__ == "__main__":  # What a shell starts in the background ignores Ctrl-C.
    signal.signal(signal.SIGINT, signal.default_int_handler)

def say(*words):
    os.write(1, (" ".join(map(str, words)) + "\\n").encode())

@task
def identify():
    return os.getpid()

@task
def echo(value):
    return value

@task
def note(word):
    say("ran", word)

REACHED = os.environ.get("SCRIPT_GATE", "") + ".reached"

def reach():
    open(REACHED, "w").close()

def wait_until_reached():
    while not os.path.exists(REACHED):
        threading.Event().wait(0.01)

@task
def wait(word="waited"):
    say("waits", os.getpid())
    reach()
    with open(os.environ["SCRIPT_GATE"]) as file:
        fcntl.flock(file, fcntl.LOCK_SH)
    say("ran", word)
    return word

def finish(result):
    return task_backends[result.backend].wait_result(result.id, 30)
"""


class Script:
    """A Python program, and the lines that it and its children write."""

    def __init__(self, directory: Path, tasks: dict[str, Any], gate: Gate) -> None:
        self.directory, self.tasks, self.gate = directory, tasks, gate
        self.lines: queue.Queue[str | None] = queue.Queue()
        self.seen: list[str] = []
        self.databases: dict[str, Any] = {}

    def start(self, source: str, *command: Any) -> None:
        """Run the source after HEAD, or the command."""
        (self.directory / "program.py").write_text(f"{HEAD}\n{source}")
        environ = {"SCRIPT_TASKS": json.dumps(self.tasks), "SCRIPT_GATE": self.gate.path}
        environ["SCRIPT_DATABASES"] = json.dumps(self.databases)
        environ["PYTHONPATH"] = os.pathsep.join([str(self.directory), *filter(None, sys.path)])
        self.process = subprocess.Popen(
            [sys.executable, *map(str, command or ["program.py"])],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, **environ},
            cwd=self.directory,
            start_new_session=True,
        )
        self.reader = threading.Thread(target=self.read)
        self.reader.start()

    def read(self) -> None:
        for line in self.process.stdout:
            self.lines.put(line.rstrip())
        self.lines.put(None)

    def line(self, words: str = "") -> str:
        """Return the first line that contains the words; wait for it if need be."""
        for line in self.seen:
            if words in line:
                return line
        while (line := self.lines.get(timeout=TIMEOUT)) is not None:
            self.seen.append(line)
            if words in line:
                return line
        raise AssertionError(f"No line with {words!r}:\n" + "\n".join(self.seen))

    def rest(self) -> list[str]:
        """Wait for the end of the program and of its children; return the lines until then."""
        begin = len(self.seen)
        self.seen += iter(lambda: self.lines.get(timeout=TIMEOUT), None)
        self.code = self.process.wait(TIMEOUT)
        return self.seen[begin:]

    def stop(self) -> None:
        left = descendants(self.process.pid)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        assert wait_gone(*left)
        self.reader.join()
        self.process.stdout.close()


@pytest.fixture
def script(tmp_path, gate):
    scripts = []

    def make(**tasks: Any) -> Script:
        params = {
            alias: {
                "BACKEND": f"django_tasks_local.{options.pop('kind')}",
                "QUEUES": [],
                "OPTIONS": options,
            }
            for alias, options in tasks.items()
        }
        scripts.append(Script(tmp_path, params, gate))
        return scripts[-1]

    yield make
    for script in scripts:
        script.stop()


HUNDRED_KILLERS = """
@task
def die():
    os.kill(os.getpid(), signal.SIGKILL)

if __name__ == "__main__":
    results = [die.enqueue() for _ in range(100)]
    last = echo.enqueue("alive")
    say("last", finish(last).return_value)
    results = [finish(result) for result in results]
    say("killed", sum("Child process" in result.errors[0].traceback for result in results))
    say("workers", task_backends["default"].stats()["workers"])
"""


def test_hundred_killers_change_nothing_for_the_next_task(script):
    program = script(default={"kind": "ProcessPoolBackend", "MAX_WORKERS": 2, "START_METHOD": "fork"})
    program.start(HUNDRED_KILLERS)
    said = [line for line in program.rest() if line.startswith(("last", "killed", "workers"))]
    assert said == ["last alive", "killed 100", "workers 2"]  # Between them a failure may be logged.


SIGNALLED = """
import itertools, logging, random
from datetime import datetime, timedelta, timezone

class Over(Exception):
    pass

def ring(*args):
    rung.append(args)  # The interpreter ignores what is raised in a destructor.
    raise Over

def be_interrupted(call):
    signal.setitimer(signal.ITIMER_REAL, random.uniform(0.00002, 0.0002))
    for _ in range(4):
        call()
    while not rung:
        os.stat(".")  # This gives up the GIL: else, if another thread got the signal, it is not noticed.

if __name__ == "__main__":
    backend, due = task_backends["default"], datetime.now(timezone.utc) + timedelta(days=1)
    deferred = echo.using(run_after=due)
    calls = itertools.cycle([backend.stats, lambda: echo.enqueue(1), lambda: deferred.enqueue(2)])
    rung = []
    signal.signal(signal.SIGALRM, ring)
    for name in ("django.tasks", "django_tasks"):  # Before 3.13 logging may leave a lock held, asked first.
        for level in (logging.DEBUG, logging.INFO):
            logging.getLogger(name).isEnabledFor(level)
    end = time.monotonic() + 1
    # Each start that is cut off leaves a thread behind, which starts a child before it leaves.
    while time.monotonic() < end and threading.active_count() < 20:
        call = next(calls)
        rung.clear()
        with contextlib.suppress(Over, KeyError):  # KeyError: threading, in the middle of a start.
            be_interrupted(call)
    say(finish(echo.enqueue("alive")).return_value)
    backend.join(60)
    backend.close()
    stats = backend.stats()
    say("left", *(stats[name] for name in ("pending", "deferred", "running", "workers")))
"""


def test_signal_handlers_that_raise_leave_nothing_half_done(kind, script, monkeypatch):
    for name in [name for name in os.environ if name.startswith("COVERAGE")]:
        monkeypatch.delenv(name)  # Coverage has locks of its own.
    program = script(default={"kind": kind, "MAX_WORKERS": 3})
    program.start(SIGNALLED)
    assert program.line("alive") == "alive"
    assert program.line("left") == "left 0 0 0 0"
    program.rest()


class Unreadable:
    def __reduce__(self):
        return int, ("no number",)


@processes
def test_setting_that_a_child_cannot_read_is_left_out(use):
    with override_settings(HOOK=Unreadable()):
        use(MAX_WORKERS=1)
        assert outcome(echo.enqueue(1)) == [[1], {}]


@task
def read_setting(name: str) -> Any:
    return getattr(settings, name, None)


@task
def read_database_name(alias: str = "default") -> Any:
    return "{NAME} of {USER}".format(**connections[alias].settings_dict)


def test_another_setting_that_changes_closes_no_pool(kind):
    backend = getattr(django_tasks_local, kind)("made by hand", {"OPTIONS": {"MAX_WORKERS": 1}})
    deferred = backend.enqueue(echo.using(run_after=timezone.now() + timedelta(days=1)))
    with override_settings(SITE="first"):
        pass
    with pytest.raises(TimeoutError):
        backend.wait_result(deferred.id, 0.1)
    with override_settings(TASKS={}):
        assert backend.wait_result(deferred.id, TIMEOUT).status == FAILED


@processes
def test_children_follow_changed_settings(use, gate):
    backend = use(MAX_WORKERS=1)
    far = echo.using(run_after=timezone.now() + timedelta(days=1)).enqueue()
    with override_settings(SITE="first"):
        assert outcome(read_setting.enqueue("SITE")) == "first"
    assert outcome(read_setting.enqueue("SITE")) is None
    busy = wait_at.enqueue(gate.path)
    with override_settings(SITE="second"):
        queued = read_setting.enqueue("SITE")
        gate.open()
        assert outcome(queued) == "second"
    assert outcome(busy) is None
    assert (backend.stats()["deferred"], far.status) == (1, READY)


@processes
def test_children_use_the_databases_that_a_test_run_renames(use, monkeypatch):
    use(MAX_WORKERS=1)
    assert outcome(read_database_name.enqueue()) == read_database_name.func()
    monkeypatch.setitem(connections.settings["default"], "NAME", "renamed")
    monkeypatch.setitem(connections.settings["default"], "USER", "tester")
    assert outcome(read_database_name.enqueue()) == "renamed of tester"
    monkeypatch.setitem(connections.settings, "added", {**connections.settings["default"], "NAME": "added"})
    assert outcome(read_database_name.enqueue("added")) == "added of tester"
    use(MAX_WORKERS=2)
    monkeypatch.setitem(connections.settings["default"]["OPTIONS"], "factory", lambda: 1)
    monkeypatch.setitem(connections.settings["default"], "NAME", "renamed twice")
    assert outcome(read_database_name.enqueue()) == "renamed twice of tester"


@processes
def test_setting_that_cannot_be_read_is_left_out(use):
    with override_settings(SECRET_KEY=""):
        use(MAX_WORKERS=1)
        assert outcome(echo.enqueue(1)) == [[1], {}]


HANGING_CHILD = """
started = os.environ["SCRIPT_GATE"] + ".started"

if __name__ == "__main__":
    import django_tasks_local

    django_tasks_local._SET_UP_TIMEOUT = 2
    results = [identify.enqueue() for _ in range(4)]
    say("ended", *[finish(result).status for result in results])
elif not os.path.exists(started):
    open(started, "w").close()
    signal.pause()
"""


def test_child_that_hangs_while_it_starts_is_replaced(script):
    program = script(default={"kind": "ProcessPoolBackend", "MAX_WORKERS": 3})
    program.start(HANGING_CHILD)
    assert program.line("ended").split()[1:] == ["SUCCESSFUL"] * 4
    program.rest()


BROKEN_MAIN = """
if __name__ == "__main__":
    say("ended", finish(identify.enqueue()).errors[0].traceback)
else:
    raise LookupError("broken on purpose")
"""


def test_main_script_that_a_child_cannot_import_is_told_apart_from_a_task_that_dies(script):
    program = script(default={"kind": "ProcessPoolBackend", "MAX_WORKERS": 1})
    program.start(BROKEN_MAIN)
    assert any("exit code 1 before it was set up" in line for line in program.rest())


OWN_PROCESS = """
import multiprocessing

@task
def put(word):
    words.put(word)

def target(given):
    global words
    words = given
    words.put("warm")  # Now a thread feeds the queue, until multiprocessing ends it.
    note.enqueue("in its own process")
    if "Thread" in settings.TASKS["default"]["BACKEND"]:
        put.enqueue("late")

if __name__ == "__main__":
    context = multiprocessing.get_context(os.environ["SCRIPT_METHOD"])
    words = context.Queue()
    process = context.Process(target=target, args=(words,))
    process.start()
    process.join(20)
    say("ended", process.exitcode)
    process.kill()
    if "Thread" in settings.TASKS["default"]["BACKEND"]:
        say("queued", words.get(timeout=10), words.get(timeout=10))
"""


@each_kind
@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_process_of_multiprocessing_that_enqueues_finishes_its_tasks_and_ends(
    script, kind, method, monkeypatch
):
    monkeypatch.setenv("SCRIPT_METHOD", method)
    program = script(default={"kind": kind, "MAX_WORKERS": 1})
    program.start(OWN_PROCESS)
    said = program.rest()
    assert "ran in its own process" in said
    assert "ended 0" in said
    assert ("queued warm late" in said) is (kind == "ThreadPoolBackend")


def test_main_script_without_a_guard_is_told_what_it_lacks(script):
    program = script(default={"kind": "ProcessPoolBackend", "MAX_WORKERS": 1})
    program.start("say('ended', finish(identify.enqueue()).status)")
    said = program.rest()
    assert "ended FAILED" in said
    assert any("if __name__ == '__main__'" in line for line in said)


# --- The parent forks -----------------------------------------------------------------------------

FORK = """
if __name__ == "__main__":
    running = wait.enqueue("first")
    queued = [note.enqueue(n) for n in range(3)]
    say("child", finish(identify.using(backend="other").enqueue()).return_value)

    def enqueue_on_and_on():
        while not done.is_set():
            finish(echo.using(backend="other").enqueue(1))

    done = threading.Event()
    threads = [threading.Thread(target=enqueue_on_and_on) for _ in range(3)]
    for thread in threads:
        thread.start()
    for number in range(4):
        pid = os.fork()
        if not pid:
            done.set()
            for result in (running, queued[-1]):
                with contextlib.suppress(TaskResultDoesNotExist):
                    result.refresh()
                    say("known", result.id)
            stats = task_backends["default"].stats()
            say("stats", stats.pop("pid") == os.getpid(), *stats.values())
            if number % 3 == 0:
                say("forked", finish(echo.enqueue(number)).return_value)
                task_backends["other"].close()
            sys.exit(5)
        say("exit", os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
    done.set()
    for thread in threads:
        thread.join()
    say("opened")
    say("end", *[finish(result).return_value for result in (running, *queued)])
    others = [echo.using(backend="other").enqueue(2) for _ in range(3)]
    say("others", sum(finish(result).return_value for result in others))
"""


@each_kind
def test_forked_copy_starts_with_nothing_and_harms_nothing(script, gate, kind):
    program = script(default={"kind": kind, "MAX_WORKERS": 1}, other={"kind": kind, "MAX_WORKERS": 2})
    program.start(FORK)
    program.line("opened")
    said = program.seen[:]
    assert said.count("exit 5") == 4, said
    assert said.count("stats True 0 0 0 0 0") == 4, said
    assert {"forked 0", "forked 3"} <= {*said}
    assert not any(line.startswith(("known", "ran", "Traceback")) for line in said), said
    gate.open()
    ran = ["ran first", "ran 0", "ran 1", "ran 2", "end first None None None", "others 6"]
    said = program.rest()
    assert sorted(said) == sorted(ran), "\n".join(said)


FORK_WHILE_HELD = """
from django.core.cache import caches

class Slow(str):
    def __hash__(self):
        if sys._getframe(1).f_globals["__name__"] == "asgiref.local":  # It holds a lock here.
            held.set()
            done.wait()
        return super().__hash__()

if __name__ == "__main__":
    for handler in (task_backends, caches):
        held, done = threading.Event(), threading.Event()
        holder = threading.Thread(target=lambda: handler[Slow("default")])
        holder.start()
        held.wait()
        if not os.fork():
            say("copy", caches["default"].get("key", "none"), finish(echo.enqueue(1)).return_value)
            os._exit(0)
        os.wait()
        done.set()
        holder.join()
"""


def test_copy_that_is_forked_while_a_backend_is_looked_up_can_enqueue(script):
    program = script(default={"kind": "ThreadPoolBackend"})
    program.start(FORK_WHILE_HELD)
    said = program.rest()  # From Python 3.12 on with a warning against forks.
    assert [line for line in said if line.startswith("copy")] == ["copy none 1"] * 2, said


FORK_WHILE_IMPORTING = """
import importlib.abc
importing, forked = threading.Event(), threading.Event()

class Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, name, *args):
        if name == "multiprocessing.heap" and not importing.is_set():
            importing.set()
            forked.wait(0.5)  # A fork that waits for the end of the import lets it go on.

if __name__ == "__main__":
    sys.meta_path.insert(0, Finder())
    os.register_at_fork(after_in_parent=forked.set)
    result = echo.enqueue("parent")
    importing.wait()
    if not os.fork():
        copy = finish(echo.enqueue("copy"))
        say(*copy.errors, copy.status == "SUCCESSFUL" and copy.return_value)
        os._exit(0)
    os.wait()
    say(finish(result).return_value)
"""


def test_copy_that_is_forked_while_multiprocessing_is_imported_can_enqueue(script):
    program = script(default={"kind": "ProcessPoolBackend", "MAX_WORKERS": 1})
    program.start(FORK_WHILE_IMPORTING)
    said = program.rest()  # From Python 3.12 on with a warning against forks.
    assert {"copy", "parent"} <= {*said}, said


@task
def fork_and_return() -> int:
    pid = os.fork()
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) if pid else -1


@task
async def await_a_copy() -> int:
    return fork_and_return.func()


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_copy_that_a_receiver_forks_ends_there(use, connect):
    codes = []

    def receive(**kwargs: Any) -> None:
        codes.append(fork_and_return.func())
        if codes[-1] == -1:
            raise SystemExit

    connect(receive, task_started, task_finished)
    use(MAX_WORKERS=1)
    assert outcome(echo.enqueue(1)) == [[1], {}]
    assert codes == [0, 0]


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
@pytest.mark.parametrize("forks", [fork_and_return, await_a_copy])
def test_copy_of_a_task_that_forks_ends_with_the_task(use, signals, forks):
    backend = use(MAX_WORKERS=1)
    assert finished(forks.enqueue()).return_value == 0
    assert finished(echo.enqueue(1)).return_value == [[1], {}]
    backend.join(TIMEOUT)
    assert [signals.get()[0] for _ in range(signals.qsize())] == ["enqueued", "started", "finished"] * 2


@task
def leave_thread(gate_path: str, path: str) -> None:
    def enqueue_late() -> None:
        pass_gate(gate_path)
        try:
            said = str(echo.enqueue().status)
        except RuntimeError as error:
            said = str(error)
        Path(path).write_text(said)

    threading.Thread(target=enqueue_late, daemon=True).start()


def test_thread_that_a_task_left_may_enqueue_only_in_the_parent(use, gate, kind, tmp_path):
    use(MAX_WORKERS=1)
    os.mkfifo(tmp_path / "said")
    assert finished(leave_thread.enqueue(gate.path, str(tmp_path / "said"))).status == SUCCESSFUL
    gate.open()
    refused = "submit() was called in a child process where no task runs"
    assert (tmp_path / "said").read_text() == ("READY" if kind == "ThreadPoolBackend" else refused)


# --- The parent ends ------------------------------------------------------------------------------

PARENT = """
BUSY = {
    "sleep": lambda: signal.pause(),
    "loop": lambda: all(iter(int, 1)),
    "GIL": lambda: sum(range(10**11)),
    "subprocess": lambda: os.system("sleep 1000"),
    "stopped": lambda: os.kill(os.getpid(), signal.SIGSTOP),
}

@task
def work(name):
    say(name, os.getpid())
    BUSY[name]()

if __name__ == "__main__":
    server = socket.create_server(("127.0.0.1", 0))
    server.set_inheritable(True)
    finish(identify.enqueue())
    for name in BUSY:
        work.enqueue(name)
    idle = identify.enqueue()
    say("idle", finish(idle).return_value)
    say("port", server.getsockname()[1])
    signal.pause()
"""


@pytest.mark.parametrize(
    ("method", "number"),
    [
        ("forkserver", signal.SIGTERM),
        ("forkserver", signal.SIGKILL),
        ("spawn", signal.SIGKILL),
        ("fork", signal.SIGKILL),
    ],
)
def test_children_end_with_their_parent_and_free_its_port(script, method, number):
    program = script(default={"kind": "ProcessPoolBackend", "MAX_WORKERS": 6, "START_METHOD": method})
    program.start(PARENT)
    words = ("idle", "port", "sleep", "loop", "GIL", "subprocess", "stopped")
    said = [program.line(word) for word in words]
    pids = {word: int(number) for word, number in map(str.split, said)}
    port = pids.pop("port")
    started = descendants(program.process.pid)
    assert {*pids.values()} <= started
    program.process.send_signal(number)
    assert program.process.wait(TIMEOUT) == -number
    assert wait_gone(*started, timeout=1.5)
    socket.create_server(("127.0.0.1", port)).close()


# --- The interpreter exits ------------------------------------------------------------------------

EXIT = """
@task
async def coroutine():
    from asgiref.sync import sync_to_async
    say("ran", await sync_to_async(str.upper)("coroutine"))

def receive(task_result, **kwargs):
    error = task_result.errors[0].traceback.splitlines()[-1] if task_result.errors else ""
    say("finished", names[task_result.id], task_result.status, error)

names = {}

def go():
    from datetime import timedelta
    from django.utils import timezone
    task_finished.connect(receive)
    later = timezone.now() + timedelta(days=1)
    names[wait.enqueue().id] = "running"
    names[coroutine.enqueue().id] = "queued"
    names[note.using(run_after=later).enqueue("never").id] = "deferred"
    for result_id, name in names.items():
        say("id", name, result_id)
    wait_until_reached()
"""
EXITS = (
    EXIT
    + """
if __name__ == "__main__":
    go()
    sys.exit(3)
"""
)


def begin_exit(program: Script, source: str) -> dict[str, str]:
    """Start a program that exits with a running, a queued and a deferred task; return their ids."""
    program.start(source)
    program.line("waits")
    program.line("id deferred")
    words = [line.split() for line in program.seen if line.startswith("id ")]
    return {name: result_id for _, name, result_id in words}


starts_threads_at_exit = pytest.mark.skipif(
    (3, 12) <= sys.version_info < (3, 12, 2),
    reason="Python 3.12.0 and 3.12.1 start no thread once the main thread has ended.",
)


@starts_threads_at_exit
@each_kind
def test_exit_waits_for_the_work_and_says_so_at_once(script, gate, kind):
    program = script(default={"kind": kind, "MAX_WORKERS": 1})
    ids = begin_exit(program, EXITS)
    warning = program.line("SHUTDOWN_TIMEOUT")
    for words in ("2 tasks", ids["running"], ids["queued"], "Ctrl-C", "SHUTDOWN_TIMEOUT"):
        assert words in warning
    assert ids["deferred"] not in warning
    gate.open()
    said = program.rest()
    assert program.code == 3
    order = ["ran waited", "finished running SUCCESSFUL", "ran COROUTINE", "finished queued SUCC"]
    positions = [next(i for i, line in enumerate(said) if line.startswith(o)) for o in order]
    assert positions == sorted(positions)
    assert_lost(said, {"deferred": ids["deferred"]})


def assert_lost(said: list[str], ids: dict[str, str]) -> None:
    """Check that these tasks, no others, became FAILED at the exit, with one warning."""
    said = [line for line in said if not line.startswith("Task id=")]  # The backport's log.
    failed = [re.fullmatch(r"finished (\w+) FAILED (.*)", line) for line in said]
    reasons = {match[1]: match[2] for match in failed if match}
    assert reasons.keys() == ids.keys()
    assert all("exits" in reason for reason in reasons.values()), reasons
    [warning] = [line for line in said if all(result_id in line for result_id in ids.values())]
    assert f"{len(ids)} tasks" in warning
    assert sum(line.count(result_id) for line in said for result_id in ids.values()) == len(ids)


@each_kind
@pytest.mark.parametrize("timeout", [0, 0.3])
def test_exit_fails_what_is_left_when_its_time_is_up(script, kind, timeout):
    program = script(default={"kind": kind, "MAX_WORKERS": 1, "SHUTDOWN_TIMEOUT": timeout})
    ids = begin_exit(program, EXITS)
    if timeout:
        program.line("2 tasks")
    said = program.rest()
    assert program.code == 3
    assert not any("Ctrl-C" in line or line.startswith("ran") for line in said)
    assert_lost(said, ids)


HANGING = """
@task
async def hang():
    reach()
    await asyncio.Event().wait()

if __name__ == "__main__":
    hang.enqueue()
    wait_until_reached()
"""


@each_kind
def test_coroutine_that_never_ends_does_not_hold_up_the_exit(script, kind):
    program = script(default={"kind": kind, "MAX_WORKERS": 1, "SHUTDOWN_TIMEOUT": 0})
    program.start("import asyncio\n" + HANGING)
    assert any("1 tasks are FAILED" in line for line in program.rest())
    assert program.code == 0


SLOW_RECEIVER = """
received = threading.Event()

def receive(**kwargs):
    received.set()
    threading.Event().wait()

if __name__ == "__main__":
    task_finished.connect(receive)
    echo.enqueue(1)
    received.wait()
    say("exits")
"""


WAITING_RECEIVER = """
def receive(**kwargs):
    try:
        task_backends["default"].join()
    except RuntimeError as error:
        say("refused", error)

if __name__ == "__main__":
    wait.enqueue()
    wait_until_reached()
    echo.enqueue(1)
    task_finished.connect(receive)
"""


@each_kind
def test_receiver_that_waits_while_the_exit_gives_up_is_refused(script, kind):
    program = script(default={"kind": kind, "MAX_WORKERS": 1, "SHUTDOWN_TIMEOUT": 0})
    program.start(WAITING_RECEIVER)
    said = program.rest()
    assert any("refused" in line and "for ever" in line for line in said), said
    assert program.code == 0


@each_kind
def test_receiver_that_never_ends_does_not_hold_up_the_exit(script, kind):
    program = script(default={"kind": kind, "MAX_WORKERS": 1, "SHUTDOWN_TIMEOUT": 0})
    program.start(SLOW_RECEIVER)
    assert "exits" in program.rest()
    assert program.code == 0


CTRL_C = (
    EXIT
    + """
if __name__ == "__main__":
    go()
    say("interrupt me")
    while True:
        threading.Event().wait(0.1)
"""
)


@each_kind
def test_second_ctrl_c_gives_up_waiting_at_once(script, kind):
    program = script(default={"kind": kind, "MAX_WORKERS": 1})
    ids = begin_exit(program, CTRL_C)
    program.line("interrupt me")
    os.killpg(program.process.pid, signal.SIGINT)
    program.line("2 tasks")
    os.killpg(program.process.pid, signal.SIGINT)
    said = program.rest()
    assert_lost(said, ids)
    assert program.code == -signal.SIGINT
    assert not any("Exception" in line for line in said), said


INTERRUPTED = """
import logging

class Interrupt(logging.Handler):
    def emit(self, record):
        if "FAILED" in record.msg:
            logging.getLogger("django_tasks_local").removeHandler(self)
            raise KeyboardInterrupt  # As if Ctrl-C came just now.

if __name__ == "__main__":
    logging.getLogger("django_tasks_local").addHandler(Interrupt())
    wait.enqueue()
    wait_until_reached()
"""


@each_kind
def test_ctrl_c_while_the_exit_gives_up_loses_nothing_in_silence(script, kind):
    program = script(default={"kind": kind, "MAX_WORKERS": 1, "SHUTDOWN_TIMEOUT": 0})
    program.start(INTERRUPTED)
    assert any("1 tasks are FAILED" in line for line in program.rest())
    assert program.code == 0


LATE = """
@task
def go_on(left, alias):
    say("ran", alias, left)
    if left:
        go_on.using(backend=alias).enqueue(left - 1, alias)

@task
def begin():
    wait.func()
    for alias in ("default", "other"):
        go_on.using(backend=alias).enqueue(2, alias)

if __name__ == "__main__":
    if {used}:
        finish(note.enqueue("before"))
    begin.enqueue()
"""


@starts_threads_at_exit
@each_kind
@pytest.mark.parametrize("used", [True, False])
def test_exit_waits_for_what_tasks_still_enqueue(script, gate, kind, used):
    options = {"kind": kind, "MAX_WORKERS": 2}
    program = script(default={**options}, other={**options})
    program.start(LATE.replace("{used}", str(used)))
    program.line("SHUTDOWN_TIMEOUT")
    gate.open()
    said = program.rest()
    for alias in ("default", "other"):
        ran = [line for line in said if line.startswith(f"ran {alias}")]
        assert ran == [f"ran {alias} {n}" for n in (2, 1, 0)], "\n".join(said)


REFUSED = """
def attempt(alias, when):
    try:
        say("enqueued", echo.using(backend=alias).enqueue(1).status)
    except RuntimeError as error:
        say(when, alias, "RuntimeError:", error)
    task_backends[alias].close()

def attempt_late():
    exiting.wait()
    attempt("used", "thread")
    attempt("fresh", "thread")

exiting = threading.Event()

if __name__ == "__main__":
    finish(echo.using(backend="used").enqueue(1))
    atexit.register(attempt, "used", "atexit")
    atexit.register(attempt, "fresh", "atexit")
    atexit.register(exiting.set)
    threading.Thread(target=attempt_late, daemon=True).start()
    if {closed}:
        task_backends["used"].close()
"""


@each_kind
@pytest.mark.parametrize("closed", [False, True])
def test_enqueue_is_refused_once_the_interpreter_shuts_down(script, kind, closed):
    program = script(used={"kind": kind}, fresh={"kind": kind}, default={"kind": kind})
    program.start(REFUSED.replace("{closed}", str(closed)))
    said = program.rest()
    assert program.code == 0
    for alias in ("used", "fresh"):
        [line] = [line for line in said if line.startswith(f"atexit {alias}")]
        assert "exit" in line
    assert not any(line.startswith("enqueued") for line in said), said
    assert "Traceback" not in "".join(said)


# --- Values that break ----------------------------------------------------------------------------


class Unpickleable(Exception):
    def __reduce__(self):
        raise RuntimeError("not to be pickled")


class NeedsTwo(Exception):
    def __init__(self, one, two):
        super().__init__(f"{one}-{two}")


class Unprintable(Exception):
    def __str__(self):
        raise RuntimeError("not to be printed")

    __repr__ = __str__


@dataclass(frozen=True)
class Frozen(Exception):
    code: int


class Own(BaseException):
    pass


class Evil:
    def __reduce__(self):
        os._exit(3)

    def __iter__(self):
        raise KeyboardInterrupt


BAD_ERRORS = {
    "Unpickleable": lambda: Unpickleable(),
    "NeedsTwo": lambda: NeedsTwo(1, 2),
    "Unprintable": lambda: Unprintable(),
    "Frozen": lambda: Frozen(7),
    "Own": lambda: Own(threading.Lock()),
    "Local": lambda: type("Local", (Exception,), {})(lambda: 1),
    "ExceptionGroup": lambda: builtins.BaseExceptionGroup("both", [Own(), Frozen(1)]),
    "UnicodeError": lambda: UnicodeError("\udc80" * 3),
}
if sys.version_info < (3, 11):
    del BAD_ERRORS["ExceptionGroup"]


@task
def raise_bad(name: str) -> None:
    raise BAD_ERRORS[name]()


def test_exception_that_breaks_pickling_fails_the_task_alone(use):
    use(MAX_WORKERS=1)
    first = finished(identify.enqueue()).return_value
    for name in BAD_ERRORS:
        text = errors(finished(raise_bad.enqueue(name)))
        assert name in text.splitlines()[0]
        assert "raise BAD_ERRORS[name]()" in text
    assert finished(identify.enqueue()).return_value == first


class UnreadableSource:
    """The loader of a module whose source cannot be read any more."""

    def get_source(self, name):
        raise RuntimeError("unreadable")


@task
def fail_in_an_unreadable_module() -> None:
    code = compile("1 / 0", "unreadable.py", "exec")
    exec(code, {"__name__": "unreadable", "__loader__": UnreadableSource()})


def test_error_in_a_module_whose_source_cannot_be_read_fails_the_task_alone(use):
    use(MAX_WORKERS=1)
    text = errors(finished(fail_in_an_unreadable_module.enqueue()))
    assert text.endswith("ZeroDivisionError: division by zero\n")
    assert finished(echo.enqueue(1)).return_value == [[1], {}]


RECURSIVE: list[Any] = []
RECURSIVE.append(RECURSIVE)
BAD_VALUES = {
    "evil": Evil,
    "lock": threading.Lock,
    "generator": lambda: iter(()),
    "lambda": lambda: lambda: 1,
    "bytes": lambda: b"\xff",
    "recursive": lambda: RECURSIVE,
    "error": lambda: ValueError("returned"),
}


@task
def return_bad(name: str) -> Any:
    return BAD_VALUES[name]()


def test_return_value_that_breaks_pickling_fails_the_task_alone(use):
    use(MAX_WORKERS=1)
    first = finished(identify.enqueue()).return_value
    results = [return_bad.enqueue(name) for name in BAD_VALUES]
    for result in map(finished, results):
        assert "return_bad" in errors(result)
    assert finished(identify.enqueue()).return_value == first


# --- Databases ------------------------------------------------------------------------------------


@pytest.fixture(params=["default", "kept", "postgres", "postgres_kept"])
def database(request) -> Iterator[str]:
    if request.param.startswith("postgres") and not POSTGRES:
        pytest.skip("TASKS_TEST_POSTGRES does not say where a PostgreSQL server is")
    with connections[request.param].cursor() as cursor:
        cursor.execute("DROP TABLE IF EXISTS fault")
        cursor.execute("CREATE TABLE fault (word varchar(20) UNIQUE)")
    yield request.param
    connections.close_all()


def insert(database: str, word: str) -> None:
    with connections[database].cursor() as cursor:
        cursor.execute("INSERT INTO fault VALUES (%s)", [word])


@task
def write(database: str, word: str, mess: str = "") -> None:
    connection = connections[database]
    if mess == "autocommit":
        connection.set_autocommit(False)
    elif mess == "atomic":
        transaction.atomic(using=database).__enter__()
    elif mess == "begin":
        connection.cursor().execute("BEGIN")
    elif mess == "broken":
        connection.set_autocommit(False)
        insert(database, word)
    insert(database, word)
    if mess:
        raise ValueError("left a mess")


def test_failed_transaction_swallows_nothing_of_the_next_task(use, database):
    use(MAX_WORKERS=1)
    messes = ["autocommit", "atomic", "broken", "begin"]
    for mess in messes:
        assert finished(write.enqueue(database, "lost", mess)).status == FAILED
        assert finished(write.enqueue(database, f"after {mess}")).errors == []
    with connections[database].cursor() as cursor:
        cursor.execute("SELECT word FROM fault")
        assert {word for (word,) in cursor.fetchall()} == {f"after {mess}" for mess in messes}
    task_backends["default"].close()


@pytest.mark.parametrize("database", ["default"], indirect=True)
def test_transaction_of_who_enqueues_outlives_a_task_that_cannot_be_started(use, database, monkeypatch):
    use()
    with transaction.atomic(using=database), no_threads(monkeypatch):
        insert(database, "kept")
        assert "no worker could be started" in errors(finished(echo.enqueue()))
    with connections[database].cursor() as cursor:
        cursor.execute("SELECT word FROM fault")
        assert cursor.fetchall() == [("kept",)]


@task
def query_and_fork(database: str) -> list[Any]:
    marks = [mark_session.func(database)]
    code = fork_and_return.func()
    return [*marks, code, mark_session.func(database)] if code != -1 else []


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
@pytest.mark.parametrize("database", ["postgres"], indirect=True)
def test_copy_of_a_task_that_forks_leaves_the_session_open(use, database):
    use(MAX_WORKERS=1)
    assert finished(query_and_fork.enqueue(database)).return_value == [False, 0, True]


@task
def break_connection(database: str) -> None:
    connections[database].ensure_connection()
    connections[database].connection.close()  # Which Django does not notice.


def test_connection_that_cannot_be_cleaned_is_dropped(use, kind, caplog):
    use(MAX_WORKERS=1)
    assert finished(break_connection.enqueue("kept")).status == SUCCESSFUL
    assert finished(count_queries.enqueue("kept")).status == SUCCESSFUL
    logged = [record.getMessage() for record in caplog.records if record.name == "django_tasks_local"]
    said = ["Connection 'kept' could not be closed, it is dropped"]
    assert logged == (said if kind == "ThreadPoolBackend" else []), "a child says it on its own"


@task
def mark_session(database: str) -> bool:
    """Return whether an earlier task has marked this session."""
    with connections[database].cursor() as cursor:
        try:
            cursor.execute("SELECT * FROM marked")
            return True
        except Exception:
            cursor.execute("CREATE TEMPORARY TABLE marked (a integer)")
            return False


def sessions_end() -> bool:
    """Return whether all our sessions end; the server takes a moment to notice."""
    end = time.monotonic() + 5
    while sessions() and time.monotonic() < end:
        time.sleep(0.02)
    return not sessions()


def sessions() -> list[int]:
    """Return the processes of the server that serve our sessions, but for the asking one."""
    with connections["postgres"].cursor() as cursor:
        cursor.execute(
            "SELECT pid FROM pg_stat_activity WHERE application_name = %s AND pid <> pg_backend_pid()",
            [settings.DATABASES["postgres"]["OPTIONS"]["application_name"]],
        )
        return [pid for (pid,) in cursor.fetchall()]


def test_connection_is_kept_for_as_long_as_its_maximum_age(use, database):
    use(MAX_WORKERS=1)
    marks = [finished(mark_session.enqueue(database)).return_value for _ in range(3)]
    assert marks == [False, "kept" in database, "kept" in database]
    if database == "postgres":
        assert sessions_end()


@task
def drop_own_session(database: str) -> None:
    with transaction.atomic(using=database), connections[database].cursor() as cursor:
        cursor.execute("INSERT INTO fault VALUES ('lost')")
        cursor.execute("SELECT pg_terminate_backend(pg_backend_pid())")


@pytest.mark.parametrize("database", ["postgres", "postgres_kept"], indirect=True)
def test_next_task_works_after_the_database_dropped_its_connections(use, database):
    use(MAX_WORKERS=1)
    connections[database].close()
    assert finished(write.enqueue(database, "one")).status == SUCCESSFUL
    with connections["postgres"].cursor() as cursor:
        for pid in sessions():
            cursor.execute("SELECT pg_terminate_backend(%s, 10000)", [pid])
    assert finished(write.enqueue(database, "two")).errors == []
    assert "OperationalError" in errors(finished(drop_own_session.enqueue(database)))
    assert finished(write.enqueue(database, "three")).errors == []


@pytest.mark.parametrize("database", ["postgres_kept"], indirect=True)
def test_closed_pool_leaves_no_session_open(use, database):
    backend = use(MAX_WORKERS=2)
    connections[database].close()
    assert sessions_end()
    assert finished(mark_session.enqueue(database)).return_value is False
    assert len(sessions()) == 1
    backend.close()
    assert sessions_end()


@processes
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
@pytest.mark.parametrize("database", ["kept", "postgres_kept"], indirect=True)
def test_forked_children_leave_the_session_of_a_receiver_open(use, connect, database):
    use(MAX_WORKERS=1, START_METHOD="fork", MAX_TASKS_PER_CHILD=1)
    marks = []

    def receive(**kwargs: Any) -> None:
        marks.append(mark_session.func(database))

    connect(receive, task_started)
    pids = {finished(identify.enqueue()).return_value[0] for _ in range(3)}
    assert (len(pids), marks) == (3, [False, True, True])


@task
def count_queries(database: str) -> int:
    connection = connections[database]
    logged = len(connection.queries)
    with connection.cursor() as cursor:
        cursor.execute("SELECT 1")
    return logged * 100 + len(connection.queries)


def test_query_log_of_debug_is_empty_for_each_task(use, database):
    with override_settings(DEBUG=True):
        use(MAX_WORKERS=1)
        counts = [finished(count_queries.enqueue(database)).return_value for _ in range(3)]
        task_backends["default"].close()
    assert counts[0] in (1, 2)  # It may be one more for the first query of a session.
    assert all(0 < count < 100 for count in counts)


# --- Too much work, work without end, leaks -------------------------------------------------------


@task
def enqueue_many(number: int) -> list[str]:
    outcomes = []
    for _ in range(number):
        try:
            outcomes.append(str(echo.enqueue().status))
        except TaskQueueFull as error:
            outcomes.append(type(error).__name__)
    return outcomes


def test_full_queue_refuses_one_more_and_keeps_nothing_of_it(use, gate, signals):
    backend = use(MAX_WORKERS=1, MAX_PENDING=3)
    running = wait_at.enqueue(gate.path)
    await_signal(signals, "started", running.id)
    later = timezone.now() + timedelta(days=1)
    pending = [echo.enqueue(1), echo.using(run_after=later).enqueue(2), enqueue_many.enqueue(5)]
    before = backend.stats()
    while not signals.empty():
        signals.get()
    for refused in (echo, echo.using(run_after=later), echo.using(priority=100)):
        with pytest.raises(TaskQueueFull, match="3"):
            refused.enqueue("too many")
    assert signals.empty()
    assert backend.stats() == before
    assert (before["pending"], before["deferred"], before["running"]) == (2, 1, 1)
    gate.open()
    assert finished(pending[0]).return_value == [[1], {}]
    expected = ["READY", "READY", "TaskQueueFull", "TaskQueueFull", "TaskQueueFull"]
    assert finished(pending[2]).return_value == expected
    backend.join(TIMEOUT)
    assert finished(echo.enqueue("again")).return_value == [["again"], {}]


def test_full_queue_takes_exactly_its_limit_from_many_threads(use, gate, signals):
    use(MAX_WORKERS=1, MAX_PENDING=10)
    await_signal(signals, "started", wait_at.enqueue(gate.path).id)
    accepted: queue.Queue[Any] = queue.Queue()

    def enqueue() -> None:
        for _ in range(5):
            with contextlib.suppress(TaskQueueFull):
                accepted.put(echo.enqueue())

    in_threads(8, enqueue)
    assert accepted.qsize() == 10
    gate.open()
    assert all(finished(accepted.get()).status == SUCCESSFUL for _ in range(10))


def in_threads(number: int, function: Callable[..., Any], *args: Any) -> None:
    """Call the function in many threads at once; raise what one of them raised."""
    raised = []
    barrier = threading.Barrier(number)

    def call() -> None:
        try:
            barrier.wait(TIMEOUT)
            function(*args)
        except BaseException as error:
            raised.append(error)

    threads = [threading.Thread(target=call, daemon=True) for _ in range(number)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(TIMEOUT)
    assert not any(thread.is_alive() for thread in threads)
    for error in raised:
        raise error


@task
def never_end(how: str, result_id: str = "") -> None:
    if how == "GIL":
        sum(range(10**11))
    elif how == "deaf":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        while True:
            with contextlib.suppress(BaseException):
                signal.pause()
    task_backends["default"].wait_result(result_id)


@processes
def test_task_that_never_ends_is_killed_when_its_time_is_over(use, gate, signals):
    backend = use(MAX_WORKERS=2, TASK_TIMEOUT=0.7)
    results = [never_end.enqueue("GIL"), never_end.enqueue("deaf")]
    late = identify.using(run_after=timezone.now() + timedelta(days=1)).enqueue()
    results.append(never_end.enqueue("wait", late.id))
    queued = [identify.enqueue() for _ in range(3)]
    ended = [finished(result) for result in results]
    for result in ended:
        assert "TimeoutError" in errors(result)
        assert 0.7 <= (result.finished_at - result.started_at).total_seconds() < 5
    for result in map(finished, queued):
        assert result.status == SUCCESSFUL
        assert result.worker_ids[0] not in [i for killed in ended[:2] for i in killed.worker_ids]
    assert wait_gone(*[int(result.worker_ids[0].split("-")[-1]) for result in ended[:2]])
    assert backend.stats()["workers"] <= 2


@processes
def test_time_out_does_not_count_the_start_and_the_import(use, module_path):
    (module_path / "slow_tasks.py").write_text(
        f"import multiprocessing, time\nfrom {__name__} import task\n"
        "if multiprocessing.parent_process():\n    time.sleep(1)\n"
        "@task\ndef work():\n    return 'worked'\n"
    )
    use(MAX_WORKERS=1, TASK_TIMEOUT=0.5)
    import slow_tasks

    assert finished(slow_tasks.work.enqueue()).return_value == "worked"


@pytest.mark.parametrize("option", ["TASK_TIMEOUT", "MAX_TASKS_PER_CHILD", "START_METHOD"])
def test_thread_pool_refuses_what_only_processes_can(option):
    params = {"BACKEND": "django_tasks_local.ThreadPoolBackend", "OPTIONS": {option: 1}}
    with (
        override_settings(TASKS={"default": params}),
        pytest.raises(InvalidTaskBackend, match=f"{option}.*thread"),
    ):
        echo.enqueue()


@processes
def test_child_is_replaced_after_its_number_of_tasks(use):
    use(MAX_WORKERS=1, MAX_TASKS_PER_CHILD=2)
    results = [identify.enqueue() for _ in range(3)]
    first, same, second = [finished(result).return_value[0] for result in results]
    assert first == same != second
    assert wait_gone(first)


# --- Start methods --------------------------------------------------------------------------------

START = """
import contextvars, signal
from django.db import connection

variable = contextvars.ContextVar("variable", default="empty")
STATE = []

@task
def inspect():
    numbers = {"SIGTERM": signal.SIGTERM, "SIGUSR1": signal.SIGUSR1}
    kept = [name for name, number in numbers.items() if callable(signal.getsignal(number))]
    ignored = signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    return [os.getppid(), STATE, kept, ignored, variable.get(), connection.connection is None]

@task
def query():
    with connection.cursor() as cursor:
        cursor.execute("SELECT 1")
        return os.getpid()

if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *args: say("handled"))
    signal.signal(signal.SIGUSR1, lambda *args: say("handled"))
    signal.set_wakeup_fd(os.open(os.devnull, os.O_WRONLY | os.O_NONBLOCK))
    variable.set("of the parent")
    STATE.append("of the parent")
    with connection.cursor() as cursor:
        cursor.execute("CREATE TEMPORARY TABLE mine (a integer)")
    say(json.dumps([os.getpid(), *finish(inspect.enqueue()).return_value]))
    pids = {finish(query.enqueue()).return_value for _ in range(2)}
    task_backends["default"].close()
    with connection.cursor() as cursor:
        cursor.execute("INSERT INTO mine VALUES (1)")
        say("session lives", len(pids))
    connection.close()
"""


@pytest.mark.parametrize(
    ("method", "database"),
    [
        (None, "postgres_kept"),
        ("forkserver", "default"),
        ("spawn", "default"),
        ("fork", "default"),
        ("fork", "postgres_kept"),
    ],
)
def test_child_starts_by_the_method_with_nothing_of_its_parent(script, method, database):
    if database not in settings.DATABASES:
        pytest.skip("TASKS_TEST_POSTGRES does not say where a PostgreSQL server is")
    program = script(default={"kind": "ProcessPoolBackend", "MAX_WORKERS": 1, "START_METHOD": method})
    program.databases = {"default": connections.settings[database]}
    program.start(START)
    said = [line for line in program.rest() if "DeprecationWarning" not in line]
    own, parent, state, kept, ignored, variable, unconnected = json.loads(
        next(line for line in said if line.startswith("["))
    )
    assert (own == parent) == (method in ("spawn", "fork"))
    assert bool(state) == (method == "fork")
    assert (kept, ignored, variable, unconnected) == ([], True, "empty", True)
    assert said[-1] == "session lives 1", said


BLOCKED_SIGNALS = """
@task
def kill():
    os.kill(os.getpid(), signal.SIGTERM)

def enqueue_first():
    signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    say(finish(echo.enqueue("first")).return_value)

if __name__ == "__main__":
    first = threading.Thread(target=enqueue_first)
    first.start()
    first.join()
    for _ in range(2):
        say("end:", finish(kill.enqueue()).errors[0].traceback.splitlines()[-1])
    say(finish(echo.enqueue("next")).return_value)
"""


@pytest.mark.parametrize("method", ["forkserver", "spawn", "fork"])
def test_signals_blocked_in_the_thread_that_enqueues_first_do_not_hide_the_end_of_a_child(script, method):
    program = script(default={"kind": "ProcessPoolBackend", "MAX_WORKERS": 1, "START_METHOD": method})
    program.start(BLOCKED_SIGNALS)
    said = program.rest()
    assert program.code == 0, said
    assert {"first", "next"} <= {*said}
    ends = [line for line in said if line.startswith("end: ")]
    assert len(ends) == 2
    assert all("was killed by SIGTERM" in line for line in ends)


# --- Races ----------------------------------------------------------------------------------------


def test_many_threads_lose_nothing_and_run_nothing_twice(use, signals):
    backend = use(MAX_WORKERS=4, MAX_RESULTS=50)
    in_threads(32, lambda: [echo.enqueue() for _ in range(10)])
    backend.join(TIMEOUT)
    counts: dict[str, list[str]] = {}
    while not signals.empty():
        name, result = signals.get()
        counts.setdefault(result.id, []).append(name)
    assert len(counts) == 32 * 10
    assert {*map(tuple, counts.values())} == {("enqueued", "started", "finished")}
    stats = backend.stats()
    assert (stats["pending"], stats["running"], stats["finished"]) == (0, 0, 50)


def test_status_never_goes_backwards(use):
    backend = use(MAX_WORKERS=2, MAX_RESULTS=1000)
    order = [READY, RUNNING, SUCCESSFUL]

    def watch() -> None:
        for _ in range(20):
            result = echo.enqueue()
            seen = [result.status]
            while seen[-1] != SUCCESSFUL:
                time.sleep(0)
                result = backend.get_result(result.id)
                seen.append(result.status)
                assert (result.started_at is None) == (result.status == READY)
                assert (result.finished_at is not None) == (result.status == SUCCESSFUL)
            assert seen == sorted(seen, key=order.index)

    in_threads(3, watch)


def test_close_while_others_enqueue_loses_nothing(use, kind):
    backend = use(MAX_WORKERS=2)
    results: queue.Queue[Any] = queue.Queue()
    done = threading.Event()

    def enqueue() -> None:
        for _ in range(3 if kind == "ProcessPoolBackend" else 100):
            results.put(echo.enqueue())
            if kind == "ProcessPoolBackend":
                finished(echo.enqueue())

    def close() -> None:
        while not done.is_set():
            backend.close()

    closers = [threading.Thread(target=close) for _ in range(2)]
    for closer in closers:
        closer.start()
    in_threads(4, enqueue)
    done.set()
    for closer in closers:
        closer.join(TIMEOUT)
    assert results.qsize() >= 12
    while not results.empty():
        assert finished(results.get()).status == SUCCESSFUL


@task
def chain(left: int, path: str) -> str:
    """Enqueue the next of the chain, on another alias by turns."""
    pass_gate(path)
    alias = ("default", "other")[left % 2]
    return chain.using(backend=alias).enqueue(left - 1, path).id if left else "end"


def test_close_while_tasks_enqueue_runs_what_they_enqueue(kind, gate):
    params = {"BACKEND": f"django_tasks_local.{kind}", "OPTIONS": {"MAX_WORKERS": 2}}
    with override_settings(TASKS={"default": params, "other": params}):
        result = chain.enqueue(5, gate.path)
        closers = [threading.Thread(target=task_backends[alias].close) for alias in ("default", "other")]
        for closer in closers:
            closer.start()
        gate.open()
        for _ in range(5):
            result = finished(result)
            for alias in ("default", "other"):
                with contextlib.suppress(TaskResultDoesNotExist):
                    following = task_backends[alias].get_result(result.return_value)
            result = following
        assert finished(result).return_value == "end"
        for closer in closers:
            closer.join(TIMEOUT)
            assert not closer.is_alive()
        task_backends["default"].close()
        task_backends["other"].close()


@task
def close_and_join() -> str:
    task_backends["default"].close()
    try:
        task_backends["default"].join()
    except RuntimeError:
        return "refused"
    return "joined"


def test_close_in_a_task_returns_and_join_is_refused(use):
    use(MAX_WORKERS=1)
    first, second = close_and_join.enqueue(), echo.enqueue(2)
    assert finished(first).return_value == "refused"
    assert finished(second).return_value == [[2], {}]


def test_changed_settings_leave_no_threads_or_processes(use, kind):
    threads_before, children_before = {*threading.enumerate()}, descendants(os.getpid())
    for number in range(4):
        params = {"BACKEND": f"django_tasks_local.{kind}", "OPTIONS": {"MAX_WORKERS": number + 1}}
        with override_settings(TASKS={"default": params}):
            results = [identify.enqueue() for _ in range(2)]
            pids = {finished(result).return_value[0] for result in results}
            echo.using(run_after=timezone.now() + timedelta(days=1)).enqueue()
        assert kind == "ThreadPoolBackend" or wait_gone(*pids)
    for thread in {*threading.enumerate()} - threads_before:
        thread.join(TIMEOUT)
        assert not thread.is_alive(), thread
    # The servers of the standard library remain, started once for all.
    assert len(descendants(os.getpid()) - children_before) <= 2


# --- Tasks that wait for tasks --------------------------------------------------------------------


@task
def wait_for(result_id: str, alias: str = "default", path: str = "") -> str:
    if path:
        pass_gate(path)
    try:
        result = task_backends[alias].wait_result(result_id)
    except RuntimeError as error:
        return f"refused: {error}"
    return str(result.status)


@task
async def await_for(result_id: str) -> str:
    try:
        result = await task_backends["default"].await_result(result_id)
    except RuntimeError as error:
        return f"refused: {error}"
    return str(result.status)


@pytest.mark.parametrize("waiter", [wait_for, await_for])
def test_waiting_for_a_task_that_cannot_start_is_refused(use, gate, signals, waiter):
    use(MAX_WORKERS=2)
    running = wait_at.enqueue(gate.path)
    await_signal(signals, "started", running.id)
    blocker = wait_for.enqueue(running.id)  # The other worker waits for the first one.
    await_signal(signals, "started", blocker.id)
    queued = echo.enqueue()
    gate.open()
    assert finished(blocker).return_value == "SUCCESSFUL"
    assert finished(queued).status == SUCCESSFUL
    task_backends["default"].close()
    use(MAX_WORKERS=1)
    late = echo.using(run_after=timezone.now() + timedelta(days=1)).enqueue()
    assert "refused" in finished(waiter.enqueue(late.id)).return_value


def lower_workers(use, gate, signals, first, name):
    """Run a task at the gate, and one that is to wait for the one of that name; then allow but one worker."""
    use(MAX_WORKERS=2)
    running, waiter = wait_at.enqueue(gate.path), wait_for_named.enqueue(first.path, name)
    for result in (running, waiter):
        await_signal(signals, "started", result.id)
    use(MAX_WORKERS=1)
    pending = echo.enqueue()
    Path(f"{first.path}.ids").write_text(json.dumps({"running": running.id, "pending": pending.id}))
    first.open()
    return running, waiter, pending


def test_waiting_for_a_running_task_is_allowed_though_workers_are_to_be_fewer(use, gate, signals, tmp_path):
    _, waiter, pending = lower_workers(use, gate, signals, Gate(tmp_path / "first"), "running")
    with pytest.raises(TimeoutError):
        finished(waiter, 0.2)
    gate.open()
    assert outcome(waiter) == "SUCCESSFUL"
    assert outcome(pending) == [[], {}]


def test_waiting_for_a_task_that_fewer_workers_cannot_start_is_refused(use, gate, signals, tmp_path):
    running, waiter, pending = lower_workers(use, gate, signals, Gate(tmp_path / "first"), "pending")
    assert "refused" in outcome(waiter)
    gate.open()
    assert (outcome(running), outcome(pending)) == (None, [[], {}])


def test_waiting_in_a_circle_is_refused(use, gate):
    backend = use(MAX_WORKERS=3)
    ids: dict[str, str] = {}
    first = wait_for_named.enqueue(gate.path, "second")
    second = wait_for_named.enqueue(gate.path, "first")
    ids.update(first=first.id, second=second.id)
    Path(f"{gate.path}.ids").write_text(json.dumps(ids))
    gate.open()
    ended = [backend.wait_result(result.id, TIMEOUT).return_value for result in (first, second)]
    assert sorted(value.partition(":")[0] for value in ended) == ["SUCCESSFUL", "refused"]


@task
def wait_for_named(path: str, name: str) -> str:
    pass_gate(path)
    return wait_for.func(json.loads(Path(f"{path}.ids").read_text())[name])


def test_waiting_for_the_queue_of_a_retired_pool_never_hangs(use, gate, signals):
    use(MAX_WORKERS=1)
    blocked = wait_for_named.enqueue(gate.path, "queued")
    await_signal(signals, "started", blocked.id)
    queued = echo.enqueue()
    Path(f"{gate.path}.ids").write_text(json.dumps({"queued": queued.id}))
    backend = use(MAX_WORKERS=5)
    assert finished(echo.enqueue()).status == SUCCESSFUL
    gate.open()
    assert backend.wait_result(blocked.id, 10).return_value.startswith(("refused", "SUCCESSFUL"))
    assert finished(queued).status == SUCCESSFUL


# --- Servers --------------------------------------------------------------------------------------

SITE = """
@task
def announce(word):
    say("ran", word)

def run(request):
    return JsonResponse({"web": os.getpid(), "pid": finish(identify.enqueue()).return_value})

def known(request, result_id):
    try:
        status = str(task_backends["default"].get_result(result_id).status)
    except TaskResultDoesNotExist:
        status = "unknown"
    return JsonResponse({"web": os.getpid(), "status": status})

def begin(request):
    return JsonResponse({"web": os.getpid(), "id": wait.enqueue().id})

urlpatterns = [path("", run), path("known/<result_id>", known), path("begin", begin)]
"""
WSGI = (
    SITE
    + """
from django.core.wsgi import get_wsgi_application

application = get_wsgi_application()
"""
)
PRELOADED = (
    WSGI
    + """
if "gunicorn" in sys.modules:
    preloaded = identify.enqueue()
    say("preloaded", preloaded.id, finish(preloaded).return_value)
"""
)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def get(port: int, path: str = "") -> dict[str, Any]:
    """Ask a server; while it is not up yet, ask again."""
    url = f"http://127.0.0.1:{port}/{path}"
    end = time.monotonic() + TIMEOUT
    while True:
        try:
            with urllib.request.urlopen(url, timeout=TIMEOUT) as response:
                return json.load(response)
        except urllib.error.HTTPError as error:
            with error:
                raise
        except OSError:
            if time.monotonic() > end:
                raise
        time.sleep(0.02)


def assert_free(port: int) -> None:
    socket.create_server(("127.0.0.1", port)).close()


@each_kind
def test_gunicorn_preloads_a_used_pool(script, kind):
    pytest.importorskip("gunicorn")
    program, port = script(default={"kind": kind, "MAX_WORKERS": 2}), free_port()
    options = f"--preload --workers 2 --bind 127.0.0.1:{port} program:application"
    program.start(PRELOADED, "-m", "gunicorn", *options.split())
    result_id, child = program.line("preloaded").split()[1:]
    answers = [get(port) for _ in range(6)]
    assert all(answer["web"] != program.process.pid for answer in answers)
    assert {answer["pid"] for answer in answers}.isdisjoint({int(child), program.process.pid})
    assert get(port, f"known/{result_id}")["status"] == "unknown"
    started = descendants(program.process.pid)
    program.process.send_signal(signal.SIGTERM)
    said = program.rest()
    assert program.code == 0
    assert "Traceback" not in "".join(said)
    assert wait_gone(*started)
    assert_free(port)


@each_kind
def test_gunicorn_waits_for_the_work_of_recycled_and_stopped_workers(script, gate, kind):
    pytest.importorskip("gunicorn")
    program, port = script(default={"kind": kind, "MAX_WORKERS": 1}), free_port()
    options = f"--max-requests 1 --bind 127.0.0.1:{port} program:application"
    program.start(WSGI, "-m", "gunicorn", *options.split())
    first = get(port, "begin")
    assert first["id"] in program.line("SHUTDOWN_TIMEOUT")
    gate.open()
    assert program.line("ran") == "ran waited"
    assert wait_gone(first["web"])
    assert get(port)["web"] != first["web"]
    program.process.send_signal(signal.SIGTERM)
    program.rest()
    assert program.code == 0
    assert_free(port)


ASGI = (
    SITE
    + """
import asyncio
from django.core.asgi import get_asgi_application
django_application = get_asgi_application()

async def application(scope, receive, send):
    if scope["type"] != "lifespan":
        return await django_application(scope, receive, send)
    while True:
        message = await receive()
        if message["type"] == "lifespan.shutdown":
            say("closes")
            await asyncio.to_thread(task_backends["default"].close)
        await send({"type": message["type"] + ".complete"})
        if message["type"] == "lifespan.shutdown":
            return
"""
)


@each_kind
def test_uvicorn_finishes_the_work_by_a_lifespan_that_closes(script, gate, kind):
    pytest.importorskip("uvicorn")
    program, port = script(default={"kind": kind, "MAX_WORKERS": 1}), free_port()
    program.start(ASGI, "-m", "uvicorn", "--port", port, "program:application")
    get(port, "begin")
    program.line("waits")
    started = descendants(program.process.pid)
    program.process.send_signal(signal.SIGTERM)
    program.line("closes")
    gate.open()
    said = program.rest()
    assert "ran waited" in said
    assert "Traceback" not in "".join(said)
    assert wait_gone(*started)
    assert_free(port)


RUNSERVER = (
    SITE
    + """
if __name__ == "__main__":
    from django.core.management import execute_from_command_line
    settings.DEBUG = True
    settings.WSGI_APPLICATION = None
    execute_from_command_line(sys.argv)
"""
)


@each_kind
def test_runserver_reloads_with_a_used_pool(script, kind):
    program, port = script(default={"kind": kind, "MAX_WORKERS": 1}), free_port()
    program.start(RUNSERVER, "program.py", "runserver", f"127.0.0.1:{port}")
    before = get(port)
    started = descendants(before["web"])
    for _ in range(TIMEOUT):  # The reloader misses a change before its first look.
        with (program.directory / "program.py").open("a") as file:
            file.write("\n")
        if wait_gone(before["web"], timeout=1.5):
            break
    assert wait_gone(before["web"], *started)
    after = get(port)
    assert after["web"] != before["web"]
    assert after["pid"] not in (before["pid"], before["web"])
    started = descendants(program.process.pid)
    os.killpg(program.process.pid, signal.SIGINT)
    program.rest()
    assert wait_gone(*started)
    assert_free(port)


# --- Stress: bounded in time, repeatable by its seed ----------------------------------------------


@pytest.fixture
def chance():
    """Return a source of chance and the time to stop; a failure shows the seed."""
    seed = int(os.environ.get("TASKS_TEST_SEED", 0)) or random.randrange(1, 2**32)
    print(f"TASKS_TEST_SEED={seed}")
    return random.Random(seed), time.monotonic() + STRESS


@task
def maybe_die(number: float, path: str) -> float:
    if number < 0.05:
        os.kill(os.getpid(), signal.SIGKILL)
    if number < 0.15:
        raise ValueError(number)
    with open(path, "a") as file:
        file.write(f"{number}\n")
    return number


@pytest.mark.stress
@processes
def test_stress_killed_children(use, chance, tmp_path):
    generator, end = chance
    backend = use(MAX_WORKERS=3, MAX_RESULTS=100_000)
    path, results = tmp_path / "numbers", []
    while time.monotonic() < end:
        numbers = [generator.random() for _ in range(generator.randrange(1, 40))]
        results += [(number, maybe_die.enqueue(number, str(path))) for number in numbers]
        if generator.random() < 0.2 and (pids := descendants(os.getpid())):
            finished(generator.choice(results)[1])
            backend.join(TIMEOUT)
            victims = {finished(identify.enqueue()).return_value[0]} & pids
            for pid in victims:
                os.kill(pid, signal.SIGKILL)
    backend.join(TIMEOUT)
    for number, result in results:
        result.refresh()
        assert result.status == (FAILED if number < 0.15 else SUCCESSFUL), result.errors
    expected = sorted(str(number) for number, _ in results if number >= 0.15)
    assert sorted(path.read_text().split()) == expected


@pytest.mark.stress
def test_stress_threads_that_enqueue_wait_close_and_change_settings(kind, chance):
    generator, end = chance
    results: queue.Queue[Any] = queue.Queue()
    seeds = itertools.count(generator.randrange(10**9))

    def act() -> None:
        own = random.Random(next(seeds))
        while time.monotonic() < end:
            choice = own.random()
            if choice < 0.01:
                task_backends["default"].close()
            elif choice < 0.1:
                finished(echo.enqueue(choice))
            else:
                results.put(echo.using(priority=own.randrange(-100, 100)).enqueue(choice))
                if results.qsize() % 500 == 0:
                    task_backends["default"].join(TIMEOUT)

    options = {"MAX_WORKERS": 3, "MAX_RESULTS": 10_000_000}
    params = {"BACKEND": f"django_tasks_local.{kind}", "OPTIONS": options}
    with override_settings(TASKS={"default": params}):
        in_threads(8, act)
        while not results.empty():
            assert finished(results.get()).status == SUCCESSFUL
        task_backends["default"].close()
        assert task_backends["default"].stats()["workers"] == 0


@pytest.mark.stress
@pytest.mark.parametrize("kind", ["ThreadPoolBackend"])  # The queue is the same one.
def test_stress_hundred_thousand_pending_cost_flat_time(use, gate, caplog):
    caplog.set_level("WARNING", "django.tasks")
    backend = use(MAX_WORKERS=1)
    wait_at.enqueue(gate.path)
    costs = []
    for _ in range(100):
        begin = time.perf_counter()
        for _ in range(1000):
            echo.enqueue()
        costs.append(time.perf_counter() - begin)
    assert backend.stats()["pending"] >= 100_000
    early, late = sorted(costs[:20])[10], sorted(costs[-20:])[10]
    assert late < 5 * early
    gate.open()
    backend.join(60)


# --- The practice around the file: README, results in a cache, growing out, vendored use ----------


CHECKOUT = Path(__file__).parent
README = Path(os.environ.get("TASKS_TEST_README", CHECKOUT / "README.md"))
BACKPORT = django.VERSION < (6, 0)


def readme() -> str:
    return README.read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    """Return the code blocks of a language, for the Tasks framework that there is."""
    found = re.findall(rf"^```{language}\n(.*?)^```$", readme(), re.MULTILINE | re.DOTALL)
    return [block.replace("django.tasks", "django_tasks") if BACKPORT else block for block in found]


def readme_files() -> dict[str, str]:
    """Return the Python blocks by the path that their first line names."""
    return {block.split()[1]: block for block in blocks("python")}


def rows(column: str) -> list[list[str]]:
    """Return the cells of the table whose head has a column of this name."""
    table = readme().partition(f"| {column} |")[2].partition("\n\n")[0]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()[2:]]


def run_python(cwd: Path, *args: str, **environ: str) -> subprocess.CompletedProcess[str]:
    """Run Python in a directory, with settings found there, until it ends."""
    env = {**os.environ, "DJANGO_SETTINGS_MODULE": "mysite.settings", **environ}
    env.pop("TASKS_TEST_DIRECTORY", None)
    return subprocess.run(
        [sys.executable, *args], cwd=cwd, env=env, capture_output=True, text=True, timeout=120
    )


def succeed(*args: Any, **environ: str) -> str:
    done = run_python(*args, **environ)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


SETTINGS = f"""
from pathlib import Path
DIRECTORY = Path(__file__).parent.parent
SECRET_KEY = "tests"
USE_TZ = True
ROOT_URLCONF = "mysite.urls"
INSTALLED_APPS = ["django.contrib.auth", "django.contrib.contenttypes", "myapp"]
INSTALLED_APPS += ["django_tasks"] if {BACKPORT} else []
DEFAULT_AUTO_FIELD = "django.db.models.BigAutoField"
DATABASES = {{
    "default": {{
        "ENGINE": "django.db.backends.sqlite3",
        "NAME": DIRECTORY / "db.sqlite3",
        "TEST": {{"NAME": DIRECTORY / "test.sqlite3"}},
    }}
}}
"""

URLS = """
from django.http import JsonResponse
from django.urls import path
from myapp.slow import in_process, in_thread

def start(request):
    args = (request.GET["gate"], request.GET["done"])
    return JsonResponse({"ids": [in_thread.enqueue(*args).id, in_process.enqueue(*args).id]})

urlpatterns = [path("start/", start)]
"""

SLOW = """
import fcntl, os, pathlib
from django.tasks import task

def leave_mark(gate, done, kind):
    with open(gate) as file:
        fcntl.flock(file, fcntl.LOCK_SH)
    pathlib.Path(done, kind).touch()

@task
def in_thread(gate, done):
    leave_mark(gate, done, "thread")

@task(backend="cpu")
def in_process(gate, done):
    leave_mark(gate, done, "process")
"""


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """Return the directory of a Django project made of the blocks of the README."""
    files = {
        "mysite/__init__.py": "",
        "mysite/urls.py": URLS,
        "myapp/__init__.py": "",
        "myapp/slow.py": SLOW.replace("django.tasks", "django_tasks") if BACKPORT else SLOW,
        **readme_files(),
    }
    files["mysite/settings.py"] = SETTINGS + files["mysite/settings.py"]
    for name, text in files.items():
        path = tmp_path / "project" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return tmp_path / "project"


def test_every_code_block_of_the_readme_is_run_by_a_test_below():
    languages = re.findall(r"^```(\w+)$", readme(), re.MULTILINE)
    assert sorted({*languages}) == ["pycon", "python", "sh"]
    assert [len(blocks(language)) for language in ("pycon", "sh")] == [1, 1]
    assert readme().count("```") == 2 * len(languages)
    assert list(readme_files()) == [
        "mysite/settings.py",
        "myapp/tasks.py",
        "example.py",
        "myapp/tests.py",
        "mysite/asgi.py",
        "mysite/steps.py",
    ]
    assert len(blocks("python")) == 6


def test_the_interactive_session_of_the_readme_prints_what_it_says(project):
    (session,) = blocks("pycon")
    (project / "session.txt").write_text(session)
    code = "import django, doctest; django.setup(); print(doctest.testfile('session.txt', False))"
    output = succeed(project, "-c", code)
    assert f"failed=0, attempted={session.count('>>>')}" in output, output


def test_the_tests_of_the_readme_pass(project):
    done = run_python(project, "-m", "django", "test")
    assert done.returncode == 0, done.stderr
    assert "Ran 3 tests" in done.stderr


# --- Commands -------------------------------------------------------------------------------------


def shell_commands() -> list[list[str]]:
    """Return [how to install, what to start] for each of the README's commands."""
    (block,) = blocks("sh")
    return [line.split(" && ") for line in block.splitlines()]


def test_the_demonstration_shows_both_backends_a_failure_and_every_status(tmp_path):
    (_, command), _ = shell_commands()
    assert command == "python -m django_tasks_local"
    done = run_python(tmp_path, *command.split()[1:])
    assert done.returncode == 0, done.stdout + done.stderr
    shown = ("ThreadPoolBackend", "ProcessPoolBackend", "READY", "RUNNING", "SUCCESSFUL", "FAILED")
    assert [text for text in shown if text not in done.stdout] == []
    assert done.stdout.count("FAILED") == 1, done.stdout  # Though the environment names other settings.
    assert re.search(r"\w+(Error|Exception)\b", done.stdout), "the error of the failing task"
    assert re.search(r"\d\.\d+ ?(x|\u00d7|times)", done.stdout), "the speed-up of the processes"
    assert not re.search(r"[\r\x1b]", done.stdout), "piped to a file, it must be plain text"


@pytest.mark.stress
def test_the_commands_of_the_readme_install_from_a_checkout(tmp_path):
    if not (CHECKOUT / "pyproject.toml").exists():
        pytest.skip("the tests do not stand in a checkout: there is no pyproject.toml")
    pytest.importorskip("pip")
    (first, _), (second, tests) = shell_commands()
    copy = shutil.copytree(CHECKOUT, tmp_path / "checkout", ignore=shutil.ignore_patterns(".*"))
    venv.create(tmp_path / "venv", with_pip=False)
    environ = {
        **os.environ,
        "PATH": f"{tmp_path}/venv/bin{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": sysconfig.get_path("purelib"),  # What is there need not be fetched.
        "PYTEST_ADDOPTS": "--collect-only -q -p no:cacheprovider",
    }
    for command in (first, f"{second} && {tests}"):
        done = subprocess.run(["sh", "-c", command], cwd=copy, env=environ, capture_output=True, text=True)
        if re.search("No matching distribution|Could not find a version", done.stderr):
            pytest.skip(f"no package index can be reached: {done.stderr}")
        assert done.returncode == 0, done.stdout + done.stderr
    assert "test_the_links_of_the_readme_lead_to_its_headings" in done.stdout


# --- Tables ---------------------------------------------------------------------------------------


def test_the_readme_lists_the_options_that_there_are():
    with pytest.raises(InvalidTaskBackend) as caught:
        ThreadPoolBackend("readme", {"OPTIONS": {"12345": 1}})
    named = re.findall(r"[A-Z]+_[A-Z_]+", str(caught.value))
    assert [row[0].strip("`") for row in rows("In `OPTIONS` | Default")] == named


def test_the_readme_lists_the_messages_that_there_are():
    tree = ast.parse(Path(django_tasks_local.__file__).read_text(encoding="utf-8"))
    written = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "_log":
            level, message = ast.unparse(node.args[0]).removeprefix("logging."), node.args[1].value
            written.add((level, re.sub(r"%[rs]", "…", message)))
    assert {(level, message.strip("`")) for level, message, _ in rows("Level | Message")} == written


def test_the_links_of_the_readme_lead_to_its_headings():
    headings = re.findall(r"^#+ (.+)$", readme(), re.MULTILINE)
    anchors = {heading.lower().replace(" ", "-") for heading in headings}
    links = re.findall(r"\]\(#([^)]+)\)", readme())
    assert links
    assert {*links} <= anchors


# --- Servers --------------------------------------------------------------------------------------


class Server:
    """A process that serves HTTP and says in its output where."""

    def __init__(self, cwd: Path, *args: str, **environ: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-u", *args],
            cwd=cwd,
            env={**os.environ, **environ},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self.said = ""
        self.lines: queue.Queue[str] = queue.Queue()
        self.reader = threading.Thread(target=self.read, daemon=True)
        self.reader.start()
        self.port = self.wait_for(r"http://127\.0\.0\.1:(\d+)")[1]

    def read(self) -> None:
        for line in self.process.stdout:
            self.lines.put(line)
        self.lines.put("")

    def wait_for(self, pattern: str) -> re.Match[str]:
        while line := self.lines.get(timeout=TIMEOUT):
            self.said += line
            if match := re.search(pattern, line):
                return match
        pytest.fail(f"The server ended without saying {pattern!r}:\n{self.said}")

    def __enter__(self) -> "Server":
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.process.terminate()
        try:
            self.process.wait(TIMEOUT)
        finally:
            self.process.kill()
            self.process.wait()
            self.reader.join()
            self.process.stdout.close()


class Visitor:
    """A browser, as far as the example site needs one."""

    def __init__(self, port: str) -> None:
        cookies = urllib.request.HTTPCookieProcessor(http.cookiejar.CookieJar())
        self.opener = urllib.request.build_opener(urllib.request.ProxyHandler({}), cookies)
        self.site = f"http://127.0.0.1:{port}/"
        self.pids: set[str] = set()  # Of the processes that answered.
        self.page = self.open("")
        self.token = re.search('name="csrfmiddlewaretoken" value="([^"]+)"', self.page)[1]

    def open(self, path: str, **form: Any) -> str:
        data = urllib.parse.urlencode(form).encode() if form else None
        with self.opener.open(self.site + path, data, timeout=TIMEOUT) as response:
            self.pids.add(response.headers.get("X-Pid", ""))
            return response.read().decode()

    def start(self, name: str, count: int) -> str:
        form = {"csrfmiddlewaretoken": self.token, "count": count}
        return f"status/{name}/{json.loads(self.open(f'start/{name}', **form))['id']}"

    def watch(self, path: str) -> list[dict[str, Any]]:
        """Poll, as the page does, until the task is finished; return each answer."""
        answers, deadline = [], time.monotonic() + TIMEOUT
        while not answers or answers[-1]["status"] in ("READY", "RUNNING"):
            assert time.monotonic() < deadline, answers
            time.sleep(0.02)  # The interval of the polls, nothing is expected to happen in it.
            answers.append(json.loads(self.open(path)))
        return answers


def check_example(visitor: Visitor) -> None:
    """Press both buttons, see both bars move, then see an error."""
    texts = {"fetch": "10 pages fetched", "primes": "prime number 20000 is 224737"}
    seen: dict[str, list[dict[str, Any]]] = {}

    def press(name: str) -> None:
        seen[name] = visitor.watch(visitor.start(name, int(re.search(r"\d+", texts[name])[0])))

    presses = [threading.Thread(target=press, args=(name,)) for name in texts]
    for thread in presses:
        thread.start()
    for thread in presses:
        thread.join()
    assert {*seen} == {*texts}
    for name, answers in seen.items():
        assert answers[-1] == {"status": "SUCCESSFUL", "percent": 100, "text": texts[name]}
        percents = [answer["percent"] for answer in answers]
        assert percents == sorted(percents)
        moving = {answer["percent"] for answer in answers if answer["status"] == "RUNNING"}
        assert len(moving - {0, 100}) >= 2, percents
    failed = visitor.watch(visitor.start("primes", 0))[-1]
    assert failed["status"] == "FAILED"
    assert failed["text"] == "ValueError: 0 is not a number of primes"


def test_the_example_site_runs_as_written(project):
    assert "`python example.py`" in readme()
    with Server(project, "example.py", "127.0.0.1:0") as server:
        visitor = Visitor(server.port)
        assert {*re.findall('<form id="([^"]+)"', visitor.page)} == {"fetch", "primes"}
        assert not re.search("src=|href=|@import", visitor.page), "nothing comes from elsewhere"
        check_example(visitor)
        visitor.token = "wrong"
        with pytest.raises(urllib.request.HTTPError, match="403"):
            visitor.start("fetch", 1)


SHARED_CACHES = [
    "files",
    pytest.param(
        "redis",
        marks=pytest.mark.skipif(
            REDIS is None, reason="TASKS_TEST_REDIS, the URL of a Redis server, is not set"
        ),
    ),
]
REDIS_CACHE = "django.core.cache.backends.redis.RedisCache"

EXAMPLE_WSGI = """
import os
from example import application as site

def application(environ, start_response):
    def start(status, headers, *args):
        return start_response(status, [*headers, ("X-Pid", str(os.getpid()))], *args)
    return site(environ, start)
"""


@pytest.mark.parametrize("cache", SHARED_CACHES)
def test_under_gunicorn_every_worker_answers_for_the_tasks_of_all(project, cache):
    pytest.importorskip("gunicorn")
    if cache == "redis":
        source = (project / "example.py").read_text()
        source = source.replace("django.core.cache.backends.filebased.FileBasedCache", REDIS_CACHE)
        source = re.sub('"LOCATION": .*', f'"LOCATION": "{REDIS}",', source)
        (project / "example.py").write_text(source)
    (project / "wsgi.py").write_text(EXAMPLE_WSGI)
    command = ("-m", "gunicorn", "--workers", "3", "--bind", "127.0.0.1:0", "wsgi:application")
    with Server(project, *command) as server:
        visitor = Visitor(server.port)
        check_example(visitor)
        path = visitor.start("fetch", 0)
        visitor.pids.clear()
        deadline = time.monotonic() + TIMEOUT
        while len(visitor.pids) < 3:
            assert visitor.watch(path)[-1]["text"] == "0 pages fetched"
            assert time.monotonic() < deadline, f"only {visitor.pids} answered"


def test_under_uvicorn_the_lifespan_finishes_the_tasks_on_sigterm(project, gate, tmp_path):
    pytest.importorskip("uvicorn")
    command = ("-m", "uvicorn", "--port", "0", "mysite.asgi:application")
    with Server(project, *command, DJANGO_SETTINGS_MODULE="mysite.settings") as server:
        query = urllib.parse.urlencode({"gate": gate.path, "done": tmp_path})
        urllib.request.urlopen(f"http://127.0.0.1:{server.port}/start/?{query}").close()
        server.process.terminate()
        server.wait_for("Waiting for application shutdown")
        assert not (tmp_path / "thread").exists()
        gate.open()
        server.wait_for("Application shutdown complete")
        assert (tmp_path / "thread").exists()
        assert (tmp_path / "process").exists()


EXITING = """
import signal, sys
import django
django.setup()
from myapp import slow

if __name__ == "__main__":
    signal.signal(signal.SIGABRT, lambda *args: sys.exit(1))  # As gunicorn's workers do.
    print(getattr(slow, sys.argv[1]).enqueue(*sys.argv[2:]).id)
"""


def exits_when_told(project: Path, gate: Gate, directory: Path, task_name: str) -> None:
    """Start EXITING, and send the signal as soon as it says that it waits."""
    process = subprocess.Popen(
        [sys.executable, "-u", "script.py", task_name, gate.path, str(directory)],
        cwd=project,
        env={**os.environ, "DJANGO_SETTINGS_MODULE": "mysite.settings"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    with process:
        try:
            result_id = process.stdout.readline().strip()
            warning = process.stderr.readline()
            assert result_id in warning
            assert "SHUTDOWN_TIMEOUT" in warning
            process.send_signal(signal.SIGABRT)
            rest = process.communicate(timeout=TIMEOUT)[1]
        finally:
            process.kill()
    assert any(result_id in line and "are FAILED" in line for line in rest.splitlines()), rest


@pytest.mark.stress
def test_stress_signals_as_the_wait_at_exit_begins(project, gate, tmp_path):
    (project / "script.py").write_text(EXITING)
    for _ in range(40):
        exits_when_told(project, gate, tmp_path, "in_thread")


@pytest.mark.parametrize("task_name", ["in_thread", "in_process"])
def test_a_supervisor_that_ends_the_wait_at_exit_is_told_what_is_lost(project, gate, tmp_path, task_name):
    (project / "script.py").write_text(EXITING)
    exits_when_told(project, gate, tmp_path, task_name)


# --- RESULTS_CACHE --------------------------------------------------------------------------------


@pytest.fixture(params=SHARED_CACHES)
def cache(request: pytest.FixtureRequest) -> Iterator[str]:
    """Return the alias of a cache that processes share."""
    location = {"BACKEND": REDIS_CACHE, "LOCATION": REDIS}
    caches = {**settings.CACHES, **({"redis": location} if request.param == "redis" else {})}
    with override_settings(CACHES=caches):
        yield request.param


@pytest.fixture
def outage(tmp_path: Path) -> Iterator[Path]:
    """Return a path; while a file is there, the cache "breakable" fails."""
    location = tmp_path / "breakable"
    files = {**settings.CACHES["files"], "LOCATION": str(location)}
    with override_settings(CACHES={**settings.CACHES, "breakable": files}):
        yield location


def as_text(result: Any) -> str:
    """Return all that a result says."""
    names = ("id", "status", "args", "kwargs", "backend", "errors", "worker_ids", "attempts")
    times = ("enqueued_at", "started_at", "last_attempted_at", "finished_at")
    of_task = ("module_path", "priority", "queue_name", "run_after", "backend", "takes_context")
    said = [str(getattr(result, name)) for name in names + times]
    said += [str(getattr(result.task, name)) for name in of_task]
    return " ".join([*said, str(result.return_value) if result.status == "SUCCESSFUL" else ""])


READER = """
import json, sys
module, caches, tasks = sys.argv[1], *map(json.loads, sys.argv[2:])
tests = __import__(module)
tests.override_settings(CACHES=caches, TASKS=tasks).enable()
for line in sys.stdin:
    method, result_id = line.split()
    try:
        text = tests.as_text(getattr(tests.task_backends["default"], method)(result_id))
    except tests.TaskResultDoesNotExist as error:
        text = "TaskResultDoesNotExist " + str(error)
    print(json.dumps(text), flush=True)
"""


@pytest.fixture
def read_elsewhere() -> Iterator[Callable[[str], str]]:
    """Return a function that has another process, of the same settings, read a result."""
    with ExitStack() as stack:

        def start() -> subprocess.Popen[str]:
            values = (json.dumps(settings.CACHES), json.dumps(settings.TASKS))
            process = subprocess.Popen(
                [sys.executable, "-c", READER, __name__, *values],
                cwd=CHECKOUT,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
            return stack.enter_context(process)

        processes: list[subprocess.Popen[str]] = []

        def read(result_id: str, method: str = "get_result") -> str:
            if not processes:
                processes.append(start())
            processes[0].stdin.write(f"{method} {result_id}\n")
            processes[0].stdin.flush()
            return json.loads(processes[0].stdout.readline())

        yield read


def test_another_process_reads_each_status_and_equal_results(use, cache, gate, signals, read_elsewhere):
    backend = use(RESULTS_CACHE=cache, MAX_WORKERS=1)
    first = wait_at.enqueue(gate.path, {"é": [1.5, None]})
    while signals.get(timeout=TIMEOUT)[0] != "started":
        pass
    second = echo.using(priority=7).enqueue(1, a="b")
    third = fail.enqueue("no")
    running, ready = (backend.get_result(result.id) for result in (first, second))
    assert (running.status, ready.status) == (RUNNING, READY)
    assert read_elsewhere(first.id) == as_text(running)
    assert read_elsewhere(second.id) == as_text(ready)
    assert "cannot be waited for" in read_elsewhere(first.id, "wait_result")
    gate.open()
    ends = [finished(result) for result in (first, second, third)]
    assert [end.status for end in ends] == [SUCCESSFUL, SUCCESSFUL, FAILED]
    assert [read_elsewhere(end.id) for end in ends] == [as_text(end) for end in ends]
    assert read_elsewhere(first.id, "wait_result") == as_text(ends[0])
    missing = read_elsewhere("0" * 36)
    assert "TaskResultDoesNotExist" in missing
    assert "RESULTS_CACHE" in missing
    assert cache in missing


def test_what_memory_has_evicted_is_read_from_the_cache(use, cache):
    backend = use(RESULTS_CACHE=cache, MAX_RESULTS=1)
    results = [finished(task.enqueue("x")) for task in (echo, fail, echo)]
    assert backend.stats()["finished"] == 1
    assert [backend.get_result(result.id) for result in results] == results
    assert [echo.get_result(result.id) for result in results[::2]] == results[::2]
    with pytest.raises(TaskResultMismatch):
        echo.get_result(results[1].id)

    async def read() -> list[Any]:
        last = await echo.aenqueue("y")
        assert (await backend.await_result(last.id, TIMEOUT)).return_value == [["y"], {}]
        return [await backend.aget_result(result.id) for result in results]

    assert asyncio.run(read()) == results


def test_a_result_in_the_cache_of_a_task_that_is_gone_does_not_exist(use, cache, module_path):
    backend = use(RESULTS_CACHE=cache, MAX_RESULTS=1)
    for name in ("gone", "halfway"):
        (module_path / f"{name}.py").write_text(
            f"from {__name__} import task\n@task\ndef work():\n    pass\n"
        )
    import gone
    import halfway

    results = [finished(task.enqueue()) for task in (gone.work, halfway.work, echo)]
    assert backend.get_result(results[0].id).status == SUCCESSFUL
    (module_path / "gone.py").unlink()
    del sys.modules["gone"], halfway.work
    for result, name in zip(results, ("gone", "halfway"), strict=False):
        with pytest.raises(TaskResultDoesNotExist, match=name):
            backend.get_result(result.id)
    backend.close()


def test_a_transaction_of_who_enqueues_holds_no_entry_of_the_cache(use, cache, read_elsewhere):
    use(RESULTS_CACHE=cache)
    with transaction.atomic():
        late = echo.using(run_after=timezone.now() + timedelta(days=1)).enqueue()
        assert "TaskResultDoesNotExist" in read_elsewhere(late.id)
    assert " READY " in read_elsewhere(late.id)


def test_a_commit_brings_no_earlier_status_back_to_the_cache(use, cache):
    backend = use(RESULTS_CACHE=cache, MAX_RESULTS=1)
    with transaction.atomic():
        results = [finished(echo.enqueue(number)) for number in range(2)]
        assert backend.stats()["finished"] == 1
    assert [backend.get_result(result.id) for result in results] == results


@pytest.mark.parametrize("result_id", ["", "with a space", "\n", "x" * 300])
def test_an_id_that_is_no_key_of_a_cache_is_merely_unknown(use, cache, result_id):
    with pytest.raises(TaskResultDoesNotExist):
        use(RESULTS_CACHE=cache).get_result(result_id)


def test_what_was_never_enqueued_leaves_nothing_in_the_cache(use, cache):
    backend, ids = use(RESULTS_CACHE=cache), []

    def refuse(task_result: Any, **kwargs: Any) -> None:
        ids.append(task_result.id)
        raise PermissionError("not this one")

    task_enqueued.connect(refuse)
    try:
        with pytest.raises(PermissionError, match="not this one"):
            echo.enqueue()
    finally:
        task_enqueued.disconnect(refuse)
    with pytest.raises(TaskResultDoesNotExist):
        backend.get_result(ids[0])


def test_deferred_tasks_that_are_abandoned_are_failed_in_the_cache_too(use, cache, read_elsewhere):
    backend = use(RESULTS_CACHE=cache)
    late = echo.using(run_after=timezone.now() + timedelta(days=1)).enqueue()
    assert " READY " in read_elsewhere(late.id)
    backend.close()
    assert read_elsewhere(late.id) == as_text(backend.get_result(late.id))
    assert " FAILED " in read_elsewhere(late.id)


def test_a_failing_cache_is_logged_once_per_outage_and_harms_no_task(use, outage, caplog):
    backend = use(RESULTS_CACHE="breakable")

    def logged() -> int:
        backend.join(TIMEOUT)
        records = [record for record in caplog.records if record.name == "django_tasks_local"]
        assert all("'breakable'" in record.message for record in records)
        assert all(str(outage) in record.exc_text for record in records)
        return len(records)

    for number in (1, 2):
        assert finished(echo.enqueue()).status == SUCCESSFUL
        assert logged() == number - 1
        shutil.rmtree(outage)
        outage.touch()
        results = [finished(echo.enqueue(number)) for number in range(5)]
        assert [result.return_value for result in results] == [[[n], {}] for n in range(5)]
        assert [backend.get_result(result.id) for result in results] == results
        assert logged() == number
        outage.unlink()


def test_an_outage_of_the_cache_is_logged_once_whoever_meets_it(use, outage, caplog):
    backend = use(RESULTS_CACHE="breakable", MAX_RESULTS=1)
    finished(echo.enqueue())
    shutil.rmtree(outage)
    outage.touch()
    in_threads(8, lambda: [echo.enqueue() for _ in range(20)])
    with transaction.atomic():  # Whose commit finds results that have gone.
        for _ in range(2):
            echo.enqueue()
            backend.join(TIMEOUT)
    echo.enqueue()
    backend.join(TIMEOUT)
    assert len([record for record in caplog.records if record.name == "django_tasks_local"]) == 1


@pytest.mark.parametrize(
    "caches",
    [
        {"other": {"BACKEND": "django.core.cache.backends.locmem.LocMemCache"}},
        {"other": {"BACKEND": "django.core.cache.backends.dummy.DummyCache"}},
        {},
    ],
    ids=["local-memory", "dummy", "unknown"],
)
def test_a_cache_that_processes_do_not_share_is_refused_with_the_reason(kind, caches):
    backend_class = {"ThreadPoolBackend": ThreadPoolBackend}.get(kind, ProcessPoolBackend)
    with override_settings(CACHES={**settings.CACHES, **caches}):
        with pytest.raises(InvalidTaskBackend) as caught:
            backend_class("mine", {"OPTIONS": {"RESULTS_CACHE": "other"}})
        backend_class("mine", {"OPTIONS": {"RESULTS_CACHE": "files"}})
    for word in ("'mine'", "RESULTS_CACHE", "'other'", "CACHES", "local-memory", "dummy", "share"):
        assert word in str(caught.value)


def test_without_a_cache_the_message_says_what_to_do(backend):
    with pytest.raises(TaskResultDoesNotExist, match="RESULTS_CACHE"):
        backend.get_result("0" * 36)


# --- Growing out ----------------------------------------------------------------------------------

GROWING_TASKS = """
from django.tasks import task

@task
def add(a, b=0):
    return {"sum": a + b, "of": [a, b]}

@task
def fail(key):
    return {}[key]

@task
async def double(number):
    return 2 * number

@task(takes_context=True)
def identify(context, text):
    return [context.task_result.id, context.attempt, context.task_result.args]
"""

GROWING_SETTINGS = """
import os
from mysite import steps
from mysite.settings import *

STEP = os.environ["STEP"]
TASKS = dict.fromkeys(steps.TASKS, getattr(steps, STEP))
INSTALLED_APPS += {"DATABASE": ["django_tasks_db"], "REDIS": ["django_rq"]}.get(STEP, [])
if "TASKS_TEST_REDIS" in os.environ:
    RQ_QUEUES = {"default": {**steps.RQ_QUEUES["default"], "URL": os.environ["TASKS_TEST_REDIS"]}}
"""

GROWING_SCRIPT = """
import json, subprocess, sys
import django
django.setup()
from django.tasks import task_backends
from myapp import growing

def comparable(result):
    value = result.return_value if result.status == "SUCCESSFUL" else None
    errors = [error.exception_class_path for error in result.errors]
    if isinstance(value, list):
        value = ["its id" if part == result.id else part for part in value]
    return [str(result.status), list(result.args), result.kwargs, value, errors]

if __name__ == "__main__":
    backend = task_backends["default"]
    results = [
        growing.add.enqueue(1, b=2),
        growing.fail.enqueue("x"),
        growing.double.enqueue(4),
        growing.identify.enqueue("a"),
    ]
    if len(sys.argv) > 1:
        subprocess.run([sys.executable, "-m", "django", *sys.argv[1:]], check=True)
    for result in results if hasattr(backend, "wait_result") else []:
        backend.wait_result(result.id)
    if backend.supports_get_result:
        results = [backend.get_result(result.id) for result in results]
    try:
        prioritised = bool(growing.add.using(priority=1))
    except Exception:
        prioritised = False
    print(json.dumps([prioritised, *map(comparable, results)]))
"""

ARGUMENTS = [[[1], {"b": 2}], [["x"], {}], [[4], {}], [["a"], {}]]
OUTCOMES = [
    ["SUCCESSFUL", {"sum": 3, "of": [1, 2]}, []],
    ["FAILED", None, ["builtins.KeyError"]],
    ["SUCCESSFUL", 8, []],
    ["SUCCESSFUL", ["its id", 1, ["a"]], []],
]


def readme_command(command: str) -> list[str]:
    """Return the arguments of a management command as the README gives it."""
    return re.search(rf"`python manage.py ({command}[^`]*)`", readme())[1].split()


@pytest.mark.parametrize("step", ["DUMMY", "IMMEDIATE", "THREADS", "PROCESSES", "DATABASE", "REDIS"])
def test_the_same_tasks_module_runs_unchanged_wherever_the_site_grows(project, step):
    environ = {"STEP": step, "DJANGO_SETTINGS_MODULE": "mysite.growing"}
    worker = []
    if step == "DATABASE":
        pytest.importorskip("django_tasks_db")
        worker = [*readme_command("db_worker"), "--batch", "--no-startup-delay"]
    if step == "REDIS":
        pytest.importorskip("django_tasks_rq")
        worker = [*readme_command("rqworker"), "--burst"]
        if not REDIS:
            pytest.skip("TASKS_TEST_REDIS, the URL of a Redis server, is not set")
    tasks, script = (
        text.replace("django.tasks", "django_tasks") if BACKPORT else text
        for text in (GROWING_TASKS, GROWING_SCRIPT)
    )
    (project / "mysite/growing.py").write_text(GROWING_SETTINGS)
    (project / "myapp/growing.py").write_text(tasks)
    (project / "script.py").write_text(script)
    if step == "DATABASE":
        succeed(project, "-m", "django", *readme_command("migrate"), "--verbosity=0", **environ)
    output = succeed(project, "script.py", *worker, **environ)
    prioritised, *results = json.loads(output.splitlines()[-1])
    assert prioritised == (step != "REDIS")
    assert [result[1:3] for result in results] == ARGUMENTS
    ready = [["READY", None, []]] * len(OUTCOMES)
    outcomes = [[status, *rest] for status, _, _, *rest in results]
    assert outcomes == (ready if step == "DUMMY" else OUTCOMES)


# --- Vendored use ---------------------------------------------------------------------------------

VENDORED_TASKS = """
import os, sys
from django.tasks import task
from myproject.tasks_local import current_result_id

@task
def tell():
    return [current_result_id.get(), os.getpid(), "django_tasks_local" in sys.modules]
"""

VENDORED_SCRIPT = """
import os
import django
django.setup()
from django.tasks import task_backends
from myproject.tasks import tell

if __name__ == "__main__":
    for alias in ("default", "cpu"):
        result = tell.using(backend=alias).enqueue()
        result_id, pid, original = task_backends[alias].wait_result(result.id).return_value
        assert (result_id, pid == os.getpid(), original) == (result.id, alias == "default", False)
        assert type(task_backends[alias]).__module__ == "myproject.tasks_local"
    print("done")
"""


def test_a_copy_of_the_file_in_a_project_works_in_threads_and_processes(project):
    threads = re.search(r'`"BACKEND": "(myproject\.tasks_local\.\w+)"`', readme())[1]
    processes = threads.replace("ThreadPool", "ProcessPool")
    tasks = {"default": {"BACKEND": threads}, "cpu": {"BACKEND": processes}}
    package = project / "myproject"
    package.mkdir()
    shutil.copy(django_tasks_local.__file__, package / "tasks_local.py")
    files = {
        package / "__init__.py": "",
        package / "settings.py": f"SECRET_KEY = 'tests'\nTASKS = {tasks}\n",
        package / "tasks.py": VENDORED_TASKS,
        project / "script.py": VENDORED_SCRIPT,
    }
    for path, text in files.items():
        path.write_text(text.replace("django.tasks", "django_tasks") if BACKPORT else text)
    output = succeed(project, "script.py", DJANGO_SETTINGS_MODULE="myproject.settings")
    assert output == "done\n"


def test_the_file_names_its_licence_version_and_home_in_itself():
    source = Path(django_tasks_local.__file__).read_text(encoding="utf-8")
    assert "SPDX-License-Identifier: MIT" in source
    assert re.search(r'^__version__ = "\d+\.\d+\.\d+"$', source, re.MULTILINE)
    assert re.search(r"^Home: https://\S+$", django_tasks_local.__doc__, re.MULTILINE)
    assert f"**{django_tasks_local.__version__}**" in readme(), "the changelog knows the version"


# Benchmarks, run by: python -m pytest -m bench

PACKAGE = "django.tasks" if django.VERSION >= (6, 0) else "django_tasks"
WORKERS = 2
PROCESSES = "process executor"
bench = pytest.mark.bench
forks = pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")  # The bare executor does.
clock = time.perf_counter  # One clock for all processes, on Linux at least.
gate_numbers = itertools.count()


def give_back(value: Any = None) -> Any:
    return value


def read_clock() -> float:
    return clock()


def count(steps: int) -> int:
    return sum(1 for _ in range(steps))


def arrive_and_wait_at(path: str, number: int) -> None:
    Path(f"{path}.{number}").touch()
    pass_gate(path)


class Pool(NamedTuple):
    submitter: Callable[..., Any]  # From a function to what submits a call of it.
    value: Callable[..., Any]  # Waits for one.
    drain: Callable[..., Any]  # Waits for all.
    backend: Any = None


class Table:
    """Seconds by (contestant, figure), and the rows that compare their medians."""

    def __init__(self) -> None:
        self.seconds: dict[tuple[str, str], list[float]] = defaultdict(list)
        self.rows: list[str] = []

    def compare(self, who: str, figure: str, base: str, of: str = "", limit: float = 0) -> str:
        """Add a row and return "", or return the row if the ratio exceeds the limit."""
        median, basis = (
            statistics.median(self.seconds[key]) for key in ((who, figure), (base, of or figure))
        )
        amount = f"{median:,.0f} B " if figure.startswith("bytes") else f"{median * 1e6:,.1f} µs"
        exceeded = bool(limit) and median > limit * basis
        bound = f"<= {limit:.2f}{' EXCEEDED' * exceeded}" if limit else ""
        ratio = f"{amount:>15} {median / basis:8.3f} {bound:<16} of {base}: {of or figure}"
        self.rows.append(f"{who + ': ' + figure:<50} {ratio}")
        return exceeded * self.rows[-1]


@pytest.fixture(scope="module")
def table(request: pytest.FixtureRequest) -> Iterator[Table]:
    table = Table()
    yield table
    capture = request.config.pluginmanager.get_plugin("capturemanager")
    with capture.global_and_fixture_disabled():
        print("\n", *table.rows, sep="\n")


@pytest.fixture
def pools(tmp_path: Path) -> Iterator[dict[str, Pool]]:
    """Return the contestants, all their workers started."""

    def submitter(alias: str, function: Callable[..., Any]) -> Callable[..., Any]:
        return task(function).using(backend=alias).enqueue

    options = {"MAX_WORKERS": WORKERS, "MAX_RESULTS": 100_000}
    params: dict[str, Any] = {
        "threads": {"BACKEND": "django_tasks_local.ThreadPoolBackend", "OPTIONS": options},
        "processes": {"BACKEND": "django_tasks_local.ProcessPoolBackend", "OPTIONS": options},
        "inline": {"BACKEND": f"{PACKAGE}.backends.immediate.ImmediateBackend"},
    }
    log = logging.getLogger(PACKAGE)
    log.setLevel(logging.WARNING)  # Two records a task cost as much as the task, and all the same.
    pools = {"inline": Pool(functools.partial(submitter, "inline"), lambda r: r.return_value, len)}
    with (
        override_settings(TASKS={"default": params["threads"], **params}),
        concurrent.futures.ProcessPoolExecutor(WORKERS) as process_executor,
        concurrent.futures.ThreadPoolExecutor(WORKERS) as thread_executor,
    ):
        for name, executor in ((PROCESSES, process_executor), ("thread executor", thread_executor)):
            submit = functools.partial(functools.partial, executor.submit)
            pools[name] = Pool(submit, lambda f: f.result(TIMEOUT), concurrent.futures.wait)
        for alias in ("threads", "processes"):
            value, backend = lambda result: finished(result).return_value, task_backends[alias]
            submit = functools.partial(submitter, alias)
            pools[alias] = Pool(submit, value, lambda _, join=backend.join: join(600), backend)
        for who in set(pools) - {"inline"}:
            release(occupy(pools[who], tmp_path))
        yield pools
        for alias in ("threads", "processes"):
            pools[alias].backend.close()
    log.setLevel(logging.NOTSET)


def occupy(pool: Pool, directory: Path) -> Gate:
    """Return the gate at which all workers of the pool wait."""
    gate = Gate(directory / f"gate{next(gate_numbers)}")
    submit = pool.submitter(arrive_and_wait_at)
    for number in range(WORKERS):
        submit(gate.path, number)
    end = time.monotonic() + TIMEOUT
    while not all(Path(f"{gate.path}.{number}").exists() for number in range(WORKERS)):
        assert time.monotonic() < end
        time.sleep(0.001)
    gc.collect()
    return gate


def release(gate: Gate) -> None:
    gate.open()
    gate.file.close()


IDLE, STREAM, FIRST = "enqueue, idle pool", "task, enqueued while they run", "first instruction"
BUSY, COST, PENDING, FINISHED = "enqueue, busy pool", "task", "get_result, pending", "get_result"


def measure_idle(table: Table, who: str, pool: Pool) -> None:
    submit = pool.submitter(read_clock)
    for _ in range(100):
        time.sleep(0.002)  # As between two requests: for inline, too, nothing is warm.
        begun = clock()
        handle = submit()
        table.seconds[who, IDLE].append(clock() - begun)
        table.seconds[who, FIRST].append(pool.value(handle) - begun)
    gc.collect()
    submit, begun = pool.submitter(give_back), clock()
    handles = [submit() for _ in range(1000)]
    pool.drain(handles)
    table.seconds[who, STREAM].append((clock() - begun) / len(handles))
    assert pool.value(handles[-1]) is None


def measure_backlog(table: Table, who: str, pool: Pool, pending: int, directory: Path) -> None:
    gate, submit = occupy(pool, directory), pool.submitter(give_back)
    handles: deque[Any] = deque(maxlen=1000)  # What the caller keeps makes garbage collection slower.
    begun = clock()
    for _ in range(pending):
        handles.append(submit())
    enqueuing = clock() - begun
    table.seconds[who, f"{BUSY} {pending:,}"].append(enqueuing / pending)
    measure_reading(table.seconds[who, f"{PENDING} {pending:,}"], pool, handles)
    begun = clock()
    release(gate)
    pool.drain(handles)
    table.seconds[who, f"{COST} {pending:,}"].append((enqueuing + clock() - begun) / pending)
    measure_reading(table.seconds[who, FINISHED], pool, handles)


def measure_reading(seconds: list[float], pool: Pool, results: Iterable[Any]) -> None:
    for result in itertools.islice(results, 500 if pool.backend else 0):
        begun = clock()
        pool.backend.get_result(result.id)
        seconds.append(clock() - begun)


@bench
@forks
@pytest.mark.timeout(1200)
def test_costs_little_with_few_and_with_many_tasks_pending(
    benchmark: Any, table: Table, pools: dict[str, Pool], tmp_path: Path
) -> None:
    ours = ("threads", "processes")

    def measure() -> None:
        for who, pool in [*pools.items()] * 5:
            measure_idle(table, who, pool)
            if who != "inline":
                measure_backlog(table, who, pool, 1000, tmp_path)
        for pending, who in itertools.product((10_000, 100_000), ours):
            measure_backlog(table, who, pools[who], pending, tmp_path)

    benchmark.pedantic(measure, rounds=3)
    cost, busy, read = f"{COST} 1,000", f"{BUSY} 1,000", f"{PENDING} 1,000"
    wanted = [
        *(("threads", figure, "inline", STREAM, 0.75) for figure in (STREAM, cost)),
        ("threads", busy, "inline", STREAM, 0.2),
        ("threads", FIRST, "inline", FIRST, 1.2),
        *(("processes", figure, PROCESSES, figure, 1.0) for figure in (STREAM, cost)),
        ("processes", busy, "inline", STREAM, 0.25),
        ("processes", FIRST, PROCESSES, FIRST, 0.6),
        *((who, figure, "inline", STREAM, 0.05) for who in ours for figure in (read, FINISHED)),
        *(
            (who, f"{figure} {pending}", who, f"{figure} 1,000", 1.3)
            for who in ours
            for figure in (BUSY, COST, PENDING)
            for pending in ("10,000", "100,000")
        ),
        *((who, IDLE, "inline", STREAM) for who in pools),
        *((who, STREAM, "inline", STREAM) for who in pools),
        *((who, busy, "inline", STREAM) for who in ("thread executor", PROCESSES)),
        *((who, FIRST, "inline", FIRST) for who in pools),
    ]
    assert not [*filter(None, itertools.starmap(table.compare, wanted))]


@bench
@forks
@pytest.mark.timeout(300)
def test_takes_at_most_a_kibibyte_for_a_task(table: Table, pools: dict[str, Pool], tmp_path: Path) -> None:
    number, exceeded = 10_000, []
    table.seconds["limit", "1 KiB"] = [1024]
    for who in ("threads", "processes"):
        gate, submit = occupy(pools[who], tmp_path), pools[who].submitter(give_back)
        tracemalloc.start()
        for figure in ("bytes per pending task", "bytes per kept result"):
            if "pending" in figure:
                for value in range(number):
                    submit(value)
            else:
                release(gate)
                pools[who].drain(())
            gc.collect()
            table.seconds[who, figure] = [tracemalloc.get_traced_memory()[0] / number]
            exceeded.append(table.compare(who, figure, "limit", "1 KiB", 1.0))
        tracemalloc.stop()
    assert not [*filter(None, exceeded)]


@bench
@forks
@pytest.mark.timeout(300)
def test_speeds_up_computing_like_a_bare_process_pool(
    benchmark: Any, table: Table, pools: dict[str, Pool]
) -> None:
    begun, figure = clock(), "8 x 0.5 s of computing"
    count(1_000_000)
    steps = int(1_000_000 * 0.5 / (clock() - begun))

    def measure() -> None:
        for who in ("processes", PROCESSES):
            submit, begun = pools[who].submitter(count), clock()
            handles = [submit(steps) for _ in range(8)]
            pools[who].drain(handles)
            table.seconds[who, figure].append(clock() - begun)
            assert pools[who].value(handles[-1]) == steps

    benchmark.pedantic(measure, rounds=5)
    assert not table.compare("processes", figure, PROCESSES, limit=1 / 0.97)


TASKS = {"default": {"BACKEND": "django_tasks_local.ProcessPoolBackend"}}
FRESH = {  # By contestant and figure: what is timed, and what comes before and after it.
    (PACKAGE, "import"): ("", f"import {PACKAGE}", ""),
    ("django_tasks_local", "import"): (
        "",
        "import django_tasks_local",
        "assert not {'multiprocessing', 'ctypes', 'concurrent.futures.process'} & {*sys.modules}",
    ),
    ("processes", "first result, cold"): (
        f"from django.conf import settings; settings.configure(TASKS={TASKS}); import calendar; "
        f"from {PACKAGE} import task, task_backends; leap = task(calendar.isleap)",
        "value = task_backends['default'].wait_result(leap.enqueue(2024).id).return_value",
        "assert value is True",
    ),
    (PROCESSES, "first result, cold"): (
        "import calendar, concurrent.futures; pool = concurrent.futures.ProcessPoolExecutor()",
        "value = pool.submit(calendar.isleap, 2024).result()",
        "assert value is True",
    ),
}


@bench
@pytest.mark.timeout(300)
def test_takes_hardly_longer_to_import_than_django_tasks(
    benchmark: Any, table: Table, tmp_path: Path
) -> None:
    begin, end = "import sys, time; {}; t = time.perf_counter()", "t = time.perf_counter() - t"
    code = f"{begin}; {{}}; {end}; {{}}; print(t)"
    paths = {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    paths |= {"PYTHONPYCACHEPREFIX": str(tmp_path), "PYTHONDONTWRITEBYTECODE": ""}

    def measure(keep: bool = True) -> None:
        for key, steps in FRESH.items():
            command = [sys.executable, "-c", code.format(*(step or "0" for step in steps))]
            output = subprocess.check_output(command, env={**os.environ, **paths}, timeout=60)
            if keep:
                table.seconds[key].append(float(output))

    measure(keep=False)  # Which compiles them.
    benchmark.pedantic(measure, rounds=11)
    assert not table.compare("processes", "first result, cold", PROCESSES)
    assert not table.compare("django_tasks_local", "import", PACKAGE, limit=1.1)
