"""A machine that runs PTX on the CPU: what Triton compiled, not what it would interpret.

- program.py: the text of a kernel as instructions.
- machine.py: the threads of a block, their registers, and who runs next.
- arithmetic.py, conversions.py: what a thread does by itself.
- memory.py, copies.py: global and shared memory, copies between them that end later.
- warps.py, matrices.py: what the threads of a warp do together.
- wgmma.py, fences.py: what Hopper adds to that.
- order.py: which accesses to shared memory nothing puts in an order.
- traffic.py: what accesses cost the memories.
- by_hand.py: runs kernels of a few lines. launch.py, install.py: run Triton's launches.

The semantics are those of NVIDIA's PTX ISA 8.7. It is strict where hardware is not: uninitialised
registers and memory hold NaN, an access outside the tensors of a launch raises, so do accesses to
shared memory that race, copies that are read before they were waited for, and warps that meet an
instruction for all of their threads divided. Approximate instructions err as much as they may.
"""
