"""The end-to-end cases of the GPU check, in the syntax of tests/support/oracle/grid.py.

The cases cover:

- head sizes 64, 80, 96, 128 and 256;
- one KV head for up to four query heads;
- windows and sinks that end at or near block edges;
- prompts longer than a batch;
- ubatches that are not a multiple of a tile;
- several sequences, in a unified cache or with one stream per sequence;
- every policy and every KV type.

    for line in CASES: Case.parse(line)
"""

from __future__ import annotations

CASES = (
    # One sequence with the block table. W and S lie at block edges, and some layers use FA decode.
    "qwen3/3 W256 S0 s111 d010 f16 table b512 u512 t1 p1300+12 unified explicit r1",
    "qwen3/3 W255 S1 s101 d100 f16 table b512 u512 t1 p1025+12 unified explicit r2",
    "qwen3/3 W257 S257 s111 d000 f16 table b512 u97 t1 p1100+6 unified explicit r3",
    "qwen3/3 W31 S100 s111 d111 f16 table b512 u64 t1 p700+12 unified auto r4",
    "qwen3/3 W1 S0 s111 d000 f16 table b256 u32 t1 p600+4 unified explicit r5",
    "llama/2 W300 S4 s11 d10 f16 table b1024 u512 t1 p1400+12 unified explicit r6",
    "llama/2 W64 S64 s10 d00 f16 table b97 u97 t1 p500+12 unified auto r7",
    "stablelm/2 W129 S255 s11 d01 f16 table b512 u128 t1 p900+6 unified explicit r8",
    "phi3/2 W200 S100 s11 d10 f16 table b512 u512 t1 p1000+12 unified explicit r9",
    "gemma/2 W256 S64 s11 d01 f16 table b512 u256 t1 p800+12 unified explicit r10",
    # Quantized K and V.
    "qwen3/3 W256 S100 s111 d010 q8_0 table b512 u512 t1 p1300+12 unified explicit r11",
    "llama/2 W63 S0 s11 d11 q8_0 table b512 u97 t1 p800+12 unified explicit r12",
    "gemma/2 W300 S1 s11 d00 q8_0 table b512 u512 t1 p900+6 unified explicit r13",
    # Several sequences.
    "qwen3/3 W128 S16 s111 d010 f16 table b512 u512 t1 p700+8,300+3,33+2 unified auto r14",
    "qwen3/3 W128 S16 s111 d010 f16 table b512 u128 t1 p700+8,513+3 streams auto r15",
    "llama/2 W257 S1 s11 d10 q8_0 table b512 u512 t1 p600+6,600+6 streams explicit r16",
    # The other policies.
    "qwen3/3 W256 S100 s111 d010 f16 copy b512 u512 t1 p1300+12 unified explicit r17",
    "llama/2 W63 S0 s11 d10 q8_0 copy b512 u97 t1 p800+12 unified explicit r18",
    "gemma/2 W128 S16 s10 d10 f16 copy b512 u512 t1 p600+8,300+3 streams auto r19",
    "qwen3/3 W256 S100 s111 d010 f16 dense b512 u512 t1 p1000+12 unified explicit r20",
    "stablelm/2 W31 S1 s11 d11 f32 dense b512 u128 t1 p500+6 unified auto r21",
)
#: Cases for both libraries with SWAA off. The logits must be identical bit for bit. The head size is 128, because the
#: unpatched library is complete only for this head size.
OFF_CASES = (
    "qwen3/3 W31 S4 s111 d101 f16 table b512 u512 t1 p1300+12 unified auto r1",
    "qwen3/3 W31 S4 s111 d101 f16 table b512 u97 t1 p700+8,60+3 unified auto r2",
    "qwen3/3 W31 S4 s111 d101 q8_0 table b512 u128 t1 p400+8,513+2,1+5 streams auto r3",
    "qwen3/3 W31 S4 s111 d101 f16 dense b512 u512 t1 p513+4 unified auto r4",
)
