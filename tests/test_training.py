"""The training path: fetching with hashes, captions, colours, shifts, a step that learns, weights that come back."""

import dataclasses
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from training_pictures import disc, picture, write_pack

from training import (
    architecture,
    autoencoder,
    captions,
    dataset,
    denoiser,
    evaluate,
    examples,
    fetch,
    pace,
    recolour,
    render,
    tokenizer,
    weights,
)
from training.recipe import Recipe

CPU = torch.device("cpu")
EAGER = pace.Mode("eager", CPU)
TEXTS = ["red apple", "blue heart, noto style", "a cat face", "yellow star, fluent style"] * 3


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory):
    return tokenizer.train(TEXTS, tmp_path_factory.mktemp("vocabulary"), vocabulary=560)


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """The real architecture at a few channels, so that a step takes milliseconds."""
    unet = {"block_out_channels": (16, 16, 16), "attention_head_dim": (1, 1, 1), "norm_num_groups": 8}
    monkeypatch.setattr(architecture, "UNET", {**architecture.UNET, **unet, "sample_size": 8})
    coder = {"block_out_channels": (8, 8, 8), "norm_num_groups": 4}
    monkeypatch.setattr(architecture, "AUTOENCODER", {**architecture.AUTOENCODER, **coder})
    monkeypatch.setattr(architecture, "TEXT", {**architecture.TEXT, "num_hidden_layers": 1})
    torch.manual_seed(0)


# fetch


def test_every_source_is_pinned_by_version_and_sha512():
    sources = fetch.read_sources()
    assert {source.name for source in sources} == {"emojibase", *captions.STYLES}
    for source in sources:
        assert source.version in source.file
        assert len(source.integrity) == len("sha512-") + 88


def test_fetch_refuses_an_archive_with_another_hash_in_one_line(tmp_path: Path):
    source = fetch.read_sources()[0]
    (tmp_path / source.file).write_bytes(b"not the archive")
    with pytest.raises(fetch.FetchError, match="not the pinned archive") as caught:
        fetch.fetch(source, tmp_path)
    assert "\n" not in str(caught.value)


def test_fetch_takes_an_archive_with_the_pinned_hash_without_a_network(tmp_path: Path):
    archive = tmp_path / "there.tgz"
    archive.write_bytes(b"content")
    source = dataclasses.replace(fetch.read_sources()[0], file=archive.name, integrity=fetch.integrity_of(archive))
    assert fetch.fetch(source, tmp_path) == archive


# captions


def test_skin_tones_and_flags_are_left_out():
    icons = ["red-apple", "waving-hand-dark-skin-tone", "boy-medium-light", "flag-norway", "crossed-flags", "dodo"]
    chars = {"1f34e": "red-apple", "1f44b-1f3ff": "waving-hand-dark-skin-tone", "1f38c": "crossed-flags"}
    emojibase = [{"hexcode": "1F34E", "label": "red apple", "group": 4}, {"hexcode": "1F38C", "group": 9}]
    chosen = captions.choose("noto", icons, chars, emojibase)
    assert [(entry.name, entry.group) for entry in chosen] == [("dodo", -1), ("red apple", 4)]


def test_captions_are_the_same_on_every_run_and_come_with_and_without_article_and_style():
    apple = captions.captions_of(picture())
    assert apple == captions.captions_of(picture())
    assert len(apple) == captions.CAPTIONS_PER_PICTURE
    assert {"red apple", "a red apple", "red apple, noto style", "a red apple, noto style"} <= set(apple)
    assert captions.with_article("owl") == "an owl"


def test_a_repainted_picture_is_captioned_by_its_new_colour_only():
    texts = captions.captions_of(picture(colour="red"), "blue")
    assert all("blue apple" in text and "red" not in text for text in texts)


def test_the_dominant_colour_is_named_for_things_and_not_for_faces():
    assert any("yellow star" in text for text in captions.captions_of(picture("star", colour="yellow")))
    face = captions.captions_of(picture("grinning face", colour="orange", group=0))
    assert not any("orange" in text for text in face)


# colours


@pytest.mark.parametrize(
    ("rgb", "word"),
    [((0.9, 0.1, 0.1), "red"), ((0.1, 0.4, 0.9), "blue"), ((1.0, 0.85, 0.2), "yellow"), ((0.2, 0.7, 0.2), "green")],
)
def test_a_disc_has_the_colour_it_was_painted_in(rgb: tuple[float, float, float], word: str):
    assert recolour.colour_words(disc(rgb)) == [word]


def test_grey_has_no_colour_word():
    assert recolour.colour_words(disc((0.5, 0.5, 0.5))) == [""]


@pytest.mark.parametrize("word", recolour.PAINTS)
def test_a_repainted_disc_has_the_new_colour_and_the_background_stays(word: str):
    before = disc((1.0, 0.85, 0.2))
    after = recolour.repaint(before, word)
    assert recolour.colour_words(after) == [word]
    assert torch.equal(after[..., 0, :], before[..., 0, :])


def test_oklab_and_back_is_the_same_picture():
    rgb = torch.rand(2, 3, 8, 8)
    assert torch.allclose(recolour.from_oklab(recolour.to_oklab(rgb)), rgb, atol=2e-3)


# data


def test_rendering_keeps_a_white_margin():
    pytest.importorskip("resvg_py", reason="resvg-py, of the extra named training, is not installed")
    body = '<path fill="#00f" d="M0 0h32v32H0z"/>'
    pixels = render.decode(render.render(render.svg_of(body, 0, 0, 32, 32), 64))
    assert pixels.shape == (64, 64, 3)
    assert (pixels[:4] == 255).all()
    assert (pixels[:, -4:] == 255).all()
    assert pixels[32, 32].tolist() == [0, 0, 255]


def titles_of(data: dataset.Dataset, layout: str) -> dict[str, int]:
    """The first caption of each example of a layout, and its place."""
    return {e.captions[0]: number for number, e in enumerate(data.examples) if e.layout == layout}


def test_the_dataset_holds_the_pictures_their_repaints_and_compositions(tmp_path: Path, words):
    data = dataset.load(write_pack(tmp_path), words, CPU)
    assert list(titles_of(data, "artwork")) == ["red apple", "star", "cloud"]
    painted = titles_of(data, "repaint")
    assert {"blue apple", "green star"} <= set(painted)
    assert "red apple" not in painted
    assert not any("cloud" in title for title in painted)
    assert data.rgb.shape == (len(data.examples), 3, 32, 32)
    assert data.tokens.shape == (len(data.examples), captions.CAPTIONS_PER_PICTURE, tokenizer.MAX_TOKENS)
    assert data.weight.sum() == pytest.approx(1.0)
    for layout, share in examples.SHARES.items():
        chosen = [number for number, e in enumerate(data.examples) if e.layout == layout]
        assert data.weight[chosen].sum() == pytest.approx(share, abs=1e-4), layout
    blue = data.rgb[painted["blue apple"]].float()[None] / 255
    assert recolour.colour_words(blue) == ["blue"]


def test_a_damaged_pack_is_not_left_behind(tmp_path: Path):
    file = tmp_path / render.PACK
    with pytest.raises(TypeError):
        render.pack([picture()], [None], file)  # type: ignore[list-item]
    assert not file.exists()
    assert zipfile.is_zipfile(write_pack(tmp_path))


def test_batches_are_shifted_by_at_most_one_latent_and_some_captions_are_empty(tmp_path: Path, words):
    torch.manual_seed(0)
    data = dataset.load(write_pack(tmp_path), words, CPU, repaints=False)
    latents = torch.zeros(1, 3, 4, 8, 8)
    latents[:, :, :, 4, 4] = 1.0
    batches = denoiser.Batches(data, latents, 512, Recipe())
    drawn, tokens = batches.draw()
    places = {tuple(place) for place in drawn[:, 0].nonzero()[:, 1:].tolist()}
    assert places == {(row, column) for row in (3, 4, 5) for column in (3, 4, 5)}
    empty = (tokens == data.empty).all(dim=1).float().mean().item()
    assert 0.05 < empty < 0.16


def test_timesteps_cover_the_schedule_and_prefer_its_middle():
    torch.manual_seed(0)
    timesteps = denoiser.draw_timesteps(20_000, CPU)
    assert timesteps.min() < 20
    assert timesteps.max() > 980
    assert ((timesteps > 250) & (timesteps < 750)).float().mean() > 0.58


# training


def test_the_learning_rate_warms_up_and_ends_annealed():
    assert pace.rate(1.0, 0, 0.0, 10) == pytest.approx(0.1)
    assert pace.rate(1.0, 50, 0.5, 10) == pytest.approx(0.5)
    assert pace.rate(1.0, 50, 1.0, 10) == pytest.approx(0.003)


def test_the_average_is_a_copy_first_and_then_follows_slowly():
    module = torch.nn.Linear(1, 1, bias=False)
    average = pace.Average(module, decay=0.9, start=1)
    for step, value in ((1, 2.0), (2, 3.0)):
        torch.nn.init.constant_(module.weight, value)
        average.update(step)
    average.copy_to(module)
    assert module.weight.item() == pytest.approx(2.1)


@pytest.mark.usefixtures("tiny")
def test_the_denoiser_learns_a_tiny_set_and_its_checkpoints_come_back(tmp_path: Path, words):
    data = dataset.load(write_pack(tmp_path), words, CPU, repaints=False)
    latents = torch.randn(1, 3, 1, 1, 1).expand(1, 3, 4, 8, 8).contiguous()
    model = denoiser.Denoiser(words).train()

    def loss() -> float:
        torch.manual_seed(1)
        total, optimizer = torch.zeros(()), torch.optim.SGD(model.parameters(), lr=0.0)
        average = pace.Average(model, 0.9, 0)
        step = denoiser.make_step(
            model, denoiser.Batches(data, latents, 64, Recipe()), optimizer, average, total, EAGER
        )
        step(True)
        return total.item()

    before = loss()
    saved: list[int] = []
    denoiser.train(
        data,
        latents,
        model,
        deadline=float("inf"),
        max_steps=60,
        batch=8,
        mode=EAGER,
        checkpoint=lambda average, steps: saved.append(steps),
        checkpoint_seconds=0.0,
    )
    assert saved == list(range(1, 61))
    assert loss() < 0.8 * before


@pytest.mark.usefixtures("tiny")
def test_normalised_latents_have_unit_deviation_and_the_reconstruction_stays():
    model = architecture.build_autoencoder().eval()
    pictures = torch.cat([disc((0.9, 0.1, 0.1)), disc((0.1, 0.2, 0.9)), torch.rand(1, 3, 32, 32)])
    pictures = (pictures * 255).to(torch.uint8)
    with torch.no_grad():
        before = model.decode(autoencoder.encode(model, pictures)).sample
        autoencoder.normalise(model, pictures, torch.ones(3))
        latents = autoencoder.encode(model, pictures)
        after = model.decode(latents).sample
    assert torch.allclose(before, after, atol=1e-3)
    assert latents.mean().abs() < 0.3
    assert 0.7 < latents.std() < 1.3


@pytest.mark.usefixtures("tiny")
def test_the_autoencoder_trains_and_reports_what_it_reaches():
    pictures = (torch.cat([disc((0.9, 0.1, 0.1)), disc((0.1, 0.2, 0.9))]) * 255).to(torch.uint8)
    _, metrics = autoencoder.train(pictures, torch.ones(2), seconds=1.0, batch=2, mode=EAGER)
    assert metrics["autoencoder_steps"] > 3
    assert np.isfinite(metrics["autoencoder_psnr_db"])


# what a run leaves


@pytest.mark.usefixtures("tiny")
def test_weights_come_back_and_a_changed_file_is_refused(tmp_path: Path, words):
    model, coder = denoiser.Denoiser(words), architecture.build_autoencoder()
    weights.write(
        tmp_path, unet=model.unet, text_encoder=model.text_encoder, autoencoder=coder, record={"denoiser_steps": 5}
    )
    parts, record = weights.read(tmp_path)
    assert record["denoiser_steps"] == 5
    for name, module in (("unet", model.unet), ("text_encoder", model.text_encoder), ("autoencoder", coder)):
        for key, value in module.state_dict().items():
            assert torch.equal(parts[name][key], value.half()), key
    assert not list(tmp_path.glob("*.new"))
    first = tmp_path / "unet.safetensors.0"
    first.write_bytes(first.read_bytes()[:-1] + b"x")
    with pytest.raises(weights.WeightsError, match="its hash differs"):
        weights.read(tmp_path)


def test_a_folder_without_a_run_is_refused(tmp_path: Path):
    with pytest.raises(weights.WeightsError, match="no run has written there"):
        weights.read(tmp_path)


def test_the_sheet_counts_the_concepts_that_are_near_and_nothing_else(words):
    concepts = list(evaluate.PROMPTS.values())
    torch.manual_seed(0)
    different = torch.randint(0, 256, (len(concepts), 3, 32, 32), dtype=torch.uint8)
    # Many pictures of something else, so that five nearest can't be right by chance.
    others = (different.float() * 0.5 + 64).to(torch.uint8).flip(0)

    def data(rgb: torch.Tensor, shown: list[str]) -> dataset.Dataset:
        made = [examples.Example("artwork", (0,), ("",), frozenset({name}), ("",), 1.0) for name in shown]
        return dataset.Dataset(rgb, torch.empty(0), torch.ones(len(made)), made, torch.empty(0))

    nothing = ["something else"] * len(concepts)
    assert all(evaluate.recognised(different, data(torch.cat([different, others]), [*concepts, *nothing])))
    assert not any(evaluate.recognised(different, data(others, nothing)))
