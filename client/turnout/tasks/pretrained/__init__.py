"""Pretrained models inside installed packages: MiniLM-L6, SmolLM2-135M, EfficientNet-Lite0."""
