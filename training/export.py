"""Step 6: write the trained parts as a folder that StableDiffusionPipeline.from_pretrained loads.

`python -m training.export --from FOLDER` joins the weights that `training.run` left in FOLDER and puts the model
in diffopt/assets/emoji. The new folder is complete before it takes the old one's place.
"""

import argparse
import json
import shutil
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from diffopt.errors import DiffoptError
from training import architecture, card, fetch, tokenizer, weights

if TYPE_CHECKING:
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
    from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline
    from transformers import CLIPTextModel, CLIPTokenizer

ASSETS = Path(__file__).parent.parent / "diffopt" / "assets"
TRAINING_RECORD = "training.json"  # beside the weights: how they were trained


class ExportError(DiffoptError):
    """A run whose output can't be turned into the bundled model."""


def pipeline_of(
    unet: "UNet2DConditionModel",
    autoencoder: "AutoencoderKL",
    text_encoder: "CLIPTextModel",
    words: "CLIPTokenizer",
) -> "StableDiffusionPipeline":
    """A StableDiffusionPipeline over the parts, without a safety checker."""
    from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline

    return StableDiffusionPipeline(
        vae=autoencoder,
        text_encoder=text_encoder,
        tokenizer=words,
        unet=unet,
        scheduler=architecture.build_scheduler(),  # pyright: ignore[reportArgumentType]
        safety_checker=None,  # pyright: ignore[reportArgumentType]
        feature_extractor=None,  # pyright: ignore[reportArgumentType]
        requires_safety_checker=False,
    )


def write_model(pipeline: "StableDiffusionPipeline", vocabulary: Path, folder: Path, record: dict[str, object]) -> None:
    """Write the pipeline as float16 files to a folder, replacing it whole.

    `vocabulary` is the folder that holds vocab.json and merges.txt, `record` tells how it was trained; the model card
    says it too.
    The pipeline's modules are cast to float16 in place.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as temporary:
        new = Path(temporary) / "new"
        for module in (pipeline.unet, pipeline.vae, pipeline.text_encoder):
            module.half()
        pipeline.save_pretrained(new, safe_serialization=True)
        for name in ("vocab.json", "merges.txt"):
            shutil.copyfile(vocabulary / name, new / "tokenizer" / name)
        # Half files would otherwise load as half in the text encoder and as float in the UNet.
        _update(new / "text_encoder" / "config.json", {"dtype": "float32"})
        _update(new / "scheduler" / "scheduler_config.json", architecture.OTHER_SCHEDULERS)
        (new / TRAINING_RECORD).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        (new / "README.md").write_text(card.model_card(record), encoding="utf-8")
        for file in new.rglob("*.safetensors"):
            file.chmod(0o644)  # they are written for their owner only
        if folder.exists():
            folder.rename(Path(temporary) / "old")
        new.rename(folder)


def _update(file: Path, values: dict[str, object]) -> None:
    content = {**json.loads(file.read_text(encoding="utf-8")), **values}
    file.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def assemble(run: Path, data: Path, folder: Path) -> None:
    """Build the pipeline from a run's files and write it to `folder`; raises ExportError or WeightsError."""
    import torch

    parts, record = weights.read(run)
    if "unet" not in parts:
        raise ExportError(f"{run} holds an autoencoder only: the denoiser was not trained")
    words = tokenizer.build_tokenizer(data)
    modules: dict[str, torch.nn.Module] = {
        "unet": architecture.build_unet(),
        "autoencoder": architecture.build_autoencoder(),
        "text_encoder": architecture.build_text_encoder(words),
    }
    for name, module in modules.items():
        if not all(bool(value.isfinite().all()) for value in parts[name].values()):
            raise ExportError(f"{run}: the weights of the {name} are not finite")
        try:
            module.load_state_dict(parts[name])
        except RuntimeError as error:
            raise ExportError(f"{run}: the weights of the {name} do not fit: {' '.join(str(error).split())}") from None
    write_model(pipeline_of(**{**modules, "words": words}), data, folder, record)  # pyright: ignore[reportArgumentType]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--from", dest="run", type=Path, required=True, help="the folder that training.run wrote to")
    parser.add_argument(
        "--data", type=Path, default=fetch.CACHE / "data", help="the folder with vocab.json, merges.txt"
    )
    parser.add_argument("--to", type=Path, default=ASSETS / "emoji")
    options = parser.parse_args(arguments)
    try:
        assemble(options.run, options.data, options.to)
    except DiffoptError as error:
        print(error, file=sys.stderr)
        return 2
    size = sum(file.stat().st_size for file in options.to.rglob("*.safetensors")) / 1e6
    print(f"{options.to}: {size:.1f} MB of weights")
    return 0


if __name__ == "__main__":
    sys.exit(main())
