"""Whether a run fits a slice of accelerators, and what bounds it, before one is rented.

    python -m opd_jax.plan --config=configs/NAME.py[:arg] --topology=v5e:4x4

No accelerator is needed. In seconds: whether every sharded dimension divides, bytes on each device,
FLOPs and memory traffic, and the bounds that follow. With the TPU compiler (the extra `plan`) also
temporaries and collectives of the very programs that the run would use, or why it refuses them.

- `chips`, `models`, `workload`: slices; sizes of models, without weights; how much an update does.
- `placement`, `program`: abstract arrays, placed as a run places the real ones; programs of them.
- `sampling`, `judging`, `training`, `programs`: the programs of a run.
- `jaxpr_flops`: FLOPs of a program.
- `compiling`, `hlo`, `loops`, `collectives`: memory of a compiled program, and what it sends.
- `verdict`, `smallest`: whether a run fits; the smallest slice that it fits.
- `report`, `screen`: the plan as a dictionary, and as text.
"""
