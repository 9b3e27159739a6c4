"""Two reports are paired by prompt; unlike ones are refused by name, and counts outlive a change of hardware."""

import dataclasses

import pytest

from drafttrain.errors import UserError
from drafttrain.evaluation.compare import compare, unlike
from drafttrain.evaluation.schema import to_json, to_json_line
from tests.evaluation import synthetic


def save(folder, report, answers):
    (folder / "samples").mkdir(parents=True)
    for row in report.methods:
        lines = [to_json_line(sample) + "\n" for sample in answers[row.sampling, row.method]]
        (folder / row.samples).write_text("".join(lines))
    (folder / "report.json").write_text(to_json(report))
    return folder


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    return save(tmp_path_factory.mktemp("compare") / "a", *synthetic.report(samplings=("greedy",)))


def other(tmp_path, factor=1.0, seed=1, **changes):
    report, answers = synthetic.report(seed=seed, samplings=("greedy",), **changes)
    for (_, method), samples in answers.items():
        if "AcceptanceHead" in method:
            answers["greedy", method] = [
                dataclasses.replace(sample, decode_seconds=sample.decode_seconds / factor) for sample in samples
            ]
    return save(tmp_path / "b", report, answers)


def speed(rows, method):
    return next(row for row in rows if row.figure == "speed-up" and row.method_b == method and row.method_a == method)


def test_a_real_gain_is_found_and_an_unchanged_method_is_not(first, tmp_path, capsys):
    rows = compare(first, other(tmp_path, factor=1.3))
    head, fixed = synthetic.METHODS[2][0], synthetic.METHODS[0][0]
    assert speed(rows, head).ratio.low > 1.1
    assert speed(rows, fixed).ratio.low < 1 < speed(rows, fixed).ratio.high
    assert speed(rows, head).prompts == 32
    assert "B gains" in capsys.readouterr().out


def test_a_report_compared_with_itself_shows_nothing(first, capsys):
    rows = compare(first, first)
    assert all(row.ratio.value == pytest.approx(1) and row.ratio.low == pytest.approx(row.ratio.high) for row in rows)
    assert "No difference shown" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("hardware", {"environment": synthetic.environment(cpu="Another Processor")}),
        ("hardware", {"environment": synthetic.environment(threads=8)}),
        (
            "target",
            {"pair": synthetic.pair(target_fingerprint={"tokenizer": "t", "architecture": "a", "weights": "z"})},
        ),
    ],
)
def test_unlike_reports_are_refused_by_name_and_compared_when_told(first, tmp_path, name, changes, capsys):
    second = other(tmp_path, **changes)
    with pytest.raises(UserError, match=f"--allow-unlike {name}"):
        compare(first, second)
    rows = compare(first, second, allow_unlike={name})
    assert {"tau", "discard rate"} <= {row.figure for row in rows}
    assert ("speed-up" in {row.figure for row in rows}) == (name != "hardware")
    assert f"Unlike, as allowed: {name}" in capsys.readouterr().out


def test_other_prompts_and_settings_are_unlike():
    a, _ = synthetic.report(samplings=("greedy",))
    b, _ = synthetic.report(samplings=("temperature 1",))
    b.workload.prompts_hash = "others"
    assert set(unlike(a, b)) == {"prompts", "sampling"}


def test_unlike_settings_are_paired_in_their_order_when_told(first, tmp_path, capsys):
    second = save(tmp_path / "b", *synthetic.report(samplings=("temperature 1",)))
    rows = compare(first, second, allow_unlike={"sampling"})
    assert {row.sampling for row in rows} == {"temperature 1 against greedy"}
    assert {method for method, *_ in synthetic.METHODS} <= {
        row.method_a for row in rows if row.method_a == row.method_b
    }
    assert "Unlike, as allowed: sampling" in capsys.readouterr().out
    both = save(tmp_path / "c", *synthetic.report(samplings=("temperature 1", "greedy")))
    assert {row.sampling for row in compare(first, both, allow_unlike={"sampling"})} == {"greedy"}


def test_something_against_nothing_is_a_difference(first, tmp_path):
    """A discards nothing, B does."""
    report, answers = synthetic.report(samplings=("greedy",))
    fixed = ("greedy", synthetic.METHODS[0][0])
    answers[fixed] = [dataclasses.replace(s, counts=s.counts | {"discarded": 0}) for s in answers[fixed]]
    found = [row for row in compare(save(tmp_path / "a", report, answers), first) if row.figure == "discard rate"]
    [row] = [row for row in found if row.method_a == row.method_b == fixed[1]]
    assert row.a == 0 < row.b and row.ratio.low == row.ratio.value == row.ratio.high == float("inf")
    [same] = [r for r in compare(tmp_path / "a", tmp_path / "a") if r.figure == row.figure and r.method_a == fixed[1]]
    assert same.ratio.value == 1


def test_only_common_prompts_are_paired(first, tmp_path):
    report, answers = synthetic.report(samplings=("greedy",))
    report.workload.prompts_hash = "fewer"
    answers = {key: [s for s in value if s.prompt_id != "code-1"] for key, value in answers.items()}
    rows = compare(first, save(tmp_path / "b", report, answers), allow_unlike={"prompts"})
    assert {row.prompts for row in rows} == {31}


def test_the_comparison_can_be_kept(first, tmp_path):
    compare(first, first, output=tmp_path / "comparison.md")
    assert (tmp_path / "comparison.md").read_text().startswith("# ")


def test_missing_answers_are_refused_in_a_sentence(first, tmp_path):
    second = other(tmp_path)
    next((second / "samples").iterdir()).unlink()
    with pytest.raises(UserError, match="does not exist"):
        compare(first, second)
