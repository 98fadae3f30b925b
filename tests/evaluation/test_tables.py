# SPDX-License-Identifier: Apache-2.0
"""The committed docs show the committed figures, and tables say honestly what misses its goal."""

from __future__ import annotations

import functools
import importlib.util
import operator
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def tables() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "benchmarks")
        spec = importlib.util.spec_from_file_location("tables", ROOT / "benchmarks" / "tables.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        yield module


def test_committed_pages_are_what_the_command_writes(tables: ModuleType) -> None:
    stale = [path.name for path, text in tables.pages().items() if path.read_text(encoding="utf-8") != text]
    assert not stale, "run: python benchmarks/tables.py"


def test_every_table_is_on_a_page(tables: ModuleType) -> None:
    shown = {name for text in tables.pages().values() for name in tables.BLOCK.findall(text)}
    assert shown == set(tables.TABLES)


# Page, file of results, and what the page says with the figures of that file: `{keys:format}`, or `{keys}` for a value
# with its interval.
PROSE = (
    ("README.md", "convergence", "by {figures.encoder_minus_best_rival} in pairs"),
    ("README.md", "convergence", "real photos reach {figures.real_ceiling:.2f} among themselves"),
    ("docs/concepts.md", "convergence", "among themselves: {figures.real_ceiling:.2f} on the drawn faces"),
    ("docs/results.md", "convergence", "off the photo has {figures.zero_step_r_facesim:.2f}. The best"),
    ("docs/results.md", "convergence", "fine-tuned method has {figures.best_rival_r_facesim:.2f}, after"),
    ("docs/results.md", "convergence", "Read people show {figures.zero_step_adherence:.2f} of the prompt"),
    ("docs/results.md", "convergence", "That method shows {figures.best_rival_adherence:.2f}:"),
    ("docs/results.md", "convergence", "at rank 1 {figures.small_params_over_lora_r1:.2f} times the numbers"),
    ("docs/results.md", "convergence", "gives reading {figures.zero_step_second_judge:.2f}, and T-LoRA"),
    ("docs/results.md", "convergence", "T-LoRA {rivals.t_lora.curve.700.second_r_facesim:.2f} after 700"),
    ("docs/results.md", "convergence", "rank 16, {rivals.t_lora.curve.700.r_facesim:.3f}, and"),
    ("docs/results.md", "convergence", "the prompt: {rivals.t_lora.curve.700.prompt_adherence:.2f} beside"),
    ("docs/results.md", "convergence", "beside {rivals.lora_r16.curve.700.prompt_adherence:.2f}. A LoRA"),
    ("docs/results.md", "convergence", "copy-paste is {rivals.t_lora.curve.700.copy_paste:.2f}. It is slower"),
    ("docs/results.md", "convergence", "slower: {rivals.t_lora, decay over 100.curve.100.r_facesim:.2f} after 100"),
    ("docs/results.md", "convergence", "mean has {rivals.meta_lora_mean.curve.700.r_facesim:.2f} after 700"),
    (
        "docs/results.md",
        "convergence",
        "keeps {rivals.meta_lora_mean.curve.700.prompt_adherence:.2f} of the prompt, and",
    ),
    ("docs/results.md", "convergence", "and {rivals.meta_lora_mean.curve.700.factor_distance:.3f} beside"),
    ("docs/results.md", "convergence", "beside {rivals.t_lora.curve.700.factor_distance:.3f}. It keeps"),
    ("docs/results.md", "convergence", "by time, has {rivals.meta_lora_time.curve.700.r_facesim:.2f} at an"),
    ("docs/results.md", "convergence", "of {rivals.meta_lora_time.curve.700.prompt_adherence:.2f} after 700"),
    ("docs/results.md", "convergence", "reaches {rivals.mean_lora.curve.300.second_r_facesim:.2f} after 300"),
    ("docs/results.md", "convergence", "and {rivals.mean_lora.curve.700.second_r_facesim:.2f} after 700, T-LoRA"),
    ("docs/results.md", "convergence", "700, T-LoRA {rivals.t_lora.curve.300.second_r_facesim:.2f} and"),
    ("docs/results.md", "convergence", "that mask {rivals.meta_lora_time.curve.300.second_r_facesim:.2f} and"),
    ("docs/results.md", "convergence", "and {rivals.meta_lora_time.curve.700.second_r_facesim:.2f}, DoRA"),
    ("docs/results.md", "convergence", "Real photos have {figures.second_judge_ceiling:.2f} by it"),
    ("docs/results.md", "convergence", "25 steps add {figures.gain_25_steps:.3f},"),
    ("docs/results.md", "typefaces", "have {figures.zero_step_r_facesim:.2f}, where photos of a font"),
    ("docs/results.md", "typefaces", "photos of a font have {figures.real_ceiling:.2f}."),
    ("docs/results.md", "typefaces", "best fine-tuned method has {figures.best_rival_r_facesim:.2f}, and shows"),
    ("docs/results.md", "typefaces", "and shows {figures.best_rival_adherence:.2f} of the prompt."),
    ("docs/results.md", "typefaces", "here, too**, by {figures.encoder_minus_best_rival} in pairs"),
    ("docs/results.md", "typefaces", "prompt and {rivals.full.curve.500.content_right:.2f} of the letters"),
    ("docs/results.md", "typefaces", "25 steps ({rivals.meta_lora_mean.curve.25.prompt_adherence:.2f}), has"),
    ("docs/results.md", "typefaces", "has {rivals.meta_lora_mean.curve.25.r_facesim:.2f}. - **The prompt"),
    ("docs/results.md", "typefaces", "kept**: {figures.zero_step_adherence:.2f} of it, and"),
    ("docs/results.md", "typefaces", "and {figures.zero_step_content_right:.2f} of the letters are right"),
    ("docs/results.md", "typefaces", "reach {figures.zero_step_over_real_ceiling:.2f} of what photos"),
    ("docs/results.md", "convergence", "read faces {figures.zero_step_over_real_ceiling:.2f}. Blurred"),
    ("docs/results.md", "typefaces", "hardly read ({figures.blur_seen:.2f})"),
    ("docs/results.md", "typefaces", "there is {figures.nearest_training_person}, where"),
    ("docs/results.md", "typefaces", "reading has {recipes.main-0.zero_steps.clean.r_facesim} in that noise"),
    ("docs/results.md", "typefaces", "nobody trained has {figures.random_down_encoder_zero_step:.3f}, a"),
    ("docs/results.md", "typefaces", "in its place {figures.encoder_lora_zero_step:.3f}, an"),
    ("docs/results.md", "typefaces", "adapter {figures.image_prompt_adapter_zero_step:.3f}: the"),
    ("docs/results.md", "typefaces", "hurts**: {figures.gain_25_steps:.3f} over 25 steps"),
    ("docs/results.md", "typefaces", "copy-paste is {recipes.main-0.clean.copy_paste}, so"),
    ("docs/results.md", "typefaces", "not repeated ({figures.zero_step_copied_content:.3f})"),
    ("docs/results.md", "typefaces", "reaches {figures.fitted_code:.3f}, of {figures.real_ceiling:.3f}."),
    (
        "docs/results.md",
        "typefaces",
        "{recipes.main-0.curve.9000.r_facesim:.2f} and {recipes.main-0.zero_steps.clean.r_facesim:.2f}",
    ),
    ("docs/results.md", "typefaces", "with {recipes.main-0.zero_steps.photos 2.r_facesim:.3f} and"),
    ("docs/results.md", "typefaces", "and {recipes.main-0.zero_steps.photos 3.r_facesim:.3f}, one"),
    ("docs/results.md", "typefaces", "one with {recipes.main-0.zero_steps.photos 1.r_facesim:.3f}, on"),
    ("docs/limits.md", "typefaces", "read fonts reach {figures.zero_step_r_facesim:.2f} where photos"),
    ("docs/limits.md", "typefaces", "read with {figures.zero_step_over_real_ceiling:.2f} of their ceiling"),
    ("docs/results.md", "image_gen", "takes {figures.subject_over_lora_r32_step_ms:.2f} of the time of LoRA"),
    ("docs/results.md", "image_gen", "ours takes {figures.subject_over_best_lora_r32_step_ms:.2f} of it and"),
    ("docs/results.md", "image_gen", "of it and {figures.subject_over_best_lora_r32_peak_gib:.2f} of its memory"),
    ("docs/tuner.md", "layer", "called: {figures.default_over_base_compiled_b4:.3f}** where a folded one is"),
    ("docs/tuner.md", "layer", "where a folded one is {figures.folded_over_base_compiled_b4:.3f}."),
    ("docs/limits.md", "convergence", "gives {figures.zero_step_second_judge:.2f} where real photos"),
    ("docs/limits.md", "convergence", "T-LoRA, {rivals.t_lora.curve.700.second_r_facesim:.2f} after 700"),
    ("docs/limits.md", "convergence", "mean LoRA, {rivals.mean_lora.curve.700.second_r_facesim:.2f}."),
    ("docs/limits.md", "convergence", "gave {figures.by_people.128:.2f}, 256 gave {figures.by_people.256:.2f}, 512"),
    ("docs/make_a_down.md", "convergence", "read others at {figures.by_people.512:.2f}, 1,024 at"),
    ("docs/make_a_down.md", "training", "{details.scaling.whole.1.stage1_weak.per_second:.1f} a second; the encoder"),
    ("docs/make_a_down.md", "training", "{details.scaling.whole.1.encoder_weak.per_second:.2f} people a second"),
    ("docs/concepts.md", "layer_details", "{figures.four_subjects_folded_over_base_b4:.3f} x the base instead of"),
    ("docs/concepts.md", "layer_details", "instead of {figures.four_subjects_unfolded_over_base_b4:.3f})"),
    ("docs/tuner.md", "layer", "takes {figures.frozen_step_over_graphed_lora_r1_b1:.3f} of LoRA's step"),
    ("docs/tuner.md", "layer_details", "one two ({figures.unfolded_over_base_b1:.2f} x the base in that run;"),
    ("docs/tuner.md", "layer_details", "| batch 1, one H200: ours | {figures.subject_fp32_eager_step_b1:.0f} |"),
    ("docs/tuner.md", "layer_details", "| **{figures.subject_fp32_graph_step_b1:.1f}** | |"),
    ("docs/tuner.md", "layer_details", "| **{figures.lora_r1_bf16_graph_step_b1:.1f}** | |"),
    ("docs/tuner.md", "layer_details", "| {figures.subject_fp32_eager_step_b4:.0f} | **"),
    ("docs/tuner.md", "layer_details", "| **{figures.subject_fp32_graph_step_b4:.1f}** |"),
    ("docs/tuner.md", "layer_details", "| {figures.lora_r1_bf16_eager_step_b4:.0f} | **"),
    ("docs/tuner.md", "layer_details", "| **{figures.lora_r1_bf16_graph_step_b4:.1f}** |"),
    ("docs/training_speed.md", "layer", "costs), at {figures.train_step_over_best_lora_r1_b4:.3f}"),
    ("docs/training_speed.md", "training", "| {details.step_ms.diffusers_lora_r1_b1:.0f} |"),
    ("docs/training_speed.md", "training", "| {details.step_ms.diffusers_lora_r1:.0f} |"),
    ("docs/training_speed.md", "training", "| {details.step_ms.lora_r1_bf16_graph_b1:.0f} |"),
    ("docs/training_speed.md", "training", "| {details.step_ms.lora_r1_bf16_graph:.0f} |"),
    ("docs/training_speed.md", "training", "| **{details.step_ms.meta_lora_serial:.0f}** |"),
    ("docs/training_speed.md", "training", "| **{details.step_ms.meta_lora:.0f}** |"),
    ("docs/training_speed.md", "training", "keep {figures.stage1_weak_scaling_4gpu:.3f} of the ideal speed"),
    (
        "docs/training_speed.md",
        "training",
        "takes {details.scaling.fsdp2.4.stage1_weak.peak_gib:.0f} GiB a GPU",
    ),
    ("docs/training_speed.md", "training", "({details.scaling.fsdp2.4.encoder_weak.peak_gib:.0f} GiB instead of"),
    (
        "docs/training_speed.md",
        "training",
        "instead of {details.scaling.whole.4.encoder_weak.peak_gib:.0f}), 1.06",
    ),
    ("docs/training_speed.md", "training", "divided ({details.scaling.fsdp2.4.encoder_strong.peak_gib:.0f} instead of"),
    ("docs/training_speed.md", "layer_details", "from {figures.subject_fp32_eager_step_b1:.0f} to"),
    ("docs/training_speed.md", "layer_details", "to {figures.subject_fp32_graph_step_b1:.0f} ms"),
    ("docs/results.md", "joint", "on fonts: {figures.typefaces.both-on-both.r_facesim_minus_own}. -"),
    ("docs/results.md", "joint", "behind by {figures.faces.tuned-faces-on-both.r_facesim_minus_own} in likeness"),
    (
        "docs/results.md",
        "joint",
        "of the prompt, {figures.typefaces.tuned-typefaces-on-both.prompt_adherence_minus_own}: `tune`",
    ),
    ("docs/results.md", "convergence", "does: {rivals.dora.curve.700.r_facesim:.2f} after 700 steps, at an"),
    ("docs/results.md", "convergence", "at an adherence of {rivals.dora.curve.700.prompt_adherence:.2f}, and it"),
    ("docs/training_speed.md", "training_profile", "step of {details.scaling.whole.4.stage1_weak.step_ms:.0f} are not"),
    (
        "docs/training_speed.md",
        "training_profile",
        "of {details.scaling.whole.4.stage1_strong.step_ms:.0f} in stage 1, and 55",
    ),
    ("docs/training_speed.md", "training_profile", "come for {details.scaling.fsdp2.4.stage1_weak.nccl_ms:.0f} ms of"),
    (
        "docs/training_speed.md",
        "training_profile",
        "takes {details.scaling.whole.4.stage1_weak.exchange_ms:.1f} of them",
    ),
    ("docs/results.md", "convergence", "700 steps, {rivals.oft.curve.700.r_facesim:.2f}, at an"),
    ("docs/results.md", "convergence", "an adherence of {rivals.oft.curve.700.prompt_adherence:.2f}: more"),
    (
        "docs/results.md",
        "convergence",
        "it shows {rivals.oft, decay over 100.curve.100.prompt_adherence:.2f} of the prompt",
    ),
    (
        "docs/results.md",
        "convergence",
        "no rate: {rivals.textual_inversion.curve.700.r_facesim:.2f}, as",
    ),
    (
        "docs/results.md",
        "convergence",
        "DoRA {rivals.dora.curve.300.second_r_facesim:.2f} and {rivals.dora.curve.700.second_r_facesim:.2f}",
    ),
    (
        "docs/results.md",
        "convergence",
        "OFT {rivals.oft.curve.300.second_r_facesim:.2f} and {rivals.oft.curve.700.second_r_facesim:.2f}",
    ),
    ("CHANGELOG.md", "memory", "2 takes {cells.krea2 personalize 512 nf4 group batch 1.gib:.1f} GiB instead of 8.6"),
    ("CHANGELOG.md", "memory", "Qwen-Image {cells.qwen_image personalize 512 nf4 group batch 1.gib:.1f} instead of"),
    ("docs/person_on_8_gb.md", "memory", "learning took {details.flux_personalize_512_gib.gib:.1f} GiB and drawing"),
    ("CHANGELOG.md", "memory", "at 512 px takes {details.flux_personalize_512_gib.gib:.1f} GiB instead of"),
    ("CHANGELOG.md", "memory", "batch of four now, {details.flux_personalize_512_gib.seconds_a_step:.1f} s a step"),
    ("docs/person_on_8_gb.md", "memory", "drawing {details.flux_generate_1024_gib.gib:.1f} GiB"),
    ("docs/person_on_8_gb.md", "memory", "alone, {details.flux_read_gib.gib:.1f} GiB as measured"),
    ("docs/serving.md", "service", "from {figures.capacity_images_per_s:.1f} to"),
    ("docs/from_a_lora.md", "from_loras", "trained one by {figures.differences.common - trained.100} in"),
    (
        "docs/from_a_lora.md",
        "from_loras",
        "same mean by {figures.differences.common - random, mean of LoRAs.100}. They",
    ),
    ("docs/from_a_lora.md", "from_loras", "trained Down by {figures.differences.many - trained.100}. -"),
    ("docs/from_a_lora.md", "from_loras", "of 64 by {figures.differences.common, 8 rows - trained.100} and"),
    ("docs/from_a_lora.md", "from_loras", "gains {figures.differences.random, mean of LoRAs - random.100:.3f} from"),
    ("docs/from_a_lora.md", "from_loras", "by {figures.differences.activations, mean of LoRAs - trained.100}. -"),
    (
        "docs/from_a_lora.md",
        "from_loras",
        "is behind by {figures.differences.common - LoRA, mean of LoRAs.100:.3f} only",
    ),
    ("docs/from_a_lora.md", "from_loras", "beyond {figures.scores.space, common.100.r_facesim:.2f}, and"),
    ("docs/from_a_lora.md", "from_loras", "reads {figures.scores.space, common, read.0.r_facesim:.2f}. The"),
    ("docs/from_a_lora.md", "from_loras", "holds {collection.kept.common, products, 64 rows.common:.2f} of what"),
    ("docs/from_a_lora.md", "from_loras", "and {collection.kept.many, products, 64 rows.many:.2f} where"),
    ("CHANGELOG.md", "layer_details", "{figures.subject_fp32_graph_step_b1:.0f} ms instead of"),
    ("CHANGELOG.md", "layer_details", "instead of {figures.subject_fp32_eager_step_b1:.0f},"),
)


@pytest.mark.parametrize(("page", "file", "sentence"), PROSE)
def test_figures_in_sentences_are_those_of_their_file(tables: ModuleType, page: str, file: str, sentence: str) -> None:
    """Bug: layers were measured anew, and a sentence kept the figures of the run before."""
    data = tables.load()[file]

    def shown(found: re.Match[str]) -> str:
        value = functools.reduce(operator.getitem, found[1].split("."), data)
        if not found[2]:
            return tables.spread(value)
        return format(value["value"] if isinstance(value, dict) else value, found[2])

    wanted = re.sub(r"\{([^:}]+):?([^}]*)\}", shown, sentence)
    assert wanted in " ".join((ROOT / page).read_text(encoding="utf-8").split())


def test_a_code_in_memory_takes_no_less_than_its_numbers(tables: ModuleType) -> None:
    """Bug: 301 bytes were published for codes of 512, as new ones lay in memory that had been freed before."""
    results = tables.load()
    found = [results[name]["figures"]["host_bytes_per_code"] for name in ("reading", "serving")]
    assert min(found) > results["reading"]["figures"]["code_bytes"]


def test_goals_that_are_missed_or_open_say_so(tables: ModuleType) -> None:
    figures = {"merged_over_base": 1.043, "swap_ms_1": 0.4, "subject_mb": 1.7024}
    data = {"machine": "a GPU", "date": "2026-01-01", "command": "python b.py --out /x/y --n 1", "figures": figures}
    rows = tables.goals(data, tables.SERVING).splitlines()
    assert "| forward with a merged subject / base | 1.043 | at most 1 | **no** |" in rows
    assert "| a subject from host memory into its slot, 1 loaded, ms | 0.4 | at most 1 | yes |" in rows
    assert "| one subject in memory, MB | 1.702 |  |  |" in rows
    assert "| recompilations while subjects change | not measured | at most 0 | open |" in rows
    noted = tables.source({**data, "notes": ["divided_* and b_*: on two."]})
    assert noted.endswith("`python b.py --n 1`. `divided_*` and `b_*`: on two.\n"), "not emphasis"
    assert rows[-1].startswith("a GPU, ") and rows[-1].endswith("2026-01-01; `python b.py --n 1`")


def test_identity_at_equal_adherence_lies_on_the_curve(tables: ModuleType) -> None:
    curve = {
        "25": {"prompt_adherence": [1.0, 0.96], "r_facesim": [0.2, 0.2]},
        "50": {"prompt_adherence": [0.86, 0.9], "r_facesim": [0.3, 0.5]},
    }
    assert tables.at_adherence({"curve": curve}, 0.93) == "0.300"
    assert tables.at_adherence({"curve": curve}, 0.5) == "-"


LIKENESS = "rivals", "steps", "robustness", "variants", "down_starts", "readme"
LIKENESS += (
    "zero_steps",
    "zero_rivals",
    "zero_bad",
    "zero_curves",
    "encoder_hours",
)  # every table with R-FaceSim of the first judge


def test_what_real_photos_reach_is_in_every_table_and_plot_of_likeness(tables: ModuleType) -> None:
    """Bug: one table of ten and three plots of nine had it."""
    results = tables.load()
    for name in LIKENESS:
        last = tables.TABLES[name][1](results).split("\n\n")[-2].splitlines()[-1]
        assert last.startswith("| *real photos among themselves* | ") and "0.83" in last, name
    for name, drawing in tables.plots(results, tables.ZERO_STEPS, tables.FINE_TUNED).items():
        if ">R-FaceSim</text>" in drawing:
            assert ">real photos" in drawing, name


def test_the_readme_shows_the_mean_of_trainings_that_its_differences_are_of(tables: ModuleType) -> None:
    """Bug: it showed the first training, and beside it a difference from the mean of three."""
    results = tables.load()
    row = tables.readme(results).splitlines()[2]
    assert f"| {tables.spread(results['convergence']['figures']['zero_step_r_facesim'])} |" in row


def test_a_rival_shows_the_better_schedule_and_copies_where_they_were_measured(tables: ModuleType) -> None:
    keys = "r_facesim", "prompt_adherence", "copied_background", "factor_distance"

    def at(score: float, **more: float) -> dict[str, dict[str, float]]:
        scores = dict.fromkeys(keys, score) | more
        return {name: {"value": value, "low": value, "high": value} for name, value in scores.items()}

    data = {
        "figures": {"real_ceiling": at(0.9)["r_facesim"]},
        "origins": {"a": {"machine": "a GPU", "date": "2026-01-01", "command": "python c.py"}},
        "recipes": {"main-0": {"tuning": {tables.RATE_OF_READ: {"0": at(0.8)} | {"25": at(0.8), "100": at(0.8)}}}},
        "rivals": {
            "lora_r1": {"learning_rate": 0.003, "curve": {"100": at(0.4, copy_paste=0.25), "300": at(0.6)}},
            "lora_r1, decay over 100": {"learning_rate": 0.03, "curve": {"100": at(0.5)}},
        },
    }
    rows = tables.zero_rivals({"convergence": data}).splitlines()
    assert rows[0].endswith("| distance of factors | copy-paste | rate |")
    assert "| LoRA, rank 1 | 100 | 0.500 [0.500, 0.500] |" in rows[2] and rows[2].endswith("|  | 0.03, decay |")
    assert rows[3].startswith("| LoRA, rank 1 | 300 | 0.600") and rows[3].endswith("|  | 0.003, constant |")
    data["rivals"]["lora_r1"]["curve"]["300"] |= {"copy_paste": at(0.25)["r_facesim"]}
    assert "| 0.250 [0.250, 0.250] | 0.003, constant |" in tables.zero_rivals({"convergence": data})


def test_a_block_of_an_unknown_name_is_refused_and_one_without_results_is_open(tables: ModuleType) -> None:
    with pytest.raises(SystemExit, match="table 'nonsense': expected one of story"):
        tables.fill("<!-- table: nonsense -->\n<!-- end -->", tables.load())
    text = tables.fill("<!-- table: layer -->\nold<!-- end -->", {})
    assert "Open: there is no `benchmarks/results/layer.json` yet." in text and "old" not in text


def test_the_part_of_image_gen_that_needs_weights_is_open(tables: ModuleType) -> None:
    figures = {"lora_r32_step_ms": 812.4, "lora_r32_parameters": 38338560, "lora_r32_file_mb": 153.41}
    data = {"machine": "1 x a GPU", "date": "2026-01-01", "command": "python b.py", "figures": figures}
    rows = tables.image_gen({"image_gen": {**data, "open": {"test dino_similarity": None, "drift": None}}}).splitlines()
    assert rows[0].endswith("| file, MB | test dino_similarity | drift |")
    assert (
        "| LoRA, rank 32, as PEFT's benchmark has it | 812 | not measured | 38,338,560 | 153.41 | open | open |" in rows
    )


def test_the_figure_takes_a_second_domain_and_gives_rivals_their_best_schedule(tables: ModuleType) -> None:
    """Bug: a rival with a decayed rate was nearer after 100 steps than its line said."""

    def at(score: float, kept: float = 1.0) -> dict[str, dict[str, float]]:
        return {"r_facesim": {"value": score}, "prompt_adherence": {"value": kept}}

    results = tables.load()
    assert "typefaces" not in results or results.pop("typefaces")
    before = tables.plots(results, tables.ZERO_STEPS, tables.FINE_TUNED)
    results["typefaces"] = {
        "figures": {"real_ceiling": {"value": 0.9}},
        "recipes": {"main-0": {"clean": at(0.8)}},
        "rivals": {
            "lora_r1": {"curve": {"25": at(0.1), "100": at(0.3), "200": at(0.4)}},
            "lora_r1, decay over 100": {"curve": {"100": at(0.5, 0.6)}},
        },
    }
    drawn = tables.plots(results, tables.ZERO_STEPS, tables.FINE_TUNED)
    found = drawn["story_steps_typefaces.svg"]
    assert "story_seconds_typefaces.svg" not in drawn, "nobody has measured them"
    assert found.count("<title>encoder + Meta-LoRA, rank 4</title>") == 2, "a line of one point"
    assert found.count("<title>LoRA, rank 1</title>") == 3, "25 steps and the decayed 100; 200 are behind that"
    assert found.count('r="4" fill="none"') == 1, "the prompt is lost"
    assert drawn["story_steps_faces.svg"] == before["story_steps_faces.svg"]
    assert "![typefaces: identity against steps](results/story_steps_typefaces.svg)" in tables.story(results)


def test_a_down_of_loras_stands_beside_the_random_one_of_its_size(tables: ModuleType) -> None:
    """Bug: the difference was that to another size, or unpaired."""

    def at(value: float) -> dict[str, float]:
        return {"value": value, "low": value, "high": value}

    scores = {"25": {"r_facesim": at(0.4), "prompt_adherence": at(0.9)}}
    data = {
        "machine": "a GPU", "date": "2026-01-01", "command": "python f.py", "real_photos": [0.8, 0.8],
        "meta_people": 9, "people": 2, "split": "tune", "seeds": 1, "prompts": 8,
        "families": {name: {"arm": "products, mean", "rate": 0.003} for name in ("common", "common, 8 rows")},
        "figures": {
            "scores": {"common": scores, "common, 8 rows": scores},
            "differences": {"common - trained": {"25": at(0.1)}, "common, 8 rows - trained": {"25": at(0.2)}},
        },
    }  # fmt: skip
    rows = tables.from_loras({"from_loras": data}).splitlines()
    whole, small = (
        next(row for row in rows if row.startswith(start)) for start in ("| **Down from", "| **Down of 8 rows from")
    )
    assert "|  | 0.100 [0.100, 0.100] | products, mean, 0.003 |" in whole
    assert "|  | 0.200 [0.200, 0.200] | products, mean, 0.003 |" in small
    assert any(row.startswith("| *real photos among themselves* | 0.800") for row in rows)


def test_goals_of_the_second_domain_that_are_missed_say_so(tables: ModuleType) -> None:
    """Bug: the second domain had a table of methods, and no word of the goals that it missed."""
    rows = tables.typefaces(tables.load()).splitlines()
    (tuning,), (adherence,) = ([row for row in rows if row.startswith(f"| {one} |")] for one in GOALS_OF_FONTS)
    assert tuning.endswith("| at least 0 | **no** |") and adherence.endswith("| at least 0.95 | yes |")
    assert "| rank 1 | not measured |  |  |" in rows, "what was not run is not left out"
    assert "32 held-out fonts" in rows[-1] and "people" not in rows[-1]


GOALS_OF_FONTS = "gain of 25 steps of tuning", "adherence"
