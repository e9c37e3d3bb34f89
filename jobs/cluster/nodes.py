"""On which node a worker is, and whether that node is still there: Ray's own table of nodes, and no error's words."""

import ray

from workers.replica import Replica


class PlacedReplica(Replica):
    """A worker that knows its node."""

    def placed(self) -> tuple[str, str]:
        """The host that this runs on, and Ray's id of the node; a node that joins again has another id."""
        return self.place(), ray.get_runtime_context().get_node_id()


def nodes_alive() -> set[str]:
    """The ids of the nodes that are there, as the head sees it: it asks each of them every few seconds."""
    return {node["NodeID"] for node in ray.nodes() if node["Alive"]}  # type: ignore[no-untyped-call]
