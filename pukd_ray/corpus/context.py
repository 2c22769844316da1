"""What every stage of a run is given."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import ray

from pukd_ray.config import RunConfig
from pukd_ray.corpus.units import Unit
from pukd_ray.run.folder import RunFolder
from pukd_ray.runtime.engine import Cluster


@dataclass(frozen=True)
class Shared:
    """A value in the object store, wrapped: Ray warns of actors whose direct arguments it could lose."""

    ref: Any

    @classmethod
    def of(cls, value: Any) -> Shared:
        """Put `value` into the object store."""
        return cls(ray.put(value))

    def get(self) -> Any:
        """The value, without a copy where the store is on this node."""
        return ray.get(self.ref)


@dataclass(frozen=True)
class RunContext:
    """A run on a cluster: what all stages share, made once."""

    folder: RunFolder
    config: RunConfig
    cluster: Cluster
    weights: Shared
    """The teacher's state_dict as bytes."""
    units: Sequence[Unit] = ()
    """What `plan` made; empty before."""
    listing: pa.Table | None = None
    """Files as they were listed when the run started; only `plan` looks at it."""

    def units_of(self, role: str) -> list[Unit]:
        """Units of `positives`, `corpus` or `test`."""
        return [unit for unit in self.units if unit.role == role]
