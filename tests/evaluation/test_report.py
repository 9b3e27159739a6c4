"""The written report opens with the verdict, holds everything inside, and escapes what it quotes."""

import base64
import dataclasses
import re

import pytest

from drafttrain.evaluation import plots, report, tables
from drafttrain.evaluation.schema import read_report, read_samples
from drafttrain.evaluation.verdict import decide, verdict_lines
from drafttrain.run_folder import RunFolder
from tests.evaluation import synthetic


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    run = RunFolder(tmp_path_factory.mktemp("run"))
    made, answers = synthetic.report()
    assert report.write(made, by_path(made, answers), run) == run.path / "report.html"
    return made, run


def by_path(made, answers):
    return {row.samples: answers[row.sampling, row.method] for row in made.methods}


def test_markdown_opens_with_the_verdict(written):
    made, run = written
    lines = (run.path / "report.md").read_text().splitlines()
    assert lines[2] == f"**{made.verdict.headline}**"
    assert all(line in "\n".join(lines) for line in verdict_lines(made.verdict))


def test_the_page_is_one_file(written):
    page = (written[1].path / "report.html").read_text()
    assert not re.findall(r"(?:src|href)=['\"](?!data:)", page)
    images = re.findall(r"data:image/png;base64,([A-Za-z0-9+/=]+)", page)
    assert len(images) == len(written[0].plots)
    assert all(base64.b64decode(image).startswith(b"\x89PNG") for image in images)
    assert page.index("class='verdict deploy'") < page.index("<figure")


def test_what_models_write_cannot_become_markup(written):
    page = (written[1].path / "report.html").read_text()
    assert "<b>" not in page and "ships &lt;b&gt;&amp;amp; boats" in page


def test_every_source_of_the_shown_answers_is_in_the_legend(written):
    page = (written[1].path / "report.html").read_text()
    keys = re.findall(r"class='key'[^>]*>([^<]+)<", page)
    assert keys == ["chosen by the target itself", "drafted by drafter, accepted"]


def test_json_reads_back_with_its_plots(written):
    made, run = written
    assert read_report(run.path) == made
    assert all((run.path / path).stat().st_size > 5000 for path in made.plots.values())


def test_answers_are_found_where_the_report_says(written):
    made, run = written
    assert all(len(read_samples(run.path / row.samples)) == 32 for row in made.methods)


def test_an_old_report_never_stands_beside_new_answers(tmp_path, monkeypatch):
    run, (made, answers) = RunFolder(tmp_path), synthetic.report(samplings=("greedy",))
    report.write(made, by_path(made, answers), run)

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(report.plots, "draw_all", killed)
    with pytest.raises(KeyboardInterrupt):
        report.write(made, by_path(made, answers), run)
    assert not (run.path / "report.json").exists()


def test_every_method_stands_in_every_table(written):
    text = (written[1].path / "report.md").read_text()
    for row in written[0].methods:
        assert text.count(f"`{row.method}`") >= 3


def test_larger_batches_stand_in_both_pages_with_what_they_come_to(written):
    made, run = written
    text, page = ((run.path / name).read_text() for name in ("report.md", "report.html"))
    for load in made.load:
        assert f"Under load, {load.sampling}" in text and f"Batch sizes, {load.sampling}" in page
        for batch in load.batches:
            for point in batch.points:
                assert f"| `{point.method}` | {batch.batch_size} | {point.tokens_per_second:.1f} |" in text
    assert text.count("stops paying at a batch of 16") == 2 * 2 + 1  # two methods under two settings, and the verdict
    assert "plots/load.png" in text and "throughput" in page


def test_a_report_without_larger_batches_does_not_speak_of_them(tmp_path):
    made, answers = synthetic.report(samplings=("greedy",), load=[])
    made.verdict = decide(made.methods, made.sweep, made.tau_history, 1.05)
    report.write(made, by_path(made, answers), RunFolder(tmp_path))
    for name in ("report.md", "report.html"):
        assert "Under load" not in (tmp_path / name).read_text()


def test_notes_say_what_was_not_observed_and_what_else_is_to_be_known():
    made, _ = synthetic.report(samplings=("greedy",), notes=["A head of another setting."])
    assert "A head of another setting." in tables.method_notes(made)
    assert not [line for line in tables.method_notes(made) if "where the traces end" in line]
    made.sweep[3].unobserved = 0.254
    [line] = [line for line in tables.method_notes(made) if "where the traces end" in line]
    assert "up to 25.4 % of the rounds" in line


def test_heads_of_other_names_are_curves_of_their_own():
    made, _ = synthetic.report(samplings=("greedy",))
    methods = {
        "Model(drafter, stop=AcceptanceHead(head, 0.5))": ("head", ""),
        "Model(drafter, stop=AcceptanceHead(published, 0.5))": ("head", "published"),
    }
    for method, family in methods.items():
        assert plots._family(dataclasses.replace(made.sweep[0], method=method, kind="head")) == family


def test_a_method_from_outside_is_a_line_of_its_own_beside_the_lengths():
    made, _ = synthetic.report(samplings=("greedy",))
    made.methods[-1].kind = "other"
    [axis] = plots.length(made).axes
    assert "other, measured" in axis.get_legend_handles_labels()[1]


def test_plots_without_data_are_left_out_and_old_ones_removed(tmp_path):
    made, _ = synthetic.report(samplings=("greedy",), sweep=[], tau_history=[], head=None, load=[])
    (tmp_path / "plots").mkdir()
    (tmp_path / "plots" / "pareto.png").write_bytes(b"old")
    drawn = plots.draw_all(made, tmp_path / "plots")
    assert set(drawn) == {"speedup", "breakdown"}
    assert not (tmp_path / "plots" / "pareto.png").exists()


def shown_ticks(axis):
    """Labels of the ticks within view: matplotlib keeps some beyond it."""
    for ticks, (low, high) in ((axis.xaxis, axis.get_xlim()), (axis.yaxis, axis.get_ylim())):
        for tick in ticks.get_major_ticks():
            if low <= tick.get_loc() <= high:
                yield tick.label1


def test_no_text_of_a_plot_leaves_the_picture_or_covers_another():
    from matplotlib import pyplot

    made, _ = synthetic.report()
    for name, draw in plots.PLOTS.items():
        with pyplot.rc_context(plots.STYLE):
            figure = draw(made)
            if figure is None:
                continue
            figure.canvas.draw()
            boxes = [
                label.get_window_extent()
                for axis in figure.axes
                for label in [*shown_ticks(axis), axis.title, axis.xaxis.label, axis.yaxis.label, *axis.texts]
                if label.get_visible() and label.get_text()
            ]
            width, height = figure.get_size_inches() * figure.dpi
            assert all(b.x0 >= -1 and b.y0 >= -1 and b.x1 <= width + 1 and b.y1 <= height + 1 for b in boxes), name
            overlaps = [(a, b) for i, a in enumerate(boxes) for b in boxes[:i] if a.shrunk(0.9, 0.9).overlaps(b)]
            assert not overlaps, name
            pyplot.close(figure)


def test_who_wrote_the_tokens_is_told_where_several_may(tmp_path):
    made, _ = synthetic.report()
    row = next(row for row in made.methods if row.sampling == "greedy" and row.kind == "fixed")
    assert tables.source_cells(made, "greedy") == []
    row.method = "FirstOf(Copy(), Model(drafter, length=3))"
    for figures in (row.overall, *row.tasks.values()):
        figures.drafted_by = {"copy": 20, "drafter": 30}
        figures.accepted_by = {"copy": 15, "drafter": 10}
        figures.rounds_by = {"copy": 4, "drafter": 10, "": 1}
        figures.tokens_by = {"copy": 18, "drafter": 20, "": 1}
    cells = tables.source_cells(made, "greedy")
    assert [line[1] for line in cells] == list(row.tasks)
    assert cells[0][3] == "copy 4.50, drafter 2.00, nobody 1.00"
    assert cells[0][4] == "copy 75%, drafter 33%"
    report.write(made, {}, RunFolder(tmp_path))
    for page in ("report.md", "report.html"):
        assert "Who wrote the tokens" in (tmp_path / page).read_text()
