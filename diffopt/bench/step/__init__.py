"""Denoising steps: stock, ours and peers in turn, exactness first."""
