"""What a recipe passes on to transformers.TrainingArguments."""

import pytest

from drafttrain.errors import UserError
from drafttrain.training.arguments import check_arguments, training_arguments


def test_the_recipe_overrides_the_defaults_and_the_program_fixes_what_it_needs(tmp_path):
    arguments = training_arguments(
        {"learning_rate": 1e-3, "max_steps": 5},
        tmp_path / "out",
        defaults={"learning_rate": 1e-5, "logging_steps": 7},
        remove_unused_columns=False,
    )
    assert (arguments.learning_rate, arguments.max_steps, arguments.logging_steps) == (1e-3, 5, 7)
    assert arguments.remove_unused_columns is False and arguments.output_dir == str(tmp_path / "out")


def test_an_unknown_argument_names_the_nearest():
    check_arguments({"learning_rate": 1})
    with pytest.raises(UserError, match=r"head\.arguments: .* no learning_rat; did you mean learning_rate\?"):
        check_arguments({"learning_rat": 1}, "head")


def test_what_the_program_fixes_cannot_be_set(tmp_path):
    with pytest.raises(UserError, match=r"training\.arguments\.output_dir is set by the program"):
        training_arguments({"output_dir": "/elsewhere"}, tmp_path)


def test_a_value_that_transformers_refuses_is_one_sentence(tmp_path):
    with pytest.raises(UserError) as error:
        training_arguments({"lr_scheduler_type": "curly"}, tmp_path)
    assert str(error.value).startswith("training.arguments cannot be used") and "\n" not in str(error.value)
