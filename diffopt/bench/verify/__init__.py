"""The certificate of a model on this machine."""
