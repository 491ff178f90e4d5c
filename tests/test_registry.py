"""Methods are found by name, in our folder and in other packages; nothing else is imported."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Literal

import pytest

from vllm_specplus import registry
from vllm_specplus.config import MethodConfig, parse
from vllm_specplus.proposer import Proposer

FOLDER = Path(registry.__file__).with_name("proposers")

MODULE = """
from typing import Literal
from vllm_specplus.config import MethodConfig
from vllm_specplus.proposer import Proposer
from vllm_specplus.registry import register_method
class {name}Config(MethodConfig):
    method: Literal["{method}"] = "{method}"
    num_speculative_tokens: int = 3
@register_method
class {name}(Proposer):
    config_class = {name}Config
    def propose(self, step):
        raise NotImplementedError
"""


@pytest.fixture
def install(tmp_path, monkeypatch):
    """Function that makes a distribution with entry points ``{name: value}``."""
    monkeypatch.setattr(registry, "_registered", dict(registry._registered))
    registry.method_class.cache_clear()
    monkeypatch.syspath_prepend(str(tmp_path))

    def make(distribution: str, points: dict[str, str], version: str = "1.5") -> None:
        info = tmp_path / f"{distribution.replace('-', '_')}-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(
            f"Metadata-Version: 2.1\nName: {distribution}\nVersion: {version}\n"
        )
        lines = "".join(f"{name} = {value}\n" for name, value in points.items())
        (info / "entry_points.txt").write_text(f"[{registry.GROUP}]\n{lines}")

    yield make
    registry.method_class.cache_clear()
    for name in [name for name in sys.modules if name.startswith("other_")]:
        del sys.modules[name]


def write(tmp_path, module: str, name: str, method: str) -> None:
    (tmp_path / f"{module}.py").write_text(MODULE.format(name=name, method=method))


def test_every_file_of_ours_holds_the_method_it_is_named_after():
    ours = {m.name: m for m in registry.methods() if m.package == "vllm-specplus"}
    assert ours.keys() == {path.stem for path in FOLDER.glob("*.py")} - {"__init__"}
    for name in ours:
        proposer = registry.method_class(name)
        assert issubclass(proposer, Proposer)
        assert proposer.config_class is registry.config_class(name)
        assert proposer.__module__ == proposer.config_class.__module__ == ours[name].place
        assert proposer.config_class.model_fields["method"].default == name


def test_only_the_method_that_is_used_is_imported():
    code = (
        "import sys; from vllm_specplus.config import parse; parse({'method': 'jacobi'});"
        "there = [m for m in sys.modules if m.startswith('vllm_specplus.proposers.')];"
        "sys.exit(str(there) if there != ['vllm_specplus.proposers.jacobi'] else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_method_of_another_package_is_configured_like_ours(tmp_path, install):
    write(tmp_path, "other_one", "Guess", "guess")
    install("other-one", {"guess": "other_one:Guess"})
    assert "guess" in registry.method_names()
    assert "other_one" not in sys.modules
    assert parse({"method": "guess"}).num_speculative_tokens == 3
    (found,) = (m for m in registry.methods() if m.name == "guess")
    assert (found.place, found.package, found.problem) == ("other_one:Guess", "other-one 1.5", None)
    with pytest.raises(ValueError, match="for 'guess': unknown key 'size'"):
        parse({"method": "guess", "size": 3})


def refusal(method: str) -> str:
    with pytest.raises(ValueError, match=r"^speculative_config: ") as error:
        parse({"method": method})
    assert "\n" not in str(error.value)
    return str(error.value)


def test_two_packages_cannot_share_a_name(tmp_path, install):
    write(tmp_path, "other_one", "Guess", "guess")
    install("other-one", {"guess": "other_one:Guess"})
    install("other-two", {"guess": "other_one:Guess"})
    said = refusal("guess")
    assert "'guess' is registered twice, by other-" in said
    assert "other-two 1.5" in said


def test_a_name_of_ours_is_taken(tmp_path, install):
    install("other-one", {"jacobi": "other_one:Jacobi"})
    assert "'jacobi' is registered twice, by vllm-specplus and other-one 1.5" in refusal("jacobi")


@pytest.mark.parametrize("name", ["Guess", "guess-2", "2guess", "gu.ess"])
def test_names_are_plain_words(install, name):
    install("other-one", {name: "other_one:Guess"})
    assert f"{name!r} cannot be the name of a method: use lower-case letters" in refusal(name)


def test_names_of_vllm_stay_its_own(install):
    install("other-one", {"ngram": "other_one:Guess"})
    assert "ngram" not in registry.method_names()  # vLLM goes on with its own
    (found,) = (m for m in registry.methods() if m.name == "ngram")
    assert found.problem == "method 'ngram' is vLLM's own: choose another name"


def test_all_names_of_vllm_are_known():
    from typing import get_args

    from vllm.config.speculative import SpeculativeMethod

    names = get_args(SpeculativeMethod)
    assert len(names) > 10
    assert [name for name in names if not registry._VLLMS.fullmatch(name)] == []


@pytest.mark.parametrize(
    ("point", "words"),
    [
        ("other_absent:Guess", "cannot be imported from 'other_absent:Guess': ModuleNotFoundError"),
        ("other_one:Gues", "cannot be imported from 'other_one:Gues': AttributeError"),
        ("other_one:GuessConfig", "'other_one:GuessConfig' of other-one 1.5 does not register"),
        ("other_name:Guess", "does not register method 'guess': decorate its class"),
    ],
)
def test_what_an_entry_point_must_hold(tmp_path, install, point, words):
    write(tmp_path, "other_one", "Guess", "guess")
    write(tmp_path, "other_name", "Guess", "other_guess")
    install("other-one", {"guess": point})
    assert words in refusal("guess")


def test_the_decorator_refuses_in_a_sentence(install):
    def make(default, name="Made"):
        config = type(
            "Config", (MethodConfig,),
            {"__annotations__": {"method": Literal[default]}, "method": default},
        )  # fmt: skip
        return type(name, (Proposer,), {"config_class": config})

    registry.register_method(make("made_here"))
    with pytest.raises(
        ValueError, match=r"'made_here' is registered twice, by .*Made and by .*Oth"
    ):
        registry.register_method(make("made_here", "Other"))
    with pytest.raises(ValueError, match="'Made Here' cannot be the name"):
        registry.register_method(make("Made Here"))
    with pytest.raises(ValueError, match="'eagle' is vLLM's own"):
        registry.register_method(make("eagle"))
    with pytest.raises(ValueError, match="names no method: give it a 'config_class'"):
        registry.register_method(type("Bare", (Proposer,), {}))
