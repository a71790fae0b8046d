"""`python -m swaa_edge.shapes`: write a model of random weights with the shape of a real one (bench/random_model.py).

python -m swaa_edge.shapes qwen3-4b shape.gguf --type Q8_0
"""

from swaa_edge.bench.random_model import SHAPES, TYPES, main, write_shape

__all__ = ["SHAPES", "TYPES", "write_shape"]

if __name__ == "__main__":
    main()
