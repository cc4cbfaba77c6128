"""Corruptions: what each does to pixels, and that an example has always the same one."""

import pytest
import torch
from PIL import Image
from torchvision.transforms import v2

from multilora.integrations.corruptions import STRENGTHS, Corrupted, corrupt, corrupted_sets

EACH = [(name, severity) for name in STRENGTHS for severity in (1, 5)]


def photo(channels=3, height=48, width=32):
    """Smooth shapes with some detail, in [0, 1]."""
    y, x = torch.meshgrid(torch.linspace(0, 6, height), torch.linspace(0, 4, width), indexing="ij")
    rows = [(x * (c + 1)).sin() * (y * (3 - c)).cos() for c in range(channels)]
    return (torch.stack(rows) + 1) / 2


@pytest.mark.parametrize("name, severity", EACH)
@pytest.mark.parametrize("channels", [1, 3])
def test_images_stay_images(name, severity, channels):
    image = photo(channels)
    before = image.clone()
    result = corrupt(image, name, severity)
    assert torch.equal(image, before) and not torch.equal(result, image)
    assert result.shape == image.shape and result.dtype == image.dtype
    assert result.min() >= 0 and result.max() <= 1


@pytest.mark.parametrize("name", STRENGTHS)
def test_every_severity_is_further_from_the_image(name):
    image = photo(height=64, width=64)
    distance = [(corrupt(image, name, s) - image).square().mean().item() for s in range(1, 6)]
    assert 0 < distance[0] < distance[4] and len(set(distance)) == 5
    # Where pixels are repeated irregularly, more of them may come nearer to a smooth image.
    assert distance == sorted(distance) or name == "pixelate"


def test_what_each_corruption_computes():
    image = photo() / 4 + 0.25  # so that nothing is clipped
    grey = v2.functional.rgb_to_grayscale(image).mean()
    contrast = grey + 0.2 * (image - grey)
    torch.testing.assert_close(corrupt(image, "contrast", 3), contrast, rtol=0, atol=1e-6)
    torch.testing.assert_close(corrupt(image, "brightness", 2), image + 0.2)
    noise = corrupt(torch.full((3, 64, 64), 0.5), "noise", 1) - 0.5
    assert noise.std().item() == pytest.approx(0.08, rel=0.02) and noise.mean().abs() < 0.003
    small = corrupt(photo(height=40, width=60), "pixelate", 5)
    assert len(small[0, 0].unique()) <= 15 and len(small[0, :, 0].unique()) <= 10
    torch.testing.assert_close(small.mean(), photo(height=40, width=60).mean(), rtol=0.03, atol=0)


def test_the_blur_is_measured_in_the_size_of_the_image():
    point = torch.zeros(1, 112, 150)
    point[0, 56, 75] = 1
    spread = corrupt(point, "blur", 5)
    x = torch.arange(150) - 75.0
    assert spread.sum().item() == pytest.approx(1, abs=1e-5)
    # σ = 6 of 224 pixels, so 3 of 112; the kernel ends at 3σ.
    assert (spread.sum((0, 1)) * x**2).sum().sqrt().item() == pytest.approx(3, rel=0.03)
    # On 14 pixels it is the 0.4 pixels that every blur has: about 4 % go to each neighbour.
    small = corrupt(torch.eye(14)[6:7].expand(1, 14, 14), "blur", 1)
    assert small[0, 0, 5].item() == pytest.approx(small[0, 0, 7].item()) == pytest.approx(0.04, 0.2)


def test_jpeg_is_that_of_a_file(tmp_path):
    image = photo()
    stored = (255 * image).round().to(torch.uint8)
    Image.fromarray(stored.permute(1, 2, 0).numpy()).save(tmp_path / "x.jpg", quality=10)
    again = v2.functional.pil_to_tensor(Image.open(tmp_path / "x.jpg")) / 255
    assert torch.equal(corrupt(image, "jpeg", 4), again)
    assert (again - image).abs().mean() > 0.01


def test_noise_is_of_the_example_alone():
    image = torch.full((3, 8, 8), 0.5)
    state = torch.get_rng_state()
    first, other = (corrupt(image, "noise", 1, seed) for seed in (3, 4))
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(5)
    assert torch.equal(corrupt(image, "noise", 1, 3), first) and not torch.equal(first, other)
    # A higher severity is more of the same noise.
    more = corrupt(image, "noise", 2, 3)
    torch.testing.assert_close((more - 0.5) / 0.12, (first - 0.5) / 0.08)


@pytest.mark.parametrize("name", STRENGTHS)
def test_normalised_images_are_corrupted_in_pixel_space(name):
    mean, std = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)
    normalise = v2.Normalize(mean, std)
    pixels = [photo(), photo().flip(1)]
    data = [(normalise(image), label) for label, image in enumerate(pixels)]
    corrupted = Corrupted(data, name, 3, mean, std)
    assert len(corrupted) == 2
    for index in (1, 0, 1):
        x, y = corrupted[index]
        assert y == index
        expected = corrupt(pixels[index], name, 3, seed=index)
        # A pixel may be rounded to the next of 256 values before JPEG codes it.
        atol = 0.05 if name == "jpeg" else 1e-5
        torch.testing.assert_close(x, normalise(expected), rtol=0, atol=atol)


def test_all_severities_of_all_corruptions():
    sets = corrupted_sets([(torch.zeros(1, 8, 8), 7)], (0.5,), (0.5,))
    assert list(sets) == [f"{n}/{s}" for n in STRENGTHS for s in (1, 2, 3, 4, 5)]
    assert len(sets) == 30
    x, y = sets["brightness/4"][0]
    assert y == 7 and torch.allclose(x, torch.tensor(0.8))


@pytest.mark.parametrize(
    "pixels, name, severity, message",
    [
        (photo(), "fog", 1, "corruption must be \"noise\", .*; got 'fog'"),
        (photo(), "noise", 0, r"severity must be an integer in \[1, 5\]; got 0"),
        (photo(), "noise", 6, "severity must be .* got 6"),
        (photo()[None], "noise", 1, r"float image .*got torch.float32 \(1, 3, 48, 32\)"),
        (photo(2), "noise", 1, r"1 or 3 channels.*\(2, 48, 32\)"),
        ((255 * photo()).byte(), "noise", 1, "got torch.uint8"),
    ],
)
def test_what_is_no_image_or_corruption(pixels, name, severity, message):
    with pytest.raises(ValueError, match=message):
        corrupt(pixels, name, severity)
