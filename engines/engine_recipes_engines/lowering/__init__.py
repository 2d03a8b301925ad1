"""From a TensorRT-LLM checkpoint to an ONNX decoder: what engines that lower share.

`decoder` says what is computed, in which order; `operators` has the pieces that every engine says alike; each engine
adds those that it says in its own way. `graph` writes the file, `weights` reads the checkpoint, `shapes` refuses
one that contradicts itself, `quantization` says what of its algorithms is known, `rope` has the angles.
"""
