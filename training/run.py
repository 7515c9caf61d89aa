"""Every step in order: fetch, render, tokenizer, autoencoder, denoiser, samples, and with --export the model folder.

`python -m training.run --out FOLDER --minutes 13` ends that many minutes after its start, whatever the speed of
the machine, with the learning rate annealed. Steps that are done (data, autoencoder) are not done again. Training
runs in a process of its own, in the fastest of three modes that works: compiled and captured as a CUDA graph,
compiled, eager; a mode that fails is named in the log and the next one goes on from the last checkpoint.
"""

import argparse
import datetime
import importlib.metadata
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from diffopt.errors import DiffoptError
from training import fetch, render
from training.pace import say

RESERVE_SECONDS = 35.0  # at the end, for samples and metrics
MODES = ("graph", "compile", "eager")


def options_of(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=fetch.CACHE / "data", help="pictures and vocabulary")
    parser.add_argument("--out", type=Path, default=Path("training/runs/emoji"), help="weights, samples, metrics")
    parser.add_argument("--minutes", type=float, default=13.0, help="from start to end, all steps together")
    parser.add_argument("--autoencoder-seconds", type=float, default=100.0)
    parser.add_argument("--checkpoint-seconds", type=float, default=90.0)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--autoencoder-batch", type=int, default=64)
    parser.add_argument("--limit", type=int, help="use only so many pictures, to try things out")
    parser.add_argument("--sample-steps", type=int, default=20)
    parser.add_argument("--device", default="auto", help="cuda, cpu or auto")
    parser.add_argument("--mode", choices=MODES, help="only this mode, in this process")
    parser.add_argument("--deadline", type=float, help="end at this time (seconds since 1970) instead of --minutes")
    parser.add_argument("--export", action="store_true", help="put the result into diffopt/assets/emoji")
    return parser.parse_args(arguments)


def prepare(data: Path) -> None:
    """Fetch, render and learn the vocabulary, unless that is done."""
    from training import captions, dataset, tokenizer

    if not (data / render.PACK).exists():
        for step in (fetch.main([]), render.main(["--data", str(data)])):
            if step:
                raise DiffoptError("the training data could not be made")
    if not (data / "merges.txt").exists():
        pictures, _ = dataset.read_pack(data / render.PACK)
        texts = [caption for picture in pictures for caption in captions.captions_of(picture)]
        words = tokenizer.train(texts, data)
        say(f"tokenizer: {len(words)} tokens")


def supervise(options: argparse.Namespace) -> int:
    """Train in a process of its own; when it fails, again in the next slower mode."""
    import torch

    prepare(options.data)
    device = options.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    deadline = options.deadline or time.time() + 60 * options.minutes
    order = [sys.executable, "-m", "training.run", "--data", options.data, "--out", options.out, "--device", device]
    order += ["--deadline", deadline, "--autoencoder-seconds", options.autoencoder_seconds, "--batch", options.batch]
    order += ["--autoencoder-batch", options.autoencoder_batch, "--sample-steps", options.sample_steps]
    order += ["--checkpoint-seconds", options.checkpoint_seconds]
    order += ["--limit", options.limit] if options.limit else []
    for mode in MODES if device == "cuda" else MODES[-1:]:
        say(f"training in mode {mode}")
        code = subprocess.run([str(part) for part in [*order, "--mode", mode]]).returncode
        if code == 0:
            return 0
        say(f"mode {mode} FAILED with exit code {code}")
        if time.time() > deadline:
            break
    return 1


def _versions() -> dict[str, str]:
    return {name: importlib.metadata.version(name) for name in ("torch", "diffusers", "transformers", "tokenizers")}


def train(options: argparse.Namespace) -> None:
    """Both trainings, samples and metrics, in one mode, in this process."""
    import torch

    from training import architecture, autoencoder, dataset, denoiser, evaluate, export, tokenizer, weights
    from training.pace import Average, Mode

    torch.manual_seed(20261123)
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.benchmark = True
    device = torch.device(options.device)
    mode = Mode(options.mode, device)
    deadline = time.monotonic() + (options.deadline - time.time())
    gpu = torch.cuda.get_device_name() if device.type == "cuda" else "cpu"
    say(f"{gpu}, {_versions()}, {deadline - time.monotonic():.0f} s left")

    words = tokenizer.build_tokenizer(options.data)
    data = dataset.load(options.data / render.PACK, words, device, options.limit)
    say(f"{len(data.titles)} pictures on the device, {data.tokens.shape[1]} captions each")
    record: dict[str, Any] = {"date": datetime.date.today().isoformat(), "device": gpu, "versions": _versions()}
    record["pictures"] = len(data.titles)
    done: dict[str, Any] = {}
    if (options.out / weights.RECORD).exists():
        done, record = weights.read(options.out)
        say(f"going on from {options.out}, which has {', '.join(done)}")
    record["mode"] = mode.name

    if "autoencoder" in done:
        coder = architecture.build_autoencoder()
        coder.load_state_dict(done["autoencoder"])
        torch.nn.Module.to(coder.eval(), device)
    else:
        coder, metrics = autoencoder.train(
            data.rgb, data.weight, seconds=options.autoencoder_seconds, batch=options.autoencoder_batch, mode=mode
        )
        record |= metrics

    def write(model: denoiser.Denoiser | None, **more: Any) -> None:
        unet, text_encoder = (model.unet, model.text_encoder) if model else (None, None)
        weights.write(options.out, unet=unet, text_encoder=text_encoder, autoencoder=coder, record={**record, **more})

    if not done:
        write(None, finished=False)
    latents = autoencoder.encode(coder, data.rgb)
    say(f"latents: mean {latents.mean():.3f}, standard deviation {latents.std():.3f}")
    model = denoiser.Denoiser(words)
    if "unet" in done:
        model.unet.load_state_dict(done["unet"])
        model.text_encoder.load_state_dict(done["text_encoder"])
    model.to(device, memory_format=torch.channels_last).train()  # pyright: ignore[reportCallIssue]

    def checkpoint(average: Average, steps: int) -> None:
        shadow = denoiser.Denoiser(words).to(device)
        average.copy_to(shadow)
        write(shadow, denoiser_steps=steps, finished=False)
        say(f"checkpoint at step {steps}")

    record |= denoiser.train(
        data,
        latents,
        model,
        deadline=deadline - RESERVE_SECONDS,
        batch=options.batch,
        mode=mode,
        checkpoint=checkpoint,
        checkpoint_seconds=options.checkpoint_seconds,
    )
    model.eval()
    write(model, finished=True)
    say("the final weights are written")
    pipeline = export.pipeline_of(model.unet, coder, model.text_encoder, words)
    record |= evaluate.measure(pipeline, data, options.out / "samples.png", steps=options.sample_steps)
    write(model, finished=True)
    say("all done")


def main(arguments: list[str] | None = None) -> int:
    options = options_of(arguments)
    try:
        if options.mode:
            options.deadline = options.deadline or time.time() + 60 * options.minutes
            train(options)
            return 0
        code = supervise(options)
        if code == 0 and options.export:
            from training import export

            code = export.main(["--from", str(options.out), "--data", str(options.data)])
        return code
    except DiffoptError as error:
        print(error, file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
