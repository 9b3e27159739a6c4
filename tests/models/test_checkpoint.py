"""Checkpoints: whole or absent, self-describing, readable by transformers alone."""

import contextlib
import json
import os

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from drafttrain.errors import UserError
from drafttrain.models import checkpoint
from drafttrain.models.checkpoint import CheckpointInfo, license_of, model_card, read_info, save_checkpoint
from drafttrain.models.fingerprint import Fingerprint

TARGET = Fingerprint("aa", "bb", "cc")


def info(**values):
    recipe = {"target": {"path": "checkpoints/reference-target"}, "seed": 3}
    return CheckpointInfo("drafter", TARGET, recipe, {"tau": 2.345678, "per_task": {"code": [1.0, 2.0]}}, **values)


class Crash(BaseException):
    """A process that dies."""


def test_transformers_alone_can_load_it(tmp_path, tiny_drafter, tiny_tokenizer):
    folder = save_checkpoint(tmp_path / "drafter", tiny_drafter, tiny_tokenizer, info())
    ids = torch.tensor([[6, 7, 8]])
    assert torch.equal(AutoModelForCausalLM.from_pretrained(folder)(ids).logits, tiny_drafter(ids).logits)
    assert AutoTokenizer.from_pretrained(folder).get_vocab() == tiny_tokenizer.get_vocab()
    names = {path.name for path in folder.iterdir()}
    wanted = {"config.json", "model.safetensors", "tokenizer.json", "generation_config.json", "README.md"}
    assert wanted | {"drafttrain.json"} <= names
    assert not [name for name in names if name.endswith((".bin", ".pt", ".pkl"))]
    assert [path.name for path in tmp_path.iterdir()] == ["drafter"]


def test_it_says_what_it_is_and_what_made_it(tmp_path, tiny_drafter, tiny_tokenizer):
    folder = save_checkpoint(tmp_path / "drafter", tiny_drafter, tiny_tokenizer, info(extra={"layers": [0, 1]}))
    read = read_info(folder)
    assert (read.kind, read.target, read.recipe["seed"], read.metrics["tau"]) == ("drafter", TARGET, 3, 2.345678)
    assert read.extra == {"layers": [0, 1]}
    assert {"drafttrain", "torch", "transformers"} <= set(read.versions)
    assert (read.git_commit is None) == (not (checkpoint.REPOSITORY / ".git").exists())


def test_the_model_card_states_target_recipe_figures_and_licence(tmp_path):
    card = model_card("drafter", info(license="apache-2.0", description="Drafts code."))
    front, body = card.split("---\n")[1:3]
    assert yaml.safe_load(front)["license"] == "apache-2.0"
    for words in (
        "Drafts code.",
        "checkpoints/reference-target",
        TARGET.short,
        "| tau | 2.346 |",
        "| per_task.code | 1, 2 |",
    ):
        assert words in body
    assert "seed: 3" in body
    assert "licence of the target" in model_card("drafter", info())
    (tmp_path / "README.md").write_text(card)
    assert license_of(tmp_path) == "apache-2.0"


@pytest.mark.parametrize("text", ["no front matter", "---\n: [\n---\n", "---\nlist\n---\n", ""])
def test_a_card_without_a_licence_states_none(tmp_path, text):
    assert license_of(tmp_path) is None
    (tmp_path / "README.md").write_text(text)
    assert license_of(tmp_path) is None


def test_a_new_checkpoint_replaces_the_old_one(tmp_path, tiny_drafter, tiny_tokenizer):
    save_checkpoint(tmp_path / "d", tiny_drafter, tiny_tokenizer, info())
    (tmp_path / "d" / "left-over").write_text("")
    save_checkpoint(
        tmp_path / "d", tiny_drafter, tiny_tokenizer, CheckpointInfo("drafter", TARGET, metrics={"tau": 9.0})
    )
    assert read_info(tmp_path / "d").metrics == {"tau": 9.0}
    assert not (tmp_path / "d" / "left-over").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["d"]


class Model:
    """Saves one small file, so that many crashes can be tried."""

    def __init__(self, value):
        self.value = value

    def save_pretrained(self, folder):
        (folder / "model.safetensors").write_text(self.value)


def save(folder, value):
    save_checkpoint(folder, Model(value), None, CheckpointInfo("acceptance_head", TARGET, metrics={"value": value}))


def dying(monkeypatch, call):
    """The call number `call` to os.rename or os.fsync kills the process: no clean-up runs after it."""
    count = [0]

    def wrap(real):
        def function(*arguments, **keywords):
            count[0] += 1
            if count[0] == call:
                monkeypatch.setattr(checkpoint.shutil, "rmtree", lambda *arguments, **keywords: None)
                raise Crash
            return real(*arguments, **keywords)

        return function

    monkeypatch.setattr(os, "rename", wrap(os.rename))
    monkeypatch.setattr(os, "fsync", wrap(os.fsync))


@pytest.mark.parametrize("call", range(1, 8))
def test_killed_at_any_moment_the_old_or_the_new_one_is_there_whole(tmp_path, call):
    folder = tmp_path / "head"
    save(folder, "old")
    with pytest.MonkeyPatch.context() as patch:
        dying(patch, call)
        with contextlib.suppress(Crash):
            save(folder, "new")
    read = read_info(folder)
    assert read.metrics["value"] == (folder / "model.safetensors").read_text()
    assert read.metrics["value"] in ("old", "new")
    save(folder, "newer")
    assert read_info(folder).metrics == {"value": "newer"}
    assert [path.name for path in tmp_path.iterdir()] == ["head"]


@pytest.mark.parametrize("call", range(1, 5))
def test_a_first_save_that_dies_leaves_no_folder(tmp_path, call):
    with pytest.MonkeyPatch.context() as patch:
        dying(patch, call)
        with pytest.raises(Crash):
            save(tmp_path / "head", "new")
    assert not (tmp_path / "head").exists()
    save(tmp_path / "head", "newer")
    assert read_info(tmp_path / "head").metrics == {"value": "newer"}


def test_a_save_that_fails_leaves_the_old_one_and_no_litter(tmp_path):
    save(tmp_path / "head", "old")

    class Full:
        def save_pretrained(self, folder):
            (folder / "half").write_text("")
            raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        save_checkpoint(tmp_path / "head", Full(), None, info())
    assert read_info(tmp_path / "head").metrics == {"value": "old"}
    assert [path.name for path in tmp_path.iterdir()] == ["head"]


def test_what_a_check_refuses_gets_no_name(tmp_path):
    save(tmp_path / "head", "old")

    def check(written):
        assert (written / "model.safetensors").read_text() == "new"
        raise UserError("other logits")

    with pytest.raises(UserError, match="other logits"):
        save_checkpoint(tmp_path / "head", Model("new"), None, info(), check)
    assert read_info(tmp_path / "head").metrics == {"value": "old"}
    assert [path.name for path in tmp_path.iterdir()] == ["head"]


def test_what_is_not_ours_is_never_replaced(tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").write_text("")
    with pytest.raises(UserError, match="is no checkpoint of drafttrain"):
        save(tmp_path / "photos", "x")
    assert (tmp_path / "photos" / "cat.jpg").exists()
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="is no checkpoint"):
        save(tmp_path / "file", "x")
    (tmp_path / "empty").mkdir()
    save(tmp_path / "empty", "x")


def test_a_missing_damaged_or_newer_description_is_one_sentence(tmp_path):
    with pytest.raises(UserError, match="no checkpoint of drafttrain"):
        read_info(tmp_path)
    path = tmp_path / "drafttrain.json"
    foreign = {"schema_version": "2", "kind": "drafter"}
    for text in ("{", "[]", "{}", json.dumps(foreign), '{"kind": "drafter", "target": {"weights": "cc"}}'):
        path.write_text(text)
        with pytest.raises(UserError, match="damaged"):
            read_info(tmp_path)
    path.write_text(json.dumps({"schema_version": 99, "kind": "drafter"}))
    with pytest.raises(UserError, match="newer drafttrain"):
        read_info(tmp_path)
