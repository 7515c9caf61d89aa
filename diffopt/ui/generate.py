"""The tab that makes pictures: a prompt in, a picture out, with what ran, how fast, and a stop that stops."""

import dataclasses
import html
import queue
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gradio as gr

from diffopt.attention.backends import BACKENDS, names
from diffopt.engine.png import write_png
from diffopt.engine.requests import GenerationRequest
from diffopt.engine.worker import STOCK, Engine, GeneratedPicture, Progress
from diffopt.errors import DiffoptError, InputError
from diffopt.ui.jobs import Jobs

REFRESH_SECONDS = 0.2


@dataclasses.dataclass(frozen=True)
class GenerateTab:
    """What the tab needs.

    Attributes:
        engine: makes the pictures.
        folder: where they are written; the page serves the files from there, unchanged.
        jobs: the visitors' running jobs.
    """

    engine: Engine
    folder: Path
    jobs: Jobs = dataclasses.field(default_factory=Jobs)

    def build(self) -> None:
        """Put the tab's components into the gradio context that is open."""
        model = self.engine.model
        with gr.Row(elem_id="generate"):
            with gr.Column(scale=5, min_width=320):
                prompt = gr.Textbox(label="Prompt", placeholder="a red apple, noto style", lines=2, autofocus=True)
                negative = gr.Textbox(label="Negative prompt", placeholder="what the picture should not show")
                with gr.Row():
                    steps = gr.Slider(
                        1, min(100, model.limits.max_steps), value=model.defaults.steps, step=1, label="Steps"
                    )
                    guidance = gr.Slider(1.0, 15.0, value=model.defaults.guidance, step=0.5, label="Guidance")
                with gr.Row():
                    seed = gr.Textbox(label="Seed", placeholder="random", min_width=100)
                    size = gr.Dropdown(
                        _sizes(model.defaults.width, model.defaults.height, model.limits.max_pixels),
                        value=f"{model.defaults.width}x{model.defaults.height}",
                        label="Size",
                        allow_custom_value=True,
                        min_width=100,
                    )
                    attention = gr.Dropdown(
                        self._backends(), value=self._attention_now(), label="Attention", min_width=120
                    )
                with gr.Row():
                    start = gr.Button("Generate", variant="primary", elem_id="start")
                    stop = gr.Button("Stop", variant="stop", elem_id="stop")
            with gr.Column(scale=4, min_width=320):
                picture = gr.Image(
                    label="Picture",
                    format="png",
                    type="filepath",
                    interactive=False,
                    height=384,
                    buttons=["download", "fullscreen"],
                    elem_id="picture",
                )
                status = gr.HTML(_status("Ready."), elem_id="status")
        with gr.Accordion("What ran in each attention layer", open=False):
            report = gr.Code(self._report(), language=None, show_label=False, interactive=False, elem_id="report")

        inputs = [prompt, negative, steps, guidance, seed, size, attention]
        for trigger in (start.click, prompt.submit):
            trigger(
                self.generate,
                inputs,
                [picture, status, report],
                concurrency_limit=1,
                concurrency_id="pictures",
                show_progress="hidden",
                api_name="generate" if trigger is not prompt.submit else None,
                api_visibility="public" if trigger is not prompt.submit else "private",
            )
        stop.click(self.stop, None, None, queue=False, show_progress="hidden", api_visibility="private")

    def generate(
        self,
        prompt: str,
        negative_prompt: str,
        steps: float,
        guidance: float,
        seed: str,
        size: str,
        attention: str,
        request: gr.Request,
    ) -> Iterator[tuple[Any, str, str]]:
        """Make one picture; yields picture (None until it is done), status and report as they change."""
        try:
            width, height = _read_size(size)
            if not (prompt or "").strip():
                raise InputError("prompt", prompt or "", "some text is needed, such as: a red apple")
            asked = GenerationRequest.create(
                self.engine.model,
                prompt=prompt,
                negative_prompt=negative_prompt or "",
                steps=steps,
                guidance=guidance,
                seed=(seed or "").strip() or None,
                width=width,
                height=height,
            )
            self.engine.use_attention(attention)
            with self.jobs.running(str(request.session_hash)) as stop:
                yield from self._run(asked, stop)
        except DiffoptError as error:
            yield gr.skip(), _status(str(error), failed=True), self._report()  # type: ignore[misc]

    def stop(self, request: gr.Request) -> None:
        """Stop this visitor's job at its next step."""
        self.jobs.stop(str(request.session_hash))

    def _run(self, asked: GenerationRequest, stop: threading.Event) -> Iterator[tuple[Any, str, str]]:
        events: queue.Queue[Progress | GeneratedPicture | BaseException | None] = queue.Queue()

        def work() -> None:
            try:
                for made in self.engine.generate(asked, on_step=events.put, stop=stop):
                    events.put(made)
            except BaseException as error:
                events.put(error)
            events.put(None)

        begun = time.perf_counter()
        worker = threading.Thread(target=work, name="picture", daemon=True)
        worker.start()
        try:
            yield None, _status("Reading the prompt …", share=0.0), ""
            shown = 0.0
            while (event := events.get()) is not None:
                if isinstance(event, BaseException):
                    raise event
                if isinstance(event, GeneratedPicture):
                    path = write_png(event, self.folder)
                    yield str(path), _finished(event, path), self._report()
                    return
                now = time.perf_counter()
                if now - shown > REFRESH_SECONDS:
                    shown = now
                    yield None, _taken(event, now - begun), ""
            yield None, _status("Stopped. Nothing was kept of the unfinished picture."), self._report()
        finally:
            stop.set()  # a visitor who left: the work ends at its next step
            worker.join()

    def _report(self) -> str:
        handle = self.engine.handle
        return handle.report() if handle is not None else "diffopt is off: the stock pipeline runs"

    def _backends(self) -> list[str]:
        device = self.engine.device
        usable = [name for name in names() if name not in BACKENDS or not BACKENDS[name].device_reasons(device)]
        return [*usable, STOCK]

    def _attention_now(self) -> str:
        return self.engine.handle.attention if self.engine.handle is not None else STOCK


def _sizes(width: int, height: int, max_pixels: int) -> list[str]:
    """Presets around a model's own size, as far as its limit allows."""
    shapes = [(width, height), (width * 3 // 4, height), (width, height * 3 // 4), (width * 3 // 2, height * 3 // 2)]
    shapes = [(w // 8 * 8, h // 8 * 8) for w, h in shapes]
    return [f"{w}x{h}" for w, h in shapes if w * h <= max_pixels]


def _read_size(size: str) -> tuple[str, str]:
    width, cross, height = str(size).lower().replace("×", "x").partition("x")
    if not cross:
        raise InputError("size", size, "width and height are needed, such as 128x128")
    return width.strip(), height.strip()


def _status(text: str, *, share: float | None = None, failed: bool = False) -> str:
    bar = "" if share is None else f'<div class="bar"><div style="width: {share:.0%}"></div></div>'
    kind = "failed" if failed else "fine"
    return f'<div class="status {kind}" role="status">{bar}<span>{html.escape(text)}</span></div>'


def _taken(progress: Progress, seconds: float) -> str:
    rate = progress.iteration / seconds
    left = (progress.iterations - progress.iteration) / rate
    text = f"Step {progress.iteration} of {progress.iterations} · {rate:.1f} it/s · {left:.0f} s left"
    return _status(text, share=progress.iteration / progress.iterations)


def _finished(made: GeneratedPicture, path: Path) -> str:
    ran = made.metadata["attention"]["ran"]
    layers = ", ".join(f"{name} in {count} layers" for name, count in ran.items()) or "stock attention"
    return _status(f"{made.seconds:.2f} s · {made.its:.2f} it/s · seed {made.seed} · {layers} · {path}")
