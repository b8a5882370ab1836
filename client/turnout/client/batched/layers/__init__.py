"""Layers of a stack of models, with backward passes written by hand. Inputs are (a, w, ...) for a clients."""
