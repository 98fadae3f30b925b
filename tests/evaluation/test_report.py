# SPDX-License-Identifier: Apache-2.0
"""The page on cells made up here: what stands first, what is shown of whom, how large it gets."""

from __future__ import annotations

import base64
import io
import json
import re
from pathlib import Path

import pytest
from PIL import Image

from peft_metalora.evaluation.plots import panels, plot
from peft_metalora.evaluation.report import write_report

SIZE = (1000, 600)
CEILING = {"ann": 0.8, "bob": 0.9}


def cell(output: Path, method: str, subject: str, scores: dict[int, float], failure: str | None = None) -> dict:
    """Two prompts, after each number of steps with the same R-FaceSim; without any, images that were never made."""
    Image.new("RGB", SIZE, "orange").save(output / f"{subject}.png")
    rows = [
        {"steps": steps, "prompt": prompt, "number": number, "seed": 0, "file": f"{subject}.png", "found": True,
         "r_facesim": score, "face_sim": score, "clip_t": 0.3 - score / 10}
        for steps, score in scores.items() for number, prompt in enumerate(("a <b>", "at sea"))
    ]  # fmt: skip
    if failure:
        rows = [{**row, "file": None, "found": False, "r_facesim": 0.0, "face_sim": 0.0} for row in rows]
    points = [{"steps": steps, "seconds": 2.0 * steps} for steps in scores] if not failure else []
    return {
        "method": method,
        "subject": subject,
        "reference": str(output / f"{subject}.png"),
        "tags": {},
        "real_ceiling": CEILING[subject],
        "rows": rows,
        "points": points,
        "failure": failure,
    }


@pytest.fixture
def page(tmp_path: Path) -> str:
    cells = [cell(tmp_path, "lora", who, {5: 0.2, 10: score}) for who, score in (("ann", 0.4), ("bob", 0.6))]
    cells += [
        cell(tmp_path, "full", "ann", {5: 0.1, 10: 0.1}, "found nan"),
        cell(tmp_path, "full", "bob", {5: 0, 10: 1}),
    ]
    write_report(tmp_path, cells, gallery=1, thresholds={"r_facesim": 0.5})
    return (tmp_path / "report.html").read_text()


def test_failures_stand_first_with_their_reason(page: str) -> None:
    assert page.index("full, ann: found nan") < page.index("<h2>Figures</h2>")
    assert "4 of 16 images are missing, 0 show no face." in page


def test_pictures_are_thumbnails(page: str) -> None:
    pictures = re.findall(r'src="data:image/jpeg;base64,([^"]+)"', page)
    assert {Image.open(io.BytesIO(base64.b64decode(data))).size for data in pictures} == {(160, 96)}
    assert "<script" not in page and "://" not in page


def test_the_gallery_has_a_row_a_person_and_a_column_a_method_for_each_prompt(page: str) -> None:
    galleries = re.findall(r'<h3>([^<]*)</h3><div class="scroll"><table class="gallery">(.*?)</table>', page)
    assert [prompt for prompt, _ in galleries] == ["a &lt;b&gt;", "at sea"]
    for _, table in galleries:
        assert "<th>lora</th><th>full</th>" in table
        assert "<td>ann</td>" in table and "<td>bob</td>" not in table  # gallery=1
        assert "0.400</td>" in table and "(missing)0.000</td>" in table


def test_results_and_tables_say_the_same(page: str, tmp_path: Path) -> None:
    lines = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert [line["covers"] for line in lines if line["method"] == "lora"] == [False] * 6 + [True] * 2
    table = (tmp_path / "report.md").read_text()
    assert "\n| --- | --- |" in table, "Bug: the rule was escaped as text, and no table was one"
    assert "Coverage: share of prompts with an image that reaches R-FaceSim 0.5." in table
    assert "| lora | 0.500 [0.400, 0.600] |" in table and "20.0 [20.0, 20.0]" in table
    assert "<td>0.500<small>[0.400, 0.600]</small></td>" in page


def test_what_real_photos_reach_is_in_every_table_and_plot_of_likeness(tmp_path: Path) -> None:
    """Bug: of all tables and plots of a report one had it, as a column."""
    cells = [cell(tmp_path, "lora", who, {5: 0.2, 10: 0.5}) for who in ("ann", "bob")]
    for one in cells:
        for row in one["rows"]:
            row["face_size"] = 0.2
        one["edited"] = [{**one["rows"][0], "edits": 1}]
    bad = [{**one, "condition": "blur", "strength": 1.0} for one in cells]
    write_report(tmp_path, cells, bad)
    table = (tmp_path / "report.md").read_text()
    assert "| real photos |" in table.splitlines()[6]
    ceiling = "| real photos among themselves | 0.850 [0.800, 0.900] |"
    assert table.count(ceiling) == 3  # by size, edited, bad references
    drawings = (tmp_path / "report.html").read_text().split("<svg")
    likeness = [one for one in drawings if ">R-FaceSim</text>" in one]
    assert len(likeness) == 4 and all(">real photos among themselves</text>" in one for one in likeness)


def test_failures_are_in_the_figures_as_what_they_are(tmp_path: Path) -> None:
    """Bugs: who failed first took the others' line out of the plots; where all failed there was no report at all; and
    who failed was no 0 among the edited."""
    cells = [
        cell(tmp_path, "full", "ann", {5: 0.1, 10: 0.1}, "found nan"),
        cell(tmp_path, "full", "bob", {5: 0, 10: 1}),
    ]
    cells[1]["edited"] = [{**cells[1]["rows"][0], "r_facesim": 0.8, "edits": 1}]
    write_report(tmp_path, cells)
    training = (tmp_path / "report.html").read_text().split("<h2>Against training</h2>")[1].split("<h2>")[0]
    assert training.count('<svg viewBox="0 0 460') == 4 and all(
        "<polyline" in one for one in training.split("<div>")[1:]
    )
    assert "| full | 0.500 [0.000, 1.000] | 0.400 [0.000, 0.800] |" in (tmp_path / "report.md").read_text()
    write_report(tmp_path, [cell(tmp_path, "full", "ann", {5: 0.1, 10: 0.1}, "found nan")])
    page = (tmp_path / "report.html").read_text()
    assert "full, ann: found nan" in page and "Against training" not in page


def test_more_lines_than_colours_are_told_apart() -> None:
    drawn = plot({str(number): [(0, number), (1, number)] for number in range(10)}, "x", "y")
    assert drawn.count("stroke-dasharray") == 2 and drawn.count('<rect x="') == 6
    assert drawn.count('fill="#1b76bc"') == drawn.count('fill="#d1495b"') == 6, "two points and the legend, twice"


def test_a_legend_names_what_is_drawn_in_the_colours_of_all() -> None:
    """Bug: the plot of fonts named T-LoRA, which nobody had run on them."""
    drawn = plot({"third": [(1.0, 0.2)]}, "steps", "R-FaceSim", names=["first", "second", "third"])
    assert ">third</text>" in drawn and ">first</text>" not in drawn
    assert drawn.count('<circle cx="4.0" cy="6.0" r="4" fill="#3a9447">') == 1, "its own colour, in the first line"


def test_a_plot_marks_levels_and_draws_some_points_as_rings() -> None:
    drawn = plot({"a": [(1, 0.1), (100, 0.2)]}, "s", "y", rules={"real <photos>": 0.9}, hollow={(100, 0.2)}, log_x=True)
    assert "real &lt;photos&gt;" in drawn and ">0.8</text>" in drawn, "the axis reaches to the level"
    assert drawn.count('fill="none" stroke="#1b76bc" stroke-width="2">') == 2, "a line and a ring"
    ticks = {float(text): float(x) for x, text in re.findall(r'<text x="([\d.]+)" y="230" [^>]+>(\d+)<', drawn)}
    assert list(ticks) == [1, 10, 100] and ticks[10] - ticks[1] == pytest.approx(ticks[100] - ticks[10], abs=0.2)


def test_panels_have_equal_axes_and_the_colours_of_all_names() -> None:
    drawn = panels({"blur": {"a": [(0, 0), (1, 1)]}, "noise": {"b": [(0, 0.5), (1, 2)]}}, "{}: strength", "score")
    blur, noise = drawn.split("<svg x=")[1:]
    ticks = [re.findall(r'text-anchor="end">([^<]+)<', panel) for panel in (blur, noise)]
    assert ticks[0] == ticks[1] and "blur: strength" in blur and "noise: strength" in noise
    assert "#1b76bc" in blur and "#d1495b" not in blur and "#d1495b" in noise
