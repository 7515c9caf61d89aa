"""Loading models: what is known, what is refused and in which words, and that weights are never filled in."""

import hashlib
import importlib.util
import json
import shutil
import socket
import textwrap
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_model import TEXT, UNET, VAE, one_thread, save_tiny_model, to_single_file  # noqa: F401

import diffopt
from diffopt.errors import DiffoptError, InputError
from diffopt.models import SCHEDULERS, find_model, known_models, make_scheduler, model_config_for, model_hash


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture
def folder(saved, tmp_path) -> Path:
    return shutil.copytree(saved, tmp_path / "tiny")


def edit_weights(path: Path, edit) -> None:
    weights = load_file(path)
    edit(weights)
    save_file(weights, path, metadata={"format": "pt"})


def edit_json(path: Path, **values) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def refusal(model, **options) -> str:
    """The line `load` refuses a model with."""
    with pytest.raises(DiffoptError) as caught:
        diffopt.load(model, device="cpu", **options)
    line = str(caught.value)
    assert "\n" not in line
    assert len(line) < 600
    return line


# --- what loads -----------------------------------------------------------------------------------------------------


def test_a_local_folder_loads_with_its_own_weights_and_without_a_network(folder, monkeypatch):
    def refuse(*_):
        raise AssertionError("a local model asked for the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    pipe = diffopt.load(folder, device="cpu")
    for file, module in ((UNET, pipe.unet), (VAE, pipe.vae), (TEXT, pipe.text_encoder)):
        saved = load_file(folder / file)
        assert set(saved) == set(module.state_dict())
        assert all(torch.equal(saved[key], value) for key, value in module.state_dict().items())
    assert pipe.unet.dtype == torch.float32


def test_the_bundled_model_loads_by_name():
    pipe = diffopt.load("emoji", device="cpu")
    assert type(pipe).__name__ == "StableDiffusionPipeline"
    assert model_hash(pipe) == model_hash(find_model("emoji").path)


def test_dtype_and_scheduler_are_as_asked(folder):
    pipe = diffopt.load(folder, device="cpu", dtype=torch.bfloat16, scheduler="euler")
    assert {pipe.unet.dtype, pipe.vae.dtype, pipe.text_encoder.dtype} == {torch.bfloat16}
    assert type(pipe.scheduler).__name__ == "EulerDiscreteScheduler"


def test_a_folder_with_only_half_precision_variants_loads(folder):
    weights = load_file(folder / UNET)
    for file in (UNET, VAE, TEXT):
        path = folder / file
        path.rename(path.with_suffix(".fp16.safetensors"))
    pipe = diffopt.load(folder, device="cpu")
    assert torch.equal(pipe.unet.conv_in.weight, weights["conv_in.weight"].float())


def test_pickled_weights_load_only_when_allowed(folder):
    weights = load_file(folder / UNET)
    (folder / UNET).unlink()
    torch.save(weights, (folder / UNET).with_suffix(".bin"))
    line = refusal(folder)
    assert "pickled" in line
    assert "--allow-pickle" in line
    pipe = diffopt.load(folder, device="cpu", allow_pickle=True)
    assert torch.equal(pipe.unet.conv_in.weight, weights["conv_in.weight"])


# --- what is not a model --------------------------------------------------------------------------------------------


def test_an_unknown_name_lists_what_is_known_nearest_first():
    line = refusal("emojy")
    assert line.index("emoji,") < line.index("sd15")
    assert "sdx" in refusal("sdx")
    assert refusal("sdx").index("sdxl") < refusal("sdx").index("emoji")


@pytest.mark.parametrize("path", ["./nowhere", "/nowhere/at/all", "a/b/c", "weights.safetensors", "old.ckpt"])
def test_a_missing_folder_or_file_is_named(path):
    line = refusal(path)
    assert path in line
    assert "no such file or folder" in line


def test_a_hub_id_without_a_network_is_one_line(monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    line = refusal("nobody/nothing-of-that-name")
    assert "says to stay offline" in line
    assert "emoji" in line


def test_a_hub_that_cannot_be_reached_is_one_line(monkeypatch):
    def unreachable(*_args, **_options):
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unreachable)
    line = refusal("nobody/nothing-of-that-name")
    assert "there is no connection to it" in line


@pytest.mark.parametrize(
    ("model", "words"), [("x" * 300, "File name too long"), ("~nobody-of-this-name/x", "home directory")]
)
def test_a_path_that_no_system_has_is_one_line(model, words):
    assert words in refusal(model)


@pytest.mark.parametrize("dtype", ["float16", torch.int8, 16])
def test_a_dtype_that_is_none_for_weights_is_refused(folder, dtype):
    """diffusers would leave the UNet in float32 for a word, and transformers follow it."""
    assert "a torch.dtype of floating-point numbers is needed" in refusal(folder, dtype=dtype)


def test_other_folders_and_files_are_refused(tmp_path):
    assert "model_index.json is missing" in refusal(tmp_path)
    picture = tmp_path / "picture.png"
    picture.write_bytes(b"x")
    assert "not a model file" in refusal(picture)


def test_config_goes_with_single_files_only(folder):
    with pytest.raises(InputError, match="config"):
        diffopt.load(folder, config=folder, device="cpu")


@pytest.mark.parametrize("device", ["cuda:99", "tpu", "mps"])
def test_a_device_that_is_not_here_is_refused(folder, device):
    with pytest.raises(InputError, match=r"device.*allowed: cpu"):
        diffopt.load(folder, device=device)


# --- damaged weights ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("file", [UNET, TEXT])
@pytest.mark.parametrize("keep", [0, 4, 100, -1], ids=["empty", "no header", "half a header", "last byte gone"])
def test_truncated_weights_are_refused(folder, file, keep):
    data = (folder / file).read_bytes()
    (folder / file).write_bytes(data[:keep])
    line = refusal(folder)
    assert file in line
    assert "damaged or incomplete" in line


def test_garbage_is_refused(folder):
    (folder / VAE).write_bytes(b"\xff" * 4096)
    assert "damaged or incomplete" in refusal(folder)


@pytest.mark.parametrize(
    ("file", "key"),
    [(UNET, "mid_block.attentions.0.proj_in.weight"), (VAE, "decoder.conv_in.bias"), (TEXT, "final_layer_norm.weight")],
)
class TestWeightsThatDoNotFit:
    """diffusers and transformers load all of these with random values and a log line at most."""

    def test_missing(self, folder, file, key):
        key = self.name(folder, file, key)
        edit_weights(folder / file, lambda weights: weights.pop(key))
        assert f"{key} missing" in refusal(folder)

    def test_extra(self, folder, file, key):
        edit_weights(folder / file, lambda weights: weights.update({"another.weight": torch.zeros(3)}))
        assert "another.weight too many" in refusal(folder)

    def test_other_shape(self, folder, file, key):
        key = self.name(folder, file, key)
        edit_weights(folder / file, lambda weights: weights.update({key: torch.zeros(3, 5)}))
        line = refusal(folder)
        assert f"{key} is 3×5 and should be" in line

    @staticmethod
    def name(folder, file, key):
        return next(name for name in load_file(folder / file) if name.endswith(key))


def test_a_configuration_of_another_model_is_refused(folder):
    edit_json(folder / "unet" / "config.json", cross_attention_dim=24)
    assert "×16 and should be" in refusal(folder)
    assert "×24" in refusal(folder)


@pytest.mark.parametrize("part", ["unet", "unet/config.json", UNET, "tokenizer", "scheduler/scheduler_config.json"])
def test_missing_parts_are_refused(folder, part):
    path = folder / part
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert str(folder) in refusal(folder)


def test_a_missing_shard_is_named(folder):
    names = sorted(load_file(folder / UNET))
    shards = {name: f"diffusion_pytorch_model-0000{1 + i % 2}-of-00002.safetensors" for i, name in enumerate(names)}
    weights = load_file(folder / UNET)
    (folder / UNET).unlink()
    for shard in set(shards.values()):
        part = {name: weights[name] for name in names if shards[name] == shard}
        save_file(part, folder / "unet" / shard, metadata={"format": "pt"})
    index = folder / "unet" / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 0}, "weight_map": shards}))
    pipe = diffopt.load(folder, device="cpu")
    assert torch.equal(pipe.unet.state_dict()[names[0]], weights[names[0]])
    (folder / "unet" / "diffusion_pytorch_model-00002-of-00002.safetensors").unlink()
    assert "diffusion_pytorch_model-00002-of-00002.safetensors is missing" in refusal(folder)


def test_a_tokenizer_without_its_vocabulary_is_refused(folder):
    """transformers makes an empty tokenizer of it and says nothing."""
    for name in ("tokenizer.json", "vocab.json", "merges.txt"):
        (folder / "tokenizer" / name).unlink(missing_ok=True)
    assert "vocabulary is missing" in refusal(folder)


@pytest.mark.parametrize("text", ["{", "[]", "\udcff", "[" * 100_000])
def test_a_broken_index_is_refused(folder, text):
    (folder / "model_index.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    assert "model_index.json" in refusal(folder)


@pytest.mark.parametrize(
    "change",
    [{"attention_head_dim": 0}, {"norm_num_groups": 0}, {"transformer_layers_per_block": []}, {"sample_size": []}],
)
def test_numbers_that_make_no_model_are_refused(folder, change):
    edit_json(folder / "unet" / "config.json", **change)
    if "sample_size" in change:  # the model is as it was; what is unknown is the size of its pictures
        assert model_config_for(folder).defaults.width == 512
    else:
        assert "unet" in refusal(folder)


def test_a_tokenizer_that_knows_no_length_is_refused(folder):
    """transformers would fill prompts up to 10**30 tokens."""
    (folder / "tokenizer" / "tokenizer_config.json").write_text("{}")
    assert "doesn't say model_max_length" in refusal(folder)


# --- code that comes with a model -----------------------------------------------------------------------------------


def plant_pipeline_code(folder: Path) -> Path:
    """Give the folder a pipeline class of its own that leaves a file behind when it is imported."""
    trace = folder / "trace"
    code = f"""
        from pathlib import Path
        from diffusers import StableDiffusionPipeline
        Path({str(trace)!r}).touch()
        class Planted(StableDiffusionPipeline):
            pass
    """
    (folder / "pipeline.py").write_text(textwrap.dedent(code))
    edit_json(folder / "model_index.json", _class_name=["pipeline", "Planted"])
    return trace


def test_pipeline_code_runs_only_when_allowed(folder):
    trace = plant_pipeline_code(folder)
    line = refusal(folder)
    assert "--allow-custom-code" in line
    assert not trace.exists()
    pipe = diffopt.load(folder, device="cpu", allow_custom_code=True)
    assert type(pipe).__name__ == "Planted"
    assert trace.exists()


def test_component_code_is_refused(folder):
    edit_json(folder / "model_index.json", unet=["my_unet", "MyUNet"])
    assert "unet (my_unet MyUNet)" in refusal(folder)


def test_transformers_code_is_refused(folder):
    edit_json(folder / "text_encoder" / "config.json", auto_map={"AutoModel": "modeling.Mine"})
    assert "auto_map" in refusal(folder)


# --- single files ---------------------------------------------------------------------------------------------------


@pytest.fixture
def single(saved, tmp_path) -> Path:
    return to_single_file(saved, tmp_path / "tiny.safetensors")


def test_a_single_file_loads_with_the_same_weights_as_its_folder(single, saved):
    pipe = diffopt.load(single, config=saved, device="cpu")
    for file, module in ((UNET, pipe.unet), (VAE, pipe.vae), (TEXT, pipe.text_encoder)):
        expected = load_file(saved / file)
        assert all(torch.equal(expected[key], value) for key, value in module.state_dict().items())
    assert model_hash(pipe) == hashlib.sha256(single.read_bytes()).hexdigest()


def test_a_single_file_without_configuration_says_how_to_give_it(single, monkeypatch):
    def unreachable(*_args, **_options):
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unreachable)
    line = refusal(single)
    assert "can't be reached" in line
    assert "--config" in line


@pytest.mark.parametrize("prefix", ["model.diffusion_model.", "first_stage_model.", "cond_stage_model."])
class TestSingleFilesThatDoNotFit:
    def test_missing(self, single, saved, prefix):
        edit_weights(single, lambda weights: weights.pop(self.first(weights, prefix)))
        assert str(single) in refusal(single, config=saved)

    def test_extra(self, single, saved, prefix):
        edit_weights(single, lambda weights: weights.update({f"{prefix}another.weight": torch.zeros(3)}))
        assert "3 values too many" in refusal(single, config=saved)

    def test_other_shape(self, single, saved, prefix):
        edit_weights(single, lambda weights: weights.update({self.first(weights, prefix): torch.zeros(3, 5)}))
        assert str(single) in refusal(single, config=saved)

    @staticmethod
    def first(weights, prefix):
        ending = "layer_norm1.bias" if prefix == "cond_stage_model." else "bias"
        return next(name for name in sorted(weights) if name.startswith(prefix) and name.endswith(ending))


def test_other_single_files_are_refused(single, saved, tmp_path):
    with pytest.raises(InputError, match="model_index"):
        diffopt.load(single, config=tmp_path, device="cpu")
    single.write_bytes(single.read_bytes()[:-1])
    assert "damaged or incomplete" in refusal(single, config=saved)
    lora = tmp_path / "lora.safetensors"
    save_file({"lora_unet.weight": torch.zeros(2)}, lora)
    assert "no whole Stable Diffusion model" in refusal(lora, config=saved)
    old = tmp_path / "old.ckpt"
    torch.save({"state_dict": {}}, old)
    assert "pickled" in refusal(old, config=saved)


# --- defaults, schedulers, hashes -----------------------------------------------------------------------------------


def test_every_known_model_has_defaults_within_its_limits():
    assert {"emoji", "sd15", "sd21", "sdxl"} <= set(known_models())
    assert next(iter(known_models())) == "emoji"
    for config in known_models().values():
        limits, defaults = config.limits, config.defaults
        pixels = defaults.width * defaults.height
        assert pixels <= limits.max_pixels
        assert pixels * defaults.steps <= limits.max_work
        assert defaults.steps <= limits.max_steps
        assert defaults.width % limits.multiple == defaults.height % limits.multiple == 0


def test_another_folder_gets_the_size_its_models_were_made_for(folder, single):
    config = model_config_for(folder)
    assert (config.defaults.width, config.defaults.height, config.name) == (64, 64, "tiny")
    assert config.limits.max_pixels == 4 * 64 * 64
    assert model_config_for(single, config=folder).defaults.width == 64


INSTALLED = [name for name, choice in SCHEDULERS.items() if not choice.needs or importlib.util.find_spec(choice.needs)]


@pytest.mark.parametrize("name", INSTALLED)
def test_every_scheduler_runs(saved, name):
    pipe = diffopt.load(saved, device="cpu", scheduler=name)
    pipe.set_progress_bar_config(disable=True)
    out = pipe("a cat", num_inference_steps=3, output_type="latent", generator=torch.Generator().manual_seed(0))
    assert out.images.isfinite().all()
    assert type(pipe.scheduler).__name__ == SCHEDULERS[name].class_name
    assert pipe.scheduler.config.beta_schedule == "scaled_linear"  # the model's own noise schedule is kept


def test_a_scheduler_that_needs_a_missing_package_says_so(folder, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"scheduler: 'lms'.*scipy.*others: ddim"):
        diffopt.load(folder, device="cpu", scheduler="lms")


def test_karras_sigmas_are_used_when_asked_for(saved):
    own = diffopt.load(saved, device="cpu").scheduler
    assert make_scheduler("dpmpp-2m-karras", own).config.use_karras_sigmas
    assert not make_scheduler("dpmpp-2m", make_scheduler("dpmpp-2m-karras", own)).config.use_karras_sigmas
    assert make_scheduler(None, own) is not own


def test_an_unknown_scheduler_lists_the_known_ones(folder):
    with pytest.raises(InputError, match=r"scheduler: 'eular'.*known: euler") as caught:
        diffopt.load(folder, device="cpu", scheduler="eular")
    assert all(name in str(caught.value) for name in SCHEDULERS)


def test_a_hash_follows_the_weights(folder):
    before = model_hash(folder)
    pipe = diffopt.load(folder, device="cpu")
    assert model_hash(pipe) == before
    moved = folder.rename(folder.with_name("moved"))
    assert model_hash(moved) == before
    edit_weights(moved / VAE, lambda weights: weights["decoder.conv_out.bias"].add_(1))
    assert model_hash(moved) != before


def test_a_pipeline_whose_files_changed_is_not_hashed_as_the_new_files(folder):
    pipe = diffopt.load(folder, device="cpu")
    edit_weights(folder / VAE, lambda weights: weights["decoder.conv_out.bias"].add_(1))
    assert model_hash(pipe) != model_hash(folder)


def test_other_pipelines_are_hashed_by_their_tensors(folder):
    from diffusers import StableDiffusionPipeline

    first = StableDiffusionPipeline.from_pretrained(folder, local_files_only=True)
    second = StableDiffusionPipeline.from_pretrained(folder, local_files_only=True)
    assert model_hash(first) == model_hash(second)
    second.unet.conv_in.bias.data.add_(1)
    assert model_hash(first) != model_hash(second)
