"""Recipes: strict, one order of precedence, paths found from anywhere."""

import dataclasses
import subprocess
import sys
import typing

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from drafttrain import recipe as recipe_module
from drafttrain.config import REPOSITORY, SECTIONS, Recipe, SamplingConfig, build, nearest, parse, resolve_path
from drafttrain.errors import UserError


def defaults() -> Recipe:
    """The recipe of someone who says nothing; paths come out of `parse` as they were found."""
    recipe = Recipe()
    recipe.target.path = resolve_path(recipe.target.path)
    return recipe


@pytest.fixture
def ask(tmp_path, monkeypatch):
    """Parse flags in an empty folder; `yaml` becomes the recipe file there."""
    monkeypatch.chdir(tmp_path)

    def ask(*flags, text=None, sections=("training", "head")):
        given = ["--run", "r"]
        if text is not None:
            (tmp_path / "recipe.yaml").write_text(text)
            given += ["--config", "recipe.yaml"]
        return parse("A program.", sections, [*given, *flags])

    return ask


def refused(ask, *flags, text=None):
    with pytest.raises(UserError) as error:
        ask(*flags, text=text)
    sentence = str(error.value)
    assert "\n" not in sentence
    return sentence


# Precedence


def test_defaults_hold_where_nothing_is_said(ask):
    assert ask().recipe == defaults()


def test_flags_override_yaml_and_yaml_overrides_defaults(ask):
    parsed = ask("--head.depth", "1", text="head: {depth: 2, w_rej: 3}\nseed: 5\n")
    assert (parsed.recipe.head.depth, parsed.recipe.head.w_rej, parsed.recipe.head.w_acc) == (1, 3.0, 1.0)
    assert parsed.recipe.seed == 5


def test_flags_win_wherever_the_recipe_stands_on_the_command_line(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text("head: {depth: 2}\n")
    parsed = parse("", [], ["--head.depth", "1", "--config", str(path), "--run", "r"])
    assert parsed.recipe.head.depth == 1


def test_a_mapping_in_yaml_replaces_the_default_and_a_flag_adds_to_it(ask):
    text = "training: {losses: {total_variation: 1}}\n"
    assert ask(text=text).recipe.training.losses == {"total_variation": 1.0}
    both = ask("--training.losses.forward_kl", "0.5", text=text).recipe.training.losses
    assert both == {"total_variation": 1.0, "forward_kl": 0.5}


def test_one_reading_leaves_nothing_behind_for_the_next(ask):
    ask("--training.losses.x", "1", "--training.arguments.y", "2", text="head: {features: [step]}")
    assert ask().recipe == defaults()


def test_free_arguments_keep_their_yaml_types(ask):
    text = "training: {arguments: {learning_rate: 1e-3, bf16: true}}\n"
    arguments = ask("--training.arguments.max_steps", "7", text=text).recipe.training.arguments
    assert arguments == {"learning_rate": 1e-3, "bf16": True, "max_steps": 7}


def test_nested_sections_are_typed(ask):
    parsed = ask(
        "--drafter.lora.r", "4", text="evaluate: {samplings: [{temperature: 0}, {top_k: 3}]}\ntraces: {sampling: {}}"
    )
    assert parsed.recipe.drafter.lora.r == 4
    assert parsed.recipe.evaluate.samplings == [SamplingConfig(temperature=0.0), SamplingConfig(top_k=3)]
    assert parsed.recipe.traces.sampling == SamplingConfig()


def test_an_empty_section_means_its_defaults(ask):
    assert ask(text="head:\ntraining:\n").recipe == defaults()


def test_every_program_takes_the_whole_recipe(ask):
    whole = ask().to_yaml()
    assert ask(text=whole, sections=("export",)).recipe == defaults()


# Strictness


@pytest.mark.parametrize(
    ("flag", "meant"),
    [
        ("--head.dept", "--head.depth"),
        ("--heads.depth", "--head.depth"),
        ("--depth", "--head.depth"),
        ("--rum", "--run"),
        ("--accept-new-targets", "--accept-new-target"),
        ("--allow-cod", "--allow-code"),
        ("--drafter.lora.rr", "--drafter.lora.r"),
        ("--target.path.x", "--target.path"),
        ("--traces.sampling.temprature", "--traces.sampling.temperature"),
    ],
)
def test_an_unknown_flag_names_the_nearest_known_one(ask, flag, meant):
    for words in ([flag, "3"], [f"{flag}=3"]):
        assert refused(ask, *words).endswith(f"unknown setting {flag}; did you mean {meant}?")


@pytest.mark.parametrize(
    ("text", "unknown", "meant"),
    [
        ("target: {pth: x}", "target.pth", "target.path"),
        ("targets: {path: x}", "targets", "target"),
        ("drafter: {lora: {alfa: 3}}", "drafter.lora.alfa", "drafter.lora.alpha"),
        ("responses: {sampling: {topk: 3}}", "responses.sampling.topk", "responses.sampling.top_k"),
        (
            "evaluate: {samplings: [{}, {temperatur: 1}]}",
            "evaluate.samplings.temperatur",
            "evaluate.samplings.temperature",
        ),
        ("drafter: {w_rej: 3}", "drafter.w_rej", "head.w_rej"),
    ],
)
def test_an_unknown_key_in_yaml_is_named_with_the_file_at_any_depth(ask, text, unknown, meant):
    assert refused(ask, text=text).endswith(f"recipe.yaml: unknown setting {unknown}; did you mean {meant}?")


def test_an_unknown_key_inside_a_list_given_as_a_flag_is_refused(ask):
    assert "evaluate.samplings" in refused(ask, "--evaluate.samplings", "[{temperatur: 0}]")


@given(st.text("abcdefghijklmnopqrstuvwxyz_", min_size=1, max_size=12))
def test_no_misspelt_key_is_ever_taken(name):
    head = {field.name for field in dataclasses.fields(SECTIONS["head"])}
    if name not in head:
        with pytest.raises(UserError, match="unknown setting"):
            parse("", [], ["--run", "r", f"--head.{name}", "1"])


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--head.depth", "three"], "head.depth takes a whole number, not three."),
        (["--head.depth", "1.5"], "head.depth takes a whole number, not 1.5."),
        (["--head.depth"], "head.depth takes a whole number."),
        (["--head.tied", "perhaps"], "head.tied takes true or false, not perhaps."),
        (["--head.state", "taken"], "head.state takes one of producing, consumed, not taken."),
        (["--prompts.limit", "x"], "prompts.limit takes a whole number or nothing (null), not x."),
    ],
)
def test_a_wrong_type_on_the_command_line_is_one_sentence(ask, flags, sentence):
    assert refused(ask, *flags) == f"command line: {sentence}"


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ("head: {depth: three}", "head.depth"),
        ("head: 3", "head"),
        ("prompts: {mixture: {recall: many}}", "prompts.mixture"),
        ("evaluate: {samplings: {temperature: 1}}", "evaluate.samplings"),
        ("evaluate: {samplings: [{temperature: warm}]}", "evaluate.samplings"),
    ],
)
def test_a_wrong_type_in_yaml_names_file_and_key(ask, text, key):
    sentence = refused(ask, text=text)
    assert f"recipe.yaml: {key} takes " in sentence


@pytest.mark.parametrize(
    "flags",
    [
        ["--responses.batch_size", "0"],
        ["--responses.sampling.top_p", "1.5"],
        ["--responses.sampling.temperature", "-1"],
        ["--responses.sampling.temperature", ".nan"],
        ["--evaluate.samplings", "[{min_p: 2}]"],
        ["--head.mixing", "1.1"],
    ],
)
def test_impossible_numbers_are_refused(ask, flags):
    assert f"{flags[0][2:]}" in refused(ask, *flags)


def test_a_stray_word_is_refused(ask):
    assert "extra" in refused(ask, "extra")


# Files


def test_a_missing_recipe_is_named(ask):
    assert "nowhere.yaml does not exist" in refused(ask, "--config", "nowhere.yaml")


def test_malformed_yaml_names_line_and_column(ask):
    assert "not valid YAML at line 2, column" in refused(ask, text="head: {depth: 1}\n}: [\n")


def test_a_recipe_that_is_no_mapping_or_no_text_is_refused(ask, tmp_path):
    assert "mapping of sections" in refused(ask, text="- a\n- b\n")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00x")
    assert "not valid YAML" in refused(ask, "--config", "binary.yaml")


def test_an_empty_recipe_is_the_defaults(ask):
    assert ask(text="# nothing yet\n").recipe == defaults()


# Launchers and general flags


@pytest.mark.parametrize("words", [["--local_rank", "1"], ["--local_rank=1"], ["--local-rank=1"]])
def test_launchers_arguments_are_accepted_and_ignored(ask, words):
    assert ask(*words).recipe == defaults()


def test_general_flags_are_read(ask):
    parsed = ask("--plan", "--accept-new-target", "--allow-code")
    assert parsed.plan and parsed.accept_new_target and parsed.allow_code
    assert str(parsed.run) == "r" and parsed.config is None
    assert not ask().plan and not ask().accept_new_target and not ask().allow_code


def test_the_run_folder_is_named_after_the_recipe_when_none_is_given(tmp_path):
    path = tmp_path / "pair.yaml"
    path.write_text("")
    assert parse("", [], ["--config", str(path)]).run.parts == ("runs", "pair")
    with pytest.raises(UserError, match="--run DIR"):
        parse("", [], [])


def test_an_alias_stands_for_a_long_flag():
    parsed = parse("", ["export"], ["--run", "r", "--to", "vllm"], aliases={"--to": "--export.to"})
    assert parsed.recipe.export.to == "vllm"


# Paths


def test_a_path_is_looked_for_here_then_beside_the_recipe_then_in_the_repository(tmp_path, monkeypatch):
    here, beside = tmp_path / "here", tmp_path / "beside"
    for folder in (here, beside):
        (folder / "model").mkdir(parents=True)
    (beside / "recipe.yaml").write_text("target: {path: model}\ndrafter: {path: pyproject.toml, init_from: owner/name}")
    monkeypatch.chdir(here)

    def recipe():
        return parse("", [], ["--config", "../beside/recipe.yaml", "--run", "r"]).recipe

    assert recipe().target.path == str(here / "model")
    (here / "model").rmdir()
    assert recipe().target.path == str(beside / "model")
    (beside / "model").rmdir()
    assert recipe().target.path == "model"
    assert recipe().drafter.path == str(REPOSITORY / "pyproject.toml")
    assert recipe().drafter.init_from == "owner/name"


def test_a_recipe_of_the_repository_is_found_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert resolve_path("pyproject.toml") == str(REPOSITORY / "pyproject.toml")
    assert resolve_path("/absolute") == "/absolute"


def test_the_record_of_a_recipe_names_no_place_of_this_machine_inside_the_repository(ask):
    parsed = ask("--drafter.path", "pyproject.toml")
    assert parsed.recipe.drafter.path == str(REPOSITORY / "pyproject.toml")
    assert parsed.resolved["drafter"]["path"] == "pyproject.toml"
    assert str(REPOSITORY) not in parsed.to_yaml()


def test_a_prompts_path_means_prompts_from_a_file(ask):
    parsed = ask("--prompts.path", "p.jsonl")
    assert parsed.recipe.prompts.source == "file" and parsed.resolved["prompts"]["source"] == "file"
    assert ask("--prompts.path", "a/b", "--prompts.source", "hub").recipe.prompts.source == "hub"


# Records and help


def test_the_resolved_recipe_reads_back_as_itself(ask):
    text = "evaluate: {samplings: [{temperature: 0}], methods: ['Model(drafter, length=5)']}\ndrafter: {lora: {r: 2}}\n"
    first = ask("--head.features", "[step]", text=text)
    second = ask(text=first.to_yaml())
    assert second.recipe == first.recipe and second.resolved == first.resolved
    assert yaml.safe_load(first.to_yaml()) == first.resolved
    built = build(Recipe, first.resolved)
    built.target.path = resolve_path(built.target.path)  # the record names it from the repository
    assert built == first.recipe


def test_help_teaches_every_field_of_the_programs_own_sections(capsys):
    with pytest.raises(SystemExit) as stop:
        parse("Distil a drafter.", ["training"], ["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert stop.value.code == 0 and "Distil a drafter." in text
    for field in dataclasses.fields(SECTIONS["training"]):
        assert f"--training.{field.name}" in text
    assert "tokens whose logits exist at one time" in text and "--export.to" not in text


def test_every_field_of_every_section_has_its_help():
    from drafttrain.config import _field_help

    documented = _field_help()
    for cls in vars(recipe_module).values():
        if isinstance(cls, type) and dataclasses.is_dataclass(cls):
            for field in dataclasses.fields(cls):
                assert (cls.__name__, field.name) in documented or field.name in typing.get_type_hints(Recipe)


def test_reading_a_recipe_does_not_wait_for_torch():
    code = (
        "import sys; from drafttrain.config import parse; import drafttrain.cli, drafttrain.run_folder\n"
        "import drafttrain.distributed; parse('', [], ['--run', 'r']); sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY).returncode == 0


def test_nearest_prefers_spelling_then_the_same_name_elsewhere():
    assert nearest("head.dpeth", ["head.depth", "head.data"]) == "head.depth"
    assert nearest("threshold", ["head.threshold", "head.depth"]) == "head.threshold"
    assert nearest("zzz", ["head.depth"]) is None
