"""TOML into dataclasses: whatever isn't expected is an error that names file, key and what is allowed."""

import dataclasses
from typing import Any, Literal

import pytest

from diffopt import config
from diffopt.config import ConfigError, build, config_folder, config_names, read_config
from diffopt.errors import InputError


@dataclasses.dataclass(frozen=True)
class Inner:
    size: int
    rate: float = 1.0


@dataclasses.dataclass(frozen=True)
class Outer:
    name: str
    inner: Inner
    several: tuple[Inner, ...] = ()
    pair: tuple[int, str] = (0, "")
    flags: dict[str, bool] = dataclasses.field(default_factory=dict)
    note: str | None = None
    anything: Any = None
    word: Literal["left", "right"] = "left"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    (tmp_path / "things").mkdir()
    monkeypatch.setattr(config, "config_folder", lambda: tmp_path)
    return tmp_path / "things"


def test_a_whole_file_is_read(folder):
    (folder / "one.toml").write_text(
        """
        name = "one"
        pair = [3, "x"]
        note = "yes"
        anything = [1, "two"]
        inner = { size = 2, rate = 3 }
        several = [{ size = 1 }, { size = 2 }]
        flags = { a = true }
        word = "right"
        """
    )
    thing = read_config("things", "one", Outer)
    expected = Outer("one", Inner(2, 3.0), (Inner(1), Inner(2)), (3, "x"), {"a": True}, "yes", [1, "two"], "right")
    assert thing == expected
    assert type(thing.inner.rate) is float


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"surprise": 1}, "unknown key 'surprise'; allowed: name, inner"),
        ({"name": 1}, "name: 1 is a int, expected str"),
        ({"inner": {}}, "inner: key 'size' is missing"),
        ({"inner": {"size": 1.5}}, "inner: size: 1.5 is a float, expected int"),
        ({"inner": {"size": True}}, "size: True is a bool, expected int"),
        ({"inner": {"size": 1, "x": 2}}, "inner: unknown key 'x'"),
        ({"inner": 3}, "inner: 3 is a int"),
        ({"several": [{"size": "1"}]}, "size: '1' is a str"),
        ({"several": {"size": 1}}, "several: "),
        ({"pair": [1]}, "pair: "),
        ({"pair": ["x", 1]}, "pair: "),
        ({"flags": {"a": 1}}, "flags.a: 1 is a int, expected bool"),
        ({"note": 1}, "note: 1 is a int, expected str"),
        ({"name": None}, "name: None"),
        ({"word": "up"}, "word: 'up'; allowed: left, right"),
    ],
)
def test_what_is_not_expected_is_named(change, words):
    with pytest.raises(ConfigError) as caught:
        build(Outer, {"name": "x", "inner": {"size": 1}} | change, where="one.toml")
    assert str(caught.value).startswith("one.toml: ")
    assert words in str(caught.value)


def test_a_missing_key_is_named():
    with pytest.raises(ConfigError, match=r"^one.toml: key 'inner' is missing$"):
        build(Outer, {"name": "x"}, where="one.toml")


def test_none_is_a_value_only_where_it_is_allowed():
    assert build(Outer, {"name": "x", "inner": {"size": 1}, "note": None}, where="json").note is None


def test_an_unknown_name_lists_the_known_ones_nearest_first(folder):
    for name in ("alpha", "beta", "gamma"):
        (folder / f"{name}.toml").touch()
    assert config_names("things") == ["alpha", "beta", "gamma"]
    with pytest.raises(InputError, match="thing: 'gama' is not possible; known: gamma, alpha, beta"):
        read_config("things", "gama", Outer)


def test_a_file_that_is_not_toml_is_refused(folder):
    (folder / "bad.toml").write_text("name = ")
    with pytest.raises(ConfigError, match=r"bad.toml: not valid TOML"):
        read_config("things", "bad", Outer)


def test_the_project_has_its_configs():
    assert (config_folder() / "models").is_dir()
    assert "emoji" in config_names("models")
