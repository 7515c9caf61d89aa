"""One training run in one process: from what an earlier run left, or from nothing, to weights, samples and metrics.

Runs add up: each goes on from the averaged weights of the one before, with its own warm-up and a new optimizer, and
one cosine of the learning rate goes through all of them.
"""

import argparse
import datetime
import hashlib
import importlib.metadata
import time
from pathlib import Path
from typing import Any

import torch

from training import architecture, autoencoder, dataset, denoiser, evaluate, export, pairs, render, tokenizer, weights
from training.pace import Average, Mode, say
from training.recipe import Recipe

RESERVE_SECONDS = 35.0  # at the end, for samples and metrics
SEED = 20261123


def versions() -> dict[str, str]:
    """The packages that decide what a run does."""
    return {name: importlib.metadata.version(name) for name in ("torch", "diffusers", "transformers", "tokenizers")}


def identity(data: Path) -> dict[str, str]:
    """What weights belong to, as hashes: the held-out lists, and the vocabulary their tokens have."""
    vocabulary = hashlib.sha256((data / "vocab.json").read_bytes() + (data / "merges.txt").read_bytes())
    return {"pairs_sha256": pairs.pairs_hash(), "vocabulary_sha256": vocabulary.hexdigest()}


def starting_point(out: Path, resume: Path | None, wanted: dict[str, str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """What there is to go on from: state dicts by part, and the record; both empty for a new model.

    A checkpoint in `out` comes before `resume`: it is what this run, or the last one there, had reached. Raises
    WeightsError for weights of other held-out lists or another vocabulary than `wanted`.
    """
    folder = out if (out / weights.RECORD).exists() else resume
    if folder is None:
        return {}, {}
    parts, record = weights.read(folder)
    for name, value in wanted.items():
        if record.get(name) != value:
            what = "held-out pairs" if name == "pairs_sha256" else "vocabulary"
            raise weights.WeightsError(f"{folder} was trained with another list of {what}: start anew, without it")
    say(f"going on from {folder}, which has {', '.join(parts)} and {record.get('denoiser_steps', 0)} steps")
    return parts, record


def finished_runs(record: dict[str, Any]) -> int:
    """How many runs ended as they should; one that was interrupted is in the list, and is taken up again."""
    return sum(bool(run.get("finished")) for run in record.get("runs", []))


def with_run(record: dict[str, Any], run: dict[str, Any]) -> dict[str, Any]:
    """The record with one more run, its steps added to the whole."""
    steps = record.get("denoiser_steps", 0) + (run.get("denoiser_steps") or 0)
    return {**record, "runs": [*record.get("runs", []), run], "denoiser_steps": steps}


def recipe_of(options: argparse.Namespace, resumed: bool) -> Recipe:
    """The recipe with what the command line changes in it; a run that goes on keeps averaging from its start."""
    asked = {
        "rate": options.rate,
        "empty_share": options.empty_share,
        "min_snr": options.min_snr,
        "views": options.views,
        "average_decay": options.average_decay,
        "average_start": 0 if resumed else None,
    }
    return Recipe(**{name: value for name, value in asked.items() if value is not None})


def _autoencoder(
    parts: dict[str, Any], data: dataset.Dataset, options: argparse.Namespace, mode: Mode
) -> tuple[Any, dict[str, Any]]:
    """The autoencoder of the earlier run, or a new one and its metrics."""
    if "autoencoder" not in parts:
        seconds, batch = options.autoencoder_seconds, options.autoencoder_batch
        return autoencoder.train(data.rgb, data.weight, seconds=seconds, batch=batch, mode=mode)
    coder = architecture.build_autoencoder()
    coder.load_state_dict(parts["autoencoder"])
    torch.nn.Module.to(coder.eval(), mode.device)
    return coder, {}


def train(options: argparse.Namespace) -> None:
    """Both trainings, samples and metrics, in one mode, in this process."""
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.benchmark = True
    device = torch.device(options.device)
    mode = Mode(options.mode, device)
    deadline = time.monotonic() + (options.deadline - time.time())
    name = torch.cuda.get_device_name() if device.type == "cuda" else "cpu"
    say(f"{name}, {versions()}, {deadline - time.monotonic():.0f} s left")

    parts, record = starting_point(options.out, options.resume, identity(options.data))
    number = finished_runs(record)
    torch.manual_seed(SEED + len(record.get("runs", [])))
    words = tokenizer.build_tokenizer(options.data)
    data = dataset.load(options.data / render.PACK, words, device, options.limit)
    say(f"{len(data.examples)} pictures on the device, {data.tokens.shape[1]} captions each")
    coder, metrics = _autoencoder(parts, data, options, mode)
    record |= metrics | identity(options.data) | {"pictures": len(data.examples)}
    recipe = recipe_of(options, resumed="unet" in parts)
    run: dict[str, Any] = {"date": datetime.date.today().isoformat(), "device": name, "versions": versions()}
    run |= {"mode": mode.name, "recipe": recipe.as_dict(), "finished": False}

    def write(model: denoiser.Denoiser | None, **more: Any) -> None:
        unet, text_encoder = (model.unet, model.text_encoder) if model else (None, None)
        state = with_run(record, {**run, **more}) if model else record
        weights.write(options.out, unet=unet, text_encoder=text_encoder, autoencoder=coder, record=state)

    if "unet" not in parts:
        write(None)
    latents = denoiser.encode_views(coder, data.rgb, recipe.views)
    say(f"latents: mean {latents.mean():.3f}, standard deviation {latents.std():.3f}")
    model = denoiser.Denoiser(words)
    if "unet" in parts:
        model.unet.load_state_dict(parts["unet"])
        model.text_encoder.load_state_dict(parts["text_encoder"])
    model.to(device, memory_format=torch.channels_last).train()  # pyright: ignore[reportCallIssue]

    def checkpoint(average: Average, steps: int) -> None:
        shadow = denoiser.Denoiser(words).to(device)
        average.copy_to(shadow)
        write(shadow, denoiser_steps=steps)
        say(f"checkpoint at step {steps}")

    run |= denoiser.train(
        data,
        latents,
        model,
        deadline=deadline - RESERVE_SECONDS,
        batch=options.batch,
        mode=mode,
        checkpoint=checkpoint,
        checkpoint_seconds=options.checkpoint_seconds,
        max_steps=options.max_steps,
        recipe=recipe,
        run=number,
        runs=max(options.runs, number + 1),
    )
    model.eval()
    write(model, finished=True)
    say("the final weights are written")
    pipeline = export.pipeline_of(model.unet, coder, model.text_encoder, words)
    run |= evaluate.measure(pipeline, data, options.out / "samples.png", steps=options.sample_steps)
    write(model, finished=True)
    say("all done")
