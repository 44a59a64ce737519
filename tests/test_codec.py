"""What becomes of values on their way through JSON."""

import json
import math
import sys
from collections import OrderedDict, namedtuple
from enum import Enum, IntEnum

import numpy
import pytest

from speval import codec
from speval.codec import decode, encode, read, same
from speval.errors import UnserializableError

Point = namedtuple("Point", "x y")
Color = IntEnum("Color", ["red", "green"])


class Shade(str, Enum):  # noqa: UP042 - calls itself Shade.DARK
    DARK = "dark"


def circular():
    value = []
    value.append({"again": value})
    return value


def nested(depth):
    value = []
    for _ in range(depth):
        value = [value]
    return value


@pytest.mark.parametrize(
    ("value", "back"),
    [
        (None, None),
        (True, True),
        (0, 0),
        (-17, -17),
        (2**80, 2**80),
        (0.1, 0.1),
        (1.0, 1.0),
        ("", ""),
        ("grüße 🎈 \0 \n \x1b", "grüße 🎈 \0 \n \x1b"),
        ("\ud800", "\ud800"),
        ([1, [2, (3, 4)]], [1, [2, [3, 4]]]),
        ((), []),
        ({"b": 1, "a": {"c": None}}, {"b": 1, "a": {"c": None}}),
        ({1: "a", 2.5: "b"}, {"1": "a", "2.5": "b"}),
        ({None: 1, False: 2}, {"null": 1, "false": 2}),
        (OrderedDict(z=1, a=(1,)), {"z": 1, "a": [1]}),
        (Point(1, 2), [1, 2]),
        (Color.green, 2),
        (numpy.float64(0.5), 0.5),
        (numpy.float32(0.5), 0.5),
        (numpy.int64(7), 7),
        (numpy.bool_(True), True),
        (numpy.array([[1, 2], [3, 4]]), [[1, 2], [3, 4]]),
        (numpy.array(3.5), 3.5),
        ({numpy.int64(3): numpy.arange(2)}, {"3": [0, 1]}),
        (numpy.array([{1: (2,)}, None], dtype=object), [{"1": [2]}, None]),
        ({Shade.DARK: Shade.DARK}, {"dark": "dark"}),
        (nested(199), nested(199)),
        ([nested(198), [[]] * 300], [nested(198), [[]] * 300]),
        ({"x": [{1: {2: "deep"}}]}, {"x": [{"1": {"2": "deep"}}]}),
    ],
)
def test_a_value_is_decoded_as_json(value, back):
    got = decode(encode(value, "it"))
    assert got == back
    assert type(got) is type(back)


def test_nan_and_infinities_survive():
    nan, up, down, array = decode(encode([math.nan, math.inf, -math.inf, numpy.array([numpy.nan])], "it"))
    assert math.isnan(nan)
    assert (up, down) == (math.inf, -math.inf)
    assert math.isnan(array[0])


def test_the_order_of_keys_is_kept():
    assert list(decode(encode({"z": 1, "a": 2, "m": 3}, "it"))) == ["z", "a", "m"]


def test_encoded_text_is_one_line_of_utf8():
    text = encode({"a\nb": "c\r\n\ud800 ü"}, "it")
    assert "\n" not in text
    assert text.encode().decode() == text


@pytest.mark.parametrize(
    ("value", "problem"),
    [
        (object(), "object is not supported"),
        ({1, 2}, "set is not supported"),
        (b"bytes", "bytes is not supported"),
        (1j, "complex is not supported"),
        (numpy.complex64(1j), "complex is not supported"),
        *((numpy.datetime64(when, unit), "would lose its unit") for unit in ("Y", "D", "us", "ns") for when in ("2020", "NaT")),
        *((numpy.timedelta64(3, unit), "would lose its unit") for unit in ("Y", "s", "ns", "ps")),
        (numpy.array(["2020-01-01", "NaT"], dtype="M8[ns]"), r"datetime64[ns] would lose its unit; use str() of it"),
        ({"x": [{numpy.datetime64(1, "ns"): 1}]}, "datetime64[ns] would lose its unit"),
        (numpy.array([(1, 2.0)], dtype=[("a", "i4"), ("b", "f8")]), "would lose its fields"),
        (numpy.void(b"abc"), "would lose its fields"),
        (numpy.ma.array([1, 2], mask=[False, True]), "would lose its mask"),
        (numpy.ma.masked, "would lose its mask"),
        (numpy.longdouble("0.1"), "longdouble is not supported"),
        (numpy.array([{1: "a", "1": "b"}], dtype=object), "two dict keys become the same string '1'"),
        (numpy.array([{"x": numpy.datetime64(1, "ns")}], dtype=object), "would lose its unit"),
        ("a \ud83d\ude00", "surrogate pair"),
        ({(1, 2): 3}, "a dict key must be a string or a number, not tuple"),
        ({1: "a", "1": "b"}, "two dict keys become the same string '1'"),
        ({"x": {numpy.int64(1): "a", "1": "b"}}, "two dict keys become the same string '1'"),
        (circular(), "contains itself"),
        (nested(200), "nested more than 200 levels deep"),
        (nested(100_000), "nested more than"),
        ({"x": nested(199)}, "nested more than"),
        (numpy.array([nested(199), 0], dtype=object), "nested more than"),
        pytest.param(10**5000, "digits", id="too many digits"),
    ],
)
def test_a_value_without_a_json_form_is_refused_by_name(value, problem):
    with pytest.raises(UnserializableError, match="the args of evaluation 'x' can't be written as JSON") as caught:
        encode(value, "the args of evaluation 'x'")
    assert problem in str(caught.value)


@pytest.mark.parametrize("depth", [265, 500, 990, 100_000])
def test_deeply_nested_stored_json_is_refused_on_every_python(depth):
    with pytest.raises(ValueError, match="nested"):
        read("[" * depth + "]" * depth)


def test_the_allowed_depth_does_not_depend_on_the_call_stack():
    def at(depth, value):
        return encode(value, "it") if depth == 0 else at(depth - 1, value)

    assert read(at(400, nested(199))) == nested(199)


@pytest.mark.parametrize(
    ("one", "other", "is_same"),
    [
        ('{"a":1,"b":2}', '{ "b": 2, "a": 1 }', True),
        ("[1, 2]", "[1,2]", True),
        ("1", "1.0", False),
        ("1", '"1"', False),
        ("[1,2]", "[2,1]", False),
        ("NaN", "NaN", True),
        ('"\\u00e9"', '"é"', True),
        ("true", "1", False),
    ],
)
def test_args_are_compared_by_value_and_type(one, other, is_same):
    assert same(one, other) is is_same


@pytest.mark.parametrize("text", [" 1", "1 ", '\n{"a": [1]}\n', "NaN", "-Infinity", "1e999", '{"a":1,"a":2}'])
def test_decoding_equals_json_loads_also_for_white_space(text):
    assert repr(decode(text)) == repr(json.loads(text))


@pytest.mark.parametrize("text", ["", "nul", "[1,]", "1 2", '{"a":1', '"\x01"'])
def test_invalid_json_raises_the_error_of_json_loads(text):
    with pytest.raises(json.JSONDecodeError) as expected:
        json.loads(text)
    with pytest.raises(json.JSONDecodeError) as raised:
        decode(text)
    assert str(raised.value) == str(expected.value)


def test_another_python_than_cpython_writes_and_reads_the_same(monkeypatch):
    monkeypatch.setattr("speval.codec.make_encoder", None)
    value = {"a": [1, 2.5, None, True, "é\ud800", float("inf")], "b": {"c": "\x00"}}
    for options in ({}, {"ascii": True}, {"ascii": True, "sort_keys": True}):
        other = codec._encoder(**options)
        monkeypatch.undo()
        assert other(value) == codec._encoder(**options)(value)
        monkeypatch.setattr("speval.codec.make_encoder", None)
    assert codec._decoder()('{"a":[1,2.5]}') == {"a": [1, 2.5]}


@pytest.fixture
def digits():
    """Set how many digits this process converts at once."""
    before = sys.get_int_max_str_digits()
    yield sys.set_int_max_str_digits
    sys.set_int_max_str_digits(before)


@pytest.mark.parametrize("sign", ["", "-"])
def test_a_number_of_many_digits_is_read_with_any_digit_limit_of_the_process(digits, sign):
    text = f"{sign}{'7' * 9_999}10012345"
    digits(0)
    number = int(text)
    digits(640)
    assert decode(text) == number
    assert decode(f' [{text}, {{"a": {text}}}, 1, 0.5]') == [number, {"a": number}, 1, 0.5]
    digits(0)
    with pytest.raises(ValueError, match="a whole number of 100001 digits"):
        codec._whole("1" * (codec.MOST_DIGITS + 1))
