"""Ray's placement groups: which there are, and the actors that take what a worker needs of a bundle.

Such an actor, the *bundle keeper*, does nothing. While a worker runs on the devices of its bundle, the keeper holds
them in Ray's books, and it is where Ray says which they are. This runs in the desk's process and in the actor; with
`desk.py` it is all that imports Ray.
"""

from __future__ import annotations

import contextlib
from typing import Any

import msgspec

CREATED, REMOVED, PENDING = "CREATED", "REMOVED", ("PENDING", "PREPARED")
NAMES_SHOWN = 10


class RayGroup(msgspec.Struct, frozen=True, kw_only=True):
    """A placement group. `bundles`: what each reserves, by resource."""

    id: str
    name: str
    state: str
    bundles: list[dict[str, float]]


class FoundGroups(msgspec.Struct, frozen=True, kw_only=True):
    """`found`: those of that id or name, removed ones too. `others`: some of the rest that are there, as they are
    called."""

    found: list[RayGroup]
    others: list[str]


class BundleShare(msgspec.Struct, frozen=True, kw_only=True):
    """What one worker takes of a bundle of the group `group` (its id)."""

    key: str
    group: str
    bundle: int
    num_gpus: float
    num_cpus: float


class TakenShare(msgspec.Struct, frozen=True, kw_only=True):
    """`ray_id`: the node that the bundle lies on. `devices`: GPUs that Ray has given, as the node calls them."""

    ray_id: str
    devices: list[str]


class BundleKeeper:
    """The actor."""

    def where(self) -> tuple[str, list[str]]:
        """Its node's id, and its GPUs."""
        import ray

        context = ray.get_runtime_context()
        devices = [str(one) for one in context.get_accelerator_ids().get("GPU", [])]
        return context.get_node_id(), sorted(devices, key=lambda one: (len(one), one))


class RayBundles:
    """The bundle keepers of a pool, by the keys of their shares."""

    def __init__(self) -> None:
        self._keepers: dict[str, Any] = {}

    def groups(self, wanted: str) -> FoundGroups:
        """Names are looked for in all of Ray's namespaces."""
        from ray.util import placement_group_table

        known = [_group(one) for one in placement_group_table().values()]
        found = [one for one in known if wanted in (one.id, one.name)]
        others = [one.name or one.id for one in known if one not in found and one.state != REMOVED]
        return FoundGroups(found=found, others=sorted(others)[:NAMES_SHOWN])

    def take(self, share: BundleShare, limit_s: float) -> TakenShare | None:
        """Taken again where it was. None where Ray did not give it within `limit_s`."""
        import ray
        from ray.exceptions import GetTimeoutError
        from ray.util.placement_group import PlacementGroup
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        self.free(share.key)
        group = PlacementGroup(ray.PlacementGroupID(bytes.fromhex(share.group)))
        there = PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=share.bundle)
        made = ray.remote(BundleKeeper).options(
            num_cpus=share.num_cpus, num_gpus=share.num_gpus, scheduling_strategy=there
        )
        keeper = made.remote()
        try:
            ray_id, devices = ray.get(keeper.where.remote(), timeout=limit_s)
        except BaseException as error:
            with contextlib.suppress(Exception):
                ray.kill(keeper)
            if isinstance(error, GetTimeoutError):
                return None
            raise
        self._keepers[share.key] = keeper
        return TakenShare(ray_id=ray_id, devices=devices)

    def free(self, key: str) -> None:
        """Idempotent."""
        import ray

        keeper = self._keepers.pop(key, None)
        if keeper is not None:
            ray.kill(keeper)

    def look(self, key: str, limit_s: float) -> bool:
        """That the keeper is there. Raises `KeyError` for none, and what Ray raises."""
        import ray

        ray.get(self._keepers[key].where.remote(), timeout=limit_s)
        return True


def _group(told: dict[str, Any]) -> RayGroup:
    bundles = told["bundles"]
    return RayGroup(
        id=told["placement_group_id"], name=told["name"], state=told["state"],
        bundles=[dict(bundles[index]) for index in sorted(bundles)],
    )  # fmt: skip
