"""Whether a run fits a slice of accelerators, and what bounds it, before one is rented.

    python -m opd_jax.plan --config=configs/NAME.py[:arg] --topology=v5e:4x4

No accelerator is needed. In seconds: whether every sharded dimension divides, bytes on each device,
FLOPs and memory traffic, and the bounds that follow. With the TPU compiler (the extra `plan`) also
temporaries and collectives of the very programs that the run would use, or why it refuses them.

- `chips`: the chips and the slices.
- `models`: sizes of the models that a config names, without their weights.
- `workload`: how much an update does, and a config fitted to a slice.
- `placement`: abstract arrays, placed as a run places the real ones.
- `program`: one program, and all of a run.
- `sampling`, `judging`, `training`, `programs`: the programs of a run and their arguments.
- `jaxpr_flops`: FLOPs of a program.
- `analysis`: all of that for a config on a slice.
- `hlo`, `loops`, `collectives`: what a compiled program sends between devices.
- `compiling`, `compile_one`: each program compiled in a process of its own, and remembered.
- `verdict`, `smallest`: fits, uncertain or does not fit; the smallest slice that does.
- `report`, `screen`: the plan as a dictionary, and as text.
"""
