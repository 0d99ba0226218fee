"""Whether the pieces of a tensor are all of it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import numpy as np

from roll_ckpt.errors import Damaged
from roll_ckpt.formats.tensor_index.reader import Piece

_Box = tuple[tuple[int, ...], tuple[int, ...]]


def check_cover(pieces: Iterable[Piece], where: object) -> None:
    """Refuse pieces of one name and role, of all ranks, that do not hold each element of the tensor once; replicas are
    left out of it.

    Raises:
        Damaged: names the tensor and the hole, or the two pieces that overlap.
    """
    boxes: dict[_Box, list[Piece]] = {}
    for piece in pieces:
        if not piece.replica:
            boxes.setdefault((piece.offsets, piece.lengths), []).append(piece)
    if not boxes:
        raise Damaged(f"{where}: no piece of it is anywhere")
    first = next(iter(boxes.values()))[0]
    what = f"{where}: {first.name!r} ({first.role})"
    for (_, lengths), inside in boxes.items():
        at = 0
        for piece in sorted(inside, key=lambda piece: piece.start):
            if piece.shape != first.shape or piece.start != at:
                raise Damaged(f"{what}: elements {min(at, piece.start)} to {max(at, piece.start)} of a box of it are "
                              f"held {'twice' if piece.start < at else 'nowhere'}")  # fmt: skip
            at = piece.stop
        if at != math.prod(lengths):
            raise Damaged(f"{what}: elements {at} to {math.prod(lengths)} of a box of it are held nowhere")
    _check_boxes([*boxes], first.shape, what)


def _check_boxes(boxes: Sequence[_Box], shape: tuple[int, ...], what: str) -> None:
    starts = np.array([offsets for offsets, _ in boxes], np.int64).reshape(len(boxes), -1)
    ends = starts + np.array([lengths for _, lengths in boxes], np.int64).reshape(len(boxes), -1)
    for place in range(1, len(boxes)):
        apart = ((starts[:place] >= ends[place]) | (ends[:place] <= starts[place])).any(axis=1)
        if not apart.all():
            raise Damaged(f"{what}: two boxes of it overlap: {boxes[int(np.argmin(apart))]} and {boxes[place]}")
    held = sum(math.prod(lengths) for _, lengths in boxes)
    if held != math.prod(shape):
        raise Damaged(f"{what}: {math.prod(shape) - held} of its elements are held nowhere")
