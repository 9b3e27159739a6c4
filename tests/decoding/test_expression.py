from __future__ import annotations

import importlib
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from drafttrain.decoding.drafters import ModelDrafter
from drafttrain.decoding.engine import Engine
from drafttrain.decoding.expression import build, parse_method, resolved
from drafttrain.decoding.stopping import AcceptanceHeadRule, Confidence, EntropyBound, FixedLength
from drafttrain.decoding.tree_drafter import TreeDrafter
from drafttrain.errors import UserError
from drafttrain.models.acceptance_head import AcceptanceHead, AcceptanceHeadConfig
from tests.conftest import build_llama


@pytest.fixture(scope="module")
def members():
    return {
        "drafter": Engine(build_llama(8, layers=1, hidden=16)),
        "head": AcceptanceHead(AcceptanceHeadConfig(16, depth=0)),
    }


def test_autoregressive_decoding_needs_no_drafter(members):
    assert build("Autoregressive()", members) is None


def test_a_model_with_a_length(members):
    drafter = build("Model(drafter, length=5)", members)
    assert isinstance(drafter, ModelDrafter)
    assert isinstance(drafter.stop, FixedLength)
    assert (drafter.max_length, drafter.name, drafter.engine) == (5, "drafter", members["drafter"])


def test_every_stopping_rule_can_be_named(members):
    head = build("Model(drafter, stop=AcceptanceHead(head, 0.7, min=2, max=20))", members).stop
    assert isinstance(head, AcceptanceHeadRule)
    assert (head.threshold, head.min_length, head.max_length) == (0.7, 2, 20)
    confidence = build("Model(drafter, stop=Confidence(0.4, per_token=True), length=4)", members)
    assert isinstance(confidence.stop, Confidence)
    assert confidence.stop.per_token
    assert confidence.max_length == 4
    entropy = build("Model(drafter, stop=Entropy(1.5), check_every=2)", members)
    assert isinstance(entropy.stop, EntropyBound)
    assert (entropy.stop.bound, entropy.check_every) == (1.5, 2)


def test_every_build_is_a_drafter_of_its_own(members):
    method = parse_method("Model(drafter, stop=Confidence(0.4))")
    one, two = build(method, members), build(method, members)
    assert one is not two
    assert one.stop is not two.stop


@pytest.mark.parametrize(
    ("text", "canonical"),
    [
        (" Model( drafter,length = 5 ) ", "Model(drafter, length=5)"),
        ("Model(length=5, drafter=small)", "Model(small, length=5)"),
        ("Model(drafter, 5)", "Model(drafter, length=5)"),
        ("Model(drafter, stop=Confidence(threshold=.4))", "Model(drafter, stop=Confidence(0.4))"),
        (
            "Model(d, stop=AcceptanceHead(h, 0.7, max=20, min=2))",
            "Model(d, stop=AcceptanceHead(h, 0.7, min=2, max=20))",
        ),
        ("Model(d, stop=Entropy(-1.0))", "Model(d, stop=Entropy(-1.0))"),
    ],
)
def test_expressions_have_one_canonical_form(text, canonical):
    assert str(parse_method(text)) == canonical
    assert str(parse_method(canonical)) == canonical
    assert parse_method(canonical) == parse_method(text)


RULES = st.one_of(
    st.builds("Confidence({}, per_token={})".format, st.floats(0, 1), st.booleans()),
    st.builds("Entropy({}, min={}, max={})".format, st.floats(0, 9), st.integers(1, 3), st.integers(3, 9)),
    st.builds("AcceptanceHead(head, {})".format, st.floats(0, 1)),
)


@given(st.builds("Model(drafter, stop={}, length={})".format, RULES, st.integers(1, 30)))
def test_what_is_printed_can_be_parsed_again(text):
    parsed = parse_method(text)
    assert parse_method(str(parsed)) == parsed


def test_a_method_says_which_members_it_needs():
    assert parse_method("Autoregressive()").members == set()
    assert parse_method("Model(small, stop=AcceptanceHead(head, 0.7))").members == {"small", "head"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("Modell(drafter, length=5)", "unknown constructor Modell; did you mean Model"),
        ("Model(drafter, lenght=5)", "no parameter lenght; did you mean length"),
        ("Model(drafter", "is not an expression"),
        ("", "is not an expression"),
        ("5", "is not a constructor"),
        ("drafter", "is not a constructor"),
        ("Model()", "missing a required argument: 'drafter'"),
        ("Model(drafter, 1, 2, 3, 4)", "too many positional"),
        ("Model(drafter, length=2 + 3)", "neither a constructor, a member name nor a number"),
        ("Model(drafter.x, length=2)", "neither a constructor"),
        ("Model(**drafter)", "may not use \\*\\*"),
        ("__import__('os').system('ls')", "neither a constructor"),
        ("(lambda: 0)()", "neither a constructor"),
        ("Model(drafter, length=5, length=6)", "given a parameter twice"),
    ],
)
def test_malformed_methods_are_refused_in_a_sentence(text, message):
    with pytest.raises(UserError, match=message):
        parse_method(text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("Model(draftr, length=5)", "names draftr, which is not there; did you mean drafter"),
        ("Model(head, length=5)", "head in the method is not a model"),
        ("Model(5, length=5)", "5 in the method is not a model"),
        ("Model(drafter)", "needs a length or a stopping rule"),
        ("Model(drafter, length=0)", "length is 0, but it must be a whole number"),
        ("Model(drafter, length=2.5)", "length is 2.5"),
        ("Model(drafter, length=True)", "length is True"),
        ("Model(drafter, stop=4)", "must be a stopping rule"),
        ("Model(drafter, length=3, tree=[2, 2])", "tree has as many levels as it has widths, so it takes no length"),
        ("Model(drafter, tree=4)", "tree is 4; give it a list of widths"),
        ("Model(drafter, tree=[])", "at least one level"),
        ("Model(drafter, tree=[4, 0])", "level 2 of a tree has 0 tokens"),
        ("Model(drafter, stop=head)", "must be a stopping rule.* but head lacks min_length"),
        ("Model(drafter, stop=AcceptanceHead(drafter, 0.7))", "drafter in the method is not an acceptance head"),
        ("Model(drafter, stop=Confidence(1.5))", "not a probability"),
        ("Model(drafter, stop=Confidence('a'))", "Confidence's threshold is 'a'"),
        ("Model(drafter, stop=Confidence(drafter))", "Confidence's threshold is drafter, but it must be a number"),
        ("Model(drafter, stop=Confidence(0.5, max=2.5))", "Confidence's max is 2.5"),
        ("Confidence(0.4)", "is no drafter"),
    ],
)
def test_methods_that_cannot_be_built_are_refused_in_a_sentence(members, text, message):
    with pytest.raises(UserError, match=message):
        build(text, members)


def test_a_bug_in_a_constructor_keeps_its_traceback(members, monkeypatch):
    def broken(self, *arguments):
        raise TypeError("a bug")

    monkeypatch.setattr(Confidence, "__init__", broken)
    with pytest.raises(TypeError, match="a bug"):
        build("Model(drafter, stop=Confidence(0.5))", members)


def test_trees_are_built_with_their_widths_and_rules(members):
    drafter = build("Model(drafter, tree=[4, 8, 8], stop=Confidence(0.5, max=2), drawn=False)", members)
    assert isinstance(drafter, TreeDrafter) and (drafter.widths, drafter.max_length) == ([4, 8], 12)
    assert not drafter.drawn and isinstance(drafter.stop, Confidence)
    assert str(parse_method("Model(drafter, tree=(4, 8))")) == "Model(drafter, tree=[4, 8])"


# ---- classes from outside ----

OUTSIDE = """
from drafttrain.decoding.drafters import Drafter, ModelDrafter
from drafttrain.decoding.stopping import Confidence, StoppingRule

class Mine(ModelDrafter):
    def __init__(self, drafter, k, /, *, stop=None, note="none", also=()):
        super().__init__(drafter, k, stop)
        self.note, self.also = note, also

class Many(Mine):
    def __init__(self, drafter, k=2, *names, **options):
        super().__init__(drafter, k)
        self.names, self.options = names, options

class Rule(Confidence):
    pass

class Half:
    name, max_length = "half", 2
    def start(self): ...
    def propose(self): ...

class HalfRule:
    max_length, adaptive = 2, True

class Open(Drafter):
    pass

class Broken(ModelDrafter):
    def __init__(self):
        raise TypeError("a bug")

def function():
    pass
"""


@pytest.fixture
def outside(tmp_path, monkeypatch):
    """The current folder has a package of the person's own."""
    (tmp_path / "their_package").mkdir()
    (tmp_path / "their_package" / "__init__.py").write_text("")
    (tmp_path / "their_package" / "code.py").write_text(OUTSIDE)
    (tmp_path / "their_package" / "incomplete.py").write_text("import a_library_that_is_not_installed\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path])
    importlib.invalidate_caches()
    yield
    for name in [name for name in sys.modules if name.startswith("their_package")]:
        del sys.modules[name]


MINE = "their_package.code.Mine(drafter, 3)"


def test_a_class_from_outside_needs_permission_and_is_not_imported_without(members, outside):
    for text in (MINE, "Model(drafter, stop=their_package.code.Rule(0.5))"):
        with pytest.raises(UserError, match=r"their_package\.code\.\w+ .* needs --allow-code"):
            build(text, members)
        assert str(parse_method(text)) == text and parse_method(text).members == {"drafter"}
    assert "their_package" not in sys.modules


def test_a_drafter_from_outside_gets_the_members_themselves(members, outside):
    text = "their_package.code.Mine(drafter, 5, stop=Confidence(0.4), note='x', also=[head, 1])"
    drafter = build(text, members, allow_code=True)
    assert type(drafter).__name__ == "Mine" and drafter.engine is members["drafter"]
    assert isinstance(drafter.stop, Confidence) and drafter.max_length == 5
    assert (drafter.note, drafter.also) == ("x", (members["head"], 1))


def test_a_rule_from_outside_stops_a_model(members, outside):
    drafter = build("Model(drafter, stop=their_package.code.Rule(0.5, max_length=3))", members, allow_code=True)
    assert isinstance(drafter, ModelDrafter) and type(drafter.stop).__name__ == "Rule" and drafter.max_length == 3


@pytest.mark.parametrize(
    ("text", "canonical"),
    [
        ("their_package.code.Mine( drafter,3,also=(1,2),note='x' )", f"{MINE[:-1]}, note='x', also=[1, 2])"),
        (
            "Model(drafter, stop=their_package.code.Rule(threshold=.5))",
            "Model(drafter, stop=their_package.code.Rule(0.5))",
        ),
        ("their_package.code.Many(drafter, 5)", "their_package.code.Many(drafter, k=5)"),
        ("their_package.code.Many(drafter, 5, 6, b=1, a=2)", "their_package.code.Many(drafter, 5, 6, b=1, a=2)"),
    ],
)
def test_methods_from_outside_have_one_canonical_form(outside, text, canonical):
    assert str(resolved(parse_method(text), allow_code=True)) == canonical
    assert parse_method(canonical) == resolved(parse_method(canonical), allow_code=True)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("no_package.code.Mine(drafter, 3)", "no module no_package for no_package.code.Mine"),
        ("their_package.cod.Mine(drafter, 3)", r"no module their_package\.cod for"),
        ("their_package.code.Mime(drafter, 3)", "their_package.code has no class Mime; did you mean Mine"),
        ("their_package.code.function()", "has no class function"),
        ("their_package.code.Mine(drafter, 3, nota='x')", "has no parameter nota; did you mean note"),
        ("their_package.code.Mine(drafter)", r"Mine\(drafter, k, /, \*, stop=None.*missing a required argument: 'k'"),
        ("their_package.code.Mine(draftr, 3)", "names draftr, which is not there; did you mean drafter"),
        ("their_package.code.Half()", "Half is no drafter: it lacks score, commit, keep"),
        ("their_package.code.Open()", "Open cannot be made: it lacks propose"),
        ("their_package.code.Rule(0.5)", "is no drafter; give it to one, as in Model"),
        (
            "Model(drafter, stop=their_package.code.HalfRule())",
            "must be a stopping rule.* but HalfRule lacks min_length, limits, begin, stop",
        ),
        ("their_package.code.Rule(1.5)", "not a probability"),
    ],
)
def test_classes_from_outside_that_do_not_fit_are_refused_in_a_sentence(members, outside, text, message):
    with pytest.raises(UserError, match=message):
        build(text, members, allow_code=True)


def test_bugs_outside_keep_their_tracebacks(members, outside):
    with pytest.raises(TypeError, match="a bug"):
        build("their_package.code.Broken()", members, allow_code=True)
    with pytest.raises(ModuleNotFoundError, match="a_library_that_is_not_installed"):
        build("their_package.incomplete.Mine(drafter)", members, allow_code=True)
