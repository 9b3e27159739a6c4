"""What traces.py decides before it loads a model."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_prep.traces import batches, check_settings, responses_manifest
from data_prep.traces_plan import disk_bytes
from drafttrain.config import Recipe, SamplingConfig, TracesConfig
from drafttrain.errors import UserError
from drafttrain.run_folder import RunFolder


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"temperatures": [1.0, 0.0]}, "traces.temperatures must be above 0"),
        ({"sampling": SamplingConfig(top_p=2.0)}, "sampling.top_p"),
    ],
)
def test_impossible_settings_are_refused(change, told):
    with pytest.raises(UserError, match=told):
        check_settings(Recipe(traces=TracesConfig(**change)))


def responses_folder(tmp_path, source: str, temperature: float) -> RunFolder:
    run = RunFolder(tmp_path)
    run.responses.mkdir()
    manifest = {"kind": "responses", "schema_version": 1, "complete": True, "shards": [], "source": source}
    manifest["sampling"] = vars(SamplingConfig(temperature=temperature))
    (run.responses / "manifest.json").write_text(json.dumps(manifest))
    return run


def test_traces_follow_the_sampling_of_the_responses(tmp_path):
    run = responses_folder(tmp_path, "generate", 0.7)
    assert responses_manifest(Recipe(), run)["source"] == "generate"
    same = Recipe(traces=TracesConfig(sampling=SamplingConfig(temperature=0.7)))
    assert responses_manifest(same, run)["source"] == "generate"
    other = Recipe(traces=TracesConfig(sampling=SamplingConfig(temperature=0.0)))
    with pytest.raises(UserError, match=r"drawn with temperature 0.7 and traces.sampling has temperature 0.0"):
        responses_manifest(other, run)


def test_of_logged_answers_the_recipe_may_say_how_they_were_drawn(tmp_path):
    run = responses_folder(tmp_path, "logged", 1.0)
    recipe = Recipe(traces=TracesConfig(sampling=SamplingConfig(temperature=0.0)))
    assert responses_manifest(recipe, run)["source"] == "logged"


def test_without_responses_the_program_that_makes_them_is_named(tmp_path):
    with pytest.raises(UserError, match=r"responses does not exist; make it first with `data_prep/responses.py"):
        responses_manifest(Recipe(), RunFolder(tmp_path))


def test_disk_grows_with_what_is_stored():
    rows = [{"prompt_ids": [1] * 10, "response_ids": [1] * 100}]
    sizes = [disk_bytes(rows, Recipe(traces=TracesConfig(**more))) for more in ({}, {"top_k": 32}, {"run_length": 20})]
    assert 100 * 4 * 16 * 4 < sizes[0] < min(sizes[1:])


@given(st.lists(st.integers(0, 50), max_size=20), st.integers(1, 6))
def test_batches_hold_every_row_once_and_rows_of_like_length(lengths, size):
    found = batches(lengths, size)
    assert sorted(place for batch in found for place in batch) == list(range(len(lengths)))
    assert all(len(batch) <= size for batch in found)
    assert [lengths[place] for batch in found for place in batch] == sorted(lengths)
