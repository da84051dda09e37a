"""Another program that has joined the cluster, as a trainer has: it makes placement groups, and takes from them.

python ray_driver.py ADDRESS NAMESPACE      commands as JSON lines on standard input, answers on standard output
"""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any


class RayDriver:
    """The test's side."""

    def __init__(self, address: str, namespace: str = "trainer") -> None:
        self._process = subprocess.Popen(
            [sys.executable, __file__, address, namespace], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=subprocess.PIPE, text=True,
        )  # fmt: skip

    def ask(self, verb: str, **given: Any) -> Any:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps({"verb": verb, **given}) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            assert self._process.stderr is not None
            raise RuntimeError(self._process.stderr.read()[-2000:])
        return json.loads(line)

    def group(self, name: str, *bundles: dict[str, float], strategy: str = "PACK", ready: bool = True) -> str:
        """Its id."""
        return str(self.ask("group", name=name, bundles=bundles, strategy=strategy, ready=ready))

    def remove(self, group: str) -> None:
        self.ask("remove", group=group)

    def can_take(self, group: str, bundle: int, gpus: float, limit_s: float) -> bool:
        """Whether an actor of the driver's gets so many GPUs of the bundle now; it gives them back."""
        return bool(self.ask("can_take", group=group, bundle=bundle, gpus=gpus, limit_s=limit_s))

    def hold(self, group: str, bundle: int, gpus: float) -> None:
        """Take them, and keep them until `let_go`."""
        self.ask("hold", group=group, bundle=bundle, gpus=gpus)

    def let_go(self) -> None:
        self.ask("let_go")

    def close(self) -> None:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait(30)
        for pipe in (self._process.stdout, self._process.stderr):
            assert pipe is not None
            pipe.close()


def main(address: str, namespace: str) -> None:
    import ray
    from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    ray.init(address, namespace=namespace, log_to_driver=False, logging_level="ERROR")
    groups: dict[str, PlacementGroup] = {}
    held: list[Any] = []

    @ray.remote
    class Holder:
        def there(self) -> bool:
            return True

    def taken(told: dict[str, Any]) -> Any:
        there = PlacementGroupSchedulingStrategy(groups[told["group"]], placement_group_bundle_index=told["bundle"])
        return Holder.options(num_cpus=0, num_gpus=told["gpus"], scheduling_strategy=there).remote()

    for line in sys.stdin:
        told, answer = json.loads(line), None
        if told["verb"] == "group":
            group = placement_group(told["bundles"], strategy=told["strategy"], name=told["name"])
            if told["ready"]:
                assert group.wait(60)
            answer = group.id.hex()
            groups[answer] = group
        elif told["verb"] == "remove":
            remove_placement_group(groups.pop(told["group"]))
        elif told["verb"] == "can_take":
            holder = taken(told)
            answer = bool(ray.wait([holder.there.remote()], timeout=told["limit_s"])[0])
            ray.kill(holder)
        elif told["verb"] == "hold":
            held.append(taken(told))
            ray.get(held[-1].there.remote())
        elif told["verb"] == "let_go":
            while held:
                ray.kill(held.pop())
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    sys.path.pop(0)
    main(sys.argv[1], sys.argv[2])
