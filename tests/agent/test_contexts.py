"""How rows read their contexts: in pieces that depend on no other row."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from models import one_layer

from opd_jax.agent.contexts import ContextCache
from opd_jax.agent.positions import Positions


def test_a_rows_pieces_depend_on_its_own_context_alone(random_params: Callable) -> None:
    sizes = one_layer(32)
    params = jax.tree.map(jnp.asarray, random_params(sizes, seed=0))
    positions = Positions()
    cache = ContextCache(
        params,
        sizes=sizes,
        rows=5,
        slots=64,
        widths=(4, 16),
        rows_read=2,
        positions=positions,
        purpose="reading",
    )
    lengths = [40, 3, 5, 18, 1]
    for row, length in enumerate(lengths):
        cache.put(row, [row + 1] * length)
    together = cache._pieces(range(5))
    for row in range(5):
        alone = cache._pieces([row])
        assert alone == {w: {row: rows[row]} for w, rows in together.items() if row in rows}
    # The last token is never read; what is longer than the widest piece goes on in another one.
    found = {row: (width, len(new)) for width in together for row, new in together[width].items()}
    assert found == {0: (16, 16), 1: (4, 2), 2: (4, 4), 3: (16, 16)}
    # Every call has the same number of rows.
    calls = [call for of_width in together.values() for call in cache._calls(of_width)]
    assert [len(call) for call in calls] == [2] * len(calls)
    cache.read(range(5))
    assert cache.held.tolist() == [length - 1 for length in lengths]
    # Three rounds, the first two with a call of each width, the last with one of the wide one.
    tokens, computed = sum(lengths) - len(lengths), 2 * (3 * 16 + 2 * 4)
    assert positions.metrics == {"padded/reading": (computed - tokens, computed)}
