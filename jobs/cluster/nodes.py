"""The node of a worker, and whether the node is alive: from Ray's own table of nodes, never from the text of an
error."""

import ray

from workers.replica import Replica


class PlacedReplica(Replica):
    """A worker that knows its node."""

    def placed(self) -> tuple[str, str]:
        """This host, and Ray's id of the node. A node that joins again has another id."""
        return self.place(), ray.get_runtime_context().get_node_id()


def nodes_alive() -> set[str]:
    """The ids of the nodes that are alive, as seen by the head, which checks each of them every few seconds."""
    return {node["NodeID"] for node in ray.nodes() if node["Alive"]}  # type: ignore[no-untyped-call]
