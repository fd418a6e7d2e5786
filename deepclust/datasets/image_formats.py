"""Which image files are read, and opening them within a limit on the memory that their pixels take."""

import io
import os
import re
import threading
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from PIL import Image
from PIL.JpegImagePlugin import JpegImageFile

try:  # of the extra `photos`: the format of the photos of many telephones
    from pillow_heif import register_heif_opener
except ImportError:
    has_heif = False
else:
    register_heif_opener()
    has_heif = True

Image.init()  # loads the plugins of all formats, which Image.open does not do when formats are chosen

# Formats that are known by the first bytes of a file, so that its name need not agree.
IMAGE_FORMATS = tuple(
    name
    for name in ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF", "PPM", "AVIF", "JPEG2000", "HEIF")
    if name in Image.OPEN
)
# What Pillow knows but no still image: Ghostscript would run the programs of EPS; the others are films, or kinds of
# files for which Pillow only knows the name.
NO_STILL_IMAGES = {"EPS", "WMF", "BUFR", "GRIB", "HDF5", "IPTC", "MPEG", "FLI", "PDF"}
# Every other format that Pillow reads here is tried for files with its suffix only: garbage passes for some of them.
FORMAT_OF_SUFFIX = {
    suffix: name
    for suffix, name in Image.registered_extensions().items()
    if name in Image.OPEN and name not in NO_STILL_IMAGES
}
IMAGE_SUFFIXES = frozenset(FORMAT_OF_SUFFIX)
USUAL_SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp", ".avif", ".jp2", ".pgm", ".ppm")
HEIF_SUFFIXES = (".heic", ".heif", ".hif")
JPEG_START = b"\xff\xd8\xff"
PIXELS_IN_MESSAGE = re.compile(r"\((\d+) pixels\)")

# Pillow warns from half the size on that it refuses; here, files above the limit are refused with a reason.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)


ImageFile = str | os.PathLike[str] | io.BytesIO
"""The path of an image file, or its content, whose format is one of IMAGE_FORMATS."""


class UnreadableImage(Exception):
    """Raised for a file that cannot be decoded; the message is one line with the reason."""


class PillowLimit:
    """The number of pixels that Pillow reads: one for all threads, so it is put back when none needs another one."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.num_users = 0
        self.before: int | None = None

    @contextmanager
    def at_least(self, num_pixels: int) -> Iterator[int | None]:
        """Raise the limit inside the `with` block to `num_pixels` or more; give what it was before."""
        with self.lock:
            if self.num_users == 0:
                self.before = Image.MAX_IMAGE_PIXELS
            self.num_users += 1
            if Image.MAX_IMAGE_PIXELS is not None:
                Image.MAX_IMAGE_PIXELS = max(Image.MAX_IMAGE_PIXELS, num_pixels)
            before = self.before
        try:
            yield before
        finally:
            with self.lock:
                self.num_users -= 1
                if self.num_users == 0:
                    Image.MAX_IMAGE_PIXELS = before


PILLOW_LIMIT = PillowLimit()


@contextmanager
def open_image(file: ImageFile, *, smallest_side: int, max_megapixels: float | None) -> Iterator[Image.Image]:
    """Open an image file, whose pixels can be read in the `with` block.

    A JPEG is going to be decoded at a fraction of its size, so that both sides keep `smallest_side` pixels or more.

    Args:
        max_megapixels: the largest image that is read, in millions of pixels as they are decoded; None: as many as
            Pillow reads by itself.

    Raises:
        UnreadableImage: if the image is larger; the message names the key.
        Exception: whatever Pillow raises for a file that is broken, or no image.
    """
    # Pillow compares an image with its limit when it is opened, and some formats again when the pixels are read.
    with (
        PILLOW_LIMIT.at_least(0 if max_megapixels is None else int(max_megapixels * 1e6)) as pillow_limit,
        open_within_limit(file, smallest_side, max_megapixels, pillow_limit) as image,
    ):
        yield image


def open_within_limit(
    file: ImageFile, smallest_side: int, max_megapixels: float | None, pillow_limit: int | None
) -> Image.Image:
    """Do the opening of `open_image`, where Pillow would read `pillow_limit` pixels by itself."""
    suffix = "" if isinstance(file, io.BytesIO) else os.path.splitext(file)[1].lower()
    own_format = FORMAT_OF_SUFFIX.get(suffix)
    formats = IMAGE_FORMATS if own_format is None else (*dict.fromkeys((*IMAGE_FORMATS, own_format)),)
    try:
        image = Image.open(file, formats=formats)
    except Image.DecompressionBombError as error:
        if not is_jpeg(file):
            size = PIXELS_IN_MESSAGE.search(str(error))
            raise UnreadableImage(describe_too_large(int(size[1]) if size else None, max_megapixels)) from error
        # Image.open refuses it by its full size, which is never decoded.
        if isinstance(file, io.BytesIO):
            file.seek(0)
        image = JpegImageFile(file if isinstance(file, io.BytesIO) else os.fspath(file))
    try:
        full_size = image.width * image.height
        image.draft(None, (smallest_side, smallest_side))
        # All of a progressive JPEG is kept in memory, at whatever size it is decoded.
        num_pixels = full_size if image.info.get("progressive") else image.width * image.height
        limit = 2 * (pillow_limit or num_pixels) if max_megapixels is None else max_megapixels * 1e6
        if num_pixels > limit:
            raise UnreadableImage(describe_too_large(num_pixels, max_megapixels))
    except BaseException:
        image.close()
        raise
    return image


def is_jpeg(file: ImageFile) -> bool:
    if isinstance(file, io.BytesIO):
        return file.getvalue().startswith(JPEG_START)
    with open(file, "rb") as opened:
        return opened.read(len(JPEG_START)) == JPEG_START


def describe_too_large(num_pixels: int | None, max_megapixels: float | None) -> str:
    """Return why an image is not read, in one line that names the key to change."""
    size = "more" if num_pixels is None else f"{num_pixels / 1e6:.1f}"
    if max_megapixels is None:
        return f"it has {size} megapixels, too many to be decoded"
    return f"it has {size} megapixels to decode, and max_megapixels is {max_megapixels:g}"


def describe_passed_over(counts: Counter[str]) -> str:
    """Return, for instance, "3 .txt, 1 without suffix"; the five most frequent suffixes are listed.

    HEIC files are always named, with what it takes to read them.
    """
    text = ", ".join(f"{number} {suffix or 'without suffix'}" for suffix, number in counts.most_common(5))
    num_heif = sum(counts[suffix] for suffix in HEIF_SUFFIXES)
    if has_heif or not num_heif:
        return text
    return f"{text} ({num_heif} in HEIC: pip install pillow-heif, or the extra photos, to read them)"
