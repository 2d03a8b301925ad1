"""The TensorRT-LLM checkpoint: read, write, verify, convert."""
