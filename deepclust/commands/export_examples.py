"""The Python file that `deepclust export` writes beside its output: how to load it without deepclust."""

from pathlib import Path

from deepclust.engine.output_files import shorten_name

EXAMPLE_SUFFIX = ".example.py"

HEAD = '''\
"""Loads the file beside this one, which deepclust has exported, and uses it. It needs {needs}.

{usage}
"""

import json
import sys
from pathlib import Path

{imports}

FILE = Path(__file__).with_name({name})
'''

READ_INPUT = '''

def read_input(paths, taken):
    """Return what the program takes, of image files (or .npy files of vectors), or noise if there are none.

    Images are uint8 (N, channels, height, width), from 0 to 255: floats are refused. Vectors are float32 (N, D, 1, 1).
    """
    _, channels, height, width = taken["shape"]
    if taken["dtype"] == "float32":
        rows = [np.load(path) for path in paths] or [np.random.default_rng(0).standard_normal((3, channels))]
        return np.concatenate(rows).astype(np.float32).reshape(-1, channels, 1, 1)
    if not paths:
        return np.random.default_rng(0).integers(0, 256, (3, channels, height, width), dtype=np.uint8)
    from PIL import Image, ImageOps

    images = []
    for path in paths:
        image = ImageOps.exif_transpose(Image.open(path)).convert("L" if channels == 1 else "RGB")
        if "whole" in taken["other_sizes"]:
            image = image.resize((width, height), Image.Resampling.BILINEAR)
        else:  # the central part
            image = ImageOps.fit(image, (width, height), Image.Resampling.BILINEAR)
        images.append(np.asarray(image).reshape(height, width, channels).transpose(2, 0, 1))
    return np.stack(images)

'''

TORCHSCRIPT = """
extra = {{"deepclust": ""}}
program = torch.jit.load(FILE, map_location="cpu", _extra_files=extra)
description = json.loads(extra["deepclust"])
images = read_input(sys.argv[1:], description["input"])
with torch.no_grad():
    clusters, confidence, features = program(torch.from_numpy(images))
"""

ONNX = """
session = onnxruntime.InferenceSession(str(FILE), providers=["CPUExecutionProvider"])
description = json.loads(session.get_modelmeta().custom_metadata_map["deepclust"])
images = read_input(sys.argv[1:], description["input"])
clusters, confidence, features = session.run(None, {{"images": images}})
"""

PRINT_OUTPUT = """
print(f"{description['method']}, input {images.dtype} {images.shape}, features {tuple(features.shape)}")
for cluster, share in zip(clusters.tolist(), confidence.tolist()):
    print(f"cluster {cluster} with confidence {share:.3f}")
"""

SAFETENSORS = """
with safetensors.safe_open(FILE, "np") as file:
    description = json.loads(file.metadata()["deepclust"])
    weights = {{name: file.get_tensor(name) for name in file.keys()}}
print(json.dumps(description, indent=2))  # among others, what the network is built from
for name, value in weights.items():
    print(name, value.dtype, value.shape)
"""

PILLOW = "numpy and, for image files, pillow"
USAGE = "python THIS_FILE [IMAGE ...] prints the clusters of image files, or of noise if there are none."
FORMATS = {  # what it needs, how it is used, imports, body
    "torchscript": (
        f"torch, {PILLOW}",
        USAGE,
        "import numpy as np\nimport torch",
        TORCHSCRIPT,
    ),
    "onnx": (f"onnxruntime, {PILLOW}", USAGE, "import numpy as np\nimport onnxruntime", ONNX),
    "safetensors": (
        "safetensors and numpy",
        "python THIS_FILE prints the description of the network and the shapes of its weights.",
        "import safetensors",
        SAFETENSORS,
    ),
}


def name_example(output: Path) -> Path:
    """Return the file beside `output` that holds the example."""
    return output.with_name(shorten_name(output.name + EXAMPLE_SUFFIX))


def compose_example(form: str, output: Path) -> str:
    """Return a program that loads `output`, a file of the format `form`, from the folder that it is in itself."""
    needs, usage, imports, body = FORMATS[form]
    values = {"needs": needs, "usage": usage, "imports": imports, "name": ascii(output.name)}
    text = HEAD.format(**values)
    if form == "safetensors":
        return text.replace("import sys\n", "") + body.format()
    return text + READ_INPUT + body.format() + PRINT_OUTPUT
