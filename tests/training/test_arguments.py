"""What a recipe passes on to transformers.TrainingArguments."""

import pytest
import torch

from drafttrain.errors import UserError
from drafttrain.training.arguments import check_arguments, on_one_device, training_arguments


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


def test_several_devices_of_one_process_do_not_multiply_its_batch(tmp_path):
    arguments = training_arguments({"per_device_train_batch_size": 3}, tmp_path)
    arguments._n_gpu = 4  # what transformers finds on a machine of four, started without a launcher
    assert arguments.train_batch_size == 12 and on_one_device(arguments).train_batch_size == 3


@pytest.mark.skipif(torch.cuda.is_available(), reason="CUDA is used where it is there")
def test_an_accelerator_other_than_cuda_is_left_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    assert training_arguments({}, tmp_path).use_cpu
