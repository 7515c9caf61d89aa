"""The rest of a denoising step: captured graphs, fused modules, weights that share buffers; decoders of VAEs."""
