"""Where a Trainer's checkpoints wait: what is found again, and what is no start for another run."""

from types import SimpleNamespace

from drafttrain.training.work_folder import clear_unless_same, last_checkpoint, remove


def arguments(batch=4, world=1):
    return SimpleNamespace(train_batch_size=batch, gradient_accumulation_steps=1, world_size=world)


def save(folder, step, state="{}"):
    (folder / f"checkpoint-{step}").mkdir(parents=True)
    (folder / f"checkpoint-{step}" / "trainer_state.json").write_text(state)


def test_only_checkpoints_of_the_same_run_are_kept(tmp_path, capsys, monkeypatch):
    folder = tmp_path / "work"
    clear_unless_same(folder, "key", arguments())
    save(folder, 2)
    clear_unless_same(folder, "key", arguments())
    assert last_checkpoint(folder) is not None and not capsys.readouterr().out
    for change in ({"key": "other"}, {"arguments": arguments(batch=8)}):
        save(folder, 4)
        clear_unless_same(**{"folder": folder, "key": "key", "arguments": arguments(), **change})
        assert last_checkpoint(folder) is None and "starting over" in capsys.readouterr().out
    save(folder, 2)
    monkeypatch.setenv("WORLD_SIZE", "2")  # the same global batch, its parts with other processes
    clear_unless_same(folder, "key", arguments(batch=4, world=2))
    assert last_checkpoint(folder) is None


def test_half_written_checkpoints_are_passed_over(tmp_path):
    assert last_checkpoint(tmp_path / "nowhere") is None
    save(tmp_path, 200)
    save(tmp_path, 1000, '{"trunca')
    (tmp_path / "checkpoint-1200").mkdir()
    assert last_checkpoint(tmp_path).name == "checkpoint-200"
    assert last_checkpoint(tmp_path, lambda path: True).name == "checkpoint-1200"


def test_a_removed_folder_may_be_gone_already(tmp_path):
    save(tmp_path / "work", 1)
    remove(tmp_path / "work")
    remove(tmp_path / "work")
    assert not (tmp_path / "work").exists()
