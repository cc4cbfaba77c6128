"""The sizes of models that the kernels are compiled, tuned and measured for."""

from __future__ import annotations

#: (d_in, d_out) of the linears of a ViT-B/16, whose query, key and value are one.
VIT_B = [(768, 768), (768, 2304), (768, 3072), (3072, 768)]
#: Those of one block with query, key, value and output apart, and the number of blocks.
VIT_B_BLOCK = [(768, 768)] * 4 + [(768, 3072), (3072, 768)]
VIT_B_BLOCKS = 12
#: Rows per particle: 64 images of 197 tokens.
VIT_ROWS = 64 * 197

#: The same of a 7B decoder, and 4096 tokens.
DECODER = [(4096, 4096), (4096, 11008), (11008, 4096)]
DECODER_BLOCK = [(4096, 4096)] * 4 + [(4096, 11008)] * 2 + [(11008, 4096)]
DECODER_BLOCKS = 32
DECODER_ROWS = 4096

#: (E, d_in, d_out, T) of the experts of Mixtral-8x7B and of Qwen3-30B-A3B, for the rows of 2048
#: tokens, which go to two and to eight of them.
EXPERTS = [(8, 4096, 28672, 2 * 2048), (128, 2048, 1536, 8 * 2048)]

#: (K, N, C) of logits.
LOGITS = [(4, 1024, 100), (8, 256, 10), (4, 64, 32000), (4, 1024, 32000), (4, 64, 152000)]
