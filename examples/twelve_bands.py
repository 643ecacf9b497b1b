"""Images of twelve bands whose class only a ratio of two bands tells: made, trained, measured and classified.

`python examples/twelve_bands.py FOLDER` writes FOLDER/bands, 16-bit TIFFs of twelve bands as a satellite takes them,
and FOLDER/rgb, what a camera would show of the same places; trains the same network on both, for minutes; and prints
both figures. Without FOLDER it does so with few images, for seconds. It needs `pip install 'coatnet[tiff]'`.
"""

import sys
import tempfile
from pathlib import Path

import numpy as np
import tifffile
from PIL import Image

import coatnet

CLASSES = {"dry": 0.6, "moist": 1.0, "wet": 1.6}  # the ratio of band 8, near infrared, to band 11, short-wave infrared
RED, GREEN, BLUE, NEAR, SHORT = 3, 2, 1, 7, 10  # places of bands
FULL_SCALE = 4095  # 12 bits, in files of 16


def make_image(random: np.random.Generator, ratio: float, side: int = 16) -> np.ndarray:
    """A field under some light: uint16 (side, side, 12)."""
    rough = random.uniform(0.6, 1.4, (4, 4, 12)).repeat(side // 4, axis=0).repeat(side // 4, axis=1)
    bands = random.uniform(400, 900, 12) * rough  # every band has its own brightness, in every image another one
    bands[..., NEAR] = ratio * bands[..., SHORT]
    noisy = bands * random.uniform(0.5, 2.0) + random.normal(0, 20, bands.shape)  # by the light of the day
    return noisy.clip(0, FULL_SCALE).astype(np.uint16)


def make_folders(folder: Path, per_class: int = 150, side: int = 16) -> None:
    """Write the images of each class to `folder/bands/CLASS/*.tif` and `folder/rgb/CLASS/*.png`."""
    random = np.random.default_rng(0)
    for name, ratio in CLASSES.items():
        for kind in ("bands", "rgb"):
            (folder / kind / name).mkdir(parents=True, exist_ok=True)
        for number in range(per_class):
            bands = make_image(random, ratio, side)
            tifffile.imwrite(
                folder / "bands" / name / f"{number}.tif",
                bands.transpose(2, 0, 1),
                photometric="minisblack",
                planarconfig="separate",
                tile=(16, 16),
                compression="deflate",
            )
            visible = (bands[..., [RED, GREEN, BLUE]] // 16).astype(np.uint8)
            Image.fromarray(visible).save(folder / "rgb" / name / f"{number}.png")


def main() -> None:
    quick = len(sys.argv) < 2
    folder = Path(tempfile.mkdtemp() if quick else sys.argv[1])
    if not (folder / "bands").exists():
        make_folders(folder, per_class=8 if quick else 150)
    for kind in ("bands", "rgb"):
        recipe = coatnet.Recipe(data=str(folder / kind), epochs=1 if quick else 15, seed=1)
        report = coatnet.train(recipe, folder / "runs" / kind)
        print(f"{kind}: {report.headline()}")
    image = next((folder / "bands" / "wet").glob("*.tif"))
    (prediction,) = coatnet.Predictor(folder / "runs" / "bands" / "bundle")(image)
    print(f"{image.name}: {prediction.classes[0]} {prediction.probabilities[0]:.0%}")


if __name__ == "__main__":
    main()
