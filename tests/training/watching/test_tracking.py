# SPDX-License-Identifier: Apache-2.0
"""What TensorBoard and a tracker of one's own get to see; what is missing is named before anything starts."""

from __future__ import annotations

import time

import pytest
from accelerate import tracking as trackers_of_accelerate
from accelerate.tracking import GeneralTracker
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from peft_metalora.errors import ConfigError
from peft_metalora.training.engine.processes import Processes
from peft_metalora.training.meta_train import meta_train
from peft_metalora.training.personalize import personalize
from peft_metalora.training.watching import tracking
from pipelines_tiny import save_tiny_flux
from training_tiny import meta_config, personal_config, write_people


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tracking")
    save_tiny_flux(folder / "base")
    write_people(folder / "people")
    return folder


def stage_1(place, output, **changes):
    return meta_config(
        pretrained_model_name_or_path=str(place / "base"),
        train_data_dir=str(place / "people"),
        output_dir=str(output),
        lr_scheduler="linear",
        **changes,
    )


def events(folder):
    found = EventAccumulator(str(folder))
    found.Reload()
    return found


def test_tensorboard_gets_losses_rates_scores_and_images_of_stage_1(place, tmp_path):
    settings = {"report_to": "tensorboard", "max_train_steps": 6, "checkpointing_steps": 3}
    settings |= {"validation_steps": 2, "validation_subjects": 1, "validation_train_steps": 1}
    settings |= {"validation_prompt": ["a photo"]}
    result = meta_train(stage_1(place, tmp_path / "down", **settings), progress=False)
    seen = events(tmp_path / "down" / "logs" / "metalora")
    losses = seen.Scalars("loss")
    assert [one.step for one in losses] == [1, 2, 3, 4, 5, 6]
    assert [one.value for one in losses] == pytest.approx(result.losses, rel=1e-6)
    assert [one.value for one in seen.Scalars("lr")] == pytest.approx([0.01 * k / 6 for k in (6, 5, 4, 3, 2, 1)])
    assert [one.step for one in seen.Scalars("validation_score")] == [2, 4, 6]
    images = seen.Images("validation")
    assert [one.step for one in images] == [2, 4, 6]
    assert (images[0].width, images[0].height) == (32, 16)
    # A resumed run goes on with the same curve: what was reported after the checkpoint is dropped.
    folder = str(tmp_path / "down" / "checkpoint-3")
    time.sleep(1)  # TensorBoard reads files in order of their names: of one second and process the 10th before the 8th
    meta_train(stage_1(place, tmp_path / "down", **settings, resume_from_checkpoint=folder), progress=False)
    again = events(tmp_path / "down" / "logs" / "metalora").Scalars("loss")
    assert [(one.step, one.value) for one in again] == [(one.step, one.value) for one in losses]


class Notebook(GeneralTracker):
    """A tracker of one's own."""

    name = "notebook"
    requires_logging_directory = False
    pages: list[tuple[str, object]] = []  # noqa: RUF012

    def __init__(self, project):
        super().__init__()
        self.pages.append(("project", project))

    @property
    def tracker(self):
        return self.pages

    def start(self):
        self.pages.append(("start", None))

    def store_init_configuration(self, values):
        self.pages.append(("settings", values))

    def log(self, values, step):
        self.pages.append(("log", (step, sorted(values))))

    def log_images(self, values, step):
        self.pages.append(("images", (step, [image.size for image in values["validation"]])))

    def finish(self):
        self.pages.append(("finish", None))


def test_a_tracker_of_ones_own_sees_stage_2(place, tmp_path, monkeypatch):
    monkeypatch.setitem(trackers_of_accelerate.LOGGER_TYPE_TO_CLASS, "notebook", Notebook)
    Notebook.pages.clear()
    config = personal_config(
        pretrained_model_name_or_path=str(place / "base"),
        instance_data_dir=str(place / "people" / "person-0" / "0.png"),
        method="lora",
        output_dir=str(tmp_path / "ann"),
        max_train_steps=2,
        validation_steps=2,
        validation_prompt=["a photo", "a red shirt"],
        report_to="notebook",
        tracker_project_name="ann",
    )
    personalize(config, progress=False)
    kinds = [kind for kind, _ in Notebook.pages]
    assert kinds == ["project", "start", "settings", "log", "log", "log", "images", "finish"]
    said = dict(Notebook.pages)
    assert said["project"] == "ann" and said["settings"]["learning_rate"] == 0.01
    assert [page for kind, page in Notebook.pages if kind == "log"] == [
        (1, ["loss", "lr"]),
        (2, ["loss", "lr"]),
        (2, ["validation_score"]),
    ]
    assert said["images"] == (2, [(16, 16), (16, 16)])


@pytest.mark.parametrize("asked", ["notebook,notebook", "all, notebook", "notebook,all"])
def test_a_tracker_that_is_named_twice_reports_once(tmp_path, monkeypatch, asked):
    """Bug: every step was reported twice; and beside another one "all" was refused as none of "all, ..."."""
    monkeypatch.setitem(trackers_of_accelerate.LOGGER_TYPE_TO_CLASS, "notebook", Notebook)
    monkeypatch.setattr(tracking, "get_available_trackers", lambda: ["notebook"])
    Notebook.pages.clear()
    trackers = tracking.Trackers(meta_config(report_to=asked, output_dir=str(tmp_path)), Processes())
    trackers.start()
    trackers.log(1, {"loss": 1.0})
    trackers.finish()
    assert [kind for kind, _ in Notebook.pages] == ["project", "start", "settings", "log", "finish"]


def test_only_the_main_process_reports(tmp_path):
    config = meta_config(report_to="tensorboard", output_dir=str(tmp_path))
    other = tracking.Trackers(config, Processes(1, 2))
    other.start()
    other.log(1, {"loss": 1.0})
    other.finish()
    assert not list(tmp_path.iterdir())


def test_what_is_missing_is_named_before_anything_starts(place, tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match=r"report_to must be of all, .*tensorboard.*found 'tensorbored'"):
        meta_train(stage_1(place, tmp_path / "down", report_to="tensorbored"), progress=False)
    monkeypatch.setattr(tracking, "get_available_trackers", list)
    for name, package in (("tensorboard", "tensorboard"), ("comet_ml", "comet-ml")):
        with pytest.raises(ConfigError, match=f"pip install {package}"):
            meta_train(stage_1(place, tmp_path / "down", report_to=name), progress=False)
    assert not (tmp_path / "down").exists()
