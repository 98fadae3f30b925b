# SPDX-License-Identifier: Apache-2.0
"""What stands on the page, and which button does what of `page.py`."""

from __future__ import annotations

import base64
import html
import io
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import gradio as gr
import torch
from PIL import Image

from ..errors import ConfigError, MetaLoraError
from ..service.people import Person
from ..service.serve_settings import ServeConfig
from ..service.tenants import LOCAL
from .hardware import machine
from .page import CONSENT, TOOLS, Page, Visit
from .studio import Seen, Studio

log = logging.getLogger(__name__)

PROMPT = "a photo of a person"
BOXES = [[2, 4, 49, 96], [51, 4, 98, 96]]
"""Left, top, right and bottom of two people, in hundredths of the picture."""
_KEPT = 3600
"""Seconds for which a tab that is gone is remembered, and for which pictures lie in the page's temporary folder."""
_THUMB = 160
STYLE = """
.said { min-height: 1.5em; } .said .bad { color: var(--error-text-color, #b91c1c); font-weight: 600; }
.strip { display: flex; flex-wrap: wrap; gap: 8px; } .strip figure { margin: 0; }
.strip img { display: block; height: 128px !important; } .strip figcaption { font-size: 12px; opacity: .75; }
.crop { position: relative; display: inline-block; }
.crop i { position: absolute; border: 2px solid #f59e0b; box-sizing: border-box; }
.drawn .image-container { padding-top: 30px; } .drawn button:has(.image-frame), .drawn .image-frame { width: 100%; }
.drawn .image-frame img { width: 100% !important; height: auto !important; object-fit: contain !important; }
.curve { margin: 0; } .curve svg { width: 100%; max-width: 480px; }
.curve polyline { fill: none; stroke: #ea580c; stroke-width: 2; }
footer { display: none !important; }
"""
_FIELD = """<div class="field">${value.map((b, i) => `<div class="box b${i}" data-n="${i}"
 style="left:${b[0]}%;top:${b[1]}%;width:${b[2] - b[0]}%;height:${b[3] - b[1]}%"><span>${i ? 'second' : 'first'}</span>
<i class="grip"></i></div>`).join('')}</div>"""
_FIELD_CSS = """
.field { position: relative; width: 256px; height: 256px; border: 1px solid gray; touch-action: none; }
.box { position: absolute; box-sizing: border-box; border: 2px solid #2563eb; background: #2563eb22; cursor: move; }
.b1 { border-color: #d97706; background: #d9770622; }
.box span { font-size: 12px; padding: 2px 4px; user-select: none; pointer-events: none; }
.grip { position: absolute; right: 0; bottom: 0; width: 14px; height: 14px; }
.grip { cursor: nwse-resize; background: currentColor; opacity: .4; }
"""
# A box is dragged to move it, by its corner to resize it; the value changes when it is let go.
_FIELD_JS = """
let held = null;
element.addEventListener('pointerdown', event => {
  const box = event.target.closest('.box');
  if (!box) return;
  event.preventDefault();
  const field = box.parentElement.getBoundingClientRect(), n = Number(box.dataset.n);
  held = {box, n, field, grip: event.target.classList.contains('grip'), x: event.clientX, y: event.clientY,
          start: [...props.value[n]], now: [...props.value[n]]};
});
const within = (low, value, high) => Math.min(Math.max(low, value), high);
window.addEventListener('pointermove', event => {
  if (!held) return;
  const [l, t, r, b] = held.start;
  let dx = (event.clientX - held.x) / held.field.width * 100, dy = (event.clientY - held.y) / held.field.height * 100;
  if (held.grip) held.now = [l, t, within(l + 8, r + dx, 100), within(t + 8, b + dy, 100)];
  else { dx = within(-l, dx, 100 - r); dy = within(-t, dy, 100 - b); held.now = [l + dx, t + dy, r + dx, b + dy]; }
  const [x0, y0, x1, y1] = held.now;
  Object.assign(held.box.style, {left: x0 + '%', top: y0 + '%', width: (x1 - x0) + '%', height: (y1 - y0) + '%'});
});
window.addEventListener('pointerup', () => {
  if (!held) return;
  props.value = props.value.map((box, n) => n === held.n ? held.now : box);
  held = null;
  trigger('change');
});
"""


def make_blocks(page: Page) -> gr.Blocks:
    """The page; `launch` or mount it."""
    config, studio = page.config, page.studio
    with gr.Blocks(title="peft_metalora", analytics_enabled=False, delete_cache=(600, _KEPT)) as blocks:
        visit = gr.State(Visit(), time_to_live=_KEPT, delete_callback=Visit.leave)
        gr.Markdown("## People from photos")
        with gr.Tab("Somebody new", id="new"), gr.Row():
            with gr.Column():
                consent = gr.Checkbox(label=CONSENT, elem_id="consent")
                drop = gr.File(
                    label=f"Photos of one person, at most {config.max_photos}",
                    file_count="multiple",
                    file_types=["image"],
                    interactive=False,
                    elem_id="photos",
                    height=140,
                )
                seen = gr.HTML(elem_id="seen")
                name = gr.Textbox(label="Name", max_length=64, elem_id="name")
                keep = gr.Checkbox(label="Keep the photos with the person, to polish them later", elem_id="keep")
                new_prompt = gr.Textbox(label="Prompt", value=PROMPT, elem_id="new-prompt")
                with gr.Row():
                    read = gr.Button("Read", variant="primary", elem_id="read")
                    forget = gr.Button("Forget these photos", elem_id="forget")
                new_said = _said("new-said")
            new_pictures = _pictures("new")
        with gr.Tab("Pictures", id="pictures") as pictures_tab, gr.Row():
            with gr.Column():
                who = _who("Who", "who")
                prompt, seed, steps = _wishes(config, "prompt", PROMPT)
                draw = gr.Button("Draw", variant="primary", elem_id="draw")
                with gr.Accordion("Somebody between two", open=False):
                    other = _who("And", "other")
                    share = gr.Slider(0, 1, 0.5, step=0.05, label="How much of the second", elem_id="share")
                    blend = gr.Button("Draw who is between them", elem_id="blend")
                    blend_name = gr.Textbox(label="Name", max_length=64, elem_id="blend-name")
                    keep_blend = gr.Button("Keep in the library", elem_id="keep-blend")
                said = _said("draw-said")
            pictures = _pictures("draw")
        with gr.Tab("Two people", id="two") as two_tab, gr.Row():
            with gr.Column():
                with gr.Row():
                    left, right = _who("First", "left"), _who("Second", "right")
                boxes = gr.HTML(
                    BOXES,
                    html_template=_FIELD,
                    css_template=_FIELD_CSS,
                    js_on_load=_FIELD_JS,
                    label="Drag the boxes; their corners resize them",
                    show_label=True,
                    container=True,
                    elem_id="boxes",
                )
                two_prompt, two_seed, two_steps = _wishes(config, "two-prompt", "a photo of two people")
                two = gr.Button("Draw both", variant="primary", elem_id="draw-two")
                two_said = _said("two-said")
            two_pictures = _pictures("two")
        with gr.Tab("Polish", id="polish") as polish_tab, gr.Row():
            with gr.Column():
                polished = _who("Who", "polished")
                polish_prompt = gr.Textbox(label="What the photos show", value=PROMPT, elem_id="polish-prompt")
                polish_steps = gr.Slider(
                    1, config.tune_steps, min(50, config.tune_steps), step=1, label="Steps", elem_id="polish-steps"
                )
                with gr.Row():
                    polish = gr.Button("Polish", variant="primary", elem_id="start-polish")
                    cancel = gr.Button("Cancel", elem_id="cancel-polish")
                polish_said = _said("polish-said")
            with gr.Column():
                losses = gr.HTML(elem_id="losses")
                way = gr.HTML(elem_id="way")
        with gr.Tab("Library", id="library") as library_tab:
            people = gr.HTML(elem_id="people")
            chosen = _who("Who", "chosen")
            with gr.Row(equal_height=True):
                new_name = gr.Textbox(label="New name", max_length=64, elem_id="new-name")
                rename = gr.Button("Rename", scale=0, min_width=160, elem_id="rename")
            with gr.Row(equal_height=True):
                tool = gr.Dropdown([*TOOLS], value="ComfyUI", label="For", elem_id="tool")
                export = gr.Button("Export", scale=0, min_width=160, elem_id="export")
                exported = gr.File(label="A file of the person", interactive=False, visible=False, elem_id="exported")
            with gr.Row(equal_height=True):
                repo = gr.Textbox(label="Private repository on the Hub (owner/name)", elem_id="repo")
                down = gr.Textbox(label="The Down's repository, if the page has it from a folder", elem_id="down")
                overwrite = gr.Checkbox(label="Overwrite another person, or what else is there", elem_id="overwrite")
                push = gr.Button("Push privately", scale=0, min_width=160, elem_id="push")
            with gr.Row(equal_height=True):
                sure = gr.Checkbox(label="Delete them for good", elem_id="sure")
                delete = gr.Button("Delete", scale=0, min_width=160, variant="stop", elem_id="delete")
            library_said = _said("library-said")
        with gr.Tab("This machine", id="machine") as machine_tab:
            hardware = gr.Markdown(elem_id="hardware")

        choices = [who, other, left, right, polished, chosen]

        def known(tenant: str, chosen: str | None = None) -> list[Any]:
            """The library as the page shows it: the choices, and the table; `chosen` is chosen everywhere."""
            found = page.library.people(tenant)
            names = [person.name for person in found]
            new: dict[str, Any] = {"value": chosen} if chosen in names else {}
            return [
                *(gr.update(choices=names, **(new if one not in (other, right) else {})) for one in choices),
                _table(found),
            ]

        library = [*choices, people]

        def on(
            event: Any, work: Callable[..., Any], inputs: Any, outputs: list[Any], *, waits: bool = False, **how: Any
        ) -> Any:
            """Let an event do work, whose last output is a sentence."""
            told = _told(work, len(outputs) - 1, studio if waits else None)
            return event(told, inputs, outputs, api_visibility="private", **how)

        gpu: dict[str, Any] = {"concurrency_id": "base", "concurrency_limit": 1}
        hidden: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
        on(blocks.load, known, None, [*library, library_said])

        def on_open(tenant: str) -> list[Any]:
            return [*known(tenant), gr.skip()]

        # Others have brought people in and deleted some since. What the tab said last stays.
        for tab, its_said in (
            (pictures_tab, said),
            (two_tab, two_said),
            (polish_tab, polish_said),
            (library_tab, library_said),
        ):
            on(tab.select, on_open, None, [*library, its_said], show_progress="hidden")
        machine_tab.select(lambda: machine(studio, page.estimates), None, hardware, **hidden)

        # Somebody new
        consent.change(lambda yes: gr.update(interactive=yes), consent, drop, **hidden)

        def on_drop(tenant: str, visit: Visit, consent: bool, files: list[str] | None) -> list[Any]:
            return [_crops(page.drop(visit, consent, files))]

        on(drop.upload, on_drop, [visit, consent, drop], [seen, new_said]).then(lambda: None, None, drop, **hidden)

        def on_read(tenant: str, visit: Visit, yes: bool, name: str, keep: bool, prompt: str) -> Iterator[list[Any]]:
            person = page.read(tenant, visit, yes, name.strip(), keep)
            yield [gr.skip(), gr.skip(), *known(tenant, person.name), f"{person.name} is here; a picture comes"]
            shown = page.draw(tenant, person.name, prompt, 0, config.num_inference_steps)
            yield [*shown, *(gr.skip() for _ in library), f"{person.name} is here"]

        everything = [*new_pictures, *library, new_said]
        on(read.click, on_read, [visit, consent, name, keep, new_prompt], everything, waits=True, **gpu)

        def on_forget(tenant: str, visit: Visit) -> list[Any]:
            visit.photos, visit.uid = [], ""
            return ["", "the photos are forgotten"]

        on(forget.click, on_forget, [visit], [seen, new_said])

        # Pictures
        wishes = [prompt, seed, steps]
        on(draw.click, page.draw, [who, *wishes], [*pictures, said], waits=True, **gpu)

        def on_blend(tenant: str, first: str, second: str, *rest: Any) -> list[Any]:
            return page.blend(tenant, [first, second], *rest)

        on(blend.click, on_blend, [who, other, share, *wishes], [*pictures, said], waits=True, **gpu)

        def on_keep_blend(tenant: str, first: str, second: str, share: float, name: str) -> list[Any]:
            person = page.keep_blend(tenant, [first, second], share, name.strip())
            return [*known(tenant), f"{person.name} is in the library"]

        on(keep_blend.click, on_keep_blend, [who, other, share, blend_name], [*library, said])

        def on_two(tenant: str, first: str, second: str, *rest: Any) -> list[Any]:
            return page.two(tenant, [first, second], *rest)

        of_two = [left, right, boxes, two_prompt, two_seed, two_steps]
        on(two.click, on_two, of_two, [*two_pictures, two_said], waits=True, **gpu)

        # Polish
        def on_polish(tenant: str, visit: Visit, name: str, prompt: str, steps: float) -> Iterator[list[Any]]:
            for work in page.polish(tenant, visit, name, prompt, steps, 0):
                drawn = _strip([(f"step {step}", picture) for step, picture in [*work.pictures]])
                yield [_curve([*work.losses]), drawn, *(gr.skip() for _ in library), work.said]
            yield [gr.skip(), gr.skip(), *known(tenant), gr.skip()]

        own: dict[str, Any] = {"concurrency_id": "polish", "concurrency_limit": 1, "show_progress": "hidden"}
        of_polish = [visit, polished, polish_prompt, polish_steps]
        on(polish.click, on_polish, of_polish, [losses, way, *library, polish_said], **own)

        def on_cancel(tenant: str, visit: Visit) -> list[Any]:
            if visit.polishing is None or visit.polishing.done:
                return ["nobody is being polished in this tab"]
            visit.polishing.cancel()
            return ["cancelled after this step"]

        on(cancel.click, on_cancel, [visit], [polish_said], queue=False)

        # The library
        def on_rename(tenant: str, name: str | None, to: str) -> list[Any]:
            person = page.library.rename(tenant, name, to.strip())
            return [*known(tenant, person.name), f"{name} is called {person.name} now"]

        on(rename.click, on_rename, [chosen, new_name], [*library, library_said])

        def on_export(tenant: str, name: str | None, tool: str) -> list[Any]:
            file = page.export(tenant, name, tool)
            return [gr.update(value=file, visible=True), f"{name} for {tool}: here is the file"]

        on(export.click, on_export, [chosen, tool], [exported, library_said])

        def on_push(*given: Any) -> list[Any]:
            return [False, page.push(*given)]

        on(push.click, on_push, [chosen, repo, down, overwrite], [overwrite, library_said])
        # What is ticked is meant for who was chosen then: whoever is read meanwhile is chosen as soon as they are here.
        # In the browser itself: an answer of this process could come after the next tick.
        chosen.change(None, None, [overwrite, sure], js="() => [false, false]", **hidden)

        def on_delete(tenant: str, name: str | None, sure: bool) -> list[Any]:
            if not sure:
                raise ConfigError("expected the box beside it ticked, found it empty: nobody was deleted")
            gone = page.delete(tenant, name).name
            left = page.library.people(tenant)
            emptied = [gr.update(choices=[person.name for person in left], value=None) for _ in choices]
            return [gr.update(value=None, visible=False), False, *emptied, _table(left), f"{gone} is deleted"]

        on(delete.click, on_delete, [chosen, sure], [exported, sure, *library, library_said])
    blocks.queue(max_size=config.queue, api_open=False)
    return blocks


def _said(elem_id: str) -> gr.HTML:
    return gr.HTML(elem_id=elem_id, elem_classes="said")


def _who(label: str, elem_id: str) -> gr.Dropdown:
    # Of a choice that is not in its list any more, because another tab deleted them, Gradio would raise an error of its
    # own before `page.py` can say whom it does not know.
    return gr.Dropdown([], label=label, elem_id=elem_id, allow_custom_value=True)


def _pictures(of: str) -> list[gr.Image]:
    with gr.Column(), gr.Row():
        return [
            gr.Image(
                label=label,
                format="png",
                interactive=False,
                elem_id=f"{of}-{kind}",
                elem_classes="drawn",
                buttons=["download"],
            )
            for label, kind in (("With the person", "picture"), ("The base alone", "base"))
        ]


def _wishes(config: ServeConfig, elem_id: str, value: str) -> tuple[gr.Textbox, gr.Number, gr.Slider]:
    prompt = gr.Textbox(label="Prompt", value=value, elem_id=elem_id, max_length=config.max_prompt)
    with gr.Row():
        seed = gr.Number(0, label="Seed", precision=0, minimum=0)
        steps = gr.Slider(1, config.max_inference_steps, config.num_inference_steps, step=1, label="Steps")
    return prompt, seed, steps


def _told(work: Callable[..., Any], others: int, studio: Studio | None = None) -> Callable[..., Any]:
    """A handler that says in its last output what went wrong, in a sentence, and leaves the others as they are.

    Args:
        work: takes the user and the inputs; gives the outputs, or one output after another; the last may be left out.
        others: outputs beside that one. studio: say whom this waits for, if somebody is being polished there.
    """

    def handler(request: gr.Request, *inputs: Any) -> Iterator[Any]:
        tenant = request.username or LOCAL
        try:
            if studio is not None and (polished := studio.polishing):
                name = polished.name if polished.tenant == tenant else "somebody"
                yield _outputs([*(gr.skip() for _ in range(others)), f"waits until {name} is polished"], others)
            found = work(tenant, *inputs)
            for one in found if isinstance(found, Iterator) else [found]:
                yield _outputs(one, others)
        except MetaLoraError as error:
            yield _outputs([*(gr.skip() for _ in range(others)), _bad(" ".join(str(error).split()))], others)
        except (MemoryError, torch.OutOfMemoryError):
            sentence = "expected enough memory, found none left: This machine says with what settings less is taken"
            yield _outputs([*(gr.skip() for _ in range(others)), _bad(sentence)], others)
        except Exception:
            log.exception("the page failed")
            sentence = "the page failed; the log of metalora app says why"
            yield _outputs([*(gr.skip() for _ in range(others)), _bad(sentence)], others)

    return handler


def _outputs(found: Sequence[Any], others: int) -> Any:
    filled = [*found, ""] if len(found) == others else [*found]
    if isinstance(filled[-1], str):
        filled[-1] = filled[-1] if filled[-1].startswith(_MARK) else html.escape(filled[-1])
    return filled[0] if len(filled) == 1 else filled


_MARK = '<span class="bad">'


def _bad(sentence: str) -> str:
    return f"{_MARK}{html.escape(sentence)}</span>"


def _inline(image: Image.Image) -> str:
    """An image as a URL of its own content, so that no file of it lies anywhere."""
    small = image.convert("RGB")
    small.thumbnail((4 * _THUMB, _THUMB))
    stream = io.BytesIO()
    small.save(stream, "jpeg", quality=90)
    return f"data:image/jpeg;base64,{base64.b64encode(stream.getvalue()).decode()}"


def _strip(pictures: Sequence[tuple[str, Image.Image]]) -> str:
    figures = [
        f'<figure><img src="{_inline(picture)}"><figcaption>{html.escape(told)}</figcaption></figure>'
        for told, picture in pictures
    ]
    return f'<div class="strip">{"".join(figures)}</div>'


def _curve(losses: Sequence[float]) -> str:
    """The loss of each step, from the lowest to the highest."""
    if not losses:
        return ""
    low, high, width, height = min(losses), max(losses), 400, 140
    across, up = width / max(1, len(losses) - 1), height / ((high - low) or 1)
    points = " ".join(f"{number * across:.1f},{(high - loss) * up:.1f}" for number, loss in enumerate(losses))
    return (
        f'<figure class="curve"><figcaption>loss {losses[-1]:.4f}, from {low:.4f} to {high:.4f} in {len(losses)} steps'
        f'</figcaption><svg viewBox="-4 -4 {width + 8} {height + 8}"><polyline points="{points}"/></svg></figure>'
    )


def _crops(seen: Sequence[Seen]) -> str:
    """Each photo with the part that is used, and beside it what is read."""
    figures = []
    for number, one in enumerate(seen, 1):
        mark, (width, height) = "", one.photo.size
        if one.region is not None:
            (x, y), w, h = one.region.centre, one.region.width, one.region.height
            shares = 100 * (x - w / 2) / width, 100 * (y - h / 2) / height, 100 * w / width, 100 * h / height
            place = "left:{:.2f}%;top:{:.2f}%;width:{:.2f}%;height:{:.2f}%".format(*shares)
            mark = f'<i style="{place};transform:rotate({math.degrees(one.region.angle):.1f}deg)"></i>'
        figures.append(
            f'<figure><span class="crop"><img src="{_inline(one.photo)}">{mark}</span> '
            f'<span class="crop"><img src="{_inline(one.square)}"></span>'
            f"<figcaption>photo {number}, and what is read of it</figcaption></figure>"
        )
    return f'<div class="strip">{"".join(figures)}</div>'


def _table(people: Sequence[Person]) -> str:
    if not people:
        return "<p>Nobody is here yet.</p>"
    rows = "".join(
        f"<tr><td>{html.escape(one.name)}</td><td>{'polished' if one.code is None else 'as read'}</td>"
        f"<td>{html.escape(one.consent)}</td></tr>"
        for one in people
    )
    return f"<table><tr><th>name</th><th>is</th><th>consent</th></tr>{rows}</table>"
