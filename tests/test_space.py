"""Eval spaces: what is accepted, how it is named, what is refused."""

import json
from collections.abc import Mapping
from enum import Enum

import numpy
import pytest

from speval.errors import OptionError, SpaceError, SpevalError, UnserializableError
from speval.spaces.eager import Space, name_to_key


def rows_of(eval_space):
    space = Space()
    try:
        for _ in space.fill(eval_space):
            pass
        return [(str(key), json.loads(args)) for key, args in space.rows()]
    finally:
        space.close()


def digest_of(eval_space):
    space = Space()
    try:
        list(space.fill(eval_space))
        return space.digest
    finally:
        space.close()


class Twice(Mapping):
    """A mapping that has one key two times, as some multi-dicts do."""

    def __getitem__(self, key):
        return 1

    def __iter__(self):
        return iter(["a", "a"])

    def __len__(self):
        return 2


def test_a_list_is_named_by_position():
    assert rows_of(["x", "y"]) == [("0", "x"), ("1", "y")]


def test_a_mapping_keeps_its_names_and_its_order():
    space = {"b": 1, "a": 2, "07": 3, "7": 4, 5: 6, "line\nbreak\ttab": 7, "ü": 8}
    assert rows_of(space) == [("b", 1), ("a", 2), ("07", 3), ("7", 4), ("5", 6), ("line\nbreak\ttab", 7), ("ü", 8)]


@pytest.mark.parametrize(
    "space", [range(3), (i for i in range(3)), numpy.arange(3), iter([0, 1, 2]), {0: 0, 1: 1, 2: 2}.values()]
)
def test_any_iterable_is_an_eval_space(space):
    assert rows_of(space) == [("0", 0), ("1", 1), ("2", 2)]


def test_a_parameter_grid_is_an_eval_space():
    from sklearn.model_selection import ParameterGrid

    assert rows_of(ParameterGrid({"c": [1, 10], "kernel": ["rbf"]})) == [
        ("0", {"c": 1, "kernel": "rbf"}),
        ("1", {"c": 10, "kernel": "rbf"}),
    ]


def test_a_large_space_is_streamed_and_spooled():
    taken = []

    def endless():
        for i in range(5000):
            taken.append(i)
            yield i

    space = Space()
    filling = space.fill(endless())
    next(filling)
    assert len(taken) < 2000
    list(filling)
    assert space.count == 5000
    assert [args for _, args in space.rows()] == [str(i) for i in range(5000)]
    space.close()


class Name(str, Enum):  # noqa: UP042 - calls itself Name.A
    A = "a"


class Twins(dict):
    """Holds an enum beside the text it stands for, which a dict takes for one key."""

    def items(self):
        return [(Name.A, 1), ("a", 2)]


@pytest.mark.parametrize(
    ("space", "name"),
    [
        ({1: "a", "1": "b"}, "1"), (Twice(), "a"), ({numpy.int64(4): "a", 4.5: 1}, "4.5"),
        ({numpy.timedelta64(3, "Y"): 1}, "timedelta64"), ({3: "a", numpy.int64(3): "b", "3": "c"}, "3"), ({True: 1}, "bool"),
        (Twins(), "a"), ({numpy.float64(3): 1}, "float64"),
    ],
)  # fmt: skip
def test_duplicate_and_invalid_names_are_refused(space, name):
    with pytest.raises(SpaceError, match=name):
        rows_of(space)


@pytest.mark.parametrize("space", ["text", b"text", 17, None, object()])
def test_an_invalid_space_is_refused(space):
    with pytest.raises(OptionError, match="eval_space"):
        rows_of(space)


def test_similar_names_are_different_names():
    names = ["1", "01", "+1", "1.0", " 1", "1\0", "\u0661", "\u00b9", "\uff11", "1_0", "10", "e\u0301", "\u00e9", "-0", "0", ""]
    names += [str(n + d) for n in (2**63, 2**64, 10**18) for d in (-1, 0, 1)]
    rows = rows_of({name: n for n, name in enumerate(names)})
    assert [str(key) for key, _ in rows] == names
    assert len({key for key, _ in rows}) == len(names)


def test_unserializable_args_are_named():
    with pytest.raises(UnserializableError, match="the args of evaluation 'second'"):
        rows_of({"first": 1, "second": object()})


def test_an_exception_of_the_users_generator_is_raised():
    def broken():
        yield 1
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        rows_of(broken())


def test_the_digest_depends_on_names_args_and_order():
    assert digest_of([1, 2]) == digest_of({"0": 1, "1": 2})
    assert len({digest_of(s) for s in ([1, 2], [2, 1], [1, 2, 3], {"a": 1, "b": 2}, {"b": 2, "a": 1}, [], [12])}) == 7


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("0", 0),
        ("17", 17),
        ("017", "017"),
        ("", ""),
        ("-1", "-1"),
        ("1.0", "1.0"),
        ("²", "²"),
        ("٣", "٣"),
        ("9" * 18, int("9" * 18)),
        ("9" * 19, "9" * 19),
    ],
)
def test_only_a_plain_decimal_number_is_stored_as_one(name, key):
    got = name_to_key(name)
    assert (got, type(got)) == (key, type(key))
    assert str(got) == name


def test_every_refusal_is_a_speval_error():
    assert issubclass(OptionError, SpevalError)
    assert issubclass(SpaceError, SpevalError)
    assert issubclass(UnserializableError, SpevalError)
