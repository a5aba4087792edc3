"""The tests. The slow ones: ``pytest -m slow``; the benchmark: ``pytest -m bench``."""

import ast
import asyncio
import atexit
import builtins
import concurrent.futures
import contextlib
import contextvars
import ctypes  # noqa: F401 - for evaluate().
import fcntl
import functools
import gc
import http.cookiejar
import itertools
import json
import logging
import multiprocessing.forkserver
import os
import pickle
import py_compile
import queue
import random
import re
import select
import shlex
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
import tokenize
import tracemalloc
import types
import urllib.error
import urllib.parse
import urllib.request
import uuid
import venv
import weakref
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from datetime import datetime, timedelta
from datetime import timezone as datetimes
from pathlib import Path
from typing import Any, NamedTuple

import django
import pytest
from asgiref.sync import async_to_sync
from django.conf import settings
from django.core.cache import caches  # noqa: F401 - for evaluate().
from django.core.cache.backends.base import BaseCache
from django.core.cache.backends.locmem import LocMemCache
from django.test import override_settings
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

if "TASKS_TEST_DIRECTORY" not in os.environ:  # Children have it from their parent.
    os.environ["TASKS_TEST_DIRECTORY"] = tempfile.mkdtemp()
    # They import this file, too, and may not keep what they compile.
    py_compile.compile(__file__)
DIRECTORY = os.environ["TASKS_TEST_DIRECTORY"]
POSTGRES = os.environ.get("TASKS_TEST_POSTGRES")  # A connection string.
REDIS = os.environ.get("TASKS_TEST_REDIS")  # A URL.
SQLITE = {
    "ENGINE": "django.db.backends.sqlite3",
    "NAME": f"{DIRECTORY}/db.sqlite3",
    "OPTIONS": {"timeout": 30},
}
DATABASES = {"default": SQLITE, "kept": {**SQLITE, "CONN_MAX_AGE": None}}
FILES = {
    "BACKEND": "django.core.cache.backends.filebased.FileBasedCache",
    "LOCATION": f"{DIRECTORY}/cache",
}

if not settings.configured:  # A child process has the settings of its parent.
    if POSTGRES:
        from psycopg.conninfo import conninfo_to_dict

        name = f"tasks-{os.getpid()}"
        server = {
            "ENGINE": "django.db.backends.postgresql",
            "NAME": "postgres",  # Unless POSTGRES names another one.
            "OPTIONS": conninfo_to_dict(POSTGRES, application_name=name),
        }
        DATABASES["postgres"] = server
        DATABASES["postgres_kept"] = {**server, "CONN_MAX_AGE": None}
    locmem = {"BACKEND": "django.core.cache.backends.locmem.LocMemCache"}
    settings.configure(
        DATABASES=DATABASES,
        CACHES={"default": locmem, "files": FILES},
        TASKS={"default": {"BACKEND": "django_tasks_local.ThreadPoolBackend"}},
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
from django_tasks_local import (
    ProcessPoolBackend,
    TaskQueueFull,
    ThreadPoolBackend,
    current_result_id,
)

READY, RUNNING = TaskResultStatus.READY, TaskResultStatus.RUNNING
SUCCESSFUL, FAILED = TaskResultStatus.SUCCESSFUL, TaskResultStatus.FAILED
TIMEOUT = 30  # Seconds; it only ends a hang.
socket.setdefaulttimeout(TIMEOUT)  # As some sites have: child processes work with it.
DAY = timedelta(days=1)
processes = pytest.mark.parametrize("kind", ["ProcessPoolBackend"])


class Gate:
    """A gate that tasks wait at (``pass_gate``) until it is opened."""

    def __init__(self, path):
        self.path = str(path)
        self.file = path.open("w")
        fcntl.flock(self.file, fcntl.LOCK_EX)

    def open(self):
        if not self.file.closed:
            # Closing is not enough: a forked process may hold the file, too.
            fcntl.flock(self.file, fcntl.LOCK_UN)
            self.file.close()


def pass_gate(path):
    """Wait until the gate is open."""
    with open(path) as file:
        fcntl.flock(file, fcntl.LOCK_SH)


@task
def echo(*args, **kwargs):
    """Return what it was given."""
    return [list(args), kwargs]


@task
def wait_at(path, value=None):
    """Return the value once the gate is open."""
    pass_gate(path)
    return value


@task
def fail(message):
    """Raise an error with this message."""
    raise ValueError(message)


@task
def identify():
    """Return the ids of the process, its parent and the thread."""
    return [os.getpid(), os.getppid(), threading.get_native_id()]


@task
def evaluate(expression, *args):
    """Return the value of an expression, which finds ``args`` and all of this file."""
    return eval(expression, {**globals(), "args": args})


@pytest.fixture(scope="session", autouse=True)
def fork_server():
    """Have what this file imports imported once for all child processes."""
    preloaded = ["django_tasks_local", "hypothesis", "pytest"]
    multiprocessing.set_forkserver_preload(preloaded)
    multiprocessing.forkserver.ensure_running()


@pytest.fixture(params=["ThreadPoolBackend", "ProcessPoolBackend"])
def kind(request):
    """Return the name of a backend class; the test runs for each."""
    return request.param


@pytest.fixture
def use(kind):
    """Return a function that makes a pool of this kind the default backend."""
    with contextlib.ExitStack() as stack:

        def configure(params=None, known=None, **options):
            default = {"BACKEND": f"django_tasks_local.{kind}", "OPTIONS": options}
            changed = {"TASKS": {"default": default | (params or {})}}
            if known:
                changed["CACHES"] = known
            stack.enter_context(override_settings(**changed))
            stack.callback(lambda: task_backends["default"].close())
            return task_backends["default"]

        yield configure


@pytest.fixture
def both(kind):
    """Have two aliases, "default" for threads and "other" for processes, or reverse."""
    kinds = sorted(["ThreadPoolBackend", "ProcessPoolBackend"], key=kind.__ne__)
    paths = [f"django_tasks_local.{name}" for name in kinds]
    options = {"MAX_WORKERS": 3, "MAX_RESULTS": 10**7}
    default, other = [{"BACKEND": path, "OPTIONS": options} for path in paths]
    with override_settings(TASKS={"default": default, "other": other}):
        yield [task_backends[alias] for alias in ("default", "other")]
        for backend in task_backends.all():
            backend.close()


@pytest.fixture
def gate(tmp_path):
    """Return a gate, which the end of the test opens."""
    gate = Gate(tmp_path / "gate")
    yield gate
    gate.open()


@pytest.fixture
def connect():
    """Return a function that connects a receiver to signals until the test ends."""
    with contextlib.ExitStack() as stack:

        def connect_all(receiver, *signals):
            for source in signals:
                source.connect(receiver)
                stack.callback(source.disconnect, receiver)

        yield connect_all


@pytest.fixture
def signals(connect):
    """Return a queue of (name, task result): each signal of a task, as it is sent."""
    sent, names = queue.Queue(), {task_enqueued: "enqueued", task_started: "started"}
    names[task_finished] = "finished"

    def receive(signal, task_result, **kwargs):
        sent.put((names[signal], task_result))

    connect(receive, *names)
    return sent


def finished(result, timeout=TIMEOUT):
    """Return the finished result."""
    return task_backends[result.backend].wait_result(result.id, timeout)


def outcome(result):
    """Return what a task returned, or why it failed."""
    done = finished(result)
    return done.return_value if done.status == SUCCESSFUL else done.errors[0].traceback


def errors(result):
    """Return the class and the traceback that a task failed with."""
    assert result.status == FAILED
    [error] = result.errors
    return f"{error.exception_class_path}\n{error.traceback}"


def start_at(gate, signals, value=None):
    """Return the result of a task that has started, and waits at the gate."""
    waiting = wait_at.using(priority=100).enqueue(gate.path, value)
    while True:
        name, result = signals.get(timeout=TIMEOUT)
        if (name, result.id) == ("started", waiting.id):
            return result


def is_known(backend, result_id):
    """Return whether the backend has this result."""
    return not error_of(backend.get_result, result_id)


def numbers(backend):
    """Return how many tasks are pending, deferred, running."""
    return [backend.stats()[name] for name in ("pending", "deferred", "running")]


def refusal(kind, params):
    """Return with which text ``TASKS["default"]`` is refused; "" if it is not."""
    entry = {"BACKEND": f"django_tasks_local.{kind}", **params}
    with override_settings(TASKS={"default": entry}):
        try:
            task_backends["default"].validate_task(echo)
        except InvalidTaskBackend as error:
            return str(error)
    return ""


def error_of(call, *args):
    """Return the name of the exception that a call raises, or an empty text."""
    try:
        call(*args)
    except Exception as error:
        return type(error).__name__
    return ""


def wait_until(condition):
    """Wait for what no signal tells."""
    end = time.monotonic() + TIMEOUT
    while not condition():
        assert time.monotonic() < end
        os.sched_yield()


# --- 1. Options -----------------------------------------------------------------------

COUNTS = [True, "4", 2.5, 1.0, 0, -1, [1]]
SECONDS = [-1, "1", True, float("nan"), 1e9]
FOR_BOTH = {  # Option: right values, wrong values, what is right.
    "MAX_WORKERS": ([1], [*COUNTS, None], "a positive integer"),
    "MAX_RESULTS": ([1], [*COUNTS, None], "a positive integer"),
    "MAX_PENDING": ([None, 1], COUNTS, "a positive integer"),
    "SHUTDOWN_TIMEOUT": ([None, 0, 0.5, 60], SECONDS, "seconds"),
    "RESULTS_CACHE": ([None, "files"], ["default", "unknown", 0], "an alias"),
    "MAX_WORKER": ([], [41], "left out"),
    "max_workers": ([], [41, None], "left out"),
    "QUEUES": ([], [["mail"]], "left out (perhaps it stands beside"),
}
FOR_PROCESSES = {
    "TASK_TIMEOUT": ([None, 0.5, 60], [*SECONDS, 0], "seconds"),
    "MAX_TASKS_PER_CHILD": ([None, 1], COUNTS, "a positive integer"),
    "START_METHOD": ([None, "forkserver", "spawn"], ["fork", 1, ""], "'spawn'"),
    "INITIALIZER": ([None, "site.set_up"], ["name", 1, ""], "a dotted path"),
}


def test_wrong_options_are_refused_with_place_name_value_and_what_is_right(kind):
    others = FOR_PROCESSES
    if kind == "ThreadPoolBackend":
        others = {name: ([], [1, None], "left out") for name in FOR_PROCESSES}
    for name, (rights, wrongs, what) in {**FOR_BOTH, **others}.items():
        for right in rights:  # They come first: an equal value hides no wrong one.
            assert refusal(kind, {"OPTIONS": {name: right}}) == ""
        for wrong in wrongs:
            text = refusal(kind, {"OPTIONS": {name: wrong}})
            parts = ("TASKS['default']['OPTIONS']", f"{name!r} must be ", what)
            assert all(part in text for part in (*parts, f"{wrong!r}", "MAX_RESULTS"))


def test_options_in_the_wrong_place_are_told_the_right_one(kind):
    for name in ("MAX_WORKERS", "TASK_TIMEOUT"):
        text = refusal(kind, {name: 3})
        assert all(p in text for p in ("TASKS['default']['OPTIONS']", name, "3"))
    text = refusal(kind, {"OPTIONS": ["MAX_WORKERS"]})
    assert "TASKS['default']['OPTIONS'] must be a dict" in text
    for wrong in ("unknown", None, ["default"], ""):
        text = refusal(kind, {"ENQUEUE_ON_COMMIT": wrong})
        assert "TASKS['default']['ENQUEUE_ON_COMMIT']" in text
        assert repr(wrong) in text


# --- 2. The backends: enqueue, arguments, get_result ----------------------------------


def test_a_backend_can_do_everything_and_starts_nothing_before_a_task(use):
    threads = set(threading.enumerate())
    backend = use(MAX_WORKERS=3)
    names = ("get_result", "async_task", "priority", "defer")
    assert all(getattr(backend, f"supports_{name}") is True for name in names)
    assert not is_known(backend, "none")
    backend.join()
    backend.close()
    assert set(threading.enumerate()) == threads
    assert backend.stats()["workers"] == 0


def test_enqueue_stores_ready_then_announces_then_hands_over(use, connect):
    backend, seen = use(MAX_WORKERS=1), []

    def receive(task_result, **kwargs):
        backend.join(TIMEOUT)  # The task is not in the queue yet.
        backend.close()
        seen.append((backend.get_result(task_result.id).status, numbers(backend)[2]))

    connect(receive, task_enqueued)
    result = backend.enqueue(echo)
    assert seen == [(READY, 0)]
    assert (result.status, result.attempts, result.backend) == (READY, 0, "default")
    assert str(uuid.UUID(result.id)) == result.id
    given = [result.args, result.kwargs, result.errors, result.worker_ids]
    assert given == [[], {}, [], []]
    assert result.started_at is result.last_attempted_at is result.finished_at is None
    with pytest.raises(ValueError, match="not finished"):
        result.return_value  # noqa: B018
    assert outcome(backend.enqueue(echo, kwargs={"a": 1})) == [[], {"a": 1}]
    assert outcome(backend.enqueue(echo, args=(1,), kwargs={})) == [[1], {}]


@pytest.mark.parametrize("use_tz", [True, False])
def test_times_are_true_under_both_time_zone_settings(use, use_tz):
    use(MAX_WORKERS=1)
    with override_settings(USE_TZ=use_tz):
        before = timezone.now()
        done = finished(echo.enqueue())
        times = [before, done.enqueued_at, done.started_at, done.finished_at]
    assert times == sorted(times)
    assert done.last_attempted_at == done.started_at
    assert all(timezone.is_aware(moment) is use_tz for moment in times)


def test_a_task_gets_a_copy_of_its_arguments_as_the_result_shows_them(use, gate):
    use(MAX_WORKERS=1)
    wait_at.enqueue(gate.path)
    argument, option = [1, (2,), b"caf\xc3\xa9"], {"k": OrderedDict(deep=())}
    result = echo.enqueue(argument, option=option)
    argument.append(3)
    option["k"]["deep"] = "changed"
    expected = [[[1, [2], "café"]], {"option": {"k": {"deep": []}}}]
    assert [result.args, result.kwargs] == expected
    result.args[0].append("mine")
    result.kwargs["mine"] = 1
    gate.open()
    done = finished(result)
    assert done.return_value == [done.args, done.kwargs] == expected
    for own in (done.return_value, done.errors, done.worker_ids, done.args):
        own.append("mine")
    again = echo.get_result(result.id)
    assert again.return_value == [again.args, again.kwargs] == expected
    assert (again.errors, len(again.worker_ids)) == ([], 1)


RECURSIVE = []
RECURSIVE.append(RECURSIVE)
GOOD = {"tuple": (1, (b"x", None)), "text": mark_safe("<b>"), "n": http.HTTPStatus.OK}
BAD = {
    "set": lambda: {1},
    "SimpleNamespace": types.SimpleNamespace,  # As a model instance is.
    "datetime": lambda: datetime(2020, 1, 1),
    "function": lambda: lambda: 1,
    "lock": threading.Lock,
    "ValueError": lambda: ValueError("returned"),
    "bytes": lambda: b"\xff",
    "list": lambda: RECURSIVE,
}


def test_arguments_and_return_values_are_normalised(use, kind):
    use(MAX_WORKERS=1)
    good = {"tuple": [1, ["x", None]], "text": "<b>", "n": 200}
    assert outcome(echo.enqueue(GOOD, k=GOOD)) == [[good], {"k": good}]
    assert outcome(evaluate.enqueue("GOOD")) == good
    assert outcome(evaluate.enqueue("'x' * args[0]", 10_000_000)) == "x" * 10_000_000
    first, local = outcome(identify.enqueue()), "type('Local', (str,), {})('text')"
    for found in (echo.enqueue(eval(local)), evaluate.enqueue(local)):
        can_cross = kind == "ThreadPoolBackend"  # Its class cannot be pickled.
        assert ("text" if can_cross else "pickle") in str(outcome(found))
    assert outcome(identify.enqueue()) == first


def test_values_that_are_not_json_are_refused_with_the_cure(kind, use, signals):
    backend, is_thread = use(MAX_WORKERS=1), kind == "ThreadPoolBackend"
    before, first = backend.stats()["finished"], outcome(identify.enqueue())
    for name, make in BAD.items():
        parts = [name, "UTF-8 bytes", "the primary key"]
        for place, args, kwargs in (("2", [1, make()], {}), ("'k'", [], {"k": make()})):
            error = TypeError if is_thread and name != "bytes" else ValueError
            with pytest.raises(error) as raised:
                echo.enqueue(*args, **kwargs)
            text = str(raised.value)
            assert all(part in text for part in (*parts, place, echo.module_path))
        done = finished(evaluate.enqueue("BAD[args[0]]()", name))
        assert done.errors[0].exception_class in (TypeError, ValueError)
        parts += ["'return value'", evaluate.module_path]
        assert all(part in errors(done) for part in parts)
        with pytest.raises(ValueError, match="failed"):
            done.return_value  # noqa: B018
    assert outcome(identify.enqueue()) == first
    assert backend.stats()["finished"] == before + 2 + len(BAD)


def test_invalid_tasks_are_refused_before_anything_happens(use, signals):
    backend, naive = use(), datetime(2020, 1, 1)
    before = backend.stats()
    wrongs = [("queue_name", "unknown"), ("priority", 101), ("run_after", naive)]
    for name, value in wrongs:
        unchecked = echo.using()
        object.__setattr__(unchecked, name, value)
        with pytest.raises(InvalidTask):
            backend.enqueue(unchecked)
    assert (signals.empty(), backend.stats()) == (True, before)


def test_functions_that_a_child_cannot_find_are_refused_at_once(kind, use):
    use()
    typed = sys.modules["typed"] = types.ModuleType("typed")
    source = f"from {__name__} import task\n@task\ndef shout():\n    return 'typed'"
    exec(compile(source, "<console>", "exec"), vars(typed))
    hidden = task(functools.wraps(fail.func)(lambda: "typed"))
    for enqueued in (hidden, typed.shout):
        if kind == "ThreadPoolBackend":
            assert outcome(enqueued.enqueue()) == "typed"
            continue
        with pytest.raises(InvalidTask) as raised:
            enqueued.enqueue()
        parts = (enqueued.module_path, "child process", "shell")
        assert all(part in str(raised.value) for part in parts)
    with pytest.raises(InvalidTask, match="module level"):
        task(lambda: None)
    del sys.modules["typed"]


def test_get_result_refuses_what_its_alias_or_task_does_not_have(both):
    mail = echo.using(backend="other", priority=5)
    results = [echo.enqueue(1), mail.enqueue(2)]
    assert [outcome(result) for result in results] == [[[1], {}], [[2], {}]]
    assert (results[1].backend, results[1].task) == ("other", mail)
    with pytest.raises(TaskResultMismatch):
        fail.get_result(results[0].id)
    for unknown in (results[1].id, "unknown", str(uuid.uuid4()), "", None):
        with pytest.raises(TaskResultDoesNotExist) as raised:
            both[0].get_result(unknown)
        parts = ("'default'", f"process {os.getpid()}", "MAX_RESULTS", "RESULTS_CACHE")
        assert all(part in str(raised.value) for part in parts)


# --- 3. The pool: lifecycle, errors, signals ------------------------------------------


def refuse(*args):
    raise RuntimeError("refused")


class TwoArgumentsError(Exception):
    def __init__(self, first, second):
        super().__init__(first)


class Unprintable(Exception):
    def __init__(self, needed):
        super().__init__()  # Pickled without what it needs to be read again.

    def __str__(self):
        refuse()


MODULE = Path(django_tasks_local.__file__)
note, loops = contextvars.ContextVar("note"), []
# Under coverage, which has a plain lock and a SIGTERM handler of its own, these hang.
untraced = pytest.mark.skipif(bool(sys.gettrace()), reason="not under coverage")
OwnBaseException = type("OwnBaseException", (BaseException,), {})
HOOKS = ("setattr", "getattribute", "str", "reduce")
REFUSING = [type(f"{h}Error", (Exception,), {f"__{h}__": refuse}) for h in HOOKS]
PLAIN = [SystemExit, KeyboardInterrupt, GeneratorExit, StopIteration, RecursionError]
PLAIN += [EOFError, ChildProcessError, TimeoutError, OSError, asyncio.CancelledError]
PLAIN += [FileNotFoundError, BrokenPipeError, OwnBaseException, Unprintable]
ODD = {kind.__name__: kind for kind in (*PLAIN, *REFUSING)}
globals().update(ODD)  # Where pickle looks for them.
ODD["TwoArgumentsError"] = lambda word: TwoArgumentsError(word, 2)
ODD["Local"] = type("Local", (Exception,), {})
ODD["lock"] = lambda word: LookupError(word, threading.Lock())
if sys.version_info >= (3, 11):
    ODD["group"] = lambda word: builtins.ExceptionGroup(word, [OSError()])


@task
def raise_odd(name):
    raise ODD[name]("odd")  # The line of the task.


@task
async def araise_odd(name):
    raise ODD[name]("odd")  # The line of the task.


@task
def fail_twice():
    try:
        json.loads("{")
    except ValueError as error:
        raise LookupError("outer") from error


def test_tasks_are_ready_then_running_on_all_workers_then_successful(use, gate, kind):
    backend = use(MAX_WORKERS=2)
    kept = backend.stats()["finished"]
    results = [wait_at.enqueue(gate.path, n) for n in range(4)]
    for result in results[:2]:
        wait_until(lambda i=result.id: wait_at.get_result(i).status == RUNNING)
        result.refresh()
        assert (result.attempts, result.finished_at) == (1, None)
        assert result.started_at == result.last_attempted_at is not None
        is_here = result.worker_ids[0].startswith(f"thread-{os.getpid()}-")
        assert is_here is (kind == "ThreadPoolBackend")
        with pytest.raises(ValueError, match="not finished"):
            result.return_value  # noqa: B018
    assert backend.get_result(results[2].id).status == READY
    assert (numbers(backend), backend.stats()["workers"]) == ([2, 0, 2], 2)
    gate.open()
    done = [finished(result) for result in results]
    found = [(d.status, d.return_value, d.attempts, d.errors) for d in done]
    assert found == [(SUCCESSFUL, n, 1, []) for n in range(4)]
    assert {*done[0].worker_ids, *done[1].worker_ids} >= {*done[3].worker_ids}
    assert (results[0].status, done[0].worker_ids) == (RUNNING, results[0].worker_ids)
    backend.join(TIMEOUT)
    counts = {"pending": 0, "deferred": 0, "running": 0, "finished": kept + 4}
    assert backend.stats() == {**counts, "workers": 2, "pid": os.getpid()}


@pytest.mark.parametrize("raising", [raise_odd, araise_odd])
def test_any_exception_fails_its_task_alone(use, capfd, raising):
    backend, workers = use(MAX_WORKERS=1), set()
    silent = ("getattributeError", "strError", "Unprintable")
    for name, result in [(name, raising.enqueue(name)) for name in ODD]:
        done = finished(result)
        text = errors(done)
        workers |= {*done.worker_ids}
        expected = type(ODD[name]("odd"))
        if raising is araise_odd and name == "StopIteration":  # As of any coroutine.
            expected = RuntimeError
        path = f"{expected.__module__}.{expected.__qualname__}"
        assert done.errors[0].exception_class_path == path
        assert name == "getattributeError" or "# The line of the task." in text
        assert name in silent or "odd" in text
        assert str(MODULE) not in text
    assert outcome(echo.enqueue(1)) == [[1], {}]
    assert (len(workers), backend.stats()["running"]) == (1, 0)
    assert "Exception in thread" not in capfd.readouterr().err


def test_a_traceback_shows_the_lines_of_the_task_and_not_ours(use):
    use(MAX_WORKERS=1)
    text = outcome(fail_twice.enqueue())
    lines = r'(?s)Traceback.*json.loads\("{"\).*raise LookupError\("outer'
    assert re.match(lines, text)
    assert text.endswith("\nLookupError: outer\n")
    assert str(MODULE) not in text
    mismatch = finished(fail.enqueue()).errors[0]
    assert mismatch.exception_class is TypeError
    assert "missing 1 required positional argument" in mismatch.traceback
    loader = "'__loader__': types.SimpleNamespace(get_source=refuse)"
    source = f"exec(compile('1/0', 'gone', 'exec'), {{'__name__': 'gone', {loader}}})"
    assert "ZeroDivisionError" in outcome(evaluate.enqueue(source))
    assert outcome(echo.enqueue(1)) == [[1], {}]


def test_signals_come_once_each_in_order_in_the_parent(kind, use, connect):
    use(MAX_WORKERS=1)
    here, seen = (kind, os.getpid()), []

    def receive(signal, sender, task_result, **kwargs):
        assert (sender.__name__, os.getpid()) == here
        seen.append((signal, task_result.status, sys.exc_info()[1]))

    connect(receive, task_enqueued, task_started, task_finished)
    stages = [(task_enqueued, READY, None), (task_started, RUNNING, None)]
    finished(echo.enqueue())
    assert seen == [*stages, (task_finished, SUCCESSFUL, None)]
    in_child = kind == "ProcessPoolBackend"
    for name in ("OSError", "TwoArgumentsError", "reduceError"):
        seen.clear()
        finished(raise_odd.enqueue(name))
        error = seen[2][2]
        assert seen == [*stages, (task_finished, FAILED, error)]
        stands_in = in_child and name != "OSError"  # As it cannot be carried over.
        text = f"{__name__}.{name}: odd" if stands_in else "odd"
        assert type(error).__name__ == ("RuntimeError" if stands_in else name)
        assert str(error) == text
        assert not in_child or "# The line of the task." in str(error.__cause__)


def test_receivers_that_raise_in_a_worker_are_logged_and_harmless(use, connect, caplog):
    use(MAX_WORKERS=1)

    def receive(**kwargs):
        raise error

    connect(receive, task_started, task_finished)
    for error in (ValueError("own"), SystemExit("own"), OwnBaseException()):
        assert outcome(echo.enqueue(1)) == [[1], {}]
        assert "ValueError: failed" in outcome(fail.enqueue("failed"))
        said = [r for r in caplog.records if r.exc_info and r.exc_info[1] is error]
        assert len(said) == 4


def test_a_receiver_that_raises_in_enqueue_surfaces_and_nothing_is_left(use, connect):
    backend, seen = use(MAX_WORKERS=1, MAX_PENDING=1), []
    before = backend.stats()

    def receive(task_result, **kwargs):
        seen.append(task_result.id)
        raise KeyError("receiver")

    connect(receive, task_enqueued)
    for number in (1, 2):
        with pytest.raises(KeyError, match="receiver"):
            echo.enqueue()
        assert not is_known(backend, seen[-1])
        after = backend.stats() | {"workers": 0}  # One may have been started.
        assert (len(seen), after) == (number, before)
    task_enqueued.disconnect(receive)
    assert outcome(echo.enqueue()) == [[], {}]


def test_receivers_may_be_async_and_what_they_change_is_their_own(use, connect):
    use(MAX_WORKERS=1)
    statuses = []

    async def receive(task_result, **kwargs):
        statuses.append(task_result.status)
        task_result.args.append("receiver")

    connect(receive, task_enqueued, task_started, task_finished)
    for enqueue in (async_to_sync(echo.aenqueue), echo.enqueue):
        done = finished(enqueue(1))
        assert (done.return_value, done.args) == ([[1], {}], [1])
    assert statuses == [READY, RUNNING, SUCCESSFUL] * 2


@task(takes_context=True)
async def look(context, *args, **kwargs):
    result, loop = context.task_result, asyncio.get_running_loop()
    loops.append(loop)
    asked, task_ = await result.task.aget_result(result.id), result.task
    found = [result.id, current_result_id.get(), result.status, context.attempt]
    found += [task_.priority, task_.queue_name, task_.backend, task_.module_path]
    found += [task_.run_after.isoformat(), result.worker_ids, loops.count(loop)]
    found += [asked.started_at == result.started_at, asked.finished_at]
    return [*found, result.args, result.kwargs, list(args), kwargs]


def test_the_context_shows_the_task_as_enqueued(use):
    use({"QUEUES": []}, MAX_WORKERS=1)
    due, slow = timezone.now() - timedelta(hours=1), mark_safe("slow")
    hundred = http.HTTPStatus.CONTINUE
    task_ = look.using(priority=hundred, queue_name=slow, run_after=due)
    for _ in range(2):  # Each in an event loop of its own.
        done = finished(task_.enqueue(1, (2,), k=b"v"))
        expected = [done.id, done.id, "RUNNING", 1, 100, "slow", "default"]
        expected += [look.module_path, due.isoformat(), done.worker_ids, 1, True, None]
        assert outcome(done) == [*expected, *[[1, [2]], {"k": "v"}] * 2]
        assert done.task == task_


def test_a_task_starts_in_an_empty_context(use):
    use(MAX_WORKERS=1)
    token = note.set("of the caller")
    zone = "timezone.get_current_timezone_name()"
    seen = f"note.get(None), translation.get_language(), {zone}"
    left = "note.set(1), translation.activate('fr'), timezone.activate('Asia/Aden')"
    source = f"[{seen}, {left}][:3]"
    with translation.override("de"), timezone.override("Asia/Tokyo"):
        found = [outcome(evaluate.enqueue(source)) for _ in range(2)]
        assert found == [[None, settings.LANGUAGE_CODE, settings.TIME_ZONE]] * 2
        assert translation.get_language() == "de"
    note.reset(token)
    assert error_of(current_result_id.get) == "LookupError"


# --- 4. The queue: priority, run_after, MAX_PENDING, threads --------------------------


def logged(caplog):
    """Return the records of our logger, as text."""
    records = [r for r in caplog.records if r.name == "django_tasks_local"]
    return [f"{record.levelname} {record.getMessage()}" for record in records]


def in_threads(number, function, *args):
    """Call the function in many threads at once; raise what one of them raised."""
    barrier = threading.Barrier(number)

    def call():
        barrier.wait(TIMEOUT)
        function(*args)

    with ThreadPoolExecutor(number) as executor:
        for future in [executor.submit(call) for _ in range(number)]:
            future.result()


def test_tasks_run_by_priority_and_then_by_age(use, signals, tmp_path):
    backend = use(MAX_WORKERS=1)
    any_priority = st.integers(-100, 100) | st.sampled_from([-100, 0, 100])

    @given(priorities=st.lists(any_priority, max_size=20))
    @hypothesis_settings(max_examples=25, deadline=None)
    def check(priorities):
        gate = Gate(tmp_path / "gate")
        start_at(gate, signals)
        ids = [echo.using(priority=p).enqueue().id for p in priorities]
        gate.open()
        backend.join(TIMEOUT)
        sent = [signals.get() for _ in range(signals.qsize())]
        order = [result.id for name, result in sent if name == "started"]
        by_rule = sorted(range(len(ids)), key=lambda n: (-priorities[n], n))
        assert order == [ids[n] for n in by_rule]

    check()


def test_deferred_tasks_are_ready_until_due_and_then_start(use):
    backend = use(MAX_WORKERS=1)
    finished(echo.enqueue())
    dues = late, near = [timezone.now() + timedelta(seconds=s) for s in (0.6, 0.2)]
    results = [echo.using(run_after=due).enqueue() for due in dues]
    assert {backend.get_result(result.id).status for result in results} == {READY}
    assert numbers(backend) == [0, 2, 0]
    backend.join(0)
    starts = [finished(result).started_at for result in results]
    assert near <= starts[1] < late <= starts[0]
    assert numbers(backend) == [0, 0, 0]


def test_run_after_may_be_a_timedelta(use):
    backend, before = use(MAX_WORKERS=1), timezone.now()
    result = echo.using(run_after=DAY).using(priority=3).enqueue()
    assert before + DAY <= result.task.run_after <= timezone.now() + DAY
    assert numbers(backend) == [0, 1, 0]
    assert outcome(echo.using(run_after=-DAY).enqueue(1)) == [[1], {}]


@pytest.mark.parametrize("use_tz", [True, False])
def test_past_dates_run_at_once_and_far_ones_harm_nothing(use, use_tz):
    backend = use(MAX_WORKERS=1)
    zones = [datetimes(timedelta(hours=hours)) for hours in (-14, 14)]
    zones = zones if use_tz else [None]
    ends = (datetime(1, 1, 2), datetime(1969, 12, 31), datetime(9999, 12, 30))
    with override_settings(USE_TZ=use_tz):
        for end, zone in itertools.product(ends, zones):
            result = echo.using(run_after=end.replace(tzinfo=zone)).enqueue()
            assert end.year > 2000 or outcome(result) == [[], {}]
        assert outcome(echo.enqueue(1)) == [[1], {}]
        assert numbers(backend)[1] == len(zones)
        backend.close()
        result.refresh()
    assert (result.status, result.started_at) == (FAILED, None)


def test_waiting_tasks_use_no_worker_and_no_processor_time(use):
    backend = use(MAX_WORKERS=5)
    results = [echo.using(run_after=n * DAY).enqueue() for n in range(50, 0, -1)]
    assert outcome(echo.enqueue(1)) == [[1], {}]
    used, begun = time.process_time(), time.monotonic()
    with pytest.raises(TimeoutError):
        finished(results[0], 0.3)
    assert time.process_time() - used < 0.5 * (time.monotonic() - begun)
    assert (numbers(backend), backend.stats()["workers"] <= 2) == ([0, 50, 0], True)


def test_what_has_become_due_is_pending_for_stats_join_and_close(use, gate, signals):
    backend = use(MAX_WORKERS=1)
    start_at(gate, signals)
    due = [echo.using(run_after=timedelta(seconds=0.05)).enqueue() for _ in range(2)]
    wait_until(lambda: numbers(backend) == [2, 0, 1])
    with ThreadPoolExecutor(2) as executor:
        waits = [executor.submit(wait) for wait in (backend.join, backend.close)]
        assert not concurrent.futures.wait(waits, 0.2).done
        gate.open()
        assert [future.result(TIMEOUT) for future in waits] == [None, None]
    assert [outcome(result) for result in due] == [[[], {}]] * 2, "none is abandoned"


@task
def enqueue_many(number):
    return [error_of(echo.enqueue) for _ in range(number)]


def test_a_full_queue_takes_its_limit_and_keeps_nothing_more(use, gate, signals):
    backend = use(MAX_WORKERS=1, MAX_PENDING=3)
    start_at(gate, signals)
    later = echo.using(run_after=DAY)
    pending = [later.enqueue(1), enqueue_many.enqueue(5)]
    in_threads(8, enqueue_many.func, 5)  # One of them finds room.
    before, sent = backend.stats(), signals.qsize()
    assert numbers(backend) == [2, 1, 1]
    for refused in (echo, later, echo.using(priority=100)):
        with pytest.raises(TaskQueueFull, match=r"'default' has 3 tasks pending"):
            refused.enqueue("too many")
    assert (backend.stats(), signals.qsize()) == (before, sent)
    gate.open()
    assert outcome(pending[1]).count("TaskQueueFull") >= 3
    backend.join(TIMEOUT)
    assert outcome(echo.enqueue("again")) == [["again"], {}]


def test_many_threads_lose_nothing_and_run_nothing_twice(use, signals):
    backend = use(MAX_WORKERS=4, MAX_RESULTS=50)
    in_threads(32, enqueue_many.func, 10)
    backend.join(TIMEOUT)
    events = defaultdict(list)
    while not signals.empty():
        name, result = signals.get()
        events[result.id].append(name)
    assert len(events) == 32 * 10
    assert {*map(tuple, events.values())} == {("enqueued", "started", "finished")}
    assert (numbers(backend), backend.stats()["finished"]) == ([0, 0, 0], 50)


@pytest.mark.parametrize("error", [RuntimeError, MemoryError])
def test_without_threads_tasks_go_to_those_there_are_or_are_refused(
    use, gate, signals, monkeypatch, error, caplog
):
    def refuse(thread):
        raise error("can't start new thread")

    backend = use(MAX_WORKERS=2)
    before = backend.stats()
    with monkeypatch.context() as patch, transaction.atomic():
        patch.setattr(threading.Thread, "start", refuse)
        for refused in (echo, echo.using(run_after=DAY)):
            with pytest.raises(error, match="can't start new thread"):
                refused.enqueue()
        query("default", "SELECT 1")  # The transaction is still usable.
    assert backend.stats() == before
    start_at(gate, signals)
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        result, late = echo.enqueue(1), echo.using(run_after=DAY).enqueue()
    assert (backend.stats()["workers"], late.status, logged(caplog)) == (1, READY, [])
    gate.open()
    assert outcome(result) == [[1], {}]
    connections.close_all()


# --- 5. Results, and waiting for them -------------------------------------------------


def test_the_kept_results_are_the_last_used_ones(use, gate, signals):
    backend = use(MAX_WORKERS=2)
    unfinished = start_at(gate, signals, "kept")

    @given(
        limit=st.integers(1, 4),
        steps=st.lists(st.sampled_from(["run", *range(6)]), min_size=15, max_size=30),
    )
    @hypothesis_settings(max_examples=25, deadline=None)
    def check(limit, steps):
        options = {"MAX_WORKERS": 2, "MAX_RESULTS": limit}
        here, made, model = type(backend)("default", {"OPTIONS": options}), [], []
        for step in steps:
            if step == "run":
                made.append(here.enqueue(echo).id)
                here.wait_result(made[-1], TIMEOUT)
                model = [*model, made[-1]][-limit:]
            elif made:
                chosen = made[-1 - step % len(made)]
                assert is_known(here, chosen) is (chosen in model)
                if chosen in model:
                    model = [i for i in model if i != chosen] + [chosen]
        assert [i for i in made if is_known(here, i)] == [i for i in made if i in model]

    check()
    assert is_known(backend, unfinished.id)
    gate.open()
    assert outcome(unfinished) == "kept"


def test_waiting_returns_the_finished_result_or_raises(use, gate):
    backend = use(MAX_WORKERS=1)
    result = wait_at.enqueue(gate.path, 1)
    waits = [backend.wait_result, lambda *a: asyncio.run(backend.await_result(*a))]
    for wait, timeout in itertools.product(waits, (0, 0.01, -1)):
        with pytest.raises(TimeoutError, match=result.id):
            wait(result.id, timeout)
        with pytest.raises(TaskResultDoesNotExist):
            wait("unknown", timeout)
        with pytest.raises(TimeoutError, match="'default'"):
            backend.join(timeout)
    with ThreadPoolExecutor(4) as executor:
        calls = [executor.submit(wait, result.id) for wait in waits]
        calls.append(executor.submit(waits[0], result.id, 1e6))
        joining = executor.submit(backend.join)
        gate.open()
        assert [call.result(TIMEOUT).return_value for call in calls] == [1, 1, 1]
        assert joining.result(TIMEOUT) is None
    assert [wait(result.id, 0).return_value for wait in waits] == [1, 1]
    backend.join(0)


def test_awaiting_leaves_the_loop_free_and_may_be_cancelled(use, gate):
    backend = use(MAX_WORKERS=2, MAX_RESULTS=1)
    result = wait_at.enqueue(gate.path, "mine")

    async def main():
        with pytest.raises(TimeoutError):
            await backend.await_result(result.id, 0.001)
        waits = [asyncio.ensure_future(backend.await_result(result.id)) for _ in "ab"]
        await asyncio.sleep(0)
        waits[0].cancel()
        with pytest.raises(asyncio.CancelledError):
            await waits[0]
        assert not waits[1].done()
        gate.open()
        backend.join(TIMEOUT)  # Meanwhile the loop stands still,
        finished(echo.enqueue())  # and others push the result out.
        value = (await asyncio.wait_for(waits[1], TIMEOUT)).return_value
        return value, weakref.ref(asyncio.get_running_loop())

    value, loop = asyncio.run(main())
    gc.collect()
    assert (value, loop()) == ("mine", None), "a wait leaves nothing behind"
    assert not is_known(backend, result.id)


@task
def misuse(result_id):
    """Return what comes of the calls that a task must not do, and of two more."""
    backend = task_backends["default"]
    calls = [backend.wait_result, lambda i: asyncio.run(backend.await_result(i))]
    found = [error_of(call, result_id) for call in calls]
    return [*found, *map(error_of, (backend.join, backend.stats, backend.close))]


def test_a_task_may_not_wait_for_those_of_its_alias(kind, use, connect):
    backend, refused = use(MAX_WORKERS=2), ["RuntimeError"] * 3
    done, ready = echo.enqueue(), echo.using(run_after=DAY).enqueue()
    finished(done)
    others = ["", ""] if kind == "ThreadPoolBackend" else ["RuntimeError"] * 2
    for result in (done, ready):  # The last call closes the pool in a thread's task.
        assert outcome(misuse.enqueue(result.id)) == refused + others
    backend.close()
    found = []
    connect(lambda **kwargs: found.append(misuse.func(done.id)), task_started)
    connect(lambda **kwargs: found.append(misuse.func(done.id)), task_finished)
    assert outcome(echo.enqueue(1)) == [[1], {}]
    assert found == [[*refused, "", ""]] * 2, "nor may its receivers"


# --- close(), changed settings and options, ENQUEUE_ON_COMMIT -------------------------


def workers():
    return {t for t in threading.enumerate() if t.name == "tasks-default"}


def test_close_finishes_pending_tasks_and_abandons_deferred_ones(use, gate, caplog):
    backend = use(MAX_WORKERS=1)
    results = [wait_at.enqueue(gate.path, n) for n in range(3)]
    late = echo.using(run_after=DAY).enqueue()
    with ThreadPoolExecutor(2) as executor:
        closing = [executor.submit(backend.close) for _ in range(2)]
        assert "abandoned: the pool was closed" in errors(finished(late))
        assert not any(future.done() for future in closing)
        gate.open()
        assert [future.result(TIMEOUT) for future in closing] == [None, None]
    text = f"WARNING 1 tasks are FAILED, as the pool was closed: {late.id}"
    assert logged(caplog) == [text]
    assert [outcome(result) for result in results] == [0, 1, 2]
    assert (numbers(backend), backend.stats()["workers"]) == ([0, 0, 0], 0)
    assert workers() == set()
    backend.close()
    assert outcome(echo.enqueue(1)) == [[1], {}]


def test_old_workers_finish_after_changed_settings(use, gate, signals, caplog, connect):
    senders = set()
    connect(lambda sender, **kwargs: senders.add(sender), task_finished)
    backend = use({"QUEUES": ["default", "old"]}, MAX_WORKERS=1)
    running, pending = start_at(gate, signals), echo.using(queue_name="old").enqueue(1)
    late, threads = echo.using(run_after=DAY).enqueue(), workers()
    use({"QUEUES": ["default"]}, MAX_WORKERS=2)
    assert "abandoned: TASKS has changed" in errors(finished(late))
    text = f"WARNING 1 tasks are FAILED, as TASKS has changed: {late.id}"
    assert logged(caplog) == [text]
    gate.open()
    assert [outcome(running), outcome(pending)] == [None, [[1], {}]]
    for thread in threads:
        thread.join(TIMEOUT)
    assert (senders, workers()) == ({type(backend)}, set())


def test_other_options_hold_at_once_and_lose_nothing(use, gate, signals):
    backend = use(MAX_WORKERS=1)
    deferred, running = echo.using(run_after=DAY).enqueue(), start_at(gate, signals)
    waiting, old = wait_at.enqueue(gate.path, "waiting"), workers()
    other = type(backend)("default", {"OPTIONS": {"MAX_WORKERS": 2}})
    results = [other.enqueue(wait_at, [gate.path, n]) for n in range(2)]
    wait_until(lambda: numbers(other) == [1, 1, 3])
    gate.open()
    assert [outcome(r) for r in (running, waiting, *results)] == [None, "waiting", 0, 1]
    for thread in old:
        thread.join(TIMEOUT)
    assert (numbers(other), other.stats()["workers"]) == ([0, 1, 0], 2)
    assert other.get_result(deferred.id).status == READY


BACKPORT = django.VERSION < (6, 0)
HAS_EXTRA_ARGUMENTS = BACKPORT or django.VERSION >= (6, 1)
extra = pytest.mark.skipif(not HAS_EXTRA_ARGUMENTS, reason="Django 6.0 passes none on")


def commit_or_not(value, rollback=False):
    """Enqueue in a transaction; return whether it was known in it and after."""
    with transaction.atomic():
        result = echo.enqueue(value)
        known = [is_known(task_backends["default"], result.id)]
        assert known[0] or (result.status, result.enqueued_at) == (READY, None)
        transaction.set_rollback(rollback)
    return [*known, is_known(task_backends["default"], result.id)]


@task
def try_commits():
    return [commit_or_not(1), commit_or_not(2, rollback=True)]


@pytest.mark.parametrize("value", [True, "default", False, None])
def test_on_commit_a_task_is_enqueued_after_the_commit_or_never(use, value):
    backend = use({} if value is None else {"ENQUEUE_ON_COMMIT": value}, MAX_WORKERS=1)
    before = backend.stats()["finished"]
    expected = [[False, True], [False, False]] if value else [[True, True]] * 2
    assert try_commits.func() == outcome(try_commits.enqueue()) == expected
    backend.join(TIMEOUT)
    assert backend.stats()["finished"] - before == (3 if value else 5)
    argument = [1]
    with transaction.atomic():
        assert error_of(echo.enqueue, object()) in ("TypeError", "ValueError")
        result = async_to_sync(echo.aenqueue)(argument)
        argument.append(2)
        assert is_known(backend, result.id) is not bool(value)
        with transaction.atomic():
            assert echo.enqueue().enqueued_at is None or not value
    assert outcome(result) == [[[1]], {}]
    assert echo.get_result(result.id).enqueued_at is not None
    assert echo.enqueue().enqueued_at is not None
    connections.close_all()


# An INITIALIZER in this file runs before a child has these settings.
if HAS_EXTRA_ARGUMENTS and isinstance(echo, django_tasks_local.LocalTask):
    on_commit, at_once = (task(enqueue_on_commit=v)(echo.func) for v in (True, False))
    nowhere = task(enqueue_on_commit="unknown")(echo.func)


@extra
@pytest.mark.parametrize("kind", ["ThreadPoolBackend"])
def test_a_task_overrides_whether_a_commit_enqueues_it(use):
    for value, own in ((False, on_commit), (True, at_once)):
        backend = use({"ENQUEUE_ON_COMMIT": value})
        with transaction.atomic():
            result = own.using(priority=3).enqueue(1)
            assert is_known(backend, result.id) is value
            unknown = ("InvalidTaskBackend", "ConnectionDoesNotExist")
            assert error_of(nowhere.enqueue).replace("Error", "") in unknown
        assert outcome(result) == [[1], {}]
    connections.close_all()


# --- Calls from signal handlers, from garbage collection, from tasks ------------------


@contextlib.contextmanager
def from_signal_handler(call):
    """Call in the main thread, from the handler of a signal every millisecond."""
    main, done = threading.get_ident(), threading.Event()

    def send():
        while not done.wait(0.001):
            signal.pthread_kill(main, signal.SIGUSR1)

    before = signal.signal(signal.SIGUSR1, lambda *args: call())
    sender = threading.Thread(target=send)
    sender.start()
    try:
        yield
    finally:
        done.set()
        sender.join()
        signal.signal(signal.SIGUSR1, before)


@contextlib.contextmanager
def from_garbage_collector(call):
    """Call in each thread, each time the garbage collector begins and ends."""
    threshold, callback = gc.get_threshold(), lambda *args: call()
    gc.callbacks.append(callback)
    gc.set_threshold(20)
    try:
        yield
    finally:
        gc.callbacks.remove(callback)
        gc.set_threshold(*threshold)


@untraced
@pytest.mark.parametrize("caller", [from_signal_handler, from_garbage_collector])
@pytest.mark.parametrize("method", ["stats", "get_result"])
def test_code_between_any_two_lines_may_call_a_backend(
    use, gate, signals, caller, method
):
    backend, called = use(MAX_WORKERS=2), []
    kept, _ = [start_at(gate, signals) for _ in range(2)]
    gate.open()

    def call():
        called.append(backend.stats() if method == "stats" else kept.refresh())

    with caller(call):
        while len(called) < 60:
            results = [echo.using(run_after=d).enqueue(1) for d in (None, DAY, -DAY)]
            backend.stats()
    assert [outcome(result) for result in results[::2]] == [[[1], {}]] * 2


@task
async def use_all_aliases():
    """Enqueue on both aliases, read the results and make mistakes; tell of them."""
    found = [os.getpid()]
    for alias in ("default", "other"):
        there, elsewhere = echo.using(backend=alias), fail.using(backend=alias)
        result = await there.aenqueue([1])
        while not result.is_finished:
            await result.arefresh()
        wrongs = [(there.get_result, "none"), (elsewhere.get_result, result.id)]
        wrongs.append((there.enqueue, object()))
        wrongs.append((lambda there=there: there.using(queue_name="unknown"),))
        mistakes = [await asyncio.to_thread(error_of, *wrong) for wrong in wrongs]
        found.append([result.id, result.return_value, *mistakes])
    return found


def test_tasks_enqueue_and_read_results_on_all_aliases(both, kind):
    pid, *found = outcome(use_all_aliases.enqueue())
    assert (pid == os.getpid()) is (kind == "ThreadPoolBackend")
    wrong = {"ThreadPoolBackend": "TypeError", "ProcessPoolBackend": "ValueError"}
    for backend, (result_id, *rest) in zip(both, found, strict=True):
        mistakes = ["TaskResultDoesNotExist", "TaskResultMismatch"]
        mistakes += [wrong[type(backend).__name__], InvalidTask.__name__]
        assert rest == [[[[1]], {}], *mistakes]
        assert backend.get_result(result_id).return_value == [[[1]], {}]
    if kind == "ThreadPoolBackend":  # Which may wait for tasks of another alias.
        source = "outcome(echo.using(backend='other').enqueue(1))"
        assert outcome(evaluate.enqueue(source)) == [[1], {}]


# --- 6. What a task finds: its class, caches, connections -----------------------------


@pytest.fixture
def module_path(tmp_path, monkeypatch):
    """Return a directory for modules of a test, which children find, too."""
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    for path in tmp_path.iterdir():
        sys.modules.pop(path.stem, None)


class CountedCache(LocMemCache):
    def __init__(self, path, params):
        super().__init__(path, params)
        with open(path, "a") as file:
            file.write("built\n")


def test_cache_objects_belong_to_the_worker(use, tmp_path):
    path = tmp_path / "built"
    cache = {"BACKEND": f"{__name__}.CountedCache", "LOCATION": str(path)}
    use(known={"default": cache}, MAX_WORKERS=1)
    built = set()
    for _ in range(5):
        assert outcome(evaluate.enqueue("caches['default'].get('a')")) is None
        built.add(path.read_text())
    assert len(built) == 1


REDIS_CACHE = {
    "BACKEND": "django.core.cache.backends.redis.RedisCache",
    "LOCATION": REDIS,
    "OPTIONS": {"serializer": "django.core.signing.JSONSerializer"},
}
needs_redis = pytest.mark.skipif(
    not REDIS, reason="TASKS_TEST_REDIS, the URL of a Redis server, is not set"
)


@needs_redis
def test_tasks_share_the_connection_of_their_worker_to_redis(use):
    redis = pytest.importorskip("redis")
    server, source = redis.Redis.from_url(REDIS), "caches['default'].get('a')"
    with server:
        use(known={"default": REDIS_CACHE}, MAX_WORKERS=2)
        before = server.info()["total_connections_received"]
        results = [evaluate.enqueue(source) for _ in range(30)]
        assert {outcome(result) for result in results} == {None}
        opened = server.info()["total_connections_received"] - before
        task_backends["default"].close()
    assert 1 <= opened < 10  # Others may use it meanwhile.


ENGINE = """
from django.db.backends.sqlite3 import base

class DatabaseWrapper(base.DatabaseWrapper):
    tenant = "nobody"

    def set_tenant(self, tenant):
        self.tenant = tenant
"""


def test_connection_objects_belong_to_the_task(use, module_path, monkeypatch):
    (module_path / "tenants").mkdir()
    (module_path / "tenants" / "base.py").write_text(ENGINE)
    params = {**connections.settings["default"], "ENGINE": "tenants"}
    monkeypatch.setitem(connections.settings, "tenants", params)
    use(MAX_WORKERS=1)
    here = "connections['tenants']"
    for query in ("None", f"{here}.cursor().close()"):
        source = f"[{here}.tenant, {query}, {here}.set_tenant('A'), {here}.tenant]"
        for _ in range(2):
            assert outcome(evaluate.enqueue(source))[::3] == ["nobody", "A"]
    task_backends["default"].close()


@pytest.fixture(params=["default", "kept", "postgres", "postgres_kept"])
def database(request):
    if request.param.startswith("postgres") and not POSTGRES:
        pytest.skip("TASKS_TEST_POSTGRES does not say where a PostgreSQL server is")
    with connections[request.param].cursor() as cursor:
        cursor.execute("DROP TABLE IF EXISTS fault")
        cursor.execute("CREATE TABLE fault (word varchar(20) UNIQUE)")
    connections[request.param].close()
    yield request.param
    connections.close_all()


def query(database, text, *values):
    """Return the first column of what a query finds."""
    with connections[database].cursor() as cursor:
        cursor.execute(text, values)
        return [row[0] for row in cursor.fetchall()] if cursor.description else []


@task
def write(database, word, mess=""):
    connection = connections[database]
    if mess in ("autocommit", "broken"):
        connection.set_autocommit(False)
    elif mess == "atomic":
        transaction.atomic(using=database).__enter__()
    elif mess == "begin":
        query(database, "BEGIN")
    for _ in range(1 + (mess == "broken")):  # Twice is refused.
        query(database, "INSERT INTO fault VALUES (%s)", word)
    if mess == "dropped":
        query(database, "SELECT pg_terminate_backend(pg_backend_pid())")
    if mess:
        raise ValueError("left a mess")


def test_a_transaction_left_open_swallows_nothing_of_the_next_task(use, database):
    use(MAX_WORKERS=1)
    messes = ["autocommit", "atomic", "broken", "begin"]
    for mess in messes:
        assert finished(write.enqueue(database, "lost", mess)).status == FAILED
        assert finished(write.enqueue(database, f"after {mess}")).errors == []
    words = query(database, "SELECT word FROM fault")
    assert words == [f"after {mess}" for mess in messes]
    task_backends["default"].close()


@task
def mark_session(database):
    """Return whether an earlier task has marked this session."""
    with contextlib.suppress(Exception):
        return query(database, "SELECT 1 FROM marked") == []
    query(database, "CREATE TEMPORARY TABLE marked (a integer)")
    return False


def sessions():
    """Return the processes of the server that serve our sessions, but for this one."""
    ours = settings.DATABASES["postgres"]["OPTIONS"]["application_name"]
    text = "SELECT pid FROM pg_stat_activity WHERE application_name = %s"
    return query("postgres", f"{text} AND pid <> pg_backend_pid()", ours)


def test_a_connection_is_kept_as_long_as_its_maximum_age(use, database):
    backend, kept = use(MAX_WORKERS=1), "kept" in database
    marks = [outcome(mark_session.enqueue(database)) for _ in range(3)]
    assert marks == [False, kept, kept]
    if "postgres" in database:
        wait_until(lambda: len(sessions()) == kept)
        backend.close()
        wait_until(lambda: not sessions())


@pytest.mark.parametrize("database", ["postgres", "postgres_kept"], indirect=True)
def test_the_next_task_works_after_the_database_dropped_its_sessions(use, database):
    use(MAX_WORKERS=1)
    assert finished(write.enqueue(database, "one")).errors == []
    for pid in sessions():
        query("postgres", "SELECT pg_terminate_backend(%s, 10000)", pid)
    assert finished(write.enqueue(database, "two")).errors == []
    dropped = finished(write.enqueue(database, "three", "dropped"))
    assert "OperationalError" in errors(dropped)
    assert finished(write.enqueue(database, "four")).errors == []


def test_a_connection_that_cannot_be_cleaned_is_dropped(use, kind, caplog):
    use(MAX_WORKERS=1)
    hidden = "connections['kept'].connection.close()"  # Django does not notice.
    source = f"[connections['kept'].ensure_connection(), {hidden}]"
    assert outcome(evaluate.enqueue(source)) == [None, None]
    assert outcome(mark_session.enqueue("kept")) is False
    here = kind == "ThreadPoolBackend"  # A child says it on its own.
    assert logged(caplog) == ["ERROR Connection 'kept' is broken, and dropped"] * here


# --- The reading budget ---------------------------------------------------------------

NO_CODE = {"COMMENT", "NEWLINE", "NL", "INDENT", "DEDENT", "ENCODING", "ENDMARKER"}
LISTS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
DENSE = (*LISTS, ast.IfExp, ast.NamedExpr, ast.Lambda)


def count_code(nodes):
    """Return the number of tokens of the module; an f-string counts as one of them."""
    docs, depth, count = set(), 0, 0
    for node in nodes:
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            docs.add((node.lineno, node.col_offset))
    with MODULE.open("rb") as file:
        for token in tokenize.tokenize(file.readline):
            name = tokenize.tok_name[token.type]
            count += not depth and name not in NO_CODE and token.start not in docs
            depth += (name == "FSTRING_START") - (name == "FSTRING_END")
    return count


def test_the_module_keeps_to_the_reading_budget():
    text = MODULE.read_text()
    nodes, lines = [*ast.walk(ast.parse(text))], text.splitlines()
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef)
    functions = [node for node in nodes if isinstance(node, kinds)]
    assert len(lines) <= 1200
    assert count_code(nodes) <= 7000
    assert [line for line in lines if len(line) > 88] == []
    assert [f.name for f in functions if f.end_lineno - f.lineno >= 30] == []
    assert sum(isinstance(node, DENSE) for node in nodes) <= 40


# --- Programs, and the processes that they start --------------------------------------


def wait_gone(*pids, timeout=TIMEOUT):
    """Wait for the end of processes; return whether they ended."""
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


def descendants(pid):
    """Return the processes that ``pid`` has started, and those that they have."""
    found = set()
    with contextlib.suppress(OSError):
        for path in Path(f"/proc/{pid}/task").glob("*/children"):
            for child in map(int, path.read_text().split()):
                found |= {child} | descendants(child)
    return found


def ported(text):
    """Return code for the Tasks framework that there is."""
    return text.replace("django.tasks", "django_tasks") if BACKPORT else text


HEAD = """
import atexit, contextlib, fcntl, json, os, signal, socket, sys, threading, time
import django
from django.conf import settings
if not settings.configured:
    settings.configure(TASKS=json.loads(os.environ["SCRIPT_TASKS"]), SECRET_KEY="x",
                       ROOT_URLCONF=__name__, ALLOWED_HOSTS=["*"], MIDDLEWARE=[])
    django.setup()
from django.http import JsonResponse
from django.tasks import task, task_backends
from django.tasks.exceptions import TaskResultDoesNotExist
from django.tasks.signals import task_finished, task_started
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

    def __init__(self, directory, tasks, gate):
        self.directory, self.tasks, self.gate = directory, tasks, gate
        self.lines, self.seen = queue.Queue(), []

    def start(self, source, *command):
        """Run the source after HEAD, or the command."""
        (self.directory / "program.py").write_text(ported(f"{HEAD}\n{source}"))
        environ = {**os.environ, "SCRIPT_TASKS": json.dumps(self.tasks)}
        environ["SCRIPT_GATE"] = self.gate.path
        paths = [str(self.directory), *filter(None, sys.path)]
        environ["PYTHONPATH"] = os.pathsep.join(paths)
        self.process = subprocess.Popen(
            [sys.executable, *map(str, command or ["program.py"])],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=environ,
            cwd=self.directory,
            start_new_session=True,
        )
        self.reader = threading.Thread(target=self.read)
        self.reader.start()

    def read(self):
        for line in self.process.stdout:
            self.lines.put(line.rstrip())
        self.lines.put(None)

    def line(self, words):
        """Return the first line that contains the words; wait for it if need be."""
        for line in self.seen:
            if words in line:
                return line
        while (line := self.lines.get(timeout=TIMEOUT)) is not None:
            self.seen.append(line)
            if words in line:
                return line
        raise AssertionError(f"No line with {words!r}:\n" + "\n".join(self.seen))

    def rest(self):
        """Wait for the end of the program and its children; return its lines."""
        begin = len(self.seen)
        self.seen += iter(lambda: self.lines.get(timeout=TIMEOUT), None)
        self.code = self.process.wait(TIMEOUT)
        return self.seen[begin:]

    def stop(self):
        """Kill what is left of the program and its children."""
        left = descendants(self.process.pid)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        assert wait_gone(*left)
        self.reader.join()
        self.process.stdout.close()


def run_python(cwd, *args, **environ):
    """Run Python in a directory; return what it wrote to stdout and stderr."""
    options = {"cwd": cwd, "env": {**os.environ, **environ}, "text": True}
    done = subprocess.run([sys.executable, *args], capture_output=True, **options)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout, done.stderr


@pytest.fixture
def script(tmp_path, gate):
    """Return a function that makes a Script, from options and kinds by their alias."""
    with contextlib.ExitStack() as stack:

        def make(**backends):
            tasks = {}
            for alias, options in backends.items():
                path = f"django_tasks_local.{options.pop('kind')}"
                tasks[alias] = {"BACKEND": path, "QUEUES": [], "OPTIONS": options}
            made = Script(tmp_path, tasks, gate)
            stack.callback(made.stop)
            return made

        yield make


# --- Child processes: what ends them --------------------------------------------------

slow = pytest.mark.slow
MAIN = '\nif __name__ == "__main__":'


def rarely(*values):
    """Return a row of a table that only CI runs."""
    return pytest.param(*values, marks=slow)


threads_first = pytest.mark.parametrize(
    "kind", ["ThreadPoolBackend", rarely("ProcessPoolBackend")]
)


def start(script, source, kind="ProcessPoolBackend", **options):
    """Start a script whose default backend has one worker and these options."""
    program = script(default={"kind": kind, "MAX_WORKERS": 1, **options})
    program.start(source)
    return program


@pytest.mark.skipif(not BACKPORT, reason="of the backport")
def test_exceptions_of_the_backport_may_be_named_as_those_of_django(tmp_path):
    names = ("InvalidTask", "InvalidTaskBackend")
    rename = "; ".join(f"e.{n} = vars(e).pop('{n}Error')" for n in names)
    code = (
        f"import django_tasks.exceptions as e; {rename}; import django_tasks_local as m"
    )
    said, _ = run_python(
        tmp_path, "-c", f"{code}; print(m.InvalidTask is e.InvalidTask)"
    )
    assert said == "True\n"


@processes
def test_dead_child_fails_its_own_task_alone(use, gate, signals):
    backend = use(MAX_WORKERS=2)
    neighbour = start_at(gate, signals, "done")
    ends = {"signal.raise_signal(9)": -9, "ctypes.string_at(0)": -11, "os._exit(7)": 7}
    ends["[os.system('sleep 99 &'), os._exit(8)]"] = 8  # It could hide the death.
    for how, code in ends.items():
        victim, queued = map(finished, [evaluate.enqueue(how), identify.enqueue()])
        pid = victim.worker_ids[0].removeprefix("process-")
        text = f"Child process {pid} ended with exit code {code}, before it was done"
        assert f"ChildProcessError: {text}" in errors(victim)
        assert queued.status == SUCCESSFUL
        assert queued.worker_ids != victim.worker_ids
    assert backend.get_result(neighbour.id).status == RUNNING
    gate.open()
    assert finished(neighbour).return_value == "done"


@processes
def test_task_after_the_death_of_an_idle_child_runs_in_another_one(use, signals):
    use(MAX_WORKERS=1)
    pid = outcome(identify.enqueue())[0]
    os.kill(pid, signal.SIGKILL)
    assert wait_gone(pid)
    result = finished(identify.enqueue())
    assert result.return_value[0] != pid
    assert result.worker_ids == [f"process-{result.return_value[0]}"]
    sent = [signals.get(timeout=TIMEOUT) for _ in range(6)]
    names = [name for name, of in sent if of.id == result.id]
    assert names == ["enqueued", "started", "finished"]
    assert signals.empty()


@processes
def test_a_call_that_a_signal_handler_cuts_off_costs_that_task_alone(use):
    use(MAX_WORKERS=1)
    handler = "signal.signal(signal.SIGALRM, signal.default_int_handler)"
    source = f"[{handler}, signal.setitimer(0, 0.05), echo.enqueue('x' * 50_000_000)]"
    assert finished(evaluate.enqueue(source)).status == FAILED
    assert outcome(echo.enqueue(1)) == [[1], {}]


@task
def start_process(path, dies):
    Path(path).write_text(str(subprocess.Popen(["sleep", "1000"]).pid))
    if dies:
        os.kill(os.getpid(), signal.SIGKILL)


@processes
def test_what_a_task_has_started_ends_with_its_child(use, tmp_path):
    use(MAX_WORKERS=1, MAX_TASKS_PER_CHILD=1)
    for name, dies, status in (("killed", True, FAILED), ("ended", False, SUCCESSFUL)):
        path = tmp_path / name
        assert finished(start_process.enqueue(str(path), dies)).status == status
        assert wait_gone(int(path.read_text()))


def take_a_while():
    threading.Event().wait(0.8)


@processes
def test_task_that_takes_too_long_is_killed_and_no_other_one(use):
    initializer = f"{__name__}.take_a_while"  # Imports this file before the clock runs.
    backend = use(MAX_WORKERS=2, TASK_TIMEOUT=0.7, INITIALIZER=initializer)
    hangs = ("sum(range(10**11))", "signal.pause()")
    results = [evaluate.enqueue(hang) for hang in hangs]
    queued, killed = [identify.enqueue() for _ in range(3)], set()
    for result in map(finished, results):
        assert "TimeoutError" in errors(result)
        assert result.finished_at - result.started_at >= timedelta(seconds=0.7)
        killed |= {int(result.worker_ids[0].removeprefix("process-"))}
    assert killed.isdisjoint({outcome(result)[0] for result in queued})
    assert wait_gone(*killed)
    assert backend.stats()["workers"] == 2


@processes
def test_task_and_its_time_begin_after_set_up_and_receivers(use, connect, tmp_path):
    initializer = f"{__name__}.take_a_while"  # Beside tasks, which it leaves usable.
    backend = use(MAX_WORKERS=1, TASK_TIMEOUT=0.7, INITIALIZER=initializer)

    def make_file(**kwargs):
        take_a_while()
        (tmp_path / "made").touch()

    connect(make_file, task_started)
    source = "[os.path.exists(args[0]), echo.enqueue(1).id]"
    exists, result_id = outcome(evaluate.enqueue(source, str(tmp_path / "made")))
    assert exists
    assert backend.wait_result(result_id, TIMEOUT).return_value == [[1], {}]


@slow
@processes
def test_large_value_arrives_while_a_thread_of_the_parent_computes(use):
    use(MAX_WORKERS=1)
    done, times = threading.Event(), []
    computer = threading.Thread(target=lambda: all(iter(done.is_set, True)))
    for number in range(4):
        if number == 2:
            computer.start()
        begun = time.perf_counter()
        assert len(outcome(evaluate.enqueue("'x' * 20_000_000"))) == 20_000_000
        times.append(time.perf_counter() - begun)
    done.set()
    computer.join()
    assert min(times[2:]) < 20 * max(times[:2])


@task
def register_hook(path):
    atexit.register(Path(path).touch)
    return os.getpid()


@processes
def test_child_that_is_replaced_or_closed_ends_with_its_exit_hooks(use, tmp_path):
    backend = use(MAX_WORKERS=1, MAX_TASKS_PER_CHILD=2)
    paths = [tmp_path / name for name in ("first", "same", "second")]
    first, same, second = [outcome(register_hook.enqueue(str(path))) for path in paths]
    assert first == same != second
    assert wait_gone(first)
    assert [path.exists() for path in paths] == [True, True, False]
    backend.close()
    assert wait_gone(second)
    assert paths[-1].exists()


@processes
def test_children_ignore_ctrl_c_and_end_by_sigterm(use, gate, signals):
    use(MAX_WORKERS=1)
    pid = outcome(identify.enqueue())[0]
    os.kill(pid, signal.SIGINT)
    result = start_at(gate, signals, "done")
    os.kill(pid, signal.SIGINT)
    gate.open()
    done = finished(result)
    assert (done.return_value, done.worker_ids) == ("done", [f"process-{pid}"])
    os.kill(pid, signal.SIGTERM)
    assert wait_gone(pid)


# --- Child processes: how they are set up and started ---------------------------------

BROKEN = """
import os
from django.apps import apps

SECRET_KEY = "x"
calls = []

def initialize():
    calls.append(apps.ready)
    if "REPAIRED" not in os.environ:
        raise LookupError("broken on purpose")

if os.environ.get("DJANGO_SETTINGS_MODULE"):
    initialize()
"""


def start_tracker():
    """Be an INITIALIZER: have the client of an error tracker note its events."""
    import sentry_sdk

    def note_event(event, hint):
        Path(DIRECTORY, "events").write_text(event["logentry"]["message"])

    sentry_sdk.init("http://key@127.0.0.1/1", before_send=note_event)


@processes
def test_an_error_tracker_hears_of_a_child_and_of_its_errors(use, connect):
    capture, found = pytest.importorskip("sentry_sdk").utils.event_from_exception, []
    use(MAX_WORKERS=1, INITIALIZER=f"{__name__}.start_tracker")
    assert outcome(evaluate.enqueue("logging.error('Help')")) is None
    assert Path(DIRECTORY, "events").read_text() == "Help"
    connect(lambda **kwargs: found.append(capture(sys.exc_info())), task_finished)
    finished(raise_odd.enqueue("OSError"))
    cause, error = found[0][0]["exception"]["values"]
    assert (error["type"], error["value"]) == ("OSError", "odd")
    assert "# The line of the task." in cause["value"]


def count_open(backend):
    backend.close()  # A worker may not have let go of its last task yet.
    gc.collect()
    return len(os.listdir("/proc/self/fd")), descendants(os.getpid())


@processes
@pytest.mark.parametrize("broken", ["initializer", "settings", "start"])
def test_child_that_cannot_be_set_up_fails_the_task_and_leaves_nothing(
    use, module_path, monkeypatch, request, broken
):
    (module_path / "broken.py").write_text(BROKEN)
    # What pytest keeps of a log holds the tracebacks, and all in them.
    logging.disable()
    request.addfinalizer(lambda: logging.disable(logging.NOTSET))
    options = {"INITIALIZER": "broken.initialize"}
    if broken == "settings":
        monkeypatch.setenv("DJANGO_SETTINGS_MODULE", "broken")
        monkeypatch.setitem(sys.modules, "broken", types.ModuleType("broken"))
        options = {}
    backend, opened = use(MAX_WORKERS=2, **options), None
    with monkeypatch.context() as patch:
        if broken == "start":
            target = "multiprocessing.process.BaseProcess.start"
            patch.setattr(target, lambda process: [][0])
        for _ in range(5):
            results = [identify.enqueue() for _ in range(4)]
            for result in map(finished, results):
                assert issubclass(result.errors[0].exception_class, LookupError)
            opened = opened or count_open(backend)
    assert count_open(backend) == opened
    monkeypatch.setenv("REPAIRED", "yes")
    for _ in range(2):  # Called once, before django.setup().
        assert outcome(evaluate.enqueue("__import__('broken').calls")) == [False]


@processes
def test_child_that_hangs_while_it_is_set_up_is_killed(use, monkeypatch):
    monkeypatch.setattr(django_tasks_local, "_SET_UP_TIMEOUT", 0.5)
    started = descendants(os.getpid())
    use(MAX_WORKERS=1, INITIALIZER="signal.pause")
    assert "TimeoutError" in errors(finished(identify.enqueue()))
    assert wait_gone(*descendants(os.getpid()) - started)


PROGRAM = ported("""
import json, os
from django.conf import settings
{BEGIN}
from django.tasks import task, task_backends

class OwnError(Exception):
    pass

@task
def work(fails):
    if fails:
        raise OwnError
    return [os.getpid(), settings.SPECIAL, settings.USE_TZ]

def main():
    results = [work.enqueue(fails) for fails in (False, True)]
    wait = task_backends["default"].wait_result
    good, bad = [wait(result.id, 30) for result in results]
    same = bad.errors[0].exception_class is OwnError
    print(json.dumps([os.getpid(), *good.return_value, same]))
""")
CONFIGURED = """
from configurations import Configuration

class Site(Configuration):
    locals().update({VALUES})
"""
SHELL = "['', 'shell', '-v', '0', '-c', 'import shop.program as p; p.main()']"
APPS = "INSTALLED_APPS = ['django.contrib.contenttypes', 'shop']"
MODEL = "from django.contrib.contenttypes.models import ContentType"  # Once set up.
IN_CODE = "settings.configure(**{VALUES})"
AND_MAIN = f"{MAIN}\n    import django\n    django.setup()\n    main()"
CLASSED_MAIN = f"{MAIN}\n    import configurations\n    configurations.setup()"
WAYS = {
    "configure": {"main.py": PROGRAM.replace("{BEGIN}", IN_CODE) + AND_MAIN},
    "configurations": {
        "site_settings.py": CONFIGURED,
        "program.py": PROGRAM.replace("{BEGIN}", ""),
        "main.py": f"{CLASSED_MAIN}\n    import program\n    program.main()",
    },
    "command": {
        "site_settings.py": f"{APPS}\nglobals().update({{VALUES}})",
        "shop/__init__.py": "",
        "shop/vendored.py": MODULE.read_text(),
        "shop/program.py": PROGRAM.replace("{BEGIN}", MODEL),
        "main.py": f"{MAIN}\n    import django.core.management as management\n"
        f"    management.execute_from_command_line({SHELL})",
    },
}


@pytest.mark.parametrize(
    ("way", "backend"),
    [
        ("configure", "django_tasks_local.ProcessPoolBackend"),
        ("configurations", "django_tasks_local.ProcessPoolBackend"),
        ("command", "shop.vendored.ProcessPoolBackend"),
        rarely("command", "django_tasks_local.ProcessPoolBackend"),
        rarely("command", "shop.vendored.ThreadPoolBackend"),
        rarely("configure", "django_tasks_local.ThreadPoolBackend"),
    ],
)
def test_site_or_script_runs_tasks_of_its_own(tmp_path, monkeypatch, way, backend):
    values = {"SPECIAL": ["x", (1,)], "USE_TZ": False, "SECRET_KEY": "k"}
    values["TASKS"] = {"default": {"BACKEND": backend}}
    for name in ("DJANGO_SETTINGS_MODULE", "DJANGO_CONFIGURATION"):
        monkeypatch.delenv(name, raising=False)
    environ = {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(MODULE.parent)])}
    if way == "configurations":
        pytest.importorskip("configurations")
        environ["DJANGO_CONFIGURATION"] = "Site"
    if "site_settings.py" in WAYS[way]:
        environ["DJANGO_SETTINGS_MODULE"] = "site_settings"
    for name, text in WAYS[way].items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text.replace("{VALUES}", repr(values)))
    said, warned = run_python(tmp_path, "main.py", **environ)
    assert "Warning" not in warned
    parent, pid, *found = json.loads(said)
    assert found == [["x", [1]], False, True]
    assert (pid == parent) is ("Thread" in backend)


def test_main_script_without_a_guard_is_told_what_it_lacks(script):
    program = start(script, "say(finish(identify.enqueue()).errors[0].traceback)")
    program.line("if __name__ == '__main__'")
    program.rest()


class Unreadable:
    def __reduce__(self):
        return int, ("no number",)


@processes
def test_children_follow_changed_settings(use, gate):
    backend = use(MAX_WORKERS=1)
    far = echo.using(run_after=DAY).enqueue()
    source = "getattr(settings, args[0], None)"
    with override_settings(SITE="first"):
        assert outcome(evaluate.enqueue(source, "SITE")) == "first"
    assert outcome(evaluate.enqueue(source, "SITE")) is None
    busy = wait_at.enqueue(gate.path)
    with override_settings(SITE="second", HOOK=Unreadable(), LOCK=threading.Lock()):
        names = ("SITE", "HOOK", "LOCK")
        queued = [evaluate.enqueue(source, name) for name in names]
        gate.open()
        assert list(map(outcome, queued)) == ["second", None, None]
    with override_settings(SECRET_KEY=""):  # Django raises when it is read.
        assert outcome(evaluate.enqueue(source, "SITE")) is None
    assert outcome(busy) is None
    assert (backend.stats()["deferred"], far.status) == (1, READY)


@processes
def test_children_use_the_databases_that_a_test_run_renames(use, monkeypatch):
    use(MAX_WORKERS=1)
    default = connections.settings["default"]
    source = "connections['default'].settings_dict['NAME']"
    assert outcome(evaluate.enqueue(source)) == default["NAME"]
    monkeypatch.setitem(default, "NAME", "renamed")
    assert outcome(evaluate.enqueue(source)) == "renamed"
    monkeypatch.setitem(default["OPTIONS"], "factory", lambda: 1)  # Not pickleable.
    monkeypatch.setitem(default, "NAME", "renamed twice")
    assert outcome(evaluate.enqueue(source)) == "renamed twice"


TWO_CHILDREN = f"""{MAIN}
    for word in ("one", "two"):
        say(finish(echo.enqueue(word)).return_value)
"""


def test_without_fork_server_children_are_spawned(script, tmp_path, monkeypatch):
    directory = tmp_path / ("x" * 100)
    directory.mkdir()
    monkeypatch.setenv("TMPDIR", str(directory))
    warning, *said = start(script, TWO_CHILDREN, MAX_TASKS_PER_CHILD=1).rest()
    assert warning.startswith("No fork server, child processes are spawned: AF_UNIX")
    assert said == ["one", "two"]


UNDER_A_SERVER = f"""{MAIN}
    sys.executable = "/usr/bin/uwsgi-like"
    prefix, sys.prefix = sys.prefix, os.path.dirname(os.environ["SCRIPT_GATE"])
    say("without:", finish(identify.enqueue()).errors[0].traceback)
    sys.prefix = prefix
    say("with:", finish(echo.enqueue("runs")).return_value)
"""


def test_where_a_server_is_the_executable_children_use_the_python_beside_it(script):
    program = start(script, UNDER_A_SERVER)
    message = program.line("RuntimeError: sys.executable '/usr/bin/uwsgi-like'")
    assert "set sys.executable to" in message
    assert program.line("with:") == "with: runs"
    assert program.rest() == []
    assert program.code == 0


PARENT = f"""
BUSY = {{
    "die": lambda: signal.raise_signal(signal.SIGTERM),
    "sleep": lambda: signal.pause(),
    "GIL": lambda: sum(range(10**11)),
    "subprocess": lambda: os.system("sleep 1000"),
    "stopped": lambda: os.kill(os.getpid(), signal.SIGSTOP),
}}

@task
def work(name):
    say(name, os.getpid(), os.getppid())
    BUSY[name]()

def use_first_child():
    signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    say("died:", finish(work.enqueue("die")).errors[0].traceback)
{MAIN}
    server = socket.create_server(("127.0.0.1", 0))
    server.set_inheritable(True)
    first = threading.Thread(target=use_first_child)  # As in servers' threads.
    first.start()
    first.join()
    for name in NAMES.split():
        work.enqueue(name)
    say("idle", finish(identify.enqueue()).return_value, os.getpid())
    say("port", server.getsockname()[1], 0)
    signal.pause()
"""


@untraced
@pytest.mark.parametrize(
    ("method", "number", "busy"),
    [
        (None, signal.SIGKILL, "GIL"),
        rarely("forkserver", signal.SIGTERM, "GIL"),
        rarely("forkserver", signal.SIGKILL, "sleep subprocess stopped"),
        rarely("spawn", signal.SIGKILL, "sleep GIL subprocess"),
    ],
)
def test_children_end_with_their_parent_and_free_its_port(script, method, number, busy):
    source = PARENT.replace("NAMES", repr(busy))
    program = start(script, source, MAX_WORKERS=6, START_METHOD=method)
    program.line("ended with exit code -15")  # The signals of its thread are blocked.
    said = [program.line(word).split() for word in ("port", "idle", *busy.split())]
    port, *pids = (int(words[1]) for words in said)
    assert (said[2][2] == str(program.process.pid)) is (method == "spawn")
    started = descendants(program.process.pid)
    assert {*pids} <= started
    program.process.send_signal(number)
    assert program.process.wait(TIMEOUT) == -number
    assert wait_gone(*started, timeout=5)
    socket.create_server(("127.0.0.1", port)).close()  # No child has the socket.


# --- Processes of multiprocessing, forks ----------------------------------------------

OWN_PROCESS = f"""
import multiprocessing

def target(words):
    words.put("warm")  # Now a thread feeds the queue, until multiprocessing ends it.
    note.enqueue("in its own process")
{MAIN}
    context = multiprocessing.get_context(METHOD)
    words = context.Queue()
    process = context.Process(target=target, args=(words,))
    process.start()
    process.join(20)
    say("ended", process.exitcode)
    process.kill()
"""


@slow
@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_process_of_multiprocessing_finishes_its_tasks_and_ends(script, kind, method):
    said = start(script, OWN_PROCESS.replace("METHOD", repr(method)), kind).rest()
    assert {"ran in its own process", "ended 0"} <= {*said}, said


FORK = f"""{MAIN}
    def enqueue_on_and_on():
        while not done.is_set():
            finish(echo.using(backend="other").enqueue(1))

    running, queued = wait.enqueue("first"), note.enqueue("queued")
    finish(echo.using(backend="other").enqueue(1))
    done = threading.Event()
    threads = [threading.Thread(target=enqueue_on_and_on) for _ in range(3)]
    for thread in threads:
        thread.start()
    for number in range(4):
        pid = os.fork()
        if not pid:
            done.set()
            for result in (running, queued):
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
    say("end", finish(running).return_value, finish(queued).status)
    say("other", finish(echo.using(backend="other").enqueue(2)).return_value)
"""


@threads_first
def test_forked_copy_starts_with_nothing_and_harms_nothing(script, gate, kind):
    options = {"kind": kind, "MAX_WORKERS": 1}
    program = script(default=options, other={**options, "MAX_WORKERS": 2})
    program.start(FORK)
    program.line("opened")
    said = program.seen[:]
    assert said.count("exit 5") == 4, said
    assert said.count("stats True 0 0 0 0 0") == 4, said
    assert {"forked 0", "forked 3"} <= {*said}
    spawned = sum(line.startswith("No fork server, child") for line in said)
    assert spawned == (2 if kind == "ProcessPoolBackend" else 0), said
    assert not any(line.startswith(("known", "ran", "Trace")) for line in said), said
    gate.open()
    said = program.rest()
    assert said == ["ran first", "ran queued", "end first SUCCESSFUL", "other 2"]


FORK_WHILE_HELD = f"""
from django.core.cache import caches

class Slow(str):
    def __hash__(self):
        if sys._getframe(1).f_globals["__name__"] == "asgiref.local":  # It has a lock.
            held.set()
            done.wait()
        return super().__hash__()
{MAIN}
    for handler in (task_backends, caches, None):
        held, done = threading.Event(), threading.Event()
        if handler:
            holder = threading.Thread(target=lambda: handler[Slow("default")])
            holder.start()
            held.wait()
        else:
            task_started.lock.acquire()  # As another thread would amid a send().
        if not os.fork():
            done.set()
            value = finish(echo.enqueue(1)).return_value
            say("copy", caches["default"].get("key", "none"), value)
            os._exit(0)
        os.wait()
        done.set()
        holder.join()
"""


def test_copy_can_enqueue_though_another_thread_held_locks_of_django(script):
    said = start(script, FORK_WHILE_HELD, "ThreadPoolBackend").rest()
    copies = [line for line in said if line.startswith("copy")]  # Or a warning.
    assert copies == ["copy none 1"] * 3, said


def attempt_to_enqueue(_):
    try:
        return str(echo.enqueue().status)
    except RuntimeError as error:
        return str(error)


@task
def fork_workers_and_leave_a_thread(gate_path, path):
    def enqueue_late():
        pass_gate(gate_path)
        Path(path).write_text(attempt_to_enqueue(None))

    with multiprocessing.get_context("fork").Pool(2) as pool:
        refused = pool.map(attempt_to_enqueue, range(2))
    threading.Thread(target=enqueue_late, daemon=True).start()
    own = task_backends["default"].get_result(current_result_id.get())
    return [*refused, str(own.status), echo.enqueue("own").id]


@processes
def test_forks_and_left_threads_of_a_childs_task_cannot_enqueue(use, gate, tmp_path):
    backend, path = use(MAX_WORKERS=1), tmp_path / "said"
    os.mkfifo(path)
    result = fork_workers_and_leave_a_thread.enqueue(gate.path, str(path))
    *refused, status, result_id = outcome(result)
    assert status == "RUNNING"
    assert backend.wait_result(result_id, TIMEOUT).return_value == [["own"], {}]
    gate.open()
    refused.append(path.read_text())
    assert len(refused) == 3
    assert all("only its running task" in text for text in refused), refused


# --- The interpreter exits ------------------------------------------------------------

EXIT = f"""
def compute():
    from concurrent.futures import ProcessPoolExecutor
    with ProcessPoolExecutor(1) as executor:
        return executor.submit(pow, 2, 10).result()
@task
async def work():
    from asgiref.sync import sync_to_async
    say("ran", await sync_to_async(compute)())
    await note.using(backend="other").aenqueue("late")
def receive(task_result, **kwargs):
    errors = [error.traceback.splitlines()[-1] for error in task_result.errors]
    say("finished", names.get(task_result.id), task_result.status, *errors)
names = {{}}
{MAIN}
    from datetime import timedelta
    signal.signal(signal.SIGABRT, lambda *args: sys.exit(1))  # As in gunicorn.
    task_finished.connect(receive)
    names[wait.enqueue().id] = "running"
    names[work.enqueue().id] = "queued"
    names[note.using(run_after=timedelta(days=1)).enqueue("never").id] = "deferred"
    say("ids", json.dumps(names))
    wait_until_reached()
    sys.exit(3)
"""


def start_exit(script, kind, source=EXIT, **options):
    """Start a script that exits amid its tasks; return their ids by their states."""
    options = {"kind": kind, "MAX_WORKERS": 1, **options}
    program = script(default={**options}, other={**options})
    program.start(source)
    program.line("waits")
    names = json.loads(program.line("ids ").removeprefix("ids "))
    return program, {name: result_id for result_id, name in names.items()}


def assert_lost(said, ids):
    """Check that these tasks and no others were abandoned, with one warning."""
    failed = [re.fullmatch(r"finished (\w+) FAILED (.*)", line) for line in said]
    reasons = {match[1]: match[2] for match in failed if match}
    assert reasons.keys() == ids.keys()
    assert all("the process exits" in reason for reason in reasons.values()), reasons
    [warning] = [line for line in said if " tasks are FAILED, as " in line]
    assert warning.startswith(f"{len(ids)} tasks are FAILED, as the process exits: ")
    assert sorted(warning.partition(": ")[2].split(", ")) == sorted(ids.values())


@pytest.mark.skipif(
    (3, 12) <= sys.version_info < (3, 12, 2),
    reason="Python 3.12.0 and 3.12.1 start no thread once the main thread has ended",
)
@threads_first
def test_exit_waits_for_the_work_and_says_so_after_a_second(script, gate, kind):
    program, ids = start_exit(script, kind)
    warning = program.line("The process exits once")
    assert warning.endswith("Ctrl-C gives up, SHUTDOWN_TIMEOUT limits")
    gate.open()
    said = program.rest()
    assert program.code == 3
    order = ["ran waited", "finished running SUCC", "ran 1024", "finished queued SUCC"]
    positions = [next(i for i, x in enumerate(said) if x.startswith(o)) for o in order]
    assert positions == sorted(positions)
    assert_lost(said, {"deferred": ids["deferred"]})


QUICK = f"""
@task
def work():
    atexit.register(say, "flushed")
    reach()
    threading.Event().wait(0.2)
    say("worked")

def attempt(alias):
    try:
        say(echo.using(backend=alias).enqueue(1))
    except RuntimeError as error:
        say(error)
    task_backends[alias].close()
{MAIN}
    atexit.register(attempt, "fresh")
    atexit.register(attempt, "default")
    work.enqueue()
    wait_until_reached()
"""


def test_exit_waits_a_moment_in_silence_and_then_refuses_tasks(script, kind):
    program = script(default={"kind": kind}, fresh={"kind": kind})
    program.start(QUICK)
    said = ["worked", "flushed"]  # Exit hooks run in a child, too.
    said += [f"The process exits, {a!r} takes no tasks" for a in ("default", "fresh")]
    assert program.rest() == said
    assert program.code == 0


@pytest.mark.parametrize(
    ("kind", "timeout"),
    [
        ("ThreadPoolBackend", 0.3),
        ("ProcessPoolBackend", 0),
        rarely("ThreadPoolBackend", 0),
        rarely("ProcessPoolBackend", 0.3),
    ],
)
def test_exit_fails_what_is_left_when_its_time_is_up(script, kind, timeout):
    program, ids = start_exit(script, kind, SHUTDOWN_TIMEOUT=timeout)
    said = program.rest()
    assert program.code == 3
    assert not any("Ctrl-C" in line or line.startswith("ran") for line in said), said
    assert_lost(said, ids)


@threads_first
@pytest.mark.parametrize("second", [signal.SIGINT, rarely(signal.SIGABRT)])
def test_second_ctrl_c_or_a_supervisor_gives_up_waiting_at_once(script, kind, second):
    source = EXIT.replace("sys.exit(3)", "say('up'), signal.pause()")
    program, ids = start_exit(script, kind, source)
    program.line("up")
    os.killpg(program.process.pid, signal.SIGINT)
    program.line("Ctrl-C gives up, SHUTDOWN_TIMEOUT limits")
    program.process.send_signal(second)
    said = program.rest()
    assert_lost(said, ids)
    assert program.code == -signal.SIGINT
    assert not any("Exception" in line for line in said), said


GIVES_UP = f"""
import asyncio, logging
@task
async def hang():
    reach()
    try:
        await asyncio.Event().wait()
    finally:
        say("cleaned up")
def never_return(**kwargs):
    reach()
    threading.Event().wait()
def join(**kwargs):
    try:
        task_backends["default"].join()
    except RuntimeError as error:
        say("refused", error)
logger = logging.getLogger("django_tasks_local")
class Interrupt(logging.Handler):
    def emit(self, record):
        if "FAILED" in record.msg:
            logger.removeHandler(self)
            raise KeyboardInterrupt  # As if Ctrl-C came just now.
{MAIN}
    {{BEGIN}}
    wait_until_reached()
"""
FIFTY = "[wait.enqueue() for _ in range(50)]"
ENDLESS = "task_finished.connect(never_return); echo.enqueue(1)"
JOINING = "task_finished.connect(join); wait.enqueue()"
INTERRUPTED = "logger.addHandler(Interrupt()); wait.enqueue()"
LOST = "1 tasks are FAILED, as the process exits"


@pytest.mark.parametrize(
    ("kind", "workers", "source", "words"),
    [
        ("ThreadPoolBackend", 1, "hang.enqueue()", "cleaned up"),
        rarely("ProcessPoolBackend", 1, "hang.enqueue()", LOST),
        rarely("ProcessPoolBackend", 8, FIFTY, LOST.replace("1", "50")),
        rarely("ThreadPoolBackend", 1, ENDLESS, LOST),
        rarely("ProcessPoolBackend", 1, ENDLESS, LOST),
        rarely("ThreadPoolBackend", 1, JOINING, "refused A task of 'default' must not"),
        rarely("ThreadPoolBackend", 1, INTERRUPTED, LOST),
        rarely("ProcessPoolBackend", 1, INTERRUPTED, LOST),
    ],
)
def test_nothing_holds_up_an_exit_that_gives_up(script, kind, workers, source, words):
    options = {"MAX_WORKERS": workers, "SHUTDOWN_TIMEOUT": 0}
    program = start(script, GIVES_UP.replace("{BEGIN}", source), kind, **options)
    said = program.rest()  # To the end of the last process that could write.
    assert sum(words in line for line in said) == 1, said
    assert program.code == 0


# --- Servers, stress ------------------------------------------------------------------

SITE = f"""
import asyncio
from django.core.asgi import get_asgi_application
from django.core.wsgi import get_wsgi_application
def run(request, word):
    result = wait.enqueue() if word == "begin" else finish(identify.enqueue())
    pid = result.return_value if result.is_finished else None
    return JsonResponse({{"web": os.getpid(), "pid": pid}})
urlpatterns = [path("<word>", run)]
application, django_asgi = get_wsgi_application(), get_asgi_application()
async def asgi(scope, receive, send):
    if scope["type"] != "lifespan":
        return await django_asgi(scope, receive, send)
    for event in ("startup", "shutdown"):
        await receive()
        if event == "shutdown":
            say("ends")
            await asyncio.to_thread(task_backends["default"].close)
        await send({{"type": f"lifespan.{{event}}.complete"}})
if "gunicorn" in sys.modules and "--preload" in sys.argv:
    say("preloaded", finish(identify.enqueue()).return_value)
{MAIN}
    from django.core.management import execute_from_command_line
    settings.DEBUG = True
    settings.WSGI_APPLICATION = None
    execute_from_command_line(sys.argv)
"""


@pytest.fixture
def port():
    """Return a free port; the test has to leave it free."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        number = server.getsockname()[1]
    yield number
    socket.create_server(("127.0.0.1", number)).close()


def get(port, word="run"):
    """Ask a server; while it is not up yet, ask again."""
    url, answers = f"http://127.0.0.1:{port}/{word}", []

    def has_answered():
        with contextlib.suppress(OSError), urllib.request.urlopen(url) as response:
            answers.append(json.load(response))
        return answers

    wait_until(has_answered)
    return answers[0]


def end_server(program, gate, words, number=signal.SIGTERM):
    """End a server; open the gate once it says so; return what it says then."""
    started = descendants(program.process.pid)
    os.killpg(program.process.pid, number)
    if words:
        program.line(words)
    gate.open()
    said = program.rest()
    assert "Traceback" not in "".join(said), said
    assert wait_gone(*started)
    return said


PLACES = os.pathsep.join([os.path.dirname(sys.executable), os.environ["PATH"]])
UWSGI = shutil.which("uwsgi", path=PLACES)
EXECUTE = ["-c", "import os, sys; os.execv(sys.argv[1], sys.argv[1:])", UWSGI]
OPTIONS = "--master --enable-threads --processes 1 --die-on-term --module program"
SERVERS = {
    "gunicorn": ["-m", "gunicorn", "program:application", "--bind"],
    "uvicorn": ["-m", "uvicorn", "program:asgi", "--port"],
    "uwsgi": [*EXECUTE, *OPTIONS.split(), "--http-socket"],
}


@slow
@pytest.mark.parametrize("server", SERVERS)
def test_server_runs_tasks_and_ends_after_them(script, gate, port, kind, server):
    if server == "uwsgi" and not UWSGI:
        pytest.skip("uwsgi is neither beside Python nor on PATH")
    if server != "uwsgi":
        pytest.importorskip(server)
    program = script(default={"kind": kind, "MAX_WORKERS": 1})
    address = port if server == "uvicorn" else f"127.0.0.1:{port}"
    program.start(SITE, *SERVERS[server], address)
    first, second = get(port), get(port)
    assert first == second
    assert (first["pid"] == first["web"]) is (kind == "ThreadPoolBackend")
    get(port, "begin")
    program.line("waits")
    words = {"uvicorn": "ends", "uwsgi": ""}.get(server, "SHUTDOWN_TIMEOUT")
    said = end_server(program, gate, words)
    assert "ran waited" in said or server == "uwsgi"  # Its workers do not wait.


@slow
def test_gunicorn_preloads_a_used_pool_and_recycles_workers(script, gate, port, kind):
    pytest.importorskip("gunicorn")
    program = script(default={"kind": kind, "MAX_WORKERS": 1})
    options = [f"127.0.0.1:{port}", "--preload", "--max-requests", "2"]
    program.start(SITE, *SERVERS["gunicorn"], *options)
    child = int(program.line("preloaded").split()[1])
    first = get(port)
    assert {child, program.process.pid}.isdisjoint(first.values())
    assert get(port, "begin")["web"] == first["web"]
    program.line("The process exits once")
    gate.open()
    assert program.line("ran") == "ran waited"
    assert wait_gone(first["web"])
    assert get(port)["web"] != first["web"]
    end_server(program, gate, "")
    assert program.code == 0


@slow
def test_runserver_reloads_with_a_used_pool(script, gate, port, kind):
    program = script(default={"kind": kind, "MAX_WORKERS": 1})
    program.start(SITE, "program.py", "runserver", f"127.0.0.1:{port}")
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
    end_server(program, gate, "", signal.SIGINT)


def act(own, both, results):
    """Do what chance tells; put results into the queues of what becomes of them."""
    choice, backend, other = own.random(), own.choice(both), own.choice(both)
    options = {"backend": backend.alias, "priority": own.randrange(-100, 100)}
    if choice < 0.01:
        backend.close()
    elif choice < 0.02:
        failing = "int('x')" if type(backend) is ThreadPoolBackend else "os.abort()"
        results[FAILED].put(evaluate.using(**options).enqueue(failing))
    elif choice < 0.1:
        source = "echo.using(backend=args[0]).enqueue(args[1]).id"
        first = evaluate.using(**options).enqueue(source, other.alias, choice)
        second = other.wait_result(outcome(first), TIMEOUT)
        assert second.return_value == [[choice], {}]
    else:
        results[SUCCESSFUL].put(echo.using(**options).enqueue(choice))
        if results[SUCCESSFUL].qsize() % 500 == 0:
            backend.join(TIMEOUT)


@slow
def test_stress_tasks_that_enqueue_dying_children_and_close(both):
    seed = int(os.environ.get("TASKS_TEST_SEED", 0)) or random.randrange(1, 2**32)
    print(f"TASKS_TEST_SEED={seed}")  # Shown where it fails.
    end = time.monotonic() + float(os.environ.get("TASKS_TEST_STRESS", 4))
    results = {SUCCESSFUL: queue.Queue(), FAILED: queue.Queue()}
    seeds = itertools.count(seed)

    def act_on_and_on():
        own = random.Random(next(seeds))
        while time.monotonic() < end:
            act(own, both, results)

    in_threads(8, act_on_and_on)
    for status, expected in results.items():
        assert not expected.empty()
        assert {finished(result).status for result in expected.queue} == {status}
    for backend in both:
        backend.close()
        assert backend.stats()["workers"] == 0


# --- RESULTS_CACHE: results for other processes ---------------------------------------

CHECKOUT = Path(__file__).parent
only_text = pytest.mark.parametrize("cache", ["text"], indirect=True)


class TextCache(BaseCache):
    """Files of JSON: what is no JSON does not fit, and nothing is ever pickled."""

    def __init__(self, location, params):
        super().__init__(params)
        self.directory = Path(location)
        self.directory.mkdir(exist_ok=True)

    def get(self, key, default=None, version=None):
        path = self.directory / self.make_and_validate_key(key, version=version)
        return json.loads(path.read_text()) if path.exists() else default

    def set(self, key, value, timeout=None, version=None):
        path = self.directory / self.make_and_validate_key(key, version=version)
        path.write_text(json.dumps(value))


@pytest.fixture(params=["files", "text", pytest.param("redis", marks=needs_redis)])
def cache(request):
    """Return the alias of a cache that processes share."""
    text = {"BACKEND": f"{__name__}.TextCache", "LOCATION": f"{DIRECTORY}/text"}
    known = {**settings.CACHES, "text": text, "redis": REDIS_CACHE}
    with override_settings(CACHES=known):
        yield request.param


def as_text(result):
    """Return all that a result says."""
    values = [type(result.task).__name__, asdict(result)]
    return json.dumps(values, default=lambda v: getattr(v, "__qualname__", str(v)))


READER = """
import json, sys
tests = __import__(sys.argv[1])
for line in sys.stdin:
    sys.path[:], caches, tasks, method, result_id = json.loads(line)
    with tests.override_settings(CACHES=caches, TASKS=tasks):
        backend = tests.task_backends["default"]
        try:
            text = tests.as_text(getattr(backend, method)(result_id))
        except tests.TaskResultDoesNotExist as error:
            text = "TaskResultDoesNotExist " + str(error)
    print(json.dumps(text), flush=True)
"""


@pytest.fixture(scope="session")
def read_elsewhere():
    """Return a function that has another process read a result, as text."""
    command = [sys.executable, "-c", READER, __name__]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    command.append(json.dumps([settings.CACHES, settings.TASKS]))
    with subprocess.Popen(command, cwd=CHECKOUT, **pipes) as reader:

        def read(result_id, method="get_result"):
            request = [sys.path, settings.CACHES, settings.TASKS, method, result_id]
            print(json.dumps(request), file=reader.stdin, flush=True)
            return json.loads(reader.stdout.readline())

        yield read


def test_another_process_reads_equal_results(use, cache, gate, signals, read_elsewhere):
    backend = use(RESULTS_CACHE=cache, MAX_WORKERS=1)
    first = start_at(gate, signals, {"é": [1.5, None]})
    tasks = [echo.using(priority=7), fail, echo.using(run_after=DAY)]
    results = [first, *(task.enqueue("x") for task in tasks)]
    seen = [backend.get_result(result.id) for result in results]
    assert [result.status for result in seen] == [RUNNING, READY, READY, READY]
    assert [read_elsewhere(result.id) for result in seen] == [*map(as_text, seen)]
    assert "in another process" in read_elsewhere(first.id, "wait_result")
    gate.open()
    ends = [finished(result) for result in results[:3]]
    backend.close()  # It abandons the deferred one.
    ends.append(backend.get_result(results[3].id))
    assert [end.status for end in ends] == [SUCCESSFUL, SUCCESSFUL, FAILED, FAILED]
    assert [read_elsewhere(end.id) for end in ends] == [*map(as_text, ends)]
    assert read_elsewhere(first.id, "wait_result") == as_text(ends[0])
    assert re.match("TaskResultDoesNotExist.*RESULTS_CACHE", read_elsewhere("0" * 36))


def test_what_memory_has_evicted_is_read_from_the_cache(use, cache, monkeypatch):
    backend = use(RESULTS_CACHE=cache, MAX_RESULTS=1)
    results = [finished(task.enqueue("x")) for task in (echo, fail, echo)]
    assert backend.stats()["finished"] == 1
    with monkeypatch.context() as patch:
        for name in ("load", "loads", "Unpickler") if cache == "text" else ():
            patch.setattr(pickle, name, None)  # Only other caches unpickle their own.
        assert [backend.get_result(result.id) for result in results] == results
    assert echo.get_result(results[0].id) == results[0]
    with pytest.raises(TaskResultMismatch):
        echo.get_result(results[1].id)

    async def read():
        last = await backend.await_result((await echo.aenqueue("y")).id, TIMEOUT)
        assert last.return_value == [["y"], {}]
        assert await backend.await_result(results[0].id, TIMEOUT) == results[0]
        return [await backend.aget_result(result.id) for result in results]

    assert asyncio.run(read()) == results
    for no_key in ("", "with a space", "\n", "x" * 300):
        with pytest.raises(TaskResultDoesNotExist):
            backend.get_result(no_key)


RETRIES = """
from dataclasses import dataclass
from django_tasks_local import LocalTask, ProcessPoolBackend, ThreadPoolBackend

@dataclass(frozen=True, slots=True, kw_only=True)
class RetryTask(LocalTask):
    max_attempts: int = 1
class RetryThreadPoolBackend(ThreadPoolBackend):
    task_class = RetryTask
class RetryProcessPoolBackend(ProcessPoolBackend):
    task_class = RetryTask

def tell(context):
    here = context.task_result.task
    asked = here.get_result(context.task_result.id).task
    return [[type(t).__name__, t.max_attempts, t.priority] for t in (here, asked)]
values = {"backend": "default", "queue_name": "default", "run_after": None}
tell = RetryTask(func=tell, takes_context=True, priority=0, **values)
"""


@only_text
def test_own_task_classes_keep_fields(use, kind, cache, module_path, read_elsewhere):
    (module_path / "retries.py").write_text(RETRIES)
    path = f"retries.Retry{kind}"
    backend = use({"BACKEND": path}, RESULTS_CACHE=cache, MAX_RESULTS=1)
    from retries import tell

    three = replace(tell, max_attempts=3)
    if HAS_EXTRA_ARGUMENTS:
        assert task(takes_context=True, max_attempts=3)(tell.func) == three
    mine = three.using(priority=5)
    first, last = finished(mine.enqueue()), finished(tell.enqueue())
    assert first.return_value == [["RetryTask", 3, 5]] * 2
    assert last.return_value == [["RetryTask", 1, 0]] * 2
    assert (first.task, tell.get_result(last.id).task) == (mine, tell)
    assert backend.get_result(first.id) == first  # It has been evicted from memory.
    assert read_elsewhere(first.id) == as_text(first)
    assert '"max_attempts": 3' in as_text(first)


OWNER = """
import json, os, signal, socket, sys, threading
real = os.readlink; exec(sys.argv[1])
tests, path = __import__(sys.argv[2]), sys.argv[3]
caches, tasks = json.loads(sys.argv[4])
tests.override_settings(CACHES=caches, TASKS=tasks).enable()
done, started = tests.finished(tests.echo.enqueue()), threading.Event()
tests.task_started.connect(lambda **values: started.set(), weak=False)
results = [done, tests.wait_at.enqueue(path), tests.echo.enqueue()]
started.wait()
print(json.dumps([result.id for result in results]), flush=True)
signal.pause()
"""
OWNER_PLACES = {
    "here": "",
    "host": "socket.gethostname = lambda: 'another'",
    "box": "os.readlink = lambda p, **k: 'b' if 'ns/pid' in str(p) else real(p, **k)",
}


@only_text
@pytest.mark.parametrize("place", OWNER_PLACES)
def test_tasks_of_a_killed_process_are_failed(use, place, cache, gate, read_elsewhere):
    backend = use(RESULTS_CACHE=cache, MAX_WORKERS=1)
    command = [sys.executable, "-c", OWNER, OWNER_PLACES[place], __name__, gate.path]
    command.append(json.dumps([settings.CACHES, settings.TASKS]))
    with subprocess.Popen(command, cwd=CHECKOUT, stdout=subprocess.PIPE) as process:
        try:
            ids = json.loads(process.stdout.readline())
            before = [backend.get_result(result_id) for result_id in ids]
            children = descendants(process.pid)
        finally:
            process.kill()
    assert wait_gone(*children)
    after = [backend.get_result(result_id) for result_id in ids]
    assert [result.status for result in before] == [SUCCESSFUL, RUNNING, READY]
    lost = after[1:] if place == "here" else []  # Elsewhere it may be alive.
    assert after[: 3 - len(lost)] == before[: 3 - len(lost)]
    for result in lost:
        assert f"{process.pid} ended" in errors(result)
        assert result.finished_at
    assert [*map(read_elsewhere, ids)] == [*map(as_text, after)]


def test_a_result_whose_task_is_gone_does_not_exist(use, cache, module_path):
    backend = use(RESULTS_CACHE=cache, MAX_RESULTS=1)
    for name in ("gone", "halfway"):
        source = f"from {__name__} import task\n@task\ndef work():\n    pass\n"
        (module_path / f"{name}.py").write_text(source)
    import gone
    import halfway

    results = [finished(task.enqueue()) for task in (gone.work, halfway.work, echo)]
    assert backend.get_result(results[0].id) == results[0]
    (module_path / "gone.py").unlink()
    del sys.modules["gone"], halfway.work
    for result, name in zip(results[:2], ("gone", "halfway"), strict=True):
        with pytest.raises(TaskResultDoesNotExist, match=name):
            backend.get_result(result.id)


@only_text
def test_entries_are_written_at_once_or_never(use, cache, connect, read_elsewhere):
    use(RESULTS_CACHE=cache)
    with transaction.atomic():
        late = echo.using(run_after=DAY).enqueue()
        assert read_elsewhere(late.id) == as_text(late)
    ids = []

    def refuse(task_result, **kwargs):
        ids.append(task_result.id)
        raise PermissionError("not this one")

    connect(refuse, task_enqueued)
    with pytest.raises(PermissionError, match="not this one"):
        echo.enqueue()
    assert "TaskResultDoesNotExist" in read_elsewhere(*ids)


def test_an_outage_of_the_cache_is_logged_and_harms_no_task(use, tmp_path, caplog):
    place = tmp_path / "cache"
    files = {**settings.CACHES["files"], "LOCATION": str(place)}
    known = {**settings.CACHES, "breakable": files}
    backend = use(known=known, RESULTS_CACHE="breakable")
    for outages in (1, 2):
        assert finished(echo.enqueue("x")).return_value == [["x"], {}]
        shutil.rmtree(place)
        place.touch()  # A file where the directory was: all fails.
        results = []
        in_threads(4, lambda to: to.extend(map(echo.enqueue, range(5))), results)
        ends = [finished(result) for result in results]
        assert [end.return_value for end in ends] == [[r.args, {}] for r in results]
        assert [backend.get_result(end.id) for end in ends] == ends
        backend.join(TIMEOUT)
        said = logged(caplog)
        assert len(said) == 60 * outages  # READY, RUNNING, SUCCESSFUL of 20.
        assert {*said} == {"ERROR RESULTS_CACHE 'breakable' fails"}
        assert re.search("FileExists|NotADirectory", caplog.text)
        with pytest.raises(OSError, match=str(place)):  # It has to ask the cache.
            backend.get_result("0" * 36)
        place.unlink()


def test_a_cache_that_processes_do_not_share_is_refused_with_the_reason(kind):
    reason = "'default'.*RESULTS_CACHE.*share.*local-memory or dummy.*'other'"
    for name in ("locmem.LocMemCache", "dummy.DummyCache", ""):
        other = {"BACKEND": f"django.core.cache.backends.{name}"}
        known = {**settings.CACHES, "other" if name else "another": other}
        with override_settings(CACHES=known):
            text = refusal(kind, {"OPTIONS": {"RESULTS_CACHE": "other"}})
        assert re.search(reason, text)
    assert refusal(kind, {"OPTIONS": {"RESULTS_CACHE": "files"}}) == ""


# --- The practice around the file: README, servers, growing out -----------------------

README = Path(os.environ.get("TASKS_TEST_README", CHECKOUT / "README.md"))
RUN_BY = {  # The files of the README, and a test that runs each.
    "mysite/settings.py": "test_the_command_for_cron_runs_its_task_and_logs_it",
    "myapp/tasks.py": "test_the_tests_of_the_readme_pass",
    "myapp/tests.py": "test_the_tests_of_the_readme_pass",
    "myapp/recipes.py": "test_the_tests_of_the_readme_pass",
    "mysite/asgi.py": "test_uvicorn_finishes_the_tasks_on_sigterm",
    "mysite/steps.py": "test_the_same_tasks_run_in_workers_of_django_tasks_db",
    "mysite/steps_rq.py": "test_the_same_tasks_run_in_workers_of_django_tasks_rq",
    "example.py": "test_the_example_site_runs_as_written",
}
DEMONSTRATION = "python -m django_tasks_local"


def readme():
    return README.read_text(encoding="utf-8")


def blocks(language):
    """Return the code blocks of a language."""
    found = re.findall(rf"^```{language}\n(.*?)^```$", readme(), re.M | re.S)
    return [*map(ported, found)]


def readme_files():
    """Return the Python blocks, by the path that their first line names."""
    files = defaultdict(str)
    for block in blocks("python"):
        files[block.split()[1].strip(",")] += block
    return files


def command(begin):
    """Return the words of a command that the README names in its text."""
    return shlex.split(re.search(rf"`([^`]*\b{begin}[^`]*)`", readme())[1])


def table_with(cell):
    """Return the rows of the README's table that has this cell; each is a list."""
    for table in re.findall(r"(?:^\|.*\n)+", readme(), re.M):
        rows = [re.split(r"\s*\|\s*", line)[1:-1] for line in table.splitlines()[2:]]
        if cell in itertools.chain(*rows):
            return rows
    raise AssertionError(f"no table has {cell}")


SETTINGS = f"""
SECRET_KEY = "tests"
ROOT_URLCONF = "myapp.slow"
INSTALLED_APPS = ["django.contrib.auth", "django.contrib.contenttypes", "myapp"]
INSTALLED_APPS += ["django_tasks"] if {BACKPORT} else []
DATABASES = {{"default": {{"NAME": "db.sqlite3", "TEST": {{"NAME": "test.sqlite3"}}}}}}
DATABASES["default"]["ENGINE"] = "django.db.backends.sqlite3"
"""

SLOW = """
import fcntl, pathlib
from django.http import HttpResponse
from django.tasks import task
from django.urls import path
@task
def leave_mark(gate, mark):
    with open(gate) as file:
        fcntl.flock(file, fcntl.LOCK_SH)
    pathlib.Path(mark).touch()
def start(request, gate, directory):
    for alias in ("default", "cpu"):
        leave_mark.using(backend=alias).enqueue(gate, f"{directory}/{alias}")
    return HttpResponse()
urlpatterns = [path("start<path:gate>:<path:directory>", start)]
"""


@pytest.fixture
def project(tmp_path, monkeypatch):
    """Return the directory of a Django project made of the blocks of the README."""
    monkeypatch.setenv("DJANGO_SETTINGS_MODULE", "mysite.settings")
    directory, files = tmp_path / "project", readme_files()
    files["mysite/settings.py"] = SETTINGS + files["mysite/settings.py"]
    files |= {"myapp/slow.py": SLOW, "myapp/__init__.py": "", "mysite/__init__.py": ""}
    for name, text in files.items():
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_text(ported(text), encoding="utf-8")
    return directory


def test_every_code_block_of_the_readme_is_run_by_a_test():
    languages = re.findall(r"^```(.+)$", readme(), re.M)
    assert {*languages} == {"pycon", "python", "sh"}
    assert readme().count("```") == 2 * len(languages)
    assert {*readme_files()} == {*RUN_BY}
    assert {*RUN_BY.values()} <= {*globals()}


def test_the_interactive_sessions_of_the_readme_print_what_they_say(project):
    code = "import django, doctest; django.setup(); print(doctest.testfile('s', False))"
    for session in blocks("pycon"):
        (project / "s").write_text(session)
        said = run_python(project, "-c", code)[0]
        assert f"failed=0, attempted={session.count('>>>')}" in said, said


PRACTICE = """
import json
from django.core import mail
from django.tasks import task_backends
from django.test import TransactionTestCase, override_settings
from . import recipes
class PracticeTests(TransactionTestCase):
    @override_settings(ADMINS=[ADMIN])
    def test_a_failure_is_mailed_and_a_retry_is_due_as_the_health_page_shows(self):
        backend = task_backends["default"]
        backend.wait_result(recipes.fetch.enqueue("http://127.0.0.1:1/").id)
        states = json.loads(recipes.health(None).content)
        [message] = mail.outbox
        backend.close()
        self.assertEqual((states["default"]["deferred"], "cpu" in states), (1, True))
        self.assertIn("fetch failed", message.subject)
        self.assertIn("Connection refused", message.body)
"""


def test_the_tests_of_the_readme_pass(project):
    """And one of ours, of what they do not use."""
    admin = "'a@example.com'" if django.VERSION >= (6, 0) else "('a', 'a@example.com')"
    text = ported(PRACTICE.replace("ADMIN]", f"{admin}]"))
    (project / "myapp/test_practice.py").write_text(text)
    number = 1 + readme_files()["myapp/tests.py"].count("def test_")
    assert f"Ran {number} tests" in run_python(project, "-m", "django", "test")[1]


def test_the_command_for_cron_runs_its_task_and_logs_it(project):
    *arguments, code = command("manage.py shell -v 0")[-5:]
    logged = run_python(project, "-m", "django", *arguments, ported(code))[1]
    assert re.search("state=RUNNING(.|\n)*state=SUCCESSFUL", logged), logged


@pytest.mark.slow
def test_the_demonstration_shows_both_backends(tmp_path):
    shown, logged = run_python(tmp_path, *DEMONSTRATION.split()[1:])
    for part in shown.split("ProcessPoolBackend"):
        assert {"READY", "RUNNING", "SUCCESSFUL", "TASK", "STATUS"} <= {*part.split()}
        assert re.search(r"(wait|sum)-1 +SUCCESSFUL", part)
    assert not re.search("[A-Z] +(wait|sum)-", shown)
    assert shown.startswith("ThreadPoolBackend")
    assert "README.md" in shown.splitlines()[-1], "where to go next"
    assert not re.search(r"[\r\x1b]|Traceback", shown + logged), "in a file it is plain"
    pipe = ["sh", "-c", f"{sys.executable} {DEMONSTRATION[7:]} | head -3"]
    begin = subprocess.run(pipe, cwd=tmp_path, capture_output=True, text=True)
    assert begin.stdout.splitlines() == shown.splitlines()[:3]
    assert begin.stderr == ""


@pytest.mark.slow
def test_the_commands_of_the_readme_install_from_a_checkout(tmp_path):
    pytest.importorskip("pip")
    copy, hidden = tmp_path / "checkout", shutil.ignore_patterns(".*")
    shutil.copytree(CHECKOUT, copy, ignore=hidden)
    venv.create(tmp_path / "venv", with_pip=False)
    environ = {
        **os.environ,
        "PATH": f"{tmp_path}/venv/bin{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": sysconfig.get_path("purelib"),  # It need not be fetched.
        "PYTEST_ADDOPTS": "--collect-only -q -p no:cacheprovider",
    }
    commands = "".join(blocks("sh")).replace(f" && {DEMONSTRATION}", "")
    options = {"cwd": copy, "env": environ, "capture_output": True, "text": True}
    done = subprocess.run(["sh", "-ec", commands], **options)
    if re.search("No matching distribution|not find a version", done.stderr):
        pytest.skip(f"no package index can be reached: {done.stderr}")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "test_the_links_of_the_readme_lead_somewhere" in done.stdout


def prose():
    """Return the README's text outside its code blocks and tables."""
    return re.sub(r"^```.*?^```$|^\|.*?$", "", readme(), flags=re.M | re.S)


def test_the_readme_is_short_and_its_sentences_are_too():
    text = re.sub(r"\]\([^)]*\)", "]", re.sub(r"`[^`]+`", "code", prose()))
    parts = re.split(r"\n\s*\n|^\s*(?:[-*>#]+|\d+\.) |[.?!][*)\"]*\s", text, flags=re.M)
    long = [part for part in parts if len(re.findall(r"\S*\w\S*", part)) > 25]
    assert long == []
    assert len(prose().split()) <= 2000
    assert len(readme().splitlines()) <= 420


def test_the_links_of_the_readme_lead_somewhere():
    headings = re.findall(r"^#+ (.+)$", prose(), re.M)
    anchors = [re.sub(r"[^\w\- ]", "", heading.lower()) for heading in headings]
    targets = {f"#{anchor.replace(' ', '-')}" for anchor in anchors}
    links = re.findall(r"\]\(([^)]+)\)", readme())
    assert links
    for link in links:
        inside = link in targets or (CHECKOUT / link.split("#")[0]).is_file()
        assert inside or link.startswith("https://"), link


def test_the_readme_lists_the_options_that_there_are():
    rows = table_with("`MAX_WORKERS`")
    own = [row for row in rows if "processes only" not in row[2]]
    for backend_class, listed in ((ProcessPoolBackend, rows), (ThreadPoolBackend, own)):
        options = backend_class("other", {}).options
        text = refusal(backend_class.__name__, {"OPTIONS": {"12345": 1}})
        assert re.findall("[A-Z]+_?[A-Z_]+", text.rpartition(" are ")[2]) == [*options]
        defaults = {name.strip("`"): default for name, default, _ in listed}
        assert defaults == {name: str(default) for name, default in options.items()}


def test_the_readme_lists_the_log_messages_and_the_version_that_there_are():
    source = Path(django_tasks_local.__file__).read_text(encoding="utf-8")
    assert source.startswith("# SPDX-License-Identifier: MIT\n")
    assert f"**{django_tasks_local.__version__}**" in readme()
    levels = {"warning": "WARNING", "exception": "ERROR", "error": "ERROR"}
    nodes, literals, written = [*ast.walk(ast.parse(source))], {}, set()
    for node in nodes:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant):
            literals[ast.unparse(node.targets[0])] = node.value.value
    for node in nodes:
        call = re.match(r"logger\.(\w+)\(", ast.unparse(node))
        if isinstance(node, ast.Call) and call:
            message = eval(ast.unparse(node.args[0]), {}, literals)
            written.add((levels[call[1]], re.sub("%[rs]", "…", message)))
    rows = table_with("WARNING")
    assert {(level, message.strip("`")) for level, message, _ in rows} == written


def serve(server, project, *command):
    """Have a Script be a server; return its port."""
    server.directory = project
    server.start("", "-u", *command)
    return re.search(r"http://127\.0\.0\.1:(\d+)", server.line("http://127.0.0.1:"))[1]


class Visitor:
    """A browser, as far as the example site needs one."""

    def __init__(self, port):
        cookies = urllib.request.HTTPCookieProcessor()
        no_proxy = urllib.request.ProxyHandler({})
        self.opener = urllib.request.build_opener(no_proxy, cookies)
        self.site = f"http://127.0.0.1:{port}/"
        self.page = self.open("")
        self.token = re.search('csrfmiddlewaretoken" value="([^"]+)"', self.page)[1]

    def open(self, path, **form):
        data = urllib.parse.urlencode(form).encode() if form else None
        with self.opener.open(self.site + path, data, timeout=TIMEOUT) as response:
            return response.read().decode()

    def start(self, name, count):
        form = {"csrfmiddlewaretoken": self.token, "count": count}
        return f"status/{name}/{json.loads(self.open(f'start/{name}', **form))['id']}"

    def watch(self, path):
        """Poll, as the page does, until the task is finished; return each answer."""
        answers, end = [], time.monotonic() + TIMEOUT
        while not answers or answers[-1]["status"] in ("READY", "RUNNING"):
            assert time.monotonic() < end, answers
            time.sleep(0.02)  # Between polls.
            answers.append(json.loads(self.open(path)))
        return answers


def check_example(visitor):
    """Press both buttons, see both bars move, then see what cannot be."""
    texts = {"fetch": "10 pages fetched", "primes": "prime number 20000 is 224737"}
    for name, text in texts.items():
        answers = visitor.watch(visitor.start(name, re.search(r"\d+", text)[0]))
        assert answers[-1] == {"status": "SUCCESSFUL", "percent": 100, "text": text}
        percents = [answer["percent"] for answer in answers]
        assert percents == sorted(percents)
        assert len({*percents} - {0, 100}) >= 2
    failed, text = visitor.watch(visitor.start("primes", 0))[-1], "ValueError: 0 is not"
    assert (failed["status"], failed["text"][: len(text)]) == ("FAILED", text)
    gone = visitor.watch(f"status/fetch/{uuid.uuid4()}")[-1]
    assert gone["status"] not in {*TaskResultStatus}
    assert gone["text"]


@pytest.mark.slow
def test_the_example_site_runs_as_written(project, script):
    run = command("python example.py")[1:]
    visitor = Visitor(serve(script(), project, *run, "127.0.0.1:0"))
    assert {*re.findall('<form id="([^"]+)"', visitor.page)} == {"fetch", "primes"}
    for number in re.findall('<input [^>]*type="number"[^>]*>', visitor.page):
        assert 'min="' in number
    assert not re.search("src=|href=|@import", visitor.page), "all comes from here"
    assert visitor.open("favicon.ico") == ""
    check_example(visitor)
    visitor.token = "wrong"
    with pytest.raises(urllib.error.HTTPError, match="403"):
        visitor.start("fetch", 1)


@pytest.mark.slow
@pytest.mark.parametrize("cache", ["files", pytest.param("redis", marks=needs_redis)])
def test_gunicorn_workers_answer_for_all_even_killed_ones(project, script, cache):
    pytest.importorskip("gunicorn")
    if cache == "redis":
        source = readme_files()["example.py"]
        source = re.sub(r"[\w.]+FileBasedCache", REDIS_CACHE["BACKEND"], source)
        source = source.replace('str(Path(__file__).with_name("cache"))', repr(REDIS))
        (project / "example.py").write_text(source)
    server, run = script(), command("gunicorn --workers")
    visitor = Visitor(serve(server, project, "-m", *run, "--bind", "127.0.0.1:0"))
    check_example(visitor)
    done, lost = visitor.start("fetch", 0), visitor.start("fetch", 1000)
    assert visitor.watch(done)[-1]["text"] == "0 pages fetched"
    workers = descendants(server.process.pid)
    for pid in workers:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    assert wait_gone(*workers)
    assert visitor.watch(done)[-1]["text"] == "0 pages fetched"
    assert visitor.watch(lost)[-1]["status"] == "FAILED"
    assert "ended" in visitor.watch(lost)[-1]["text"]


@pytest.mark.slow
def test_uvicorn_finishes_the_tasks_on_sigterm(project, script, gate, tmp_path):
    pytest.importorskip("uvicorn")
    server, asgi = script(), "mysite.asgi:application"
    port = serve(server, project, "-m", "uvicorn", "--port", "0", asgi)
    url = f"http://127.0.0.1:{port}/start{gate.path}:{tmp_path}"
    urllib.request.urlopen(url).close()
    server.process.terminate()
    server.line("Waiting for application shutdown")
    marks = [tmp_path / alias for alias in ("default", "cpu")]
    assert not any(mark.exists() for mark in marks)
    gate.open()
    server.line("Application shutdown complete")
    assert all(mark.exists() for mark in marks)


GROWING = """
import django, json, subprocess, sys
django.setup()
from django.tasks import task_backends
from myapp.tasks import count_primes, greet
results = [greet.enqueue("Ann"), count_primes.enqueue(9), count_primes.enqueue("many")]
for command in json.loads(sys.argv[1]):
    subprocess.run([sys.executable, "-m", "django", *command], check=True)
print("django_tasks_local" in sys.modules)
for result in results:
    backend = task_backends[result.backend]
    if hasattr(backend, "wait_result"):
        backend.wait_result(result.id)
    if backend.supports_get_result:
        result = backend.get_result(result.id)
    errors = [error.exception_class_path for error in result.errors]
    print(result.args, result.status, errors or result.return_value)
"""
GROWN = [
    "['Ann'] SUCCESSFUL Hello Ann!",
    "[9] SUCCESSFUL 4",
    "['many'] FAILED ['builtins.TypeError']",
]


def grow(project, text, *commands):
    """Run the README's tasks with these settings; return what came of them."""
    (project / "mysite/growing.py").write_text(ported(text))
    code, environ = ported(GROWING), {"DJANGO_SETTINGS_MODULE": "mysite.growing"}
    if "mysite.steps " in text:
        run_python(project, "-m", "django", "migrate", "--verbosity=0", **environ)
    said = run_python(project, "-c", code, json.dumps(commands), **environ)[0]
    return said.splitlines()[-4:]


def test_the_same_tasks_run_inline_here_and_by_a_copy_of_the_file(project, kind):
    (project / "myproject").mkdir()
    shutil.copy(django_tasks_local.__file__, project / "myproject/tasks_local.py")
    copy = re.search(r'"BACKEND": "(myproject\.tasks_local)\.', readme())[1]
    inline = "django.tasks.backends.immediate.ImmediateBackend"
    for path in (inline, f"django_tasks_local.{kind}", f"{copy}.{kind}"):
        text = f"TASKS = dict.fromkeys(TASKS, {{'BACKEND': '{path}'}})\n"
        said = grow(project, f"from mysite.settings import *\n{text}")
        assert said == [str("django_tasks_local" in path), *GROWN]


@pytest.mark.slow
def test_the_same_tasks_run_in_workers_of_django_tasks_db(project):
    pytest.importorskip("django_tasks_db")
    workers = [command(f"manage.py db_worker{more}")[2:] for more in ("", " --backend")]
    for worker in workers:
        worker += ["--batch", "--no-startup-delay"]
    assert grow(project, "from mysite.steps import *\n", *workers) == ["False", *GROWN]


@needs_redis
@pytest.mark.slow
def test_the_same_tasks_run_in_workers_of_django_tasks_rq(project):
    pytest.importorskip("django_tasks_rq")
    worker = [*command("manage.py rqworker")[2:], "--burst"]
    text = f"from mysite.steps_rq import *\nRQ_QUEUES['default']['URL'] = {REDIS!r}\n"
    assert grow(project, text, worker) == ["False", *GROWN]


# --- Benchmark: python -m pytest -m bench ---------------------------------------------

PACKAGE = "django_tasks" if BACKPORT else "django.tasks"
EXECUTOR = "executor"  # A bare ProcessPoolExecutor, on its default start method.
clock = time.perf_counter  # One clock for all processes, on Linux at least.
STREAM, FIRST = "task, enqueued while they run", "to the first instruction, idle pool"
BUSY, COST, READ = "enqueue, busy pool", "task, enqueued before they run", "get_result"
FEW, SOME, MANY, WORKERS = 1000, 5000, 100_000, 2
BARE = {"give_back": bool, "read_clock": clock}  # A bare executor needs own names.


@task
def give_back(value=None):
    return value


@task
def read_clock():
    return clock()


@task
def make_text(length):
    return "x" * length


class Pool(NamedTuple):
    submitter: Callable[..., Any]  # From a function's name to what submits a call.
    value: Callable[..., Any]  # Waits for one.
    drain: Callable[..., Any]  # Waits for all.
    backend: Any = None


class Table:
    """Seconds or bytes by (contestant, figure), and rows that compare their medians."""

    def __init__(self):
        self.measured, self.rows, self.exceeded = defaultdict(list), [], []

    def compare(self, who, figure, base, of="", limit=0.0):
        keys = (who, figure), (base, of or figure)
        median, basis = (statistics.median(self.measured[key]) for key in keys)
        is_size = figure.startswith("bytes")
        amount = f"{median:,.0f} B " if is_size else f"{median * 1e6:,.1f} µs"
        exceeds = " EXCEEDED" * (median > limit * basis)
        ratio = f"{amount:>15} {median / basis:8.3f} <= {limit:.2f}{exceeds:<9}"
        self.rows.append(f"{who + ': ' + figure:<50} {ratio} of {base}: {of or figure}")
        self.exceeded += self.rows[-1:] if exceeds else []


@pytest.fixture
def table(capsys):
    """Return a table, which is printed in the end."""
    table = Table()
    yield table
    with capsys.disabled():
        print("", *table.rows, sep="\n")


@pytest.fixture
def pools():
    """Return the contestants."""
    options = {"MAX_WORKERS": WORKERS, "MAX_RESULTS": SOME}
    names = {"threads": "ThreadPoolBackend", "processes": "ProcessPoolBackend"}
    backends = {name: f"django_tasks_local.{kind}" for name, kind in names.items()}
    params = {k: {"BACKEND": v, "OPTIONS": options} for k, v in backends.items()}
    params["inline"] = {"BACKEND": f"{PACKAGE}.backends.immediate.ImmediateBackend"}
    log = logging.getLogger(PACKAGE)
    log.setLevel(logging.WARNING)  # Two records a task cost as much as the task.

    def submitter(alias, name):
        return globals()[name].using(backend=alias).enqueue

    def bare_submitter(name):
        return functools.partial(executor.submit, BARE[name])

    with (
        override_settings(TASKS={"default": params["threads"], **params}),
        concurrent.futures.ProcessPoolExecutor(WORKERS) as executor,
    ):
        wait = concurrent.futures.wait
        pools = {EXECUTOR: Pool(bare_submitter, lambda f: f.result(TIMEOUT), wait)}
        for alias in names:
            pools[alias] = Pool(
                functools.partial(submitter, alias),
                lambda result: finished(result).return_value,
                lambda _, join=task_backends[alias].join: join(TIMEOUT),
                task_backends[alias],
            )
        submit = functools.partial(submitter, "inline")
        yield {**pools, "inline": Pool(submit, lambda r: r.return_value, len)}
        for alias in names:
            pools[alias].backend.close()
    log.setLevel(logging.NOTSET)


def occupy(pool, directory):
    """Return the gate at which all workers of the pool wait."""
    gate = Gate(directory / str(uuid.uuid4()))
    for _ in range(WORKERS):
        wait_at.using(backend=pool.backend.alias).enqueue(gate.path)
    wait_until(lambda: pool.backend.stats()["running"] == WORKERS)
    gc.collect()
    return gate


def measure_idle(table, who, pool):
    submit = pool.submitter("read_clock")
    for _ in range(50):
        time.sleep(0.002)  # As between two requests.
        begun = clock()
        table.measured[who, FIRST].append(pool.value(submit()) - begun)
    gc.collect()
    submit, begun = pool.submitter("give_back"), clock()
    handles = [submit() for _ in range(FEW)]
    pool.drain(handles)
    table.measured[who, STREAM].append((clock() - begun) / FEW)
    assert not pool.value(handles[-1])


def measure_backlog(table, who, pool, pending, directory):
    gate, submit = occupy(pool, directory), pool.submitter("give_back")
    handles = deque(maxlen=FEW)  # More of them would be garbage collection's work.
    begun = clock()
    for _ in range(pending):
        handles.append(submit())
    enqueued = clock()
    for handle in handles:
        pool.backend.get_result(handle.id)
    read = clock()
    gate.open()
    pool.drain(handles)
    busy, reading, running = enqueued - begun, read - enqueued, clock() - read
    table.measured[who, f"{BUSY} ({pending:,})"].append(busy / pending)
    table.measured[who, f"{READ} ({pending:,})"].append(reading / FEW)
    table.measured[who, f"{COST} ({pending:,})"].append((busy + running) / pending)


@pytest.mark.bench
@pytest.mark.timeout(300)
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")  # The bare executor.
def test_a_task_costs_little_with_few_and_with_many_pending(table, pools, tmp_path):
    ours = ("threads", "processes")
    for number in range(9):
        for who, pool in pools.items():
            measure_idle(table, who, pool)
        for pending in (FEW, MANY) if number in (2, 6) else (FEW,):
            for who in ours:
                measure_backlog(table, who, pools[who], pending, tmp_path)
    few = {figure: f"{figure} ({FEW:,})" for figure in (BUSY, COST, READ)}
    table.compare("threads", STREAM, "inline", STREAM, 1.0)
    table.compare("threads", few[COST], "inline", STREAM, 1.0)
    table.compare("processes", STREAM, EXECUTOR, STREAM, 1.4)
    table.compare("processes", FIRST, EXECUTOR, FIRST, 1.1)
    for who in ours:
        table.compare(who, few[BUSY], "inline", STREAM, 0.45)
        for figure in few:
            table.compare(who, f"{figure} ({MANY:,})", who, few[figure], 1.3)
    assert table.exceeded == []


@pytest.mark.bench
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_task_takes_little_memory_and_20_mb_arrive_soon(table, pools, tmp_path):
    table.measured["limit", "1 KiB"], table.measured["limit", "1 s"] = [1024], [1.0]
    for who in ("threads", "processes"):
        gate, submit = occupy(pools[who], tmp_path), pools[who].submitter("give_back")
        tracemalloc.start()
        for figure in ("bytes per pending task", "bytes per kept result"):
            if "pending" in figure:
                for value in range(SOME):
                    submit(value)
            else:
                gate.open()
                pools[who].drain(())
            gc.collect()
            table.measured[who, figure] = [tracemalloc.get_traced_memory()[0] / SOME]
            table.compare(who, figure, "limit", "1 KiB", 1.5)
        tracemalloc.stop()
    stop, length = threading.Event(), 20_000_000

    def compute():
        while not stop.is_set():
            sum(range(1000))

    computing = threading.Thread(target=compute)
    computing.start()
    for _ in range(3):
        begun, submit = clock(), pools["processes"].submitter("make_text")
        assert len(pools["processes"].value(submit(length))) == length
        table.measured["processes", "20 MB returned"].append(clock() - begun)
    stop.set()
    computing.join()
    table.compare("processes", "20 MB returned", "limit", "1 s", 2.0)
    assert table.exceeded == []


@pytest.mark.bench
def test_the_import_takes_hardly_longer_than_the_one_of_djangos_tasks(table, tmp_path):
    code = (
        "import time as t; b = t.perf_counter(); import {}; print(t.perf_counter() - b)"
    )
    environ = {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    environ |= {"PYTHONPYCACHEPREFIX": str(tmp_path), "PYTHONDONTWRITEBYTECODE": ""}
    for _ in range(9):  # The first one compiles.
        for who in (PACKAGE, "django_tasks_local"):
            command = [sys.executable, "-c", code.format(who)]
            said = subprocess.check_output(command, env={**os.environ, **environ})
            table.measured[who, "import"].append(float(said))
    table.compare("django_tasks_local", "import", PACKAGE, limit=1.5)
    assert table.exceeded == []
