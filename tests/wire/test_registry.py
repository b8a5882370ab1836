"""The register of methods, and errors that say what the nearest known name is."""

from __future__ import annotations

import re

import pytest

import turnout.strategies
from turnout.strategies import StreamingStrategy
from turnout.wire import (
    CheckpointError,
    ConfigError,
    DataError,
    LayoutError,
    ReplyRejected,
    TurnoutError,
    find,
    keys,
    methods,
    register,
    registry,
    unknown_name,
)

SLUGS = (
    "fedavg", "unbiased-fedavg", "average-all", "fedau", "fedstale", "fedvarp", "mifa", "fedamd", "rerce-fed",
    "dual-admm", "scaffold", "fedprox", "feddyn", "bo-rep", "bo-rep-local-upper", "field-space-continual",
    "eggroll", "eco",
)  # fmt: skip


@pytest.fixture
def kind(monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(registry, "_entries", dict(registry._entries))
    return "test-kind"


class TestRegister:
    def test_entry_of_a_class(self, kind: str) -> None:
        @register("red", kind, "1234.56789")
        class Red:
            """A colour.

            More about it.
            """

        entry = find(kind, "red")
        assert entry.target is Red
        assert (entry.slug, entry.kind, entry.paper, entry.summary) == (
            "red",
            kind,
            "1234.56789",
            "A colour.",
        )
        assert entry.class_path.endswith("Red")
        assert methods(kind) == [entry]

    def test_sorted_and_by_kind(self, kind: str) -> None:
        for slug in ("b", "a"):
            register(slug, kind, summary=slug)(type(slug, (), {}))
        assert [entry.slug for entry in methods(kind)] == ["a", "b"]
        assert set(methods(kind)) < set(methods())

    def test_two_things_under_one_name_are_refused(self, kind: str) -> None:
        register("same", kind)(type("First", (), {}))
        with pytest.raises(ValueError, match=r"'same' is registered twice.*First.*Second"):
            register("same", kind)(type("Second", (), {}))

    def test_unknown_names_suggest_the_nearest(self) -> None:
        with pytest.raises(ConfigError, match=r"unknown strategy 'fedstail'. Did you mean 'fedstale'\?"):
            find("strategy", "fedstail")
        with pytest.raises(ConfigError, match=r"unknown memory 'rom'. Did you mean 'ram'\?"):
            find("memory", "rom")

    def test_nothing_near_lists_what_is_known(self) -> None:
        message = str(unknown_name("fruit", "xyzzy", ["pear", "apple"]))
        assert message == "unknown fruit 'xyzzy'. Known: apple, pear."
        assert str(unknown_name("fruit", "pear", [])) == "unknown fruit 'pear'. Known: none."


class TestStrategiesAreRegistered:
    def test_slugs(self) -> None:
        assert sorted(entry.slug for entry in methods("strategy")) == sorted(SLUGS)
        assert {entry.slug for entry in methods("memory")} == {"ram", "fp16", "mmap"}

    @pytest.mark.parametrize("slug", SLUGS)
    def test_entry_is_complete(self, slug: str) -> None:
        entry = find("strategy", slug)
        assert issubclass(entry.target, StreamingStrategy)
        assert entry.target.__name__ in turnout.strategies.__all__
        assert entry.paper is not None
        assert re.fullmatch(r"\d{4}\.\d{5}", entry.paper)
        assert entry.summary.endswith(".")
        module = entry.class_path.rpartition(".")[0]
        assert module == f"turnout.strategies.{slug.replace('-', '_')}"


def test_names_on_the_wire_are_kebab_case_and_distinct() -> None:
    names = [value for name, value in vars(keys).items() if name.isupper()]
    assert len(names) == len(set(names)) > 15
    assert all(re.fullmatch(r"[a-z]+(-[a-z]+)*", name) for name in names)


class TestErrors:
    @pytest.mark.parametrize("error", [ConfigError, LayoutError, CheckpointError, DataError, ReplyRejected])
    def test_one_tree(self, error: type[Exception]) -> None:
        assert issubclass(error, TurnoutError)

    def test_a_user_value_error_is_a_value_error(self) -> None:
        assert issubclass(ConfigError, ValueError)
        assert issubclass(LayoutError, ValueError)

    def test_rejections_are_counted_by_reason(self) -> None:
        refused = ReplyRejected("non-finite", "it holds NaN")
        assert (refused.reason, str(refused)) == ("non-finite", "it holds NaN")
