"""Evaluations as tables: a column for each argument and each key of the result, in real data frames."""

import math
import subprocess
import sys

import numpy as np
import pandas
import polars
import pytest
from hypothesis import given
from hypothesis import strategies as st

from speval import MissingExtraError, OptionError, load_evals, speval, to_frame
from speval.flat import flattened, table, unmixed


def train(args):
    if args.get("depth") == 8:
        raise ValueError("too deep")
    return {"loss": args["lr"] / 2, "scores": {"f1": 0.5, "per class": [0.25, 0.75]}, "epochs": 3}


@pytest.fixture
def trained(db):
    space = {"a": {"lr": 0.5, "depth": 2}, "b": {"lr": 1, "depth": 8}, "c": {"lr": 2.5, "opt": {"name": "adam"}}}
    speval(train, space, db, progress=False)
    return db


FIXED = ["attempts", "started", "duration", "updated", "worker", "error.cause", "error.type", "error.message"]


def test_a_plain_data_frame_of_what_load_evals_returns_just_works(trained):
    frame = pandas.DataFrame(load_evals(trained))
    assert frame["name"].tolist() == ["a", "b", "c"]
    assert frame["status"].value_counts().to_dict() == {"completed": 2, "failed": 1}
    assert frame[frame.status == "completed"].result.map(lambda r: r["loss"]).tolist() == [0.25, 1.25]
    assert list(pandas.DataFrame(load_evals(trained, status="pending")).columns) == []


def test_to_frame_has_a_column_for_each_argument_and_each_key_of_the_result(trained):
    frame = to_frame(trained)
    assert isinstance(frame, pandas.DataFrame)
    args = ["args.lr", "args.depth", "args.opt.name"]
    results = ["result.loss", "result.scores.f1", "result.scores.per class", "result.epochs"]
    assert list(frame.columns) == ["name", "status", *args, *results, *FIXED]
    assert frame["args.lr"].tolist() == [0.5, 1.0, 2.5]
    assert frame["args.lr"].dtype == frame["result.loss"].dtype == "float64"
    assert frame["result.loss"].isna().tolist() == [False, True, False]
    assert frame["result.scores.per class"][0] == [0.25, 0.75]
    assert frame["error.type"].tolist()[1] == "ValueError"
    assert frame["duration"].dtype == "float64"
    best = frame.loc[frame["result.loss"].idxmin()]
    assert best["name"] == "a"


def test_to_frame_gives_a_polars_frame_with_types(trained):
    frame = to_frame(trained, library="polars")
    assert isinstance(frame, polars.DataFrame)
    assert frame.columns == list(to_frame(trained).columns)
    assert frame["args.lr"].to_list() == [0.5, 1.0, 2.5]
    assert frame["args.depth"].dtype == polars.Int64
    assert frame["result.scores.per class"].to_list() == [[0.25, 0.75], None, [0.25, 0.75]]
    assert frame.filter(polars.col("result.loss") < 1)["name"].to_list() == ["a"]


@pytest.mark.parametrize("library", ["pandas", "polars"])
def test_to_frame_takes_only_one_status_and_an_empty_one_has_the_fixed_columns(trained, library):
    assert list(to_frame(trained, status="failed", library=library)["name"]) == ["b"]
    empty = to_frame(trained, status="pending", library=library)
    assert (list(empty.columns), len(empty)) == (["name", "status", *FIXED], 0)


@pytest.mark.parametrize("library", ["pandas", "polars"])
def test_values_that_are_no_dict_are_one_column(db, library):
    speval(lambda args: args * 2, [1, 2, 3], db, progress=False)
    frame = to_frame(db, library=library)
    assert list(frame["args"]) == [1, 2, 3]
    assert list(frame["result"]) == [2, 4, 6]


@pytest.mark.parametrize("library", ["pandas", "polars"])
def test_whatever_json_can_hold_has_a_frame(db, library):
    space = [1, "x", None, [1, "a"], {"k": {"deep": [{}]}}, {"k": 5}, 2**80, True, math.nan, {}, [], {"": {"": 1}}]
    speval(lambda args: {"same": args}, space, db, progress=False)
    frame = to_frame(db, library=library)
    assert len(frame) == len(space)
    if library == "pandas":
        assert frame["args"].tolist()[:4] == [1, "x", None, [1, "a"]]
        assert frame["args.k.deep"].tolist()[4] == [{}]
    else:  # of types that a column can't mix
        assert frame["args"].to_list()[:4] == ["1", '"x"', None, '[1,"a"]']


def test_numpy_values_are_numbers_in_a_frame(db):
    speval(lambda args: {"mean": np.float32(0.5), "all": np.arange(3)}, [{"n": np.int64(7)}], db, progress=False)
    frame = to_frame(db)
    assert (frame["args.n"][0], frame["result.mean"][0], frame["result.all"][0]) == (7, 0.5, [0, 1, 2])


def test_what_is_no_library_or_not_installed_is_named_with_the_extra(trained, tmp_path):
    with pytest.raises(OptionError, match="invalid library='spark': 'pandas' or 'polars'"):
        to_frame(trained, library="spark")  # type: ignore[call-overload]
    # As where it was never installed: nothing of that name is found.
    code = f"""
import importlib.util, sys
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *more: None if name in ("pandas", "polars", "pyarrow") else find(name, *more)
from speval import to_frame, MissingExtraError
for library in ("pandas", "polars"):
    try:
        to_frame({str(trained)!r}, library=library)
    except MissingExtraError as error:
        print(error)
sys.argv = ["speval", "export", {str(trained)!r}, "-o", "out.parquet"]
from speval.cli import main
main()
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout.splitlines() == [f"library='{x}' needs {x}: pip install 'speval[{x}]'" for x in ("pandas", "polars")]
    assert done.stderr == "speval: parquet needs pyarrow: pip install 'speval[parquet]'\n"
    assert done.returncode == 2
    assert issubclass(MissingExtraError, ImportError)


def evaluation(args, result):
    return {
        "name": "n", "status": "completed", "updated": 1.0, "result": result, "args": args, "attempts": 1, "error": None,
        "started": 1.0, "duration": 1.0, "worker": "h:1:0",
    }  # fmt: skip


def test_a_key_with_dots_and_a_dict_in_a_dict_are_two_columns_in_every_row(db):
    speval(lambda args: 0, [{"a.b": 1, "a": {"b": 2}}, {"a": {"b": 5}}, {"a.b": 7}], db, progress=False)
    frame = to_frame(db)
    assert frame["args.a.b"].tolist()[:2] == [2, 5]
    assert math.isnan(frame["args.a.b"][2])
    assert (frame["args.a.b'"][0], frame["args.a.b'"][2]) == (1, 7)
    assert math.isnan(frame["args.a.b'"][1])


keys = st.text("ab.'\"", max_size=4)


def paths(value, path=()):
    if isinstance(value, dict) and value:
        return [found for key, item in value.items() for found in paths(item, (*path, key))]
    return [path]


@given(st.lists(st.recursive(st.just(0), lambda inner: st.dictionaries(keys, inner, max_size=3), max_leaves=6), max_size=4))
def test_no_two_paths_of_keys_share_a_column(values):
    columns = {}
    for value in values:
        for path, column in zip(
            paths(value), (c for c in flattened(evaluation(value, 0)) if c.startswith("args")), strict=True
        ):
            assert columns.setdefault(column, path) == path
    assert len(set(columns.values())) == len(columns)


@pytest.mark.parametrize("library", ["pandas", "polars"])
def test_whole_numbers_that_no_float_can_hold_stay_what_they_are(db, library):
    big = 2**53 + 1
    speval(lambda args: {"n": big if args else 0.5, "huge": 10**400 if args else 0.5}, [0, 1], db, progress=False)
    speval(lambda args: {"m": big}, {"2": 2}, db, progress=False)
    frame = to_frame(db, library=library)
    assert str(frame["result.n"][1]) == str(big)
    assert str(frame["result.huge"][1]) == str(10**400)
    assert int(frame["result.m"][2]) == big


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["a", "b", "a.b", ""]), inner, max_size=3),
    max_leaves=8,
)


def leaves(value):
    if isinstance(value, dict) and value:
        return sum(leaves(item) for item in value.values())
    return 1


@given(st.lists(st.tuples(values, values), max_size=6))
def test_nothing_of_args_and_results_is_lost_and_all_columns_are_of_one_length(pairs):
    for args, result in pairs:
        row = flattened(evaluation(args, result))
        assert sum(key.partition(".")[0] in ("args", "result") for key in row) == leaves(args) + leaves(result)
    columns = table(evaluation(args, result) for args, result in pairs)
    assert {len(column) for column in columns.values()} == {len(pairs)}
    polars.DataFrame({name: polars.Series(name, unmixed(column)) for name, column in columns.items()})
    import pyarrow

    pyarrow.table({name: pyarrow.array(unmixed(column)) for name, column in columns.items()})
