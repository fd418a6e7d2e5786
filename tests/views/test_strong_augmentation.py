"""The operations of SCAN's strong augmentation against those of Pillow for one image."""

import pytest
import torch
import torchvision.transforms.functional as TF
from PIL import Image, ImageEnhance, ImageOps

from deepclust.views import photometry, strong_augmentation
from deepclust.views.strong_augmentation import RandomOperations
from tests.views.conftest import make_images, seeded_generator

ROUNDING = 2.01 / 255  # of the image that is blended in and of the blend
SCAN = {
    "rotate": (-30, 30),
    "shear": (-0.1, 0.1),
    "translate": (-0.1, 0.1),
    "solarize": (0, 256 / 255),
    "posterize": (4, 8),
    "enhance": (0.05, 0.95),
}


def affine(image, matrix):
    return image.transform(image.size, Image.Transform.AFFINE, matrix)


PILLOW_OPERATIONS = [
    (strong_augmentation.identity, lambda image, v: image),
    (strong_augmentation.auto_contrast, lambda image, v: ImageOps.autocontrast(image)),
    (strong_augmentation.equalize, lambda image, v: ImageOps.equalize(image)),
    (strong_augmentation.rotate_images, lambda image, v: image.rotate(v)),
    (strong_augmentation.shear_x, lambda image, v: affine(image, (1, v, 0, 0, 1, 0))),
    (strong_augmentation.shear_y, lambda image, v: affine(image, (1, 0, 0, v, 1, 0))),
    (strong_augmentation.translate_x, lambda image, v: affine(image, (1, 0, v * image.size[0], 0, 1, 0))),
    (strong_augmentation.translate_y, lambda image, v: affine(image, (1, 0, 0, 0, 1, v * image.size[1]))),
    (photometry.solarize, lambda image, v: ImageOps.solarize(image, v * 255)),
    (strong_augmentation.posterize_images, lambda image, v: ImageOps.posterize(image, int(v))),
    (strong_augmentation.adjust_saturation, lambda image, v: ImageEnhance.Color(image).enhance(v)),
    (strong_augmentation.adjust_contrast, lambda image, v: ImageEnhance.Contrast(image).enhance(v)),
    (strong_augmentation.adjust_brightness, lambda image, v: ImageEnhance.Brightness(image).enhance(v)),
    (strong_augmentation.adjust_sharpness, lambda image, v: ImageEnhance.Sharpness(image).enhance(v)),
]
GEOMETRY = (
    strong_augmentation.rotate_images,
    strong_augmentation.shear_x,
    strong_augmentation.shear_y,
    strong_augmentation.translate_x,
    strong_augmentation.translate_y,
)


@pytest.mark.parametrize("number", range(14), ids=[operation.__name__ for operation, _ in PILLOW_OPERATIONS])
@pytest.mark.parametrize(("channels", "height", "width"), [(3, 32, 32), (1, 8, 8), (3, 40, 56)])
def test_operation_equals_pillow(number, channels, height, width):
    operation, pillow_operation = PILLOW_OPERATIONS[number]
    listed, (low, high) = RandomOperations(count=4, **SCAN).operations[number]
    assert listed is operation
    images = make_images(30, channels, height, width)
    strength = low + (high - low) * torch.rand(30, generator=seeded_generator())
    actual = operation(images, strength)
    expected = torch.stack(
        [
            TF.to_tensor(pillow_operation(TF.to_pil_image(image), float(v)))
            for image, v in zip(images, strength, strict=True)
        ]
    )
    wrong = (actual - expected).abs() > ROUNDING
    # A position may lie halfway between two pixels: rounding then decides which one is read.
    assert wrong.float().mean() < (0.002 if operation in GEOMETRY else 1e-9)


def test_every_operation_is_equally_likely_and_stays_within_its_bounds():
    operations = RandomOperations(count=4, **SCAN)
    draw = operations.draw(7000, seeded_generator())
    assert draw["operation"].shape == draw["strength"].shape == (7000, 4)
    counts = torch.bincount(draw["operation"].flatten(), minlength=14)
    assert counts.min() > 1800 and counts.max() < 2200  # 2000 each
    repeated = (draw["operation"][:, 0] == draw["operation"][:, 1]).float().mean()
    assert repeated == pytest.approx(1 / 14, abs=0.01)  # with replacement
    for number, (_, (low, high)) in enumerate(operations.operations):
        values = draw["strength"][draw["operation"] == number]
        assert values.min() >= low and values.max() <= high
        assert values.mean() == pytest.approx((low + high) / 2, abs=0.03 * (high - low) + 1e-9)


def test_operations_are_applied_one_after_the_other():
    operations = RandomOperations(count=4, **SCAN)
    images, draw = make_images(60, 3, 32), operations.draw(60, seeded_generator())
    actual = operations.apply(images, draw)
    for i, image in enumerate(images):
        expected = image[None]
        for number, strength in zip(draw["operation"][i].tolist(), draw["strength"][i], strict=True):
            expected = operations.operations[number][0](expected, strength[None])
        assert torch.allclose(actual[i], expected[0], atol=1e-6)
