"""Prompts of the reference world: held-out prompts come from seeds and code that training never draws."""

import json
from collections import Counter

import pytest

from data_prep.prompts import prompts_of
from data_prep.reference_prompts import DEFAULT_MIXTURE, reference_conversations
from drafttrain.config import PromptsConfig
from drafttrain.errors import UserError
from drafttrain.evaluation.tasks import HELD_OUT, KINDS, TASKS, generate
from tests.conftest import build_tokenizer

TOKENIZER = build_tokenizer()


def make(mixture, length=300, held_out=0.2, seed=0, **settings):
    asked = PromptsConfig(mixture=mixture, length=length, held_out=held_out, seed=seed, **settings)
    return list(reference_conversations(asked, TOKENIZER))


def test_seeds_tell_the_splits_apart():
    made = make({"recall": 20, "code": 10})
    assert Counter(each.split for each in made) == {"train": 18, "tune": 6, "test": 6}
    for each in made:
        assert (each.seed >= HELD_OUT) == (each.split != "train")


def test_held_out_code_comes_from_held_out_modules():
    from data_prep.corpus import held_out_modules, train_modules

    sides = {True: "".join(module.text for module in held_out_modules())}
    sides[False] = "".join(module.text for module in train_modules())
    for each in make({"code": 9}, length=60, held_out=0.3):
        assert each.text in sides[each.split != "train"]
        assert each.prompt_ids[0] == TOKENIZER.bos_token_id and len(each.prompt_ids) == 30


def test_an_example_can_be_made_again_from_its_record_to_be_scored():
    record = prompts_of(PromptsConfig(mixture={"revise/replace": 1}, length=200, seed=3), TOKENIZER, 4096).records[0]
    count = lambda text: len(TOKENIZER(text, add_special_tokens=False)["input_ids"])  # noqa: E731
    example = generate(record["kind"], record["seed"], record["length"], count)
    assert json.loads(record["reference"])["answers"] == [turn.answer for turn in example.turns]
    assert example.turns[0].user in TOKENIZER.decode(record["prompt_ids"])


def test_an_entry_can_have_a_length_of_its_own():
    made = make({"revise": 3, "trace": 3}, lengths={"revise": 160})
    assert {each.task: each.length for each in made} == {"revise": 160, "trace": 300}
    short = [len(TOKENIZER(each.said()[0])["input_ids"]) for each in made if each.task == "revise"]
    assert max(short) < 160
    assert [each for each in made if each.task == "trace"] == make({"trace": 3})


@pytest.mark.parametrize("lengths", [{"recall": 160}, {"trace": 15}])
def test_a_length_of_no_entry_or_of_nothing_is_one_sentence(lengths):
    with pytest.raises(UserError, match=r"name an entry of the mixture \(revise, trace\) and at least 16\.$"):
        make({"revise": 3, "trace": 3}, lengths=lengths)


def test_some_conversations_have_several_turns():
    turns = Counter(len(each.said()) for each in make({"recall": 24, "self_correct": 3}, length=400))
    assert turns[1] and turns[2] and turns[3] > 3


def test_another_seed_gives_other_prompts_and_the_same_seed_the_same():
    one, same, other = make({"trace": 4}), make({"trace": 4}), make({"trace": 4}, seed=1)
    assert one == same
    assert not {each.name for each in one} & {each.name for each in other}


def test_a_task_goes_round_its_kinds_and_a_kind_stays():
    assert {each.kind for each in make({"revise": 4})} == {kind for kind in KINDS if kind.startswith("revise/")}
    assert {each.kind for each in make({"revise/prepend": 3})} == {"revise/prepend"}


def test_the_default_mixture_has_every_task_and_nothing_in_it_is_a_near_duplicate():
    assert set(DEFAULT_MIXTURE) == {"code", *TASKS}
    tenth = {task: number // 10 for task, number in DEFAULT_MIXTURE.items()}
    made = prompts_of(PromptsConfig(mixture=tenth, length=400), TOKENIZER, 4096)
    assert len(made.records) == sum(tenth.values()) and made.notes == []


@pytest.mark.parametrize(
    ("mixture", "length", "told"),
    [({"recal": 3}, 300, "did you mean recall"), ({"facts": 3}, 50, "prompts.length 50 does not do")],
)
def test_an_impossible_mixture_is_told(mixture, length, told):
    with pytest.raises(UserError, match=told):
        make(mixture, length)
