"""The plain attention of a sequence over itself against JAX's own."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from models import assert_same_tree

from opd_jax.model.attention import attention


@pytest.mark.parametrize(
    ("T", "query_chunk"),
    [(8, 8), (19, 4), (40, 2), (37, 2)],
    ids=["at_once", "a_span_a_chunk", "loops", "loops_and_a_rest"],
)
def test_chunks_change_neither_result_nor_gradient(T: int, query_chunk: int) -> None:
    queries, keys = (2, T, 6, 4), (2, T, 2, 4)
    shapes = queries, keys, keys, queries
    q, k, v, weight = (
        jax.random.normal(key, shape)
        for key, shape in zip(jax.random.split(jax.random.key(0), 4), shapes, strict=True)
    )

    def run(attend: Any) -> Any:
        @partial(jax.grad, argnums=(0, 1, 2), has_aux=True)
        def gradient(q, k, v):
            out = attend(q, k, v)
            return jnp.sum(out * weight), out

        return jax.device_get(jax.jit(gradient)(q, k, v))

    ours = run(partial(attention, query_chunk=query_chunk))
    reference = run(partial(jax.nn.dot_product_attention, is_causal=True))
    assert_same_tree(ours, reference, rounding=2e-6)
