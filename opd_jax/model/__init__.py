"""The model: one decoder-only transformer, its parameters, its cache.

- `sizes`: sizes and switches. `params`: shapes, logical axes, initialization.
- `transformer`: the forward passes, over whole sequences and over a cache.
- `functions`: a model as pure functions, of any architecture.
- `attention`, `kernels`, `cache`, `projections`, `moe`: their parts.
- `int8`: frozen weights in 8 bits. `lora`: adapters beside frozen weights.
"""

from opd_jax.model.cache import (
    KVCache,
    cache_specs,
    init_cache,
)
from opd_jax.model.functions import Model, append, empty_cache, functions_of, head_of
from opd_jax.model.kernels import attention_on
from opd_jax.model.params import (
    Params,
    ParamSpec,
    head,
    head_params,
    init_arrays,
    init_params,
    is_sharded,
    is_spec,
    logits,
    param_specs,
    unstack,
)
from opd_jax.model.sizes import ModelConfig, RopeScaling
from opd_jax.model.transformer import REMAT, forward, forward_cached, longest
