"""Standing still at a named point of a save, so that somebody can kill the job there."""

from __future__ import annotations

import json
import threading
from dataclasses import dataclass
from pathlib import Path

from roll_ckpt.disk import failpoints


@dataclass(frozen=True)
class StopAt:
    """`vote.cast:checkpoint-9:actor_train`: a point, the save's name and, if it matters, the cluster."""

    point: str
    name: str
    cluster: str | None = None

    @classmethod
    def parse(cls, text: str) -> StopAt:
        parts = text.split(":")
        if len(parts) not in (2, 3) or not all(parts):
            raise ValueError(f"{text!r} is not POINT:NAME or POINT:NAME:CLUSTER")
        return cls(*parts)

    def arm(self, marker: Path) -> None:
        """From now on this rank's save stops for ever at the point and makes `marker`; training goes on."""

        def listener(point: str, where: dict[str, object]) -> None:
            if point != self.point or where.get("name") != self.name:
                return
            if self.cluster is not None and where.get("cluster") != self.cluster:
                return
            marker.parent.mkdir(parents=True, exist_ok=True)
            marker.write_text(json.dumps({"point": point, **{key: str(value) for key, value in where.items()}}))
            threading.Event().wait()

        failpoints.listener = listener
