"""The public face: names, parameters, errors."""

import copy
import dataclasses
import inspect
import json
import pickle
import subprocess
import sys

import pytest

import speval
from speval import aio, errors, sync
from speval.model import Claim, Summary


def test_the_public_names_are_these():
    assert sorted(speval.__all__) == [
        "ArgsChangedError",
        "CalledInWorkerError",
        "Database",
        "DatabaseError",
        "DatabaseLockedError",
        "DatabaseMissingError",
        "DatabaseNotEmptyError",
        "DatabaseUnavailableError",
        "Evaluation",
        "EvaluationsFailed",
        "ExecutorError",
        "ForeignDatabaseError",
        "FunctionError",
        "InProgressError",
        "MissingExtraError",
        "NewerSchemaError",
        "OptionError",
        "SpaceError",
        "SpevalError",
        "Summary",
        "SystemLimitError",
        "UnknownNameError",
        "UnserializableError",
        "aio",
        "as_completed",
        "load_evals",
        "retry",
        "speval",
        "to_frame",
    ]
    for name in speval.__all__:
        assert getattr(speval, name) is not None


def test_both_flavours_have_the_same_names():
    assert aio.__all__ == sync.__all__ == ["as_completed", "load_evals", "retry", "speval"]


@pytest.mark.parametrize("name", aio.__all__)
def test_both_flavours_have_the_same_parameters(name):
    one, other = inspect.signature(getattr(aio, name)), inspect.signature(getattr(sync, name))
    assert list(one.parameters.values()) == list(other.parameters.values())
    assert getattr(speval, name) is getattr(sync, name)


@pytest.mark.parametrize("name", ["speval", "as_completed"])
def test_the_options_have_these_defaults(name):
    parameters = inspect.signature(getattr(speval, name)).parameters
    assert [p.name for p in parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD] == ["func", "eval_space", "db", "timeout"]
    assert {p.name: p.default for p in parameters.values() if p.kind is p.KEYWORD_ONLY} == {
        "concurrency": 1,
        "executor": "auto",
        "max_attempts": 3,
        "retry_on": (),
        "backoff": 1.0,
        "lease": 30.0,
        "on_changed": "error",
        "wait": True,
        "max_failures": None,
        "durability": "process",
        "progress": None,
    }


METHODS = [method for name, method in vars(speval.Database).items() if not name.startswith("_") and name != "close"]
DOCUMENTED = [sync.speval, sync.load_evals, sync.retry, aio.load_evals, aio.retry, speval.to_frame, *METHODS]
REFERRING = [sync.as_completed, aio.speval, aio.as_completed]


@pytest.mark.parametrize("function", DOCUMENTED, ids=lambda f: f"{f.__module__}.{f.__qualname__}")
def test_every_parameter_is_documented(function):
    parameters = [name for name in inspect.signature(function).parameters if name != "self"]
    text = inspect.getdoc(function)
    assert all(f"    {name}: " in text for name in parameters) or len(parameters) == 1  # which the first sentence is about


@pytest.mark.parametrize("function", REFERRING, ids=lambda f: f"{f.__module__}.{f.__qualname__}")
def test_the_functions_with_the_same_parameters_refer_to_the_one_that_documents_them(function):
    assert "The parameters are those of ``speval.speval``" in inspect.getdoc(function)
    assert list(inspect.signature(function).parameters.values()) == list(inspect.signature(speval.speval).parameters.values())


SAMPLES = [
    errors.SpevalError("text"),
    errors.OptionError("lease", "-1", "seconds, 1 or more"),
    errors.FunctionError("work", "its global 'lock' is a lock"),
    errors.CalledInWorkerError("speval"),
    errors.SystemLimitError("the database's thread"),
    errors.ExecutorError("ProcessPoolExecutor", "BrokenProcessPool: broken"),
    errors.SpaceError("'x'", "is twice there"),
    errors.UnserializableError("the args of evaluation 'x'", "no"),
    errors.EvaluationDamagedError("runs.db", "a", "its result is not as it was written"),
    errors.ArgsChangedError("runs.db", 5, [("a", "1", "2"), ("b", "3", "4")]),
    errors.DatabaseError("runs.db", "is odd"),
    errors.DatabaseMissingError("runs.db"),
    errors.DatabaseNotEmptyError("runs.db"),
    errors.DatabaseLockedError("runs.db", 60.0),
    errors.DatabaseUnavailableError("runs.db", "the disk is full"),
    errors.ForeignDatabaseError("runs.db", "some other kind of file"),
    errors.MissingExtraError("library='pandas'", "pandas", "pandas"),
    errors.NewerSchemaError("runs.db", 9, 1, "2.3"),
    errors.InProgressError("runs.db", ["a", "b"]),
    errors.StoreClosedError("runs.db"),
    errors.UnknownNameError("runs.db", ["a", "b"]),
    errors.EvaluationsFailed(3, 10, "3 exception"),
]


@pytest.mark.parametrize("error", SAMPLES, ids=lambda e: type(e).__name__)
def test_every_error_survives_pickling_and_copying(error):
    for twin in (pickle.loads(pickle.dumps(error)), copy.copy(error)):
        assert type(twin) is type(error)
        assert str(twin) == str(error)
        assert vars(twin) == vars(error)


def test_every_error_is_among_the_samples_and_has_one_root():
    classes = {c for c in vars(errors).values() if inspect.isclass(c) and issubclass(c, Exception)}
    assert {type(sample) for sample in SAMPLES} == classes
    assert all(issubclass(c, speval.SpevalError) for c in classes)
    assert set(errors.__all__) == {c.__name__ for c in classes}


def test_errors_are_builtin_ones_where_that_fits():
    assert issubclass(speval.OptionError, ValueError)
    assert issubclass(speval.DatabaseMissingError, FileNotFoundError)
    assert issubclass(speval.DatabaseLockedError, TimeoutError)
    assert issubclass(speval.UnserializableError, TypeError)
    assert issubclass(speval.UnknownNameError, KeyError)
    assert issubclass(speval.MissingExtraError, ImportError)


def test_a_summary_reads_as_one_line_and_can_be_pickled():
    summary = Summary(1, 2, 90, 7, {"timeout": 3, "exception": 4}, recorded=50, seconds=12.34, stopped="7 failed")
    text = (
        "100 evaluations: 90 completed, 7 failed (4 exception, 3 timeout), 2 in progress, 1 pending in 12.3 s (50 by this call)"
    )
    assert str(summary) == f"{text}; stopped: 7 failed"
    assert summary.total == 100
    assert pickle.loads(pickle.dumps(summary)) == summary
    with pytest.raises(speval.EvaluationsFailed, match="7 of 100 evaluations failed"):
        summary.raise_for_failures()
    with pytest.raises(AttributeError):
        summary.failed = 0  # type: ignore[misc]
    Summary(0, 0, 1, 0).raise_for_failures()


def test_a_claim_shows_its_token():
    assert repr(Claim(17, 2, 2, "17", "{}", 99)) == "<Claim '17' attempt 2>"


def test_importing_speval_starts_nothing_and_stays_light():
    code = "import sys, threading, speval; print(threading.active_count(), {'aiosqlite', 'numpy', 'tqdm'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "1 set()\n"


def test_a_summary_can_be_copied_pickled_and_taken_apart_and_not_changed():
    summary = Summary(0, 0, 3, 2, {"timeout": 2}, 5, 1.5)
    assert dataclasses.asdict(summary)["causes"] == {"timeout": 2}
    assert json.loads(json.dumps(dataclasses.asdict(summary)))["causes"] == {"timeout": 2}
    for same in (copy.deepcopy(summary), copy.copy(summary), pickle.loads(pickle.dumps(summary))):
        assert same == summary
        assert hash(same) == hash(summary)
    with pytest.raises(TypeError, match="read-only"):
        summary.causes["timeout"] = 3  # type: ignore[index]
    with pytest.raises(TypeError, match="read-only"):
        summary.causes.update(timeout=3)  # type: ignore[attr-defined]
