"""The one fallback past damaged checkpoints: opens the newest sound one, and logs which were refused."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from roll_ckpt.errors import Damaged
from roll_ckpt.load.reader import Reader

log = logging.getLogger("roll_ckpt")

Open = Callable[[ExitStack, Path], Reader]
"""Opens and verifies a checkpoint, for as long as the stack is open; raises Damaged on every rank if it is damaged."""


@contextmanager
def newest_sound(
    output_dir: Path, names: Iterable[str], open_verified: Open, *, refused: Sequence[str] = (), advice: str = ""
) -> Iterator[tuple[str, Reader] | None]:
    """Open the first of `names` that is not damaged, and yield its name and reader; None if there are no names.

    Every rank calls with the same `names`, the newest first. `refused` are names already known to be damaged. Blocks
    while checkpoints are verified. Any error other than Damaged ends the search: a checkpoint that may be sound must
    not be replaced by an older one.

    Raises:
        Damaged: all of them are damaged; `advice` ends the message.
        NotFound, Unreadable, RanksDisagree: from `open_verified`.
    """
    passed = list(refused)
    for name in names:
        with ExitStack() as stack:
            try:
                reader = open_verified(stack, output_dir / name)
            except Damaged as problem:
                log.error("%s. Falling back to the checkpoint before it.", problem)
                passed.append(name)
                continue
            if passed:
                log.warning("%s: taking %s; refused: %s", output_dir, name, ", ".join(passed))
            yield name, reader
            return
    if passed:
        raise Damaged(
            f"{output_dir}: none of its checkpoints is sound ({', '.join(passed)}); see `roll-ckpt verify "
            f"{output_dir}`{advice}"
        )
    yield None
