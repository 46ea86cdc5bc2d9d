"""Sample keys from file names."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence


def unique_keys(names: Sequence[str], classes: Sequence[str]) -> list[str]:
    """Keys of the samples of one split, in order.

    Args:
        names: Names of the image files without their endings.
        classes: The class name of each image.

    A key is the file's name, with "_" for dots and slashes (which webdataset takes for structure) and white space. A name that
    occurs more than once gets its class appended, and a number if the class does not make it unique.
    """
    stems = [_clean(name) for name in names]
    often = Counter(stems)
    taken: set[str] = set()
    keys = []
    for stem, class_name in zip(stems, classes, strict=True):
        base = stem if often[stem] == 1 else f"{stem}-{_clean(class_name)}"
        key, number = base, 2
        while key in taken or (key != stem and key in often):
            key, number = f"{base}-{number}", number + 1
        taken.add(key)
        keys.append(key)
    return keys


def _clean(name: str) -> str:
    return re.sub(r"[./\\\s\x00-\x1f\x7f]", "_", name)
