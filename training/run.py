"""Every step in order: fetch, render, tokenizer, autoencoder, denoiser, samples, and with --export the model folder.

`python -m training.run --out FOLDER --minutes 13` ends that many minutes after its start, whatever the speed of
the machine, with the learning rate annealed. Steps that are done (data, autoencoder) are not done again. Training
runs in a process of its own, in the fastest of three modes that works: compiled and captured as a CUDA graph,
compiled, eager; a mode that fails is named in the log and the next one goes on from the last checkpoint.

Several runs add up: `--resume FOLDER` goes on from what an earlier run left there (its averaged weights), and
`--runs 4` says how many there will be, so that the learning rate is annealed in the last one and not in each:

    python -m training.run --out training/runs/1 --runs 3
    python -m training.run --out training/runs/2 --runs 3 --resume training/runs/1
"""

import argparse
import subprocess
import sys
import time
from pathlib import Path

from diffopt.errors import DiffoptError
from training import fetch, render
from training.pace import say

MODES = ("graph", "compile", "eager")


def options_of(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=fetch.CACHE / "data", help="pictures and vocabulary")
    parser.add_argument("--out", type=Path, default=Path("training/runs/emoji"), help="weights, samples, metrics")
    parser.add_argument("--minutes", type=float, default=13.0, help="from start to end, all steps together")
    parser.add_argument("--autoencoder-seconds", type=float, default=100.0)
    parser.add_argument("--checkpoint-seconds", type=float, default=90.0)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--autoencoder-batch", type=int, default=64)
    parser.add_argument("--limit", type=int, help="use only so many pictures, to try things out")
    parser.add_argument("--max-steps", type=int, help="end after so many steps of the denoiser, to try things out")
    parser.add_argument("--sample-steps", type=int, default=20)
    parser.add_argument("--device", default="auto", help="cuda, cpu or auto")
    parser.add_argument("--resume", type=Path, help="go on from the weights that an earlier run left in this folder")
    parser.add_argument("--runs", type=int, default=1, help="how many runs will add up, this one and earlier included")
    recipe = parser.add_argument_group("recipe", "defaults in training/recipe.py")
    recipe.add_argument("--rate", type=float, help="peak learning rate")
    recipe.add_argument("--empty-share", type=float, help="share of empty captions, for guidance")
    recipe.add_argument("--min-snr", type=float, help="gamma of min-SNR weighting of the loss")
    recipe.add_argument("--views", type=int, help="views of each picture: itself, and slightly scaled and shifted")
    recipe.add_argument("--average-decay", type=float, help="of the averaged weights, per step")
    parser.add_argument("--mode", choices=MODES, help="only this mode, in this process")
    parser.add_argument("--deadline", type=float, help="end at this time (seconds since 1970) instead of --minutes")
    parser.add_argument("--export", action="store_true", help="put the result into diffopt/assets/emoji")
    return parser.parse_args(arguments)


def prepare(data: Path) -> None:
    """Fetch, render and learn the vocabulary, unless that is done."""
    from training import dataset, examples, pairs, tokenizer

    render.ensure(data)
    if not (data / "merges.txt").exists():
        plan = examples.plan(dataset.read_manifest(data / render.PACK), pairs.read_pairs())
        texts = [caption for example in plan for caption in example.captions]
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
    order += ["--runs", options.runs]
    for name in ("limit", "max_steps", "resume", "rate", "empty_share", "min_snr", "views", "average_decay"):
        value = getattr(options, name)
        order += [] if value is None else [f"--{name.replace('_', '-')}", value]
    for mode in MODES if device == "cuda" else MODES[-1:]:
        say(f"training in mode {mode}")
        code = subprocess.run([str(part) for part in [*order, "--mode", mode]]).returncode
        if code == 0:
            return 0
        say(f"mode {mode} FAILED with exit code {code}")
        if time.time() > deadline:
            break
    return 1


def main(arguments: list[str] | None = None) -> int:
    options = options_of(arguments)
    try:
        if options.mode:
            options.deadline = options.deadline or time.time() + 60 * options.minutes
            from training import trainer

            trainer.train(options)
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
