"""Fields of every registered method refuse values of another type than annotated, and say what is allowed."""

import dataclasses
import json
import pathlib
import types
import typing

import pytest

import fastdit
from fastdit.attention import get_method, list_methods, method_class
from fastdit.attention.fields import Count, Tile, check_value

HUGE = 10**400
WRONG = {
    bool: ("false", "True", "", 0, 1, 1.0, None, (True,)),
    int: (True, 2.0, "16", float("nan"), float("inf"), None, (16,)),
    float: ("0.2", True, float("nan"), float("inf"), -float("inf"), HUGE, None, (0.5,)),
    str: (1, True, 0.5, ("raster",), b"raster"),
}


def wrong_values(kind):
    """Values that a type does not have."""
    origin, parts = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        found = [value for part in parts if part is not type(None) for value in wrong_values(part)]
        return [value for value in found if value is not None]
    if origin is typing.Literal:
        return ["nonsense", 1, True, None, (parts[0],), parts[0].encode()]
    if origin is tuple:
        right = (4,) * 3 if parts[0] is int else ((4, 4, 4),)
        inner = [(value, *right[1:]) for value in wrong_values(parts[0])]
        short = [right[1:]] if Ellipsis in parts else [right[1:], (*right, 4)]
        return ["444", 4, None, {"tile": 1}, *short, *inner]
    return list(WRONG.get(kind, ()))


FIELDS = [
    (name, field.name, typing.get_type_hints(method_class(name))[field.name])
    for name in list_methods()
    for field in dataclasses.fields(method_class(name))
]


@pytest.mark.parametrize(("name", "field", "kind"), FIELDS, ids=[f"{name}.{field}" for name, field, _ in FIELDS])
def test_values_of_another_type_are_refused(name, field, kind):
    tried = wrong_values(kind)
    assert tried
    for value in tried:
        with pytest.raises((ValueError, TypeError), match=rf"(?s)^{field} must be .+, got \S+"):
            get_method(name, **{field: value})


@pytest.mark.parametrize(("name", "field", "kind"), [of for of in FIELDS if of[2] is bool], ids=str)
def test_plans_and_flags(name, field, kind, tmp_path):
    file = next((pathlib.Path(fastdit.__file__).parent / "plans" / "data").glob("*.json"))
    plan = json.loads(file.read_text())
    plan["candidates"].append({"method": name, "fields": get_method(name).describe() | {field: "false"}})
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(plan))
    with pytest.raises(
        ValueError, match=rf"candidates\[\d+\] makes no sense: {field} must be True or False, got 'false'"
    ):
        fastdit.Plan.load(path)


def test_lists_become_tuples_and_paths_texts():
    method = get_method("profiled", tiles=[[4, 4, 4], (1, 8, 8)])
    assert method.tiles == ((4, 4, 4), (1, 8, 8)) and hash(method) == hash(dataclasses.replace(method))
    assert get_method("draft", tile=[1, 4, 4]).tile == (1, 4, 4) and get_method("draft", tile=None).tile is None
    assert get_method("sla", weights=pathlib.Path("a") / "b").weights == str(pathlib.Path("a") / "b")


@pytest.mark.parametrize(
    ("kind", "value", "message"),
    [
        (Count, 0, "x must be a whole number of at least 1, got 0"),
        (Tile | None, (4, 4), "x must be (frames, height, width), each at least 1 or None, got (4, 4)"),
        (typing.Literal["mean"] | None, "median", "x must be 'mean' or None, got 'median'"),
        (typing.Literal["a", "b"], "c", "x must be one of a, b, got 'c'"),
        (tuple[str, ...], "abc", "x must be a tuple, of which each is a text, got 'abc'"),
        (tuple[int, bool], (1, 1), "x must be a tuple of 2: a whole number, True or False, got (1, 1)"),
        (dict[str, int], 3, "x must be dict, got 3"),
        (float, "a" * 1000, "x must be a finite number, got 'aaaaaaaaaaaa...aaaaaaaaaaaaa'"),
    ],
)
def test_errors_say_what_is_allowed(kind, value, message):
    with pytest.raises(ValueError) as error:
        check_value("x", value, kind)
    assert str(error.value) == message


def test_methods_of_others_are_checked_too():
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Own(fastdit.AttentionMethod):
        reach: int = 1
        names: tuple[str, ...] = ()
        anything: typing.Any = None

        def pattern(self, q, k, call, state):
            raise NotImplementedError

        def forward(self, q, k, v, call, state):
            raise NotImplementedError

    assert Own(names=["a"], anything=[1]).names == ("a",)
    with pytest.raises(ValueError, match="reach must be a whole number, got '1'"):
        Own(reach="1")
