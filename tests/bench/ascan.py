"""AsCAN: the inference form against the trained form.

    python -m tests.bench.ascan                                 # Tiny, batch 1, one thread
    python -m tests.bench.ascan --models ascan_base --batch 8

The options are those of `tests.bench.fcaformer`.
"""

from tests.bench.fcaformer import main

if __name__ == "__main__":
    main(models=("ascan_tiny",), segments=False)
