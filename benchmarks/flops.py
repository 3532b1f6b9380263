"""The arithmetic that training an adapter cannot do without, and the rate at which a card does it.

Per trained token, of a base that stays frozen:

    4 P          linear layers: 2 P forward, 2 P for the gradient by their inputs; P weights
    4 H V        the output head, likewise; H hidden values, V tokens in the vocabulary
    6 L D S      attention: 2 L D S forward over the causal half, twice that backward; L layers,
                 D values of all heads, S tokens in the block

Left out: the adapters (under 2 % at rank 16), norms, dequantisation and whatever is computed again.
So recomputation earns nothing here, and the share of a card's rate is that of useful work.
"""

import time

from benchmarks.models import Shape

SIZE_GPU, SIZE_CPU = 8192, 512
WARM_UP, TIMED = 3, 10


def flops_per_token(shape: Shape, tokens: int) -> int:
    linear = 4 * shape.num_linear_params
    head = 4 * shape.hidden * shape.vocab
    attention = 6 * shape.layers * shape.heads * shape.head_dim * tokens
    return linear + head + attention


def matmul_tflops() -> float:
    """Rate of a square bf16 product of random data: zeros would run faster."""
    import torch

    cuda = torch.cuda.is_available()
    size = SIZE_GPU if cuda else SIZE_CPU
    device = "cuda" if cuda else "cpu"
    left = torch.randn(size, size, device=device, dtype=torch.bfloat16)
    right = torch.randn(size, size, device=device, dtype=torch.bfloat16)
    for number in range(WARM_UP + TIMED):
        if number == WARM_UP:
            if cuda:
                torch.cuda.synchronize()
            started = time.perf_counter()
        torch.mm(left, right)
    if cuda:
        torch.cuda.synchronize()
    return 2 * size**3 * TIMED / (time.perf_counter() - started) / 1e12
