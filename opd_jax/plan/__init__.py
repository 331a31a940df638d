"""Whether a run fits a slice of accelerators, and what bounds it, before one is rented.

    python -m opd_jax.plan --config=configs/NAME.py[:arg] --topology=v5e:4x4

Needs no accelerator. At once: whether every sharded dimension divides, bytes on each device, FLOPs
and memory traffic, and the bounds that follow. With the TPU compiler (the extra `plan`) also what
it makes of the very programs that the run would use: temporaries, collectives, copies, or why it
refuses.

- `chips`: what is known of a chip, and which slices there are.
- `models`: sizes of the models that a config names, without their weights.
- `workload`: how much an update does, and how a config is laid over a slice.
- `placement`: abstract arrays, placed as a run places the real ones.
- `program`: one compiled program, and all of a run.
- `sampling`, `judging`, `training`, put together by `programs`: which there are, and their
  arguments.
- `jaxpr_flops`, `traffic`, `bounds`: what they cost at least.
- `analysis`: all of that for a config on a slice.
- `hlo`, `loops`, `collectives`: what compiled text says of collectives and copies.
- `compiling`, `compile_one`: each program compiled in a process of its own, and remembered.
- `verdict`, `smallest`: fits, uncertain or does not fit; the smallest slice that does.
- `report`, `tables`: everything as a dictionary, and as text.
"""
