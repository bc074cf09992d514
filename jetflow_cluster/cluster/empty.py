"""An application of as many deployments, replicas and actors as ours, in which nothing is computed: what Ray and Serve
take by themselves.

``python -m jetflow_cluster.cluster.empty NUM_REPLICAS NUM_ACTORS`` starts it, says ``serving``, and ends when its
standard input does.
"""

from __future__ import annotations

import sys

import ray
from ray import serve
from ray.util.placement_group import placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from jetflow_cluster.cluster.ray_options import start_ray

_NAME = "empty"


class _Idle:
    """Stands for a directory or a router, and for a shard or a draft worker."""

    def __init__(self, *_: object):
        pass

    def ready(self) -> bool:
        return True


class _Replica:
    """Makes its actors in a placement group of their own and waits for them."""

    def __init__(self, num_actors: int):
        group = placement_group([{"CPU": 1.0}] * num_actors)
        ray.get(group.ready())
        self._actors = [
            ray.remote(_Idle)
            .options(
                num_cpus=1,
                scheduling_strategy=PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=index),
            )
            .remote()
            for index in range(num_actors)
        ]
        ray.get([actor.ready.remote() for actor in self._actors])


def run_empty(num_replicas: int, num_actors: int) -> None:
    """Starts it with so many actors in each replica; waits for the end of the standard input and takes it down."""
    start_ray(num_replicas * num_actors, log_to_driver=False)
    common = {"ray_actor_options": {"num_cpus": 0}, "health_check_period_s": 1.0}
    directory = serve.deployment(name="Directory", **common)(_Idle).bind()
    replicas = serve.deployment(name="Replica", num_replicas=num_replicas, **common)(_Replica).bind(num_actors)
    router = serve.deployment(name="Router", **common)(_Idle).bind(directory, replicas)
    serve.start(proxy_location="Disabled")
    handle = serve.run(router, name=_NAME, route_prefix=None)
    assert handle.ready.remote().result()
    sys.stdout.write("serving\n")
    sys.stdout.flush()
    sys.stdin.read()
    serve.delete(_NAME)
    ray.shutdown()


if __name__ == "__main__":
    run_empty(int(sys.argv[1]), int(sys.argv[2]))
