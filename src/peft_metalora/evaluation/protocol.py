# SPDX-License-Identifier: Apache-2.0
"""People and prompts to a table: every method learns the same references and draws the same prompts and seeds.

After Meta-LoRA's own protocol (arXiv 2503.22352): one reference a person, R-FaceSim against the person's other photos.
A rerun recomputes only the cells (`cells`) that are missing or were made from something else. Images of other systems
enter as folders.
"""

from __future__ import annotations

from functools import partial
from itertools import product
from pathlib import Path

from .evaluation_settings import DEMO, EvaluateConfig, Method, named, safe


def evaluate(config: EvaluateConfig, *, progress: bool = True) -> Path:
    """Train, draw and score every method on every person, and write the report.

    Started by `accelerate launch`, the people are divided among the processes.

    Returns:
        The report, `output/report.html`; beside it `report.md`, `results.jsonl` (a line an image) and the images.

    Raises:
        DataError, ConfigError: the people or the settings cannot be used; MetaLoraError in general.
    """
    from ..bases.precision import plain_defaults

    with plain_defaults():
        return _evaluate(config, progress)


def _evaluate(config: EvaluateConfig, progress: bool) -> Path:
    from accelerate import PartialState
    from tqdm.auto import tqdm

    from ..bases.memory import CPU, OTHER_METHODS, require_supported
    from ..bases.precision import choose_device
    from ..data import read_subjects
    from .bench import Bench
    from .cells import home_of, read_cells
    from .conditions import conditions_of
    from .prompts import export_prompts, prompts_of
    from .report import write_report

    _check_places(config)
    methods = [Method.parse(text) for text in config.method]
    others = any(method.kind not in ("base", "meta-lora", "random-down", "lora") for method in methods)
    circumstances = {CPU: choose_device(config.device).type == "cpu", OTHER_METHODS: others}
    require_supported(config, "evaluate", *(name for name, holds in circumstances.items() if holds))
    subjects = read_subjects(config.data, min_photos=2)
    conditions = conditions_of(config.degrade, config.data, subjects)
    prompts = prompts_of(config)
    if config.export_prompts:
        export_prompts(config, prompts)
    if not (config.method or config.images):
        return Path(str(config.export_prompts))
    # The base learns no reference, so that it is the same for a bad one.
    learners = [method for method in methods if method.kind != "base"]
    # Without cpu=True accelerate starts no process group on a machine without GPUs, and every process does all.
    state = PartialState(cpu=choose_device(config.device).type == "cpu")
    mine = subjects[state.process_index :: state.num_processes]
    bench = Bench(config, prompts)
    jobs = [partial(bench.learn, method, subject) for method in methods for subject in mine]
    jobs += [partial(bench.take, *named(text), subject) for text in config.images for subject in mine]
    jobs += [partial(bench.learn, *job) for job in product(learners, mine, conditions)]
    for job in tqdm(jobs, desc="evaluating", unit="cell", disable=not progress):
        job()
    state.wait_for_everyone()
    output = Path(config.output)
    if state.is_main_process:
        names = [method.text for method in methods] + [named(text)[0] for text in config.images]
        cells = read_cells(output, names)
        bad = [cell for one in conditions for cell in read_cells(home_of(output, one), [it.text for it in learners])]
        # An earlier run may have left the cells of people who are no longer in the data.
        people = {subject.name for subject in subjects}
        cells, bad = ([cell for cell in some if cell["subject"] in people] for some in (cells, bad))
        write_report(output, cells, bad, gallery=config.gallery, thresholds=config.thresholds())
    return output / "report.html"


def _check_places(config: EvaluateConfig) -> None:
    """Check where is written: ConfigError over, or into, what is read, WriteFailedError where that cannot be."""
    from ..files import require_apart, require_writable

    methods = [Method.parse(text) for text in config.method]
    images = [named(text) for text in config.images]
    inputs = {
        "data": config.data,
        "base": None if config.base == DEMO else config.base,
        "down": config.down,
        "prompts": config.prompts,
        **{f"method {one.text}": one.options.get("down") for one in methods},
        **{f"images {name}": folder for name, folder in images},
    }
    for name in ("", *(one.folder for one in methods), *(safe(name) for name, _ in images)):
        require_apart(Path(config.output, name), **inputs)
    if config.export_prompts is not None:
        require_apart(config.export_prompts, **inputs)
    if methods or images:
        require_writable(config.output)
