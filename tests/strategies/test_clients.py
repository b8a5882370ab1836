"""The register of clients: stable identities whatever the engine's node ids do."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from turnout.strategies.clients import ClientRegistry
from turnout.wire import ReplyRejected, load_checkpoint, save_checkpoint

BIG = 2**64 - 1


def reloaded(registry: ClientRegistry) -> ClientRegistry:
    other = ClientRegistry(registry.capacity)
    other.load_state_dict(registry.state_dict())
    return other


class TestIdentity:
    def test_a_node_is_its_own_client_until_it_names_one(self) -> None:
        registry = ClientRegistry()
        assert list(registry.register([BIG, 5], 1)) == [0, 1]
        assert registry.entries[0].key == BIG
        assert registry.identify(BIG, 3, 1) == 0
        assert registry.entries[0].key == 3
        assert registry.row_of_node(BIG) == 0

    def test_a_reconnect_with_a_new_node_id_is_the_same_client(self) -> None:
        registry = ClientRegistry()
        registry.register([10, 11], 1)
        assert registry.identify(10, 3, 1) == 0
        registry.seen(0, 1, 7)
        assert list(registry.register([12], 5)) == [2]  # Not known to be client 3 yet ...
        assert len(registry) == 3
        assert registry.identify(12, 3, 5) == 0  # ... but now.
        assert len(registry) == 2
        assert registry.seen(0, 5, 7) == 4
        assert registry.row_of_node(12) == registry.row_of_node(10) == 0

    def test_rows_are_never_given_twice(self) -> None:
        registry = ClientRegistry()
        registry.register([10, 11], 1)
        registry.identify(10, 3, 1)
        registry.register([12], 2)
        registry.identify(12, 3, 2)
        assert list(registry.register([13], 3)) == [3]
        assert list(reloaded(registry).register([14], 4)) == [4]

    def test_client_ids_that_are_other_nodes_ids(self) -> None:
        # In a simulation ids are small on both sides; here they are crossed.
        registry = ClientRegistry()
        registry.register([0, 1, 2], 1)
        rows = [registry.identify(node, client, 1) for node, client in ((0, 2), (1, 0), (2, 1))]
        assert rows == [0, 1, 2]
        assert [registry.entries[row].key for row in rows] == [2, 0, 1]
        assert len(registry) == 3
        for node, client, row in ((0, 2, 0), (1, 0, 1), (2, 1, 2)):
            assert registry.identify(node, client, 2) == row

    def test_a_node_may_speak_for_several_clients(self) -> None:
        registry = ClientRegistry()
        registry.register([7], 1)
        rows = [registry.identify(7, client, r) for r, client in ((1, 100), (2, 101), (3, 100))]
        assert rows == [0, 1, 0]
        assert len(registry) == 2

    @given(st.permutations(range(6)), st.permutations(range(6)))
    def test_arrival_order_does_not_change_who_is_who(self, nodes: list[int], arrivals: list[int]) -> None:
        registry = ClientRegistry()
        registry.register(nodes, 1)
        rows = {node: registry.row_of_node(node) for node in nodes}
        for node in arrivals:
            assert registry.identify(node, 100 + node, 1) == rows[node]
        assert len(registry) == 6


class TestCapacity:
    def test_len_is_what_was_declared(self) -> None:
        assert len(ClientRegistry(9)) == 9

    def test_clients_beyond_it_are_refused(self) -> None:
        registry = ClientRegistry(2)
        registry.register([10, 11], 1)
        for node, client in ((10, 0), (11, 1)):
            registry.identify(node, client, 1)
        registry.register([12], 2)
        with pytest.raises(ReplyRejected, match="num_clients=2"):
            registry.identify(12, 2, 2)
        with pytest.raises(ReplyRejected, match="num_clients=2"):
            registry.identify(10, 99, 2)
        assert registry.identify(12, 1, 2) == 1  # A known one from a new node is welcome.
        assert registry.identify(10, 0, 2) == 0


class TestExamples:
    def test_unknown_clients_count_as_the_mean(self) -> None:
        registry = ClientRegistry()
        registry.register(range(4), 1)
        assert registry.total_examples() == 4
        registry.seen(0, 1, 10)
        registry.seen(1, 1, 30)
        assert registry.total_examples() == 80
        registry.seen(0, 2, 50)
        assert registry.total_examples() == 160

    def test_staleness(self) -> None:
        registry = ClientRegistry()
        registry.register([4], 1)
        assert [registry.seen(0, r, 1) for r in (3, 4, 9)] == [0, 1, 5]


class TestRegister:
    def test_known_nodes_are_not_entered_again(self) -> None:
        registry = ClientRegistry()
        assert list(registry.register(range(3), 1)) == [0, 1, 2]
        assert list(registry.register(range(3), 2)) == []
        assert list(registry.register(range(4), 3)) == [3]
        assert list(registry.register([1, 9], 4)) == [4]
        assert registry.entries[3].registered == 3

    def test_a_list_that_changes_is_read_again(self) -> None:
        registry, nodes = ClientRegistry(), [1]
        registry.register(nodes, 1)
        nodes.append(2)
        assert list(registry.register(nodes, 2)) == [1]


class TestState:
    def test_round_trip_through_a_file(self, tmp_path: object) -> None:
        registry = ClientRegistry()
        registry.register([BIG, 2**63, 3, 4, 5], 1)
        for node, client in ((BIG, -(2**63)), (2**63, 2**63 - 1), (3, BIG), (4, 0)):
            row = registry.identify(node, client, 1)
            registry.seen(row, 1, 10 + row)
        path = f"{tmp_path}/clients"
        save_checkpoint(path, registry.state_dict())
        other = ClientRegistry()
        other.load_state_dict(load_checkpoint(path))
        assert other.entries == registry.entries
        assert [e.key for e in other.entries.values()] == [-(2**63), 2**63 - 1, BIG, 0, 5]
        assert other.total_examples() == registry.total_examples()
        assert other.identify(77, BIG, 2) == 2
        assert other.row_of_node(5) == 4

    def test_an_empty_register(self) -> None:
        assert reloaded(ClientRegistry()).entries == {}

    @given(
        st.lists(
            st.tuples(st.integers(0, BIG), st.none() | st.integers(-(2**63), BIG)),
            max_size=12,
            unique_by=lambda pair: pair[0],
        )
    )
    def test_any_register_survives(self, pairs: list[tuple[int, int | None]]) -> None:
        registry = ClientRegistry()
        registry.register([node for node, _ in pairs], 1)
        for i, (node, client) in enumerate(pairs):
            if client is not None:
                registry.seen(registry.identify(node, client, 1), 1, i + 1)
        other = reloaded(registry)
        assert other.entries == registry.entries
        np.testing.assert_equal(other.state_dict(), registry.state_dict())
