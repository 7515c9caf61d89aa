"""Runs that add up: the recipe, what a run goes on from, shards, and two whole runs in miniature on a CPU."""

import json
import time
from pathlib import Path

import pytest
import torch
from training_pictures import write_pack

from training import architecture, denoiser, export, pace, pairs, run, tokenizer, trainer, weights
from training.recipe import Recipe, loss_weights

WANTED = {"pairs_sha256": "a", "vocabulary_sha256": "b"}


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """The real architecture at a few channels, so that a step takes milliseconds."""
    unet = {"block_out_channels": (16, 16, 16), "attention_head_dim": (1, 1, 1), "norm_num_groups": 8}
    monkeypatch.setattr(architecture, "UNET", {**architecture.UNET, **unet, "sample_size": 8})
    coder = {"block_out_channels": (8, 8, 8), "norm_num_groups": 4, "sample_size": 32}
    monkeypatch.setattr(architecture, "AUTOENCODER", {**architecture.AUTOENCODER, **coder})
    monkeypatch.setattr(architecture, "TEXT", {**architecture.TEXT, "num_hidden_layers": 1})
    torch.manual_seed(0)


# recipe


def test_without_min_snr_every_timestep_weighs_the_same():
    signal = architecture.build_scheduler().alphas_cumprod
    assert torch.equal(loss_weights(signal, None), torch.ones(1000))


def test_min_snr_caps_the_weight_of_timesteps_with_little_noise():
    signal = torch.tensor([0.99, 0.5, 0.1])  # SNR 99, 1 and 1/9
    weights_of = loss_weights(signal, 5.0)
    assert weights_of.mean() == pytest.approx(1.0)
    expected = torch.tensor([5 / 100, 1 / 2, (1 / 9) / (10 / 9)])
    assert torch.allclose(weights_of / weights_of[1], expected / expected[1])


def test_the_command_line_changes_the_recipe_and_a_resumed_run_averages_from_its_start():
    options = run.options_of(["--min-snr", "5", "--views", "1"])
    assert trainer.recipe_of(options, resumed=False) == Recipe(min_snr=5.0, views=1)
    assert trainer.recipe_of(options, resumed=True).average_start == 0


def test_one_cosine_goes_through_all_runs():
    rates = [pace.rate(1.0, 500, (number + progress) / 2, 400) for number in (0, 1) for progress in (0.0, 0.5, 1.0)]
    assert rates == sorted(rates, reverse=True)
    assert rates[2] == pytest.approx(rates[3]) == pytest.approx(0.5)
    assert rates[-1] < 0.01


def test_views_are_latents_of_varied_pictures_and_the_first_is_the_picture_itself(monkeypatch: pytest.MonkeyPatch):
    from training import autoencoder

    monkeypatch.setattr(autoencoder, "encode", lambda model, rgb: rgb.float())
    rgb = torch.full((4, 3, 16, 16), 255, dtype=torch.uint8)
    rgb[:, :, 4:12, 4:12] = 0
    latents = denoiser.encode_views(None, rgb, 3)  # type: ignore[arg-type]
    assert latents.shape == (3, 4, 3, 16, 16)
    assert torch.equal(latents[0], rgb.float())
    assert not torch.equal(latents[1], latents[2])
    assert not torch.equal(latents[0], latents[1])


def test_batches_draw_every_view_with_the_caption_of_its_picture():
    from training.dataset import Dataset

    tokens = torch.arange(2).view(2, 1, 1).expand(2, 12, 77)
    data = Dataset(torch.empty(2, 3, 1, 1), tokens, torch.tensor([0.5, 0.5]), [], torch.full((77,), -1))
    latents = torch.arange(6.0).view(3, 2, 1, 1, 1).expand(3, 2, 4, 8, 8)  # view v of picture p is 2 v + p
    drawn, words = denoiser.Batches(data, latents, 400, Recipe(empty_share=0.0)).draw()
    assert set(drawn[:, 0, 0, 0].int().tolist()) == set(range(6))
    assert torch.equal(drawn[:, 0, 0, 0].int() % 2, words[:, 0].int())


# what a run leaves and goes on from


@pytest.mark.usefixtures("tiny")
def test_no_file_is_larger_than_a_shard_and_shards_join_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(weights, "SHARD", 4_000)  # more than ten of them: 10 comes after 9, not after 1
    coder = architecture.build_autoencoder()
    weights.write(tmp_path, unet=None, text_encoder=None, autoencoder=coder, record={})
    shards = list(tmp_path.glob("autoencoder.safetensors.*"))
    assert len(shards) > 10
    assert max(file.stat().st_size for file in shards) <= 4_000
    parts, _ = weights.read(tmp_path)
    assert list(parts) == ["autoencoder"]
    for name, value in coder.state_dict().items():
        assert torch.equal(parts["autoencoder"][name], value.half())


def test_a_shard_is_at_most_16_mib():
    assert weights.SHARD == 16 * 2**20


@pytest.mark.usefixtures("tiny")
def test_a_run_goes_on_from_its_own_folder_before_the_one_to_resume(tmp_path: Path):
    coder = architecture.build_autoencoder()
    for name in ("earlier", "own"):
        weights.write(tmp_path / name, unet=None, text_encoder=None, autoencoder=coder, record={**WANTED, "name": name})
    assert trainer.starting_point(tmp_path / "own", tmp_path / "earlier", WANTED)[1]["name"] == "own"
    assert trainer.starting_point(tmp_path / "new", tmp_path / "earlier", WANTED)[1]["name"] == "earlier"
    assert trainer.starting_point(tmp_path / "new", None, WANTED) == ({}, {})
    with pytest.raises(weights.WeightsError, match="no run has written there"):
        trainer.starting_point(tmp_path / "new", tmp_path / "nothing", WANTED)


@pytest.mark.usefixtures("tiny")
@pytest.mark.parametrize(("name", "what"), [("pairs_sha256", "held-out pairs"), ("vocabulary_sha256", "vocabulary")])
def test_weights_of_other_pairs_or_another_vocabulary_are_refused(tmp_path: Path, name: str, what: str):
    coder = architecture.build_autoencoder()
    weights.write(tmp_path, unet=None, text_encoder=None, autoencoder=coder, record={**WANTED, name: "other"})
    with pytest.raises(weights.WeightsError, match=what):
        trainer.starting_point(tmp_path, None, WANTED)


def test_runs_are_listed_and_their_steps_add_up():
    record = trainer.with_run({}, {"denoiser_steps": 100, "finished": True})
    record = trainer.with_run(record, {"denoiser_steps": 30, "finished": False})  # interrupted
    assert record["denoiser_steps"] == 130
    assert len(record["runs"]) == 2
    assert trainer.finished_runs(record) == 1


@pytest.mark.usefixtures("tiny")
def test_two_runs_in_miniature_add_up_and_become_a_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    data = tmp_path / "data"
    data.mkdir()
    write_pack(data)
    run.prepare(data)
    saved = tmp_path / "first", tmp_path / "second"
    for number, out in enumerate(saved):
        arguments = ["--data", data, "--out", out, "--mode", "eager", "--device", "cpu", "--batch", 4, "--runs", 2]
        arguments += ["--autoencoder-seconds", 0.2, "--autoencoder-batch", 2, "--sample-steps", 1, "--views", 2]
        arguments += ["--deadline", time.time() + 3600, "--max-steps", 5 + number]
        arguments += ["--resume", saved[0]] if number else []
        assert run.main([str(part) for part in arguments]) == 0
    first, second = (weights.read_record(out) for out in saved)
    assert [entry["finished"] for entry in second["runs"]] == [True, True]
    assert second["runs"][0] == first["runs"][0]
    assert (first["denoiser_steps"], second["denoiser_steps"]) == (5, 5 + 6)
    assert [entry["recipe"]["average_start"] for entry in second["runs"]] == [400, 0]
    assert second["pairs_sha256"] == pairs.pairs_hash()
    before, after = (weights.read(out)[0] for out in saved)
    for name, value in before["autoencoder"].items():
        assert torch.equal(value, after["autoencoder"][name]), name
    assert not torch.equal(before["unet"]["conv_in.weight"], after["unet"]["conv_in.weight"])
    assert (saved[1] / "samples.png").exists()

    export.assemble(saved[1], data, tmp_path / "model")
    assert json.loads((tmp_path / "model" / export.TRAINING_RECORD).read_text()) == second
    card = (tmp_path / "model" / "README.md").read_text()
    assert "Not measured yet" in card
    words = tokenizer.build_tokenizer(tmp_path / "model" / "tokenizer")
    assert len(words) == len(tokenizer.build_tokenizer(data))


def test_every_option_that_is_not_about_the_process_reaches_the_process_that_trains(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    orders: list[list[str]] = []

    class Done:
        returncode = 0

    monkeypatch.setattr(run, "prepare", lambda data: None)
    monkeypatch.setattr(run.subprocess, "run", lambda order: orders.append(order) or Done())
    asked = [
        "--resume",
        "x",
        "--runs",
        "3",
        "--min-snr",
        "5",
        "--rate",
        "0.001",
        "--views",
        "2",
        "--empty-share",
        "0.2",
    ]
    assert run.main([*asked, "--average-decay", "0.9", "--out", str(tmp_path), "--device", "cpu"]) == 0
    inner = run.options_of(orders[0][3:])
    assert (str(inner.resume), inner.runs, inner.min_snr, inner.rate) == ("x", 3, 5.0, 0.001)
    assert (inner.views, inner.empty_share, inner.average_decay, inner.mode) == (2, 0.2, 0.9, "eager")
