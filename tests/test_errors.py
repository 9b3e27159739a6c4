"""People's mistakes end in one sentence and exit code 2; bugs keep their traceback."""

import errno
import os

import pytest

from drafttrain.errors import UserError, run_program


def outcome(capsys, function):
    with pytest.raises(SystemExit) as stop:
        run_program(function)()
    return stop.value.code, capsys.readouterr().err


def failing(error):
    def main():
        raise error

    return main


def test_a_mistake_is_one_line_on_stderr_and_exit_code_2(capsys):
    code, told = outcome(capsys, failing(UserError("the file x is missing; check the path.")))
    assert code == 2
    assert told == "drafttrain: the file x is missing; check the path.\n"


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EACCES, errno.ENOENT, errno.EROFS])
def test_system_errors_that_a_person_can_mend_are_sentences_with_the_path(capsys, number):
    code, told = outcome(capsys, failing(OSError(number, os.strerror(number), "/some/file")))
    assert code == 2
    assert told.startswith("drafttrain: /some/file: ")
    assert told.count("\n") == 1


def test_a_really_full_disk_is_a_sentence(capsys):
    if not os.path.exists("/dev/full"):
        pytest.skip("needs /dev/full")

    def main():
        with open("/dev/full", "wb", buffering=0) as file:
            file.write(b"x")

    code, told = outcome(capsys, main)
    assert code == 2 and "disk is full" in told


def test_torch_that_cannot_write_its_file_is_a_full_disk(capsys):
    if not os.path.exists("/dev/full"):
        pytest.skip("needs /dev/full")
    import torch

    code, told = outcome(capsys, lambda: torch.save({"x": torch.zeros(100_000)}, "/dev/full"))
    assert code == 2 and "disk is full" in told


def test_a_full_disk_wrapped_by_a_library_is_still_recognised(capsys):
    def main():
        try:
            raise OSError(errno.ENOSPC, "No space left on device")
        except OSError as error:
            raise RuntimeError("failed writing file") from error

    code, told = outcome(capsys, main)
    assert code == 2 and "disk is full" in told


@pytest.mark.parametrize("bug", [ValueError("oops"), OSError(errno.EBADF, "bad descriptor"), KeyError("x")])
def test_a_bug_keeps_its_traceback(bug):
    with pytest.raises(type(bug)):
        run_program(failing(bug))()


def test_running_out_of_accelerator_memory_says_what_to_lower(capsys):
    class OutOfMemoryError(RuntimeError):
        pass

    code, told = outcome(capsys, failing(OutOfMemoryError("CUDA out of memory.\nTried to allocate 2 GiB")))
    assert code == 2 and "batch_size" in told and told.count("\n") == 1


def test_an_interrupt_is_not_a_traceback(capsys):
    code, told = outcome(capsys, failing(KeyboardInterrupt()))
    assert code == 130 and "again" in told


def test_the_result_and_the_arguments_pass_through():
    assert run_program(lambda a, b=0: a + b)(1, b=2) == 3
