"""Attention alone: ours and every exact peer on a list of shapes, each in a process of its own."""
