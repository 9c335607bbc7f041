"""Minibatches: every row once a pass, equal shares of every rank, the same sets for any number of ranks."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from rlhf.modules.minibatches import minibatch_rows


@given(lines=st.integers(1, 6), per_rank=st.integers(1, 4), world=st.sampled_from([1, 2, 4]), seed=st.integers(0, 2**40))
def test_the_sets_do_not_depend_on_the_number_of_ranks(lines: int, per_rank: int, world: int, seed: int) -> None:
    size = 4 * per_rank
    rows = lines * size

    def sets(world_size: int) -> list[set[int]]:
        shares = [minibatch_rows(rows, size, rank=r, world_size=world_size, seed=seed) for r in range(world_size)]
        assert all(len(part) == size // world_size for share in shares for part in share)
        return [{int(local) * world_size + r for r, share in enumerate(shares) for local in share[j]} for j in range(lines)]

    together = sets(world)
    assert together == sets(1)
    assert sorted(row for part in together for row in part) == list(range(rows))


def test_the_order_changes_with_the_seed() -> None:
    orders = {tuple(minibatch_rows(32, 8, rank=0, world_size=1, seed=seed)[0].tolist()) for seed in range(8)}
    assert len(orders) > 6
