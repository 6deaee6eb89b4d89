"""What the corpora of images share: which training images are for validation, and whether a set is complete."""

import logging
from pathlib import Path

from vmd_scale.config import DataConfig
from vmd_scale.errors import UserError

log = logging.getLogger(__name__)

VALIDATION_IMAGES = 5000


def image_range(config: DataConfig, split: str, images: int, published: int, path: Path) -> range:
    """Numbers of a split's images in their file: of the training images the last ones are for validation.

    Args:
        images: how many there are in the training or the test file, of which `published` are expected.
        path: of that file, for messages.

    Raises:
        UserError: data.validation_documents (null: 5,000) leaves nothing to train on.
    """
    if images != published:
        log.warning("%s has %d images, not %d: do not report its figures as the set's own", path, images, published)
    if split == "test":
        return range(images)
    validation = config.validation_documents or VALIDATION_IMAGES
    if images <= validation:
        raise UserError(
            f"data.validation_documents is {validation:,}, but {path} has only {images:,} training images; "
            "it must leave some for training"
        )
    border = images - validation
    return range(border, images) if split == "validation" else range(border)
