"""What a search chooses from: complete, free of repetition, and made again from its own description."""

import dataclasses
import json

import pytest

import fastdit
from fastdit.attention import get_method, list_methods, method_class
from fastdit.attention import method as base
from fastdit.search.candidates import default_candidates, describe, make_candidates, sparse_vdit_candidates


def test_default_candidates_start_with_dense_and_are_few():
    candidates = default_candidates()
    assert candidates[0] == get_method("dense") and len(candidates) == len(set(candidates))
    assert 8 <= len(candidates) <= 18
    densities = [c.density for c in candidates if hasattr(c, "density")]
    assert min(densities) <= 0.05 and max(densities) >= 0.5
    assert {getattr(c, "compensate", None) for c in candidates} == {None, "mean"}


def test_every_method_that_needs_no_calibration_or_training_and_no_search_of_its_own_is_among_them():
    names = {candidate.name for candidate in default_candidates()}
    ready = {name for name in list_methods() if name not in ("paro", "profiled") and not method_class(name).trained_for}
    assert names == ready


def test_candidates_survive_their_description():
    candidates = default_candidates()
    text = json.dumps([describe(candidate) for candidate in candidates], allow_nan=False)
    assert make_candidates(json.loads(text)) == candidates


def test_a_method_of_the_users_own_joins_in(monkeypatch):
    monkeypatch.setattr(base, "_REGISTRY", dict(base._REGISTRY))

    @fastdit.register("mine")
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Mine(type(get_method("draft"))):
        density: float = 0.7

    @fastdit.register("trained")
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Trained(Mine):
        trained_for = ("density",)

    candidates = default_candidates()
    assert [c.density for c in candidates if c.name == "mine"] == [0.1, 0.3]
    assert not [c for c in candidates if c.name == "trained"]
    with pytest.raises(ValueError, match=r"'trained' has no candidates by default; .* trained\(field=value\)"):
        make_candidates(["trained"])


def test_candidates_are_read_from_what_a_user_names():
    wanted = [
        "draft(density=0.15, tile=(1, 4, 4), compensate=mean)",
        " radial( block_size = 64 , compensate = None ) ",
        get_method("draft", density=0.9),
        {"method": "draft", "fields": {"density": 0.9}},
        "radial(block_size=64)",
        "dense",
    ]
    assert make_candidates(wanted) == [
        get_method("dense"),
        get_method("draft", density=0.15, tile=(1, 4, 4), compensate="mean"),
        get_method("radial", block_size=64),
        get_method("draft", density=0.9),
    ]
    of_draft = make_candidates(["draft"])
    assert {c.name for c in of_draft} == {"dense", "draft"} and of_draft == default_candidates(["draft"])
    assert make_candidates(None) == default_candidates()


@pytest.mark.parametrize(
    ("wanted", "error", "message"),
    [
        (["daft"], ValueError, r"unknown method 'daft' \(did you mean 'draft'\?\)"),
        (["daft(density=0.1)"], ValueError, "unknown method 'daft'"),
        (["draft(densty=0.1)"], TypeError, r"no field 'densty' \(did you mean 'density'\?\)"),
        (["draft(density=1.5)"], ValueError, r"density must be in \(0, 1\]"),
        (["draft(0.1)"], ValueError, "cannot read"),
        (["draft(density=0.1"], ValueError, "cannot read"),
        (["draft(density=open('x'))"], ValueError, "cannot read"),
        (["draft().x(density=1)"], ValueError, "cannot read"),
        (["draft(**{'density': 0.1})"], ValueError, "not all named"),
        ([], ValueError, "there are no candidates"),
        (["dense"], ValueError, "there are no candidates"),
        (["paro"], ValueError, "'paro' has no candidates by default"),
    ],
)
def test_candidates_that_make_no_sense_say_so(wanted, error, message):
    with pytest.raises(error, match=message):
        make_candidates(wanted)


def test_the_modes_of_sparse_vdit():
    modes = sparse_vdit_candidates(0.2)
    assert [m.name for m in modes] == ["dense", "skip", "diagonal", "multi_diagonal", "vertical_stripe"]
    assert [m.density for m in modes[2:]] == [0.2] * 3
