"""The numbers of ranks, payloads and residuals where each rank is a worker of its own."""

from dgc.exchange.base import Topology


def test_every_number_of_a_flat_topology_is_the_rank_or_the_world_size():
    flat = Topology.flat(2, 5)._asdict()
    assert [name for name, n in flat.items() if n == 2] == ["rank", "row", "share"]
    assert [name for name, n in flat.items() if n == 5] == ["ranks", "rows", "averaged", "workers", "shares"]
    assert (flat["place"], flat["places"]) == (0, 1)
