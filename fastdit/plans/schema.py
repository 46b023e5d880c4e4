"""Read and write JSON that may come from anyone: every value is checked, and an error names its place."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

MAX_BYTES = 16 << 20
"""Size of the largest file that is read."""

MAX_NUMBER = 1e15
"""Largest number that is read."""


class PlanError(ValueError):
    """Say what is wrong with a plan, and where."""


@dataclass(frozen=True)
class Item:
    """Hold a value of a JSON file and its place, and check what it is asked to be.

    Args:
        value: The value.
        place: Where it is, such as ``"transformers.transformer.heads"``; empty for the whole.
    """

    value: Any
    place: str = ""

    def fail(self, expected: str) -> NoReturn:
        """Raise an error that says what the value must be, and what it is.

        Args:
            expected: What it must be.

        Raises:
            PlanError: Always.
        """
        raise PlanError(f"{self.place or 'the plan'} must be {expected}, got {shown(self.value)}")

    def entries(self, names: Collection[str] | None = None, optional: Collection[str] = ()) -> dict[str, Item]:
        """Return the entries of an object.

        Args:
            names: The names it must have, all of them and no others; default: any.
            optional: Other names that it may have.

        Raises:
            PlanError: It is no object, or has other names.
        """
        if not isinstance(self.value, dict) or not all(isinstance(name, str) for name in self.value):
            self.fail("an object")
        where = f"{self.place}." if self.place else ""
        if names is not None:
            missing, unknown = set(names) - set(self.value), set(self.value) - {*names, *optional}
            for wrong, fault in ((missing, "is missing"), (unknown, "is unknown")):
                if wrong:
                    known = f"{self.place or 'a plan'} has: {', '.join(sorted(names))}"
                    raise PlanError(f"{where}{shown(min(wrong))[1:-1]} {fault}; {known}")
        return {name: Item(value, f"{where}{shown(name)[1:-1]}") for name, value in self.value.items()}

    def items(self, count: int | None = None, *, least: int = 0) -> list[Item]:
        """Return the items of a list.

        Args:
            count: How many it must have; default: any number.
            least: How many it must have at least.

        Raises:
            PlanError: It is no list, or of another length.
        """
        if not isinstance(self.value, (list, tuple)):
            self.fail("a list")
        if len(self.value) < least or (count is not None and len(self.value) != count):
            self.fail(f"a list of {count}" if count is not None else f"a list of at least {least}")
        return [Item(value, f"{self.place}[{index}]") for index, value in enumerate(self.value)]

    def text(self, pattern: str = r".*", *, longest: int = 10_000, called: str = "a text") -> str:
        """Return a text.

        Args:
            pattern: Regular expression that all of it must match.
            longest: Characters it may have.
            called: What to call it in the error.

        Raises:
            PlanError: It is none, too long, or does not match.
        """
        value = self.value
        if not isinstance(value, str) or len(value) > longest or re.fullmatch(pattern, value, re.DOTALL) is None:
            self.fail(called)
        if any("\ud800" <= letter <= "\udfff" for letter in value):
            self.fail(f"{called} that can be written")
        return value

    def integer(self, low: int, high: int = int(MAX_NUMBER)) -> int:
        """Return a whole number.

        Args:
            low: The smallest it may be.
            high: The largest it may be.

        Raises:
            PlanError: It is none, or out of range.
        """
        if type(self.value) is not int or not low <= self.value <= high:
            self.fail(
                f"a whole number in [{low}, {high}]" if high < MAX_NUMBER else f"a whole number of at least {low}"
            )
        return self.value

    def number(self, low: float = -MAX_NUMBER, high: float = MAX_NUMBER) -> float:
        """Return a number, rounded to six digits, which is what files keep.

        Args:
            low: The smallest it may be.
            high: The largest it may be.

        Raises:
            PlanError: It is none, or out of range.
        """
        if type(self.value) not in (int, float) or not low <= self.value <= high:
            limits = f" in [{low:g}, {high:g}]" if high < MAX_NUMBER else f" of at least {low:g}"
            self.fail(f"a number{limits if low > -MAX_NUMBER else ''}")
        return float(f"{self.value:.6g}")

    def flag(self) -> bool:
        """Return ``True`` or ``False``.

        Raises:
            PlanError: It is neither.
        """
        if not isinstance(self.value, bool):
            self.fail("true or false")
        return self.value

    def plain(self, depth: int = 8) -> Any:
        """Return values that JSON can hold, whatever they mean: numbers, texts, lists and objects.

        Args:
            depth: Levels it may have.

        Raises:
            PlanError: Something else is in it, or it has too many levels.
        """
        if depth == 0:
            self.fail("less deep")
        if isinstance(self.value, dict):
            return {name: item.plain(depth - 1) for name, item in self.entries().items()}
        if isinstance(self.value, (list, tuple)):
            return [item.plain(depth - 1) for item in self.items()]
        if self.value is None or isinstance(self.value, bool):
            return self.value
        if isinstance(self.value, str):
            return self.text()
        self.number()
        return self.value


def shown(value: Any) -> str:
    """Return a value as an error shows it, in a few words.

    Args:
        value: The value.
    """
    if isinstance(value, (list, tuple, dict)):
        return f"{'an object' if isinstance(value, dict) else 'a list'} of {len(value)}"
    if isinstance(value, str):
        return repr(value if len(value) <= 40 else value[:40] + "...")
    if isinstance(value, int) and abs(value) > MAX_NUMBER:
        return f"a number of {value.bit_length()} bits"
    return repr(value)[:60]


def read_json(path: Path) -> Any:
    """Read a JSON file strictly: no NaN, no name twice, nothing too large.

    Args:
        path: The file.

    Raises:
        PlanError: It cannot be read, or is no such JSON.
    """
    try:
        if not path.is_file():
            raise PlanError(f"there is no file {path}" if not path.exists() else f"{path} is no file")
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise PlanError(f"{path} cannot be read: {error.strerror}") from error
    if len(data) > MAX_BYTES:
        raise PlanError(f"{path} has more than {MAX_BYTES >> 20} MiB, which is no plan")
    try:
        return json.loads(data.decode(), object_pairs_hook=_unique, parse_constant=_no_number, parse_float=_finite)
    except (ValueError, RecursionError) as error:
        raise PlanError(f"{path} is no JSON: {' '.join(str(error).split())[:200]}") from error


def write_json(value: Any) -> str:
    """Return JSON for people to read: names in order, a list of numbers in one line.

    Args:
        value: Objects, lists, texts and finite numbers.
    """
    return "".join(_lines(value, "")) + "\n"


def _lines(value: Any, indent: str) -> Iterator[str]:
    inner = indent + "  "
    if isinstance(value, dict) and value:
        for index, name in enumerate(sorted(value)):
            yield f"{',' if index else '{'}\n{inner}{json.dumps(name, ensure_ascii=False)}: "
            yield from _lines(value[name], inner)
        yield f"\n{indent}}}"
    elif isinstance(value, (list, tuple)) and any(isinstance(item, (list, tuple, dict, str)) for item in value):
        for index, item in enumerate(value):
            yield f"{',' if index else '['}\n{inner}"
            yield from _lines(item, inner)
        yield f"\n{indent}]"
    else:
        yield json.dumps(value, ensure_ascii=False, allow_nan=False)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"{shown(name)} is there twice")
        found[name] = value
    return found


def _no_number(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text[:20]} is too large a number")
    return value
